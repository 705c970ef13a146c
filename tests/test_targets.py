"""What is perturbed: cells, states and genes, as the config asks for them."""

import numpy as np
import pytest

from mixgf import config, targets
from mixgf.config import UserError
from mixgf.dataset import Corpus

LENGTHS = [9, 4, 12, 7, 16, 5, 10, 8, 11]
SPECIES = [0, 1, 0, 0, 1, 0, 1, 0, 0]


@pytest.fixture(scope="module")
def corpus(make_corpus):
    return Corpus(make_corpus(LENGTHS, SPECIES, [4, 5], genes=20))


def plan(corpus, **settings):
    settings = {"max_cells": 0, "min_coverage": 0.01} | settings
    chosen = config.Config(perturb=config.Perturb(**settings), tokens=config.Tokens(max_len=16))
    return targets.design(corpus, chosen), chosen


def test_all_detected_genes_are_targets_of_their_species_with_their_coverage(corpus):
    design, _ = plan(corpus)
    sentences = [set(corpus.tokens([c])[0].tolist()) for c in range(9)]
    assert {t.tokens[0] for t in design.targets} == set().union(*sentences)
    for target in design.targets:
        mine = [s for s, code in zip(sentences, SPECIES, strict=True) if corpus.species[code] == target.species]
        assert target.coverage == pytest.approx(np.mean([target.tokens[0] in s for s in mine]))
    assert design.cells_N.tolist() == sorted(range(9), key=lambda c: (-LENGTHS[c], c))
    few, _ = plan(corpus, max_genes=3)
    best = sorted(design.targets, key=lambda t: (-t.coverage, t.tokens))[:3]
    assert {t.tokens for t in few.targets} == {t.tokens for t in best}
    with pytest.raises(UserError, match=r"perturb\.min_coverage = 2\.0: no gene is in so many of the 9 cells"):
        plan(corpus, min_coverage=2.0)


def test_named_genes_come_once_and_bring_as_many_nulls_as_asked(corpus):
    design, _ = plan(corpus, genes=("human3", "human3", "Ghuman00003", "mouse7"), null_genes=6)
    targets, nulls = ([t for t in design.targets if t.null is null] for null in (False, True))
    assert [t.symbol for t in targets] == ["human3", "mouse7"]
    assert [t.species for t in nulls] == ["human"] * 3 + ["mouse"] * 3
    assert not {t.tokens for t in nulls} & {t.tokens for t in targets}
    assert len({t.tokens for t in nulls}) == 6
    everything, _ = plan(corpus)
    coverage = {t.tokens: t.coverage for t in everything.targets}
    for target in nulls:
        assert target.coverage == coverage.get(target.tokens, 0.0)
    again, _ = plan(corpus, genes=("human3", "mouse7"), null_genes=6)
    assert again.targets == design.targets


def test_named_genes_and_sets(corpus):
    design, _ = plan(corpus, genes=("human3", "Ghuman00004+human5", "mouse7"))
    assert [t.symbol for t in design.targets] == ["human3", "human4+human5", "mouse7"]
    assert [t.species for t in design.targets] == ["human", "human", "mouse"]
    sentences = [set(corpus.tokens([c])[0].tolist()) for c in range(9) if SPECIES[c] == 0]
    both = np.mean([set(design.targets[1].tokens) <= s for s in sentences])
    assert design.targets[1].coverage == pytest.approx(both)
    assert design.genes_KM.shape == (3, 2)
    for genes, message in ((("nope",), "not in the human vocabulary"), (("human3+human3",), "names a gene twice")):
        with pytest.raises(UserError, match=rf"perturb\.genes: .*{message}"):
            plan(corpus, genes=genes)


def test_an_anchor_is_paired_with_every_gene_of_its_species_and_stands_alone_once(corpus):
    singles, _ = plan(corpus, min_coverage=0.3)
    best = max((t for t in singles.targets if t.species == "human"), key=lambda t: t.coverage)
    design, _ = plan(corpus, anchor=best.symbol, min_coverage=0.3)
    sentences = [set(corpus.tokens([c])[0].tolist()) for c in range(9) if SPECIES[c] == 0]
    anchor = best.tokens[0]
    expected = {(anchor,): np.mean([anchor in s for s in sentences])}
    for target in singles.targets:
        both = np.mean([{anchor, *target.tokens} <= s for s in sentences])
        if target.species == "human" and target.tokens != (anchor,) and both >= 0.3:
            expected[anchor, *target.tokens] = both
    assert len(expected) > 5
    assert {t.tokens: t.coverage for t in design.targets} == pytest.approx(expected)
    assert [t.symbol for t in plan(corpus, anchor="human3", genes=("human5", "human3"))[0].targets] == [
        "human3",
        "human3+human5",
    ]
    with pytest.raises(UserError, match=r"perturb\.anchor: .*not in the"):
        plan(corpus, anchor="nope")
    with pytest.raises(UserError, match=r"perturb\.screen = 5: must be 0 with perturb\.anchor"):
        config.Perturb(anchor="human3", screen=5, goal="cell_type == 'alpha'")


def test_states_hold_all_cells_even_when_few_are_perturbed(corpus):
    design, _ = plan(corpus, start="cell_type == 'beta'", goal="cell_type == 'alpha'", max_cells=2)
    assert len(design.cells_N) == 2
    assert [(s.name, s.cells.tolist()) for s in design.states] == [("start", [0, 2, 4, 6, 8]), ("goal", [1, 3, 5, 7])]
    assert design.goal == 1
    assert "no column 'donor': all cells count as one donor" in design.warnings[0]
    assert plan(corpus)[0].goal is None

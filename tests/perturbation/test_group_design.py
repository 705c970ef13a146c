"""What is perturbed: cells, states and genes, as the config asks for them."""

import numpy as np
import pyarrow as pa
import pytest
from invented import record_shards

from mixgf.config import data, perturbation, run
from mixgf.corpus.reader import Corpus
from mixgf.errors import UserError
from mixgf.perturbation import group_design
from mixgf.storage import tables

LENGTHS = [9, 4, 12, 7, 16, 5, 10, 8, 11]
SPECIES = [0, 1, 0, 0, 1, 0, 1, 0, 0]


@pytest.fixture(scope="module")
def corpus(make_corpus):
    return Corpus(make_corpus(LENGTHS, SPECIES, [4, 5], genes=20))


def plan(corpus, **settings):
    settings = {"max_cells": 0, "min_coverage": 0.01} | settings
    chosen = run.Config(perturb=perturbation.Perturb(**settings), tokens=data.Tokens(max_len=16))
    return group_design.build_design(corpus, chosen), chosen


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
    with pytest.raises(UserError, match=r"perturb\.min_coverage = 2\.0: must be at least 0 and at most 1"):
        plan(corpus, min_coverage=2.0)


def test_where_no_gene_is_in_so_many_cells_the_bound_is_named(corpus):
    sentences = [set(corpus.tokens([c])[0].tolist()) for c in range(9) if SPECIES[c] == 0]
    assert not set.intersection(*sentences)
    most = max(sum(gene in s for s in sentences) for gene in set.union(*sentences)) / 6
    with pytest.raises(
        UserError, match=r"perturb\.min_coverage = 1\.0: no gene is in so many of the 6 cells; lower it"
    ):
        plan(corpus, start="species == 'human'", min_coverage=1.0)
    found, _ = plan(corpus, start="species == 'human'", min_coverage=most)
    assert {target.coverage for target in found.targets} == {most}


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
        perturbation.Perturb(anchor="human3", screen=5, goal="cell_type == 'alpha'")


def test_states_hold_all_cells_even_when_few_are_perturbed(corpus):
    design, _ = plan(corpus, start="cell_type == 'beta'", goal="cell_type == 'alpha'", max_cells=2)
    assert len(design.cells_N) == 2
    assert [(s.name, s.cells.tolist()) for s in design.states] == [("start", [0, 2, 4, 6, 8]), ("goal", [1, 3, 5, 7])]
    assert design.goal == 1
    assert "no column 'donor': all cells count as one donor" in design.warnings[0]
    assert plan(corpus)[0].goal is None


@pytest.fixture(scope="module")
def many(make_corpus):
    """Two files; types A (start, goal), B, C and a rare D in the first, E in the second, X of mice; 25 cells each but for D."""
    kinds = ["A"] * 50 + ["B"] * 30 + ["C"] * 25 + ["D"] * 5 + ["unknown"] * 25 + ["E"] * 60 + ["X"] * 25
    species = [0] * 195 + [1] * 25
    uri = make_corpus([6] * 220, species, [220], genes=12)
    shard = f"{uri}/shards/00000.parquet"
    table = tables.read_table(shard)
    for name, values in (
        ("cell_type", kinds),
        ("source", ["one"] * 135 + ["two"] * 85),
        ("half", [c % 2 for c in range(220)]),
    ):
        table = table.set_column(table.column_names.index(name), name, pa.array(values)) if name in table.column_names else (
            table.append_column(name, pa.array(values)))  # fmt: skip
    tables.write_table(shard, table)
    record_shards(uri)
    return Corpus(uri)


def test_states_that_have_nothing_to_do_with_the_question_stand_in_for_alternatives(many):
    asked = {"start": "cell_type == 'A' and half == 0", "goal": "cell_type == 'A' and half == 1"}
    found = {s.name: s.cells.tolist() for s in plan(many, **asked)[0].states[2:]}
    assert found == {"alternative_0": list(range(50, 80)), "alternative_1": list(range(80, 105))}  # not E: another file
    assert [s.name for s in plan(many, **asked, unrelated=1)[0].states] == ["start", "goal", "alternative_0"]
    for none in ({"unrelated": 0}, {"goal": ""}):
        assert not [s for s in plan(many, **asked | none)[0].states if s.name.startswith("alternative")]
    given = plan(many, **asked, alternatives=("cell_type == 'E'",))[0].states
    assert [s.expression for s in given[2:]] == ["cell_type == 'E'"]  # what the user names is not added to
    # a file with one other type only: those of all files, still of no other species
    other = plan(many, start="cell_type == 'E'", goal="cell_type == 'A'")[0].states[2:]
    assert [s.cells.tolist() for s in other] == [list(range(50, 80)), list(range(80, 105))]


def test_what_genes_are_matched_by(corpus):
    design, _ = plan(corpus, genes=("human3", "human4+human5"))
    places = [
        s.index(design.targets[0].tokens[0])
        for s in (corpus.tokens([c])[0].tolist() for c in range(9))
        if design.targets[0].tokens[0] in s
    ]
    found = group_design.matching_features(corpus, design)
    assert found[0].tolist() == pytest.approx([np.mean(places), design.targets[0].coverage])
    assert np.isnan(found[1]).all()

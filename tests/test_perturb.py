"""What is perturbed, and the worker: every pair is scored once, and scored as plain code would."""

import numpy as np
import pytest
import torch

from mixgf import artifacts, checkpoint, config, perturb, storage
from mixgf.config import UserError
from mixgf.dataset import Corpus
from mixgf.model import MaskedModel

ROW = config.Model(num_layers=2, dim=16, num_heads=2, ffn_dim=32, max_positions=16, init_sd=0.3)
LENGTHS = [9, 4, 12, 7, 16, 5, 10, 8, 11]
SPECIES = [0, 1, 0, 0, 1, 0, 1, 0, 0]


@pytest.fixture(scope="module")
def corpus(make_corpus):
    return Corpus(make_corpus(LENGTHS, SPECIES, [4, 5], genes=20))


@pytest.fixture(scope="module")
def weights(corpus, tmp_path_factory):
    uri = str(tmp_path_factory.mktemp("pretrain"))
    record = artifacts.plan("checkpoint", 1, {}, {})
    artifacts.begin(uri, record)
    model = MaskedModel(ROW, corpus.vocabulary.size, seed=5)
    checkpoint.publish(uri, record, model, vocabulary=corpus.vocabulary.hash, tokens=config.Tokens(max_len=16))
    return uri


def plan(corpus, **settings):
    settings = {"max_cells": 0, "min_coverage": 0.01} | settings
    chosen = config.Config(perturb=config.Perturb(**settings), tokens=config.Tokens(max_len=16))
    return perturb.design(corpus, chosen), chosen


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


def run_units(corpus, weights, folder, **settings):
    design, chosen = plan(corpus, **settings)
    scorer = perturb.Scorer(chosen, corpus=corpus.uri, weights=weights, folder=str(folder))
    states = np.random.default_rng(3).normal(size=(len(design.states), 16))
    rows = {}
    work = perturb.units(design, corpus, chosen.perturb)
    for unit in work:
        assert scorer((unit, states)).cost == unit.cost
        if unit.operation != "embed":
            for row in storage.read_table(f"{folder}/{unit.key}.parquet").to_pylist():
                key = (unit.operation, row["target"], row["cell"])
                assert key not in rows
                rows[key] = row
    return design, states, rows, work, scorer


@pytest.mark.parametrize("insert_absent", [True, False])
def test_every_pair_is_scored_once_and_no_gene_of_another_species(corpus, weights, tmp_path, insert_absent):
    design, _, rows, _, _ = run_units(
        corpus, weights, tmp_path, block_cells=2, block_genes=7, insert_absent=insert_absent
    )
    expected = set()
    for cell in range(9):
        sentence = corpus.tokens([cell])[0].tolist()
        for k, target in enumerate(design.targets):
            present = target.tokens[0] in sentence
            if present:
                expected.add(("delete", k, cell))
            if present or (insert_absent and target.species == corpus.species[SPECIES[cell]]):
                expected.add(("overexpress", k, cell))
            for operation in ("delete", "overexpress"):
                if (operation, k, cell) in rows:
                    rank = sentence.index(target.tokens[0]) if present else -1
                    assert rows[operation, k, cell]["rank"] == rank
    assert rows.keys() == expected


def test_blocks_do_not_change_a_shift_and_costs_are_the_tokens_encoded(corpus, weights, tmp_path):
    blocks = ({"block_cells": 9, "block_genes": 100}, {"block_cells": 2, "block_genes": 3, "micro_tokens": 20})
    results = [
        run_units(corpus, weights, tmp_path / str(i), goal="cell_type == 'alpha'", **b) for i, b in enumerate(blocks)
    ]
    assert results[0][2].keys() == results[1][2].keys()
    for key, row in results[0][2].items():
        assert row["shift_1"] == pytest.approx(results[1][2][key]["shift_1"], abs=1e-7)
    for _, _, rows, work, _ in results:
        tokens = sum(LENGTHS[cell] for operation, _, cell in rows if operation == "overexpress")
        assert sum(u.cost for u in work if u.operation == "overexpress") == pytest.approx(tokens)


def test_a_set_is_scored_where_all_its_genes_are(corpus, weights, tmp_path):
    token = corpus.tokens([4])[0].tolist()  # the longest mouse cell: 16 of 20 genes
    names = [corpus.vocabulary.symbols()[t] for t in token[:2]]
    design, states, rows, _, scorer = run_units(
        corpus, weights, tmp_path, genes=("+".join(names),), operations=("delete",), goal="cell_type == 'alpha'"
    )
    holding = {c for c in range(9) if set(token[:2]) <= set(corpus.tokens([c])[0].tolist())}
    assert {cell for _, _, cell in rows} == holding
    assert design.targets[0].coverage == pytest.approx(len(holding) / SPECIES.count(1))
    ids = corpus.tokens([4])[0]
    vectors = []
    for sentence in (ids[2:], ids):
        h = scorer.engine.encoder(torch.tensor(sentence).long(), torch.tensor([0, len(sentence)]))
        vectors.append(h.detach().double().numpy()[len(sentence) - 14 :].mean(axis=0))
    cosine = [v @ states[1] / np.linalg.norm(v) / np.linalg.norm(states[1]) for v in vectors]
    assert rows["delete", 0, 4]["shift_1"] == pytest.approx(cosine[0] - cosine[1], abs=1e-6)


def test_state_parts_add_up_to_the_means_of_all_cells(corpus, weights, tmp_path, monkeypatch):
    from mixgf import effects

    monkeypatch.setattr(perturb, "STATE_CELLS", 2)
    _, _, _, work, scorer = run_units(
        corpus, weights, tmp_path, start="cell_type == 'beta'", goal="cell_type == 'alpha'"
    )
    parts = [storage.read_table(f"{tmp_path}/{u.key}.parquet") for u in work if u.operation == "embed"]
    means, table = effects.state_means(parts, 2)
    for state, cells in enumerate(([0, 2, 4, 6, 8], [1, 3, 5, 7])):
        vectors = [
            scorer.engine.encoder(torch.tensor(ids).long(), torch.tensor([0, len(ids)])).detach().numpy().mean(axis=0)
            for ids in (corpus.tokens([c])[0] for c in cells)
        ]
        assert means[state] == pytest.approx(np.mean(vectors, axis=0), abs=1e-6)
    assert table["num_cells"].to_pylist() == [5, 5, 4, 4]

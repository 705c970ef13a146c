"""The worker: every pair is scored once, and scored as plain code would."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy import sparse

from mixgf.config import data, perturbation, run, training
from mixgf.corpus import raw_counts
from mixgf.corpus.reader import Corpus
from mixgf.encoder import checkpoint
from mixgf.encoder.bert import MaskedModel
from mixgf.errors import UserError
from mixgf.perturbation import group_design, scoring_tasks, screen
from mixgf.storage import artifacts, tables

ROW = training.Model(num_layers=2, dim=16, num_heads=2, ffn_dim=32, max_positions=16, init_sd=0.3)
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
    checkpoint.publish_checkpoint(uri, record, model, vocabulary=corpus.vocabulary.hash, tokens=data.Tokens(max_len=16))
    return uri


def plan(corpus, **settings):
    settings = {"max_cells": 0, "min_coverage": 0.01} | settings
    chosen = run.Config(perturb=perturbation.Perturb(**settings), tokens=data.Tokens(max_len=16))
    return group_design.build_design(corpus, chosen), chosen


def run_units(corpus, weights, folder, **settings):
    design, chosen = plan(corpus, **settings)
    worker = scoring_tasks.ScoringWorker(chosen, corpus=corpus.uri, weights=weights, folder=str(folder))
    states = np.random.default_rng(3).normal(size=(len(design.states), 16))
    rows = {}
    work = scoring_tasks.plan_tasks(design, corpus, chosen.perturb)
    for unit in work:
        assert worker((unit, states)).cost == unit.cost
        if unit.operation != "embed":
            for row in tables.read_table(f"{folder}/{unit.key}.parquet").to_pylist():
                key = (unit.operation, row["target"], row["cell"])
                assert key not in rows
                rows[key] = row
    return design, states, rows, work, worker


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
    design, states, rows, _, worker = run_units(
        corpus, weights, tmp_path, genes=("+".join(names),), operations=("delete",), goal="cell_type == 'alpha'"
    )
    holding = {c for c in range(9) if set(token[:2]) <= set(corpus.tokens([c])[0].tolist())}
    assert {cell for _, _, cell in rows} == holding
    assert design.targets[0].coverage == pytest.approx(len(holding) / SPECIES.count(1))
    ids = corpus.tokens([4])[0]
    vectors = []
    for sentence in (ids[2:], ids):
        h = worker.scorer.encoder(torch.tensor(sentence).long(), torch.tensor([0, len(sentence)]))
        vectors.append(h.detach().double().numpy()[len(sentence) - 14 :].mean(axis=0))
    cosine = [v @ states[1] / np.linalg.norm(v) / np.linalg.norm(states[1]) for v in vectors]
    assert rows["delete", 0, 4]["shift_1"] == pytest.approx(cosine[0] - cosine[1], abs=1e-6)


def test_state_parts_add_up_to_the_means_of_all_cells(corpus, weights, tmp_path, monkeypatch):
    from mixgf.perturbation import gene_table

    monkeypatch.setattr(scoring_tasks, "STATE_CELLS", 2)
    _, _, _, work, worker = run_units(
        corpus, weights, tmp_path, start="cell_type == 'beta'", goal="cell_type == 'alpha'"
    )
    parts = [tables.read_table(f"{tmp_path}/{u.key}.parquet") for u in work if u.operation == "embed"]
    means, table = gene_table.state_means(parts, 2)
    for state, cells in enumerate(([0, 2, 4, 6, 8], [1, 3, 5, 7])):
        vectors = [
            worker.scorer.encoder(torch.tensor(ids).long(), torch.tensor([0, len(ids)])).detach().numpy().mean(axis=0)
            for ids in (corpus.tokens([c])[0] for c in cells)
        ]
        assert means[state] == pytest.approx(np.mean(vectors, axis=0), abs=1e-6)
    assert table["num_cells"].to_pylist() == [5, 5, 4, 4]


@pytest.mark.parametrize("layer", [-1, -2, -3])
def test_the_setting_decides_the_layer(corpus, weights, tmp_path, layer):
    """-1 is the last of two layers, -3 the embedding: shifts equal those of an encoder of so many layers."""
    design, states, rows, _, worker = run_units(
        corpus, weights, tmp_path, operations=("delete",), goal="cell_type == 'alpha'", layer=layer
    )
    (_, k, cell), row = next(iter(rows.items()))
    ids = corpus.tokens([cell])[0].tolist()
    at = ids.index(design.targets[k].tokens[0])

    def mean(sentence, left_out=None):
        offsets = torch.tensor([0, len(sentence)])
        hidden = worker.scorer.encoder(torch.tensor(sentence), offsets, layers=3 + layer).detach().double().numpy()
        return (hidden if left_out is None else np.delete(hidden, left_out, axis=0)).mean(axis=0)

    cosine = [
        v @ states[1] / np.linalg.norm(v) / np.linalg.norm(states[1])
        for v in (mean(ids[:at] + ids[at + 1 :]), mean(ids, at))
    ]
    assert row["shift_1"] == pytest.approx(cosine[0] - cosine[1], abs=1e-6)


def test_the_grid_of_a_screen_reaches_the_estimate(corpus, weights, tmp_path):
    ids = torch.from_numpy(corpus.tokens([4])[0]).long()
    estimates = {}
    for grid in (2, 5):
        design, chosen = plan(corpus, goal="cell_type == 'alpha'", screen=5, screen_grid=grid, operations=("delete",))
        worker = scoring_tasks.ScoringWorker(chosen, corpus=corpus.uri, weights=weights, folder=str(tmp_path))
        states = np.random.default_rng(3).normal(size=(len(design.states), 16))
        whole = dataclasses.replace(design, cells_N=np.array([4]), screened_N=np.array([4]))
        (task,) = scoring_tasks.gene_tasks(
            whole, corpus, chosen.perturb, "screen-delete", [np.arange(len(design.targets))]
        )
        table = worker.estimate(task, states)
        tokens = torch.from_numpy(design.genes_KM[table["target"].to_numpy(), 0])
        expected = screen.estimate(worker.scorer, ids, tokens, "delete", torch.from_numpy(states[1]), grid=grid)
        estimates[grid] = table["estimate"].to_numpy()
        assert estimates[grid] == pytest.approx(expected.numpy(), abs=1e-6)
    assert np.abs(estimates[2] - estimates[5]).max() > 1e-5


def test_the_untrained_twin_scores_with_the_weights_before_training(corpus, weights, tmp_path):
    design, chosen = plan(corpus, goal="cell_type == 'alpha'", operations=("delete",))
    worker = scoring_tasks.ScoringWorker(chosen, corpus=corpus.uri, weights=weights, folder=str(tmp_path))
    states = np.random.default_rng(3).normal(size=(len(design.states), 16))
    tasks = scoring_tasks.gene_tasks(design, corpus, chosen.perturb, "delete", [np.arange(len(design.targets))])
    (twin,) = scoring_tasks.twin_tasks(tasks[:1])
    assert twin.key == f"twin-{tasks[0].key}"
    seed = int(artifacts.require(weights, "checkpoint").config.get("seed", 0))
    other = scoring_tasks.ScoringWorker(
        chosen, corpus=corpus, weights=MaskedModel(ROW, corpus.vocabulary.size, seed=seed).encoder, folder=str(tmp_path)
    )
    own = worker.score(tasks[0], states)
    by_twin, expected = worker.score(twin, states), other.score(tasks[0], states)
    assert by_twin.equals(expected)
    assert not by_twin.equals(own)
    assert worker.score(tasks[0], states).equals(own)  # after the twin's, the encoder's cells are its own again


def test_a_worker_computes_on_the_gpu_that_is_asked_for_or_stops(corpus, weights, monkeypatch):
    asked = []

    def load(uri, device="cpu"):
        asked.append(torch.device(device))
        return load_encoder(uri)

    load_encoder = checkpoint.load_encoder
    monkeypatch.setattr(checkpoint, "load_encoder", load)
    for available, gpus in ((True, 1.0), (True, 0.0), (False, 0.0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda found=available: found)
        chosen = run.Config(compute=run.Compute(gpus_per_worker=gpus))
        scoring_tasks.ScoringWorker(chosen, corpus=corpus.uri, weights=weights, folder="")
    assert asked == [torch.device(name) for name in ("cuda", "cpu", "cpu")]
    with pytest.raises(UserError, match=r"^compute.gpus_per_worker = 1: no GPU here"):
        scoring_tasks.ScoringWorker(
            run.Config(compute=run.Compute(gpus_per_worker=1.0)), corpus=corpus.uri, weights=weights, folder=""
        )
    assert len(asked) == 3


def test_counts_are_read_once_and_a_cell_of_both_states_counts_in_both(corpus, tmp_path, monkeypatch):
    design, _ = plan(corpus, goal="cell_type == 'alpha'")  # all cells are the start
    (task,) = scoring_tasks.count_tasks(design, corpus, 0)
    assert task.cells_B.tolist() == list(range(9))
    one = dataclasses.replace(task, cells_B=np.flatnonzero(np.array(SPECIES) == 0))  # a source has one species
    one = dataclasses.replace(one, states_SB=task.states_SB[:, one.cells_B])
    num_genes = len(corpus.vocabulary.species_genes(corpus.species[0]).genes)
    order = one.cells_B[::-1]  # a file may have the cells in another order
    counts = np.arange(1, len(order) * num_genes + 1).reshape(len(order), num_genes)
    raw_counts.save_counts(f"{tmp_path}/{one.key}.parquet", order, sparse.csr_matrix(counts))
    seen = []
    monkeypatch.setattr(scoring_tasks.expression, "of_counts", lambda _, states: seen.append(states))
    scoring_tasks.read_expression(design, corpus, [one], str(tmp_path))
    start, goal = seen[0][corpus.species[0]]
    assert np.array_equal(start.counts_NG.toarray(), counts)
    alpha = np.isin(order, design.states[design.goal].cells)
    assert 0 < alpha.sum() < len(order)
    assert np.array_equal(goal.counts_NG.toarray(), counts[alpha])
    assert np.array_equal(goal.donor_N, design.donor_of[order[alpha]])

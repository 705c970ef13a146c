"""Neighbours of cells, batches of one data set, and genes on two sides: what the contrast of neighbours trains on."""

import dataclasses
import math
from functools import partial

import numpy as np
import pyarrow as pa
import pytest
import torch
from thread_workers import assert_same_step, run_first_step

import mixgf as mg
from mixgf.config import data, run, training
from mixgf.corpus import reader
from mixgf.encoder import checkpoint
from mixgf.encoder.bert import Encoder, cell_vectors, rank_weight, ranked_vectors
from mixgf.errors import UserError
from mixgf.execution import LocalExecutor
from mixgf.stages import perturb, pretrain, pretrain_inputs
from mixgf.storage import artifacts, tables
from mixgf.training import held_out_loss, loop, neighbours, pretraining, views
from mixgf.training.batch_plan import DataSetPlan
from mixgf.training.loop import TaskForward, compute_gradients
from mixgf.training.worker_group import LocalContext

ROW = training.Model(num_layers=0, dim=32, num_heads=4, ffn_dim=48, max_positions=40)
DEEP = dataclasses.replace(ROW, num_layers=2, residual=True)
OBJECTIVE = training.Objective(view="neighbour", pooling="ranked", mlm_weight=0.0, temperature=0.2, neighbours=3)
TRAIN = training.Train(epochs=4, batch_cells=12, lr=1e-2, warmup_steps=2, log_steps=1, checkpoint_steps=4)
N = 170


@pytest.fixture(scope="module")
def uri(make_corpus):
    lengths = np.random.default_rng(0).integers(9, 30, N)
    return make_corpus(lengths, np.arange(N) % 2, [90, 80])


@pytest.fixture(scope="module")
def config(uri, tmp_path_factory):
    chosen = run.Config(
        output=str(tmp_path_factory.mktemp("run")), model=ROW, objective=OBJECTIVE, train=TRAIN,
        tokens=data.Tokens(max_len=40), inputs=run.Inputs(corpus=uri), tracking=run.Tracking(uri="off"),
    )  # fmt: skip
    return pretrain_inputs.prepared(chosen, reader.Corpus(uri), LocalExecutor())


# neighbours


def test_the_nearest_by_cosine_are_found_and_a_cell_is_not_its_own_neighbour():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((130, 6)).astype(np.float32)
    values[7] = values[90] * 2  # the same direction: each is the first neighbour of the other
    found = neighbours.nearest(values, 10)
    assert found.shape == (130, 3)  # one per 40 cells
    cosines = np.corrcoef(values) * 0 + (values @ values.T) / np.outer(*[np.linalg.norm(values, axis=1)] * 2)
    np.fill_diagonal(cosines, -2)
    assert np.array_equal(found[:, 0][[7, 90]], [90, 7])
    for i in range(130):
        assert set(found[i]) == set(np.argsort(-cosines[i])[:3])
        assert i not in found[i]


def test_of_equal_cells_none_is_its_own_neighbour():
    found = neighbours.nearest(np.ones((90, 3), np.float32), 2)
    assert found.shape == (90, 2)
    assert (found != np.arange(90)[:, None]).all()
    assert neighbours.nearest(np.ones((1, 3), np.float32), 2).shape == (1, 0)


def test_neighbours_are_of_the_same_data_set(config, uri):
    corpus = reader.Corpus(uri)
    found = neighbours.Neighbours(config.inputs.neighbours, corpus)
    assert found.record.counts == {"cells": N, "groups": ["source (human)", "source (mouse)"]}
    assert np.array_equal(found.groups_C, corpus.species_N)
    for seed in range(20):
        drawn = found.draw(np.arange(N), np.random.default_rng(seed).integers(0, 2**60, N).astype(np.uint64))
        assert (drawn != np.arange(N)).all()
        assert np.array_equal(corpus.species_N[drawn], corpus.species_N)
        assert np.array_equal(
            np.searchsorted(corpus.starts, drawn, "right"), np.searchsorted(corpus.starts, np.arange(N), "right")
        )


def test_a_draw_takes_each_allowed_neighbour_equally_often_and_no_other(config, uri):
    corpus = reader.Corpus(uri)
    listed = neighbours.Neighbours(config.inputs.neighbours, corpus)
    many = np.full(3000, 50)
    keys = np.random.default_rng(0).integers(0, 2**60, 3000).astype(np.uint64)
    there, counts = np.unique(listed.draw(many, keys), return_counts=True)
    assert len(there) == 1  # 45 cells of a species in the shard: one neighbour
    allowed = np.ones(N, dtype=bool)
    allowed[there] = False
    assert (neighbours.Neighbours(config.inputs.neighbours, corpus, allowed).draw(many, keys) == 50).all()
    tables.write_table(
        neighbours.part_uri(config.inputs.neighbours + "-wide", 0),
        pa.table({"neighbours": pa.FixedSizeListArray.from_arrays(pa.array(np.tile([5, 6, 7, 8], 90), pa.int32()), 4)}),
    )
    listed.uri, allowed = config.inputs.neighbours + "-wide", np.ones(N, dtype=bool)
    allowed[6] = False
    listed._shard.cache_clear()
    listed._allowed_C = allowed
    there, counts = np.unique(listed.draw(many, keys), return_counts=True)
    assert there.tolist() == [5, 7, 8]
    assert abs(counts - 1000).max() < 5 * math.sqrt(1000)


def test_neighbours_of_another_corpus_are_refused(config, make_corpus):
    other = make_corpus(np.full(90, 12), np.zeros(90), [90], seed=3)
    with pytest.raises(UserError, match=r"inputs\.neighbours = .*of another corpus"):
        pretrain_inputs.prepared(config, reader.Corpus(other), LocalExecutor())


# batches


def test_a_batch_is_of_one_data_set_and_each_goes_through_its_cells_epoch_by_epoch():
    rng = np.random.default_rng(0)
    groups = np.repeat([0, 1, 2], [330, 30, 40]).astype(np.int32)
    plan = DataSetPlan(
        rng.integers(5, 30, 400).astype(np.int32),
        np.zeros(400, np.int8),
        [150, 150, 100],
        groups,
        seed=1,
        batch_cells=32,
    )
    seen = {g: [] for g in range(3)}
    for step in range(600):
        visits = plan.batch(step)
        (group,) = set(groups[visits % 400].tolist())
        assert group == plan.data_set(step)[0]
        size = int((groups == group).sum())
        assert len(visits) in {330: (30,), 30: (30,), 40: (20,)}[size]
        seen[group].extend(visits.tolist())
    for group, visits in seen.items():
        cells = np.flatnonzero(groups == group)
        whole = len(visits) // len(cells) * len(cells)
        assert len(set(visits)) == len(visits), "every visit has a key of its own"
        for k in range(0, whole, len(cells)):
            assert sorted(np.array(visits[k : k + len(cells)]) % 400) == cells.tolist()
    steps = np.bincount([plan.data_set(step)[0] for step in range(6000)])
    roots = np.sqrt(np.bincount(groups))
    np.testing.assert_allclose(steps / 6000, roots / roots.sum(), atol=0.025)


def test_a_step_does_not_depend_on_earlier_ones_and_workers_share_it():
    lengths = np.random.default_rng(0).integers(5, 30, 200).astype(np.int32)
    groups = (np.arange(200) >= 150).astype(np.int32)

    def plan():
        return DataSetPlan(lengths, np.zeros(200, np.int8), [100, 100], groups, seed=4, batch_cells=32)

    whole = plan()
    batches = [whole.batch(step) for step in range(40)]
    for step in (39, 3, 1500):
        fresh = plan()
        assert np.array_equal(fresh.batch(step), whole.batch(step))
        shares = [fresh.share(step, rank, 3) for rank in range(3)]
        joined = np.empty(shares[0].batch_cells, np.int64)
        for share in shares:
            joined[share.slots_B] = share.visits_B
        assert np.array_equal(joined, whole.batch(step))
    assert np.array_equal(batches[3], whole.batch(3))


# views


def test_no_gene_is_on_both_sides_and_ranks_are_those_of_the_whole_sentence(config, uri):
    corpus = reader.Corpus(uri, max_len=40)
    task = pretraining.Pretraining(config, corpus)
    for step in range(6):
        work = task.work(step, 0, 1)
        (micro,) = work.micros
        batch, cells = micro.batch, micro.batch.cells_B.numpy()
        offsets = batch.offsets_B1.numpy()
        half = len(cells) // 2
        several = np.repeat(
            np.diff(offsets) > 1, np.diff(offsets)
        )  # without a gene of its side, a sentence keeps one token
        sides = [
            batch.ids_T[part][several[part]].tolist() for part in np.split(np.arange(len(several)), [offsets[half]])
        ]
        assert not set(sides[0]) & set(sides[1])
        assert len(set(sides[0])) > 5 < len(set(sides[1]))
        for i in range(half):
            whole = corpus.tokens([cells[i]])[0]
            part = slice(offsets[i], offsets[i + 1])
            places = batch.positions_T[part].numpy()
            assert np.array_equal(whole[places], batch.ids_T[part].numpy())
            assert (np.diff(places) > 0).all()
        assert len(micro.targets_K) == 0


def test_sides_change_from_step_to_step_and_a_sentence_of_one_side_keeps_a_token():
    a, b = views.gene_sides(1000, (0, 0, 1)), views.gene_sides(1000, (0, 0, 2))
    assert abs(a.mean() - 0.5) < 0.08
    assert 0.4 < (a != b).mean() < 0.6
    side = np.zeros(20, dtype=bool)
    (tokens, offsets), places = views.genes_of_side((np.array([5, 6, 7], np.int32), np.array([0, 2, 3])), side)
    assert (tokens.tolist(), offsets.tolist(), places.tolist()) == ([5, 7], [0, 1, 2], [0, 0])


# the cell vector


def test_ranked_vectors_are_weighted_means_of_token_vectors_and_the_residual_begins_at_zero():
    encoder = Encoder(DEEP, 60, seed=3)
    ids, offsets = torch.tensor([4, 9, 30, 8, 2, 51]), torch.tensor([0, 3, 6], dtype=torch.int32)
    found = cell_vectors(encoder, ids, offsets, "ranked")
    w = rank_weight(np.arange(3))
    tokens = encoder.tokens.detach().numpy()
    expected = [w @ tokens[[4, 9, 30]] / w.sum(), w[[0, 2]] @ tokens[[8, 51]] / w[[0, 2]].sum()]  # 2 is <cls>: no gene
    np.testing.assert_allclose(found.detach().numpy(), np.array(expected), rtol=1e-5)
    with torch.no_grad():
        encoder.residual.copy_(torch.eye(32))
    states = encoder(ids, offsets)
    moved = cell_vectors(encoder, ids, offsets, "ranked")
    torch.testing.assert_close(
        moved - found, torch.stack([states[:3].mean(0), states[3:].mean(0)]), atol=1e-6, rtol=1e-4
    )
    every = cell_vectors(encoder, ids, offsets, "ranked", layer="all")
    torch.testing.assert_close(every[:, :32], moved)
    places = torch.tensor([0, 5, 9, 0, 1, 2])
    torch.testing.assert_close(ranked_vectors(encoder, ids, offsets, places)[1], found[1].detach())


# training


def gradients(config, corpus, *, workers=1, **changes):
    """Losses and flat gradient of the first step, summed over workers."""
    settings = dataclasses.replace(config, **changes)

    def make():
        return pretraining.Pretraining(settings, corpus), pretraining.initial_model(settings, corpus)

    return run_first_step(make, workers)


same = partial(assert_same_step, tolerance=2e-6)
CASES = {
    "token vectors alone": (ROW, {}),
    "residual of layers": (DEEP, {}),
    "head and temperature": (ROW, {"learn_temperature": True, "projection": 24}),
    "masked genes too": (DEEP, {"mlm_weight": 0.5, "learn_temperature": True}),
    "mean over genes": (dataclasses.replace(DEEP, residual=False), {"pooling": "mean"}),
}


@pytest.mark.parametrize("case", CASES)
def test_workers_and_cached_gradients_give_the_losses_and_gradients_of_one_pass(config, uri, case):
    row, changes = CASES[case]
    corpus = reader.Corpus(uri, max_len=40)
    objective = dataclasses.replace(OBJECTIVE, **changes)
    chosen = dataclasses.replace(config, model=row, objective=objective)
    one = gradients(chosen, corpus)
    assert set(one[0]) >= {"loss", "contrast", "alignment", "uniformity"}
    assert ("mlm" in one[0]) == (objective.mlm_weight > 0)
    assert one[1].norm() > 1e-3
    cached = dataclasses.replace(TRAIN, micro_tokens=60)
    same(gradients(chosen, corpus, train=cached), one)
    same(gradients(chosen, corpus, workers=3), one)
    same(gradients(chosen, corpus, train=cached, workers=2), one)


def test_the_gradient_of_the_temperature_is_that_of_the_loss(config, uri):
    corpus = reader.Corpus(uri, max_len=40)
    size, values = 1e-3, []
    for shift in (-size, 0.0, size):
        objective = dataclasses.replace(OBJECTIVE, learn_temperature=True, temperature=0.2 * math.exp(shift))
        values.append(gradients(dataclasses.replace(config, objective=objective), corpus))
    model = pretraining.blank_model(dataclasses.replace(config, objective=objective), corpus.vocabulary.size)
    at = [name for name, p in model.named_parameters() if p.requires_grad].index("log_temperature")
    before = sum(p.numel() for p in [p for p in model.parameters() if p.requires_grad][:at])
    slope = (values[2][0]["contrast"] - values[0][0]["contrast"]) / (2 * size)
    assert values[1][1][before].item() == pytest.approx(slope, rel=0.02)


def test_only_what_the_losses_depend_on_is_trained(config, uri):
    size = reader.Corpus(uri).vocabulary.size

    def trained(row, **changes):
        chosen = dataclasses.replace(config, model=row, objective=dataclasses.replace(OBJECTIVE, **changes))
        return {n for n, p in pretraining.blank_model(chosen, size).named_parameters() if p.requires_grad}

    assert trained(ROW) == {"encoder.tokens"}
    assert trained(ROW, learn_temperature=True) == {"encoder.tokens", "log_temperature"}
    deep = trained(DEEP)
    assert "encoder.residual" in deep
    assert "dense.weight" not in deep
    assert "dense.weight" in trained(DEEP, mlm_weight=1.0)
    assert "encoder.residual" not in trained(DEEP, pooling="mean")
    for chosen, names in ((ROW, trained(ROW)), (DEEP, deep)):
        corpus = reader.Corpus(uri, max_len=40)
        settings = dataclasses.replace(config, model=chosen)
        task, model = pretraining.Pretraining(settings, corpus), pretraining.initial_model(settings, corpus)
        compute_gradients(TaskForward(model, task), task.work(0, 0, 1), LocalContext())
        assert {n for n, p in model.named_parameters() if p.grad is not None} == names


def fitted(config, uri, output="", until=0):
    corpus = reader.Corpus(uri, max_len=40)
    model = pretraining.initial_model(config, corpus)
    task = pretraining.Pretraining(config, corpus)
    rows = loop.fit(model, task, config.train, LocalContext(), uri=output, identity="a", until=until)
    return model, {(step, name): value for step, _, name, value in rows if name in ("loss", "temperature", "grad_norm")}


def test_a_training_that_was_stopped_goes_on_to_the_same_bits(config, uri, tmp_path):
    objective = dataclasses.replace(OBJECTIVE, learn_temperature=True, projection=16)
    chosen = dataclasses.replace(config, objective=objective)
    whole, rows = fitted(chosen, uri)
    fitted(chosen, uri, str(tmp_path), until=7)
    again, resumed = fitted(chosen, uri, str(tmp_path))
    assert rows == resumed
    for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    temperatures = [value for (_, name), value in rows.items() if name == "temperature"]
    assert temperatures[0] == pytest.approx(0.2)
    assert len(set(temperatures)) > 10


def test_held_out_cells_are_neither_trained_on_nor_neighbours(config, uri):
    corpus = reader.Corpus(uri, max_len=40)
    train = dataclasses.replace(TRAIN, heldout_share=0.3)
    task = pretraining.Pretraining(dataclasses.replace(config, train=train), corpus)
    assert len(task.held_out.cells) > 30
    for step in range(task.num_steps):
        share = task.plan.share(step)
        cells = task.cells_N[share.cells_B]
        drawn = task.neighbours.draw(cells, np.arange(len(cells)).astype(np.uint64))
        assert not np.isin(np.concatenate([cells, drawn]), task.held_out.cells).any()
    evaluate = held_out_loss.HeldOutLoss(task)
    for batch in evaluate.batches:
        assert len(set(corpus.species_N[batch].tolist())) == 1
    figures = evaluate(pretraining.initial_model(config, corpus), LocalContext())
    assert set(figures) == {"heldout_loss", "heldout_contrast", "heldout_contrast_accuracy"}
    assert figures["heldout_loss"] == figures["heldout_contrast"] > 0


@pytest.mark.parametrize("made", [True, False])
def test_species_mix_is_refused_before_neighbours_are_made(config, uri, made):
    train = dataclasses.replace(TRAIN, species_mix={"human": 1.0})
    inputs = config.inputs if made else dataclasses.replace(config.inputs, neighbours="")
    with pytest.raises(UserError, match=r"train\.species_mix = .*not with objective\.view = 'neighbour'"):
        pretraining.Pretraining(dataclasses.replace(config, train=train, inputs=inputs), reader.Corpus(uri))


def test_pretrain_makes_its_inputs_and_publishes_an_encoder_and_its_start(uri, tmp_path):
    model = dataclasses.replace(ROW, start="svd")
    objective = dataclasses.replace(OBJECTIVE, learn_temperature=True, projection=16)
    chosen = run.Config(
        output=str(tmp_path), model=model, objective=objective, train=TRAIN, tokens=data.Tokens(max_len=40),
        vocab=data.Vocab(orthologs=(f"{uri}/orthologs.parquet",)), inputs=run.Inputs(corpus=uri),
        tracking=run.Tracking(uri="off"),
    )  # fmt: skip
    made = pretrain.run(chosen, executor=LocalExecutor())
    trained, record = checkpoint.load_encoder(made)
    start, _ = checkpoint.load_start(made, seed=5)
    vectors = np.array(tables.read_table(str(tmp_path / "gene_vectors" / "vectors.parquet"))["vector"].to_pylist())
    np.testing.assert_allclose(start.tokens[3:].detach().numpy(), vectors, atol=1e-6)
    assert (trained.tokens - start.tokens).abs().max() > 1e-2
    assert set(record.parents) == {"corpus", "gene_vectors", "neighbours"}
    assert record.parents["neighbours"] == artifacts.require(str(tmp_path / "neighbours"), "neighbours").fingerprint
    assert (
        record.parents["gene_vectors"] == artifacts.require(str(tmp_path / "gene_vectors"), "gene_vectors").fingerprint
    )
    assert checkpoint.START in record.files
    assert pretrain.run(chosen, executor=LocalExecutor()) == made  # nothing to do
    random = dataclasses.replace(chosen, model=ROW)
    assert pretrain.planned(random, reader.Corpus(uri)).fingerprint != record.fingerprint
    assert mg.load(made, vocabulary=uri).pooling == "ranked"
    with pytest.raises(UserError, match="an encoder without layers gives genes no context"):
        perturb.run(chosen, executor=LocalExecutor())
    plain = dataclasses.replace(random, output=f"{tmp_path}/plain", objective=training.Objective(contrast_weight=0.0))
    assert mg.load(pretrain.run(plain, executor=LocalExecutor()), vocabulary=uri).pooling == "mean"

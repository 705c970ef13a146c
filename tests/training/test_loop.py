import dataclasses
import math
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from mixgf.config import data, run, training
from mixgf.corpus import reader
from mixgf.encoder.batch import pack_batch
from mixgf.encoder.bert import Encoder, MaskedModel, pool_tokens
from mixgf.errors import UserError
from mixgf.storage import tables
from mixgf.training import checkpoints, loop
from mixgf.training.pretraining import Pretraining, subset_cells
from mixgf.training.worker_group import GroupContext, LocalContext

ROW = training.Model(num_layers=2, dim=32, num_heads=4, ffn_dim=48, max_positions=40, dropout=0.1)
SETTINGS = training.Train(
    epochs=3, batch_cells=6, lr=1e-2, warmup_steps=3, log_steps=1, checkpoint_steps=4, micro_tokens=10_000
)
CONFIG = run.Config(model=ROW, tokens=data.Tokens(max_len=40), train=SETTINGS)
LOSSES = ("loss", "mlm", "contrast", "grad_norm", "lr")


@pytest.fixture(scope="module")
def uri(make_corpus):
    return make_corpus(np.random.default_rng(0).integers(5, 30, 23), np.arange(23) % 2, [9, 14])


def pretrain(uri, output="", *, context=None, settings=SETTINGS, identity="a", stop=0):
    """Train on a corpus; `stop` dies like a killed process when that step is asked for."""
    corpus = reader.Corpus(uri)
    task = Pretraining(dataclasses.replace(CONFIG, train=settings), corpus)
    model = MaskedModel(ROW, corpus.vocabulary.size, seed=1)
    if stop:
        work = task.work

        def die(step, rank, world_size):
            if step == stop:
                msg = "killed"
                raise KeyboardInterrupt(msg)
            return work(step, rank, world_size)

        task.work = die
    return loop.fit(model, task, settings, context or LocalContext(), uri=output, identity=identity), model


def trace(rows):
    return {(step, name): value for step, _, name, value in rows if name in LOSSES}


@pytest.fixture(scope="module")
def undisturbed(uri, tmp_path_factory):
    output = str(tmp_path_factory.mktemp("undisturbed"))
    rows, model = pretrain(uri, output)
    return trace(rows), model, output


def test_the_model_learns_which_genes_are_of_the_cells_species(uri):
    corpus = reader.Corpus(uri)
    settings = dataclasses.replace(SETTINGS, epochs=45, warmup_steps=5, log_steps=10)
    row = dataclasses.replace(ROW, num_layers=1)
    chosen = dataclasses.replace(CONFIG, model=row, train=settings, objective=training.Objective(contrast_weight=0.0))
    model = MaskedModel(row, corpus.vocabulary.size)
    losses = trace(loop.fit(model, Pretraining(chosen, corpus), settings, LocalContext()))
    assert losses[1, "mlm"] == pytest.approx(math.log(83), abs=0.1)
    assert np.mean([losses[step, "mlm"] for step in (150, 160, 170, 180)]) < math.log(40)


def test_every_figure_is_kept(undisturbed):
    output = undisturbed[2]
    names = set(tables.read_table(f"{output}/history.parquet").column("name").to_pylist())
    assert names >= {"loss", "mlm", "contrast", "alignment", "uniformity", "lr", "grad_norm", "cells_per_s", "tokens_per_s",
                     "mfu", "wait_share", "memory_gb"}  # fmt: skip


@pytest.mark.parametrize("stop", [2, 5, 9])
def test_a_run_killed_at_any_step_and_resumed_is_bit_identical(uri, undisturbed, tmp_path, stop):
    losses, model, _ = undisturbed
    with pytest.raises(KeyboardInterrupt, match="killed"):
        pretrain(uri, str(tmp_path), stop=stop)
    assert checkpoints.complete_steps(str(tmp_path)) == [s for s in (4, 8) if s <= stop]
    rows, resumed = pretrain(uri, str(tmp_path))
    assert trace(rows) == losses
    assert len(trace(rows)) == sum(name in LOSSES for _, _, name, _ in rows)  # no step twice
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), model.parameters(), strict=True))


def test_a_finished_run_has_nothing_left_to_do(uri, undisturbed):
    losses, model, output = undisturbed
    rows, again = pretrain(uri, output)
    assert trace(rows) == losses
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters(), strict=True))


def test_the_last_checkpoints_are_kept_and_no_others(undisturbed):
    assert checkpoints.complete_steps(undisturbed[2]) == [8, 12]


def test_a_checkpoint_of_another_run_is_refused(uri, undisturbed):
    with pytest.raises(UserError, match="checkpoints of another run"):
        pretrain(uri, undisturbed[2], identity="b")


@pytest.mark.parametrize("micro_tokens", [1, 120])
def test_losses_do_not_depend_on_the_size_of_micro_batches(uri, undisturbed, micro_tokens):
    rows, _ = pretrain(
        uri, settings=dataclasses.replace(SETTINGS, micro_tokens=micro_tokens, max_steps=3, warmup_steps=3)
    )
    ours = trace(rows)
    for step in (1, 2, 3):
        # the contrast is exp(cosine / temperature) to first order: its relative error is that of a cosine / temperature
        for name, rel in (("loss", 2e-6), ("mlm", 2e-6), ("contrast", 2e-6 / training.Objective().temperature)):
            assert ours[step, name] == pytest.approx(undisturbed[0][step, name], rel=rel), (step, name)


def _group_worker(rank, world_size, port, uri, output):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    pretrain(uri, output, context=GroupContext(torch.device("cpu")))
    dist.destroy_process_group()


@pytest.mark.slow  # the same law is in stages/test_pretrain.py, with Ray
def test_two_workers_give_the_losses_of_one(uri, undisturbed, tmp_path):
    import socket

    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    mp.spawn(_group_worker, (2, port, uri, str(tmp_path)), nprocs=2)
    ours = trace(loop.History(str(tmp_path), 12).rows)
    assert ours.keys() == undisturbed[0].keys()
    for key, value in undisturbed[0].items():
        assert ours[key] == pytest.approx(value, rel=1e-5), key


def test_a_loss_that_is_not_finite_stops_the_run_before_the_weights_are_spoilt(uri, tmp_path):
    corpus = reader.Corpus(uri)
    task = Pretraining(CONFIG, corpus)
    model = MaskedModel(ROW, corpus.vocabulary.size)
    metrics = task.metrics

    def spoil(sums, gathered):
        spoil.step += 1
        return metrics(sums, gathered) | ({"mlm": torch.tensor(math.nan)} if spoil.step == 6 else {})

    spoil.step = 0
    task.metrics = spoil
    with pytest.raises(UserError, match=r"step 6 \(epoch 1\): mlm = nan; lower train.lr"):
        loop.fit(model, task, SETTINGS, LocalContext(), uri=str(tmp_path))
    assert checkpoints.complete_steps(str(tmp_path)) == [4]
    assert all(p.isfinite().all() for p in model.parameters())


def test_learning_rate_by_hand():
    settings = training.Train(lr=1.0, warmup_steps=4, schedule="cosine")
    rates = [loop.learning_rate(settings, step, 12) for step in (0, 3, 4, 8, 12)]
    assert rates == pytest.approx([0.25, 1.0, 1.0, 0.5, 0.0])
    linear = dataclasses.replace(settings, schedule="linear")
    assert loop.learning_rate(linear, 6, 12) == pytest.approx(0.75)
    assert loop.learning_rate(dataclasses.replace(settings, schedule="constant"), 11, 12) == 1.0


def test_biases_and_norms_do_not_decay():
    model = MaskedModel(ROW, 50)
    decays = {id(p): g["weight_decay"] for g in loop.make_optimizer(model, SETTINGS).param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert decays[id(parameter)] == (0.0 if "norm" in name or "bias" in name else SETTINGS.weight_decay), name


def test_gradients_are_clipped_to_the_set_norm():
    """One step of plain gradient descent on x: its length is the clipped norm, and the norm before is logged."""
    model = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.zero_()

    def batches(step, rank, world_size):
        return loop.BatchWork([pack_batch([(np.array([5, 6]), np.array([0, 2]))], [0])], 1)

    def sums(model, batch):
        return {"loss": model(torch.tensor([[3.0, 4.0]])).sum()}

    seen = []
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    step = optimizer.step
    optimizer.step = lambda: (seen.append(model.weight.grad.tolist()[0]), step())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_optimizer", lambda model, settings: optimizer)
        settings = dataclasses.replace(SETTINGS, warmup_steps=0, clip=1.0)
        rows = loop.fit(model, loop.LossTask(1, batches, sums), settings, LocalContext())
    assert {(name, value) for _, _, name, value in rows if name == "grad_norm"} == {("grad_norm", 5.0)}
    assert seen[0] == pytest.approx([0.6, 0.8])


def test_fine_tuning_uses_the_same_loop_and_frozen_weights_stay(uri):
    corpus = reader.Corpus(uri)
    labels = torch.tensor([c % 2 for c in range(23)])  # = the species: easy to learn

    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = Encoder(ROW, corpus.vocabulary.size)
            self.head = torch.nn.Linear(32, 2)

    def batches(step, rank, world_size):
        tokens, offsets = corpus.tokens(range(23))
        return loop.BatchWork([pack_batch([(tokens, offsets)], range(23))], 23)

    def loss(model, batch):
        z = pool_tokens(model.encoder(batch.ids_T, batch.offsets_B1), batch.offsets_B1, "mean")
        scores, true = model.head(z), labels[batch.cells_B]
        return {
            "loss": F.cross_entropy(scores, true, reduction="sum"),
            "accuracy": (scores.argmax(1) == true).float().sum(),
        }

    model = Classifier()
    model.encoder.tokens.requires_grad_(False)
    before = model.encoder.tokens.clone()
    settings = dataclasses.replace(SETTINGS, warmup_steps=0)
    rows = loop.fit(model, loop.LossTask(40, batches, loss, names=("loss", "accuracy")), settings, LocalContext())
    figures = {(step, name): value for step, _, name, value in rows}
    assert figures[40, "accuracy"] == 1.0
    assert torch.equal(model.encoder.tokens, before)


def test_the_measured_peak_is_a_plausible_speed():
    assert 1e9 < loop.measure_peak(torch.device("cpu"), "fp32", seconds=0.05) < 1e13


on_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.mark.parametrize("kind", ["cpu", pytest.param("cuda", marks=on_cuda)])
def test_memory_is_flat_over_a_run(make_corpus, kind):
    """One tensor of hidden states that is not let go is 0.8 MB per step."""
    import psutil

    device = torch.device(kind)
    lengths = np.random.default_rng(1).integers(20, 200, 120)
    corpus = reader.Corpus(make_corpus(lengths, np.arange(120) % 2, [60, 60], genes=220))
    row = dataclasses.replace(ROW, max_positions=200, num_layers=1, dim=128)
    settings = dataclasses.replace(SETTINGS, batch_cells=8, epochs=6, log_steps=1000)
    chosen = dataclasses.replace(CONFIG, model=row, tokens=data.Tokens(max_len=200), train=settings)
    task, resident = Pretraining(chosen, corpus), []
    metrics = task.metrics

    def watched(sums, gathered):
        used = psutil.Process().memory_info().rss if kind == "cpu" else torch.cuda.memory_allocated()
        resident.append(used / 1e6)
        return metrics(sums, gathered)

    task.metrics = watched
    loop.fit(MaskedModel(row, corpus.vocabulary.size), task, settings, LocalContext(device))
    assert len(resident) == 90
    assert max(resident[80:]) - max(resident[:20]) < 30  # MB


def test_a_training_that_stops_at_a_step_and_goes_on_equals_one_that_never_stopped(uri, tmp_path):
    corpus = reader.Corpus(uri)

    def go(to, until=0):
        task, model = Pretraining(CONFIG, corpus), MaskedModel(ROW, corpus.vocabulary.size, seed=1)
        rows = loop.fit(model, task, SETTINGS, LocalContext(), uri=to, identity="a", until=until)
        return [row for row in rows if row[2] in LOSSES], model

    whole, model = go(str(tmp_path / "whole"))
    for until in (5, 9, 9):
        rows, _ = go(str(tmp_path / "parts"), until)
        assert rows == [row for row in whole if row[0] <= until]
    rows, other = go(str(tmp_path / "parts"), 1000)
    assert rows == whole
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_share_of_the_cells_is_part_of_every_larger_share_and_each_is_seen_once_per_epoch(uri):
    assert set(subset_cells(1000, 0.1)) < set(subset_cells(1000, 0.3)) < set(subset_cells(1000, 1.0))
    assert [len(subset_cells(1000, share)) for share in (0.0001, 0.1, 1.0)] == [1, 100, 1000]
    some = dataclasses.replace(CONFIG, train=dataclasses.replace(SETTINGS, cells_share=0.5))
    task = Pretraining(some, reader.Corpus(uri))
    assert (task.steps_per_epoch, task.num_steps) == (2, 6)
    for epoch in range(3):
        works = [task.work(2 * epoch + step, 0, 1) for step in (0, 1)]
        seen = {c for work in works for micro in work.micros for c in micro.batch.cells_B.tolist()}
        assert sorted(seen) == subset_cells(23, 0.5).tolist()
        assert sum(work.num_cells for work in works) == len(seen) == 12

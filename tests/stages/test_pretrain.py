import dataclasses
import itertools
import json
import multiprocessing
import signal

import numpy as np
import pytest
import torch
from dying_worker import worker_session

from mixgf.config import run, training
from mixgf.config.data import Tokens
from mixgf.corpus import reader
from mixgf.distributed import train_group
from mixgf.encoder import checkpoint
from mixgf.encoder.bert import MaskedModel
from mixgf.errors import UserError
from mixgf.stages import pretrain
from mixgf.storage import artifacts, files
from mixgf.tracking import mlflow_runs
from mixgf.training import checkpoints, loop, worker_group
from mixgf.training.pretraining import Pretraining

pytestmark = pytest.mark.ray
LOSSES = ("loss", "mlm", "contrast", "grad_norm", "lr")


@pytest.fixture(scope="module")
def settings(make_corpus, tmp_path_factory):
    uri = make_corpus(np.random.default_rng(0).integers(5, 30, 23), np.arange(23) % 2, [9, 14])
    return run.Config(
        output=str(tmp_path_factory.mktemp("run")),
        model=training.Model(num_layers=2, dim=32, num_heads=4, ffn_dim=48, max_positions=40),
        tokens=Tokens(max_len=40),
        train=training.Train(epochs=2, batch_cells=6, lr=1e-2, warmup_steps=2, log_steps=1, checkpoint_steps=3),
        inputs=run.Inputs(corpus=uri),
        compute=run.Compute(num_workers=1),
    )


@pytest.fixture(scope="module")
def local(settings, tmp_path_factory):
    """The loop in this process: its losses and its weights."""
    corpus = reader.Corpus(settings.inputs.corpus)
    model = MaskedModel(settings.model, corpus.vocabulary.size, seed=settings.seed)
    rows = loop.fit(model, Pretraining(settings, corpus), settings.train, worker_group.LocalContext())
    return trace(rows), model


def trace(rows):
    return {(step, name): value for step, _, name, value in rows if name in LOSSES}


def test_one_ray_worker_gives_what_the_local_loop_gives_and_a_second_run_does_nothing(ray_local, settings, local):
    uri = pretrain.run(settings)
    losses, model = local
    rows = loop.History(uri, 8).rows
    assert trace(rows) == losses
    logged = {"loss", "mlm", "contrast", "alignment", "uniformity", "grad_norm", "lr", "cells_per_s", "tokens_per_s", "mfu",
              "wait_share", "memory_gb"}  # fmt: skip
    assert all([s for s, _, n, _ in rows if n == name] == list(range(1, 9)) for name in logged)
    assert {name for _, _, name, _ in rows} == logged
    encoder, record = checkpoint.load_encoder(uri)
    assert all(torch.equal(a, b) for a, b in zip(encoder.parameters(), model.encoder.parameters(), strict=True))
    assert record.counts == {"steps": 8, "epochs": 2, "cells": 23}
    assert record.details["vocabulary"] == reader.Corpus(settings.inputs.corpus).vocabulary.hash
    before = files.read_bytes(f"{uri}/record.json")
    assert pretrain.run(dataclasses.replace(settings, compute=run.Compute(num_workers=3))) == uri
    assert files.read_bytes(f"{uri}/record.json") == before
    with pytest.raises(UserError, match=r"holds another checkpoint: config.train.lr: 0.01 -> 0.001"):
        pretrain.run(dataclasses.replace(settings, train=dataclasses.replace(settings.train, lr=1e-3)))


def test_what_is_known_before_the_start_is_said(settings, caplog):
    """Parameters, work, padding saved, time; without Ray, because none of it needs a worker."""
    corpus = reader.Corpus(settings.inputs.corpus)
    model = MaskedModel(settings.model, corpus.vocabulary.size)
    with caplog.at_level("INFO", "mixgf"):
        facts = pretrain._announce(settings, Pretraining(settings, corpus), model)
    assert set(facts) == {"parameters", "gflop_per_cell", "tokens_per_cell", "padding_random", "padding_grouped",
                          "estimated_seconds"}  # fmt: skip
    said = "\n".join(caplog.messages)
    for part in ("parameters", "23 cells of 18 tokens", "GFLOP per cell", "8 steps of 6 cells", "1 workers", "tokens per token",
                 "about"):  # fmt: skip
        assert part in said, part


def test_two_ray_workers_see_every_cell_once_and_give_the_losses_of_one(ray_local, settings, local, tmp_path):
    two = dataclasses.replace(settings, output=str(tmp_path), compute=run.Compute(num_workers=2))
    ours = trace(loop.History(pretrain.run(two), 8).rows)
    assert ours.keys() == local[0].keys()
    for key, value in local[0].items():
        # the contrast is what is left of scores of up to 1 / temperature = 20, which float32 rounds by 1e-6
        assert ours[key] == pytest.approx(value, rel=1e-5, abs=1e-7 if key[1] == "contrast" else 0), key


@pytest.mark.parametrize("dies", ["before", "amid"])
def test_figures_of_a_checkpoint_whose_worker_died_before_logging_them_reach_the_tracker_once(settings, tmp_path, dies):
    """SIGKILL between the second checkpoint and its figures in MLflow, or after some of them; the next session makes up for it."""
    from mlflow.tracking import MlflowClient

    chosen = dataclasses.replace(settings, output=str(tmp_path))

    def drain(tracked):
        """What the driver does with the rows of its board."""
        given = []
        for kind in ("recovered", "committed"):
            file = tmp_path / f"{kind}.jsonl"
            lines = file.read_text().splitlines() if file.exists() else []
            file.unlink(missing_ok=True)
            given.append([tuple(json.loads(line)) for line in lines])
        train_group.log_rows(tracked, *given)

    with mlflow_runs.stage(chosen, "pretrain", {}, "abc") as tracked:
        child = multiprocessing.get_context("spawn").Process(target=worker_session, args=(chosen, dies))
        child.start()
        child.join(200)
        assert child.exitcode == -signal.SIGKILL
        drain(tracked)
        assert checkpoints.complete_steps(f"{tmp_path}/pretrain") == [3, 6]
        worker_session(chosen, "")
        drain(tracked)
    client = MlflowClient(tracked.uri)
    rows = loop.History(f"{tmp_path}/pretrain", 8).rows
    for name in ("loss", "mlm", "lr", "memory_gb"):
        shown = mlflow_runs.training_name(name)
        points = [(m.step, m.value) for m in client.get_metric_history(tracked.id, shown)]
        assert sorted(points) == [(step, value) for step, _, n, value in rows if n == name]
        assert [step for step, _ in sorted(points)] == list(range(1, 9))


def test_a_run_that_cannot_go_on_ends_with_one_line_and_is_not_started_again(ray_local, settings, tmp_path):
    """A checkpoint that was cut short: every worker refuses it, the driver raises it once."""
    broken = dataclasses.replace(settings, output=str(tmp_path))
    corpus = reader.Corpus(settings.inputs.corpus)
    uri = f"{tmp_path}/pretrain"
    record = pretrain.planned(broken, corpus)
    artifacts.begin(uri, record)
    model = MaskedModel(settings.model, corpus.vocabulary.size)
    optimizer = loop.make_optimizer(model, settings.train)
    folder = checkpoints.save_step(uri, 3, model, optimizer, {"identity": record.fingerprint})
    data = files.read_bytes(f"{folder}/model.safetensors")
    files.write_bytes(f"{folder}/model.safetensors", data[:100])
    with pytest.raises(UserError, match=r"model.safetensors: .*Restore it"):
        pretrain.run(broken)
    assert artifacts.find(uri) is None


def test_of_longer_cells_than_the_model_has_positions_the_first_tokens_are_trained_on(settings, tmp_path, caplog):
    short = dataclasses.replace(
        settings, model=dataclasses.replace(settings.model, max_positions=20), output=str(tmp_path)
    )
    corpus = reader.Corpus(settings.inputs.corpus)
    assert corpus.lengths_N.max() > 20
    with caplog.at_level("INFO"):
        pretrain.run(short)
    assert "are read to token 20 (model.max_positions)" in caplog.text
    task = Pretraining(short, reader.Corpus(settings.inputs.corpus, max_len=20))
    micros = [task.work(step, 0, 1).micros[0] for step in range(task.steps_per_epoch)]
    assert max(micro.batch.max_len for micro in micros) == 20
    for micro in micros:
        batch = micro.batch
        ids_T, offsets = corpus.tokens(batch.cells_B[: batch.num_cells // micro.num_views])
        first = np.concatenate([ids_T[a:b][:20] for a, b in itertools.pairwise(offsets)])
        kept = np.ones(len(first), dtype=bool)
        kept[micro.masked_K.numpy()] = False
        assert np.array_equal(batch.ids_T.numpy()[: len(first)][kept], first[kept])

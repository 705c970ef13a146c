"""Pretraining on a Ray Train worker group.

Ray starts the workers, starts them again after a loss, and shrinks or grows the group; what was trained so far lies in the
output folder, where the loop itself finds it. So worker, node, head and driver may die at any moment.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mixgf import artifacts, checkpoint, storage, tracking
from mixgf.config import Config, UserError, difference, from_dict, to_dict
from mixgf.dataset import Corpus
from mixgf.drivers.board import Board
from mixgf.drivers.metrics import Meter, watch
from mixgf.drivers.session import session
from mixgf.model import MaskedModel
from mixgf.objectives import Pretraining
from mixgf.progress import Progress, duration, number, say
from mixgf.train import GroupContext, Row, fit, measure_peak

_SPEED = ("micro_tokens", "compile", "threads", "checkpoint_steps", "keep_checkpoints", "log_steps")
USUAL_MFU = 0.3
"""Share of the GEMM peak that small recipes reached on two CPU cores through the command line (.22 to .38), for the estimate."""
_SHOWN = ("loss", "mlm", "contrast", "cells_per_s")


def run(config: Config) -> str:
    """Train the model of `config` on its corpus; returns the URI of the checkpoint artifact."""
    uri = storage.join(config.output, "pretrain")
    corpus = Corpus(config.inputs.corpus or storage.join(config.output, "corpus"), max_len=config.model.max_positions)
    record = planned(config, corpus)
    task = Pretraining(
        config, corpus
    )  # before the folder is claimed: a config that cannot be trained leaves nothing behind
    if not artifacts.begin(uri, record):
        say(f"pretrain: {uri} is already there")
        return uri
    model = MaskedModel(config.model, corpus.vocabulary.size, seed=config.seed)
    facts = _announce(config, task, model)
    with (
        session(config),
        tracking.stage(config, "pretrain", to_dict(config), record.fingerprint) as tracked,
        watch(config, "pretrain", tracked, uri) as watched,
    ):
        tracked.log(facts)
        train(config, corpus.uri, uri, record.fingerprint, num_steps=task.num_steps, tracked=tracked)
        epochs = task.num_steps / task.steps_per_epoch
        watched.made(cells=task.plan.num_cells * epochs, epochs=epochs)
        done = checkpoint.promote(
            uri, record, model, vocabulary=corpus.vocabulary.hash, tokens=corpus.tokenised, objective=config.objective,
            counts={"steps": task.num_steps, "epochs": -(-task.num_steps // task.steps_per_epoch), "cells": task.plan.num_cells},
            untrained=untrained(config, task),
        )  # fmt: skip
    say(f"pretrain: {done.counts['steps']:,} steps, weights in {uri}")
    return uri


def _start(config: Config, corpus: Corpus) -> artifacts.Record | None:
    """The record of `inputs.start`, None without one; a `UserError` where it cannot be started from."""
    if not config.inputs.start:
        return None
    record = artifacts.require(config.inputs.start, checkpoint.KIND, checkpoint.SCHEMA)
    checkpoint.require_vocabulary(record, corpus.vocabulary.hash, "the corpus", "inputs.start")
    ours, free = to_dict(config.model), ("dropout", "attention_dropout", "init_sd")
    changes = difference(record.details["model"], ours | {k: record.details["model"][k] for k in free}, "model")
    if changes:
        msg = f"inputs.start = {config.inputs.start!r}: a model of other sizes: {'; '.join(changes[:3])}; set the model's as there"
        raise UserError(msg)
    return record


def untrained(config: Config, task: Pretraining) -> np.ndarray:
    """Ids that neither the start's training nor this one saw, ascending; none where it starts from random weights."""
    start = _start(config, task.corpus)
    return np.empty(0, dtype=np.int64) if start is None else task.never_seen(checkpoint.untrained(start))


def first_model(config: Config, corpus: Corpus) -> MaskedModel:
    """The model before its first step: random weights, or those of `inputs.start`."""
    model = MaskedModel(config.model, corpus.vocabulary.size, seed=config.seed)
    if config.inputs.start:
        found, _ = checkpoint.load_model(config.inputs.start)
        model.load_state_dict(found.state_dict())
    return model


def planned(config: Config, corpus: Corpus) -> artifacts.Record:
    """The record of this training: all that decides the weights, nothing that only changes speed."""
    start = _start(config, corpus)
    data = to_dict(config)
    settings = {k: v for k, v in data["train"].items() if k not in _SPEED}
    if config.train.cells_share == 1:
        del settings["cells_share"]
    chosen = {"model": data["model"], "objective": data["objective"], "train": settings, "seed": config.seed}
    if config.objective.ortholog_weight > 0 or config.objective.view == "ortholog":
        chosen["orthologs"] = data["vocab"]["orthologs"]
    parents = {"corpus": corpus.record.fingerprint} | ({"start": start.fingerprint} if start is not None else {})
    return artifacts.plan(checkpoint.KIND, checkpoint.SCHEMA, chosen, parents)


def _announce(config: Config, task: Pretraining, model: MaskedModel) -> dict[str, float]:
    """Say what the training is and how long it may take; returns the figures."""
    facts = task.facts() | {"parameters": float(sum(p.numel() for p in model.parameters()))}
    cells, workers = task.plan.num_cells, config.compute.num_workers
    say(
        f"pretrain: {number(facts['parameters'])} parameters, {cells:,} cells of {facts['tokens_per_cell']:,.0f} tokens, "
        f"{facts['gflop_per_cell']:.3g} GFLOP per cell and epoch, {task.num_steps:,} steps of {config.train.batch_cells} "
        f"cells, {workers} workers"
    )
    if (longest := int(task.corpus.record.details["max_len"])) > config.model.max_positions:
        say(
            f"pretrain: sentences of up to {longest:,} tokens are read to token {config.model.max_positions:,} (model.max_positions)"
        )
    say(
        f"pretrain: nothing is padded; padded batches would compute {facts['padding_random']:.2f} tokens per token in random "
        f"order, {facts['padding_grouped']:.2f} grouped by length"
    )
    if not config.compute.gpus_per_worker:
        cores = min(workers * config.train.threads, os.cpu_count() or 1)
        peak = cores * measure_peak(torch.device("cpu"), config.train.precision) / torch.get_num_threads()
        visits = min(task.num_steps * config.train.batch_cells, cells * config.train.epochs)
        facts["estimated_seconds"] = visits * facts["gflop_per_cell"] * 1e9 / (peak * USUAL_MFU)
        say(
            f"pretrain: about {duration(facts['estimated_seconds'])} if {cores} such cores reach {USUAL_MFU:.0%} of "
            f"{peak / 1e9:,.0f} GFLOP/s; the progress shows the time left as measured"
        )
    return facts


class RayContext(GroupContext):
    """A worker of a Ray Train group, whose figures go to the driver's board and to the tracker."""

    def __init__(self, device: torch.device, board: Any, tracked: tracking.Run) -> None:
        super().__init__(device)
        self._board, self._tracked = board, tracked

    def report(self, step: int, figures: dict[str, float]) -> None:
        """Show the driver and the boards; does not wait."""
        self._board.report.remote(step, figures)
        Meter("pretrain", self._tracked.id).figures(step, figures)

    def commit(self, rows: list[Row]) -> None:
        """Log to the tracker."""
        self._tracked.log_many([(step, name, value) for step, _, name, value in rows])

    def recover(self, rows: list[Row]) -> None:
        """Log to the tracker what it lacks."""
        self._tracked.log_missing([(step, name, value) for step, _, name, value in rows])


def work(params: dict[str, Any]) -> None:
    """One worker of the group."""
    config = from_dict(Config, params["config"])
    device = get_device()
    if device.type == "cpu":
        torch.set_num_threads(config.train.threads)
    context = RayContext(device, params["board"], params["tracked"])
    try:
        corpus = Corpus(params["corpus"], max_len=config.model.max_positions)
        task = Pretraining(config, corpus)
        model = first_model(config, corpus)
        fit(model, task, config.train, context, uri=params["uri"], identity=params["identity"], until=params["until"])
    except UserError as error:  # every worker meets it alike; the driver raises it, and nobody starts again
        ray.get(params["board"].fail.remote(str(error)))


def train(
    config: Config, corpus: str, uri: str, identity: str, *, num_steps: int, tracked: tracking.Run, until: int = 0
) -> None:
    """Train in a worker group to the end, or until a step, from the latest checkpoint in `uri` on.

    Raises:
        UserError: it cannot be trained, for example because a loss is not finite.
    """
    compute = config.compute
    gpu = compute.gpus_per_worker > 0
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    board = ray.remote(num_cpus=0, scheduling_strategy=here)(
        Board
    ).remote()  # lost with the driver, not with a worker's node
    params = {
        "config": to_dict(config), "corpus": corpus, "uri": uri, "identity": identity, "board": board, "tracked": tracked,
        "until": until,
    }  # fmt: skip
    resources = {"CPU": compute.cpus_per_worker} | ({"GPU": compute.gpus_per_worker} if gpu else {})
    elastic = 0 < compute.min_workers < compute.num_workers
    scaling = ScalingConfig(
        num_workers=(compute.min_workers, compute.num_workers) if elastic else compute.num_workers,
        elastic_resize_monitor_interval_s=compute.resize_seconds, use_gpu=gpu, resources_per_worker=resources,
    )  # fmt: skip
    for name in ("ray.train", "ray.train.v2"):
        logging.getLogger(name).setLevel(logging.ERROR)
    scratch = tempfile.mkdtemp(prefix="mixgf-train-")  # Ray's own bookkeeping; ours is in the output
    trainer = TorchTrainer(
        work,
        train_loop_config=params,
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=scaling,
        run_config=RunConfig(
            name=f"mixgf-{uuid.uuid4().hex[:8]}", storage_path=scratch,
            failure_config=FailureConfig(max_failures=compute.max_failures),
        ),
    )  # fmt: skip
    try:
        with _watch(board, num_steps):
            trainer.fit()
        error = ray.get(board.read.remote())[2]
    finally:
        ray.kill(board)
        shutil.rmtree(scratch, ignore_errors=True)
    if error:
        raise UserError(error)


@contextlib.contextmanager
def _watch(board: Any, num_steps: int) -> Iterator[None]:
    """Show the board's figures as progress from a thread."""
    ended = threading.Event()

    def look() -> None:
        progress: Progress | None = None
        while not ended.wait(0.5):
            step, figures, _ = ray.get(board.read.remote())
            if step:
                progress = progress or Progress("pretrain", num_steps, "steps", done=step)
                progress.update(step, **{k: figures[k] for k in _SHOWN if k in figures})
        if progress is not None:
            progress.close()

    thread = threading.Thread(target=look, name="mixgf-board", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()

"""Pretraining on a Ray Train worker group, or in this process.

Ray starts the workers, starts them again after a loss, and shrinks or grows the group; what was trained so far lies in the
output folder, where the training loop finds it. So worker, node, head and driver may die at any moment.

A training is one group of workers and not a list of tasks, so the executor only says where it runs: on Ray, or, if it is
local, in this process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from mixgf.config.fields import content_of, names
from mixgf.config.parse import difference, from_dict, to_dict
from mixgf.config.run import Config
from mixgf.config.training import Model
from mixgf.console import Progress, duration, number, say
from mixgf.corpus.reader import Corpus
from mixgf.distributed.executor import RayExecutor
from mixgf.distributed.metrics import SHOWN, Meter, watch
from mixgf.encoder import checkpoint
from mixgf.encoder.bert import MaskedModel
from mixgf.encoder.device import pick_device
from mixgf.errors import UserError
from mixgf.execution import Executor
from mixgf.stages import pretrain_inputs
from mixgf.storage import artifacts, files
from mixgf.tracking import mlflow_runs, model_card, packaged_model
from mixgf.training import checkpoints, held_out_loss, loop
from mixgf.training.loop import fit, measure_peak
from mixgf.training.pretraining import ContrastWatch, Pretraining, blank_model, initial_model, start_tokens
from mixgf.training.worker_group import LocalContext, MetricRow, Seen, ignore

USUAL_MFU = 0.3
"""Share of the GEMM peak that small recipes reached on two CPU cores through the command line (.22 to .38), for the estimate."""


def run(config: Config, *, executor: Executor | None = None) -> str:
    """Train the model of `config` on its corpus; returns the URI of the checkpoint artifact.

    `executor` says where: in this process if it is local, else in a worker group of Ray; None = Ray.
    """
    executor = executor or RayExecutor(config)
    uri = files.join(config.output, "pretrain")
    corpus = Corpus(config.inputs.corpus or files.join(config.output, "corpus"), max_len=config.model.max_positions)
    record = planned(config, corpus)
    task = Pretraining(
        config, corpus
    )  # before the folder is claimed: a config that cannot be trained leaves nothing behind
    if not artifacts.begin(uri, record):
        say(f"pretrain: {uri} is already there")
        return uri
    with executor.session():
        whole = pretrain_inputs.prepared(config, corpus, executor)
        _train(task if whole == config else Pretraining(whole, corpus), record, uri=uri, executor=executor)
    return uri


def _train(task: Pretraining, record: artifacts.Record, *, uri: str, executor: Executor) -> None:
    """Train the model to the end and publish it."""
    config, corpus = task.config, task.corpus
    model = blank_model(config, corpus.vocabulary.size)
    facts = _announce(config, task, model)
    with (
        mlflow_runs.stage(config, "pretrain", record.config, record.fingerprint) as tracked,
        watch(config, "pretrain", tracked, uri) as watched,
    ):
        tracked.corpus(corpus.uri, "training")
        tracked.log({f"plan/{name}": value for name, value in facts.items()})
        train = trainer(executor)
        train(config, corpus.uri, uri, record.fingerprint, num_steps=task.num_steps, tracked=tracked)
        last, best = checkpoints.last_and_best(uri)
        epochs = last / task.steps_per_epoch
        watched.made(cells=task.plan.num_cells * epochs, epochs=epochs)
        step = best if config.train.publish == "best" else last
        done = checkpoints.publish_step(
            uri, step, record, model, vocabulary=corpus.vocabulary.hash, tokens=corpus.token_settings, objective=config.objective,
            counts={"steps": last, "epochs": -(-last // task.steps_per_epoch), "cells": task.plan.num_cells},
            untrained=untrained(config, task), held_out=task.held_out and task.held_out.details(),
            start_VD=start_tokens(config, corpus),
        )  # fmt: skip
        final = loop.final_figures(uri, step)
        shown = {mlflow_runs.training_name(name): value for name, value in final.items()}
        tracked.summary(shown, own=False)  # the training's run has them as curves
        losses = {name: value for name, value in shown.items() if name.startswith(("loss/", "heldout/"))}
        packed = packaged_model.encoder(
            uri, corpus.uri, model_card.encoder(done, corpus.record, losses), {f"final/{n}": v for n, v in losses.items()}
        )  # fmt: skip
        tracked.model("encoder", packed, register=config.tracking.register)
    of_step = f" of step {step:,}" if step < last else ""
    say(f"pretrain: {done.counts['steps']:,} steps, weights{of_step} in {uri}")


def trainer(executor: Executor) -> Callable[..., None]:
    """The function that trains: `train_here`, or `mixgf.distributed.train_group.train` with the same arguments."""
    if executor.local:
        return train_here
    from mixgf.distributed import train_group

    return train_group.train


def train_here(
    config: Config, corpus: str, uri: str, identity: str, *, num_steps: int, tracked: mlflow_runs.Run, until: int = 0
) -> None:
    """Train in this process to the end, or until a step, from the latest checkpoint in `uri` on."""
    found = Corpus(corpus, max_len=config.model.max_positions)
    device = pick_device(config.compute.gpus_per_worker)
    context = ProcessContext(device, "pretrain", num_steps, tracked, seen=ContrastWatch(config))
    model, task = initial_model(config, found), Pretraining(config, found)
    try:
        fit(
            model, task, config.train, context, uri=uri, identity=identity, until=until,
            selection=held_out_loss.selection(task),
        )  # fmt: skip
    finally:
        context.close()


class ProcessContext(LocalContext):
    """This process as the only worker; figures go to the progress, to the tracker and, inside Ray, to the boards."""

    def __init__(
        self, device: torch.device, stage: str, num_steps: int, tracked: mlflow_runs.Run, *, seen: Seen = ignore
    ) -> None:  # fmt: skip
        super().__init__(device)
        self._stage, self._seen = stage, seen
        self._num_steps, self._tracked = num_steps, tracked
        self._progress: Progress | None = None

    def report(self, step: int, figures: dict[str, float]) -> None:
        """Show the progress."""
        self._seen(step, figures)
        self._progress = self._progress or Progress(self._stage, self._num_steps, "steps", done=step)
        self._progress.update(step, **{name: figures[name] for name in SHOWN if name in figures})
        Meter(self._stage, self._tracked.id).figures(step, figures)

    def commit(self, rows: list[MetricRow]) -> None:
        """Log to the tracker."""
        self._tracked.log_many(mlflow_runs.training_rows(rows))

    def recover(self, rows: list[MetricRow]) -> None:
        """Log to the tracker what it lacks."""
        self._tracked.log_missing(mlflow_runs.training_rows(rows))

    def close(self) -> None:
        """End the progress."""
        if self._progress is not None:
            self._progress.close()


def _start(config: Config, corpus: Corpus) -> artifacts.Record | None:
    """The record of `inputs.start`, None without one; a `UserError` where it cannot be started from."""
    if not config.inputs.start:
        return None
    record = artifacts.require(config.inputs.start, checkpoint.KIND, checkpoint.SCHEMA)
    checkpoint.require_vocabulary(record, corpus.vocabulary.hash, "the corpus", "inputs.start")
    ours, free = to_dict(config.model), names(config.model, role="training")
    theirs = to_dict(from_dict(Model, record.details["model"]))
    changes = difference(theirs, ours | {k: theirs[k] for k in free}, "model")
    if changes:
        msg = f"inputs.start = {config.inputs.start!r}: a model of other sizes: {'; '.join(changes[:3])}; set the model's as there"
        raise UserError(msg)
    return record


def untrained(config: Config, task: Pretraining) -> np.ndarray:
    """Ids that neither the start's training nor this one saw, ascending; none where it starts from random weights."""
    start = _start(config, task.corpus)
    return np.empty(0, dtype=np.int64) if start is None else task.unseen_ids(checkpoint.untrained_ids(start))


def planned(config: Config, corpus: Corpus) -> artifacts.Record:
    """The record of this training: all that decides the weights, nothing that only changes speed."""
    start = _start(config, corpus)
    chosen: dict[str, Any] = {
        "model": content_of(config.model),
        "objective": content_of(config.objective),
        "train": content_of(config.train),
        "seed": config.seed,
    }
    if config.objective.ortholog_weight > 0 or config.objective.view == "ortholog":
        chosen["orthologs"] = list(config.vocab.orthologs)
    parents = {"corpus": corpus.record.fingerprint} | ({"start": start.fingerprint} if start is not None else {})
    parents |= pretrain_inputs.parents(config, corpus)
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
    if task.held_out is not None:
        held = task.held_out
        units = "" if held.unit == "cell" else f" ({held.units:,} {held.unit}{'s' * (held.units > 1)})"
        say(f"pretrain: {len(held.cells):,} cells{units} are held out and never trained on")
    if (longest := int(task.corpus.record.details["max_len"])) > config.model.max_positions:
        say(
            f"pretrain: sentences of up to {longest:,} tokens are read to token {config.model.max_positions:,} (model.max_positions)"
        )
    say(
        f"pretrain: nothing is padded; padded batches would compute {facts['padding_random']:.2f} tokens per token in random "
        f"order, {facts['padding_grouped']:.2f} grouped by length"
    )
    if not config.compute.gpus_per_worker and task.reads_layers:  # without layers, memory is the bound
        cores = min(workers * config.train.threads, os.cpu_count() or 1)
        peak = cores * measure_peak(torch.device("cpu"), config.train.precision) / torch.get_num_threads()
        visits = min(task.num_steps * config.train.batch_cells, cells * config.train.epochs)
        facts["estimated_seconds"] = visits * facts["gflop_per_cell"] * 1e9 / (peak * USUAL_MFU)
        say(
            f"pretrain: about {duration(facts['estimated_seconds'])} if {cores} such cores reach {USUAL_MFU:.0%} of "
            f"{peak / 1e9:,.0f} GFLOP/s; the progress shows the time left as measured"
        )
    return facts

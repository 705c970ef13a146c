"""The trials of a sweep: each is one training that is scored at its rungs.

The scores of a trial at a rung are a part in storage, beside the training's checkpoints, and are not made again. They are of
the cells that choose arms. The scores of the test cells are a part of their own, made at the end for the best arm and the base
(`tuning.held_out`). Trials run under Ray Tune with a Ray Train group each, or with a local executor one after the other in this
process.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import pyarrow as pa

from mixgf.classification import labels
from mixgf.config.parse import from_dict, to_dict
from mixgf.config.run import Config
from mixgf.config.tuning import Tune
from mixgf.console import Progress
from mixgf.corpus.reader import Corpus
from mixgf.distributed.metrics import Meter
from mixgf.encoder.bert import MaskedModel
from mixgf.errors import UserError
from mixgf.execution import Executor
from mixgf.stages import pretrain
from mixgf.storage import artifacts, files, tables
from mixgf.tracking import mlflow_runs
from mixgf.training import checkpoints
from mixgf.tuning import evaluate, held_out
from mixgf.tuning.held_out import HeldOut, Tasks

SCHEMA = 2
SELECT, TEST = "select", "test"
"""The cells that a score is of: those that choose arms, and those that take no part in the choice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One training of one arm, as plain data that travels to its process."""

    arm: str
    """Key of the arm."""
    name: str
    """Of the arm, for people."""
    seed: int
    """Number of the repetition, from 0."""
    config: dict[str, Any]
    """The arm's config with the trial's seed and corpus."""
    uri: str
    """Its folder."""
    steps: tuple[int, ...]
    """Steps of its rungs; the last is the end."""
    base_seed: int
    """Seed of the sweep: splits and draws of the scores are the same for all trials."""

    def at(self, rung: int) -> int:
        """Number of its rung at a rung of the sweep; a short training has fewer rungs than the sweep."""
        return min(rung, len(self.steps) - 1)

    def part(self, rung: int) -> str:
        """URI of its scores at a rung (a number)."""
        return files.join(self.uri, f"rung-{rung}.parquet")

    @property
    def test_part(self) -> str:
        """URI of its scores on the test cells after the whole training."""
        return files.join(self.uri, "test.parquet")

    @property
    def failed(self) -> str:
        """URI of why the training cannot be done, if so."""
        return files.join(self.uri, "failed.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """A sweep while it runs."""

    config: Config
    executor: Executor
    tracked: mlflow_runs.Run
    meter: Meter


def evaluation_cells(config: Config, corpus: Corpus, seed: int) -> HeldOut:
    """The cells and splits that score an arm; fine-tuning needs random splits."""
    settings = config.tune
    table = evaluate.sample(labels.labelled(corpus, config.classify), settings.cells, seed)
    kinds = (*settings.splits, "random") if settings.finetune else settings.splits
    return held_out.divide(table, config.classify, tuple(dict.fromkeys(kinds)), seed=seed)


def advance(trial: Trial, rung: int, executor: Executor, parent: mlflow_runs.Run) -> float:
    """Train a trial to a rung and score it there; what is there is not made again. Returns the score; NaN = it failed."""
    rung = trial.at(rung)
    config = from_dict(Config, trial.config)
    if files.exists(trial.failed):
        return float("nan")
    if not files.exists(trial.part(rung)):
        corpus = Corpus(config.inputs.corpus, max_len=config.model.max_positions)
        record = pretrain.planned(config, corpus)
        with _tracked(trial, config, record.fingerprint, parent) as tracked:
            _rung(
                trial,
                rung,
                pretrain.trainer(executor),
                config=config,
                corpus=corpus,
                identity=record.fingerprint,
                tracked=tracked,
            )
    if files.exists(trial.failed):
        return float("nan")
    return score(trial, rung, config.tune)


def score(trial: Trial, rung: int, settings: Tune) -> float:
    """The score of a trial at a rung, by which arms are stopped and chosen."""
    return evaluate.objective(tables.read_table(trial.part(rung)).to_pandas(), settings.splits, settings.head)


def _rung(
    trial: Trial,
    rung: int,
    train: Callable[..., None],
    *,
    config: Config,
    corpus: Corpus,
    identity: str,
    tracked: mlflow_runs.Run,
) -> None:
    step, uri = trial.steps[rung], files.join(trial.uri, "pretrain")
    whole = replace(config, train=replace(config.train, patience=0))  # every rung is reached
    try:
        train(whole, corpus.uri, uri, identity, num_steps=trial.steps[-1], tracked=tracked, until=step)
    except UserError as error:  # an arm that cannot be trained is a finding, and stops no other
        files.write_json(trial.failed, {"why": str(error)})
        return
    tasks = evaluation_cells(config, corpus, trial.base_seed).select
    found = _evaluated(trial, rung, tasks, config, corpus)
    tracked.log(_figures(found, config), step)
    tables.write_table(trial.part(rung), pa.Table.from_pandas(found.assign(step=step), preserve_index=False))


def score_test(trial: Trial, parent: mlflow_runs.Run) -> None:
    """Score the test cells after the whole training of a trial, and write them as its part."""
    config = from_dict(Config, trial.config)
    corpus = Corpus(config.inputs.corpus, max_len=config.model.max_positions)
    tasks = evaluation_cells(config, corpus, trial.base_seed).test
    found = _evaluated(trial, len(trial.steps) - 1, tasks, config, corpus)
    with _tracked(trial, config, pretrain.planned(config, corpus).fingerprint, parent) as tracked:
        figures = {f"{TEST}/{name}": value for name, value in _figures(found, config).items()}
        tracked.log(figures, trial.steps[-1])
    table = pa.Table.from_pandas(found.assign(step=trial.steps[-1]), preserve_index=False)
    tables.write_table(trial.test_part, table)


def _tracked(
    trial: Trial, config: Config, training: str, parent: mlflow_runs.Run
) -> AbstractContextManager[mlflow_runs.Run]:
    """The run of a trial in MLflow, under that of the sweep."""
    own = artifacts.plan("trial", SCHEMA, {"trial": training, "sweep": parent.id}, {}).fingerprint
    params = to_dict(config) | {"arm": trial.name}
    return mlflow_runs.stage(config, f"{trial.name} (seed {trial.seed})", params, own, parent=parent.id)


def _evaluated(trial: Trial, rung: int, tasks: Tasks, config: Config, corpus: Corpus) -> pd.DataFrame:
    """Scores of the weights at a rung (a number): without fine-tuning, and after the last rung with it, too."""
    model = MaskedModel(config.model, corpus.vocabulary.size)
    checkpoints.load_step_weights(files.join(trial.uri, "pretrain"), trial.steps[rung], model)
    chosen = tasks.of(config.tune.splits)
    found = evaluate.zero_shot(model.encoder, corpus, tasks.table, chosen, run=config, seed=trial.base_seed)
    if rung == len(trial.steps) - 1 and config.tune.finetune:
        tuned = evaluate.finetuned(model.encoder, corpus, tasks.table, tasks.of(["random"]), run=config)
        found = pd.concat([found, tuned], ignore_index=True)
    return found


def _figures(found: pd.DataFrame, config: Config) -> dict[str, float]:
    """Scores for MLflow."""
    figures = {"score": evaluate.objective(found, config.tune.splits, config.tune.head)}
    for (model, split, metric), part in found.groupby(["model", "split", "metric"], sort=True):
        figures[f"{model}/{split}/{metric}" if model != "space" else str(metric)] = float(part["value"].mean())
    return figures


def advance_all(search: Search, trials: Sequence[Trial], rungs: range) -> None:
    """Bring trials to the last of `rungs`: under Ray Tune, or one after the other if the executor is local."""
    shown = _Shown(len(trials), search.meter)
    try:
        if search.executor.local:
            for trial in trials:
                for rung in rungs:
                    advance(trial, rung, search.executor, search.tracked)
                shown.ended()
            return
        from mixgf.distributed import tune_search

        work = functools.partial(_advance_number, list(trials), search.executor, search.tracked)
        tune_search.search(search.config, len(trials), rungs, work, shown.ended)
    finally:
        shown.close()


def _advance_number(
    trials: Sequence[Trial], executor: Executor, parent: mlflow_runs.Run, number: int, rung: int
) -> float:
    return advance(trials[number], rung, executor, parent)


class _Shown:
    """Progress of a sweep's trials."""

    def __init__(self, total: int, meter: Meter) -> None:
        self._progress, self._total, self._done, self._meter = Progress("tune", total, "trainings"), total, 0, meter

    def close(self) -> None:
        self._progress.close()

    def ended(self) -> None:
        self._done += 1
        self._progress.update(self._done)
        self._meter.units(waiting=self._total - self._done, done=self._done)

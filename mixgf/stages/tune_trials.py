"""One training of a sweep, and who does it: Ray Tune with a Ray Train group per trial, or a plain loop.

What a trial found at a rung is a part in storage, beside its training's checkpoints, so whoever comes next makes only what is
missing.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd
import pyarrow as pa

from mixgf.classification import labels, splits
from mixgf.classification.labels import Labelled
from mixgf.classification.splits import Split
from mixgf.config.parse import from_dict, to_dict
from mixgf.config.run import Config
from mixgf.config.tuning import Tune
from mixgf.console import Progress
from mixgf.corpus.reader import Corpus
from mixgf.distributed import tasks, train_group
from mixgf.distributed.metrics import Meter
from mixgf.distributed.session import session
from mixgf.encoder.bert import MaskedModel
from mixgf.errors import UserError
from mixgf.stages import prepare, pretrain
from mixgf.storage import artifacts, files, tables
from mixgf.tracking import mlflow_runs
from mixgf.training import checkpoints, pretraining
from mixgf.training.context import LocalContext
from mixgf.training.loop import fit
from mixgf.training.pretraining import Pretraining
from mixgf.tuning import evaluate

SCHEMA = 1


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
    """Its rungs; the last is the end."""
    base_seed: int
    """Of the sweep: splits and draws of the judge are the same for all trials."""

    def at(self, rung: int) -> int:
        """Number of its rung at a rung of the sweep: so short a training has fewer."""
        return min(rung, len(self.steps) - 1)

    def part(self, rung: int) -> str:
        """URI of what the judge found at a rung (its number)."""
        return files.join(self.uri, f"rung-{rung}.parquet")

    @property
    def failed(self) -> str:
        """URI of why the training cannot be done, if so."""
        return files.join(self.uri, "failed.json")


Spread = Callable[["Search", Sequence[Trial], range], None]
"""Brings trials through rungs, in any order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Engine:
    """Who does the work of a sweep; the result does not depend on it."""

    spread: Spread
    train: Callable[..., None]
    """As `drivers.pretrain.train`."""
    prepare: Callable[[Config], str]
    session: Callable[[Config], AbstractContextManager[None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Search:
    """A sweep while it runs."""

    config: Config
    engine: Engine
    tracked: mlflow_runs.Run
    meter: Meter


def evaluation_cells(config: Config, corpus: Corpus, seed: int) -> tuple[Labelled, list[Split]]:
    """The cells and splits that an arm is judged on."""
    settings = replace(config.classify, splits=config.tune.splits, seeds=1)
    table = evaluate.sample(labels.labelled(corpus, settings), config.tune.cells, seed)
    return table, splits.make(table, settings, seed=seed)


def work(trial: Trial, rung: int, engine: Engine, parent: mlflow_runs.Run) -> float:
    """Train a trial to a rung and judge it there; what is there is not made again. Returns the score; NaN = it failed."""
    rung = trial.at(rung)
    config = from_dict(Config, trial.config)
    if files.exists(trial.failed):
        return float("nan")
    if not files.exists(trial.part(rung)):
        corpus = Corpus(config.inputs.corpus, max_len=config.model.max_positions)
        record = pretrain.planned(config, corpus)
        own = artifacts.plan("trial", SCHEMA, {"trial": record.fingerprint, "sweep": parent.id}, {}).fingerprint
        params = to_dict(config) | {"arm": trial.name}
        name = f"{trial.name} (seed {trial.seed})"
        with mlflow_runs.stage(config, name, params, own, parent=parent.id) as tracked:
            _rung(trial, rung, engine.train, config=config, corpus=corpus, identity=record.fingerprint, tracked=tracked)
    if files.exists(trial.failed):
        return float("nan")
    return score(trial, rung, config.tune)


def score(trial: Trial, rung: int, settings: Tune) -> float:
    """What decides about a trial that was judged at a rung."""
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
    try:
        train(config, corpus.uri, uri, identity, num_steps=trial.steps[-1], tracked=tracked, until=step)
    except UserError as error:  # an arm that cannot be trained is a finding, and stops no other
        files.write_json(trial.failed, {"why": str(error)})
        return
    model = MaskedModel(config.model, corpus.vocabulary.size)
    checkpoints.load_step_weights(uri, step, model)
    table, made = evaluation_cells(config, corpus, trial.base_seed)
    found = evaluate.zero_shot(model.encoder, corpus, table, made, run=config, seed=trial.base_seed)
    if rung == len(trial.steps) - 1 and config.tune.finetune:
        tuned = evaluate.finetuned(model.encoder, corpus, table, run=config, seed=trial.base_seed)
        found = pd.concat([found, tuned], ignore_index=True)
    tracked.log(_figures(found, config), step)
    tables.write_table(trial.part(rung), pa.Table.from_pandas(found.assign(step=step), preserve_index=False))


def _figures(found: pd.DataFrame, config: Config) -> dict[str, float]:
    """What MLflow compares trials by."""
    figures = {"score": evaluate.objective(found, config.tune.splits, config.tune.head)}
    for (model, split, metric), part in found.groupby(["model", "split", "metric"], sort=True):
        figures[f"{model}/{split}/{metric}" if model != "space" else str(metric)] = float(part["value"].mean())
    return figures


# Ray Tune, or a plain loop


def ray_tune(search: Search, trials: Sequence[Trial], rungs: range) -> None:
    """Run trials under Ray Tune, `tune.concurrent` at a time, each to the last of `rungs`."""
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler

    config, engine, tracked = search.config, search.engine, search.tracked
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # MLflow has it all
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # which prints a table however quiet it is told to be
    scheduler = None
    if len(rungs) > 1:
        scheduler = ASHAScheduler(
            time_attr="rung", max_t=len(rungs), grace_period=1, reduction_factor=max(2, round(1 / config.tune.keep))
        )
    scratch = tempfile.mkdtemp(prefix="mixgf-tune-")  # Ray's own bookkeeping; ours is in the output
    given = {str(i): trial for i, trial in enumerate(trials)}

    def trainable(chosen: dict[str, Any]) -> None:
        trial = given[chosen["trial"]]
        for rung in rungs:
            tune.report({"score": work(trial, rung, engine, tracked), "rung": rung + 1})

    shown = _Shown(len(trials), search.meter)
    tuner = tune.Tuner(
        tune.with_resources(trainable, {"CPU": 0.01}),
        param_space={"trial": tune.grid_search(list(given))},
        tune_config=tune.TuneConfig(
            metric="score", mode="max", max_concurrent_trials=config.tune.concurrent, scheduler=scheduler
        ),
        run_config=tune.RunConfig(
            name="sweep", storage_path=scratch, verbose=0, callbacks=[shown.callback()],
            failure_config=tune.FailureConfig(max_failures=config.compute.max_failures),
        ),
    )  # fmt: skip
    try:
        found = tuner.fit()
    finally:
        shown.close()
        shutil.rmtree(scratch, ignore_errors=True)
    if found.num_errors:
        raise found.errors[0]


def loop(search: Search, trials: Sequence[Trial], rungs: range) -> None:
    """The plain loop: what Ray must equal."""
    for trial in trials:
        for rung in rungs:
            work(trial, rung, search.engine, search.tracked)


def train_here(
    config: Config, corpus: str, uri: str, identity: str, *, num_steps: int, tracked: mlflow_runs.Run, until: int = 0
) -> None:
    """`drivers.pretrain.train` in this process."""
    found = Corpus(corpus, max_len=config.model.max_positions)
    model = pretraining.initial_model(config, found)
    fit(model, Pretraining(config, found), config.train, LocalContext(), uri=uri, identity=identity, until=until)


RAY = Engine(spread=ray_tune, train=train_group.train, prepare=prepare.run, session=session)
PLAIN = Engine(
    spread=loop, train=train_here, prepare=partial(prepare.run, spread=tasks.loop), session=lambda _: nullcontext()
)


class _Shown:
    """Progress of a sweep's trials."""

    def __init__(self, total: int, meter: Meter) -> None:
        self._progress, self._total, self._done, self._meter = Progress("tune", total, "trainings"), total, 0, meter

    def close(self) -> None:
        self._progress.close()

    def callback(self) -> Any:
        from ray.tune import Callback

        shown = self

        class Ended(Callback):  # type: ignore[misc]
            def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
                shown.ended()

        return Ended()

    def ended(self) -> None:
        self._done += 1
        self._progress.update(self._done)
        self._meter.units(waiting=self._total - self._done, done=self._done)

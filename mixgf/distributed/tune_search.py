"""The trials of a sweep under Ray Tune: a trial is an arm, and its hyperparameters have the names of config fields."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import pandas as pd
import torch
from ray import tune
from ray.tune.schedulers import ASHAScheduler, MedianStoppingRule, TrialScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from mixgf.config.run import Config
from mixgf.console import warn
from mixgf.distributed.executor import resources
from mixgf.distributed.session import require_gpus
from mixgf.errors import require_package

Space = Mapping[str, tuple[str, Sequence[Any]]]
"""Field to the name of its domain in Ray Tune and the arguments: numbers and words."""
SCORE = "score"
"""The metric that trials report: the mean score of an arm over its seeds."""
TABLE_SECONDS = 300.0
"""Time between two tables of trials that have not all ended."""


class Shown(Protocol):
    """Shows trials, in the process that runs the sweep."""

    def ended(self) -> None:
        """Take note that a trial has ended."""

    def scored(self, chosen: Mapping[str, Any], rung: int, score: float) -> None:
        """Take note of the score of some hyperparameters after a number of rungs."""

    def table(self, lines: Sequence[str]) -> None:
        """Show a table of all trials (`trial_table`)."""


def run_points(
    config: Config, space: Space, points: Sequence[Mapping[str, Any]], rungs: range, *,
    advance: Callable[[Mapping[str, Any], int], float], shown: Shown, stop: bool,
) -> None:  # fmt: skip
    """Run the trials of known arms.

    Args:
        config: `tune`, `compute` and `train.threads`.
        space: The fields that the sweep varies.
        points: Hyperparameters of each arm, a value for each field of `space`.
        rungs: Rungs of the sweep to pass, ascending.
        advance: Brings the arm of some hyperparameters to a rung, and returns its score there. It is called in the trial's
            process, so it must be serialisable.
        shown: Is told of the trials.
        stop: Whether the rule of `tune.stop` may end a trial before the last rung.

    Raises:
        Exception: The error of the first trial that has one.
    """
    algorithm = BasicVariantGenerator([dict(point) for point in points], max_concurrent=config.tune.concurrent)
    run = tune.TuneConfig(
        search_alg=algorithm, num_samples=len(points), scheduler=_scheduler(config, len(rungs)) if stop else None
    )
    _fit(config, space, run, _Trainable(advance, rungs, config.train.threads), shown)


def run_optuna(
    config: Config, space: Space, known: Sequence[Mapping[str, Any]], rungs: range, *,
    advance: Callable[[Mapping[str, Any], int], float], shown: Shown,
) -> None:  # fmt: skip
    """Run `tune.num_arms` trials whose hyperparameters Optuna's TPE chooses by the scores of those before.

    Args:
        config: As in `run_points`.
        space: As in `run_points`.
        known: Hyperparameters of an earlier life of the sweep. They come first and count.
        rungs: As in `run_points`.
        advance: As in `run_points`.
        shown: As in `run_points`.

    Raises:
        UserError: Optuna is not installed.
    """
    require_package("optuna", "tune.search = 'optuna'", "mixgf[optuna]")
    import optuna
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    algorithm = OptunaSearch(points_to_evaluate=[dict(point) for point in known], seed=config.seed)
    run = tune.TuneConfig(
        search_alg=algorithm, num_samples=max(config.tune.num_arms, len(known)), scheduler=_scheduler(config, len(rungs)),
        max_concurrent_trials=config.tune.concurrent,
    )  # fmt: skip
    _fit(config, space, run, _Trainable(advance, rungs, config.train.threads), shown)


def _scheduler(config: Config, num_rungs: int) -> TrialScheduler | None:
    """The rule that ends trials; time is counted in rungs."""
    if num_rungs < 2 or config.tune.stop == "none":
        return None
    if config.tune.stop == "median":
        return MedianStoppingRule(time_attr="rung", grace_period=1, min_samples_required=3)
    factor = max(2, round(1 / config.tune.keep))
    return ASHAScheduler(time_attr="rung", max_t=num_rungs, grace_period=1, reduction_factor=factor)


@dataclass(frozen=True, slots=True)
class _Trainable:
    """What a trial does: rung by rung it advances its arm and reports the score. Between two reports it may be ended."""

    advance: Callable[[Mapping[str, Any], int], float]
    rungs: range
    threads: int

    def __call__(self, chosen: dict[str, Any]) -> None:
        torch.set_num_threads(self.threads)
        for rung in self.rungs:
            tune.report({SCORE: self.advance(chosen, rung), "rung": rung + 1})


def _resources(config: Config) -> dict[str, float]:
    """What a trial reserves: a worker's resources where it trains itself, next to nothing where it starts a group of workers.

    Ray Tune wants something, and a part of a CPU could be the one that the group lacks. So it is a byte of memory.
    """
    compute = config.compute
    if compute.num_workers > 1:
        return {"CPU": 0, "memory": 1}
    cpus, gpus = resources(compute, config.train.threads, gpu=True)
    return {"CPU": cpus} | ({"GPU": gpus} if gpus else {})


def _fit(
    config: Config, space: Space, run: tune.TuneConfig, trainable: _Trainable, shown: Shown
) -> None:  # fmt: skip
    require_gpus(config.compute.gpus_per_worker)
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the stage logs to MLflow
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the new one takes no reporter of ours
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")  # a traceback of each, also where the trial starts again
    run.metric, run.mode = SCORE, "max"
    scratch = tempfile.mkdtemp(prefix="mixgf-tune-")  # Ray's own bookkeeping; ours is in the output

    def trial(chosen: dict[str, Any]) -> None:  # Ray takes functions and classes only
        trainable(chosen)

    tuner = tune.Tuner(
        tune.with_resources(trial, _resources(config)),
        param_space={
            field: tune.choice(list(values)) if kind == "choice" else getattr(tune, kind)(*values)
            for field, (kind, values) in space.items()
        },
        tune_config=run,
        run_config=tune.RunConfig(
            name="sweep", storage_path=scratch, verbose=1, callbacks=[_Told(shown)], progress_reporter=_Table(space, shown),
            failure_config=tune.FailureConfig(max_failures=config.compute.max_failures),
        ),
    )  # fmt: skip
    try:
        found = tuner.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if found.num_errors:
        raise found.errors[0]


class _Told(tune.Callback):  # type: ignore[misc]
    """Tells of scores, of trials that have ended, and of those that start again."""

    def __init__(self, shown: Shown) -> None:
        self._shown = shown

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: Mapping[str, Any], **info: Any
    ) -> None:
        self._shown.scored(trial.config, result["rung"], result[SCORE])

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        warn(f"tune: the process of an arm failed ({trial.num_failures} so far); the arm goes on from its last rung")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._shown.ended()


def trial_table(space: Space, trials: Sequence[Any]) -> list[str]:
    """The lines of a table of trials, the best score first: state, score, rungs passed, and a column for each varied field."""
    rows = [
        {
            "status": trial.status,
            SCORE: trial.last_result.get(SCORE, float("nan")),
            "rung": trial.last_result.get("rung", 0),
        }
        | {field: trial.config[field] for field in space}
        for trial in trials
    ]
    frame = pd.DataFrame(rows, dtype=object).sort_values(SCORE, ascending=False, key=pd.to_numeric, kind="stable")
    return frame.to_string(index=False, na_rep="", float_format="{:.4g}".format).splitlines()


class _Table(tune.ProgressReporter):  # type: ignore[misc]
    """Shows the trials every `TABLE_SECONDS`, and when all have ended."""

    def __init__(self, space: Space, shown: Shown) -> None:
        self._space, self._shown, self._last = space, shown, time.monotonic()

    def should_report(self, trials: list[Any], done: bool = False) -> bool:  # noqa: FBT001 (Ray's signature)
        return done or time.monotonic() - self._last >= TABLE_SECONDS

    def report(self, trials: list[Any], done: bool, *sys_info: str) -> None:  # noqa: FBT001 (Ray's signature)
        self._last = time.monotonic()
        if trials:
            self._shown.table(trial_table(self._space, trials))

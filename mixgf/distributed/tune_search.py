"""The trials of a sweep under Ray Tune."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler

from mixgf.config.run import Config


def search(
    config: Config, num_trials: int, rungs: range, advance: Callable[[int, int], float], ended: Callable[[], None]
) -> None:
    """Run trials, `tune.concurrent` at a time, each to the last of `rungs`; with several rungs ASHA may stop one before.

    Args:
        config: `tune` and `compute`.
        num_trials: how many there are.
        rungs: of the sweep, ascending.
        advance: brings a trial (by number) to a rung and returns its score there; serialisable, called in the trial's process.
        ended: called in this process whenever a trial has ended.

    Raises:
        Exception: the error of the first trial that has one.
    """
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # the stage logs to MLflow
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # it prints a table at any verbosity
    scheduler = None
    if len(rungs) > 1:
        scheduler = ASHAScheduler(
            time_attr="rung", max_t=len(rungs), grace_period=1, reduction_factor=max(2, round(1 / config.tune.keep))
        )
    scratch = tempfile.mkdtemp(prefix="mixgf-tune-")  # Ray's own bookkeeping; ours is in the output

    def trainable(chosen: dict[str, Any]) -> None:
        for rung in rungs:
            tune.report({"score": advance(int(chosen["trial"]), rung), "rung": rung + 1})

    tuner = tune.Tuner(
        tune.with_resources(trainable, {"CPU": 0.01}),
        param_space={"trial": tune.grid_search([str(number) for number in range(num_trials)])},
        tune_config=tune.TuneConfig(
            metric="score", mode="max", max_concurrent_trials=config.tune.concurrent, scheduler=scheduler
        ),
        run_config=tune.RunConfig(
            name="sweep", storage_path=scratch, verbose=0, callbacks=[_Ended(ended)],
            failure_config=tune.FailureConfig(max_failures=config.compute.max_failures),
        ),
    )  # fmt: skip
    try:
        found = tuner.fit()
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if found.num_errors:
        raise found.errors[0]


class _Ended(tune.Callback):  # type: ignore[misc]
    """Calls a function whenever a trial has ended."""

    def __init__(self, ended: Callable[[], None]) -> None:
        self._ended = ended

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._ended()

"""Settings of `mixgf tune`: which configs are trained, how they are scored and which are stopped early."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mixgf.config.checks import require
from mixgf.config.classification import HEADS, SPLITS
from mixgf.config.fields import check, option


@dataclass(frozen=True, kw_only=True, slots=True)
class Tune:
    """A sweep: every arm (this config with some fields changed) is pretrained with several seeds and scored on the way."""

    space: tuple[Mapping[str, tuple[Any, ...]], ...] = option(())
    """What is varied: a JSON object, or a list of them, of dotted fields and their values. Values are a list, or a domain:
    "uniform(0, 0.2)", "loguniform(1e-4, 1e-2)", "randint(2, 9)", "choice(mean, first)". Example: {"train.lr": [1e-4, 1e-3]}.
    The arms are this config as it is (the base) and, in a grid, every combination of the lists of each object."""
    search: str = option("grid", choices=("grid", "random", "optuna"))
    """`grid`: all combinations of lists. `random`: `num_arms` arms drawn from the lists and domains. `optuna`: `num_arms` arms, each
    chosen by the scores of those before (TPE; needs optuna and Ray, and `stop` other than halving)."""
    num_arms: int = option(12, least=1)
    """Arms beside the base, for `random` and `optuna`."""
    seeds: int = option(3, least=1)
    """Trainings of each arm, with the seeds config.seed, config.seed + 1, ..."""
    rungs: tuple[float, ...] = option((0.3, 1.0), above=0, most=1)
    """Shares of the training after which an arm is scored, rising. The last is 1."""
    stop: str = option("halving", choices=("halving", "asha", "median", "none"))
    """Which arms stop early, by their mean over seeds; the base never does. `halving`: after each rung only the better arms
    continue; the result is reproducible. `asha`, `median`: Ray Tune's ASHA and median stopping rule, which do not wait for other
    arms, so that timing decides what they stop. `none`: all arms are trained to the end."""
    keep: float = option(0.5, above=0, most=1)
    """Share of the arms that continue after a rung, for `halving` and `asha`."""
    head: str = option("knn", choices=HEADS)
    """Head whose zero-shot macro F1 ranks the arms: `knn`, `probe` or `centroid`. All three are recorded."""
    splits: tuple[str, ...] = option(("donor", "species"), choices=SPLITS)
    """Splits that are scored, each with the same weight: `random`, `donor`, `dataset`, `species`."""
    cells: int = option(3000, least=0)
    """Labelled cells that arms are scored on, drawn at random, the same number of each group where possible. 0: all cells."""
    finetune: bool = option(True)
    """Also fine-tune every finished training on random splits, by the settings of `classify`: the second score."""
    concurrent: int = option(2, result=False, least=1)
    """Arms at a time, each with one training of compute.num_workers workers at a time."""
    register: str = option("", result=False)
    """Name in MLflow's model registry under which the best arm is registered. Empty: not registered."""

    def __post_init__(self) -> None:
        check(self, "tune")
        require(bool(self.splits), "tune.splits", self.splits, "at least one split")
        rising = all(a < b for a, b in pairwise(self.rungs))
        require(
            bool(self.rungs) and rising and self.rungs[-1] == 1,
            "tune.rungs",
            self.rungs,
            "rising shares of the training, the last 1",
        )
        waits = self.search == "optuna" and self.stop == "halving"
        require(
            not waits,
            "tune.stop",
            self.stop,
            "asha, median or none with tune.search = 'optuna', which does not know all arms at once",
        )

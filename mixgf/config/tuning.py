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
    """What is varied, as a JSON list of objects: dotted field to a list of values, for example [{"train.lr": [1e-4, 1e-3]}].
    Fields in one object are crossed. The arms are this config as it is (the base) and every combination of each object."""
    search: str = option("grid", choices=("grid", "random"))
    """`grid`: all arms. `random`: the base and `num_arms` of the others, drawn at random."""
    num_arms: int = option(12, least=1)
    """Arms that `random` draws beside the base."""
    seeds: int = option(3, least=1)
    """Trainings of each arm, with the seeds config.seed, config.seed + 1, ..."""
    rungs: tuple[float, ...] = option((0.3, 1.0), above=0, most=1)
    """Shares of the training after which an arm is scored, rising. The last is 1."""
    stop: str = option("halving", choices=("halving", "asha", "none"))
    """`halving`: after each rung only the better arms continue (by mean over seeds), and always the base; the result is
    reproducible. `asha`: Ray Tune's ASHA on single trainings, which does not wait; what it stops depends on timing.
    `none`: all arms are trained to the end."""
    keep: float = option(0.5, above=0, most=1)
    """Share of the arms that continue after a rung."""
    head: str = option("knn", choices=HEADS)
    """Head whose zero-shot macro F1 ranks the arms: `knn`, `probe` or `centroid`. All three are recorded."""
    splits: tuple[str, ...] = option(("donor", "species"), choices=SPLITS)
    """Splits that are scored, each with the same weight: `random`, `donor`, `dataset`, `species`."""
    cells: int = option(3000, least=0)
    """Labelled cells that arms are scored on, drawn at random, the same number of each group where possible. 0: all cells."""
    finetune: bool = option(True)
    """Also fine-tune every finished training on random splits, by the settings of `classify`: the second score."""
    concurrent: int = option(2, result=False, least=1)
    """Trainings at a time, of compute.num_workers workers each."""
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

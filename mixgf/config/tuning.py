"""Moved here from mixgf/config.py."""

from __future__ import annotations

from dataclasses import dataclass

from mixgf.config.checks import _one_of, _require
from mixgf.config.classification import HEADS, SPLITS


@dataclass(frozen=True, kw_only=True, slots=True)
class Tune:
    """A sweep: arms (this config with some fields changed) times seeds, each a pretraining that is judged as it goes."""

    space: tuple[str, ...] = ()
    """What is varied, one entry per factor: a dotted field, `=`, a JSON list of values. ` x ` between factors crosses them. The
    arms are this config as it is (the base) and, entry by entry, every combination of the entry's values."""
    search: str = "grid"
    """`grid`: all arms; `random`: the base and `num_arms` of them, drawn with a key."""
    num_arms: int = 12
    """Arms that `random` draws beside the base."""
    seeds: int = 3
    """Trainings of an arm, with config.seed, config.seed + 1, ..."""
    rungs: tuple[float, ...] = (0.3, 1.0)
    """Shares of the training after which an arm is judged; the last is 1."""
    stop: str = "halving"
    """`halving`: after a rung only the better arms (by mean over seeds) go on, the base always; the same sweep always stops the
    same arms. `asha`: Ray Tune's ASHA on single trainings, which waits for nobody; what it stops depends on who comes first.
    `none`: all arms are trained to the end."""
    keep: float = 0.5
    """Share of the arms that go on after a rung."""
    head: str = "knn"
    """Head whose macro F1 decides (zero-shot): `knn`, `probe` or `centroid`; all three are kept."""
    splits: tuple[str, ...] = ("donor", "species")
    """On which splits, each with the same weight: `random`, `donor`, `dataset`, `species`."""
    cells: int = 3000
    """Labelled cells that the arms are judged on, drawn with a key, as many of each group as can be; 0 = all."""
    finetune: bool = True
    """Fine-tune every finished training on random splits too, by `classify`: the second score."""
    concurrent: int = 2
    """Trainings at a time, of compute.num_workers workers each."""
    register: str = ""
    """Name in MLflow's model registry under which the best arm is registered; empty = not registered."""

    def __post_init__(self) -> None:
        _one_of("tune.search", self.search, ("grid", "random"))
        _one_of("tune.stop", self.stop, ("halving", "asha", "none"))
        _one_of("tune.head", self.head, HEADS)
        for split in self.splits:
            _one_of("tune.splits", split, SPLITS)
        _require(bool(self.splits), "tune.splits", self.splits, "at least one split")
        for name in ("num_arms", "seeds", "concurrent"):
            _require(getattr(self, name) >= 1, f"tune.{name}", getattr(self, name), "at least 1")
        _require(self.cells >= 0, "tune.cells", self.cells, "at least 0 (all)")
        _require(0 < self.keep <= 1, "tune.keep", self.keep, "above 0, at most 1")
        rising = all(a < b for a, b in zip(self.rungs, self.rungs[1:], strict=False))
        _require(
            bool(self.rungs) and rising and self.rungs[0] > 0 and self.rungs[-1] == 1, "tune.rungs", self.rungs,
            "rising shares of the training, the last 1",
        )  # fmt: skip

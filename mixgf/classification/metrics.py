"""Scores of predictions with intervals over donors or cells, and paired comparisons of two models.

All scores are computed from counts of *states* (true class, predicted class, confidence bin). A bootstrap resample, or the cells
without one donor, is one row of counts, so its cost does not grow with the number of cells.

Shape letters: M test cells, C classes, E distinct states, K clusters (donors or cells), R resamples.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse, stats

from mixgf.arrays import Float64s, Ints
from mixgf.stats.intervals import (
    Interval,
    bootstrap_counts,
    interval_units,
    jackknife_interval,
    leave_one_out_counts,
    percentile_interval,
)

NUM_BINS = 15
"""Confidence bins of the calibration error (Guo et al. 2017)."""
METRICS = ("accuracy", "macro_f1", "balanced_accuracy", "ece")
"""`ece` is the expected calibration error: lower is better."""


def confusion(true_M: Ints, predicted_M: Ints, num_classes: int) -> Ints:
    """Counts (C, C): row = true class, column = predicted class."""
    flat = np.bincount(true_M * num_classes + predicted_M, minlength=num_classes**2)
    return flat.reshape(num_classes, num_classes).astype(np.int64)


def class_scores(confusion_CC: npt.NDArray[np.number]) -> dict[str, Float64s]:
    """`precision`, `recall`, `f1` per class over leading axes; 0 where a class was never predicted or never true."""
    hits = np.diagonal(confusion_CC, axis1=-2, axis2=-1).astype(np.float64)
    true, predicted = confusion_CC.sum(-1), confusion_CC.sum(-2)
    return {
        "precision": _ratio(hits, predicted),
        "recall": _ratio(hits, true),
        "f1": _ratio(2 * hits, true + predicted),
    }


def totals(confusion_CC: npt.NDArray[np.number]) -> dict[str, Float64s]:
    """`accuracy`, `macro_f1` and `balanced_accuracy` over leading axes.

    The means over classes are over classes with a test cell. A split has test cells of every class; a resample may not.
    """
    classes = class_scores(confusion_CC)
    present = confusion_CC.sum(-1) > 0
    count = np.maximum(present.sum(-1), 1)
    hits = np.diagonal(confusion_CC, axis1=-2, axis2=-1).sum(-1).astype(np.float64)
    return {
        "accuracy": _ratio(hits, confusion_CC.sum((-2, -1))),
        "macro_f1": (classes["f1"] * present).sum(-1) / count,
        "balanced_accuracy": (classes["recall"] * present).sum(-1) / count,
    }


def score(
    true_M: Ints, predicted_M: Ints, confidence_M: Float64s, donors_M: npt.NDArray[np.str_], num_classes: int, *,
    rng: np.random.Generator, held_out: bool = False,
) -> tuple[dict[str, Interval], str]:  # fmt: skip
    """Every metric of `METRICS` with its 95 % interval, and what the interval is over (`donor`, `cell` or `none`).

    Args:
        true_M: Class ids.
        predicted_M: Class ids.
        confidence_M: Probability that the model gave its prediction.
        donors_M: Donor of each cell.
        num_classes: C.
        rng: Draws the resamples.
        held_out: Whether donors are held out, see `interval_units`.
    """
    clusters_M, by = interval_units(donors_M, held_out=held_out)
    bins_M = np.clip(np.ceil(confidence_M * NUM_BINS).astype(np.int64) - 1, 0, NUM_BINS - 1)
    state_M = (true_M * num_classes + predicted_M) * NUM_BINS + bins_M
    states_E, entry_M = np.unique(state_M, return_inverse=True)
    sums_E = np.bincount(entry_M, weights=confidence_M)
    mean_E = sums_E / np.bincount(entry_M)

    def metrics(counts_RE: npt.NDArray[np.number]) -> dict[str, Float64s]:
        table_RCC = _spread(counts_RE, states_E // NUM_BINS, num_classes**2).reshape(-1, num_classes, num_classes)
        true_E, predicted_E = np.divmod(states_E // NUM_BINS, num_classes)
        weights = np.where(true_E == predicted_E, 1.0, 0.0) - mean_E
        gaps = np.abs(_spread(counts_RE * weights, states_E % NUM_BINS, NUM_BINS)).sum(-1)
        return {**totals(table_RCC), "ece": gaps / np.maximum(counts_RE.sum(-1), 1)}

    found = _estimates(metrics, clusters_M, entry_M, len(states_E), by=by, rng=rng, bounded=True)
    return {name: interval for name, (interval, _) in found.items()}, by


Statistic = Callable[[npt.NDArray[np.number]], dict[str, Float64s]]
"""From counts (R, E) to named values, each (R,)."""


def _estimates(
    statistic: Statistic,
    clusters_M: Ints,
    entry_M: Ints,
    size: int,
    *,
    by: str,
    rng: np.random.Generator,
    bounded: bool,
) -> dict[str, tuple[Interval, float]]:
    """Values of a statistic with their intervals over the given units, and the two-sided p of each that it is 0.

    `bounded`: the values lie between 0 and 1; they have no p (NaN). Without units there are no limits either (NaN).
    """
    exact = {name: float(one[0]) for name, one in statistic(np.bincount(entry_M, minlength=size)[None, :]).items()}
    none = float("nan")
    if by == "none":
        return {name: (Interval(one, none, none), none) for name, one in exact.items()}
    if by == "donor":
        counts_KE, sizes_K = leave_one_out_counts(clusters_M, entry_M, size)
        without = statistic(counts_KE)
        return {name: jackknife_interval(one, without[name], sizes_K, bounded=bounded) for name, one in exact.items()}
    drawn = statistic(bootstrap_counts(clusters_M, entry_M, size, rng=rng))
    return {
        name: (percentile_interval(one, drawn[name]), none if bounded else _normal_p(one, drawn[name]))
        for name, one in exact.items()
    }


def _normal_p(value: float, drawn_R: Float64s) -> float:
    """Two-sided p that a value is 0, by the spread of its R bootstrap values."""
    spread = float(drawn_R.std(ddof=1))
    return float(2 * stats.norm.sf(abs(value) / spread)) if spread > 0 else float(value == 0)


SIGNIFICANT = 0.05
"""Largest p of a win or a loss."""
ACCEPTED = 0.95
"""Share of the cells of known types whose probability is above the limit of `rejection`."""


def rejection(
    confidence_M: Float64s, unseen_M: npt.NDArray[np.bool_], donors_M: npt.NDArray[np.str_], *, rng: np.random.Generator,
    held_out: bool = False,
) -> tuple[dict[str, Interval], str]:  # fmt: skip
    """Detection of cells of an unseen type by a low probability, and what the intervals are over.

    `auroc` is the chance that a cell of the unseen type has a lower probability than one of a known type (ties count half; 0.5 =
    random). `rejected` is the share of unseen cells below the limit that 95 % of the known cells are above.

    Args:
        confidence_M: Probability that the model gave its prediction.
        unseen_M: Whether the cell is of the type that was left out; both kinds are there.
        donors_M: Donor of each cell.
        rng: Draws the resamples.
        held_out: Whether donors are held out, see `interval_units`.
    """
    clusters_M, by = interval_units(donors_M, held_out=held_out)
    levels, level_M = np.unique(confidence_M, return_inverse=True)
    entry_M, size = level_M * 2 + unseen_M, 2 * len(levels)

    def metrics(counts_RE: npt.NDArray[np.number]) -> dict[str, Float64s]:
        known, unseen = counts_RE[:, 0::2].astype(np.float64), counts_RE[:, 1::2].astype(np.float64)
        above = known.sum(1, keepdims=True) - np.cumsum(known, axis=1) + known / 2
        totals_ = known.sum(1), unseen.sum(1)
        refused = np.cumsum(known, axis=1) <= (1 - ACCEPTED) * totals_[0][:, None]
        return {
            "auroc": np.where(
                totals_[0] * totals_[1] > 0, _ratio((unseen * above).sum(1), totals_[0] * totals_[1]), 0.5
            ),
            "rejected": _ratio((unseen * refused).sum(1), totals_[1]),
        }

    found = _estimates(metrics, clusters_M, entry_M, size, by=by, rng=rng, bounded=True)
    return {name: interval for name, (interval, _) in found.items()}, by


@dataclass(frozen=True)
class Difference(Interval):
    """A paired difference, model minus baseline, with its interval and the two-sided p that it is 0."""

    p: float


@dataclass(frozen=True)
class Comparison:
    """One model against one baseline on the same cells."""

    accuracy: Difference
    macro_f1: Difference
    p_mcnemar: float
    """Exact McNemar test on the cells that only one of the two predicts correctly (in more seeds). Each cell counts once. It
    takes cells as independent, so it says nothing about other donors."""
    by: str
    """What the intervals are over: `donor`, `cell` or `none`."""


def outcomes(difference_T: Float64s, p_T: Float64s) -> list[str]:
    """Outcome of each of T comparisons: `win`, `loss`, `tie`, or `unknown` without a p.

    Args:
        difference_T: Model minus baseline.
        p_T: p-values after correction for the number of comparisons.
    """
    return [
        "unknown" if not np.isfinite(p) else "tie" if p > SIGNIFICANT else "win" if difference > 0 else "loss"
        for difference, p in zip(difference_T, p_T, strict=True)
    ]


def compare(
    *, true_M: Ints, model_M: Ints, baseline_M: Ints, cells_M: Ints, donors_M: npt.NDArray[np.str_], seeds_M: Ints,
    num_classes: int, rng: np.random.Generator, held_out: bool = False,
) -> Comparison:  # fmt: skip
    """Compare two models on the same test cells, over all seeds at once.

    A difference is the mean over seeds of the difference within a seed. A donor, or a cell, is left out or drawn with its
    predictions of all seeds. So a cell that is tested in several seeds counts once, and so does a donor.

    Args:
        true_M: Class ids; rows of all seeds one after the other.
        model_M: Predictions of the model.
        baseline_M: Predictions of the baseline, same rows.
        cells_M: Cell of each row.
        donors_M: Donor of each row.
        seeds_M: Seed of each row.
        num_classes: C.
        rng: Draws the resamples.
        held_out: Whether donors are held out, see `interval_units`.
    """
    clusters_M, by = interval_units(donors_M, held_out=held_out)
    clusters_M = clusters_M if by != "cell" else np.unique(cells_M, return_inverse=True)[1]
    num_seeds = len(np.unique(seeds_M))
    seed_M = np.unique(seeds_M, return_inverse=True)[1]
    state_M = ((seed_M * num_classes + true_M) * num_classes + model_M) * num_classes + baseline_M
    states_E, entry_M = np.unique(state_M, return_inverse=True)
    rest_E, by_baseline_E = np.divmod(states_E, num_classes)
    truth_E, by_model_E = np.divmod(rest_E, num_classes)

    def differences(counts_RE: npt.NDArray[np.number]) -> dict[str, Float64s]:
        shape = (-1, num_seeds, num_classes, num_classes)
        size = num_seeds * num_classes**2
        of_model = totals(_spread(counts_RE, truth_E * num_classes + by_model_E, size).reshape(shape))
        of_baseline = totals(_spread(counts_RE, truth_E * num_classes + by_baseline_E, size).reshape(shape))
        return {name: (of_model[name] - of_baseline[name]).mean(-1) for name in ("accuracy", "macro_f1")}

    estimates = _estimates(differences, clusters_M, entry_M, len(states_E), by=by, rng=rng, bounded=False)
    found = {name: Difference(one.value, one.low, one.high, p) for name, (one, p) in estimates.items()}
    cell_M = np.unique(cells_M, return_inverse=True)[1]
    net = np.bincount(
        cell_M, weights=(true_M == model_M).astype(float) - (true_M == baseline_M)
    )  # of each cell, over its seeds
    p_mcnemar = mcnemar(int((net > 0).sum()), int((net < 0).sum()))
    return Comparison(found["accuracy"], found["macro_f1"], p_mcnemar, by)


def mcnemar(only_first: int, only_second: int) -> float:
    """Two-sided exact p of McNemar's test, from the numbers of cells that only one of two models got right."""
    pairs = only_first + only_second
    return float(stats.binomtest(only_first, pairs, 0.5).pvalue) if pairs else 1.0


def _spread(counts_RE: npt.NDArray[np.number], target_E: Ints, size: int) -> npt.NDArray[Any]:
    """Sum the columns of `counts_RE` that have the same target: (R, E) -> (R, size)."""
    num_entries = len(target_E)
    fold = sparse.csr_matrix((np.ones(num_entries), (target_E, np.arange(num_entries))), shape=(size, num_entries))
    return np.asarray((fold @ counts_RE.T).T)


def _ratio(over: npt.NDArray[np.number], under: npt.NDArray[np.number]) -> Float64s:
    return np.divide(over, under, out=np.zeros(np.broadcast(over, under).shape), where=np.asarray(under) > 0)

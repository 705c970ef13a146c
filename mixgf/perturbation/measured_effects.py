"""Score predicted effects of perturbations against measured ones: a Perturb-seq data set with control cells.

The measured effect of a perturbation is the mean of its cells less that of the control cells, of log(1 + 10,000 * count / depth).
Cells are halved. The first halves are the truth. The second halves are the replicate, the best that can be asked of a prediction. Two
anchors make every score readable, as in Arc Institute's cell-eval: 0 is the mean effect of the other perturbations, 1 is the replicate.

| metric | is, for one perturbation and without the perturbed gene |
|---|---|
| `correlation` | Pearson correlation of predicted and measured effects over genes |
| `discrimination` | share of other perturbations whose measured effects are farther from the prediction (mean absolute difference); 0.5 is chance |
| `overlap` | share of the genes with the largest measured effects among as many of the largest predicted ones |
| `direction` | share of the genes that differ from control (FDR) whose predicted effect has the measured sign; 0.5 is chance |

Letters: N cells, G genes, P perturbations.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import sparse, special

from mixgf.arrays import Bools, Float64s, Ints
from mixgf.perturbation.expression import log_normalised, moments
from mixgf.stats.donors import benjamini_hochberg

METRICS = ("correlation", "discrimination", "overlap", "direction")
MIN_CELLS = 10
"""Fewest cells of a perturbation, and of the controls."""
TOP = 50
"""Most genes that `overlap` compares."""
LEVEL = 0.05
"""False discovery rate of the genes of `overlap` and `direction`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Measured effects, by perturbation and gene."""

    names: tuple[str, ...]
    """Perturbations, sorted."""
    truth_PG: Float64s
    replicate_PG: Float64s
    fdr_PG: Float64s
    """Of the truth against the control cells of its half."""


def measure(
    counts_NG: sparse.csr_matrix, perturbation_N: np.ndarray, control: str, *, seed: int = 0, min_cells: int = MIN_CELLS
) -> Measured:
    """Measured effects of the perturbations with at least `min_cells` cells.

    Args:
        counts_NG: raw counts.
        perturbation_N: name of each cell's perturbation.
        control: name of the control cells.
        seed: of the halves.
        min_cells: fewest cells of a perturbation.
    """
    x_NG = log_normalised(counts_NG)
    perturbation_N = np.asarray(perturbation_N).astype(str)
    names, counts = np.unique(perturbation_N, return_counts=True)
    assert control in names, control
    kept = [
        name
        for name, number in zip(names.tolist(), counts.tolist(), strict=True)
        if number >= min_cells and name != control
    ]
    rng = np.random.default_rng(seed)

    def halves(name: str) -> tuple[Ints, Ints]:
        order = rng.permutation(np.flatnonzero(perturbation_N == name))
        return order[::2], order[1::2]

    of_control = [_moments(x_NG, rows) for rows in halves(control)]
    sides: tuple[list[Float64s], list[Float64s]] = ([], [])
    fdr = []
    for name in kept:
        for side, rows in enumerate(halves(name)):
            mean_G, error_G = _moments(x_NG, rows)
            sides[side].append(mean_G - of_control[side][0])
            if side == 0:
                with np.errstate(invalid="ignore", divide="ignore"):
                    z_G = np.abs(sides[0][-1]) / np.sqrt(error_G + of_control[0][1])
                fdr.append(benjamini_hochberg(2 * special.ndtr(-np.nan_to_num(z_G))))
    empty = np.empty((0, x_NG.shape[1]))
    truth_PG, replicate_PG, fdr_PG = (np.stack(rows) if rows else empty for rows in (*sides, fdr))
    return Measured(names=tuple(kept), truth_PG=truth_PG, replicate_PG=replicate_PG, fdr_PG=fdr_PG)


def score(predicted_PG: Float64s, measured: Measured, own_P: Ints, *, signed: bool = True) -> pd.DataFrame:
    """Scores of a prediction and of its two anchors, one row per perturbation and metric.

    Args:
        predicted_PG: predicted effects in any unit, rows as `measured.names`; NaN = nothing is predicted of the gene.
        measured: the measured effects.
        own_P: column of the perturbed gene; -1 = it was not measured.
        signed: predictions have a sign. If not, they are compared with the sizes of the measured effects, and `direction` is NaN.

    Returns:
        Columns perturbation, metric, value, mean_response, replicate, and scaled: (value - mean_response) / (replicate - mean_response),
        NaN where the replicate is no better than the mean response.
    """
    if not signed:
        measured = replace(measured, truth_PG=np.abs(measured.truth_PG), replicate_PG=np.abs(measured.replicate_PG))
    rows = []
    num = len(measured.names)
    total_G = measured.replicate_PG.sum(axis=0)
    for p, name in enumerate(measured.names):
        used_G = np.isfinite(predicted_PG[p])
        if own_P[p] >= 0:
            used_G[own_P[p]] = False
        others_G = (total_G - measured.replicate_PG[p]) / max(1, num - 1)
        found = [
            _metrics(effect_G, p, measured, used_G)
            for effect_G in (predicted_PG[p], others_G, measured.replicate_PG[p])
        ]
        for metric in METRICS:
            none = metric == "direction" and not signed
            value, mean, replicate = (float("nan") if none else one[metric] for one in found)
            room = replicate - mean
            rows.append({
                "perturbation": name, "metric": metric, "value": value, "mean_response": mean, "replicate": replicate,
                "scaled": (value - mean) / room if room > 0 else float("nan"),
            })  # fmt: skip
    return pd.DataFrame(rows, columns=["perturbation", "metric", "value", "mean_response", "replicate", "scaled"])


def summarise(scores: pd.DataFrame) -> pd.DataFrame:
    """Means over the perturbations by metric, scaled by the means of both anchors."""
    means = scores.groupby("metric", sort=False)[["value", "mean_response", "replicate"]].mean()
    room = means["replicate"] - means["mean_response"]
    means["scaled"] = ((means["value"] - means["mean_response"]) / room).where(room > 0)
    return means.reset_index().assign(num_perturbations=scores["perturbation"].nunique())


def _moments(x_NG: sparse.csr_matrix, rows: Ints) -> tuple[Float64s, Float64s]:
    """Mean, and squared standard error of it, of some cells, (G,)."""
    mean_G, variance_G = moments(x_NG[rows])
    return mean_G, variance_G / max(1, len(rows) - 1)


def _metrics(effect_G: Float64s, p: int, measured: Measured, used_G: Bools) -> dict[str, float]:
    """The metrics of one prediction of one perturbation."""
    effect, truth_PU = effect_G[used_G], measured.truth_PG[:, used_G]
    truth = truth_PU[p]
    varies = len(effect) > 2 and np.ptp(effect) > 0 and np.ptp(truth) > 0
    distance_P = np.abs(truth_PU - effect).mean(axis=1) if len(effect) else np.full(len(truth_PU), np.nan)
    others = np.delete(distance_P, p)
    farther = (others > distance_P[p]).sum() + (others == distance_P[p]).sum() / 2
    real_U = measured.fdr_PG[p][used_G] <= LEVEL
    top = min(TOP, int(real_U.sum()))
    largest = [set(np.argsort(-np.abs(values), kind="stable")[:top].tolist()) for values in (effect, truth)]
    sign = np.sign(effect[real_U]) * np.sign(truth[real_U])
    return {
        "correlation": float(np.corrcoef(effect, truth)[0, 1]) if varies else float("nan"),
        "discrimination": float(farther / len(others)) if len(others) else float("nan"),
        "overlap": len(largest[0] & largest[1]) / top if top else float("nan"),
        "direction": float(((sign + 1) / 2).mean()) if top else float("nan"),
    }

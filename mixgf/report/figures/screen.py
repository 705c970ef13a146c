"""Figures of a perturbation screen: shifts against p values and ranks, calibration of the tests, responses of genes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mixgf.report.figures.style import FAINT, SOFT, SPECIES_COLORS, canvas


def volcano(genes: pd.DataFrame, name: str, *, p: str, title: str, goal: bool) -> str:
    """Shift against -log10 p, and mean rank against shift with the shift that rank alone predicts; the strongest genes are named."""
    from matplotlib.patheffects import withStroke

    frame = genes[np.isfinite(genes["shift"])].sort_values(["shift", "gene"], ascending=[False, True])
    targets = frame[frame["role"] != "null"] if "role" in frame else frame
    named = pd.concat([targets.head(7), targets.tail(3)]).drop_duplicates("gene") if goal else targets.head(8)
    with canvas(name, 10.2, 3.9, wspace=0.05) as (figure, out):
        left, right = figure.subplots(1, 2)
        floor = np.clip(frame[p].to_numpy(float), 1e-300, 1)
        for axes, x, y in ((left, frame["shift"], -np.log10(floor)), (right, frame["mean_rank"], frame["shift"])):
            null = frame["reference"].to_numpy(bool) if "reference" in frame else np.zeros(len(frame), dtype=bool)
            null &= not null.all()  # crosses: genes sampled as controls; none where every gene is a control
            points = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
            axes.scatter(points[0][null], points[1][null], s=14, marker="x", c=FAINT, linewidths=0.9, rasterized=True,
                         label="sampled as control" if null.any() else None)  # fmt: skip
            axes.scatter(
                points[0][~null],
                points[1][~null],
                s=11,
                c=SOFT,
                alpha=0.45 + 0.4 * null.any(),
                linewidths=0,
                rasterized=True,
            )
            chosen = frame["gene"].isin(named["gene"]).to_numpy()
            axes.scatter(
                x[chosen], np.asarray(y)[chosen], s=26, facecolors="none", edgecolors=SPECIES_COLORS[1], linewidths=1.3
            )
            taken: list[tuple[float, float]] = []
            for symbol, a, b in zip(frame["symbol"][chosen], np.asarray(x)[chosen], np.asarray(y)[chosen], strict=True):
                if np.isfinite(a) and np.isfinite(b):
                    _name(
                        axes,
                        str(symbol),
                        (float(a), float(b)),
                        taken=taken,
                        halo=withStroke(linewidth=2, foreground="white"),
                    )
        left.axvline(0, color=FAINT, linewidth=0.8)
        left.set(
            xlabel="shift towards the goal" if goal else "shift (1 − cosine)",
            ylabel=f"−log₁₀ p ({title})",
            title="Effect and test",
        )
        fit = frame[["mean_rank", "rank_expected"]].dropna().sort_values("mean_rank")
        if len(fit):
            right.plot(
                fit["mean_rank"],
                fit["rank_expected"],
                color=SPECIES_COLORS[0],
                linewidth=1.8,
                label="predicted by rank alone",
            )
            right.legend(loc="best")
        right.axhline(0, color=FAINT, linewidth=0.8)
        right.set(xlabel="mean rank in the sentence (1 = most characteristic)", ylabel="shift", title="Effect and rank")
        left.margins(0.09)
        right.margins(0.06)
    return out[0]


def _name(axes: Any, symbol: str, at: tuple[float, float], *, taken: list[tuple[float, float]], halo: Any) -> None:
    """Write the name of a gene beside its point, unless an earlier name is there already. The tables name every gene."""
    if not taken:
        axes.figure.draw_without_rendering()  # computes the layout, which the pixel positions below need
    px, py = axes.transData.transform(at)
    if all(abs(px - a) > 45 or abs(py - b) > 11 for a, b in taken):
        axes.annotate(symbol, at, xytext=(5, 4), textcoords="offset points", fontsize=8, path_effects=[halo])
    taken.append((px, py))


def responses(table: pd.DataFrame, name: str) -> str:
    """Perturbed (rows) by responding genes (columns), log2 of observed over expected change: blue less, orange more."""
    from matplotlib.colors import LinearSegmentedColormap

    ends = (SPECIES_COLORS[0], "#f7f7f5", SPECIES_COLORS[1])
    shades = LinearSegmentedColormap.from_list("excess", ends).with_extremes(bad=FAINT)
    values = np.ma.masked_invalid(table.to_numpy(float))
    limit = max(1.0, float(np.ceil(np.nanpercentile(np.abs(table.to_numpy(float)), 99))))
    with canvas(name, 2.6 + 0.19 * table.shape[1], 1.7 + 0.19 * len(table)) as (figure, out):
        axes = figure.subplots()
        drawn = axes.pcolormesh(values, cmap=shades, vmin=-limit, vmax=limit, rasterized=True)
        axes.set(
            xticks=np.arange(table.shape[1]) + 0.5,
            yticks=np.arange(len(table)) + 0.5,
            yticklabels=list(table.index),
            xlabel="responding gene",
            ylabel="perturbed gene",
        )
        axes.set_xticklabels(list(table.columns), rotation=90)
        axes.tick_params(length=0, labelsize=7)
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        figure.colorbar(drawn, ax=axes, label="log₂ of observed / expected", shrink=0.8, pad=0.02)
    return out[0]


def calibration(observed: pd.DataFrame, nulls: pd.DataFrame, name: str) -> str:
    """Quantiles of p over cells and over donors against uniform ones: observed, and with residuals of genes permuted."""
    with canvas(name, 7.6, 3.5, wspace=0.06) as (figure, out):
        panels = figure.subplots(1, 2)
        for axes, column, title in zip(
            panels, ("p_cell", "p_donor"), ("Test over cells (published)", "Test over donors"), strict=True
        ):
            top = 1.0
            series = (
                ("this screen", observed, "o", SPECIES_COLORS[0]),
                ("genes permuted: no effect", nulls, "^", SPECIES_COLORS[1]),
            )
            for label, frame, marker, color in series:
                p = np.sort(frame[column].dropna().to_numpy(float))
                expected = -np.log10((np.arange(1, len(p) + 1) - 0.5) / max(len(p), 1))
                y = -np.log10(np.clip(p, 1e-300, 1))
                top = max(top, float(expected.max(initial=1.0)))
                axes.scatter(
                    expected,
                    y,
                    s=13,
                    marker=marker,
                    facecolors="none",
                    edgecolors=color,
                    linewidths=0.9,
                    label=label,
                    rasterized=True,
                )
            axes.plot([0, top], [0, top], color=SOFT, linewidth=1, linestyle="--", label="calibrated test")
            axes.set(title=title, xlabel="−log₁₀ p expected by chance", ylabel="−log₁₀ p")
            axes.set_ylim(bottom=-0.05 * max(axes.get_ylim()[1], 0.1))
        panels[0].legend(loc="upper left", fontsize=8)
    return out[0]

"""Curves: training history, scores by share of the labels."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mixgf.report.figures.style import (
    FAINT,
    SPECIES_COLORS,
    SPECIES_MARKERS,
    TYPE_COLORS,
    canvas,
)


def panels(series: dict[str, pd.DataFrame], name: str, *, zero: bool = False) -> str:
    """One panel per curve. `series[title]` has columns step and value; thin lines are raw values, thick lines running means."""
    columns = min(3, len(series))
    rows = -(-len(series) // columns)
    with canvas(name, 3.05 * columns + 0.2, 2.0 * rows + 0.1) as (figure, out):
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes, (title, frame) in zip(panels.flat, series.items(), strict=False):
            steps, values = frame["step"].to_numpy(float), frame["value"].to_numpy(float)
            if len(values) > 600:
                keep = np.linspace(0, len(values) - 1, 600).astype(int)
                steps, values = steps[keep], values[keep]
            window = max(1, len(values) // 15)
            if window > 1:
                axes.plot(steps, values, color=SPECIES_COLORS[5], linewidth=0.8, alpha=0.7)
                values = pd.Series(values).rolling(window, min_periods=1, center=True).mean().to_numpy()
            axes.plot(steps, values, color=SPECIES_COLORS[0], linewidth=1.7, marker="o" if len(values) < 3 else None)
            axes.set(title=title)
            axes.margins(x=0.02)
            axes.locator_params(axis="x", nbins=5)
            if np.nanmin(values) >= 0 and (zero or np.nanmin(values) < 0.4 * np.nanmax(values)):
                axes.set_ylim(0, None)
            axes.yaxis.set_major_formatter(_tick)
        for axes in panels.flat[len(series) :]:
            axes.set_visible(False)
        for axes in panels[-1]:
            axes.set_xlabel("optimizer step")
    return out[0]


def label_efficiency(curves: dict[str, pd.Series]) -> str:
    """Score by share of the training labels (index, drawn on a log scale), one line per model."""
    styles = ("-", "--", ":", "-.")
    with canvas("efficiency", 7.2, 3.6) as (figure, out):
        axes = figure.subplots()
        for i, (name, line) in enumerate(curves.items()):
            axes.plot(line.index, line.to_numpy(), label=name, color=TYPE_COLORS[i % 20], linestyle=styles[i % 4],
                      marker=SPECIES_MARKERS[i % 6], markersize=5, linewidth=1.6)  # fmt: skip
        ticks = sorted({float(x) for line in curves.values() for x in line.index})
        axes.set(
            xscale="log",
            xlabel="share of the training labels",
            ylabel="macro F1, mean over sets of cells",
            ylim=(0, 1.02),
        )
        axes.set_xticks(ticks, [f"{100 * x:g} %" for x in ticks])
        axes.minorticks_off()
        axes.grid(axis="y", color=FAINT, linewidth=0.5)
        figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return out[0]


def _tick(value: float, _: int | None = None) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

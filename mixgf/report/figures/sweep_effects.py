"""Figures of a sweep: effects with intervals, zero-shot against fine-tuned scores, scaling curves."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mixgf.report.figures.style import FAINT, INK, SOFT, SPECIES_COLORS, canvas
from mixgf.tuning.search_space import BASE


def forest(effects: pd.DataFrame, titles: dict[str, str], name: str) -> str:
    """Effect of each arm against the base with its 95 % interval, one panel per metric.

    Args:
        effects: Result of `tuning.analysis.effects`.
        titles: Metric to the panel's title, in order.
        name: Name of the figure on the page.
    """
    shown = [m for m in titles if (effects["metric"] == m).any()]
    order = effects[effects["metric"] == shown[0]].sort_values(["effect", "name"])["name"].tolist()
    with canvas(name, 3.2 + 2.6 * len(shown), 0.8 + 0.24 * len(order)) as (figure, out):
        for i, (axes, metric) in enumerate(zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True)):
            mine = effects[effects["metric"] == metric].set_index("name").reindex(order)
            at = np.arange(len(order))
            value = mine["effect"].to_numpy(float)
            low, high = (np.nan_to_num(mine[c].to_numpy(float), nan=0.0) for c in ("low", "high"))
            has = mine["low"].notna().to_numpy()
            axes.axvline(0, color=FAINT, linewidth=1)
            axes.hlines(at[has], low[has], high[has], color=SPECIES_COLORS[0], linewidth=1.4)
            axes.plot(value, at, "o", color=SPECIES_COLORS[0], markersize=4)
            axes.set(
                yticks=at, yticklabels=order if i == 0 else [], title=titles[metric], ylim=(-0.6, len(order) - 0.4)
            )
            axes.set_xlabel("arm minus base")
            axes.locator_params(axis="x", nbins=4)
    return out[0]


def pareto(means: pd.DataFrame, name: str) -> str:
    """Zero-shot against fine-tuned score, one point per arm with its range over seeds.

    Names are given to the base and to arms than which no other is better in both scores.

    Args:
        means: Columns name, score, finetuned, and score_low, score_high, finetuned_low, finetuned_high (range over seeds).
        name: Name of the figure on the page.
    """
    x, y = means["score"].to_numpy(float), means["finetuned"].to_numpy(float)
    front = np.array([not np.any((x >= a) & (y >= b) & ((x > a) | (y > b))) for a, b in zip(x, y, strict=True)])
    with canvas(name, 6.4, 4.2) as (figure, out):
        axes = figure.subplots()
        axes.hlines(y, means["score_low"], means["score_high"], color=FAINT, linewidth=1)
        axes.vlines(x, means["finetuned_low"], means["finetuned_high"], color=FAINT, linewidth=1)
        axes.plot(x[~front], y[~front], "o", color=SOFT, markersize=5)
        axes.plot(x[front], y[front], "D", color=SPECIES_COLORS[1], markersize=6)
        for i in [i for i, text in enumerate(means["name"]) if front[i] or text == BASE]:
            axes.annotate(
                means["name"].iloc[i], (x[i], y[i]), xytext=(6, 5), textcoords="offset points", fontsize=8,
                color=INK if front[i] else SOFT,
            )  # fmt: skip
        axes.set(xlabel="zero-shot macro F1 (mean over seeds; line: range)", ylabel="fine-tuned accuracy")
        axes.margins(x=0.2, y=0.12)
    return out[0]


def scaling_curve(points: pd.DataFrame, curve: pd.DataFrame | None, axes_labels: tuple[str, str], name: str) -> str:
    """Score or loss along one field: a dot per training, and the fitted curve with its interval, dashed where it extrapolates.

    Args:
        points: Result of `tuning.analysis.scores_along`.
        curve: Result of `tuning.analysis.forecast`, ascending; None with too few points.
        axes_labels: Labels of x and y.
        name: Name of the figure on the page.
    """
    with canvas(name, 5.2, 3.2) as (figure, out):
        axes = figure.subplots()
        axes.plot(points["x"], points["value"], "o", color=SPECIES_COLORS[0], markersize=4, alpha=0.8)
        if curve is not None:
            x, known = curve["x"].to_numpy(float), curve["x"].to_numpy(float) <= points["x"].max()
            axes.fill_between(x, curve["low"], curve["high"], color=SPECIES_COLORS[5], alpha=0.25, linewidth=0)
            axes.plot(x[known], curve["value"][known], color=SPECIES_COLORS[0], linewidth=1.4)
            beyond = np.flatnonzero(~known)
            if len(beyond):
                part = slice(max(0, int(beyond[0]) - 1), None)
                axes.plot(x[part], curve["value"][part], color=SPECIES_COLORS[0], linewidth=1.4, linestyle="--")
        axes.set_xscale("log")
        axes.set(xlabel=axes_labels[0], ylabel=axes_labels[1])
    return out[0]

"""The report's drawings, each a function from arrays or frames to one SVG element.

Text stays text; dense point clouds are pictures. Nothing is told by colour alone: species also differ by
marker or hatching, cell types carry numbers, heat maps carry values. Colours are those of Okabe and Ito. The same input
gives the same bytes. matplotlib is imported where it is used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from mixgf.report.figures.style import (
    FAINT,
    INK,
    SOFT,
    SPECIES_COLORS,
    SPECIES_HATCHES,
    SPECIES_MARKERS,
    TYPE_COLORS,
    canvas,
)

MAX_TYPES = 30
"""Most types with a number of their own in a map; the rarer ones are drawn grey."""


def cells_by_type(counts: pd.DataFrame) -> str:
    """Bars of cells by type (rows, largest first) and species (columns), on a log scale."""
    counts = counts.loc[counts.sum(axis=1).sort_values(ascending=False, kind="stable").index[:40]]
    bar = 0.8 / max(counts.shape[1], 1)
    with canvas("types", 7.2, 0.7 + len(counts) * max(0.24, 0.15 * counts.shape[1])) as (figure, out):
        axes = figure.subplots()
        for i, species in enumerate(counts.columns):
            y = np.arange(len(counts)) + (i - (counts.shape[1] - 1) / 2) * bar
            axes.barh(
                y,
                counts[species],
                height=bar * 0.9,
                color=SPECIES_COLORS[i % 6],
                hatch=SPECIES_HATCHES[i % 6],
                edgecolor="white",
                linewidth=0,
                label=species,
            )
            for at, n in zip(y, counts[species], strict=True):
                if n:
                    axes.text(n * 1.06, at, f"{n:,.0f}", va="center", fontsize=7, color=SOFT)
        axes.set(
            xscale="log",
            xlabel="cells (log scale)",
            yticks=np.arange(len(counts)),
            yticklabels=list(counts.index),
            xlim=(0.7, max(float(counts.to_numpy().max()), 2) * 2),
            ylim=(len(counts) - 0.4, -0.6),
        )
        axes.tick_params(axis="y", length=0)
        axes.legend(loc="lower right", handlelength=1.6)
    return out[0]


def lengths(histogram: dict[str, np.ndarray], max_len: int) -> str:
    """Sentence lengths by species; `histogram[species][n]` is the number of cells with n tokens."""
    with canvas("lengths", 7.2, 2.5) as (figure, out):
        axes = figure.subplots()
        longest = max((int(np.flatnonzero(h).max()) for h in histogram.values() if h.any()), default=1)
        edges = np.linspace(0, longest + 1, min(51, longest + 2)).astype(int)
        for i, (species, counts) in enumerate(histogram.items()):
            padded = np.concatenate([[0], np.cumsum(counts), np.full(max(0, longest + 2 - len(counts)), counts.sum())])
            bins = np.diff(padded[edges])
            axes.stairs(
                bins / max(counts.sum(), 1),
                edges,
                color=SPECIES_COLORS[i % 6],
                linewidth=1.6,
                linestyle=("-", "--", ":", "-.")[i % 4],
                label=f"{species} (median {_median(counts):,})",
            )
        axes.axvline(max_len, color=SOFT, linewidth=0.8, linestyle=":")
        axes.annotate(
            f"longest sentence {max_len:,}",
            (max_len, axes.get_ylim()[1]),
            fontsize=7,
            color=SOFT,
            ha="right",
            va="top",
            xytext=(-4, 0),
            textcoords="offset points",
        )
        axes.set(
            xlabel="genes in the sentence",
            ylabel="share of cells",
            xlim=(0, max(longest, max_len) * 1.02),
            ylim=(0, None),
        )
        axes.legend(loc="upper left", bbox_to_anchor=(0.0, 1.0))
    return out[0]


def _tick(value: float, _: int | None = None) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _median(counts: np.ndarray) -> int:
    total = counts.sum()
    return int(np.searchsorted(np.cumsum(counts), (total + 1) // 2)) if total else 0


def curves(series: dict[str, pd.DataFrame], name: str, *, zero: bool = False) -> str:
    """Small multiples: one panel per curve, `series[title]` with columns step and value; thin raw, thick smoothed."""
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


def efficiency(curves: dict[str, pd.Series]) -> str:
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


def side_by_side(maps_: dict[str, pd.DataFrame], key: str = "spaces") -> str:
    """One map per embedding of the same cells (columns x, y, species, type), with the same colours.

    A number stands on the cells of each type and species. `key` names the figure.
    """
    first = next(iter(maps_.values()))
    order = [str(k) for k in first["type"].value_counts().index if k][:MAX_TYPES]
    names, columns = sorted(set(first["species"])), min(3, len(maps_))
    rows = -(-len(maps_) // columns)
    width = 3.5 * columns
    across = min(
        3, max(1, int(width / (0.45 + 0.058 * max(map(len, [*order, *names])))))
    )  # names of the legend in a line
    with canvas(key, width, 3.5 * rows + 0.15 * -(-(len(order) + len(names)) // across) + 0.3) as (figure, out):
        panels = figure.subplots(rows, columns, squeeze=False)
        for axes, (title, frame) in zip(panels.flat, maps_.items(), strict=False):
            xy_N2, types_N, species_N = (
                frame[["x", "y"]].to_numpy(),
                frame["type"].to_numpy(str),
                frame["species"].to_numpy(str),
            )
            for i, name in enumerate(names):
                mine = species_N == name
                color = [TYPE_COLORS[order.index(t) % 20] if t in order else FAINT for t in types_N[mine]]
                axes.scatter(
                    *xy_N2[mine].T,
                    s=4,
                    c=color,
                    marker=SPECIES_MARKERS[i % 6],
                    alpha=0.6,
                    linewidths=0,
                    rasterized=True,
                )
            clouds = [
                (i, cloud)
                for i, kind in enumerate(order[:20], 1)
                for n in names
                if (cloud := xy_N2[(types_N == kind) & (species_N == n)]).size
            ]
            _numbers(axes, clouds, 0.04 * _span(xy_N2), size=7.5, halo=2.2)
            axes.set(title=title, xticks=[], yticks=[])
            axes.spines[:].set_visible(True)
            axes.spines[:].set_color(FAINT)
        for axes in panels.flat[len(maps_) :]:
            axes.set_visible(False)
        marks = [
            panels[0, 0].scatter([], [], s=26, c=SOFT, marker=SPECIES_MARKERS[i % 6], label=n)
            for i, n in enumerate(names)
        ]
        marks += [
            panels[0, 0].scatter([], [], s=26, color=TYPE_COLORS[i % 20], label=f"{i + 1}  {k}")
            for i, k in enumerate(order)
        ]
        figure.legend(
            handles=marks, loc="outside lower center", ncols=across, fontsize=7, handletextpad=0.1, columnspacing=0.8
        )
    return out[0]


def maps(xy_N2: np.ndarray, species_N: np.ndarray, types_N: np.ndarray) -> str:
    """The map twice: by species, and by cell type with a number on the cells of each type and species."""
    kinds, counts = np.unique(types_N, return_counts=True)
    order = [str(k) for k in kinds[np.argsort(-counts, kind="stable")] if k][:MAX_TYPES]
    size = float(np.clip(22_000 / max(len(xy_N2), 1), 4, 16))
    with canvas("maps", 10.2, 5.0 + 0.165 * -(-(len(order) + 1) // 3)) as (figure, out):
        left, right = figure.subplots(1, 2)
        names = sorted(set(species_N))
        for axes, by_type in ((left, False), (right, True)):
            for i, name in enumerate(names):
                rows = np.flatnonzero(species_N == name)
                kind_N = [order.index(t) if t in order else -1 for t in types_N[rows]]
                color = [TYPE_COLORS[k % 20] if k >= 0 else FAINT for k in kind_N] if by_type else SPECIES_COLORS[i % 6]
                axes.scatter(
                    *xy_N2[rows].T,
                    s=size,
                    c=color,
                    marker=SPECIES_MARKERS[i % 6],
                    alpha=0.6,
                    linewidths=0,
                    rasterized=True,
                )
                if not by_type:
                    axes.scatter([], [], s=34, c=color, marker=SPECIES_MARKERS[i % 6], label=f"{name} ({len(rows):,})")
        labels = [(k, np.flatnonzero((types_N == k) & (species_N == name))) for k in order for name in names]
        labels = [
            (k, rows) for k, rows in labels if len(rows) >= 3 or (len(rows) and len(rows) == (types_N == k).sum())
        ]
        clouds = [(order.index(k) + 1, xy_N2[rows]) for k, rows in labels]
        _numbers(right, clouds, 0.036 * _span(xy_N2), size=9, halo=2.6)
        for i, kind in enumerate(order):
            right.scatter(
                [], [], s=34, color=TYPE_COLORS[i % 20], label=f"{i + 1}  {kind} ({(types_N == kind).sum():,})"
            )
        if rest := int(np.isin(types_N, order, invert=True).sum()):
            right.scatter([], [], s=34, c=FAINT, label=f"–  unlabelled or rarer ({rest:,})")
        left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.03), ncols=3, handletextpad=0.2)
        right.legend(
            loc="upper center",
            bbox_to_anchor=(0.44, -0.03),
            ncols=3,
            fontsize=7.5,
            handletextpad=0.1,
            columnspacing=0.8,
        )
        for axes, title in ((left, "By species"), (right, "By cell type")):
            axes.set(title=title, xticks=[], yticks=[], aspect="equal", adjustable="datalim")
            axes.spines[:].set_visible(True)
            axes.spines[:].set_color(FAINT)
    return out[0]


def _span(xy_N2: np.ndarray) -> float:
    return float(np.ptp(xy_N2, axis=0).max())


def _numbers(axes: Any, clouds: list[tuple[int, np.ndarray]], gap: float, *, size: float, halo: float) -> None:
    """A number on each cloud of cells, `gap` apart at least; `size` of its letters and `halo` around them in points."""
    from matplotlib.patheffects import withStroke

    if not clouds:
        return
    at_K2 = _apart(np.array([_middle(cloud) for _, cloud in clouds]), gap)
    for (number, _), (x, y) in zip(clouds, at_K2, strict=True):
        axes.text(x, y, str(number), ha="center", va="center", fontsize=size, fontweight="bold",
                  path_effects=[withStroke(linewidth=halo, foreground="white")])  # fmt: skip


def _middle(xy_N2: np.ndarray) -> tuple[float, float]:
    """The cell nearest to the median, so that a number lies on cells even where a type has two clouds."""
    x, y = xy_N2[np.argmin(((xy_N2 - np.median(xy_N2, axis=0)) ** 2).sum(axis=1))]
    return float(x), float(y)


def _apart(at_K2: np.ndarray, gap: float) -> np.ndarray:
    """Push labels that lie nearer than `gap` apart, a little at a time."""
    at_K2 = at_K2 + 1e-6 * np.arange(len(at_K2))[:, None]
    for _ in range(60):
        step_K2 = np.zeros_like(at_K2)
        for i in range(len(at_K2)):
            away = at_K2[i] - at_K2
            distance = np.hypot(*away.T)
            near = (distance < gap) & (np.arange(len(at_K2)) != i)
            step_K2[i] = (away[near] / distance[near, None] * (gap - distance[near, None])).sum(axis=0) / 2
        if not step_K2.any():
            break
        at_K2 = at_K2 + step_K2
    return at_K2


def heatmap(
    table: pd.DataFrame, name: str, *, rows: str, columns: str, text: Sequence[Sequence[str]], outline: str = ""
) -> str:
    """A table of values as shades with the text in each cell; `outline` boxes each row's `smallest` value."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    ends = ("#f3f6f9", "#56B4E9", "#003d66")
    shades = LinearSegmentedColormap.from_list("mixgf", ends[::-1] if outline == "smallest" else ends)
    width = min(10.0, 2.4 + 0.47 * table.shape[1])
    with canvas(name, width, 1.6 + 0.31 * len(table)) as (figure, out):
        axes = figure.subplots()
        values = table.to_numpy(float)
        low, high = (float(np.nanmin(values)), float(np.nanmax(values))) if outline else (0.0, 1.0)
        axes.pcolormesh(values, cmap=shades, vmin=low, vmax=max(high, low + 1e-12), edgecolors="white", linewidth=1)
        small = table.shape[1] > 16
        for i, j in np.ndindex(*table.shape):
            shade = (values[i, j] - low) / max(high - low, 1e-12)
            dark = (1 - shade if outline == "smallest" else shade) > 0.55
            axes.text(
                j + 0.5,
                i + 0.5,
                text[i][j],
                ha="center",
                va="center",
                fontsize=6 if small else 7.5,
                color="white" if dark else INK,
            )
        if outline == "smallest":
            for i, j in enumerate(np.argmin(values, axis=1)):
                axes.add_patch(
                    Rectangle(
                        (float(j) + 0.04, i + 0.05), 0.92, 0.9, fill=False, edgecolor=SPECIES_COLORS[1], linewidth=2
                    )
                )
        axes.set(
            xticks=np.arange(table.shape[1]) + 0.5,
            yticks=np.arange(len(table)) + 0.5,
            yticklabels=list(table.index),
            xlabel=columns,
            ylabel=rows,
        )
        axes.set_xticklabels(list(table.columns), rotation=40, ha="right", rotation_mode="anchor")
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return out[0]

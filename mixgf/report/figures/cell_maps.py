"""Two-dimensional maps of cells."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mixgf.report.figures.style import (
    FAINT,
    SOFT,
    SPECIES_COLORS,
    SPECIES_MARKERS,
    TYPE_COLORS,
    canvas,
    short,
)

MAX_TYPES = 30
"""Most types with a colour and number on a map; rarer types are grey."""


def species_and_types(xy_N2: np.ndarray, species_N: np.ndarray, types_N: np.ndarray) -> str:
    """A map twice: coloured by species, and by cell type with a number on the cells of each type and species."""
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
                [], [], s=34, color=TYPE_COLORS[i % 20], label=f"{i + 1}  {short(kind)} ({(types_N == kind).sum():,})"
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


def side_by_side(maps_: dict[str, pd.DataFrame], key: str = "spaces") -> str:
    """One map per embedding of the same cells (columns x, y, species, type), with the same colours on all maps.

    Numbers mark the cells of each type and species. `key` is the name of the figure.
    """
    first = next(iter(maps_.values()))
    order = [str(k) for k in first["type"].value_counts().index if k][:MAX_TYPES]
    names, columns = sorted(set(first["species"])), min(3, len(maps_))
    rows = -(-len(maps_) // columns)
    width = 3.5 * columns
    per_row = min(
        3, max(1, int(width / (0.45 + 0.058 * max(map(len, [*order, *names])))))
    )  # names of the legend in a line
    with canvas(key, width, 3.5 * rows + 0.15 * -(-(len(order) + len(names)) // per_row) + 0.3) as (figure, out):
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
            panels[0, 0].scatter([], [], s=26, color=TYPE_COLORS[i % 20], label=f"{i + 1}  {short(k)}")
            for i, k in enumerate(order)
        ]
        figure.legend(
            handles=marks, loc="outside lower center", ncols=per_row, fontsize=7, handletextpad=0.1, columnspacing=0.8
        )
    return out[0]


def _span(xy_N2: np.ndarray) -> float:
    return float(np.ptp(xy_N2, axis=0).max())


def _numbers(axes: Any, clouds: list[tuple[int, np.ndarray]], gap: float, *, size: float, halo: float) -> None:
    """Write a number on each cloud of cells, at least `gap` apart; `size` of the digits and `halo` around them are in points."""
    from matplotlib.patheffects import withStroke

    if not clouds:
        return
    at_K2 = _push_apart(np.array([_middle(cloud) for _, cloud in clouds]), gap)
    for (number, _), (x, y) in zip(clouds, at_K2, strict=True):
        axes.text(x, y, str(number), ha="center", va="center", fontsize=size, fontweight="bold",
                  path_effects=[withStroke(linewidth=halo, foreground="white")])  # fmt: skip


def _middle(xy_N2: np.ndarray) -> tuple[float, float]:
    """Position of the cell nearest to the median: there are cells under the number even if a type has two clouds."""
    x, y = xy_N2[np.argmin(((xy_N2 - np.median(xy_N2, axis=0)) ** 2).sum(axis=1))]
    return float(x), float(y)


def _push_apart(at_K2: np.ndarray, gap: float) -> np.ndarray:
    """Move positions (K, 2) apart, step by step, until all distances are at least `gap` (or 60 steps are done)."""
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

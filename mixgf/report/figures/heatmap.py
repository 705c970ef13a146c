"""A table of values as a heat map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from mixgf.report.figures.style import (
    INK,
    SPECIES_COLORS,
    canvas,
    short,
)

_LONG, _INCHES = 24, 0.08
"""Characters of a name from which a figure becomes larger, and by how much with each."""


def heatmap(
    table: pd.DataFrame, name: str, *, rows: str, columns: str, text: Sequence[Sequence[str]], outline: str = ""
) -> str:
    """Values as shades with `text` in each cell. With `outline="smallest"` a box marks the smallest value of each row."""
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    ends = ("#f3f6f9", "#56B4E9", "#003d66")
    shades = LinearSegmentedColormap.from_list("mixgf", ends[::-1] if outline == "smallest" else ends)
    down, across = [short(one) for one in table.index], [short(one) for one in table.columns]
    more, higher = (_INCHES * max(0, max(map(len, names), default=0) - _LONG) for names in (down, across))
    width = min(10.0, 2.4 + 0.47 * table.shape[1] + more)
    with canvas(name, width, 1.6 + 0.31 * len(table) + higher) as (figure, out):
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
            yticklabels=down,
            xlabel=columns,
            ylabel=rows,
        )
        axes.set_xticklabels(across, rotation=40, ha="right", rotation_mode="anchor")
        axes.invert_yaxis()
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    return out[0]

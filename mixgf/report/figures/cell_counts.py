"""Figures of the corpus: cells by type, sentence lengths."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mixgf.report.figures.style import (
    SOFT,
    SPECIES_COLORS,
    SPECIES_HATCHES,
    canvas,
)


def cells_by_type(counts: pd.DataFrame) -> str:
    """Bars of the number of cells by type (rows, largest first) and species (columns), on a log scale."""
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


def sentence_lengths(histogram: dict[str, np.ndarray], max_len: int) -> str:
    """Histogram of sentence lengths by species; `histogram[species][n]` is the number of cells with n tokens."""
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


def _median(counts: np.ndarray) -> int:
    total = counts.sum()
    return int(np.searchsorted(np.cumsum(counts), (total + 1) // 2)) if total else 0

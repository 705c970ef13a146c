"""The figure of `mixgf inspect --plot`: cells by source, sentence lengths, genes by share of cells."""

from __future__ import annotations

from typing import Any

import numpy as np

from mixgf.errors import UserError
from mixgf.report.corpus_text import MAX_SOURCES, percent, shorten
from mixgf.report.figures import style
from mixgf.storage import files

FORMATS = ("png", "svg", "pdf")
TITLE = "mixgf inspect"
"""Title in the metadata of the figure. Only a file with it is replaced."""


def check_plot(plot: str, uri: str) -> str:
    """Format of a figure's file name.

    Raises:
        UserError: The name does not end in .png, .svg or .pdf, lies inside the corpus, or is that of another file.
    """
    kind = plot.rsplit(".", 1)[-1].lower() if "." in plot.rsplit("/", 1)[-1] else ""
    if kind not in FORMATS:
        msg = f"--plot {plot}: must end in .png, .svg or .pdf; for example --plot corpus.png"
        raise UserError(msg)
    if plot.startswith(uri.rstrip("/") + "/"):
        msg = f"--plot {plot}: lies inside the corpus, to which nothing may be added; give a file elsewhere"
        raise UserError(msg)
    if files.exists(plot) and (files.is_folder(plot) or TITLE.encode() not in files.read_bytes(plot)):
        msg = f"--plot {plot}: is there and was not drawn by mixgf; give another name, or move it away"
        raise UserError(msg)
    return kind


# Figure

_REASONS = {
    "few_genes": ("#3B3B3B", "too few genes"),
    "depth": ("#7F7F7F", "depth"),
    "mito": ("#E69F00", "mitochondria"),
    "doublet": ("#CC79A7", "doublets"),
    "duplicate": ("#8C6D31", "duplicates"),
    "cap": ("#A6CEE3", "over the cap"),
}


def draw(found: dict[str, Any], kind: str) -> bytes:
    """The figure as png, svg or pdf: cells by source with dropped cells by reason, sentence lengths, genes by share of cells."""
    sources = _drawn(found["sources"])
    height = max(5.2, 1.7 + 0.27 * len(sources))
    with style.sheet("corpus", 11.0, height, kind=kind, title=TITLE, wspace=0.04, hspace=0.06) as (figure, paths):
        grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1))
        species = list(found["lengths"])
        _draw_sources(figure.add_subplot(grid[:, 0]), sources, species)
        _draw_lengths(figure.add_subplot(grid[0, 1]), found)
        _draw_genes(figure.add_subplot(grid[1, 1]), found)
        cells = found["cells"]
        read = f" of {cells['read']:,} read" if cells["read"] else ""
        figure.suptitle(
            f"{shorten(_name(found['uri']), 60)}: {cells['kept']:,} cells{read}, {found['tokens']:,} tokens",
            x=0.008, ha="left", fontsize=11.5, fontweight="bold",
        )  # fmt: skip
    return paths[0]


def _name(uri: str) -> str:
    """The last two parts of a URI: `demo/corpus` for `runs/demo/corpus`."""
    return "/".join(uri.rstrip("/").split("/")[-2:])


def _drawn(sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sources by species, most cells first. Beyond `MAX_SOURCES` the smallest are summed in one entry."""

    def size(s: dict[str, Any]) -> int:
        return int(s["read"] or s["kept"])

    shown = sorted(sources, key=lambda s: (-size(s), s["source"]))
    if len(shown) > MAX_SOURCES:
        rest = shown[MAX_SOURCES - 1 :]
        dropped = {r: sum(s["dropped"].get(r, 0) for s in rest) for r in _REASONS}
        shown = [
            *shown[: MAX_SOURCES - 1],
            {"source": f"{len(rest):,} smaller ones", "species": None, "kept": sum(s["kept"] for s in rest), "read": sum(map(size, rest)), "dropped": dropped},
        ]  # fmt: skip
    order = {name: i for i, name in enumerate(dict.fromkeys(s["species"] for s in sources))}
    return sorted(shown, key=lambda s: (order.get(s["species"], len(order)), -size(s)))


def _draw_sources(axes: Any, sources: list[dict[str, Any]], species: list[str]) -> None:
    y = np.arange(len(sources))
    most = max((int(s["read"] or s["kept"]) for s in sources), default=1)
    for i, name in enumerate([*species, None]):
        rows = [k for k, s in enumerate(sources) if s["species"] == name]
        if rows:
            axes.barh(
                y[rows], [sources[k]["kept"] for k in rows], height=0.72, linewidth=0, edgecolor="white",
                color=style.SPECIES_COLORS[i % 6] if name else style.FAINT, hatch=style.SPECIES_HATCHES[i % 6] if name else "",
                label=f"kept, {name}" if name else "kept, several species",
            )  # fmt: skip
    left = np.asarray([s["kept"] for s in sources], dtype=float)
    for reason, (color, words) in _REASONS.items():
        counts = np.asarray([s["dropped"].get(reason, 0) for s in sources], dtype=float)
        if counts.any():
            axes.barh(
                y,
                counts,
                left=left,
                height=0.72,
                color=color,
                linewidth=0,
                label=f"dropped: {words} ({counts.sum():,.0f})",
            )
            left += counts
    for k, s in enumerate(sources):
        lost = sum(s["dropped"].values())
        label = f"{s['kept']:,}" + (f"  −{lost:,}" if lost else "")
        axes.text(max(left[k], s["kept"]) + 0.012 * most, k, label, va="center", fontsize=7, color=style.SOFT)
    axes.set(
        title="Cells by source", xlabel="cells read", yticks=y, yticklabels=[shorten(s["source"], 30) for s in sources],
        ylim=(len(sources) - 0.4, -0.6), xlim=(0, most * 1.2),
    )  # fmt: skip
    axes.tick_params(axis="y", length=0, labelsize=8)
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
    axes.locator_params(axis="x", nbins=5)
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.35, -0.5 / max(2.0, 0.27 * len(sources))),
        ncols=2,
        fontsize=8,
        handlelength=1.6,
    )


def _draw_lengths(axes: Any, found: dict[str, Any]) -> None:
    for i, (name, part) in enumerate(found["lengths"].items()):
        if part["cells"]:
            axes.stairs(
                np.asarray(part["histogram"])[:-1] / part["cells"], part["edges"][:-1], color=style.SPECIES_COLORS[i % 6], linewidth=1.6,
                linestyle=("-", "--", ":", "-.")[i % 4], label=f"{name}: median {part['quantiles']['50%']:,}, {percent(part['at_max_len'])} at the limit",
            )  # fmt: skip
    axes.axvline(found["max_len"], color=style.SOFT, linewidth=0.8, linestyle=":")
    axes.set(
        title=f"Length of sentences below the limit of {found['max_len']:,}", xlabel="tokens", ylabel="share of cells",
        xlim=(0, found["max_len"] * 1.03), ylim=(0, 1.45 * axes.get_ylim()[1]),
    )  # fmt: skip
    axes.yaxis.set_major_formatter(lambda v, _: f"{100 * v:g} %")
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
    axes.legend(loc="upper left", fontsize=8)


def _draw_genes(axes: Any, found: dict[str, Any]) -> None:
    """Number of genes that are in at least a share of the species' cells, by that share."""
    for i, (name, part) in enumerate(found["vocabulary"]["species"].items()):
        total = found["lengths"][name]["cells"]
        curve = np.asarray(part["by_cells"], dtype=float)
        if total and len(curve):
            genes = np.linspace(1, part["genes"], len(curve))
            shown = curve > 0
            axes.plot(
                100 * curve[shown] / total, genes[shown], color=style.SPECIES_COLORS[i % 6], linewidth=1.7,
                linestyle=("-", "--", ":", "-.")[i % 4], label=f"{name}: {part['seen']:,} of {part['genes']:,} genes seen",
            )  # fmt: skip
    axes.set(
        title="Genes of the vocabulary in the sentences", xscale="log", xlabel="seen in at least this share of the species' cells (log scale)",
        ylabel="genes", ylim=(0, 1.25 * axes.get_ylim()[1]),
    )  # fmt: skip
    axes.set_xlim(None, 100)
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:g} %")
    axes.yaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
    axes.legend(loc="upper right", fontsize=8)


def save(found: dict[str, Any], plot: str) -> None:
    """Draw the figure and write it in the format of the file name (png, svg or pdf)."""
    files.write_bytes(plot, draw(found, check_plot(plot, found["uri"])))

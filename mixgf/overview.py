"""An inspected corpus for people: text for a terminal, and one picture. Both show what `mixgf.inspection.inspect` found."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mixgf import figures, storage
from mixgf.config import UserError

MAX_SOURCES = 40
"""Most sources that are listed one by one; the text says how many more there are."""
MAX_TYPES = 20
"""Most cell types listed per species."""
TEXT_BINS = 12
BAR = 24
"""Characters of the longest bar."""
FORMATS = ("png", "svg", "pdf")


def check_plot(plot: str, uri: str) -> str:
    """The format of a picture's file name; a `UserError` for another one, or for a place inside the corpus."""
    kind = plot.rsplit(".", 1)[-1].lower() if "." in plot.rsplit("/", 1)[-1] else ""
    if kind not in FORMATS:
        msg = f"--plot {plot}: must end in .png, .svg or .pdf, which says what to draw; for example --plot corpus.png"
        raise UserError(msg)
    if plot.startswith(uri.rstrip("/") + "/"):
        msg = f"--plot {plot}: lies inside the corpus, which stays as it was made; name a file elsewhere"
        raise UserError(msg)
    return kind


# Text


def _percent(share: float | None) -> str:
    """Never 100 % of what is less, nor 0 % of what is more."""
    if share is None:
        return "–"
    if 0 < share < 0.0005:
        return "<0.1 %"
    return f"{min(share, 0.999) if share < 1 else share:.1%}".replace("%", " %")


def _bytes(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:,.0f} B" if unit == "B" else f"{number:,.1f} {unit}"
        number /= 1000
    return f"{number:,.1f} TB"


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _short(text: str, width: int) -> str:
    """Cut in the middle: names of files differ at either end."""
    half = width // 2
    return text if len(text) <= width else f"{text[:half]}…{text[half + 1 - width :]}"


def _why(dropped: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in dropped.items() if n)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Columns as wide as their content, numbers to the right."""
    rows = [list(row) for row in rows]
    widths = [max(len(r[i]) for r in [list(head), *rows]) for i in range(len(head))]
    return [
        "  " + "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))).rstrip()
        for r in [list(head), *rows]
    ]  # fmt: skip


def text(found: dict[str, Any]) -> str:
    """What `inspect` found, for a terminal of 100 or more columns."""
    cells, words = found["cells"], found["vocabulary"]
    read = cells["read"]
    of = f" of {read:,} read ({_percent(cells['kept'] / read)})" if read else ""
    per_token = f"{_number(found['bytes_per_token'], 2)} bytes per token, {_number(found['bytes_per_cell'])} per cell"
    lines = [
        f"corpus {found['uri']}",
        f"  made {found['created'][:16].replace('T', ' ')} UTC by mixgf {found['code']}",
        f"  {cells['kept']:,} cells kept{of}; dropped: {_why(cells['dropped']) or 'none'}",
        f"  {found['tokens']:,} tokens in {found['shards']:,} shards, {_bytes(found['bytes'])}: {per_token}",
        "",
        *_source_lines(found["sources"]),
    ]
    lines += [f"  refused  {r.get('name', '')}: {r['error']}" for r in found["refused"]]
    lines += ["", *_type_lines(found), "", *_length_lines(found), "", *_vocabulary_lines(words, found["lengths"])]
    lines += ["", *_column_lines(found["columns"])]
    return "\n".join(lines)


def _source_lines(sources: list[dict[str, Any]]) -> list[str]:
    head = (
        "sources",
        "species",
        "read",
        "kept",
        "counts on known genes",
        "genes/cell",
        "counts/cell",
        "mito",
        "dropped",
    )
    rows = [
        (
            _short(s["source"], 34), s["species"] or "–", _number(s["read"]), _number(s["kept"]), _percent(s["counts_known"]),
            _number(s["mean_genes"]), _number(s["mean_counts"]), _percent(s["mean_mito_fraction"]), _why(s["dropped"]) or "–",
        )
        for s in sources[:MAX_SOURCES]
    ]  # fmt: skip
    lines = _table(head, rows, left=(0, 1, 8))
    lines[0] = f"sources{lines[0][len('  sources') :]}  "
    if len(sources) > MAX_SOURCES:
        rest = sources[MAX_SOURCES:]
        lines.append(
            f"  … {len(rest):,} more sources with {sum(s['kept'] for s in rest):,} kept cells (--json has all)"
        )
    return lines + [
        f"  doubt    {s['source']}: {_percent(1 - s['counts_known'])} of the counts on unknown names; {s['cause']}"
        for s in sources
        if s["cause"]
    ]


def _type_lines(found: dict[str, Any]) -> list[str]:
    if found["cell_types"] is None:
        return ["cell types: the corpus has no column cell_type"]
    lines = []
    for species, types in found["cell_types"].items():
        most = max(types.values(), default=1)
        missing = found["unlabelled"][species]
        without = f", {missing:,} cells without one" if missing else ""
        lines.append(f"cell types, {species}: {len(types):,}{without}")
        shown = list(types.items())[:MAX_TYPES]
        lines += _table(
            ("", "", ""),
            [(_short(k, 40), f"{n:,}", "#" * max(1, round(BAR * n / most))) for k, n in shown],
            left=(0, 2),
        )[1:]
        if rest := list(types.values())[MAX_TYPES:]:
            lines.append(f"  … {len(rest):,} more types with {sum(rest):,} cells (--json has all)")
    return lines


def _length_lines(found: dict[str, Any]) -> list[str]:
    lengths = {name: part for name, part in found["lengths"].items() if part["cells"]}
    if not lengths:
        return []
    quantiles = list(next(iter(lengths.values()))["quantiles"])
    lines = [f"sentence lengths in tokens (limit: {found['max_len']:,})"]
    words = {"0%": "shortest", "50%": "median", "100%": "longest"}
    head = ("", *(words.get(q, q.replace("%", " %")) for q in quantiles), "mean", "at the limit")
    rows = [
        (n, *(_number(v) for v in p["quantiles"].values()), _number(p["mean"]), _percent(p["at_max_len"])) for n, p in lengths.items()
    ]  # fmt: skip
    lines += _table(head, rows)
    edges = next(iter(lengths.values()))["edges"]  # one and the same for all species
    last = len(edges) - 2  # the bin of cells at the limit stands alone
    coarse = [*range(0, last, -(-last // TEXT_BINS)), last]
    bins = {n: np.add.reduceat(np.asarray(p["histogram"]), coarse) / p["cells"] for n, p in lengths.items()}
    most = max(float(b.max()) for b in bins.values())
    ends = [*(edges[i] for i in coarse[1:]), edges[-1]]
    lines += _table(
        ("tokens", *(f"share of {n} cells" for n in bins)),
        [
            (f"{edges[i]:,}–{end - 1:,}" if end - 1 > edges[i] else f"{edges[i]:,}", *(f"{_percent(float(b[k])):>7} {'#' * round(BAR * b[k] / most)}" for b in bins.values()))
            for k, (i, end) in enumerate(zip(coarse, ends, strict=True))
        ],
        left=range(len(bins) + 1),
    )  # fmt: skip
    return lines


def _vocabulary_lines(words: dict[str, Any], lengths: dict[str, Any]) -> list[str]:
    shared = f", {words['shared_tokens']:,} shared by orthologs" if words["sharing"] == "ortholog" else ""
    lines = [
        f"vocabulary {words['hash'][:12]}: {words['size']:,} tokens ({words['sharing']} ids{shared}); genes by share of the species' sentences that hold them"
    ]
    shares = list(next(iter(words["species"].values()))["seen_in"]) if words["species"] else []
    head = ("", "genes", f"of {', '.join(words['biotypes'])} genes", "in any", *(f"≥{s.replace('%', ' %')}" for s in shares), "in none", "median cells")  # fmt: skip
    rows = []
    for name, part in words["species"].items():
        table = part["of_table"]
        known = "–" if table is None else f"{_percent(table['share'])} of {table['genes']:,}"
        seen = [_number(n) for n in part["seen_in"].values()]
        rows.append((f"{name} ({lengths[name]['cells']:,} cells)", _number(part["genes"]), known, _number(part["seen"]), *seen, _number(part["never"]), _number(part["median_cells"])))  # fmt: skip
    return lines + _table(head, rows)


def _column_lines(columns: dict[str, float]) -> list[str]:
    ours = {"tokens", "cell", "species", "source", "source_row", "length", "n_counts", "n_genes", "mito_fraction"}
    full = [name for name, share in columns.items() if name not in ours and share == 1]
    part = [f"{name} {_percent(share)}" for name, share in columns.items() if name not in ours and share < 1]
    lines = [*_wrapped("columns of every cell: ", full), *_wrapped("columns of some cells: ", part)]
    return lines or ["no columns but mixgf's own"]


def _wrapped(head: str, items: list[str]) -> list[str]:
    whole = head + ", ".join(item.replace(" %", "\0%") for item in items)  # a number keeps its sign
    lines = textwrap.wrap(whole, 110, subsequent_indent="  ", break_on_hyphens=False) if items else []
    return [line.replace("\0", " ") for line in lines]


# Picture

_REASONS = {
    "few_genes": ("#3B3B3B", "too few genes"),
    "depth": ("#7F7F7F", "depth"),
    "mito": ("#E69F00", "mitochondria"),
    "doublet": ("#CC79A7", "doublets"),
    "duplicate": ("#8C6D31", "duplicates"),
    "cap": ("#A6CEE3", "over the cap"),
}


def draw(found: dict[str, Any], kind: str) -> bytes:
    """One picture (png, svg or pdf): cells by source with reasons of dropping, lengths, and how many cells show a gene."""
    sources = _drawn(found["sources"])
    height = max(5.2, 1.7 + 0.27 * len(sources))
    with figures.sheet("corpus", 11.0, height, kind=kind, wspace=0.04, hspace=0.06) as (figure, files):
        grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1))
        species = list(found["lengths"])
        _draw_sources(figure.add_subplot(grid[:, 0]), sources, species)
        _draw_lengths(figure.add_subplot(grid[0, 1]), found)
        _draw_genes(figure.add_subplot(grid[1, 1]), found)
        cells = found["cells"]
        read = f" of {cells['read']:,} read" if cells["read"] else ""
        figure.suptitle(
            f"{_short(_name(found['uri']), 60)}: {cells['kept']:,} cells{read}, {found['tokens']:,} tokens",
            x=0.008, ha="left", fontsize=11.5, fontweight="bold",
        )  # fmt: skip
    return files[0]


def _name(uri: str) -> str:
    """The last two parts of a URI: `runs/demo/corpus` is `demo/corpus`."""
    return "/".join(uri.rstrip("/").split("/")[-2:])


def _drawn(sources: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sources by species, most cells first, the smallest beyond `MAX_SOURCES` as one."""

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
                color=figures.SPECIES_COLORS[i % 6] if name else figures.FAINT, hatch=figures.SPECIES_HATCHES[i % 6] if name else "",
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
        axes.text(max(left[k], s["kept"]) + 0.012 * most, k, label, va="center", fontsize=7, color=figures.SOFT)
    axes.set(
        title="Cells by source", xlabel="cells read", yticks=y, yticklabels=[_short(s["source"], 30) for s in sources],
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
                np.asarray(part["histogram"])[:-1] / part["cells"], part["edges"][:-1], color=figures.SPECIES_COLORS[i % 6], linewidth=1.6,
                linestyle=("-", "--", ":", "-.")[i % 4], label=f"{name}: median {part['quantiles']['50%']:,}, {_percent(part['at_max_len'])} at the limit",
            )  # fmt: skip
    axes.axvline(found["max_len"], color=figures.SOFT, linewidth=0.8, linestyle=":")
    axes.set(
        title=f"Length of sentences below the limit of {found['max_len']:,}", xlabel="tokens", ylabel="share of cells",
        xlim=(0, found["max_len"] * 1.03), ylim=(0, 1.45 * axes.get_ylim()[1]),
    )  # fmt: skip
    axes.yaxis.set_major_formatter(lambda v, _: f"{100 * v:g} %")
    axes.xaxis.set_major_formatter(lambda v, _: f"{v:,.0f}")
    axes.legend(loc="upper left", fontsize=8)


def _draw_genes(axes: Any, found: dict[str, Any]) -> None:
    """Number of genes that at least so large a share of the species' cells show."""
    for i, (name, part) in enumerate(found["vocabulary"]["species"].items()):
        total = found["lengths"][name]["cells"]
        curve = np.asarray(part["by_cells"], dtype=float)
        if total and len(curve):
            genes = np.linspace(1, part["genes"], len(curve))
            shown = curve > 0
            axes.plot(
                100 * curve[shown] / total, genes[shown], color=figures.SPECIES_COLORS[i % 6], linewidth=1.7,
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
    """Draw the picture and write it; the file name's ending chooses png, svg or pdf."""
    storage.write_bytes(plot, draw(found, check_plot(plot, found["uri"])))

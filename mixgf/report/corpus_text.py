"""What `mixgf inspect` prints: sources, cell types, sentence lengths and vocabulary of a corpus."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

MAX_SOURCES = 40
"""Most sources that are listed. The text gives the number of the others."""
MAX_TYPES = 20
"""Most cell types listed per species."""
TEXT_BINS = 12
"""Most bins of the histogram of sentence lengths."""
BAR = 24
"""Length of the longest bar, in characters."""


def percent(share: float | None) -> str:
    """A share in per cent. A share below 1 is at most 99.9 %, and a share above 0 is never 0.0 %."""
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


def shorten(text: str, width: int) -> str:
    """Cut a text to `width` characters by leaving out its middle, since file names differ at the ends."""
    half = width // 2
    return text if len(text) <= width else f"{text[:half]}…{text[half + 1 - width :]}"


def _why(dropped: dict[str, int]) -> str:
    return ", ".join(f"{n:,} {reason}" for reason, n in dropped.items() if n)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    """Lines of a table whose columns are as wide as their content; columns in `left` are aligned to the left."""
    rows = [list(row) for row in rows]
    widths = [max(len(r[i]) for r in [list(head), *rows]) for i in range(len(head))]
    return [
        "  " + "  ".join(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True))).rstrip()
        for r in [list(head), *rows]
    ]  # fmt: skip


def text(found: dict[str, Any]) -> str:
    """The result of `mixgf.corpus.summary.inspect` as text for a terminal of at least 100 columns."""
    cells, words = found["cells"], found["vocabulary"]
    read = cells["read"]
    of = f" of {read:,} read ({percent(cells['kept'] / read)})" if read else ""
    per_token = f"{_number(found['bytes_per_token'], 2)} bytes per token, {_number(found['bytes_per_cell'])} per cell"
    lines = [
        f"corpus {found['uri']}",
        f"  made {found['created'][:16].replace('T', ' ')} UTC by mixgf {found['code']}",
        f"  {cells['kept']:,} cells kept{of}; dropped: {_why(cells['dropped']) or 'none'}",
        f"  {found['tokens']:,} tokens in {found['shards']:,} shards, {_bytes(found['bytes'])}: {per_token}",
        "",
        *_source_lines(found["sources"]),
    ]
    if found["doublets"]:
        scored, called, kept = (sum(s[k] for s in found["doublets"].values()) for k in ("scored", "doublets", "kept"))
        lines.append(f"  doublets {called:,} called by Scrublet among {scored:,} cells; {kept:,} are kept and flagged")
    lines += [
        f"  same cells  {pair['cells']:,} of {pair['source']} equal cells of {pair['same_source']} but for a gene filter; {pair['kept']:,} are kept"
        for pair in found["near_duplicates"]
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
            shorten(s["source"], 34), s["species"] or "–", _number(s["read"]), _number(s["kept"]), percent(s["counts_known"]),
            _number(s["mean_genes"]), _number(s["mean_counts"]), percent(s["mean_mito_fraction"]), _why(s["dropped"]) or "–",
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
        f"  doubt    {s['source']}: {percent(1 - s['counts_known'])} of the counts on unknown names; {s['cause']}"
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
            [(shorten(k, 40), f"{n:,}", "#" * max(1, round(BAR * n / most))) for k, n in shown],
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
        (n, *(_number(v) for v in p["quantiles"].values()), _number(p["mean"]), percent(p["at_max_len"])) for n, p in lengths.items()
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
            (f"{edges[i]:,}–{end - 1:,}" if end - 1 > edges[i] else f"{edges[i]:,}", *(f"{percent(float(b[k])):>7} {'#' * round(BAR * b[k] / most)}" for b in bins.values()))
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
        known = "–" if table is None else f"{percent(table['share'])} of {table['genes']:,}"
        seen = [_number(n) for n in part["seen_in"].values()]
        rows.append((f"{name} ({lengths[name]['cells']:,} cells)", _number(part["genes"]), known, _number(part["seen"]), *seen, _number(part["never"]), _number(part["median_cells"])))  # fmt: skip
    return lines + _table(head, rows)


def _column_lines(columns: dict[str, float]) -> list[str]:
    ours = {"tokens", "cell", "species", "source", "source_row", "length", "n_counts", "n_genes", "mito_fraction"}
    full = [name for name, share in columns.items() if name not in ours and share == 1]
    part = [f"{name} {percent(share)}" for name, share in columns.items() if name not in ours and share < 1]
    lines = [*_wrapped("columns of every cell: ", full), *_wrapped("columns of some cells: ", part)]
    return lines or ["no columns but mixgf's own"]


def _wrapped(head: str, items: list[str]) -> list[str]:
    whole = head + ", ".join(item.replace(" %", "\0%") for item in items)  # no line break before a per cent sign
    lines = textwrap.wrap(whole, 110, subsequent_indent="  ", break_on_hyphens=False) if items else []
    return [line.replace("\0", " ") for line in lines]

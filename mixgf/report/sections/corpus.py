"""Corpus: cells by source, species and type, dropped cells, sentence lengths, genes that were matched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mixgf.report import wording
from mixgf.report.elements import Cell, Figure, Section, Table, Text, count_cell, not_run
from mixgf.report.figures import cell_counts
from mixgf.report.results import RunResults

TITLE = "Corpus: cells and genes"
REASONS = {
    "few_genes": "too few genes", "depth": "depth out of range", "mito": "mitochondrial share out of range", "doublet": "doublets",
    "duplicate": "duplicates of other cells", "cap": "over the cap per sample",
}  # fmt: skip


def reason(name: str) -> str:
    """Reason for dropping cells, for readers."""
    return REASONS.get(name, name.replace("_", " "))


def section(results: RunResults) -> Section:
    """Cells by source, species and type; dropped cells by reason; sentence lengths; matched genes."""
    record, cells = results.records.get("corpus"), results.tables.get("cells")
    if record is None or cells is None:
        return not_run("corpus", TITLE, "prepare", results)
    kept, read = int(cells["cells"].sum()), int(record.counts.get("read", 0))
    reasons = {k: int(v) for k, v in record.counts.get("dropped", {}).items() if v}
    lost = ", ".join(f"{n:,} {reason(r)}" for r, n in reasons.items())
    blocks: list[Any] = [
        Text(
            f"{kept:,} of {wording.plural(read, 'cell')} were kept; "
            + (f"dropped: {lost}." if lost else "none was dropped.")
        )
    ]
    if (found := results.tables.get("doublets")) is not None and len(found):
        blocks.append(Text(_doublets(found)))
    if (found := results.tables.get("near_duplicates")) is not None and len(found):
        blocks.append(Text(*_near_duplicates(found)))
    blocks += [
        Text(f"{entry['name']} was refused: {entry['error']}", "refused") for entry in record.details.get("refused", [])
    ]
    blocks.append(_sources(cells, results.tables.get("dropped"), list(reasons)))
    named = cells[cells["type"] != ""]
    if len(named):
        counts = named.pivot_table(index="type", columns="species", values="cells", aggfunc="sum", fill_value=0)
        hidden = max(0, len(counts) - 40)
        blocks.append(
            Figure(
                cell_counts.cells_by_type(counts),
                f"Cells by type (column `{results.config.classify.label}`) and species, after "
                f"quality control.{f' The {hidden} rarest types are left out.' if hidden else ''}",
            )
        )
    if results.lengths:
        longest = int(record.details.get("max_len", results.config.tokens.max_len))
        full = sum(int(h[longest:].sum()) for h in results.lengths.values()) / max(
            1, sum(int(h.sum()) for h in results.lengths.values())
        )
        words = f"{full:.1%} of the cells have {longest:,} genes or more; their sentences are cut at {longest:,}."
        if full > 0.99:
            blocks.append(Text(f"Sentence lengths: {words}"))
        else:
            what = "Sentence lengths: the number of genes of a cell that the model reads, from the highest rank down."
            blocks.append(Figure(cell_counts.sentence_lengths(results.lengths, longest), f"{what} {words}"))
    if len(mapping := results.tables.get("mapping", pd.DataFrame())):
        shown = [
            c
            for c in mapping.columns
            if c not in ("species", "cells_read", "cells_kept") and not (mapping[c].astype(str) == "").all()
        ]
        blocks.append(
            _plain(
                mapping[shown],
                "Genes of each source, matched to Ensembl identifiers. Renamed: found by a previous symbol "
                "or an alias. Summed: added to another column of the same gene. Counts of unmapped genes are lost.",
            )
        )
    return Section("corpus", TITLE, blocks)


def _doublets(found: pd.DataFrame) -> str:
    """Where Scrublet looked, and what it called."""
    scored, called, kept = (int(found[name].sum()) for name in ("scored", "doublets", "kept"))
    seen = int((found["scored"] > 0).sum())
    words = (
        f"Scrublet looked at {wording.plural(scored, 'cell')} of {wording.plural(seen, 'sample')} and called {called:,} of them doublets"
        + (f" ({called / scored:.1%})" if scored else "")
    )
    words += f"; {kept:,} of these are kept, and flagged in the column predicted_doublet." if kept else "."
    small = len(found) - seen
    return words + (f" {wording.plural(small, 'sample')} had too few cells." if small else "")


def _near_duplicates(found: pd.DataFrame) -> tuple[str, str]:
    """Sentence on the cells that two sources share, and its tone."""
    pairs = found.groupby(["source", "same_source"], sort=False)["kept"].agg(["size", "sum"])
    parts = [f"{row['size']:,} of {of} equal cells of {same}" for (of, same), row in pairs.iterrows()]
    kept = int(found["kept"].sum())
    end = f"{kept:,} of them are kept; qc.near_duplicates=drop drops them" if kept else "they are dropped"
    return (
        f"The same cells but for a gene filter: {'; '.join(parts)}. {end[:1].upper()}{end[1:]}.",
        "warn" if kept else "plain",
    )


def _sources(cells: pd.DataFrame, dropped: pd.DataFrame | None, reasons: list[str]) -> Table:
    """By source: cells kept, cells dropped by reason, cell types, donors."""
    lost = pd.DataFrame()
    if dropped is not None and len(dropped):
        lost = dropped.pivot_table(index="source", columns="reason", values="cells", aggfunc="sum", fill_value=0)
    reasons = [r for r in reasons if r in lost.columns]
    rows = []
    for (species, source), part in cells.groupby(["species", "source"], sort=True):
        donors = part.loc[part["donor"] != "", "donor"].nunique()
        rows.append([Cell(str(source)), Cell(str(species)), count_cell(part["cells"].sum()),
                     *[count_cell(lost.loc[source, r] if source in lost.index else 0) for r in reasons],
                     count_cell(part.loc[part["type"] != "", "type"].nunique()), count_cell(donors) if donors else Cell("–", 0)])  # fmt: skip
    head = ["Source", "Species", "Cells kept", *[f"Dropped: {reason(r)}" for r in reasons], "Cell types", "Donors"]
    return Table("Cells by source.", head, rows)


def _plain(frame: pd.DataFrame, caption: str) -> Table:
    """A data frame as a table, with shares in per cent."""
    rows = []
    for record in frame.to_dict("records"):
        row = []
        for name, value in record.items():
            if isinstance(value, (bool, str)) or value is None:
                row.append(Cell("" if value is None else str(value)))
            elif isinstance(value, (list, tuple, np.ndarray)):
                row.append(Cell(", ".join(str(v) for v in list(value)[:5])))
            elif any(word in str(name) for word in ("share", "fraction", "lost")):
                row.append(Cell("–" if not np.isfinite(value) else f"{value:.2%}", float(value)))
            else:
                row.append(count_cell(float(value)))
        rows.append(row)
    return Table(caption, [wording.title_case(str(c)) for c in frame.columns], rows)

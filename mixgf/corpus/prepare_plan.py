"""What `prepare` decides between its passes: which cells are kept, and the tables of the finished corpus.

The process that runs the stage holds these facts of all cells: 17 bytes per cell, and 4 more where sources have samples.
`jobs/bench.py scale` measures it for 50 million cells.

Letters: N cells of one source.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mixgf.arrays import Bools, Ints
from mixgf.cells import qc
from mixgf.cells.doublets import MIN_SCRUBLET, plan_calls
from mixgf.config.data import QC, Source
from mixgf.corpus import near_hashes
from mixgf.corpus.prepare_passes import RowRange, group_ranges, read_group
from mixgf.corpus.shards import part_uri
from mixgf.genes import medians
from mixgf.genes.identify import MappingReport
from mixgf.storage import files
from mixgf.storage.tables import read_table

_MEDIANS = 0x4D454449
"""Draw of the sample for medians."""
_DOUBLETS = pa.schema([
    ("source", pa.string()), ("sample", pa.string()), ("cells", pa.int64()), ("scored", pa.int64()), ("doublets", pa.int64()),
    ("kept", pa.int64()),
])  # fmt: skip


_COPIES = pa.schema([
    ("source", pa.string()), ("row", pa.int64()), ("same_source", pa.string()), ("same_row", pa.int64()), ("kept", pa.bool_()),
])  # fmt: skip


@dataclass(slots=True)
class Doublets:
    """Where Scrublet looked in one source, and what it called."""

    samples: list[tuple[str, int]]
    """Name of each sample ("" = the whole source) and its cells that passed the filters."""
    calls: list[list[np.ndarray]]
    """Rows of every call of Scrublet, in groups that are read together. Emptied when the verdicts are known."""
    parts: list[tuple[str, int, int]]
    """Name of every group's part file, its first row, and the row after its last."""
    called_K: np.ndarray
    """int64: rows of the cells called doublets."""


@dataclass(slots=True)
class SourceCells:
    """What is known of the N cells of one source."""

    identity: str
    """Of the counts of all cells (`qc.Metrics.identity`)."""
    reason_N: np.ndarray
    """int8: codes of `qc.REASONS`."""
    hashes_N: qc.Hashes | None
    """None where duplicates are not looked for."""
    samples_N: qc.Samples | None
    """None if the source has no samples, or nothing needs them."""
    doublets: Doublets | None = None
    """None where they are not looked for."""
    copies: near_hashes.Copies | None = None
    """Cells that an earlier cell equals but for a gene filter; None where they are not looked for."""
    doubt: str = ""
    """What is to be said about the counts of all cells (`qc.doubt_counts`)."""

    @property
    def counts(self) -> dict[str, int]:
        """Number of cells by reason."""
        return qc.count_reasons(self.reason_N)


def by_source(units: Iterable[RowRange]) -> dict[int, list[RowRange]]:
    """Row ranges of every source, in order."""
    found: dict[int, list[RowRange]] = {}
    for unit in units:
        found.setdefault(unit.index, []).append(unit)
    return dict(sorted(found.items()))


def filter_cells(
    work: str, units: Sequence[RowRange], rules: QC, *, sources: Sequence[Source], seed: int, held: qc.Hashes | None,
    find_doublets: Callable[[Mapping[int, SourceCells]], None],
    find_copies: Callable[[Mapping[int, Bools]], dict[int, near_hashes.Copies]], candidate_counts: Mapping[int, int],
) -> dict[int, SourceCells]:  # fmt: skip
    """Cells of every source with the reason why they are dropped, or `qc.KEPT`.

    Args:
        work: URI of the work folder, with the parts of the metrics.
        units: row ranges of the sources that are used.
        rules: thresholds.
        sources: all sources, by number.
        seed: of caps.
        held: hashes of cells that are in the corpus already.
        find_doublets: runs the calls of `SourceCells.doublets` and notes the verdicts with `note_doublets`.
        find_copies: looks for cells that an earlier cell equals but for a gene filter, among the given ones (bool (rows,)).
        candidate_counts: of each source, the counts of all its cells on genes that may enter the vocabulary.
    """
    groups = enumerate(group_ranges(units))
    cells: dict[int, SourceCells] = {}
    for found in files.map_reads(work, lambda group: _read_group(work, *group, rules, candidate_counts), groups):
        cells |= found
    if rules.doublets != "off":
        for i, c in cells.items():
            c.doublets = _plan_doublets(i, c)
        find_doublets(cells)
    if rules.doublets == "drop":
        for c in cells.values():
            assert c.doublets is not None
            c.reason_N[c.doublets.called_K] = qc.DOUBLET
    if rules.drop_duplicates:
        old = [held] if held is not None else []
        kept = [np.zeros(len(h.a), dtype=np.int8) for h in old]
        qc.mark_duplicates(
            [*old, *(c.hashes_N for c in cells.values() if c.hashes_N is not None)],
            [*kept, *(c.reason_N for c in cells.values())],
        )
    if rules.near_duplicates != "off":
        kept_N = {i: c.reason_N == qc.KEPT for i, c in cells.items()}
        near_hashes.write_kept(work, list(kept_N.values()))
        for i, copies in find_copies(kept_N).items():
            cells[i].copies = copies
            if rules.near_duplicates == "drop":
                cells[i].reason_N[copies.row_R] = qc.DUPLICATE
    if rules.max_cells_per_sample:
        for i, c in cells.items():
            qc.cap_per_sample(c.reason_N, c.samples_N, rules.max_cells_per_sample, sources[i].name, seed)
    return cells


def _read_group(
    work: str, group: int, sources: Sequence[Sequence[RowRange]], rules: QC, candidate_counts: Mapping[int, int]
) -> dict[int, SourceCells]:  # fmt: skip
    """Cells of the sources of a group, after the rules that concern one source."""
    return {
        mine[0].index: SourceCells(
            identity=metrics.identity,
            reason_N=qc.filter_cells(metrics, rules),
            hashes_N=metrics.hashes if rules.drop_duplicates else None,
            doubt=qc.doubt_counts(metrics, candidate_counts[mine[0].index]),
            samples_N=samples if rules.doublets != "off" or rules.max_cells_per_sample else None,
        )
        for mine, (metrics, samples) in zip(sources, read_group(work, group, sources), strict=True)
    }


def _plan_doublets(index: int, cells: SourceCells) -> Doublets:
    rows = np.flatnonzero(cells.reason_N == qc.KEPT)
    samples = [("", rows)] if cells.samples_N is None else cells.samples_N.split(rows)
    groups = plan_calls([mine for _, mine in samples])
    return Doublets(
        samples=[(name, len(mine)) for name, mine in samples],
        calls=[[mine.astype(np.int32) for mine in group] for group in groups],
        parts=[
            (f"{index:05d}-{k:05d}", min(int(mine[0]) for mine in group), max(int(mine[-1]) for mine in group) + 1)
            for k, group in enumerate(groups)
        ],
        called_K=np.zeros(0, dtype=np.int64),
    )  # fmt: skip


def note_doublets(work: str, cells: Mapping[int, SourceCells]) -> None:
    """Read the verdicts from the parts of `prepare_passes.find_doublets`."""
    looked = [c.doublets for c in cells.values() if c.doublets is not None]
    names = [name for one in looked for name, _, _ in one.parts]
    called = files.map_reads(work, lambda name: _called(work, name), names)
    for one in looked:
        found = [next(called) for _ in one.parts]
        one.called_K = np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *found]))
        one.calls.clear()


def _called(work: str, name: str) -> np.ndarray:
    table = read_table(part_uri(work, "doublets", name))
    return table["row"].filter(table["doublet"]).to_numpy()


def doublet_parts(unit: RowRange, cells: SourceCells) -> tuple[str, ...] | None:
    """Names of the parts of doublets that have some of the rows; None where doublets are not looked for."""
    if cells.doublets is None:
        return None
    return tuple(name for name, start, stop in cells.doublets.parts if start < unit.stop and unit.start < stop)


def sample_cells(
    units: Sequence[RowRange], keeps: Mapping[int, np.ndarray], most: int, seed: int
) -> dict[int, np.ndarray]:  # fmt: skip
    """A random sample of about `most` of the kept cells, as bool (rows,) by number of the row range.

    Whether a cell is drawn depends on the seed, the name of its source, its row and the share that is drawn.
    """
    share = most / sum(int(keeps[u.number].sum()) for u in units)
    out: dict[int, np.ndarray] = {}
    for mine in by_source(units).values():
        digest = hashlib.blake2b(mine[0].source.name.encode(), digest_size=8).digest()
        draw = np.random.default_rng([seed, _MEDIANS, int.from_bytes(digest, "little")]).random(
            max(u.stop for u in mine)
        )
        out |= {u.number: keeps[u.number] & (draw[u.start : u.stop] < share) for u in mine}
    return out


def describe_sample(sketch: medians.Sketch, genes: Sequence[str], sampled: int, kept: int) -> dict[str, Any]:
    """Facts of medians that come from a sample, as the record of the vocabulary has them.

    `standard_errors` are shares of the median: not exceeded by half and by 95 % of the genes with enough values; none if there is no
    such gene.

    Args:
        sketch: of the sample; the gene after the last one is that of `SketchPlan.sampled`.
        genes: all genes that get a median.
        sampled: number of its cells.
        kept: number of kept cells of the species.
    """
    errors = medians.standard_errors(sketch)
    errors.pop(len(genes), None)
    found = np.array(list(errors.values())) * np.sqrt(1 - sampled / kept)
    return {
        "cells": sampled, "of": kept, "genes": len(genes), "genes_with_error": len(errors),
        "genes_without_cells": len(genes) + 1 - len(medians.median_by_gene(sketch)),
        "standard_errors": np.quantile(found, [0.5, 0.95]).tolist() if len(found) else [],
    }  # fmt: skip


def count_cells(cells: Mapping[int, SourceCells]) -> dict[str, int]:
    """Number of cells of all sources by reason."""
    total = dict.fromkeys(qc.REASONS, 0)
    for one in cells.values():
        for name, number in one.counts.items():
            total[name] += number
    return total


def describe_dropped(counts: Mapping[str, int]) -> str:
    """Numbers of dropped cells by reason, for messages; empty if none is dropped."""
    return ", ".join(f"{n:,} {name}" for name, n in counts.items() if n and name != "kept")


def mapping_table(
    sources: Sequence[Source], cells: Mapping[int, SourceCells], reports: Mapping[int, MappingReport]
) -> pa.Table:
    """One row per source: cells read and kept, and how its columns map to genes."""
    return pa.Table.from_pylist([
        {"source": sources[i].name, "species": sources[i].species, "cells_read": len(c.reason_N),
         "cells_kept": c.counts["kept"]} | asdict(reports[i])
        for i, c in cells.items()
    ])  # fmt: skip


def dropped_table(sources: Sequence[Source], cells: Mapping[int, SourceCells]) -> pa.Table:
    """One row per source and reason: number of dropped cells."""
    rows = [
        {"source": sources[i].name, "reason": name, "cells": number}
        for i, c in cells.items()
        for name, number in c.counts.items()
        if name != "kept"
    ]
    return pa.Table.from_pylist(rows)


def doublets_table(sources: Sequence[Source], cells: Mapping[int, SourceCells]) -> pa.Table:
    """One row per sample: cells that passed the filters, those that Scrublet saw, called doublets, and those among kept cells."""
    rows: list[dict[str, Any]] = []
    for i, c in cells.items():
        assert c.doublets is not None
        called_K = c.doublets.called_K
        kept_K = called_K[c.reason_N[called_K] == qc.KEPT]
        of = [dict.fromkeys([""], called_K), dict.fromkeys([""], kept_K)]
        if c.samples_N is not None:
            of = [dict(c.samples_N.split(rows_K)) for rows_K in (called_K, kept_K)]
        for name, number in c.doublets.samples:
            called, kept = (len(found.get(name, ())) for found in of)
            seen = number if number >= MIN_SCRUBLET[0] else 0
            rows.append(
                {
                    "source": sources[i].name,
                    "sample": name,
                    "cells": number,
                    "scored": seen,
                    "doublets": called,
                    "kept": kept,
                }
            )
    return pa.Table.from_pylist(rows, _DOUBLETS)


def near_duplicates_table(
    sources: Sequence[Source],
    cells: Mapping[int, SourceCells],
    older: Callable[[Ints], tuple[list[str], list[int]]] | None,
) -> pa.Table:
    """One row per cell that an earlier cell equals but for a gene filter: both with source and row, and whether the cell is kept.

    Args:
        sources: all sources, by number.
        cells: of every source.
        older: gives source and row of cells of the corpus that is extended; None = there is none.
    """
    parts = [_COPIES.empty_table()]
    for i, c in cells.items():
        assert c.copies is not None
        of_R, at_R = c.copies.same_source_R, c.copies.same_row_R.astype(object)
        same_R = np.array([sources[j].name for j in of_R.tolist()], dtype=object)  # -1, the older corpus, is replaced
        if older is not None and (of_R < 0).any():
            same_R[of_R < 0], at_R[of_R < 0] = older(c.copies.same_row_R[of_R < 0])
        kept_R = c.reason_N[c.copies.row_R] == qc.KEPT
        columns = [[sources[i].name] * len(of_R), c.copies.row_R, same_R, at_R, kept_R]
        parts.append(pa.table([pa.array(v, f.type) for v, f in zip(columns, _COPIES, strict=True)], schema=_COPIES))
    return pa.concat_tables(parts)


def hashes_table(cells: Mapping[int, SourceCells]) -> pa.Table:
    """Hashes of the kept cells, in order. They are taken out of `cells`, so that they are not held twice."""
    columns = {}
    for name in qc.Hashes._fields:
        kept_K = np.empty(sum(c.counts["kept"] for c in cells.values()), dtype=np.uint64)
        start = 0
        for c in cells.values():
            assert c.hashes_N is not None
            kept = getattr(c.hashes_N, name)[c.reason_N == qc.KEPT]
            kept_K[start : start + len(kept)] = kept
            start += len(kept)
            c.hashes_N = c.hashes_N._replace(**{name: np.zeros(0, dtype=np.uint64)})
        columns[name] = kept_K
    return pa.table(columns)

"""What `prepare` decides between its passes: which cells are kept, and the tables of the finished corpus.

The process that runs the stage holds these facts of all cells: 17 bytes per cell, and 4 more where sources have samples.
`jobs/bench.py scale` measures it for 50 million cells.

Letters: N cells of one source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa

from mixgf.cells import qc
from mixgf.config.data import QC, Source
from mixgf.corpus.prepare_passes import RowRange, read_metrics
from mixgf.genes.identify import MappingReport


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
    doublets: Callable[[Mapping[int, SourceCells]], None] | None = None,
) -> dict[int, SourceCells]:  # fmt: skip
    """Cells of every source with the reason why they are dropped, or `qc.KEPT`.

    Args:
        work: URI of the work folder, with the parts of the metrics.
        units: row ranges of the sources that are used.
        rules: thresholds.
        sources: all sources, by number.
        seed: of caps.
        held: hashes of cells that are in the corpus already.
        doublets: marks the doublets among the cells that pass the filters of their source; None = not looked for.
    """
    cells = {i: _read_source(work, mine, rules) for i, mine in by_source(units).items()}
    if doublets is not None:
        doublets(cells)
    if rules.drop_duplicates:
        old = [held] if held is not None else []
        kept = [np.zeros(len(h.a), dtype=np.int8) for h in old]
        qc.mark_duplicates(
            [*old, *(c.hashes_N for c in cells.values() if c.hashes_N is not None)],
            [*kept, *(c.reason_N for c in cells.values())],
        )
    if rules.max_cells_per_sample:
        for i, c in cells.items():
            qc.cap_per_sample(c.reason_N, c.samples_N, rules.max_cells_per_sample, sources[i].name, seed)
    return cells


def _read_source(work: str, units: Sequence[RowRange], rules: QC) -> SourceCells:
    metrics, samples = read_metrics(work, [u.number for u in units])
    return SourceCells(
        identity=metrics.identity,
        reason_N=qc.filter_cells(metrics, rules),
        hashes_N=metrics.hashes if rules.drop_duplicates else None,
        samples_N=samples if rules.doublets or rules.max_cells_per_sample else None,
    )


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

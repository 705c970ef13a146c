"""Signatures of the cells of a corpus (`cells.near_duplicates`): parts of `prepare`, and files beside the shards.

`near_hashes/` has one file per shard, of the same name: one uint32 column per band and one row per cell, 64 bytes per cell.

Parts in the work folder: near/R (signatures of row range R), near_kept (which cells are compared), near_pairs/K (pairs of cells that
agree in a band of group K).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mixgf.arrays import Bools, Ints
from mixgf.cells import near_duplicates
from mixgf.corpus.shards import part_uri, shard_name
from mixgf.storage import artifacts, files, tables

FOLDER = "near_hashes"
NUM_GROUPS = 4
"""Groups of bands, each searched by one task."""


@dataclass(frozen=True, eq=False)
class Copies:
    """Cells of one source that an earlier cell equals but for a gene filter (R,)."""

    row_R: Ints
    """Row of the cell in its source, ascending."""
    same_source_R: Ints
    """Number of the source of the earlier cell; -1 = the corpus that is extended."""
    same_row_R: Ints
    """Row of the earlier cell in its source; number of the cell in the corpus that is extended."""


def write_part(work: str, number: int, found_NK: np.ndarray) -> None:
    """Write the signatures of a row range, uint32 (cells, bands), as a part."""
    tables.write_table(part_uri(work, "near", number), _table(found_NK), **near_duplicates.STORED)


def write_kept(work: str, kept: Sequence[Bools]) -> None:
    """Write which cells are compared, source by source, for `pair_cells`."""
    tables.write_table(files.join(work, "near_kept.parquet"), pa.table({"kept": np.concatenate(kept)}))


def pair_cells(work: str, group: int, numbers: Sequence[int], older: str) -> None:
    """Pair cells that agree in a band of a group of bands; each with the next such cell, in the order of the corpus.

    The part has the columns `first` and `later`: cells among those that are compared, cells of the older corpus first. A task holds
    16 bytes per cell.

    Args:
        work: URI of the work folder.
        group: number of the group of bands, below `NUM_GROUPS`.
        numbers: all row ranges, in order.
        older: URI of the corpus that is extended; empty = none.
    """
    columns = list(near_duplicates.COLUMNS[group::NUM_GROUPS])
    kept = tables.read_table(files.join(work, "near_kept.parquet"))["kept"]
    uris = [part_uri(work, "near", number) for number in numbers]
    found = list(files.map_reads(work, lambda uri: tables.read_table(uri, columns), uris))
    new = pa.concat_tables(found).filter(kept)
    del found
    before = [tables.read_table(uri, columns) for uri in _shard_uris(older)] if older else []
    values = pa.concat_tables([*before, new])
    pairs = np.concatenate([near_duplicates.pair_equal(values[name].to_numpy()) for name in columns], axis=1)
    tables.write_table(part_uri(work, "near_pairs", group), pa.table({"first": pairs[0], "later": pairs[1]}))


def read_copies(work: str, kept: Mapping[int, Bools], num_older: int) -> dict[int, Copies]:
    """Cells that equal an earlier one, by source, from the parts of `pair_cells`.

    Args:
        work: URI of the work folder.
        kept: bool (rows,) by source: cells that were compared.
        num_older: cells of the corpus that is extended.
    """
    parts = [tables.read_table(part_uri(work, "near_pairs", k)) for k in range(NUM_GROUPS)]
    pairs = pa.concat_tables(parts)
    later, first = near_duplicates.later_copies(pairs["first"].to_numpy(), pairs["later"].to_numpy())
    rows = {i: np.flatnonzero(mine) for i, mine in kept.items()}
    starts = num_older + np.cumsum([0, *(len(mine) for mine in rows.values())])[:-1]
    sources, edges = np.array([-1, *rows]), np.array([0, *starts.tolist()])
    of_F = np.searchsorted(edges, first, "right") - 1  # of equal edges the last: sources without cells come before it
    found = {}
    for start, (i, mine) in zip(starts.tolist(), rows.items(), strict=True):
        here = (later >= start) & (later < start + len(mine))
        of, at = sources[of_F[here]], first[here] - edges[of_F[here]]
        for j in np.unique(of[of >= 0]).tolist():
            at[of == j] = rows[j][at[of == j]]
        found[i] = Copies(mine[later[here] - start], of, at)
    return found


def write_shard(uri: str, work: str, number: int, shard: int, keep_N: Bools) -> None:
    """Write the signatures of a shard's cells, from the part of its row range.

    Args:
        uri: of the folder with the signatures of the corpus.
        work: URI of the work folder.
        number: of the row range.
        shard: number of the shard.
        keep_N: which of its rows are kept.
    """
    kept = tables.read_table(part_uri(work, "near", number)).filter(pa.array(keep_N))
    tables.write_table(files.join(uri, shard_name(shard)), kept, **near_duplicates.STORED)


def _table(found_NK: np.ndarray) -> pa.Table:
    return pa.table(dict(zip(near_duplicates.COLUMNS, np.ascontiguousarray(found_NK.T), strict=True)))


def _shard_uris(uri: str) -> list[str]:
    """URIs of the signatures of a corpus, in the order of its cells."""
    shards = artifacts.require(uri, "corpus").details["shards"]
    return [files.join(uri, FOLDER, entry["name"]) for entry in shards]


def are_there(uri: str) -> bool:
    """Whether a finished corpus has signatures of its cells."""
    return all(files.exists(one) for one in _shard_uris(uri)[:1])


def blocks(uri: str, rows: Ints | None) -> Iterator[np.ndarray]:
    """Signatures of a corpus, uint32 (cells, bands), one shard at a time.

    Args:
        uri: of the corpus.
        rows: numbers of the cells that are wanted, in any order; None = all.
    """
    start, sorted_rows = 0, None if rows is None else np.sort(rows)
    for table in files.map_reads(uri, tables.read_table, _shard_uris(uri)):
        found = np.stack([column.to_numpy() for column in table.columns], axis=1)
        stop = start + len(table)
        if sorted_rows is not None:
            found = found[sorted_rows[slice(*np.searchsorted(sorted_rows, [start, stop]))] - start]
        start = stop
        yield found

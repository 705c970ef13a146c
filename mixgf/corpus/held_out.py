"""Cells of a corpus that a pretraining never sees: whole donors, whole data sets, or single cells.

Which ones depends on the corpus and the share alone, so all trainings on a corpus have the same held-out cells.

Shapes: N cells of the corpus, U units (donors or data sets).
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mixgf import rng
from mixgf.corpus.reader import Corpus

UNKNOWN = frozenset({"", "nan", "None", "unknown"})
"""Names of donors and data sets that say nothing."""
_DRAW = 0x48454C44
_READERS = 8
"""Threads that read columns of shards."""


@dataclass(frozen=True, eq=False)
class HeldOut:
    """Held-out cells of a corpus."""

    cells: npt.NDArray[np.int64]
    """Their numbers, ascending."""
    unit: str
    """What was held out as a whole: `donor`, `dataset` or `cell`."""
    units: int
    """Number of held-out units."""

    def details(self) -> dict[str, int | str]:
        """As stored in the record of a checkpoint."""
        return {"cells": len(self.cells), "unit": self.unit, "units": self.units}


def held_out_cells(corpus: Corpus, share: float) -> HeldOut:
    """About a share of the cells, at most that, in whole units.

    Units are donors (within their data set, or within their source file), else data sets, else cells: the first kind of which
    whole units make up at least half of the share. Units are taken in a random order, without those that are too large.
    """
    most = int(share * corpus.num_cells)
    for unit, names in (("donor", ("dataset", "source", "donor")), ("dataset", ("dataset",))):
        if most and unit in corpus.columns:
            unit_N, hashes_U = _units(corpus, tuple(name for name in names if name in corpus.columns))
            sizes_U = np.bincount(unit_N[unit_N >= 0], minlength=len(hashes_U))
            chosen, total = [], 0
            for u in np.argsort(hashes_U, kind="stable"):
                if total + sizes_U[u] <= most:
                    chosen.append(int(u))
                    total += int(sizes_U[u])
            if 2 * total >= most:
                return HeldOut(np.flatnonzero(np.isin(unit_N, chosen)), unit, len(chosen))
    order_N = np.argsort(rng.uniform(np.arange(corpus.num_cells), after=_DRAW), kind="stable")
    return HeldOut(np.sort(order_N[:most]), "cell", most)


def _units(corpus: Corpus, columns: tuple[str, ...]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint64]]:
    """The unit of each cell (N,), -1 where the last column is unknown, and a hash of the name of each unit (U,)."""
    known: dict[tuple[str, ...], int] = {}
    unit_N = np.full(corpus.num_cells, -1, dtype=np.int32)

    def read(shard: int) -> tuple[list[tuple[str, ...]], npt.NDArray[np.int64]]:
        """Names of the units of a shard, and the place of each of its cells among them."""
        there = [name for name in columns if name in corpus.shard_schema(shard).names]
        if columns[-1] not in there:
            return [], np.zeros(0, dtype=np.int64)
        table = corpus.table(shard, there)
        texts, place_N = [], np.zeros(table.num_rows, dtype=np.int64)
        for name in columns:
            text, code_N = _coded(table[name]) if name in there else ([""], 0)
            texts.append(text)
            place_N = place_N * len(text) + code_N
        found, place_N = np.unique(place_N, return_inverse=True)
        codes = np.unravel_index(found, [len(text) for text in texts])
        return list(
            zip(*([text[c] for c in code] for text, code in zip(texts, codes, strict=True)), strict=True)
        ), place_N

    with ThreadPoolExecutor(_READERS) as threads:
        for shard, (rows, place_N) in enumerate(threads.map(read, range(len(corpus.shards)))):
            units = [-1 if row[-1] in UNKNOWN else known.setdefault(row, len(known)) for row in rows]
            start = corpus.starts[shard]
            unit_N[start : start + len(place_N)] = np.array(units, dtype=np.int32)[place_N]
    digests = [hashlib.blake2b("\x1f".join(row).encode(), digest_size=8).digest() for row in known]
    return unit_N, np.array([int.from_bytes(digest, "little") for digest in digests], dtype=np.uint64)


def _coded(column: pa.ChunkedArray) -> tuple[list[str], npt.NDArray[np.int32]]:
    """The values of a column as text, and the place of each row's value among them."""
    coded = pc.dictionary_encode(column.combine_chunks(), null_encoding="encode")
    return [str(value) for value in coded.dictionary.to_pylist()], coded.indices.to_numpy()

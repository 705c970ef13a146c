"""Reader of a corpus: sentences of any cells, packed, and their metadata (obs).

Shapes: N cells of the corpus, B requested cells, T packed tokens.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
from scipy import sparse

from mixgf.config import data, parse
from mixgf.corpus.packed import I32, I64, offsets_of
from mixgf.errors import UserError
from mixgf.genes.vocabulary import Vocabulary
from mixgf.jit import jit
from mixgf.storage import artifacts, files, tables
from mixgf.storage.artifacts import Record

CACHED_SHARDS = 6
"""Shards in memory: as many as `training.batch_plan.WINDOW_SHARDS`, so that an epoch reads every shard once."""


class Corpus:
    """A finished corpus artifact, opened for reading. Cells are numbered over the shards in manifest order.

    Args:
        uri: the artifact's folder.
        max_len: sentences are cut to this many tokens (the highest ranks); 0 = not cut.
        cached_shards: shards held in memory; the least recently used one is dropped first.
    """

    def __init__(self, uri: str, *, max_len: int = 0, cached_shards: int = CACHED_SHARDS) -> None:
        self.uri = uri
        self.record: Record = artifacts.require(uri, "corpus")
        index = artifacts.read_artifact_table(uri, "index", ["length", "species"])
        self.stored_N: I32 = index.column("length").to_numpy().astype(np.int32, copy=False)
        """Tokens of each cell's sentence as it is stored; `lengths_N` as it is cut to `max_len`."""
        self.lengths_N: I32 = np.minimum(self.stored_N, max_len).astype(np.int32) if max_len else self.stored_N
        self.species_N: npt.NDArray[np.int8] = index.column("species").to_numpy().astype(np.int8, copy=False)
        self.species: tuple[str, ...] = tuple(self.record.details["species"])
        self.shards: list[dict[str, Any]] = list(self.record.details["shards"])
        self.shard_rows: I64 = np.array([shard["rows"] for shard in self.shards], dtype=np.int64)
        self.starts: I64 = np.concatenate([[0], np.cumsum(self.shard_rows)]).astype(np.int64)
        if self.starts[-1] != len(self.lengths_N):
            msg = f"{uri}: index of {len(self.lengths_N)} cells, shards of {self.starts[-1]}; make the corpus again"
            raise UserError(msg)
        self._cached_shards = cached_shards
        self._cache: OrderedDict[int, tuple[I32, I64]] = OrderedDict()
        self._lock = threading.Lock()

    counts_NG: sparse.csr_matrix | None = None
    """Raw counts of all cells over the genes of their species in the vocabulary, where they are in memory."""

    @classmethod
    def open(cls, uri: str) -> Corpus:
        """Open a finished corpus."""
        return cls(uri)

    @property
    def num_cells(self) -> int:
        """Number of cells (N)."""
        return len(self.lengths_N)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Vocabulary of the tokens; the corpus holds a copy."""
        vocabulary = Vocabulary.load(self.uri)
        if vocabulary.hash != self.record.details["vocabulary"]:
            msg = f"{self.uri}: its vocabulary.parquet is not the one its tokens were made with; restore it"
            raise UserError(msg)
        return vocabulary

    @property
    def cls(self) -> bool:
        """Whether sentences begin with <cls>."""
        return self.token_settings.cls

    @property
    def token_settings(self) -> data.Tokens:
        """Settings with which the sentences were made."""
        return parse.from_dict(data.Tokens, self.record.config["tokens"], "corpus.tokens")

    def tokens(self, cells: npt.ArrayLike, *, whole: bool = False) -> tuple[I32, I64]:
        """Sentences of the given cells (B,), packed in the given order: tokens (T,) and offsets (B + 1,).

        `whole` sentences are as they are stored, not cut to `max_len`.
        """
        cells_B = np.asarray(cells, dtype=np.int64)
        lengths_B = (self.stored_N if whole else self.lengths_N)[cells_B].astype(np.int64)
        offsets_B1 = offsets_of(lengths_B)
        tokens_T = np.empty(offsets_B1[-1], dtype=np.int32)
        shard_B = np.searchsorted(self.starts, cells_B, side="right") - 1
        # cached shards first, before others replace them
        for shard in sorted(set(shard_B.tolist()), key=lambda shard: (shard not in self._cache, shard)):
            _gather(*self._shard(shard), cells_B - self.starts[shard], shard_B == shard, offsets_B1, tokens_T)
        return tokens_T, offsets_B1

    def _shard(self, shard: int) -> tuple[I32, I64]:
        with self._lock:
            if shard in self._cache:
                self._cache.move_to_end(shard)
                return self._cache[shard]
        column = self.table(shard, ["tokens"]).column("tokens").combine_chunks()
        chunk = column if isinstance(column, pa.ListArray | pa.LargeListArray) else column.chunk(0)
        bounds = chunk.offsets.to_numpy().astype(np.int64)
        read = (chunk.values.to_numpy().astype(np.int32, copy=False), bounds)
        expected = self.stored_N[self.starts[shard] : self.starts[shard + 1]]
        if not np.array_equal(np.diff(bounds), expected):
            msg = f"{self.uri}: shard {self.shards[shard]['name']} does not fit index.parquet; restore it"
            raise UserError(msg)
        with self._lock:
            self._cache[shard] = read
            while len(self._cache) > self._cached_shards:
                self._cache.popitem(last=False)
        return read

    def table(self, shard: int, columns: list[str] | None = None) -> pa.Table:
        """Table of one shard, with the given columns; None = all. With the tokens, which are most of it, all of it is verified."""
        known = str(self.shards[shard].get("sha256", "")) if columns is None or "tokens" in columns else ""
        return tables.read_table(self.shard_uri(shard), columns, sha256=known)

    def shard_uri(self, shard: int) -> str:
        """URI of one shard's Parquet file."""
        name = str(self.shards[shard]["name"])
        return files.join(
            self.uri, "shards", name.rsplit("/", 1)[-1] if name.endswith(".parquet") else f"{name}.parquet"
        )

    def shard_schema(self, shard: int) -> pa.Schema:
        """Columns of one shard, `tokens` first."""
        return tables.read_schema(self.shard_uri(shard)).remove_metadata()

    @cached_property
    def columns(self) -> frozenset[str]:
        """Names of the columns of all shards, without the tokens."""
        names: set[str] = set()
        for shard in range(len(self.shards)):
            names.update(self.shard_schema(shard).names)
        return frozenset(names - {"tokens"})

    def obs(self, columns: list[str] | None = None) -> pd.DataFrame:
        """Metadata, one row per cell in cell order; a column that a shard lacks is empty there.

        Raises:
            UserError: a requested column is in no shard.
        """
        frames, seen = [], dict[str, None]()
        for shard in range(len(self.shards)):
            names = [n for n in self.shard_schema(shard).names if n != "tokens"]
            seen |= dict.fromkeys(names)
            keep = names if columns is None else [n for n in columns if n in names]
            table = self.table(shard, keep)
            frames.append(table.to_pandas() if keep else pd.DataFrame(index=range(int(self.shard_rows[shard]))))
        frame = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
        missing = [n for n in columns or [] if n not in frame.columns]
        if missing:
            msg = f"{self.uri}: no column {missing[0]!r}; there are {', '.join(seen)}"
            raise UserError(msg)
        return frame if columns is None else frame[columns]

    def obs_of(self, cells: I64, columns: list[str]) -> pd.DataFrame:
        """Metadata of some cells (B,), in their order, as rows of `obs`; only shards with one of the cells are read."""
        shard_B = np.searchsorted(self.starts, cells, side="right") - 1
        parts = []
        for shard in np.unique(shard_B).tolist():
            table = self.table(shard, columns)
            if not set(columns) <= set(table.column_names):  # the other shards tell whether there is such a column
                return self.obs(columns).iloc[cells].reset_index(drop=True)
            parts.append(table.select(columns).take(cells[shard_B == shard] - self.starts[shard]).to_pandas())
        found = pd.concat(parts, ignore_index=True)
        place_B = np.argsort(np.argsort(shard_B, kind="stable"), kind="stable")
        return found.iloc[place_B].reset_index(drop=True)


@jit
def _gather(  # noqa: PLR0917 (compiled)
    values: I32, bounds: I64, rows_B: I64, mine_B: npt.NDArray[np.bool_], offsets_B1: I64, tokens_T: I32
) -> None:
    """Copy the sentences of one shard to the output; each is cut to the length that its offsets allow."""
    for i in range(len(rows_B)):
        if mine_B[i]:
            begin, start, stop = bounds[rows_B[i]], offsets_B1[i], offsets_B1[i + 1]
            tokens_T[start:stop] = values[begin : begin + stop - start]

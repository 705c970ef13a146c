"""The reader of a token corpus: index, shards, packed sentences; and the thread that reads ahead.

Shapes: N cells of the corpus, B cells asked for, T packed tokens.
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
import pyarrow.parquet as pq

from mixgf.config import data, parse
from mixgf.corpus.packed import I32, I64, offsets_of
from mixgf.errors import UserError
from mixgf.genes.vocabulary import Vocabulary
from mixgf.jit import jit
from mixgf.storage import artifacts, files, tables
from mixgf.storage.artifacts import Record

CACHED_SHARDS = 6
"""As many as the plan mixes with each other (`plan.WINDOW_SHARDS`): an epoch then reads every shard once."""


class Corpus:
    """A finished corpus artifact, opened for reading. Cells are numbered over the shards in manifest order.

    Args:
        uri: the artifact's folder.
        max_len: longest sentence that is seen, longer ones are cut to their first tokens (the highest ranks); 0 = as they are.
        cached_shards: shards held in memory; the least recently used one goes first.
    """

    def __init__(self, uri: str, *, max_len: int = 0, cached_shards: int = CACHED_SHARDS) -> None:
        self.uri = uri
        self.record: Record = artifacts.require(uri, "corpus")
        index = tables.read_table(files.join(uri, "index.parquet"), ["length", "species"])
        self._stored_N: I32 = index.column("length").to_numpy().astype(np.int32, copy=False)
        self.lengths_N: I32 = np.minimum(self._stored_N, max_len).astype(np.int32) if max_len else self._stored_N
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

    @classmethod
    def open(cls, uri: str) -> Corpus:
        """Open a finished corpus."""
        return cls(uri)

    @property
    def num_cells(self) -> int:
        """N."""
        return len(self.lengths_N)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The vocabulary the tokens belong to; a copy lies in the corpus."""
        vocabulary = Vocabulary.load(self.uri)
        if vocabulary.hash != self.record.details["vocabulary"]:
            msg = f"{self.uri}: its vocabulary.parquet is not the one its tokens were made with; restore it"
            raise UserError(msg)
        return vocabulary

    @property
    def cls(self) -> bool:
        """Whether sentences begin with <cls>."""
        return self.tokenised.cls

    @property
    def tokenised(self) -> data.Tokens:
        """How its sentences were made."""
        return parse.from_dict(data.Tokens, self.record.config["tokens"], "corpus.tokens")

    def tokens(self, cells: npt.ArrayLike) -> tuple[I32, I64]:
        """Sentences of the given cells, packed in the given order: tokens (T,) and offsets (B + 1,)."""
        cells_B = np.asarray(cells, dtype=np.int64)
        lengths_B = self.lengths_N[cells_B].astype(np.int64)
        offsets_B1 = offsets_of(lengths_B)
        tokens_T = np.empty(offsets_B1[-1], dtype=np.int32)
        shard_B = np.searchsorted(self.starts, cells_B, side="right") - 1
        # first the shards that are held, before new ones take their place
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
        expected = self._stored_N[self.starts[shard] : self.starts[shard + 1]]
        if not np.array_equal(np.diff(bounds), expected):
            msg = f"{self.uri}: shard {self.shards[shard]['name']} does not fit index.parquet; restore it"
            raise UserError(msg)
        with self._lock:
            self._cache[shard] = read
            while len(self._cache) > self._cached_shards:
                self._cache.popitem(last=False)
        return read

    def table(self, shard: int, columns: list[str] | None = None) -> pa.Table:
        """One shard's table."""
        return tables.read_table(files.join(self.uri, "shards", self._file(shard)), columns)

    def _file(self, shard: int) -> str:
        name = str(self.shards[shard]["name"])
        return name.rsplit("/", 1)[-1] if name.endswith(".parquet") else f"{name}.parquet"

    @cached_property
    def columns(self) -> frozenset[str]:
        """Names of all columns of any shard, without the tokens."""
        names: set[str] = set()
        for shard in range(len(self.shards)):
            with files.open_read(files.join(self.uri, "shards", self._file(shard))) as file:
                names.update(pa.parquet.read_schema(file).names)
        return frozenset(names - {"tokens"})

    def obs(self, columns: list[str] | None = None) -> pd.DataFrame:
        """Everything but the tokens, one row per cell in cell order; columns missing in a shard are empty there."""
        frames, seen = [], dict[str, None]()
        for shard in range(len(self.shards)):
            uri = files.join(self.uri, "shards", self._file(shard))
            with files.open_read(uri) as file:
                names = [n for n in pq.read_schema(file).names if n != "tokens"]
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


@jit
def _gather(  # noqa: PLR0917 (compiled)
    values: I32, bounds: I64, rows_B: I64, mine_B: npt.NDArray[np.bool_], offsets_B1: I64, tokens_T: I32
) -> None:
    """Copy the sentences of one shard, or as much of each as there is room for, to their places."""
    for i in range(len(rows_B)):
        if mine_B[i]:
            begin, start, stop = bounds[rows_B[i]], offsets_B1[i], offsets_B1[i + 1]
            tokens_T[start:stop] = values[begin : begin + stop - start]

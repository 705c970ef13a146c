"""The reader of a token corpus: index, shards, packed sentences; and the thread that reads ahead.

Shapes: N cells of the corpus, B cells asked for, T packed tokens.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from mixgf import artifacts, config, storage
from mixgf.artifacts import Record
from mixgf.config import UserError
from mixgf.vocab import Vocabulary

T_co = TypeVar("T_co", covariant=True)

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
CACHED_SHARDS = 12


class Corpus:
    """A finished corpus artifact, opened for reading. Cells are numbered over the shards in manifest order.

    Args:
        uri: the artifact's folder.
        cached_shards: shards held in memory; the least recently used one goes first.
    """

    def __init__(self, uri: str, *, cached_shards: int = CACHED_SHARDS) -> None:
        self.uri = uri
        self.record: Record = artifacts.require(uri, "corpus")
        index = storage.read_table(storage.join(uri, "index.parquet"), ["length", "species"])
        self.lengths_N: I32 = index.column("length").to_numpy().astype(np.int32, copy=False)
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
    def tokenised(self) -> config.Tokens:
        """How its sentences were made."""
        return config.from_dict(config.Tokens, self.record.config["tokens"], "corpus.tokens")

    def tokens(self, cells: npt.ArrayLike) -> tuple[I32, I64]:
        """Sentences of the given cells, packed in the given order: tokens (T,) and offsets (B + 1,)."""
        cells_B = np.asarray(cells, dtype=np.int64)
        lengths_B = self.lengths_N[cells_B].astype(np.int64)
        offsets_B1: I64 = np.concatenate([[0], np.cumsum(lengths_B)]).astype(np.int64)
        tokens_T = np.empty(offsets_B1[-1], dtype=np.int32)
        shard_B = np.searchsorted(self.starts, cells_B, side="right") - 1
        for shard in np.unique(shard_B).tolist():
            values, bounds = self._shard(shard)
            mine = np.flatnonzero(shard_B == shard)
            begins = bounds[cells_B[mine] - self.starts[shard]].tolist()
            for place, begin, length in zip(offsets_B1[mine].tolist(), begins, lengths_B[mine].tolist(), strict=True):
                tokens_T[place : place + length] = values[begin : begin + length]
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
        expected = self.lengths_N[self.starts[shard] : self.starts[shard + 1]]
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
        return storage.read_table(storage.join(self.uri, "shards", self._file(shard)), columns)

    def _file(self, shard: int) -> str:
        name = str(self.shards[shard]["name"])
        return name.rsplit("/", 1)[-1] if name.endswith(".parquet") else f"{name}.parquet"

    @cached_property
    def columns(self) -> frozenset[str]:
        """Names of all columns of any shard, without the tokens."""
        names: set[str] = set()
        for shard in range(len(self.shards)):
            with storage.open_read(storage.join(self.uri, "shards", self._file(shard))) as file:
                names.update(pa.parquet.read_schema(file).names)
        return frozenset(names - {"tokens"})

    def obs(self, columns: list[str] | None = None) -> pd.DataFrame:
        """Everything but the tokens, one row per cell in cell order; columns missing in a shard are empty there."""
        frames, seen = [], dict[str, None]()
        for shard in range(len(self.shards)):
            uri = storage.join(self.uri, "shards", self._file(shard))
            with storage.open_read(uri) as file:
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


@dataclass(frozen=True, slots=True)
class Batch:
    """Packed sentences as tensors."""

    ids_T: Tensor
    """Token ids, int64."""
    offsets_B1: Tensor
    """Where each cell begins, and T, int32."""
    positions_T: Tensor
    """Position of each token in its cell, int64."""
    cells_B: Tensor
    """Global cell numbers, int64."""
    max_len: int
    """The longest cell."""
    keys_T: Tensor | None = None
    """Dropout keys, int32, see `keyed.dropout_keys`; None = no dropout."""

    @property
    def num_cells(self) -> int:
        """B."""
        return len(self.cells_B)

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.ids_T)

    def to(self, device: torch.device | str) -> Batch:
        """The same on a device; from pinned memory the copy does not block."""
        if torch.device(device).type == "cpu":
            return self

        def move(x: Tensor) -> Tensor:
            return x.pin_memory().to(device, non_blocking=True)

        return replace(
            self, ids_T=move(self.ids_T), offsets_B1=move(self.offsets_B1), positions_T=move(self.positions_T),
            cells_B=move(self.cells_B), keys_T=None if self.keys_T is None else move(self.keys_T),
        )  # fmt: skip


def positions(offsets_B1: I64) -> I64:
    """Position of every packed token in its cell, (T,)."""
    out_T = np.arange(offsets_B1[-1])
    out_T -= np.repeat(offsets_B1[:-1], np.diff(offsets_B1))
    return out_T


def pack(tokens_T: I32, offsets_B1: I64, cells: npt.ArrayLike, keys_T: Tensor | None = None) -> Batch:
    """A `Batch` of packed sentences."""
    return Batch(
        ids_T=torch.from_numpy(tokens_T.astype(np.int64)),
        offsets_B1=torch.from_numpy(offsets_B1.astype(np.int32)),
        positions_T=torch.from_numpy(positions(offsets_B1)),
        cells_B=torch.from_numpy(np.array(cells, dtype=np.int64)),
        max_len=int(np.diff(offsets_B1).max(initial=1)),
        keys_T=keys_T,
    )


def cut(tokens_T: I32, offsets_B1: I64, max_len: int) -> tuple[I32, I64]:
    """Packed sentences cut to their first `max_len` tokens; 0 = as they are."""
    lengths_B = np.diff(offsets_B1)
    if max_len <= 0 or lengths_B.max(initial=0) <= max_len:
        return tokens_T, offsets_B1
    new_B1 = np.concatenate([[0], np.cumsum(np.minimum(lengths_B, max_len))]).astype(np.int64)
    return tokens_T[positions(offsets_B1) < max_len], new_B1


class Prefetch(Generic[T_co]):
    """Calls `make(step)` for a range of steps in a background thread, a few steps ahead.

    `waited` is the time in seconds that the consumer spent waiting. Use as a context manager; the thread ends with it.
    """

    def __init__(self, make: Callable[[int], T_co], start: int, stop: int, *, depth: int = 4) -> None:
        self.waited = 0.0
        self._make, self._range = make, range(start, stop)
        self._queue: queue.Queue[tuple[T_co | None, BaseException | None]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mixgf-prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        for step in self._range:
            try:
                item: tuple[T_co | None, BaseException | None] = (self._make(step), None)
            except BaseException as error:  # noqa: BLE001 (it is raised again in the consumer's thread)
                item = (None, error)
            while not self._closed.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self._closed.is_set() or item[1] is not None:
                return

    def __iter__(self) -> Iterator[T_co]:
        for _ in self._range:
            began = time.perf_counter()
            item, error = self._queue.get()
            self.waited += time.perf_counter() - began
            if error is not None:
                raise error
            assert item is not None
            yield item

    def __enter__(self) -> Prefetch[T_co]:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

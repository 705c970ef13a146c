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

from mixgf import artifacts, config, keyed, storage
from mixgf.artifacts import Record
from mixgf.compiled import jit
from mixgf.config import UserError
from mixgf.vocab import Vocabulary

T_co = TypeVar("T_co", covariant=True)

I32 = npt.NDArray[np.int32]
I64 = npt.NDArray[np.int64]
Packed = tuple[I32, I64]
"""Tokens (T,) and offsets (B + 1,)."""
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
        index = storage.read_table(storage.join(uri, "index.parquet"), ["length", "species"])
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
    def tokenised(self) -> config.Tokens:
        """How its sentences were made."""
        return config.from_dict(config.Tokens, self.record.config["tokens"], "corpus.tokens")

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

    def cut(self, max_len: int) -> Batch:
        """The first `max_len` tokens of every cell."""
        if self.max_len <= max_len:
            return self
        kept_T = self.positions_T < max_len
        offsets_B1 = torch.zeros_like(self.offsets_B1)
        torch.cumsum(self.offsets_B1.diff().clamp(max=max_len), 0, out=offsets_B1[1:])
        return replace(
            self, ids_T=self.ids_T[kept_T], offsets_B1=offsets_B1, positions_T=self.positions_T[kept_T], max_len=max_len,
            keys_T=None if self.keys_T is None else self.keys_T[kept_T],
        )  # fmt: skip

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


def offsets_of(lengths_B: npt.NDArray[Any]) -> I64:
    """Where cells of these lengths begin when one lies after the other, and how many tokens there are, (B + 1,)."""
    offsets_B1 = np.zeros(len(lengths_B) + 1, dtype=np.int64)
    np.cumsum(lengths_B, out=offsets_B1[1:])
    return offsets_B1


def pack(packs: list[Packed], cells: npt.ArrayLike, keys: npt.NDArray[np.uint64] | None = None) -> Batch:
    """A `Batch` of packed sentences.

    Args:
        packs: tokens and offsets, one pack (a view) after the other; all of the same B cells.
        cells: their global numbers, (B,).
        keys: of dropout, `keyed.hashed(seed, epoch, visits)`, (B,), to which a pack's number is added; None = no dropout.
    """
    cells_B = np.asarray(cells, dtype=np.int64)
    num_cells, num_tokens = len(cells_B), sum(len(tokens_T) for tokens_T, _ in packs)
    ids_T, positions_T = np.empty(num_tokens, dtype=np.int64), np.empty(num_tokens, dtype=np.int64)
    offsets_B1 = np.zeros(num_cells * len(packs) + 1, dtype=np.int32)
    keys_T = np.empty(num_tokens if keys is not None else 0, dtype=np.int32)
    max_len, keys_B = 1, np.empty(0, dtype=np.uint64) if keys is None else keys
    for number, (tokens_T, offsets) in enumerate(packs):
        longest = _lay(tokens_T, offsets, keys_B, number, ids_T, positions_T, offsets_B1, keys_T)
        max_len = max(max_len, int(longest))
    return Batch(
        ids_T=torch.from_numpy(ids_T),
        offsets_B1=torch.from_numpy(offsets_B1),
        positions_T=torch.from_numpy(positions_T),
        cells_B=torch.from_numpy(np.tile(cells_B, len(packs))),
        max_len=max_len,
        keys_T=None if keys is None else torch.from_numpy(keys_T),
    )


@jit
def _gather(  # noqa: PLR0917 (compiled)
    values: I32, bounds: I64, rows_B: I64, mine_B: npt.NDArray[np.bool_], offsets_B1: I64, tokens_T: I32
) -> None:
    """Copy the sentences of one shard, or as much of each as there is room for, to their places."""
    for i in range(len(rows_B)):
        if mine_B[i]:
            begin, start, stop = bounds[rows_B[i]], offsets_B1[i], offsets_B1[i + 1]
            tokens_T[start:stop] = values[begin : begin + stop - start]


@jit
def _lay(  # noqa: PLR0917 (compiled)
    tokens_T: I32,
    offsets: I64,
    keys_B: npt.NDArray[np.uint64],
    number: int,
    ids_T: I64,
    positions_T: I64,
    offsets_B1: I32,
    keys_T: I32,
) -> np.int64:
    """Write one pack behind those of smaller number; returns its longest cell."""
    num_cells = len(offsets) - 1
    base, longest = np.int64(offsets_B1[number * num_cells]), np.int64(1)
    for i in range(num_cells):
        start, stop = base + offsets[i], base + offsets[i + 1]
        longest = max(longest, stop - start)
        offsets_B1[number * num_cells + i + 1] = stop
        ids_T[start:stop] = tokens_T[offsets[i] : offsets[i + 1]]
        places = positions_T[start:stop]
        for t in range(len(places)):
            places[t] = t
        if len(keys_B):
            key, keys = keyed.mixed(keys_B[i], np.uint64(number)), keys_T[start:stop]
            for t in range(len(keys)):
                keys[t] = np.int32(keyed.mixed(key, np.uint64(t)) >> np.uint64(32))
    return longest


def cut(tokens_T: I32, offsets_B1: I64, max_len: int) -> tuple[I32, I64]:
    """Packed sentences cut to their first `max_len` tokens; 0 = as they are."""
    lengths_B = np.diff(offsets_B1)
    if max_len <= 0 or lengths_B.max(initial=0) <= max_len:
        return tokens_T, offsets_B1
    return tokens_T[positions(offsets_B1) < max_len], offsets_of(np.minimum(lengths_B, max_len))


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

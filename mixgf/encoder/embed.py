"""Embed cells with a frozen encoder; `embed_shard` does it for one shard of a corpus.

On a CPU each cell is computed alone, so its vector does not depend on the other cells, to the bit. On a GPU cells of
similar length are packed up to a number of tokens; a background thread reads, packs and pins the next batches meanwhile.

Shapes: N requested cells, D width of a vector, T packed tokens.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from mixgf.config.run import Config
from mixgf.config.training import LayerChoice
from mixgf.corpus import packed
from mixgf.corpus.in_memory import Sentences
from mixgf.corpus.reader import Corpus
from mixgf.corpus.shards import regroup
from mixgf.encoder import checkpoint
from mixgf.encoder.batch import Batch, pack_batch, split_micro_batches
from mixgf.encoder.bert import Encoder, cell_vectors, vector_width
from mixgf.encoder.device import pick_device
from mixgf.encoder.prefetch import Prefetch
from mixgf.errors import UserError
from mixgf.execution import Pipeline
from mixgf.storage import tables

_FETCH_CELLS = 4096


class SentenceSource(Protocol):
    """Any source of sentences: a `corpus.reader.Corpus`, or sentences in memory."""

    @property
    def lengths_N(self) -> npt.NDArray[np.int32]:
        """Tokens of each cell."""
        ...

    @property
    def cls(self) -> bool:
        """Whether sentences begin with <cls>."""
        ...

    def tokens(self, cells: npt.ArrayLike) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Sentences of the given cells, packed, and their offsets."""
        ...


@torch.inference_mode()
def embed_cells(  # noqa: PLR0917 (the signature that the stages share)
    encoder: Encoder,
    corpus: SentenceSource,
    cells: npt.ArrayLike,
    pooling: str = "mean",
    layer: LayerChoice = -1,
    micro_tokens: int = 65_536,
    *,
    max_len: int = 0,
    precision: str = "fp32",
) -> npt.NDArray[np.float32]:
    """Vectors of the given cells in the given order, float32 (N, D).

    Args:
        encoder: the encoder, on the device to use.
        corpus: source of the sentences.
        cells: global cell numbers.
        pooling: `mean` over genes, `first` or `cls`.
        layer: -1 = the last hidden layer, -2 = the one before it, ...; `all` = all side by side, the embedding first.
        micro_tokens: most tokens of one forward pass on a GPU.
        max_len: sentences are cut to this many tokens; 0 = to the number of positions of the encoder, the upper limit.
        precision: `fp32`, or `bf16` (autocast).
    """
    cells_N = np.asarray(cells, dtype=np.int64)
    on_gpu = encoder.tokens.is_cuda
    longest = min(max_len or encoder.sizes.max_positions, encoder.sizes.max_positions)
    runs = PackedRuns(corpus, cells_N, longest, micro_tokens if on_gpu else 0)
    was_training = encoder.training
    encoder.eval()
    with runs.ahead() if on_gpu else contextlib.nullcontext(map(runs, range(len(runs)))) as batches:
        out_ND = embed_runs(encoder, corpus, runs, batches, pooling=pooling, layer=layer, precision=precision)
    encoder.train(was_training)
    return out_ND


def embed_runs(
    encoder: Encoder, corpus: SentenceSource, runs: PackedRuns, batches: Iterable[Batch], *,
    pooling: str, layer: LayerChoice, precision: str,
) -> npt.NDArray[np.float32]:  # fmt: skip
    """Vectors of the cells of `runs`, whose batches come one after the other; arguments as of `embed_cells`.

    The device is waited for once in `_FETCH_CELLS` cells.
    """
    device = encoder.tokens.device
    out_ND = np.empty((len(runs.cells_N), vector_width(encoder.sizes, layer)), dtype=np.float32)
    found: list[Tensor] = []
    for number, batch in enumerate(batches):
        there = batch.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            v_BD = cell_vectors(
                encoder, there.ids_T, there.offsets_B1, pooling, layer=layer, cls=corpus.cls,
                positions_T=there.positions_T, max_len=there.max_len,
            )  # fmt: skip
        found.append(v_BD.float())
        if runs.ends_chunk(number):
            out_ND[runs.chunk(number)] = torch.cat(found).cpu().numpy()
            found.clear()
    return out_ND


class PackedRuns:
    """The batches of an embedding, by number: in the order of the shards, and in each `_FETCH_CELLS` cells the long ones first.

    Called with rising numbers, from one thread, it reads the sentences of each chunk once.

    Args:
        corpus: source of the sentences.
        cells_N: global cell numbers.
        max_len: sentences are cut to this many tokens.
        micro_tokens: most tokens of a batch; 0 = one cell in each.
    """

    def __init__(self, corpus: SentenceSource, cells_N: npt.NDArray[np.int64], max_len: int, micro_tokens: int) -> None:
        self.cells_N, self._corpus, self._max_len = cells_N, corpus, max_len
        by_shard = np.argsort(cells_N, kind="stable")
        self._chunks, self._runs = list[npt.NDArray[np.int64]](), list[tuple[int, slice]]()
        for start in range(0, len(cells_N), _FETCH_CELLS):
            rows = by_shard[start : start + _FETCH_CELLS]
            rows = rows[np.argsort(-corpus.lengths_N[cells_N[rows]], kind="stable")]
            lengths = corpus.lengths_N[cells_N[rows]]
            each = [slice(i, i + 1) for i in range(len(rows))]
            parts = split_micro_batches(lengths, micro_tokens) if micro_tokens else each
            self._runs += [(len(self._chunks), part) for part in parts]
            self._chunks.append(rows)
        self._read: tuple[int, packed.Packed] = (-1, (np.empty(0, np.int32), np.zeros(1, np.int64)))

    def __len__(self) -> int:
        return len(self._runs)

    def chunk(self, number: int) -> npt.NDArray[np.int64]:
        """Rows, among the cells asked for, of the chunk of a batch, in the order of its batches."""
        return self._chunks[self._runs[number][0]]

    def ends_chunk(self, number: int) -> bool:
        """Whether a batch is the last one of its chunk."""
        return self._runs[number][1].stop == len(self.chunk(number))

    def __call__(self, number: int) -> Batch:
        """The batch of a number."""
        chunk, run = self._runs[number]
        rows = self._chunks[chunk]
        if self._read[0] != chunk:
            self._read = (chunk, self._corpus.tokens(self.cells_N[rows]))
        tokens_T, offsets = self._read[1]
        part = slice(int(offsets[run.start]), int(offsets[run.stop]))
        few = packed.truncate(tokens_T[part], offsets[run.start : run.stop + 1] - offsets[run.start], self._max_len)
        return pack_batch([few], self.cells_N[rows[run]])

    def ahead(self) -> Prefetch[Batch]:
        """All batches in order, made in a background thread, in pinned memory where there is a GPU."""
        pin = torch.cuda.is_available()
        return Prefetch(lambda number: self(number).pinned() if pin else self(number), 0, len(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbedPlan:
    """Vectors of one shard of a corpus."""

    config: Config
    """`embed`, `train` (threads, precision, tokens per batch) and whether workers have GPUs."""
    weights: str
    """URI of the checkpoint."""
    version: str
    """Its fingerprint: a process loads the encoder once for all shards."""
    shard: str
    """URI of the shard."""
    sha256: str
    """Of its file; empty = not known."""
    lengths: str
    """Hash of the cells' lengths in the index of the corpus (`hash_lengths`)."""
    cls: bool
    """Whether sentences begin with <cls>."""
    to: str
    """URI of the part."""


def hash_lengths(lengths_N: npt.NDArray[np.int32]) -> str:
    """Hash of the lengths of a shard's sentences."""
    return hashlib.sha256(lengths_N.astype("<i4").tobytes()).hexdigest()[:16]


def plan_shards(config: Config, corpus: Corpus, weights: str, version: str, parts: list[str]) -> list[EmbedPlan]:
    """Plans of all shards of a corpus.

    Args:
        config: see `EmbedPlan`.
        corpus: the corpus.
        weights: URI of the checkpoint.
        version: its fingerprint.
        parts: URI of the part of each shard.
    """
    lengths = [corpus.lengths_N[a:b] for a, b in zip(corpus.starts[:-1], corpus.starts[1:], strict=True)]
    return [
        EmbedPlan(
            config=config, weights=weights, version=version, shard=corpus.shard_uri(i),
            sha256=str(corpus.shards[i].get("sha256", "")), lengths=hash_lengths(lengths[i]),
            cls=corpus.cls, to=part,
        )
        for i, part in enumerate(parts)
    ]  # fmt: skip


@lru_cache(maxsize=1)
def _loaded(weights: str, version: str, gpus: float) -> Encoder:
    del version
    return checkpoint.load_encoder(weights, pick_device(gpus))[0]


def read_sentences(plan: EmbedPlan) -> Iterator[pa.Table]:
    """Read: sentences of a shard, column `tokens`, one table per row group."""
    lengths = []
    for table in tables.read_row_groups(plan.shard, ["tokens"], sha256=plan.sha256):
        lengths.append(table["tokens"].combine_chunks().value_lengths().to_numpy())
        yield table
    if hash_lengths(np.concatenate(lengths)) != plan.lengths:
        msg = f"{plan.shard}: does not fit index.parquet of its corpus; restore it"
        raise UserError(msg)


def embed_sentences(sentences: Iterator[pa.Table], plan: EmbedPlan) -> Iterator[pa.Table]:
    """Transform: sentences to vectors, column `vector` (fixed-size list of float32).

    On a GPU the last bits of a vector depend on the cells beside it, so rows are taken in groups, however they come.
    """
    settings = plan.config
    torch.set_num_threads(settings.train.threads)
    encoder = _loaded(plan.weights, plan.version, settings.compute.gpus_per_worker)
    precision = settings.train.precision if encoder.tokens.is_cuda else "fp32"
    for table in regroup(sentences, _FETCH_CELLS):
        tokens = table["tokens"].combine_chunks()
        lengths_N = tokens.value_lengths().to_numpy()
        block = Sentences(
            start=0, tokens_T=tokens.flatten().to_numpy(), offsets_N1=packed.offsets_of(lengths_N), cls=plan.cls,
            genes_N=lengths_N - int(plan.cls),
        )  # fmt: skip
        vectors_ND = embed_cells(
            encoder, block, np.arange(len(lengths_N)), settings.embed.pooling, settings.embed.layer,
            settings.train.micro_tokens, precision=precision,
        )  # fmt: skip
        flat = pa.array(vectors_ND.reshape(-1), pa.float32())
        yield pa.table({"vector": pa.FixedSizeListArray.from_arrays(flat, vectors_ND.shape[1])})


def write_vectors(vectors: Iterator[pa.Table], plan: EmbedPlan) -> None:
    """Write: the part, a Parquet file."""
    tables.write_table(plan.to, pa.concat_tables(vectors).combine_chunks())


embed_shard = Pipeline(
    name="embed_shard", source="Corpus", read=read_sentences, steps=(embed_sentences,), write=write_vectors
)
"""Vectors of a shard's cells, float32 (N, D), as column `vector` of a Parquet file. Takes an `EmbedPlan`."""

"""Embed cells with a frozen encoder; `embed_shard` does it for one shard of a corpus.

On a CPU each cell is computed alone, so its vector does not depend on the other cells, to the bit. On a GPU cells of
similar length are packed up to a number of tokens.

Shapes: N requested cells, D width of a vector, T packed tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from mixgf.config.run import Config
from mixgf.config.training import LayerChoice
from mixgf.corpus import packed
from mixgf.corpus.in_memory import Sentences
from mixgf.corpus.reader import Corpus
from mixgf.corpus.shards import regroup
from mixgf.encoder import checkpoint
from mixgf.encoder.batch import pack_batch, split_micro_batches
from mixgf.encoder.bert import Encoder, cell_vectors, vector_width
from mixgf.encoder.device import pick_device
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
    device = encoder.tokens.device
    max_len = min(max_len or encoder.sizes.max_positions, encoder.sizes.max_positions)
    out_ND = np.empty((len(cells_N), vector_width(encoder.sizes, layer)), dtype=np.float32)
    by_shard = np.argsort(cells_N, kind="stable")  # shards are read once, in order
    was_training = encoder.training
    encoder.eval()
    for start in range(0, len(cells_N), _FETCH_CELLS):
        chunk = by_shard[start : start + _FETCH_CELLS]
        chunk = chunk[np.argsort(-corpus.lengths_N[cells_N[chunk]], kind="stable")]
        lengths = corpus.lengths_N[cells_N[chunk]]
        runs = (
            [slice(i, i + 1) for i in range(len(chunk))]
            if device.type == "cpu"
            else split_micro_batches(lengths, micro_tokens)
        )
        tokens_T, offsets = corpus.tokens(cells_N[chunk])
        for run in runs:
            part = slice(int(offsets[run.start]), int(offsets[run.stop]))
            few = packed.truncate(tokens_T[part], offsets[run.start : run.stop + 1] - offsets[run.start], max_len)
            batch = pack_batch([few], cells_N[chunk[run]]).to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
                v_BD = cell_vectors(
                    encoder, batch.ids_T, batch.offsets_B1, pooling, layer=layer, cls=corpus.cls,
                    positions_T=batch.positions_T, max_len=batch.max_len,
                )  # fmt: skip
            out_ND[chunk[run]] = v_BD.float().cpu().numpy()
    encoder.train(was_training)
    return out_ND


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

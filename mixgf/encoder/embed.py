"""Embed cells with a frozen encoder.

On a CPU each cell is computed alone, so its vector does not depend on the other cells, to the bit. On a GPU cells of
similar length are packed up to a number of tokens.

Shapes: N requested cells, D width of a vector, T packed tokens.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from mixgf.config.run import Config
from mixgf.config.training import LayerChoice
from mixgf.corpus import packed
from mixgf.corpus.reader import Corpus
from mixgf.encoder import checkpoint
from mixgf.encoder.batch import pack_batch, split_micro_batches
from mixgf.encoder.bert import Encoder, cell_vectors, vector_width
from mixgf.encoder.device import pick_device
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
        """SentenceSource of the given cells, packed, and their offsets."""
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


class ShardEmbedder:
    """A worker that embeds shards of a corpus: it holds the encoder on its device, and one open shard.

    Args:
        config: `embed`, `train` (threads, precision, tokens per batch) and whether workers have GPUs.
        corpus: URI of the corpus.
        weights: URI of the checkpoint.
    """

    def __init__(self, config: Config, corpus: str, weights: str) -> None:
        torch.set_num_threads(config.train.threads)
        self.config, self.corpus = config, Corpus(corpus, cached_shards=1)
        self.encoder, _ = checkpoint.load_encoder(weights, pick_device(config.compute.gpus_per_worker))

    def embed(self, shard: int, uri: str) -> None:
        """Write the vectors of a shard's cells, float32 (N, D), as column `vector` of a Parquet file."""
        cells, settings = np.arange(self.corpus.starts[shard], self.corpus.starts[shard + 1]), self.config
        precision = settings.train.precision if self.encoder.tokens.is_cuda else "fp32"
        vectors_ND = embed_cells(
            self.encoder, self.corpus, cells, settings.embed.pooling, settings.embed.layer, settings.train.micro_tokens,
            precision=precision,
        )  # fmt: skip
        flat = pa.array(vectors_ND.reshape(-1), pa.float32())
        column = pa.FixedSizeListArray.from_arrays(flat, vectors_ND.shape[1])
        tables.write_table(uri, pa.table({"vector": column}))

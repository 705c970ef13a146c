"""Cells to vectors with a frozen encoder.

On a CPU every cell is computed alone, so its vector is bitwise the same whatever else is asked for. On a GPU cells are
packed by length up to a token budget.

Shapes: N cells asked for, D width of a vector, T packed tokens.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from mixgf.config.training import LayerChoice
from mixgf.corpus import packed
from mixgf.encoder.batch import micro_batches, pack
from mixgf.encoder.bert import Encoder, pooled, width

_FETCH_CELLS = 4096


class Sentences(Protocol):
    """Where sentences are: a `dataset.Corpus`, or some held in memory."""

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
    corpus: Sentences,
    cells: npt.ArrayLike,
    pooling: str = "mean",
    layer: LayerChoice = -1,
    micro_tokens: int = 65_536,
    *,
    max_len: int = 0,
    precision: str = "fp32",
) -> npt.NDArray[np.float32]:
    """Vectors of the given cells in the given order, (N, D).

    Args:
        encoder: trained or not, on the device that computes.
        corpus: where the sentences are.
        cells: global cell numbers.
        pooling: `mean` over genes, `first` or `cls`.
        layer: -1 = the last hidden layer, -2 = the one before it, ...; `all` = all side by side, the embedding first.
        micro_tokens: most tokens of one forward pass on a GPU.
        max_len: cut sentences to so many tokens; 0 = to as many as the encoder has positions, which is also the most.
        precision: `fp32`, or `bf16` (autocast).
    """
    cells_N = np.asarray(cells, dtype=np.int64)
    device = encoder.tokens.device
    max_len = min(max_len or encoder.row.max_positions, encoder.row.max_positions)
    out_ND = np.empty((len(cells_N), width(encoder.row, layer)), dtype=np.float32)
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
            else micro_batches(lengths, micro_tokens)
        )
        tokens_T, offsets = corpus.tokens(cells_N[chunk])
        for run in runs:
            part = slice(int(offsets[run.start]), int(offsets[run.stop]))
            few = packed.truncate(tokens_T[part], offsets[run.start : run.stop + 1] - offsets[run.start], max_len)
            batch = pack([few], cells_N[chunk[run]]).to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
                v_BD = pooled(
                    encoder, batch.ids_T, batch.offsets_B1, pooling, layer=layer, cls=corpus.cls,
                    positions_T=batch.positions_T, max_len=batch.max_len,
                )  # fmt: skip
            out_ND[chunk[run]] = v_BD.float().cpu().numpy()
    encoder.train(was_training)
    return out_ND

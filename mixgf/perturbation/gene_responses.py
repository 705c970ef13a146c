"""Responses of other genes to a perturbation: how far their contextual embeddings move (the published "gene shifts").

The response of a gene is the mean of 1 - cos(before, after) of its hidden state. The mean is over the scored cells whose
sentence holds the gene before and after. States and goals play no part.

Most of the response is due to rank: a deletion moves every later gene up, and that changes its hidden state by orders of
magnitude more than attention does. The mean over the cells in which the responding gene keeps its rank (`same_rank`) is
therefore given as well. Some genes move all others, and some are moved by all. `specific_responses` removes both.

Responding genes are the `perturb.response` genes in most of the perturbed cells; a pair takes about 15 bytes on disk.

Letters: T packed tokens, S perturbed sentences, K perturbed targets, R responding genes, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from mixgf.arrays import Float64s, Ints
from mixgf.perturbation.group_design import Design
from mixgf.perturbation.operations import EditedSentences
from mixgf.perturbation.shift import ShiftScorer, UnperturbedCells

MIN_CELLS = 5
"""Fewest same_rank cells of a pair that `specific_responses` speaks of."""
SMALLEST = 1e-12
"""Smaller changes are rounding errors."""
_PART = pa.schema([
    ("target", pa.int32()), ("column", pa.int32()), ("num_cells", pa.int32()), ("sum", pa.float64()), ("squares", pa.float64()),
    ("num_same_rank", pa.int32()), ("same_rank", pa.float64()),
])  # fmt: skip
FIELDS = ("num_KR", "sum_KR", "squares_KR", "num_same_rank_KR", "same_rank_KR")


@dataclass(frozen=True, kw_only=True, slots=True)
class ResponseSums:
    """Sums over cells, by target and responding gene: number, sum and sum of squares of the changes."""

    num_KR: NDArray[np.int64]
    sum_KR: Float64s
    squares_KR: Float64s
    num_same_rank_KR: NDArray[np.int64]
    same_rank_KR: Float64s
    """Sum (and, above, number) over the cells in which the responding gene keeps its rank."""

    @classmethod
    def zeros(cls, num_targets: int, num_columns: int) -> ResponseSums:
        """Sums over no cells."""
        shape = (num_targets, num_columns)
        num, total = np.zeros(shape, dtype=np.int64), np.zeros(shape)
        return cls(
            num_KR=num, sum_KR=total, squares_KR=total.copy(), num_same_rank_KR=num.copy(), same_rank_KR=total.copy()
        )

    def part(self, targets_K: Ints) -> pa.Table:
        """Table of the pairs that occur: number of the target, number of the responding gene, and the sums."""
        k, r = np.nonzero(self.num_KR)
        values = (targets_K[k], r, *(getattr(self, name)[k, r] for name in FIELDS))
        return pa.table([pa.array(v, f.type) for v, f in zip(values, _PART, strict=True)], schema=_PART)


class ResponseAccumulator:
    """Observer of `ShiftScorer.score` that adds up the responses of other genes.

    Args:
        original: the unperturbed cells.
        cells_S: cell of which each sentence is a copy.
        targets_S: target of each sentence, 0 to `num_targets` - 1.
        num_targets: number of targets.
        tokens_R: tokens of the responding genes.
    """

    def __init__(
        self, original: UnperturbedCells, cells_S: Tensor, targets_S: Tensor, *, num_targets: int, tokens_R: Ints
    ) -> None:
        self.original, self.cells_S, self.targets_S = original, cells_S, targets_S
        device = original.ids_T.device
        size = int(max(int(original.ids_T.max()), int(tokens_R.max()))) + 1
        self.column_V = torch.full((size,), -1, dtype=torch.int64, device=device)
        self.column_V[torch.from_numpy(tokens_R).to(device)] = torch.arange(len(tokens_R), device=device)
        lengths_B = torch.diff(original.offsets_B1)
        cell_T = torch.repeat_interleave(torch.arange(len(lengths_B), device=device), lengths_B)
        self.place_BV = torch.full((len(lengths_B), size), -1, dtype=torch.int64, device=device)
        self.place_BV[cell_T, original.ids_T] = torch.arange(len(cell_T), device=device)
        self._start_B = original.offsets_B1[:-1]
        self._sums = ResponseSums.zeros(num_targets, len(tokens_R))

    def __call__(self, edited: EditedSentences, hidden_TD: Tensor, start: int) -> None:
        """Add the responses of a batch of perturbed sentences, of which the first has number `start`."""
        lengths = torch.diff(edited.offsets_S1)
        sentence_T = start + torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        known_T = edited.ids_T < len(self.column_V)  # an inserted gene may have a larger id
        known_T[edited.hits_H] = False  # perturbed genes do not count as responding
        ids_T = torch.where(known_T, edited.ids_T, 0)
        before_T = self.place_BV[self.cells_S[sentence_T], ids_T]
        kept_T = known_T & (before_T >= 0) & (self.column_V[ids_T] >= 0)
        before_N, sentence_N = before_T[kept_T], sentence_T[kept_T]
        after, before = hidden_TD[kept_T].double(), self.original.hidden_TD[before_N].double()
        change = (1 - torch.nn.functional.cosine_similarity(after, before, dim=1, eps=1e-300)).cpu().numpy()
        place_N = torch.nonzero(kept_T).squeeze(1) - edited.offsets_S1[sentence_N - start]
        same_rank = (place_N == before_N - self._start_B[self.cells_S[sentence_N]]).cpu().numpy()
        shape = self._sums.num_KR.shape
        pair = self.targets_S[sentence_N] * shape[1] + self.column_V[ids_T[kept_T]]
        pair_N = pair.cpu().numpy()  # summed here, in the order of the tokens: the same sums on any device
        weights = (None, change, change**2, same_rank.astype(np.float64), same_rank * change)
        for name, weight in zip(FIELDS, weights, strict=True):
            held = getattr(self._sums, name)
            held += np.bincount(pair_N, weights=weight, minlength=held.size).reshape(shape).astype(held.dtype)

    def sums(self) -> ResponseSums:
        """Sums over all batches so far."""
        return self._sums


def measure_responses(  # noqa: PLR0917 (those of ShiftScorer.score)
    scorer: ShiftScorer, original: UnperturbedCells, cells_S: Tensor, genes_SM: Tensor, targets_S: Tensor, operation: str, tokens_R: Ints
) -> ResponseSums:  # fmt: skip
    """Perturb copies of cells and sum the responses; arguments as for `ShiftScorer.score` and `ResponseAccumulator`."""
    num = int(targets_S.max()) + 1 if len(targets_S) else 0
    responses = ResponseAccumulator(original, cells_S, targets_S, num_targets=num, tokens_R=tokens_R)
    none = torch.empty(0, original.hidden_TD.shape[1], dtype=torch.float64)
    scorer.score(original, cells_S, genes_SM, operation, none, observer=responses)
    return responses.sums()


def response_table(parts: dict[str, list[pa.Table]], plan: Design) -> pa.Table:
    """Response matrix in long form: one row per operation, perturbed gene and responding gene that share a cell.

    Columns: operation, gene, symbol, responding, responding_symbol, num_cells, change (mean of 1 - cos), sd (over cells,
    NaN for one cell), num_same_rank, change_same_rank (mean over the cells in which the responding gene keeps its rank).
    Parts are added in the given order, so that the sums do not depend on which task finished first.
    """
    tables = []
    for operation, found in parts.items():
        sums = ResponseSums.zeros(len(plan.targets), len(plan.responding))
        for part in found:
            at = part["target"].to_numpy(), part["column"].to_numpy()
            for name, field in zip(FIELDS, _PART.names[2:], strict=True):
                getattr(sums, name)[at] += part[field].to_numpy()
        k, r = np.nonzero(sums.num_KR)
        num = sums.num_KR[k, r]
        mean = sums.sum_KR[k, r] / num
        with np.errstate(invalid="ignore", divide="ignore"):
            sd = np.sqrt(np.maximum(sums.squares_KR[k, r] - num * mean**2, 0) / (num - 1))
            same_rank = sums.same_rank_KR[k, r] / sums.num_same_rank_KR[k, r]
        names = {
            "gene": ([t.gene for t in plan.targets], k), "symbol": ([t.symbol for t in plan.targets], k),
            "responding": ([t.gene for t in plan.responding], r), "responding_symbol": ([t.symbol for t in plan.responding], r),
        }  # fmt: skip
        columns = {"operation": pa.DictionaryArray.from_arrays(pa.array(np.zeros(len(k), dtype=np.int32)), [operation])}
        columns |= {
            name: pa.DictionaryArray.from_arrays(pa.array(at, pa.int32()), values)
            for name, (values, at) in names.items()
        }
        columns |= {
            "num_cells": pa.array(num, pa.int32()), "change": pa.array(mean, pa.float32()), "sd": pa.array(sd, pa.float32()),
            "num_same_rank": pa.array(sums.num_same_rank_KR[k, r], pa.int32()), "change_same_rank": pa.array(same_rank, pa.float32()),
        }  # fmt: skip
        tables.append(pa.table(columns))
    return pa.concat_tables(tables).unify_dictionaries()


FORMER_COLUMNS = {"num_still": "num_same_rank", "change_still": "change_same_rank"}
"""Columns of response matrices of earlier versions, and their present names."""


def specific_responses(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of one operation with at least `MIN_CELLS` cells of the same rank, with the further column `excess`.

    `excess` is log2 of `change_same_rank`, minus the perturbed gene's median, minus the responding gene's median of the
    remainder.
    """
    frame = frame.rename(columns=FORMER_COLUMNS)
    kept = frame[frame["num_same_rank"] >= MIN_CELLS].copy()
    logs = np.log2(np.maximum(kept["change_same_rank"].astype(float), SMALLEST))
    left = logs - logs.groupby(kept["gene"].astype(str)).transform("median")
    kept["excess"] = left - left.groupby(kept["responding"].astype(str)).transform("median")
    return kept

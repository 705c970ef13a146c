"""How far perturbations move cells: change of the cosine similarity of embeddings (paper section 4.2).

Letters: B cells, T packed tokens, D width, S perturbed sentences, M genes perturbed together, K states.

Variants of a cell's embedding (`perturb.variant`), named in every output:

| name | embedding of a cell, before and after |
|---|---|
| `remaining` | mean over the genes other than the perturbed ones (paper, published V1) |
| `all` | mean over all positions, <cls> included (published V2) |
| `cls` | the vector of <cls> |

The shift towards a state G is `cos(after, G) - cos(before, G)`; without a goal it is `1 - cos(before, after)`. Only the
layers up to the chosen one are run, without the masked-gene head. Vectors are summed and compared in float64, as shifts
are small differences of numbers near 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from mixgf.encoder.bert import Encoder
from mixgf.perturbation import operations

VARIANTS = ("remaining", "all", "cls")
Observer: TypeAlias = Callable[[operations.EditedSentences, Tensor, int], None]
"""Called with perturbed sentences, their hidden states (T, D), and the number of the first sentence."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UnperturbedCells:
    """Unperturbed cells with their hidden states, used for all perturbations of them."""

    ids_T: Tensor
    offsets_B1: Tensor
    hidden_TD: Tensor
    sum_BD: Tensor
    """Sum over the positions that the variant averages, float64; for `cls` the vector itself."""
    count_B: Tensor
    """Number of these positions, float64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Shifts:
    """Effects of S perturbed sentences."""

    response_S: Tensor
    """1 - cos(before, after), float64."""
    shift_SK: Tensor
    """cos(after, state) - cos(before, state), float64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShiftScorer:
    """Scores perturbations of cells with one encoder, one variant of embedding and one layer."""

    encoder: Encoder
    variant: str = "remaining"
    layers: int | None = None
    """Layers to run; None = all."""
    lead: int = 0
    """Special tokens before the genes: 1 with <cls>, else 0."""
    max_len: int = 2048
    rank_share: float = 0.25
    micro_tokens: int = 16_384
    """Most tokens in one forward pass."""
    precision: str = "fp32"
    """`fp32` or `bf16` (autocast)."""

    def __post_init__(self) -> None:
        assert self.variant in VARIANTS, self.variant
        assert self.variant != "cls" or self.lead == 1, "the cls variant needs sentences with <cls>"

    @property
    def device(self) -> torch.device:
        """Device of the encoder."""
        return self.encoder.tokens.device

    def autocast(self) -> torch.autocast:
        """Autocast context of a pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def hidden(self, ids_T: Tensor, offsets_B1: Tensor) -> Tensor:
        """Hidden states of one batch after `layers` layers, (T, D)."""
        with torch.no_grad(), self.autocast():
            return self.encoder(ids_T, offsets_B1.int(), layers=self.layers)

    def encode_cells(self, ids_T: Tensor, offsets_B1: Tensor) -> UnperturbedCells:
        """Encode unperturbed cells; the tokens may be on any device."""
        bounds, lengths = offsets_B1.tolist(), torch.diff(offsets_B1).tolist()
        ids_T, offsets_B1 = ids_T.to(self.device).long(), offsets_B1.to(self.device).long()
        parts = [
            self.hidden(ids_T[bounds[a] : bounds[b]], offsets_B1[a : b + 1] - offsets_B1[a])
            for a, b in _ranges(lengths, self.micro_tokens)
        ]
        hidden_TD = torch.cat(parts)
        sum_BD, count_B = self.sums(hidden_TD, offsets_B1)
        return UnperturbedCells(ids_T=ids_T, offsets_B1=offsets_B1, hidden_TD=hidden_TD, sum_BD=sum_BD, count_B=count_B)

    def vectors(self, ids_T: Tensor, offsets_B1: Tensor) -> Tensor:
        """Embeddings of unperturbed cells, float64 (B, D)."""
        original = self.encode_cells(ids_T, offsets_B1)
        return original.sum_BD / original.count_B[:, None]

    def score(
        self,
        original: UnperturbedCells,
        cells_S: Tensor,
        genes_SM: Tensor,
        operation: str,
        states_KD: Tensor,
        *,
        observer: Observer | None = None,
    ) -> Shifts:
        """Perturb copies of cells and score the change.

        Args:
            original: the unperturbed cells.
            cells_S: cell of which each sentence is a copy.
            genes_SM: genes perturbed in each sentence, as in `operations.edit_sentences`.
            operation: one of `operations.OPERATIONS`.
            states_KD: state embeddings, float64.
            observer: called with every batch of perturbed sentences.
        """
        lengths = (torch.diff(original.offsets_B1)[cells_S] + genes_SM.shape[1]).tolist()
        states_KD = states_KD.to(self.device, torch.float64)
        parts = [
            self._score(original, cells_S[a:b], genes_SM[a:b], operation, states_KD, observer, a)
            for a, b in _ranges(lengths, self.micro_tokens)
        ]
        if not parts:
            none = torch.empty(0, dtype=torch.float64)
            return Shifts(response_S=none, shift_SK=none.new_empty(0, len(states_KD)))
        return Shifts(
            response_S=torch.cat([part.response_S for part in parts]).cpu(),
            shift_SK=torch.cat([part.shift_SK for part in parts]).cpu(),
        )

    def _score(  # noqa: PLR0917 (the arguments of one caller)
        self,
        original: UnperturbedCells,
        cells_S: Tensor,
        genes_SM: Tensor,
        operation: str,
        states_KD: Tensor,
        observer: Observer | None,
        start: int,
    ) -> Shifts:
        edited = operations.edit_sentences(
            original.ids_T,
            original.offsets_B1,
            cells_S,
            genes_SM,
            operation,
            max_len=self.max_len,
            lead=self.lead,
            rank_share=self.rank_share,
        )
        hidden_TD = self.hidden(edited.ids_T, edited.offsets_S1)
        if observer is not None:
            observer(edited, hidden_TD, start)
        after_SD, after_S = self.sums(hidden_TD, edited.offsets_S1)
        before_SD, before_S = original.sum_BD[cells_S], original.count_B[cells_S]
        if self.variant == "remaining":
            after_SD, after_S = _remove_positions(after_SD, after_S, hidden_TD[edited.hits_H], edited.hit_sentences_H)
            before_SD, before_S = _remove_positions(
                before_SD, before_S, original.hidden_TD[edited.sources_H], edited.source_sentences_H
            )
        after_SD, before_SD = after_SD / after_S[:, None], before_SD / before_S[:, None]
        response_S = 1 - (_unit(after_SD) * _unit(before_SD)).sum(1)
        shift_SK = (_unit(after_SD) - _unit(before_SD)) @ _unit(states_KD).T
        return Shifts(response_S=response_S, shift_SK=shift_SK)

    def sums(self, hidden_TD: Tensor, offsets_B1: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over the positions of the variant, and their number, both float64."""
        starts_B, lengths_B = offsets_B1[:-1], torch.diff(offsets_B1)
        if self.variant == "cls":
            return hidden_TD[starts_B].double(), torch.ones_like(lengths_B, dtype=torch.float64)
        sum_BD = torch.segment_reduce(hidden_TD.double(), "sum", lengths=lengths_B, axis=0, unsafe=True)
        count_B = lengths_B.double()
        if self.variant == "remaining" and self.lead:
            sum_BD, count_B = sum_BD - hidden_TD[starts_B].double(), count_B - 1
        return sum_BD, count_B


def _remove_positions(sum_SD: Tensor, count_S: Tensor, hidden_HD: Tensor, sentence_H: Tensor) -> tuple[Tensor, Tensor]:
    """Remove positions from sums and counts; a sentence without other positions gets a zero vector."""
    sum_SD = sum_SD.index_add(0, sentence_H, hidden_HD.double(), alpha=-1)
    count_S = count_S - torch.bincount(sentence_H, minlength=len(count_S))
    return sum_SD * (count_S > 0)[:, None], count_S.clamp(min=1)


def _unit(x_SD: Tensor) -> Tensor:
    return torch.nn.functional.normalize(x_SD, dim=1, eps=1e-300)


def _ranges(lengths: list[int], limit: int) -> Iterator[tuple[int, int]]:
    """Consecutive ranges of sentences with at most `limit` tokens; a longer sentence is a range of its own."""
    start = total = 0
    for i, length in enumerate(lengths):
        if i > start and total + length > limit:
            yield start, i
            start, total = i, 0
        total += length
    if start < len(lengths):
        yield start, len(lengths)

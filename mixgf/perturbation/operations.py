"""Perturbations as edits of cell sentences (paper section 4.2).

Cells come packed, as `ids_T` with `offsets_B1`. One call edits many sentences, each a copy of one cell with its own
perturbed genes, without a loop over sentences, on the device of the tokens. No model is needed.

Letters: B cells, T packed tokens, S perturbed sentences, X their source tokens, M genes perturbed together, H hits.

Operations, for a gene at rank r (0 = top) of the n genes of a sentence:

| name | does | absent gene |
|---|---|---|
| `delete` | removes it; later genes move up | identity |
| `overexpress` | moves or inserts it at the front, after <cls>; cut to max_len | inserted |
| `inhibit` | moves it down by floor(rank_share * n) ranks, at least 1, at most to the end | identity |
| `activate` | moves it up likewise, at most to the front | identity |

All other genes keep their order. Genes of one set are perturbed together: `overexpress` puts them at the front in the
given order; `inhibit` and `activate` move each by its share, as if applied one by one (the lowest or the highest first).
The published code differs: it skips the top gene in "overexpress all", appends the gene for every `inhibit`, and returns
the sentence unchanged for `activate`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

OPERATIONS = ("delete", "overexpress", "inhibit", "activate")
NO_GENE = -1
"""Padding of the rows of smaller gene sets."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EditedSentences:
    """Perturbed sentences, packed, and the positions of the perturbed genes before and after."""

    ids_T: Tensor
    """int64."""
    offsets_S1: Tensor
    """int64: offsets of the sentences."""
    hits_H: Tensor
    """Positions in ids_T of perturbed genes; none after `delete`."""
    hit_sentences_H: Tensor
    """Sentence of each of `hits_H`."""
    sources_H: Tensor
    """Positions in the unperturbed ids_T of the perturbed genes that the cell has."""
    source_sentences_H: Tensor
    """Sentence of each of `sources_H`."""


def gene_ranks(ids_T: Tensor, offsets_B1: Tensor, genes_K: Tensor, *, lead: int = 0) -> Tensor:
    """Rank (0 = top gene) of every gene in every cell, int64 (B, K); -1 = not in the sentence.

    Args:
        ids_T: packed token ids.
        offsets_B1: offsets of the cells.
        genes_K: token ids to look up.
        lead: special tokens before the genes: 1 with <cls>, else 0.
    """
    num_cells = offsets_B1.shape[0] - 1
    size = int(torch.stack([ids_T.max(), genes_K.max()]).max()) + 1
    table_BV = torch.full((num_cells, size), -1, dtype=torch.int64, device=ids_T.device)
    cell_T, place_T = _token_positions(torch.diff(offsets_B1))
    table_BV[cell_T, ids_T] = place_T - lead
    return table_BV[:, genes_K]


def edit_sentences(
    ids_T: Tensor,
    offsets_B1: Tensor,
    cells_S: Tensor,
    genes_SM: Tensor,
    operation: str,
    *,
    max_len: int,
    lead: int = 0,
    rank_share: float = 0.25,
) -> EditedSentences:
    """Apply one operation to many copies of a block's cells.

    Args:
        ids_T: packed token ids of the unperturbed cells, int64.
        offsets_B1: offsets of the cells, int64.
        cells_S: cell of which each sentence is a copy.
        genes_SM: distinct token ids perturbed together in each sentence; smaller sets are padded with `NO_GENE`.
        operation: one of `OPERATIONS`.
        max_len: longest sentence, <cls> included; only `overexpress` lengthens sentences.
        lead: special tokens before the genes: 1 with <cls>, else 0.
        rank_share: number of ranks by which `inhibit` and `activate` move a gene, as a share of the sentence's genes.
    """
    assert operation in OPERATIONS, operation
    lengths_S = torch.diff(offsets_B1)[cells_S]
    sentence_X, place_X = _token_positions(lengths_S)
    source_X = offsets_B1[:-1][cells_S][sentence_X] + place_X
    ids_X = ids_T[source_X]
    hit_X = torch.zeros_like(ids_X, dtype=torch.bool)
    for genes_S in genes_SM.unbind(1):
        hit_X |= ids_X == genes_S[sentence_X]
    hit_sentences = sentence_X[hit_X]
    num_hits_S = torch.bincount(hit_sentences, minlength=len(cells_S))
    if operation == "delete":
        new_lengths_S = lengths_S - num_hits_S
        new_ids, new_hit = ids_X[~hit_X], None
    elif operation == "overexpress":
        new_ids, new_hit, new_lengths_S = _to_front(
            ids_X[~hit_X], lengths_S - num_hits_S, genes_SM, lead=lead, max_len=max_len
        )
    else:
        new_lengths_S = lengths_S
        steps_S = torch.floor((lengths_S - lead).double() * rank_share).long().clamp(min=1)
        steps_H = (steps_S if operation == "inhibit" else -steps_S)[hit_sentences]
        rank_H = _shifted_ranks(hit_sentences, place_X[hit_X] - lead, lengths_S - lead, num_hits_S, steps_H)
        new_hit = _offsets(lengths_S)[hit_sentences] + lead + rank_H
        new_ids = _at_positions(ids_X, hit_X, new_hit)
    if new_hit is None:
        new_hit = new_lengths_S.new_empty(0)
    sentence_T = _token_positions(new_lengths_S)[0]
    return EditedSentences(
        ids_T=new_ids,
        offsets_S1=_offsets(new_lengths_S),
        hits_H=new_hit,
        hit_sentences_H=sentence_T[new_hit],
        sources_H=source_X[hit_X],
        source_sentences_H=hit_sentences,
    )


def _at_positions(ids_X: Tensor, hit_X: Tensor, new_hit: Tensor) -> Tensor:
    """Sentences with the hits at the positions `new_hit`; the other genes fill the rest in their order."""
    is_hit_X = torch.zeros_like(hit_X)
    is_hit_X[new_hit] = True
    new_ids = torch.empty_like(ids_X)
    new_ids[is_hit_X], new_ids[~is_hit_X] = ids_X[hit_X], ids_X[~hit_X]
    return new_ids


def _to_front(
    others: Tensor, num_others_S: Tensor, genes_SM: Tensor, *, lead: int, max_len: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sentences with the perturbed genes in front of all others: ids, positions of the perturbed genes, lengths."""
    assert lead + genes_SM.shape[1] <= max_len, "more genes than a sentence holds"
    given_SM = genes_SM != NO_GENE
    lengths_S = num_others_S + given_SM.sum(1)
    sentence_T, place_T = _token_positions(lengths_S)
    hit_T = (place_T >= lead) & (place_T < lead + given_SM.sum(1)[sentence_T])
    ids_T = torch.empty_like(sentence_T)
    ids_T[hit_T], ids_T[~hit_T] = genes_SM[given_SM], others
    kept_T = place_T < max_len
    return ids_T[kept_T], torch.nonzero(hit_T[kept_T]).squeeze(1), lengths_S.clamp(max=max_len)


def _shifted_ranks(
    sentence_H: Tensor, rank_H: Tensor, num_genes_S: Tensor, num_hits_S: Tensor, steps_H: Tensor
) -> Tensor:
    """Ranks of the hits, moved down by `steps_H` (negative: up) within the sentence; they keep their order."""
    first_H = torch.arange(len(sentence_H), device=sentence_H.device) - _offsets(num_hits_S)[sentence_H]
    last_H = (num_genes_S - num_hits_S)[sentence_H] + first_H
    return torch.minimum(torch.maximum(rank_H + steps_H, first_H), last_H)


def _offsets(lengths_S: Tensor) -> Tensor:
    return torch.nn.functional.pad(torch.cumsum(lengths_S, 0), (1, 0))


def _token_positions(lengths_S: Tensor) -> tuple[Tensor, Tensor]:
    """Sentence of every packed token, and its position in the sentence."""
    sentence_T = torch.repeat_interleave(torch.arange(len(lengths_S), device=lengths_S.device), lengths_S)
    return sentence_T, torch.arange(len(sentence_T), device=lengths_S.device) - _offsets(lengths_S)[sentence_T]

"""Estimates of the shift of every gene's deletion or overexpression in a cell, to choose genes for exact scoring.

Exact scoring takes one pass per gene and cell. The estimate takes a few dozen passes per cell, for all genes together.
The shift towards the goal (`perturbation.shift`) is the sum of four parts:

| part | what changes | how it is computed |
|---|---|---|
| rank shift | genes behind (delete) or before (overexpress) the gene move by one rank | exact at a grid of ranks, linear between |
| removal | no token attends to the gene at its old position | derivative by the log weight of its key: one backward pass |
| insertion | all tokens attend to the gene at the front | the gene's attention in each layer, times the gradient there |
| mean | variant `all` includes the gene's own vector | exact |

A first-order estimate of the rank shift is not enough, as it consists of many small moves that interact. Without a goal
there is no estimate: 1 - cos has no gradient at the unperturbed cell.

Letters: L tokens of the cell, D width, H heads, E width of a head, K genes, R grid of ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mixgf.encoder.bert import Encoder, Layer
from mixgf.perturbation import operations
from mixgf.perturbation.shift import ShiftScorer

OPERATIONS = ("delete", "overexpress")
_SPARE = 8
"""Channels added to every head; the first holds the log weight of the key. Fused kernels need multiples of 8."""
_PROBE_ELEMENTS = 1 << 22
"""Largest number of attention weights of inserted genes in memory at a time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trace:
    """Forward and backward pass of one cell."""

    sum_D: Tensor
    """Sum over the positions of the variant, float64."""
    count: int
    """Number of these positions."""
    hidden_LD: Tensor
    removal_L: Tensor
    """First-order change of the cosine if no token attends to this one."""
    place_grad_LD: Tensor
    """Gradient of the cosine by the position embedding of each token."""
    attention: tuple[tuple[Tensor, ...], ...]
    """By layer: queries, keys, values and output, each (H, L, E), and the gradient of the cosine by the output."""


def estimate(
    scorer: ShiftScorer, ids_L: Tensor, genes_K: Tensor, operation: str, goal_D: Tensor, *, grid: int = 12
) -> Tensor:
    """Estimated shifts of one cell towards the goal, float64 (K,); 0 where `delete` has no gene to delete.

    Args:
        scorer: encoder and variant.
        ids_L: sentence of the cell.
        genes_K: token ids, perturbed one at a time.
        operation: `delete` or `overexpress`.
        goal_D: embedding of the goal state.
        grid: largest number of ranks at which the rank shift is computed exactly.
    """
    assert operation in OPERATIONS, operation
    ids_L, genes_K = ids_L.to(scorer.device).long(), genes_K.to(scorer.device).long()
    goal_D = F.normalize(goal_D.to(scorer.device, torch.float64), dim=0)
    num_genes = len(ids_L) - scorer.lead
    offsets = torch.tensor([0, len(ids_L)], device=scorer.device)
    rank_K = operations.gene_ranks(ids_L, offsets, genes_K, lead=scorer.lead)[0]
    at_K = (rank_K + scorer.lead).clamp(min=0)
    there_K = rank_K >= 0
    places_L = torch.arange(len(ids_L), device=scorer.device)
    base = _trace(scorer, ids_L, places_L, goal_D)
    knots_R = torch.linspace(0, num_genes - 1, min(grid, num_genes), device=scorer.device).round().long()
    step = -1 if operation == "delete" else 1
    moved_R = _rank_shift_cosines(scorer, ids_L, knots_R, step, goal_D) - _cosine(base.sum_D[None], goal_D)
    small_R = _first_order_shifts(scorer, base, step)
    smooth_K = _interpolate(knots_R, moved_R - small_R[knots_R], rank_K.clamp(min=0))
    shift_K = torch.where(there_K, smooth_K + small_R[rank_K.clamp(min=0)], 0.0)
    removal_K = torch.where(there_K, base.removal_L[at_K].double(), 0.0)
    own_KD = torch.where(there_K[:, None], base.hidden_LD[at_K].double(), 0.0)
    after_KD = base.sum_D - own_KD
    if operation == "delete":
        scale = base.count / max(1, base.count - 1) if scorer.variant != "cls" else 1.0
        return shift_K + removal_K * scale + _mean_part(scorer, base.sum_D[None], after_KD, goal_D)
    kept = min(len(ids_L), scorer.max_len - 1)
    front = _trace(scorer, ids_L[:kept], (places_L + (places_L >= scorer.lead))[:kept], goal_D)
    insertion_K, vector_KD = _inserted(scorer, front, genes_K)
    absent = _cosine(front.sum_D[None], goal_D) - _cosine(base.sum_D[None], goal_D)
    shift_K = torch.where(there_K, shift_K, absent)
    before_KD = torch.where(there_K[:, None], base.sum_D, front.sum_D)
    after_KD = torch.where(there_K[:, None], after_KD, front.sum_D) + vector_KD
    return shift_K + removal_K + insertion_K + _mean_part(scorer, before_KD, after_KD, goal_D)


def _mean_part(scorer: ShiftScorer, before_KD: Tensor, after_KD: Tensor, goal_D: Tensor) -> Tensor:
    """Effect of the gene's own vector on the mean over all positions; 0 for the other variants."""
    if scorer.variant != "all":
        return torch.zeros(len(after_KD), dtype=torch.float64, device=after_KD.device)
    return _cosine(after_KD, goal_D) - _cosine(before_KD, goal_D)


def _cosine(x_KD: Tensor, goal_D: Tensor) -> Tensor:
    return F.normalize(x_KD.double(), dim=1, eps=1e-300) @ goal_D


def _rank_shift_cosines(scorer: ShiftScorer, ids_L: Tensor, knots_R: Tensor, step: int, goal_D: Tensor) -> Tensor:
    """Cosine of the cell if the genes behind each rank move up by one (step -1), or those before it down by one (step 1)."""
    length, lead = len(ids_L), scorer.lead
    places_RL = torch.arange(length, device=ids_L.device).expand(len(knots_R), length)
    cut_R1 = knots_R[:, None] + lead
    moves_RL = places_RL > cut_R1 if step < 0 else (places_RL < cut_R1) & (places_RL >= lead)
    places_RL = places_RL + step * moves_RL
    rows = max(1, scorer.micro_tokens // length)
    out = []
    for a, b in pairwise([*range(0, len(knots_R), rows), len(knots_R)]):
        offsets = torch.arange(b - a + 1, device=ids_L.device) * length
        with torch.no_grad(), scorer.autocast():
            h_TD = scorer.encoder(
                ids_L.repeat(b - a), offsets.int(), positions_T=places_RL[a:b].reshape(-1), layers=scorer.layers
            )
        out.append(_cosine(scorer.sums(h_TD, offsets)[0], goal_D))
    return torch.cat(out)


def _first_order_shifts(scorer: ShiftScorer, base: _Trace, step: int) -> Tensor:
    """First-order effect of the moves of `_rank_shift_cosines`, by rank of the gene; used only for differences between ranks."""
    positions_LD = scorer.encoder.positions.detach()[: len(base.place_grad_LD)]
    lead = scorer.lead
    worth_R = (base.place_grad_LD * (torch.roll(positions_LD, -step, 0) - positions_LD)).sum(1).double()[lead:]
    before_R = torch.cumsum(worth_R, 0) - worth_R
    return before_R if step > 0 else worth_R.sum() - worth_R - before_R


def _interpolate(knots_R: Tensor, values_R: Tensor, at_K: Tensor) -> Tensor:
    """Linear interpolation between the knots."""
    right_K = torch.searchsorted(knots_R, at_K).clamp(1, max(1, len(knots_R) - 1))
    if len(knots_R) == 1:
        return values_R[torch.zeros_like(at_K)]
    left_K = right_K - 1
    width_K = (knots_R[right_K] - knots_R[left_K]).clamp(min=1).double()
    share_K = (at_K - knots_R[left_K]).double() / width_K
    return values_R[left_K] + share_K * (values_R[right_K] - values_R[left_K])


def _trace(scorer: ShiftScorer, ids_L: Tensor, places_L: Tensor, goal_D: Tensor) -> _Trace:
    """One forward and one backward pass of a cell."""
    encoder = scorer.encoder
    num_layers = encoder.sizes.num_layers if scorer.layers is None else scorer.layers
    log_weight_L = torch.zeros(len(ids_L), device=ids_L.device, requires_grad=True)
    kept = []
    with torch.enable_grad(), scorer.autocast():
        places_LD = F.embedding(places_L, encoder.positions).detach().requires_grad_()
        h_LD = encoder.norm(F.embedding(ids_L, encoder.tokens) + places_LD)
        for layer in _layers(encoder)[:num_layers]:
            q, k, v = _heads(encoder, layer.qkv(h_LD))
            a = _weighted(q, k, v, log_weight_L)
            kept.append([q, k, v, a])
            h_LD = layer.after_attention(h_LD, a.transpose(0, 1).reshape(len(ids_L), -1).to(h_LD.dtype))
        offsets = torch.tensor([0, len(ids_L)], device=ids_L.device)
        sum_1D, count_1 = scorer.sums(h_LD, offsets)
        cosine = _cosine(sum_1D, goal_D).sum()
    weight_grad, place_grad_LD, *grads = torch.autograd.grad(
        cosine, [log_weight_L, places_LD, *(row[3] for row in kept)]
    )
    return _Trace(
        sum_D=sum_1D[0].detach(),
        count=int(count_1),
        hidden_LD=h_LD.detach(),
        removal_L=-weight_grad,
        place_grad_LD=place_grad_LD,
        attention=tuple(
            (*(x.detach().float() for x in row), grad.float()) for row, grad in zip(kept, grads, strict=True)
        ),
    )


def _layers(encoder: Encoder) -> list[Layer]:
    return [layer for layer in encoder.layers if isinstance(layer, Layer)]


def _heads(encoder: Encoder, x_T3D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values by head, (H, T, E) each."""
    q, k, v = x_T3D.view(len(x_T3D), 3, encoder.sizes.num_heads, -1).permute(1, 2, 0, 3).unbind(0)
    return q, k, v


def _weighted(q: Tensor, k: Tensor, v: Tensor, log_weight_L: Tensor) -> Tensor:
    """Attention in which each key is weighted by exp(log weight), (H, L, E)."""
    H, L, E = q.shape
    spare = q.new_zeros(H, L, _SPARE)
    one = torch.cat([q.new_ones(H, L, 1), spare[..., 1:]], 2)
    weight = (log_weight_L * math.sqrt(E)).to(q.dtype)[None, :, None].expand(H, L, 1)
    keys = torch.cat([k, weight, spare[..., 1:]], 2)
    out = F.scaled_dot_product_attention(
        torch.cat([q, one], 2)[None], keys[None], torch.cat([v, spare], 2)[None], scale=1 / math.sqrt(E)
    )
    return out[0, :, :, :E]


@torch.no_grad()
def _inserted(scorer: ShiftScorer, cell: _Trace, genes_K: Tensor) -> tuple[Tensor, Tensor]:
    """Insert each gene alone in front of a cell: change of the cosine (K,), and the gene's own last vector (K, D).

    In each layer the gene attends to the cell and itself. Each token then attends to the gene, as to one more key of its
    softmax. The gradient by the attention output gives the change of the cosine. The gradient includes the
    effect on later layers; the effect of changed tokens on the gene is left out.
    """
    encoder, lead = scorer.encoder, scorer.lead
    total_K = torch.zeros(len(genes_K), dtype=torch.float64, device=genes_K.device)
    h_KD = encoder.embed_tokens(genes_K, torch.full_like(genes_K, lead))
    H, L, E = cell.attention[0][0].shape if cell.attention else (1, 1, 1)
    rows = max(1, _PROBE_ELEMENTS // (H * L))
    parts = [list(range(a, b)) for a, b in pairwise([*range(0, len(genes_K), rows), len(genes_K)])]
    for layer, (q, k, v, out, grad) in zip(_layers(encoder), cell.attention, strict=False):
        pq, pk, pv = _heads(encoder, layer.qkv(h_KD))
        log_sum = torch.logsumexp(q @ k.transpose(1, 2) / math.sqrt(E), dim=2)
        worth = (grad * out).sum(2, keepdim=True)
        read = []
        for part in parts:
            span = slice(part[0], part[-1] + 1)
            own = (pq[:, span] * pk[:, span]).sum(2, keepdim=True)
            weights = torch.softmax(torch.cat([pq[:, span] @ k.transpose(1, 2), own], 2) / math.sqrt(E), dim=2)
            read.append(weights[..., :-1] @ v + weights[..., -1:] * pv[:, span])
            odds = torch.exp(pk[:, span] @ q.transpose(1, 2) / math.sqrt(E) - log_sum[:, None])
            share = odds / (1 + odds)
            total_K[span] += ((share @ grad * pv[:, span]).sum(2) - (share @ worth)[..., 0]).sum(0).double()
        h_KD = layer.after_attention(h_KD, torch.cat(read, 1).transpose(0, 1).reshape(len(genes_K), H * E))
    return total_K, h_KD.double()

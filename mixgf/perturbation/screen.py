"""Estimates of the shift of every gene's deletion or overexpression in a cell, to choose genes for exact scoring.

Exact scoring takes one pass per gene and cell. The estimate takes a few dozen passes per cell, for all genes together.
The shift towards the goal (`perturbation.shift`) is the sum of four parts:

| part | what changes | how it is computed |
|---|---|---|
| rank shift | genes behind (delete) or before (overexpress) the gene move by one rank | exact at a grid of ranks; between two of them by parts (`_rank_shifts`) |
| removal | no token attends to the gene at its old position | the attention of each layer without its key, times the gradient there |
| insertion | all tokens attend to the gene at the front | the attention of each layer with its key, times the gradient there |
| mean | variant `all` includes the gene's own vector | exact |

The gradients of the cosine by the attention outputs come from one backward pass. They include the effect on later layers.

A first-order estimate of the rank shift is not enough, as it consists of many small moves that interact. Without a goal
there is no estimate: 1 - cos has no gradient at the unperturbed cell.

Letters: L tokens of the cell, D width, H heads, E width of a head, K genes, G ranks of the cell, N tokens that move between
two ranks of the grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from mixgf.encoder.bert import Encoder, Layer
from mixgf.perturbation import operations
from mixgf.perturbation.shift import ShiftScorer

OPERATIONS = ("delete", "overexpress")
_PROBE_ELEMENTS = 1 << 19
"""Largest number of attention weights in memory at a time."""
_LEAST_LEFT = 1e-4
"""Least weight of the other keys when one is taken out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    """Forward pass of one cell."""

    hidden_LD: Tensor
    """After the last layer."""
    keys: tuple[Tensor, ...]
    """By layer, (H, L, E)."""
    values: tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Attention:
    """Attention of one layer, (H, L, E) each."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    output: Tensor
    grad: Tensor
    """Gradient of the cosine by the output."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trace:
    """Forward and backward pass of one cell."""

    sum_D: Tensor
    """Sum over the positions of the variant, float64."""
    count: int
    """Number of these positions."""
    state: _State
    attention: tuple[_Attention, ...]
    """By layer."""


def estimate(
    scorer: ShiftScorer, ids_L: Tensor, genes_K: Tensor, operation: str, goal_D: Tensor, *, grid: int = 2
) -> Tensor:
    """Estimated shifts of one cell towards the goal, float64 (K,); 0 where `delete` has no gene to delete.

    Args:
        scorer: encoder and variant.
        ids_L: sentence of the cell.
        genes_K: token ids, perturbed one at a time.
        operation: `delete` or `overexpress`.
        goal_D: embedding of the goal state.
        grid: largest number of ranks at which the rank shift is computed exactly, at least 2; one of them takes no pass.
    """
    assert operation in OPERATIONS, operation
    ids_L, genes_K = ids_L.to(scorer.device).long(), genes_K.to(scorer.device).long()
    goal_D = F.normalize(goal_D.to(scorer.device, torch.float64), dim=0)
    offsets = torch.tensor([0, len(ids_L)], device=scorer.device)
    rank_K = operations.gene_ranks(ids_L, offsets, genes_K, lead=scorer.lead)[0]
    at_K = (rank_K + scorer.lead).clamp(min=0)
    there_K = rank_K >= 0
    places_L = torch.arange(len(ids_L), device=scorer.device)
    base = _trace(scorer, ids_L, places_L, goal_D)
    moved_G, removal_L = _rank_shifts(scorer, ids_L, base, -1 if operation == "delete" else 1, goal_D, grid)
    shift_K = torch.where(there_K, moved_G[rank_K.clamp(min=0)], 0.0)
    removal_K = torch.where(there_K, removal_L[at_K], 0.0)
    own_KD = torch.where(there_K[:, None], base.state.hidden_LD[at_K].double(), 0.0)
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


def _rank_shifts(  # noqa: PLR0917 (the arguments of one caller)
    scorer: ShiftScorer, ids_L: Tensor, base: _Trace, step: int, goal_D: Tensor, grid: int
) -> tuple[Tensor, Tensor]:
    """Change of the cosine by the moves of ranks (G,), and by the removal of each token from attention (L,), float64.

    Genes behind a rank move up by one (step -1), or those before it down by one (step 1). The pass of the rank at which no
    gene moves is that of the unperturbed cell. From one exact rank to the next (left, right), a token moves with every rank:

    | of | it is |
    |---|---|
    | the vectors of the tokens that move | that of `left` before the token moves, then that of `right` |
    | the vectors of all other tokens | linear between `left` and `right` |
    | what a token does to others | attention with its key and value where it has moved (`_effects`); only the difference from linear counts |
    """
    lead, num_genes = scorer.lead, len(ids_L) - scorer.lead
    shift_G = torch.zeros(num_genes, dtype=torch.float64, device=ids_L.device)
    knots = torch.linspace(0, num_genes - 1, min(max(grid, 2), num_genes)).round().long().tolist()
    none_moves = num_genes - 1 if step < 0 else 0
    places_L = torch.arange(len(ids_L), device=ids_L.device)

    def state(rank: int) -> _State:
        if rank == none_moves:
            return base.state
        moves_L = places_L > rank + lead if step < 0 else (places_L < rank + lead) & (places_L >= lead)
        return _forward(scorer, ids_L, places_L + step * moves_L)

    before = _cosine(base.sum_D[None], goal_D)
    moved = [(layer.keys.clone(), layer.values.clone()) for layer in base.attention]
    spans = []
    for (left, a), (right, b) in pairwise((state(rank), rank) for rank in knots):
        first = lead + (1 if step < 0 else 0)
        span, there = slice(first + a, first + b), left if step < 0 else right
        shift_G[a : b + 1] = _cosine(_sums_between(scorer, left, right, span), goal_D) - before
        for i, (keys, values) in enumerate(moved):
            keys[:, span], values[:, span] = there.keys[i][:, span], there.values[i][:, span]
        spans.append((slice(a, b + 1), span))
    removal_L, effect_L = _effects(base, moved)
    for ranks, span in spans:
        others_N = step * _running(effect_L[span])
        shift_G[ranks] += others_N - _shares(others_N) * others_N[-1]
    return shift_G, removal_L


def _sums_between(scorer: ShiftScorer, left: _State, right: _State, span: slice) -> Tensor:
    """Sums over the positions of the variant at all ranks from one exact rank to the next, (N + 1, D)."""
    left_LD, right_LD = _averaged(scorer, left.hidden_LD), _averaged(scorer, right.hidden_LD)
    own_ND = _running(right_LD[span] - left_LD[span])
    change_D = right_LD.sum(0) - left_LD.sum(0) - own_ND[-1]
    return left_LD.sum(0) + own_ND + _shares(own_ND)[:, None] * change_D


def _shares(x_N: Tensor) -> Tensor:
    """From 0 to 1 in equal steps, as many as `x_N` has rows."""
    return torch.linspace(0, 1, len(x_N), dtype=torch.float64, device=x_N.device)


@torch.no_grad()
def _effects(cell: _Trace, moved: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Change of the cosine if no other token attends to a token, and if it has another key and value, (L,) each, float64.

    Each layer's attention output changes exactly, and the cosine by its gradient. A token's attention to itself is left out.

    Args:
        cell: the unperturbed cell.
        moved: other keys and values by layer, (H, L, E) each.
    """
    removal_L, effect_L = (
        torch.zeros(len(cell.state.hidden_LD), dtype=torch.float64, device=cell.sum_D.device) for _ in range(2)
    )
    for layer, other in zip(cell.attention, moved, strict=True):
        H, L, E = layer.keys.shape
        worth = (layer.grad * layer.output).sum(2, keepdim=True)
        k, v, other_k, other_v = (x.transpose(1, 2) for x in (layer.keys, layer.values, *other))
        rows = max(1, _PROBE_ELEMENTS // (H * L))
        for start in range(0, L, rows):
            part = slice(start, start + rows)
            q, grad, own = layer.queries[:, part] / math.sqrt(E), layer.grad[:, part], -worth[:, part]
            scores = q @ k
            weight = torch.softmax(scores, 2)
            log_sum = scores.amax(2, keepdim=True) - weight.amax(2, keepdim=True).log_()
            other_weight = torch.baddbmm(-log_sum, q, other_k).exp_()
            for one in (weight, other_weight):
                one.diagonal(start, 1, 2).zero_()
            gain = torch.baddbmm(own, grad, v).mul_(weight)
            other_gain = torch.baddbmm(own, grad, other_v).mul_(other_weight).sub_(gain)
            left = weight.neg_().add_(1).clamp_(min=_LEAST_LEFT)
            effect_L += other_gain.div_(other_weight.add_(left)).sum((0, 1)).double()
            removal_L -= gain.div_(left).sum((0, 1)).double()
    return removal_L, effect_L


def _running(x_N: Tensor) -> Tensor:
    """Sums of the first 0, 1, ... N rows."""
    return torch.cat([torch.zeros_like(x_N[:1]), torch.cumsum(x_N, 0)])


def _averaged(scorer: ShiftScorer, hidden_LD: Tensor) -> Tensor:
    """Hidden states, float64, with zeros at positions that the variant does not average."""
    hidden_LD = hidden_LD.double()
    if scorer.variant == "all" or not scorer.lead:
        return hidden_LD
    special_L1 = (torch.arange(len(hidden_LD), device=hidden_LD.device) < scorer.lead)[:, None]
    return hidden_LD * (special_L1 if scorer.variant == "cls" else ~special_L1)


def _forward(scorer: ShiftScorer, ids_L: Tensor, places_L: Tensor) -> _State:
    """One forward pass of a cell with the given positions."""
    with torch.no_grad():
        return _run(scorer, ids_L, places_L)[0]


def _run(scorer: ShiftScorer, ids_L: Tensor, places_L: Tensor) -> tuple[_State, list[tuple[Tensor, Tensor]]]:
    """Forward pass of a cell: its state, and queries and attention output of each layer, (H, L, E)."""
    encoder, state, rest = scorer.encoder, [], []
    with scorer.autocast():
        h_LD = encoder.embed_tokens(ids_L, places_L)
        for layer in _layers(encoder)[: scorer.layers]:
            q, k, v = _heads(encoder, layer.qkv(h_LD))
            a = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
            state.append((k.detach().float(), v.detach().float()))
            rest.append((q, a))
            h_LD = layer.after_attention(h_LD, a.transpose(0, 1).reshape(len(ids_L), -1))
    return _State(hidden_LD=h_LD, keys=tuple(k for k, _ in state), values=tuple(v for _, v in state)), rest


def _trace(scorer: ShiftScorer, ids_L: Tensor, places_L: Tensor, goal_D: Tensor) -> _Trace:
    """One forward and one backward pass of a cell."""
    with torch.enable_grad():
        state, rest = _run(scorer, ids_L, places_L)
        sum_1D, count_1 = scorer.sums(state.hidden_LD, torch.tensor([0, len(ids_L)], device=ids_L.device))
        cosine = _cosine(sum_1D, goal_D).sum()
    grads = torch.autograd.grad(cosine, [a for _, a in rest])
    attention = tuple(
        _Attention(queries=q.detach().float(), keys=k, values=v, output=a.detach().float(), grad=grad.float())
        for (q, a), k, v, grad in zip(rest, state.keys, state.values, grads, strict=True)
    )
    return _Trace(
        sum_D=sum_1D[0].detach(), count=int(count_1), attention=attention, state=replace(state, hidden_LD=state.hidden_LD.detach())
    )  # fmt: skip


def _layers(encoder: Encoder) -> list[Layer]:
    return [layer for layer in encoder.layers if isinstance(layer, Layer)]


def _heads(encoder: Encoder, x_T3D: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values by head, (H, T, E) each."""
    q, k, v = x_T3D.view(len(x_T3D), 3, encoder.sizes.num_heads, -1).permute(1, 2, 0, 3).unbind(0)
    return q, k, v


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
    H, L, E = cell.attention[0].queries.shape if cell.attention else (1, 1, 1)
    rows = max(1, _PROBE_ELEMENTS // (H * L))
    spans = [slice(a, a + rows) for a in range(0, len(genes_K), rows)]
    for layer, seen in zip(_layers(encoder), cell.attention, strict=False):
        v, grad = seen.values, seen.grad
        q, k = (seen.queries / math.sqrt(E)).transpose(1, 2), seen.keys.transpose(1, 2)
        log_sum = torch.logsumexp(q.transpose(1, 2) @ k, dim=2)[:, None]
        worth = (grad * seen.output).sum(2, keepdim=True)
        gene_q, gene_k, gene_v = _heads(encoder, layer.qkv(h_KD))
        gene_q = gene_q / math.sqrt(E)
        own = (gene_q * gene_k).sum(2, keepdim=True)
        read = []
        for span in spans:  # in place, since memory takes more time than the matrix products
            weights = gene_q[:, span] @ k
            top = torch.maximum(weights.amax(2, keepdim=True), own[:, span])
            weights, of_itself = weights.sub_(top).exp_(), (own[:, span] - top).exp()
            total = weights.sum(2, keepdim=True) + of_itself
            read.append((weights @ v + of_itself * gene_v[:, span]) / total)
            share = (gene_k[:, span] @ q).sub_(log_sum).sigmoid_()
            gained = (share @ grad * gene_v[:, span]).sum(2) - (share @ worth)[..., 0]
            total_K[span] += gained.sum(0).double()
        h_KD = layer.after_attention(h_KD, torch.cat(read, 1).transpose(0, 1).reshape(len(genes_K), H * E))
    return total_K, h_KD.double()

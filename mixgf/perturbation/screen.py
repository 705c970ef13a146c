"""Estimates of the shift of every gene's deletion or overexpression in a cell, to choose genes for exact scoring.

Exact scoring takes one pass per gene and cell. The estimate takes a few dozen passes per cell, for all genes together.
The shift towards the goal (`perturbation.shift`) is the sum of four parts:

| part | what changes | how it is computed |
|---|---|---|
| rank shift | genes behind (delete) or before (overexpress) the gene move by one rank | exact at a grid of ranks; between two of them by parts (`_between`) |
| removal | no token attends to the gene at its old position | derivative by the log weight of its key: one backward pass |
| insertion | all tokens attend to the gene at the front | the gene's attention in each layer, times the gradient there |
| mean | variant `all` includes the gene's own vector | exact |

A first-order estimate of the rank shift is not enough, as it consists of many small moves that interact. Without a goal
there is no estimate: 1 - cos has no gradient at the unperturbed cell.

Letters: L tokens of the cell, D width, H heads, E width of a head, K genes, G ranks of the cell, N tokens that move between
two ranks of the grid.
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
_PROBE_ELEMENTS = 1 << 20
"""Largest number of attention weights of inserted genes in memory at a time."""


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
    """Attention of one layer, (H, L, E) each, with gradients of the cosine."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    output: Tensor
    key_grad: Tensor
    value_grad: Tensor
    output_grad: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class _Trace:
    """Forward and backward pass of one cell."""

    sum_D: Tensor
    """Sum over the positions of the variant, float64."""
    count: int
    """Number of these positions."""
    removal_L: Tensor
    """First-order change of the cosine if no token attends to this one."""
    state: _State
    attention: tuple[_Attention, ...]
    """By layer."""


def estimate(
    scorer: ShiftScorer, ids_L: Tensor, genes_K: Tensor, operation: str, goal_D: Tensor, *, grid: int = 3
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
    moved_G = _rank_shifts(scorer, ids_L, base, -1 if operation == "delete" else 1, goal_D, grid)
    shift_K = torch.where(there_K, moved_G[rank_K.clamp(min=0)], 0.0)
    removal_K = torch.where(there_K, base.removal_L[at_K].double(), 0.0)
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
) -> Tensor:
    """Change of the cosine if the genes behind each rank move up by one (step -1), or those before it down by one (step 1), (G,).

    The rank at which no gene moves is one of the grid: its pass is that of the unperturbed cell.
    """
    lead, num_genes = scorer.lead, len(ids_L) - scorer.lead
    shift_G = torch.zeros(num_genes, dtype=torch.float64, device=ids_L.device)
    if num_genes < 2:
        return shift_G
    knots = torch.linspace(0, num_genes - 1, min(grid, num_genes)).round().long().tolist()
    none_moves = num_genes - 1 if step < 0 else 0
    places_L = torch.arange(len(ids_L), device=ids_L.device)

    def state(rank: int) -> _State:
        if rank == none_moves:
            return base.state
        moves_L = places_L > rank + lead if step < 0 else (places_L < rank + lead) & (places_L >= lead)
        return _forward(scorer, ids_L, places_L + step * moves_L)

    before = _cosine(base.sum_D[None], goal_D)
    for (left, a), (right, b) in pairwise((state(rank), rank) for rank in knots):
        first = lead + (1 if step < 0 else 0)
        shift_G[a : b + 1] = _between(scorer, base, left, right, slice(first + a, first + b), goal_D) - before
    return shift_G


def _between(  # noqa: PLR0917 (the arguments of one caller)
    scorer: ShiftScorer, base: _Trace, left: _State, right: _State, span: slice, goal_D: Tensor
) -> Tensor:
    """Cosines of the cell at all ranks from one of the grid to the next, (N + 1,); the first and the last are exact.

    The tokens of `span` go from their position in `left` to that in `right`, one with every rank. Between the two ranks:

    | of | it is |
    |---|---|
    | the vectors of these tokens | that of `left` before the token goes, then that of `right` |
    | the vectors of all other tokens | linear between `left` and `right` |
    | what a token does to others | the change of its keys and values times their gradients; only the difference from linear counts |
    """
    left_LD, right_LD = _averaged(scorer, left.hidden_LD), _averaged(scorer, right.hidden_LD)
    left_ND, right_ND = left_LD[span], right_LD[span]
    share_N = torch.linspace(0, 1, len(left_ND) + 1, dtype=torch.float64, device=left_LD.device)
    own_ND = left_ND.sum(0) + _running(right_ND - left_ND)
    rest_D, change_D = (
        (left_LD.sum(0) - left_ND.sum(0)),
        (right_LD.sum(0) - left_LD.sum(0) - (right_ND - left_ND).sum(0)),
    )
    worth_N = torch.zeros(len(left_ND), dtype=torch.float64, device=left_LD.device)
    for i, layer in enumerate(base.attention):
        keys, values = (right.keys[i] - left.keys[i])[:, span], (right.values[i] - left.values[i])[:, span]
        worth_N += (
            (keys * layer.key_grad[:, span]).sum((0, 2)) + (values * layer.value_grad[:, span]).sum((0, 2))
        ).double()
    others_N = _running(worth_N)
    return _cosine(own_ND + rest_D + share_N[:, None] * change_D, goal_D) + others_N - share_N * others_N[-1]


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
    encoder, kept = scorer.encoder, []
    with torch.no_grad(), scorer.autocast():
        h_LD = encoder.embed_tokens(ids_L, places_L)
        for layer in _layers(encoder)[: scorer.layers]:
            q, k, v = _heads(encoder, layer.qkv(h_LD))
            a = F.scaled_dot_product_attention(q[None], k[None], v[None])[0]
            kept.append((k.float(), v.float()))
            h_LD = layer.after_attention(h_LD, a.transpose(0, 1).reshape(len(ids_L), -1))
    return _State(hidden_LD=h_LD, keys=tuple(k for k, _ in kept), values=tuple(v for _, v in kept))


def _trace(scorer: ShiftScorer, ids_L: Tensor, places_L: Tensor, goal_D: Tensor) -> _Trace:
    """One forward and one backward pass of a cell."""
    encoder = scorer.encoder
    log_weight_L = torch.zeros(len(ids_L), device=ids_L.device, requires_grad=True)
    kept = []
    with torch.enable_grad(), scorer.autocast():
        h_LD = encoder.embed_tokens(ids_L, places_L)
        for layer in _layers(encoder)[: scorer.layers]:
            q, k, v = _heads(encoder, layer.qkv(h_LD))
            a = _weighted(q, k, v, log_weight_L)
            kept.append([q, k, v, a])
            h_LD = layer.after_attention(h_LD, a.transpose(0, 1).reshape(len(ids_L), -1).to(h_LD.dtype))
        offsets = torch.tensor([0, len(ids_L)], device=ids_L.device)
        sum_1D, count_1 = scorer.sums(h_LD, offsets)
        cosine = _cosine(sum_1D, goal_D).sum()
    wanted = [x for row in kept for x in row[1:]]
    weight_grad, *grads = torch.autograd.grad(cosine, [log_weight_L, *wanted])
    attention = []
    for i, row in enumerate(kept):
        q, k, v, a = (x.detach().float() for x in row)
        key, value, output = (x.float() for x in grads[3 * i : 3 * i + 3])
        attention.append(
            _Attention(
                queries=q, keys=k, values=v, output=a, key_grad=key, value_grad=value, output_grad=output,
            )
        )  # fmt: skip
    return _Trace(
        sum_D=sum_1D[0].detach(),
        count=int(count_1),
        removal_L=-weight_grad,
        state=_State(
            hidden_LD=h_LD.detach(),
            keys=tuple(layer.keys for layer in attention),
            values=tuple(layer.values for layer in attention),
        ),
        attention=tuple(attention),
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
    H, L, E = cell.attention[0].queries.shape if cell.attention else (1, 1, 1)
    rows = max(1, _PROBE_ELEMENTS // (H * L))
    spans = [slice(a, a + rows) for a in range(0, len(genes_K), rows)]
    for layer, seen in zip(_layers(encoder), cell.attention, strict=False):
        v, grad = seen.values, seen.output_grad
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

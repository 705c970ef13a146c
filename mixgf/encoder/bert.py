"""The encoder (paper section 3.1, figure 1) and its masked-gene head: BERT over packed cells.

BERT has learned positions and post-norm blocks. All cells of a batch lie one after the other, without padding:
element-wise operations and matrix products work on [T, D], and only attention needs the ends of cells.

Shapes: T packed tokens, B cells, D width, H heads, E width of a head, K scored positions, V vocabulary, L tokens of a cell.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixgf import rng
from mixgf.config import training
from mixgf.errors import UserError
from mixgf.genes.vocabulary import NUM_SPECIALS

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "relu": F.relu, "gelu": F.gelu}
_CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 28}  # largest number of logits in memory at a time


class Linear(nn.Linear):
    """Linear layer without initialisation of its own: `Encoder.initialise` draws the weights."""

    def reset_parameters(self) -> None:
        """Do nothing, so that torch's global random state is not used."""


class Layer(nn.Module):
    """One post-norm transformer block."""

    def __init__(self, sizes: training.Model) -> None:
        super().__init__()
        self.sizes = sizes
        self.qkv = Linear(sizes.dim, 3 * sizes.dim)
        self.out = Linear(sizes.dim, sizes.dim)
        self.norm_attention = nn.LayerNorm(sizes.dim, eps=sizes.norm_eps)
        self.up = Linear(sizes.dim, sizes.ffn_dim)
        self.down = Linear(sizes.ffn_dim, sizes.dim)
        self.norm_ffn = nn.LayerNorm(sizes.dim, eps=sizes.norm_eps)

    def forward(self, h_TD: Tensor, cells: Cells, keys_T: Tensor | None, site: int, queries: Queries | None) -> Tensor:
        sizes = self.sizes
        T, H, E = h_TD.shape[0], sizes.num_heads, sizes.dim // sizes.num_heads
        if queries is None:
            q_RHE, k_THE, v_THE = self.qkv(h_TD).view(T, 3, H, E).unbind(1)
            query_cells = cells
        else:
            weight, bias = self.qkv.weight, self.qkv.bias
            k_THE, v_THE = F.linear(h_TD, weight[sizes.dim :], bias[sizes.dim :]).view(T, 2, H, E).unbind(1)
            at_R, query_cells = queries.at_R, queries.cells
            h_TD, keys_T = h_TD.index_select(0, at_R), None if keys_T is None else keys_T.index_select(0, at_R)
            q_RHE = F.linear(h_TD, weight[: sizes.dim], bias[: sizes.dim]).view(-1, H, E)
        if keys_T is not None and sizes.attention_dropout > 0:
            a_RD = _attend_with_dropout(q_RHE, k_THE, v_THE, query_cells, cells, keys_T, site, sizes.attention_dropout)
        else:
            a_RD = attend(q_RHE, k_THE, v_THE, query_cells, cells)
        return self.after_attention(h_TD, a_RD, keys_T, site)

    def after_attention(self, h_TD: Tensor, a_RD: Tensor, keys_T: Tensor | None = None, site: int = 0) -> Tensor:
        """Output of the block, from its input (T, D) and the output of attention (T, D), heads concatenated."""
        sizes = self.sizes
        h_TD = self.norm_attention(_drop_add(h_TD, self.out(a_RD), sizes.dropout, keys_T, site + 1))
        f_TD = self.down(_ACTIVATIONS[sizes.activation](self.up(h_TD)))
        return self.norm_ffn(_drop_add(h_TD, f_TD, sizes.dropout, keys_T, site + 2))


class Cells:
    """Offsets of the cells of a packed batch, on the device and, if needed, as lengths on the host."""

    def __init__(self, offsets_B1: Tensor, max_len: int | None = None) -> None:
        self.offsets_B1 = offsets_B1.to(torch.int32)
        self._max_len = max_len
        self._lengths: list[int] | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each cell; waits for the device."""
        if self._lengths is None:
            self._lengths = torch.diff(self.offsets_B1).tolist()
        return self._lengths

    @property
    def max_len(self) -> int:
        """Upper bound of the tokens of a cell."""
        return self._max_len if self._max_len is not None else max(self.lengths, default=1)


class Queries:
    """Tokens whose last hidden state is needed (R); the last layer computes only these.

    Args:
        at_R: positions of these tokens among the T packed tokens, ascending.
        offsets_B1: offsets of each cell's queries among the R.
        max_len: upper bound of the queries of a cell.
    """

    def __init__(self, at_R: Tensor, offsets_B1: Tensor, max_len: int | None = None) -> None:
        self.at_R, self.cells = at_R, Cells(offsets_B1, max_len)


def attend(q_RHE: Tensor, k_THE: Tensor, v_THE: Tensor, query_cells: Cells, cells: Cells) -> Tensor:
    """Attention of every query to the tokens of its own cell, (R, H * E).

    In half precision on CUDA it uses torch's variable-length flash attention. Otherwise it uses
    `scaled_dot_product_attention` over consecutive cells of equal length, which needs neither padding nor mask.

    Args:
        q_RHE: queries, cell after cell; of all tokens, or of fewer.
        k_THE: keys of all tokens.
        v_THE: values of all tokens.
        query_cells: offsets of the cells' queries.
        cells: offsets of the cells' tokens.
    """
    R, H, E = q_RHE.shape
    if R == 0:  # no query: only masked genes are needed, and none was chosen
        return q_RHE.reshape(0, H * E)
    if q_RHE.is_cuda and q_RHE.dtype in (torch.bfloat16, torch.float16):
        from torch.nn.attention.varlen import varlen_attn  # noqa: PLC0415 (needs a CUDA build)

        out = varlen_attn(
            q_RHE, k_THE, v_THE, query_cells.offsets_B1, cells.offsets_B1, query_cells.max_len, cells.max_len
        )
        assert isinstance(out, Tensor)
        return out.reshape(R, H * E)
    parts, q0, k0 = [], 0, 0
    for (queries, length), group in groupby(zip(query_cells.lengths, cells.lengths, strict=True)):
        n = len(list(group))
        q1, k1 = q0 + n * queries, k0 + n * length
        q = q_RHE[q0:q1].view(n, queries, H, E).transpose(1, 2)
        k, v = (x_THE[k0:k1].view(n, length, H, E).transpose(1, 2) for x_THE in (k_THE, v_THE))
        if queries:
            parts.append(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n * queries, H * E))
        q0, k0 = q1, k1
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _attend_with_dropout(  # noqa: PLR0917 (as `attend`, and what dropout needs)
    q_RHE: Tensor, k_THE: Tensor, v_THE: Tensor, query_cells: Cells, cells: Cells, keys_R: Tensor, site: int, p: float
) -> Tensor:
    """Attention with reproducible dropout on its weights: explicit scores, one cell at a time (slow, exact)."""
    _, H, E = q_RHE.shape
    chance16 = round(p * 65536)
    parts = []
    few, many = query_cells.lengths, cells.lengths
    pieces = (torch.split(q_RHE, few), torch.split(keys_R, few), torch.split(k_THE, many), torch.split(v_THE, many))
    for q, keys, k, v in zip(*pieces, strict=True):
        R, L = q.shape[0], k.shape[0]
        w_HRL = torch.softmax(q.transpose(0, 1) @ k.permute(1, 2, 0) / math.sqrt(E), dim=-1)
        drop_HRL = rng.dropped(keys, site, H * L, chance16).view(R, H, L).transpose(0, 1)
        w_HRL = w_HRL.masked_fill(drop_HRL, 0.0) * (1 / (1 - chance16 / 65536))
        parts.append((w_HRL @ v.transpose(0, 1)).transpose(0, 1).reshape(R, H * E))
    return torch.cat(parts)


def _drop_add(residual_TD: Tensor, x_TD: Tensor, p: float, keys_T: Tensor | None, site: int) -> Tensor:
    """`residual + dropout(x)`; without keys there is no dropout."""
    if keys_T is None or p == 0:
        return residual_TD + x_TD
    chance16 = round(p * 65536)
    x_TD = x_TD.masked_fill(rng.dropped(keys_T, site, x_TD.shape[1], chance16), 0.0)
    return torch.add(residual_TD, x_TD, alpha=1 / (1 - chance16 / 65536))


class Encoder(nn.Module):
    """Encoder: token ids of packed cells to hidden states.

    Args:
        sizes: sizes, activation and dropout.
        vocab_size: V.
        seed: of the initial weights.
    """

    def __init__(self, sizes: training.Model, vocab_size: int, *, seed: int = 0) -> None:
        super().__init__()
        self.sizes = sizes
        self.vocab_size = vocab_size
        self.tokens = nn.Parameter(torch.empty(vocab_size, sizes.dim))
        self.positions = nn.Parameter(torch.empty(sizes.max_positions, sizes.dim))
        self.norm = nn.LayerNorm(sizes.dim, eps=sizes.norm_eps)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.num_layers))
        self.residual = nn.Parameter(torch.empty(sizes.dim, sizes.dim)) if sizes.residual else None
        self.initialise(seed)

    def initialise(self, seed: int) -> None:
        """Draw all weights.

        | what | distribution |
        |---|---|
        | matrices, token and position embeddings | normal(0, init_sd); the row of <pad> is 0 |
        | biases | 0 |
        | layer norms | weight 1, bias 0 |
        | residual of the pooling `ranked` | 0 |
        """
        _initialise(self, self.sizes.init_sd, seed)
        with torch.no_grad():
            self.tokens[0].zero_()
            if self.residual is not None:
                self.residual.zero_()

    def forward(
        self,
        ids_T: Tensor,
        offsets_B1: Tensor,
        *,
        positions_T: Tensor | None = None,
        layers: int | None = None,
        keys: Tensor | None = None,
        max_len: int | None = None,
        queries: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Hidden states of all tokens, (T, D), or of the queries, (R, D).

        Args:
            ids_T: token ids of all cells, one cell after the other.
            offsets_B1: offsets of the cells.
            positions_T: position of each token in its cell; None = 0, 1, 2, ...
            layers: number of layers to run; None = all, 0 = the embedding alone.
            keys: dropout key of each token, int32 (T,); None = no dropout.
            max_len: upper bound of the tokens of a cell; None = it is read from the device, which takes a wait.
            queries: tokens whose states are needed: positions among the T, ascending (R,), and the offsets of each cell's
                queries among the R (B + 1,); None = all tokens. The last layer skips the other tokens.
        """
        if positions_T is None:
            positions_T = token_positions(offsets_B1, ids_T.shape[0])
        query_cells = None if queries is None else Queries(*queries, max_len)
        return self.run_layers(
            self.embed_tokens(ids_T, positions_T, keys),
            Cells(offsets_B1, max_len),
            layers=layers,
            keys=keys,
            queries=query_cells,
        )

    def embed_tokens(self, ids_T: Tensor, positions_T: Tensor, keys: Tensor | None = None) -> Tensor:
        """Input of the first layer, (T, D): token and position embeddings, normalised."""
        x_TD = self.norm(F.embedding(ids_T, self.tokens) + F.embedding(positions_T, self.positions))
        if keys is None or self.sizes.dropout == 0:
            return x_TD
        chance16 = round(self.sizes.dropout * 65536)
        drop_TD = rng.dropped(keys, 0, self.sizes.dim, chance16)
        return x_TD.masked_fill(drop_TD, 0.0) * (1 / (1 - chance16 / 65536))

    def run_layers(
        self,
        h_TD: Tensor,
        cells: Cells,
        *,
        layers: int | None = None,
        keys: Tensor | None = None,
        queries: Queries | None = None,
    ) -> Tensor:
        """Run the first `layers` layers on inputs (T, D); the last of them computes only the queries."""
        num_layers = self.sizes.num_layers if layers is None else layers
        assert 0 <= num_layers <= self.sizes.num_layers, f"layers = {layers} of {self.sizes.num_layers}"
        for i in range(num_layers):
            h_TD = self.layers[i](h_TD, cells, keys, 3 * i + 1, queries if i == num_layers - 1 else None)
        return h_TD if queries is None or num_layers else h_TD.index_select(0, queries.at_R)


def cell_vectors(
    encoder: Encoder,
    ids_T: Tensor,
    offsets_B1: Tensor,
    how: str,
    *,
    layer: training.LayerChoice = -1,
    cls: bool = False,
    positions_T: Tensor | None = None,
    keys: Tensor | None = None,
    max_len: int | None = None,
) -> Tensor:
    """One vector per cell: of one hidden layer, (B, D), or of all layers concatenated, (B, (num_layers + 1) * D).

    Args:
        encoder: the encoder.
        ids_T: token ids of all cells, one cell after the other.
        offsets_B1: offsets of the cells.
        how: `mean`, `first` or `cls`, as in `pool_tokens`; `ranked`, as in `ranked_vectors`. With all layers, `ranked` takes
            the place of the embedding's mean, and the means of the layers follow.
        layer: -1 = the last, -2 = the one before it, ...; `all` = all concatenated, the embedding first.
        cls: sentences begin with <cls>.
        positions_T: position of each token in its cell; None = 0, 1, 2, ...
        keys: dropout key of each token; None = no dropout.
        max_len: upper bound of the tokens of a cell; None = it is read from the device.
    """
    count, ranked = encoder.sizes.num_layers, how == "ranked"
    if positions_T is None:
        positions_T = token_positions(offsets_B1, ids_T.shape[0])
    if ranked and layer != "all" and encoder.residual is None:
        return ranked_vectors(encoder, ids_T, offsets_B1, positions_T)
    if layer != "all":
        h_TD = encoder(ids_T, offsets_B1, positions_T=positions_T, layers=count + 1 + layer, keys=keys, max_len=max_len)
        if ranked:
            return ranked_vectors(encoder, ids_T, offsets_B1, positions_T, h_TD, cls=cls)
        return pool_tokens(h_TD, offsets_B1, how, cls=cls)
    h_TD, cells = encoder.embed_tokens(ids_T, positions_T, keys), Cells(offsets_B1, max_len)
    how = "mean" if ranked else how
    parts = [pool_tokens(h_TD, offsets_B1, how, cls=cls)]
    for i in range(count):
        h_TD = encoder.layers[i](h_TD, cells, keys, 3 * i + 1, None)
        parts.append(pool_tokens(h_TD, offsets_B1, how, cls=cls))
    if ranked:
        residual_TD = None if encoder.residual is None else h_TD
        parts[0] = ranked_vectors(encoder, ids_T, offsets_B1, positions_T, residual_TD, cls=cls)
    return torch.cat([part.float() for part in parts], 1)


def rank_weight(places_T: Any) -> Any:
    """Weight of a gene by its position in the sentence (from 0): 2 for the first, 1 for the 257th, logarithmic between.

    Takes arrays and tensors. Presence of a gene counts most. Its rank distinguishes a cell's own transcripts of abundant genes from
    ambient RNA.
    """
    if isinstance(places_T, Tensor):
        return 2 - (places_T + 1.0).log() / math.log(257)
    return 2 - np.log1p(places_T) / math.log(257)


def ranked_vectors(
    encoder: Encoder,
    ids_T: Tensor,
    offsets_B1: Tensor,
    positions_T: Tensor,
    h_TD: Tensor | None = None,
    *,
    cls: bool = False,
) -> Tensor:
    """Mean of the token vectors of each cell, weighted by `rank_weight`, plus the residual of hidden states, (B, D) float32.

    Special tokens have weight 0. A cell without genes has a vector of zeros.

    Args:
        encoder: the encoder.
        ids_T: token ids of all cells, one cell after the other.
        offsets_B1: offsets of the cells.
        positions_T: position of each token in the whole sentence of its cell.
        h_TD: hidden states, whose mean `model.residual` maps; None = no residual.
        cls: sentences begin with <cls>.
    """
    with torch.autocast(ids_T.device.type, enabled=False):
        weights_T = rank_weight(positions_T).float() * (ids_T >= NUM_SPECIALS)
        starts_B = offsets_B1.long()
        sums_BD = F.embedding_bag(
            ids_T, encoder.tokens.float(), starts_B, mode="sum", per_sample_weights=weights_T, include_last_offset=True
        )
        lengths_B = torch.diff(starts_B)
        total_B = torch.segment_reduce(weights_T, "sum", lengths=lengths_B, axis=0, unsafe=True)
        vectors_BD = sums_BD / total_B.clamp(min=1e-6)[:, None]
        if h_TD is None:
            return vectors_BD
        assert encoder.residual is not None
        return vectors_BD + F.linear(pool_tokens(h_TD, offsets_B1, "mean", cls=cls).float(), encoder.residual)


def vector_width(sizes: training.Model, layer: training.LayerChoice) -> int:
    """Length of a vector of `cell_vectors`."""
    return (sizes.num_layers + 1) * sizes.dim if layer == "all" else sizes.dim


def require_layer(sizes: training.Model, layer: training.LayerChoice, field: str) -> None:
    """Raise a `UserError` that names the config field, unless the encoder has the hidden layer."""
    if layer != "all" and layer < -1 - sizes.num_layers:
        msg = f"{field} = {layer}: must be {-1 - sizes.num_layers} (the embedding) to -1 (the last layer), or 'all'"
        raise UserError(msg)


def token_positions(offsets_B1: Tensor, num_tokens: int) -> Tensor:
    """Position of each packed token in its cell, int64 (T,)."""
    starts_B = offsets_B1[:-1].long()
    lengths_B = torch.diff(offsets_B1).long()
    starts_T = torch.repeat_interleave(starts_B, lengths_B, output_size=num_tokens)
    return torch.arange(num_tokens, device=offsets_B1.device) - starts_T


def pool_tokens(h_TD: Tensor, offsets_B1: Tensor, how: str, *, cls: bool = False) -> Tensor:
    """Pool hidden states to one vector per cell, (B, D).

    Args:
        h_TD: hidden states.
        offsets_B1: offsets of the cells.
        how: `mean` over the genes; `first` or `cls`: the first position, which is <cls> if sentences have it.
        cls: sentences begin with <cls>; the mean leaves it out.
    """
    starts_B = offsets_B1[:-1].long()
    if how in ("first", "cls"):
        return h_TD[starts_B]
    assert how == "mean", how
    lengths_B = torch.diff(offsets_B1).long()
    sum_BD = torch.segment_reduce(h_TD.float(), "sum", lengths=lengths_B, axis=0, unsafe=True)
    if cls:
        return (sum_BD - h_TD[starts_B].float()) / (lengths_B - 1).clamp(min=1)[:, None]
    return sum_BD / lengths_B[:, None]


class MaskedModel(nn.Module):
    """Encoder and masked-gene head (dense, activation, layer norm, decoder tied to the token embedding, bias)."""

    def __init__(self, sizes: training.Model, vocab_size: int, *, seed: int = 0) -> None:
        super().__init__()
        self.encoder = Encoder(sizes, vocab_size, seed=seed)
        self.dense = Linear(sizes.dim, sizes.dim)
        self.norm = nn.LayerNorm(sizes.dim, eps=sizes.norm_eps)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        for part, key in ((self.dense, seed + 1), (self.norm, seed + 1)):
            _initialise(part, sizes.init_sd, key)

    def published(self) -> dict[str, Tensor]:
        """The parameters that a checkpoint holds, by name."""
        return dict(self.named_parameters())

    def transform(self, h_KD: Tensor) -> Tensor:
        """Input of the decoder, (K, D)."""
        return self.norm(_ACTIVATIONS[self.encoder.sizes.activation](self.dense(h_KD)))

    def logits(self, h_KD: Tensor) -> Tensor:
        """Logits over the vocabulary at the given positions, (K, V); for few positions, as training uses `loss`."""
        return F.linear(self.transform(h_KD), self.encoder.tokens, self.bias)

    def loss(self, h_KD: Tensor, targets_K: Tensor) -> Tensor:
        """Paper eq. 2: sum of -log P(true gene) over the K masked positions; `training.losses` takes its mean."""
        return chunked_cross_entropy(self.transform(h_KD), self.encoder.tokens, self.bias, targets_K)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Hidden states; arguments as `Encoder.forward`."""
        return self.encoder(*args, **kwargs)


def _initialise(module: nn.Module, init_sd: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() >= 2:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * init_sd)
            else:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
        if isinstance(module, nn.LayerNorm):
            module.weight.fill_(1.0)


def chunked_cross_entropy(x_KD: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_K: Tensor) -> Tensor:
    """Sum over K positions of the cross entropy of the logits `x @ weight.T + bias`, computed in chunks of positions.

    The (K, V) logits are never in memory at once. Gradients are computed in the forward pass, chunk by chunk, so that
    no logits are computed twice.
    """
    loss: Tensor = _ChunkedCrossEntropy.apply(x_KD, weight_VD, bias_V, targets_K)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_KD: Tensor, weight_VD: Tensor, bias_V: Tensor, targets_K: Tensor) -> Tensor:
        device = x_KD.device.type
        half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        rows = max(1, _CHUNK_ELEMENTS.get(device, 1 << 24) // max(1, weight_VD.shape[0]))
        need = any(ctx.needs_input_grad)
        weight = weight_VD.to(half)
        dx_KD = torch.empty_like(x_KD, dtype=torch.float32) if need else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if need else None
        dbias_V = torch.zeros_like(bias_V, dtype=torch.float32) if need else None
        total = torch.zeros((), dtype=torch.float32, device=x_KD.device)
        with torch.autocast(device, enabled=False):
            for start in range(0, x_KD.shape[0], rows):
                part = slice(start, start + rows)
                x, target = x_KD[part].to(half), targets_K[part]
                if half == torch.float32:
                    scores = torch.addmm(bias_V, x, weight.t())
                else:
                    scores = (x @ weight.t()).float().add_(bias_V)
                top = scores.amax(1, keepdim=True)
                true = scores.gather(1, target[:, None])
                p = scores.sub_(top).exp_()  # in place, and one exponential for loss and gradient
                norm = p.sum(1, keepdim=True)
                total += (norm.log() + top - true).sum()
                if dx_KD is not None and dweight_VD is not None and dbias_V is not None:
                    p.div_(norm)
                    p.scatter_add_(1, target[:, None], torch.full_like(norm, -1.0))
                    dbias_V += p.sum(0)
                    p = p.to(half)
                    dx_KD[part] = (p @ weight).float()
                    dweight_VD += (p.t() @ x).float()
        ctx.save_for_backward(dx_KD, dweight_VD, dbias_V)
        ctx.x_dtype = x_KD.dtype
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx_KD, dweight_VD, dbias_V = ctx.saved_tensors
        (grad,) = grads
        return (dx_KD * grad).to(ctx.x_dtype), dweight_VD * grad, dbias_V * grad, None


def forward_flops(
    sizes: training.Model, lengths: list[int] | Any, *, layers: int | None = None, queries: list[int] | Any = None
) -> float:
    """FLOP of one forward pass of the encoder (a multiply-add counts as 2).

    Args:
        sizes: of the encoder.
        lengths: tokens of each cell.
        layers: number of layers; None = all.
        queries: tokens of each cell that the last layer computes; None = all.
    """
    num_layers = sizes.num_layers if layers is None else layers
    if not num_layers:
        return 0.0
    lengths_B = np.asarray(lengths, dtype=np.float64)
    counts_B = lengths_B if queries is None else np.asarray(queries, dtype=np.float64)
    tokens, query_tokens = float(lengths_B.sum()), float(counts_B.sum())
    pairs, query_pairs = float(lengths_B @ lengths_B), float(counts_B @ lengths_B)
    kv, rest = 2 * sizes.dim**2, 2 * sizes.dim**2 + 2 * sizes.dim * sizes.ffn_dim  # multiply-adds per token
    return (num_layers - 1) * (tokens * 2 * (kv + rest) + pairs * 4 * sizes.dim) + (
        tokens * 2 * kv + query_tokens * 2 * rest + query_pairs * 4 * sizes.dim
    )


def head_flops(sizes: training.Model, vocab_size: int, num_positions: float) -> float:
    """FLOP of one forward pass of the masked-gene head at `num_positions` positions."""
    return 2.0 * num_positions * (sizes.dim**2 + sizes.dim * vocab_size)

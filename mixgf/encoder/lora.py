"""Low-rank adapters (LoRA, Hu et al. 2022) for fine-tuning the encoder.

The matrices W of attention and feed-forward network become W + (alpha / rank) B A in every layer. A is random and B is
zero at the start, so the adapted encoder first computes the same as before. `merge_adapters` adds the products to the
matrices; the result is an ordinary encoder.

Shapes: W (out, in), A (rank, in), B (out, rank).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mixgf.encoder.bert import Encoder

MATRICES = ("qkv", "out", "up", "down")
"""Adapted matrices of `bert.Layer`."""


class LowRank(nn.Module):
    """Parametrization of one matrix: W + scale * B A.

    Args:
        shape: Shape of W.
        rank: Rank of B A.
        scale: alpha / rank.
        generator: Draws A, normal with variance 1 / in.
    """

    def __init__(self, shape: torch.Size, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = shape
        self.scale = scale
        self.a = nn.Parameter(torch.randn(rank, columns, generator=generator) / columns**0.5)
        self.b = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return torch.addmm(weight, self.b, self.a, alpha=self.scale)


def add_adapters(encoder: Encoder, rank: int, alpha: float, *, seed: int) -> None:
    """Add adapters to the matrices of every layer, in place; all other parameters of the encoder are frozen."""
    encoder.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in encoder.layers:
        for name in MATRICES:
            linear = getattr(layer, name)
            low = LowRank(linear.weight.shape, rank, alpha / rank, generator).to(linear.weight.device)
            parametrize.register_parametrization(linear, "weight", low)


def merge_adapters(encoder: Encoder) -> None:
    """Add the adapters' products to the matrices and remove the adapters, in place."""
    for layer in encoder.layers:
        for name in MATRICES:
            linear = getattr(layer, name)
            if parametrize.is_parametrized(linear, "weight"):
                parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
                bias = linear.bias
                del linear.bias
                linear.bias = bias  # registered after the weight again, as before

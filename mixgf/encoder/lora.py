"""Low-rank adapters (LoRA, Hu et al. 2022): fine-tuning changes every matrix of the encoder by a product of two thin ones.

W becomes W + (alpha / rank) B A, for the attention's and the feed-forward network's matrices of every layer. A is drawn, B
begins at zero, so an adapted encoder begins as the encoder it was. `merge` writes the sums into the matrices: what is kept
afterwards is an ordinary encoder.

Shapes: W (out, in), A (rank, in), B (out, rank).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mixgf.encoder.bert import Encoder

MATRICES = ("qkv", "out", "up", "down")
"""Of `model.Layer`."""


class LowRank(nn.Module):
    """What a matrix becomes.

    Args:
        shape: Of W.
        rank: Of B A.
        scale: alpha / rank.
        generator: A is drawn by it, normal with the variance 1 / in.
    """

    def __init__(self, shape: torch.Size, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = shape
        self.scale = scale
        self.a = nn.Parameter(torch.randn(rank, columns, generator=generator) / columns**0.5)
        self.b = nn.Parameter(torch.zeros(rows, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return torch.addmm(weight, self.b, self.a, alpha=self.scale)


def adapt(encoder: Encoder, rank: int, alpha: float, *, seed: int) -> None:
    """Give every layer's matrices adapters, in place; nothing else of the encoder is trained from now on."""
    encoder.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for layer in encoder.layers:
        for name in MATRICES:
            linear = getattr(layer, name)
            low = LowRank(linear.weight.shape, rank, alpha / rank, generator).to(linear.weight.device)
            parametrize.register_parametrization(linear, "weight", low)


def merge(encoder: Encoder) -> None:
    """Write the adapters into the matrices and take them off, in place."""
    for layer in encoder.layers:
        for name in MATRICES:
            linear = getattr(layer, name)
            if parametrize.is_parametrized(linear, "weight"):
                parametrize.remove_parametrizations(linear, "weight", leave_parametrized=True)
                bias = linear.bias
                del linear.bias
                linear.bias = bias  # behind the weight again, where it was

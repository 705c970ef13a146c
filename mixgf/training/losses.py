"""SimCSE contrast (eq. 3), SimCSE++, alignment, uniformity."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# losses


def nt_xent(a_BD: Tensor, b_BD: Tensor, temperature: float) -> Tensor:
    """Paper eq. 3 as a mean over the 2B anchors: cosine, the anchor itself excluded, the other view is the positive."""
    num = a_BD.shape[0]
    z = F.normalize(torch.cat([a_BD, b_BD]).float(), dim=1)
    scores = z @ z.t() / temperature
    scores = scores.masked_fill(torch.eye(2 * num, dtype=torch.bool, device=z.device), -torch.inf)
    return F.cross_entropy(scores, torch.arange(2 * num, device=z.device).roll(num))


def dimension_contrast(a_BD: Tensor, b_BD: Tensor, temperature: float) -> Tensor:
    """SimCSE++'s dimension-wise term: each dimension of one view finds itself among those of the other, mean over D."""
    scores = a_BD.float().t() @ b_BD.float() / temperature
    return F.cross_entropy(scores, torch.arange(a_BD.shape[1], device=a_BD.device))


@torch.no_grad()
def alignment(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    """Mean squared distance of the two views of a cell on the unit sphere (Wang and Isola 2020); 0 is best."""
    return (F.normalize(a_BD.float(), dim=1) - F.normalize(b_BD.float(), dim=1)).square().sum(1).mean()


@torch.no_grad()
def uniformity(a_BD: Tensor) -> Tensor:
    """Log of the mean over pairs of cells of exp(-2 distance^2); lower is more uniform. 0 when there is no pair."""
    num = a_BD.shape[0]
    if num < 2:
        return torch.zeros((), device=a_BD.device)
    z = F.normalize(a_BD.float(), dim=1)
    kernel = torch.exp(-2 * (2 - 2 * z @ z.t()).clamp(min=0))
    return torch.log((kernel.sum() - kernel.diagonal().sum()) / (num * (num - 1)))

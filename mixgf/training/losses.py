"""Losses of pretraining (paper section 3.3) and figures of the embedding space.

| paper | function | what it is |
|---|---|---|
| eq. 1 | `total_loss` | weighted sum of the masked-gene loss and the losses on cell vectors |
| eq. 2 | `masked_gene_loss` | masked language modelling: cross entropy of the true genes at masked positions |
| eq. 3 | `simcse_loss` | contrast of two views of a cell (SimCSE, NT-Xent) |
| not in the paper | `dimension_loss` | contrast of the dimensions of two views (SimCSE++) |
| not in the paper | `alignment`, `uniformity` | figures that describe cell vectors on the unit sphere; not trained on |

Shapes: B cells, K masked positions, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def total_loss(masked_gene: Tensor, on_vectors: Tensor, *, masked_gene_weight: float) -> Tensor:
    """Paper eq. 1: the masked-gene loss plus the losses on cell vectors, which are weighted already (1 and 1 in the paper)."""
    return masked_gene_weight * masked_gene + on_vectors


def masked_gene_loss(summed: Tensor, num_masked: Tensor) -> Tensor:
    """Paper eq. 2, divided by the number of masked positions: the mean of -log P(true gene).

    Args:
        summed: sum of -log P(true gene) over the masked positions of a micro batch (`MaskedModel.loss`).
        num_masked: masked positions of the whole global batch, so that the losses of all micro batches add up to the mean.
    """
    return summed / num_masked


def simcse_loss(a_BD: Tensor, b_BD: Tensor, temperature: float | Tensor) -> Tensor:
    """Paper eq. 3, as the mean over the 2B vectors of two views (NT-Xent).

    Similarity is the cosine over `temperature`. The positive of a vector is the other view of its cell; the negatives are
    all other vectors of both views, without the vector itself.
    """
    num = a_BD.shape[0]
    z = F.normalize(torch.cat([a_BD, b_BD]).float(), dim=1)
    scores = z @ z.t() / temperature
    scores = scores.masked_fill(torch.eye(2 * num, dtype=torch.bool, device=z.device), -torch.inf)
    return F.cross_entropy(scores, torch.arange(2 * num, device=z.device).roll(num))


def dimension_loss(a_BD: Tensor, b_BD: Tensor, temperature: float) -> Tensor:
    """Dimension-wise term of SimCSE++, mean over D: each dimension of one view is to match the same one of the other."""
    scores = a_BD.float().t() @ b_BD.float() / temperature
    return F.cross_entropy(scores, torch.arange(a_BD.shape[1], device=a_BD.device))


@torch.no_grad()
def alignment(a_BD: Tensor, b_BD: Tensor) -> Tensor:
    """Mean squared distance of the two views of a cell on the unit sphere (Wang and Isola 2020); 0 is best."""
    return (F.normalize(a_BD.float(), dim=1) - F.normalize(b_BD.float(), dim=1)).square().sum(1).mean()


@torch.no_grad()
def uniformity(a_BD: Tensor) -> Tensor:
    """Log of the mean over pairs of cells of exp(-2 distance^2) (Wang and Isola 2020); lower is better, 0 without pairs."""
    num = a_BD.shape[0]
    if num < 2:
        return torch.zeros((), device=a_BD.device)
    z = F.normalize(a_BD.float(), dim=1)
    kernel = torch.exp(-2 * (2 - 2 * z @ z.t()).clamp(min=0))
    return torch.log((kernel.sum() - kernel.diagonal().sum()) / (num * (num - 1)))

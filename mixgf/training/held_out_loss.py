"""Losses on cells that a pretraining never sees.

Shapes: B cells of an evaluation batch, D width, R rows of a table of batches.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mixgf import rng
from mixgf.encoder.bert import MaskedModel
from mixgf.training.losses import simcse_loss
from mixgf.training.pretraining import Pretraining
from mixgf.training.selection import Selection
from mixgf.training.worker_group import Context, autocast

MOST_CELLS = 2048
"""Held-out cells that are evaluated, drawn at random."""
_KEY = (0x48454C44, 0)
"""Random key of masks and dropout: the same at every evaluation and in every training."""
METRIC = "heldout_loss"


def selection(task: Pretraining) -> Selection | None:
    """Evaluations of a training on its held-out cells; None where there are none."""
    train = task.config.train
    if task.held_out is None:
        return None
    return Selection(HeldOutLoss(task), metric=METRIC, every=train.heldout_steps, patience=train.patience)


class HeldOutLoss:
    """Evaluates a model on held-out cells; the figures have the same bits at any number of workers.

    | figure | what it is |
    |---|---|
    | heldout_mlm | mean of -log P(true gene) over masked genes, without dropout; only where genes are predicted |
    | heldout_contrast | SimCSE loss of two views, mean over batches; only with a contrastive loss |
    | heldout_contrast_accuracy | share of cells whose nearest vector in the batch is their other view |
    | heldout_loss | both losses, weighted as in training; other terms are left out |

    Cells are evaluated in batches of `train.batch_cells`, each by one worker; where neighbours are contrasted, a batch is of one
    data set. The temperature is `objective.temperature`. Chance of the accuracy is 1 / (2 B - 1).

    Args:
        task: The training; its masks, views and weights of losses are used.
    """

    def __init__(self, task: Pretraining) -> None:
        assert task.held_out is not None
        cells = task.held_out.cells
        order = np.argsort(rng.uniform(cells, after=rng.of_numbers(*_KEY)), kind="stable")
        chosen = cells[order[:MOST_CELLS]]
        self.task, size = task, task.config.train.batch_cells
        groups = np.zeros(len(chosen), np.int32) if task.neighbours is None else task.neighbours.groups_C[chosen]
        parts = [chosen[groups == group] for group in np.unique(groups)]
        self.batches = [part[start : start + size] for part in parts for start in range(0, len(part), size)]

    @torch.no_grad()
    def __call__(self, model: MaskedModel, context: Context) -> dict[str, float]:
        """The figures of all batches."""
        objective = self.task.objective
        rows_R4 = torch.zeros(len(self.batches), 4, dtype=torch.float64)
        for i in range(context.rank, len(self.batches), context.world_size):
            rows_R4[i] = torch.tensor([*self._masked_genes(model, i, context), *self._contrast(model, i, context)])
        on_device = rows_R4.to(context.device)
        context.all_reduce(on_device)  # every other worker's row is zeros, so the sum is exact
        rows_R4 = on_device.cpu()
        cells_R = torch.tensor([len(batch) for batch in self.batches], dtype=torch.float64)
        figures = {METRIC: 0.0}
        if self.task.masks:
            mlm = (rows_R4[:, 0].sum() / rows_R4[:, 1].sum().clamp(min=1)).item()
            figures = {METRIC: objective.mlm_weight * mlm, "heldout_mlm": mlm}
        if objective.contrast_weight > 0:
            contrast, accuracy = ((rows_R4[:, k] * cells_R).sum().item() / cells_R.sum().item() for k in (2, 3))
            figures[METRIC] += objective.contrast_weight * contrast
            figures |= {"heldout_contrast": contrast, "heldout_contrast_accuracy": accuracy}
        return figures

    def _masked_genes(self, model: MaskedModel, batch: int, context: Context) -> tuple[float, float]:
        """Sum of -log P(true gene) over the masked genes of a batch, and their number."""
        total, number = 0.0, 0
        if not self.task.masks:
            return total, float(number)
        for micro in self.task.evaluation_batches(self.batches[batch], self.task.views[:1], _KEY):
            if self.task.is_empty(micro):
                continue
            there = micro.to(context.device)
            with autocast(context.device, self.task.config.train.precision):
                h = self.task.hidden(model, there)
                total += model.loss(h[there.masked_K], there.targets_K).item()
            number += len(there.targets_K)
        return total, float(number)

    def _contrast(self, model: MaskedModel, batch: int, context: Context) -> tuple[float, float]:
        """SimCSE loss of a batch, and the share of its cells whose nearest vector is their other view."""
        if self.task.objective.contrast_weight == 0:
            return 0.0, 0.0
        views = []
        for micro in self.task.evaluation_batches(self.batches[batch], self.task.views[:2], _KEY):
            there = micro.to(context.device)
            h = self.task.hidden(model, there) if self.task.reads_layers else None
            views.append(self.task.vectors(model, h, there))
        a_BD, b_BD = self.task.centred(*torch.cat(views, dim=1))
        loss = simcse_loss(a_BD, b_BD, self.task.objective.temperature).item()
        return loss, contrast_accuracy(a_BD, b_BD)


def contrast_accuracy(a_BD: Tensor, b_BD: Tensor) -> float:
    """Share of vectors of one view whose nearest vector by cosine, among all others of both views, is the cell's other view."""
    num = len(a_BD)
    z = F.normalize(torch.cat([a_BD, b_BD]).float(), dim=1)
    scores = z[:num] @ z.t()
    scores.fill_diagonal_(-torch.inf)
    return (scores.argmax(1) == torch.arange(num, 2 * num, device=z.device)).double().mean().item()

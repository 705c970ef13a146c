"""Evaluation while training goes on: the best weights, and an early end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mixgf.training import checkpoints
from mixgf.training.worker_group import Context


class Selection:
    """Evaluates a model every so many steps and at the end, and keeps the weights with the lowest loss, of equal ones the first.

    With checkpoints, the best weights are those of the checkpoint of `best_step`, which is kept. Without, they are in memory.
    The state is part of every checkpoint, so a killed training goes on with the same choice.

    Args:
        evaluate: (model, worker) to figures of the model over all workers, which are the same on every worker.
        metric: The figure that is to be low.
        every: Steps between two evaluations.
        patience: Training ends after so many evaluations in a row without a lower loss; 0 = it does not.
        at_start: Evaluate before the first step, too.
    """

    def __init__(
        self,
        evaluate: Callable[[Any, Context], dict[str, float]],
        *,
        metric: str,
        every: int,
        patience: int = 0,
        at_start: bool = False,
    ) -> None:
        self.evaluate, self.metric, self.every, self.patience = evaluate, metric, every, patience
        self.at_start = at_start
        self.best_step, self.fruitless = 0, 0
        self.best: float | None = None
        self._weights: dict[str, Tensor] = {}

    @property
    def ended(self) -> bool:
        """Whether training is to end early."""
        return 0 < self.patience <= self.fruitless

    def due(self, step: int, num_steps: int) -> bool:
        """Whether to evaluate after so many steps."""
        return (self.at_start if step == 0 else step % self.every == 0) or step == num_steps

    def update(
        self, model: nn.Module, step: int, context: Context, *, in_memory: bool
    ) -> tuple[dict[str, float], bool]:
        """Evaluate the model; returns its figures, and whether it is the best so far."""
        model.eval()
        figures = self.evaluate(model, context)
        model.train()
        if self.best is not None and not figures[self.metric] < self.best:
            self.fruitless += 1
            return figures, False
        self.best_step, self.best, self.fruitless = step, figures[self.metric], 0
        if in_memory:
            self._weights = {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}
        return figures, True

    def state(self) -> dict[str, float]:
        """What a checkpoint stores; nothing before the first evaluation."""
        if self.best is None:
            return {}
        return {"best_step": self.best_step, "best": self.best, "fruitless": self.fruitless}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from the state of a checkpoint."""
        if not state:
            return
        self.best_step, self.best = int(state["best_step"]), float(state["best"])
        self.fruitless = int(state["fruitless"])

    @torch.no_grad()
    def restore(self, model: nn.Module, uri: str = "") -> None:
        """Give the model the best weights, from the checkpoints in `uri` or from memory."""
        if uri:
            checkpoints.load_step_weights(uri, self.best_step, model)
        for name, parameter in model.named_parameters():
            if name in self._weights:
                parameter.copy_(self._weights[name])

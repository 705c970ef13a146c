"""Names of models, metrics, splits and tasks as readers see them, and numbers as text."""

from __future__ import annotations

import numpy as np

from mixgf.classification import registry
from mixgf.classification.models.finetuned import Finetune

PAPER_MODEL = Finetune.head
"""The model of the paper."""

METRICS = {
    "accuracy": "Accuracy",
    "macro_f1": "Macro F1",
    "balanced_accuracy": "Balanced accuracy",
    "ece": "Calibration error",
}

SPLITS = {
    "random": "Random cells held out (the paper's split)",
    "donor": "Whole donors held out",
    "dataset": "Whole data sets held out",
    "species": "Transfer between species: trained on one, scored on the other",
}

SPLIT_NAMES = {"random": "random cells", "donor": "new donors", "dataset": "new data sets", "species": "across species"}


def metric_label(metric: str) -> str:
    """Name of a metric for readers."""
    return METRICS.get(metric, metric.replace("_", " "))


def task_label(split: str, group: str, direction: str) -> str:
    """Name of a task for readers: the group of cells and, for a transfer between species, its direction."""
    arrow = direction.replace("->", ">").replace(">", " → ")
    if split == "species":
        return arrow if group in ("", "all", "species") or arrow in group else f"{arrow} ({group})" if group else arrow
    return " ".join(part for part in (group, f"({arrow})" if arrow else "") if part)


def order_models(models: list[str]) -> list[str]:
    """Models of the run's own encoder, in the order of `registry.OWN`, then of other encoders by encoder, then baselines by name."""
    others = sorted({m for m in models if registry.encoder_of(m)}, key=lambda m: (registry.encoder_of(m), m))
    return [m for m in registry.OWN if m in models] + others + sorted(m for m in set(models) if registry.is_baseline(m))


def score_text(value: float) -> str:
    """A score with three decimals; a dash for NaN."""
    return "–" if not np.isfinite(value) else f"{value:.3f}"


def interval_text(value: float, low: float, high: float) -> str:
    """A score with its interval: `0.954 (0.826–0.987)`."""
    return score_text(value) if not (np.isfinite(low) and np.isfinite(high)) else f"{value:.3f} ({low:.3f}–{high:.3f})"


def lower_first(text: str) -> str:
    """A label in the middle of a sentence: a small first letter, except in abbreviations."""
    return text if len(text) > 1 and text[1].isupper() else text[:1].lower() + text[1:]


def plural(n: int, one: str, many: str = "") -> str:
    """`1 cell`, `2 cells`."""
    return f"{n:,} {one if n == 1 else many or one + 's'}"


def title_case(name: str) -> str:
    """Name of a column for readers."""
    known = {"num_cells": "cells", "p_cell": "p (cells)", "mito_fraction": "mitochondrial share"}
    text = known.get(name, name.replace("_", " "))
    return text[:1].upper() + text[1:]

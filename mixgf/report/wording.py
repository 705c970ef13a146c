"""Names of models, metrics, splits and tasks as readers see them, and numbers as text."""

from __future__ import annotations

import numpy as np

ENCODER_SEPARATOR = "@"
"""Between head and encoder in the name of a model on another encoder: `probe@mlm`."""

UNTRAINED = "@untrained"
"""End of the name of a control: the same head on an encoder with random weights. The difference between the two is the effect of
pretraining."""

HEADS = {
    "finetune": "fine-tuned",
    "finetune_linear_start": "fine-tuned from a convex start",
    "lora": "LoRA from a convex start",
    "probe": "frozen + logistic probe",
    "knn": "frozen 5-NN (“zero-shot”)",
    "centroid": "frozen, nearest centroid",
}

OWN_MODELS = tuple(HEADS)
"""Models on the run's own encoder, the paper's first. All others are controls or baselines."""

PAPER_MODEL = "finetune"
"""The model of the paper: the whole encoder is fine-tuned (section 4.4)."""

BASELINES = {
    "majority": "majority class",
    "hvg_logreg": "variable genes + logistic regression",
    "pca_knn": "PCA + 5-NN",
    "rank_pca": "rank z-scores + PCA",
    "pseudobulk": "nearest pseudobulk",
    "scvi": "scVI",
}

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


def model_label(model: str) -> str:
    """Name of a model for readers: `knn@mlm` is "mlm encoder, frozen 5-NN"."""
    head, other, encoder = model.partition(ENCODER_SEPARATOR)
    if head in HEADS:
        return f"{f'{encoder} encoder' if other else 'mixgf'}, {HEADS[head]}"
    return BASELINES.get(model, model.replace("_", " "))


def metric_label(metric: str) -> str:
    """Name of a metric for readers."""
    return METRICS.get(metric, metric.replace("_", " "))


def task_label(split: str, group: str, direction: str) -> str:
    """Name of a task for readers: the group of cells and, for a transfer between species, its direction."""
    arrow = direction.replace("->", ">").replace(">", " → ")
    if split == "species":
        return arrow if group in ("", "all", "species") or arrow in group else f"{arrow} ({group})" if group else arrow
    return " ".join(part for part in (group, f"({arrow})" if arrow else "") if part)


def is_baseline(model: str) -> bool:
    """Whether a model uses no encoder."""
    return model not in OWN_MODELS and ENCODER_SEPARATOR not in model


def order_models(models: list[str]) -> list[str]:
    """Own models in the order of `OWN_MODELS`, then models on other encoders by encoder, then baselines by name."""
    others = sorted({m for m in models if ENCODER_SEPARATOR in m}, key=lambda m: (m.partition(ENCODER_SEPARATOR)[2], m))
    return [m for m in OWN_MODELS if m in models] + others + sorted(m for m in set(models) if is_baseline(m))


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

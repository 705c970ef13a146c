"""Pretraining: the model, the objective, and curves of losses, speed and state."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mixgf.encoder import checkpoint
from mixgf.report import wording
from mixgf.report.elements import Figure, Section, Text, not_run
from mixgf.report.figures import curves
from mixgf.report.results import RunResults
from mixgf.storage.artifacts import Record

CURVES = {
    "loss": "Total loss", "mlm": "Masked genes (MLM)", "contrast": "Contrast (SimCSE)", "simcsepp": "SimCSE++",
    "ortholog": "Orthologs", "lr": "Learning rate", "cells_per_s": "Cells per second", "tokens_per_s": "Tokens per second",
    "wait_share": "Share of time waiting for data", "mfu": "Share of peak FLOPs", "grad_norm": "Gradient norm",
    "heldout_loss": "Total loss, held-out cells", "heldout_mlm": "Masked genes (MLM), held-out cells",
    "heldout_contrast": "Contrast (SimCSE), held-out cells",
    "heldout_contrast_accuracy": "Contrast accuracy, held-out cells",
    "alignment": "Alignment of two views", "uniformity": "Uniformity of embeddings", "memory_gb": "Memory (GB)",
}  # fmt: skip
"""Name of a training curve in the history to its name for readers. Other curves keep their own name."""
LOSSES = ("loss", "mlm", "contrast", "simcsepp", "ortholog")


def curve(history: pd.DataFrame, name: str) -> pd.DataFrame:
    """One curve of the history by step. Of a step that was repeated after a restart, the last value counts."""
    part = history[(history["name"] == name) & np.isfinite(history["value"])]
    return part.drop_duplicates("step", keep="last").sort_values("step")[["step", "value"]]


def section(results: RunResults) -> Section:
    """Model and objective in a sentence, loss curves by term, and curves of speed and state."""
    history, record = results.tables.get("history"), results.records.get("pretrain")
    if record is None:
        return not_run("pretraining", "Pretraining", "pretrain", results)
    if history is None or history.empty:
        text = "The weights were imported (`mixgf import-weights`). This run did not train them."
        return Section("pretraining", "Pretraining", [Text(text), *_untrained(record)])
    present = [str(name) for name in history["name"].unique()]
    losses = [n for n in LOSSES if n in present] + [n for n in present if n not in LOSSES and "loss" in n]
    others = [n for n in CURVES if n in present and n not in losses] + [
        n for n in present if n not in CURVES and n not in losses
    ]
    blocks: list[Any] = [Text(_trained(record, history)), *_untrained(record)]
    ends = []
    for name in losses:
        first, last = loss_ends(history, name)
        ends.append(f"{wording.lower_first(CURVES.get(name, name))} {first:.3f} → {last:.3f}")
    if ends:
        blocks.append(
            Text("Mean over the first tenth of the steps → mean over the last tenth: " + "; ".join(ends) + ".")
        )
        blocks.append(
            Figure(
                curves.panels({CURVES.get(n, n): curve(history, n) for n in losses}, "losses"),
                "Training losses by optimizer step (thick line: running mean). They are measured on the training "
                "cells, and those of held-out cells on cells that are never trained on. Compare them only between runs with the same vocabulary and sentence length.",
            )
        )
    shown = {CURVES.get(n, wording.title_case(n)): curve(history, n) for n in others[:9]}
    shown = {title: frame for title, frame in shown.items() if len(frame) > 1}
    if shown:
        blocks.append(
            Figure(
                curves.panels(shown, "throughput", zero=True),
                "Speed and state of training. Speeds do not count padding. Low alignment: two views of a cell lie near each other. Low "
                "uniformity: cells spread over the embedding space.",
            )
        )
    return Section("pretraining", "Pretraining", blocks)


def _untrained(record: Record) -> list[Text]:
    num, size = len(checkpoint.untrained_ids(record)), int(record.details.get("vocab_size", 0))
    if not num:
        return []
    text = (
        f"{num:,} of {size:,} token ids are untrained, because they are in no training sentence. Their vectors are copies of "
        "one-to-one orthologs, or random. `mixgf pretrain` with inputs.start trains them."
    )
    return [Text(text, "warn")]


def loss_ends(history: pd.DataFrame, name: str) -> tuple[float, float]:
    """Mean of a curve over the first and over the last tenth of its points."""
    values = curve(history, name)["value"]
    if values.empty:
        return float("nan"), float("nan")
    n = max(1, len(values) // 10)
    return float(values.head(n).mean()), float(values.tail(n).mean())


def _start(record: Record) -> str:
    """What the weights were before the training."""
    if "start" in record.parents:
        return "another checkpoint"
    vectors = {"svd": "singular vectors of the corpus", "table": "a table of gene vectors"}
    return vectors.get(record.details.get("model", {}).get("start", ""), "random weights")


def _trained(record: Record, history: pd.DataFrame) -> str:
    model, objective = record.details.get("model", {}), record.details.get("objective", {})
    steps, epochs = int(record.counts.get("steps", history["step"].max())), int(history["epoch"].max())
    text = (f"An encoder of {model.get('num_layers', '?')} layers, width {model.get('dim', '?')} and "
            f"{model.get('num_heads', '?')} heads was trained from {_start(record)} "
            f"for {wording.plural(steps, 'step')}")  # fmt: skip
    text += f" (epoch {epochs + 1})" if epochs >= 0 else ""
    weight = objective.get("mlm_weight", 1)
    terms = [f"{weight:g} × masked genes"] if weight else []
    if objective.get("contrast_weight", 0):
        terms.append(f"{objective['contrast_weight']:g} × SimCSE contrast ({objective.get('view', 'dropout')} views)")
    if objective.get("ortholog_weight", 0):
        terms.append(f"{objective['ortholog_weight']:g} × orthologs")
    return f"{text} to minimise {' + '.join(terms)}."

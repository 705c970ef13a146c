"""Comparisons of a model with the best baseline of a task, and sentences that state the results.

A model is ahead or behind where the paired difference has p <= 0.05 after Holm's correction for the number of tasks. Without a
paired difference it is ahead or behind where the intervals of the two scores do not overlap. Otherwise the two are level. With
too few donors for an interval, nothing is said of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import pandas as pd

from mixgf.classification import registry
from mixgf.report import wording

TASK = ["split", "group", "direction"]
"""Columns that name a task: how cells were divided, which group of cells, and the direction of a transfer between species."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedComparison:
    """A model and the best baseline of the same task, in one metric."""

    split: str
    group: str
    direction: str
    metric: str
    model: str
    score: tuple[float, float, float]
    """Value, low, high."""
    baseline: str
    baseline_score: tuple[float, float, float]
    difference: tuple[float, float, float] | None = None
    """Model less baseline on the same test cells (value, low, high), if it was computed."""
    outcome: str = ""
    """`win`, `loss`, `tie` or `unknown` of the difference (`classification.metrics.outcomes`), if it was computed."""

    @property
    def verdict(self) -> str:
        """`ahead`, `behind`, `level` or `unknown`; see the module."""
        if self.outcome:
            return {"win": "ahead", "loss": "behind", "tie": "level"}.get(self.outcome, "unknown")
        (_, low, high), (_, base_low, base_high) = self.score, self.baseline_score
        if not all(map(isfinite, (low, high, base_low, base_high))):
            return "unknown"
        if low > base_high:
            return "ahead"
        return "behind" if high < base_low else "level"

    @property
    def lower(self) -> bool:
        """Whether the score is below that of the baseline, regardless of intervals."""
        return self.score[0] < self.baseline_score[0]


def _triple(row: Any) -> tuple[float, float, float]:
    return float(row["value"]), float(row["low"]), float(row["high"])


def paired_comparisons(
    table: pd.DataFrame,
    comparisons: pd.DataFrame | None = None,
    metrics: tuple[str, ...] = ("accuracy", "macro_f1"),
    models: Sequence[str] = registry.OWN,
) -> list[PairedComparison]:
    """Compare each model with the best baseline, task by task.

    Args:
        table: Rows of `mean_scores`.
        comparisons: Paired differences (comparisons.parquet), which also name the baseline. Without them it is the baseline with the
            highest value.
        metrics: Names of the metrics.
        models: Names of the models.
    """
    paired: dict[tuple[str, ...], tuple[str, tuple[float, float, float], str]] = {}
    if comparisons is not None:
        for row in comparisons.to_dict("records"):
            key = (row["split"], row["group"], row["direction"] or "", row["metric"], row["model"])
            paired[key] = (row["baseline"], (row["difference"], row["low"], row["high"]), row["outcome"])
    found: list[PairedComparison] = []
    for keys, task in table[table["metric"].isin(metrics)].groupby([*TASK, "metric"], sort=True):
        row_of = {str(row["model"]): row for row in task.to_dict("records")}
        baselines = sorted((m for m in row_of if registry.is_baseline(m)), key=lambda m: (-row_of[m]["value"], m))
        split, group, direction, metric = keys
        for model in [m for m in models if m in row_of and baselines]:
            baseline, difference, outcome = paired.get((*keys, model), (baselines[0], None, ""))
            found.append(PairedComparison(
                split=split, group=group, direction=direction, metric=metric, model=model, score=_triple(row_of[model]),
                baseline=baseline, baseline_score=_triple(row_of[baseline]), difference=difference, outcome=outcome,
            ))  # fmt: skip
    return found


def tally(found: list[PairedComparison]) -> str:
    """`2 wins, 1 tie, 0 losses`, and the number of tasks with too few donors to say, if any."""
    count = {v: sum(d.verdict == v for d in found) for v in ("ahead", "level", "behind")}
    one = {"ahead": "win", "level": "tie", "behind": "loss"}
    many = {"ahead": "wins", "level": "ties", "behind": "losses"}
    unknown = sum(d.verdict == "unknown" for d in found)
    return ", ".join(
        [f"{n} {(one if n == 1 else many)[v]}" for v, n in count.items()]
        + [f"{unknown} with too few donors to say"] * bool(unknown)
    )


def tally_sentence(found: list[PairedComparison], model: str) -> str:
    """Wins, ties and losses of a model in accuracy and macro F1, as a clause without a full stop."""
    parts = [f"{wording.lower_first(wording.metric_label(m))} {tally([d for d in found if d.model == model and d.metric == m])}"
             for m in ("accuracy", "macro_f1")]  # fmt: skip
    return f"{registry.label(model)}, against the best baseline of each task: {'; '.join(parts)}"


def task_sentences(found: list[PairedComparison]) -> list[tuple[str, str]]:
    """(tone, sentence) for each task of one model's comparisons. The tone is bad, warn, good or plain."""
    out: list[tuple[str, str]] = []
    for split, group, direction in dict.fromkeys((d.split, d.group, d.direction) for d in found):
        mine = [d for d in found if (d.split, d.group, d.direction) == (split, group, direction)]
        if all(d.verdict == "unknown" for d in mine):
            tone, said = "plain", "too few donors to say which is better"
        elif any(d.verdict == "behind" for d in mine):
            tone, said = "bad", "a baseline beats the model"
        elif any(d.lower for d in mine):
            tone, said = "warn", "a baseline scores higher than the model, within the margin of error"
        elif all(d.verdict == "ahead" for d in mine):
            tone, said = "good", "the model beats every baseline"
        else:
            tone, said = "plain", "the model scores highest, within the margin of error"
        parts = [
            f"{wording.lower_first(wording.metric_label(d.metric))} {wording.interval_text(*d.score)} against {wording.interval_text(*d.baseline_score)} of {registry.label(d.baseline)}"
            for d in mine
        ]
        where = f"{wording.SPLIT_NAMES.get(split, split)}, {wording.task_label(split, group, direction)}"
        where = where[:1].upper() + where[1:]
        out.append((tone, f"{where}: {said}. {registry.label(mine[0].model)}: {'; '.join(parts)}."))
    return out


def best_own_model(table: pd.DataFrame, epochs: pd.DataFrame | None = None) -> str:
    """The own model that headlines report, chosen without test cells.

    Among the models that train the encoder: the one with the lowest mean loss on validation cells, over the splits that all of
    them have. Without such models: the first of `registry.OWN` that has scores; empty if none has.

    Args:
        table: Rows with a column `model`.
        epochs: Loss on validation cells by model and epoch (epochs.parquet).
    """
    models = set(table["model"])
    if epochs is not None and len(epochs):
        kept = epochs[epochs["chosen"] & epochs["model"].isin(models & set(registry.OWN))]
        loss = kept.pivot_table(index=[*TASK, "seed"], columns="model", values="loss").dropna()
        if len(loss):
            return str(loss.mean().idxmin())
    return next((m for m in registry.OWN if m in models), "")


def headline_model(found: list[PairedComparison], preferred: str) -> str:
    """`preferred` if it has comparisons, else the first own model that has; empty if none has."""
    compared = {d.model for d in found}
    return next((m for m in (preferred, *registry.OWN) if m in compared), "")

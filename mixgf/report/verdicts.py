"""What the results say: from result tables to comparisons, verdicts and plain sentences.

Pure functions over data frames, in the layout of the artifacts. A verdict is never the author's: a model is ahead of
the best baseline where the 95 % interval of the paired difference lies above 0, and behind where it lies below; without
a paired comparison, where the two intervals do not meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mixgf.classification.integration import MIN_TYPE_CELLS, cosine_distances

OTHER = "@"
"""In the name of a model on another encoder (`probe@mlm`)."""
UNTRAINED = "@untrained"
"""Ends the name of a control: the same model on an encoder with random weights. What it reaches is not pretraining's."""
HEADS = {
    "finetune": "fine-tuned",
    "finetune_linear_start": "fine-tuned from a convex start",
    "lora": "LoRA from a convex start",
    "probe": "frozen + logistic probe",
    "knn": "frozen 5-NN (“zero-shot”)",
    "centroid": "frozen, nearest centroid",
}
OWN = tuple(HEADS)
"""Models built on the encoder under test, the paper's first; every other model is a control or a baseline."""
PAPERS = "finetune"
"""The paper's own way."""
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
TASK = ["split", "group", "direction"]


def label(model: str) -> str:
    """A model's name for readers."""
    head, other, encoder = model.partition(OTHER)
    if head in HEADS:
        return f"{f'{encoder} encoder' if other else 'mixgf'}, {HEADS[head]}"
    return BASELINES.get(model, model.replace("_", " "))


def metric_label(metric: str) -> str:
    """A metric's name for readers."""
    return METRICS.get(metric, metric.replace("_", " "))


def share(value: float) -> str:
    """A score between 0 and 1 with three decimals; a dash where there is none."""
    return "–" if not np.isfinite(value) else f"{value:.3f}"


def interval(value: float, low: float, high: float) -> str:
    """A score with its interval."""
    return share(value) if not (np.isfinite(low) and np.isfinite(high)) else f"{value:.3f} ({low:.3f}–{high:.3f})"


def lower(text: str) -> str:
    """A label inside a sentence: its first letter small, unless the word is a name or an abbreviation."""
    return text if len(text) > 1 and text[1].isupper() else text[:1].lower() + text[1:]


def board(scores: pd.DataFrame) -> pd.DataFrame:
    """Scores as means over seeds: one row per task, metric and model; `seeds` counts them.

    The interval of a mean over seeds is the mean of the seeds' interval ends: it speaks of the cells (or donors) that
    were scored, not of the seeds.
    """
    keys = [*TASK, "metric", "model"]
    numbers = ["value", "low", "high", "num_train", "num_test", "num_classes"]
    frame = scores.assign(direction=scores["direction"].fillna(""))
    out = frame.groupby(keys, sort=True, observed=True)[numbers].mean().reset_index()
    extra = frame.groupby(keys, sort=True, observed=True).agg(
        seeds=("seed", "nunique"), interval_by=("interval_by", "first")
    )
    return out.merge(extra.reset_index(), on=keys)


def is_baseline(model: str) -> bool:
    """Whether a model makes no use of an encoder."""
    return model not in OWN and OTHER not in model


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedComparison:
    """One of our models against the best baseline of the same task and metric."""

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
    """Model less baseline on the same cells, where that was worked out."""

    @property
    def verdict(self) -> str:
        """`ahead`, `behind` or `level`."""
        if self.difference is not None:
            _, low, high = self.difference
            return "ahead" if low > 0 else "behind" if high < 0 else "level"
        (_, low, high), (_, base_low, base_high) = self.score, self.baseline_score
        if low > base_high:
            return "ahead"
        return "behind" if high < base_low else "level"

    @property
    def lower(self) -> bool:
        """Whether the baseline's value is the higher one, whatever the intervals."""
        return self.score[0] < self.baseline_score[0]


def _triple(row: Any) -> tuple[float, float, float]:
    return float(row["value"]), float(row["low"]), float(row["high"])


def duels(
    table: pd.DataFrame,
    comparisons: pd.DataFrame | None = None,
    metrics: tuple[str, ...] = ("accuracy", "macro_f1"),
    models: Sequence[str] = OWN,
) -> list[PairedComparison]:
    """Every model of ours against the best baseline, by task.

    Args:
        table: Rows of `board`.
        comparisons: Paired comparisons, which also name the baseline; without them it is the one with the highest value.
        metrics: Which.
        models: Which.
    """
    paired: dict[tuple[str, ...], tuple[str, tuple[float, float, float]]] = {}
    if comparisons is not None:
        for row in comparisons.to_dict("records"):
            key = (row["split"], row["group"], row["direction"] or "", row["metric"], row["model"])
            paired[key] = (row["baseline"], (row["difference"], row["low"], row["high"]))
    found: list[PairedComparison] = []
    for keys, task in table[table["metric"].isin(metrics)].groupby([*TASK, "metric"], sort=True):
        row_of = {str(row["model"]): row for row in task.to_dict("records")}
        rivals = sorted((m for m in row_of if is_baseline(m)), key=lambda m: (-row_of[m]["value"], m))
        split, group, direction, metric = keys
        for model in [m for m in models if m in row_of and rivals]:
            baseline, difference = paired.get((*keys, model), (rivals[0], None))
            found.append(PairedComparison(
                split=split, group=group, direction=direction, metric=metric, model=model, score=_triple(row_of[model]),
                baseline=baseline, baseline_score=_triple(row_of[baseline]), difference=difference,
            ))  # fmt: skip
    return found


def gain(table: pd.DataFrame, metric: str = "macro_f1") -> list[tuple[str, str, float, int]]:
    """What pretraining adds: (split, model, mean gain over the same model on an untrained encoder, tasks)."""
    rows = table[table["metric"] == metric]
    wide = rows.pivot_table(index=TASK, columns="model", values="value", observed=True)
    out = []
    for split in [s for s in SPLITS if s in set(rows["split"])]:
        for model in [m for m in OWN if m in wide and m + UNTRAINED in wide]:
            change = (wide[model] - wide[model + UNTRAINED]).xs(split, level="split").dropna()
            if len(change):
                out.append((split, model, float(change.mean()), len(change)))
    return out


def tally(found: list[PairedComparison]) -> str:
    """`2 wins, 1 tie, 0 losses`."""
    count = {v: sum(d.verdict == v for d in found) for v in ("ahead", "level", "behind")}
    one = {"ahead": "win", "level": "tie", "behind": "loss"}
    many = {"ahead": "wins", "level": "ties", "behind": "losses"}
    return ", ".join(f"{n} {(one if n == 1 else many)[v]}" for v, n in count.items())


def task_label(split: str, group: str, direction: str) -> str:
    """A task's name for readers: the group and, for a transfer, its direction."""
    arrow = direction.replace("->", ">").replace(">", " → ")
    if split == "species":
        return arrow if group in ("", "all", "species") or arrow in group else f"{arrow} ({group})" if group else arrow
    return " ".join(part for part in (group, f"({arrow})" if arrow else "") if part)


def task_sentences(found: list[PairedComparison]) -> list[tuple[str, str]]:
    """(tone, sentence) for each task of one model's comparisons; a baseline that is better is said first and plainly."""
    out: list[tuple[str, str]] = []
    for split, group, direction in dict.fromkeys((d.split, d.group, d.direction) for d in found):
        mine = [d for d in found if (d.split, d.group, d.direction) == (split, group, direction)]
        if any(d.verdict == "behind" for d in mine):
            tone, said = "bad", "a baseline beats the model"
        elif any(d.lower for d in mine):
            tone, said = "warn", "a baseline scores higher than the model, within the margin of error"
        elif all(d.verdict == "ahead" for d in mine):
            tone, said = "good", "the model beats every baseline"
        else:
            tone, said = "plain", "the model scores highest, within the margin of error"
        parts = [
            f"{lower(metric_label(d.metric))} {interval(*d.score)} against {interval(*d.baseline_score)} of {label(d.baseline)}"
            for d in mine
        ]
        where = f"{SPLIT_NAMES.get(split, split)}, {task_label(split, group, direction)}"
        where = where[:1].upper() + where[1:]
        out.append((tone, f"{where}: {said}. {label(mine[0].model)}: {'; '.join(parts)}."))
    return out


def best_own(table: pd.DataFrame, epochs: pd.DataFrame | None = None) -> str:
    """The model of ours that headlines speak of, chosen without any test cell.

    Of those that train the encoder it is the one with the lowest mean loss on the validation cells, over the splits that all
    of them have; else the first there is.

    Args:
        table: Rows with a `model`.
        epochs: What each training reached on its validation cells.
    """
    models = set(table["model"])
    if epochs is not None and len(epochs):
        kept = epochs[epochs["chosen"] & epochs["model"].isin(models & set(OWN))]
        loss = kept.pivot_table(index=[*TASK, "seed"], columns="model", values="loss").dropna()
        if len(loss):
            return str(loss.mean().idxmin())
    return next((m for m in OWN if m in models), "")


def leakage(table: pd.DataFrame, groups: dict[str, Any], metric: str = "macro_f1") -> pd.DataFrame:
    """How much an easy split flatters: the same cells scored by a random split and by a harder one.

    Args:
        table: Rows of `board`.
        groups: Group to its `species` and `tissues`, which say whose random splits a transfer between species is held against.
        metric: Which.

    Returns:
        Columns model, split, tasks, random, harder, gap: means over the tasks that have both, the models in the order of
        `order_models`.
    """
    wide = table[table["metric"] == metric].pivot_table(index=TASK, columns="model", values="value", observed=True)
    known = set(wide.index.get_level_values("split"))
    rows = []
    for model in order_models([str(m) for m in wide.columns]):
        scored = wide[model].dropna()
        easy = scored.xs("random", level="split").groupby("group").mean() if "random" in known else scored.iloc[:0]
        for split in [s for s in SPLITS if s != "random" and s in known]:
            pairs = []
            for (kind, group, direction), value in scored.items():
                same = [g for g in _same_cells(split, group, direction, groups) if g in easy.index]
                if kind == split and same:
                    pairs.append((float(easy[same].mean()), float(value)))
            if pairs:
                one, other = np.mean(pairs, axis=0)
                rows.append([model, split, len(pairs), one, other, one - other])
    return pd.DataFrame(rows, columns=["model", "split", "tasks", "random", "harder", "gap"])


def _same_cells(split: str, group: str, direction: str, groups: dict[str, Any]) -> list[str]:
    """The groups of the random split whose cells a task of a harder split tests."""
    if split == "donor":
        return [group]
    if split == "dataset":
        return [direction]
    target = direction.replace("->", ">").partition(">")[2]
    return [name for name, about in groups.items() if about["species"] == [target] and about["tissues"] == [group]]


def summary(table: pd.DataFrame, comparisons: pd.DataFrame | None) -> pd.DataFrame:
    """One row per split and model: mean of every metric over tasks, and wins, ties and losses in macro F1.

    A win or loss is against the best baseline of the task, by the paired interval where there is one.
    """
    means = table.pivot_table(index=["split", "model"], columns="metric", values="value", aggfunc="mean", observed=True)
    tasks = (
        table[table["metric"] == "macro_f1"]
        .groupby(["split", "model"], observed=True)
        .agg(tasks=("value", "size"), seeds=("seeds", "max"))
    )
    out = means.join(tasks).reset_index()
    found = duels(
        table, comparisons, ("macro_f1",), models=[str(m) for m in table["model"].unique() if not is_baseline(str(m))]
    )
    for verdict in ("ahead", "level", "behind"):
        out[verdict] = [
            sum(d.split == row.split and d.model == row.model and d.verdict == verdict for d in found) for row in out.itertuples()
        ]  # fmt: skip
    return out


def disagreements(predictions: pd.DataFrame, first: str, second: str, split: str = "random") -> pd.DataFrame:
    """Cells whose given label two unlike models both reject for the same other type, by group, label and what they say.

    Args:
        predictions: Of all models, long.
        first: One model.
        second: Another one; best one that shares nothing with the first.
        split: Which split; a cell that is tested in several seeds counts once.

    Returns:
        Columns group, label, both_say, cells, of (tested cells of the label), probability (mean of the first model's).
    """
    keys = ["group", "direction", "seed", "cell"]
    mine = predictions[predictions["split"] == split]
    one, two = (mine[mine["model"] == model].set_index(keys) for model in (first, second))
    both = one.join(two[["predicted"]].rename(columns={"predicted": "other"}), how="inner").reset_index()
    both = both.drop_duplicates(["group", "cell"])
    total = both.groupby(["group", "true"])["cell"].size().rename("of")
    agreed = both[(both["predicted"] == both["other"]) & (both["predicted"] != both["true"])]
    found = agreed.groupby(["group", "true", "predicted"]).agg(
        cells=("cell", "size"), probability=("probability", "mean")
    )
    found = found.reset_index().merge(total.reset_index(), on=["group", "true"])
    found = found.rename(columns={"true": "label", "predicted": "both_say"})
    return found.sort_values(["cells", "group", "label"], ascending=[False, True, True]).reset_index(drop=True)


def order_models(models: list[str]) -> list[str]:
    """Ours first, in the order of `OWN`; then models on other encoders, encoder by encoder; then baselines by name."""
    others = sorted({m for m in models if OTHER in m}, key=lambda m: (m.partition(OTHER)[2], m))
    return [m for m in OWN if m in models] + others + sorted(m for m in set(models) if is_baseline(m))


# embedding


def centroids(vectors_ND: np.ndarray, species_N: np.ndarray, types_N: np.ndarray) -> dict[tuple[str, str], np.ndarray]:
    """Mean vector of each (species, type) with at least `MIN_TYPE_CELLS` cells."""
    found = {}
    for species in sorted(set(species_N)):
        for kind in sorted(set(types_N[species_N == species])):
            rows = (species_N == species) & (types_N == kind)
            if kind and rows.sum() >= MIN_TYPE_CELLS:
                found[str(species), str(kind)] = vectors_ND[rows].mean(axis=0, dtype=np.float64)
    return found


def mixing(vectors_ND: np.ndarray, species_N: np.ndarray, k: int = 15) -> tuple[float, float]:
    """Share of the k nearest neighbours (cosine) that are of another species, and the share under perfect mixing."""
    distance = cosine_distances(vectors_ND.astype(np.float32), vectors_ND.astype(np.float32))
    np.fill_diagonal(distance, np.inf)
    k = min(k, len(distance) - 1)
    near = np.argpartition(distance, k - 1, axis=1)[:, :k]
    seen = float((species_N[near] != species_N[:, None]).mean())
    _, counts = np.unique(species_N, return_counts=True)
    expected = float(np.sum(counts * (len(distance) - counts)) / (len(distance) * (len(distance) - 1)))
    return seen, expected


def _spoken_of(found: list[PairedComparison], head: str) -> str:
    """The model of the headlines where it was scored, else the first of ours that was."""
    there = {d.model for d in found}
    return next((m for m in (head, *OWN) if m in there), "")


def _tallies(found: list[PairedComparison], model: str) -> str:
    parts = [f"{lower(metric_label(m))} {tally([d for d in found if d.model == model and d.metric == m])}"
             for m in ("accuracy", "macro_f1")]  # fmt: skip
    return f"{label(model)}, against the best baseline of each task: {'; '.join(parts)}"

"""Summaries of classification scores: means over seeds and tasks, gaps between splits, labels that two models reject.

Pure functions of data frames in the layout of the classification artifact.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mixgf.classification import registry
from mixgf.report import verdicts, wording
from mixgf.report.verdicts import TASK
from mixgf.storage.artifacts import Record


def mean_scores(scores: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds: one row per task, metric and model. Column `seeds` is the number of seeds.

    The interval is the mean of the seeds' intervals. It covers the choice of test cells (or donors), not the spread between seeds.
    """
    keys = [*TASK, "metric", "model"]
    numbers = ["value", "low", "high", "num_train", "num_test", "num_classes"]
    frame = scores.assign(direction=scores["direction"].fillna(""))
    out = frame.groupby(keys, sort=True, observed=True)[numbers].mean().reset_index()
    extra = frame.groupby(keys, sort=True, observed=True).agg(
        seeds=("seed", "nunique"), interval_by=("interval_by", "first")
    )
    return out.merge(extra.reset_index(), on=keys)


def groups_of(record: Record | None) -> dict[str, Any]:
    """Groups of cells of a classification: name to `species` and `tissues`; none where there is no classification."""
    return dict(record.details.get("groups", {})) if record is not None else {}


def split_gaps(table: pd.DataFrame, groups: dict[str, Any], metric: str = "macro_f1") -> pd.DataFrame:
    """Difference between the score on a random split and on a harder split of the same cells.

    Args:
        table: Rows of `mean_scores`.
        groups: Group to its `species` and `tissues`. A transfer between species is compared with the random splits of the target
            species and tissue.
        metric: Name of the metric.

    Returns:
        Columns model, split, tasks, random, harder, gap (random less harder). Values are means over the tasks that have both splits;
        models are in the order of `wording.order_models`.
    """
    wide = table[table["metric"] == metric].pivot_table(index=TASK, columns="model", values="value", observed=True)
    known = set(wide.index.get_level_values("split"))
    rows = []
    for model in wording.order_models([str(m) for m in wide.columns]):
        scored = wide[model].dropna()
        easy = scored.xs("random", level="split").groupby("group").mean() if "random" in known else scored.iloc[:0]
        for split in [s for s in wording.SPLITS if s != "random" and s in known]:
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
    """Groups of the random split that hold the test cells of a task of a harder split."""
    if split == "donor":
        return [group]
    if split == "dataset":
        return [direction]
    target = direction.replace("->", ">").partition(">")[2]
    return [name for name, about in groups.items() if about["species"] == [target] and about["tissues"] == [group]]


def model_means(table: pd.DataFrame, comparisons: pd.DataFrame | None) -> pd.DataFrame:
    """One row per split and model: mean of every metric over tasks, and numbers of wins, ties, losses and unknown in macro F1.

    Wins and losses are against the best baseline of the task (`verdicts.PairedComparison.verdict`).
    """
    means = table.pivot_table(index=["split", "model"], columns="metric", values="value", aggfunc="mean", observed=True)
    tasks = (
        table[table["metric"] == "macro_f1"]
        .groupby(["split", "model"], observed=True)
        .agg(tasks=("value", "size"), seeds=("seeds", "max"))
    )
    out = means.join(tasks).reset_index()
    found = verdicts.paired_comparisons(
        table,
        comparisons,
        ("macro_f1",),
        models=[str(m) for m in table["model"].unique() if not registry.is_baseline(str(m))],
    )
    for verdict in ("ahead", "level", "behind", "unknown"):
        out[verdict] = [
            sum(d.split == row.split and d.model == row.model and d.verdict == verdict for d in found) for row in out.itertuples()
        ]  # fmt: skip
    return out


def label_disagreements(predictions: pd.DataFrame, first: str, second: str, split: str = "random") -> pd.DataFrame:
    """Test cells for which two models predict the same type, and that type is not the cell's label.

    Args:
        predictions: One row per model and test cell.
        first: Name of a model.
        second: Name of another model, best one with other inputs than the first.
        split: Name of the split. A cell that is tested with several seeds counts once.

    Returns:
        Columns group, label, both_say (the predicted type), cells, of (test cells with that label), probability (mean over the cells,
        of the first model). Most cells first.
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

"""Tables of label transfer between species: scores, and types for which it fails."""

from __future__ import annotations

import pandas as pd
from scipy.stats import binomtest

from mixgf.classification import registry
from mixgf.comparison.encoder_sets import ComparisonContext, read_classification

FAILED = 0.5
"""A type fails if its recall is below this."""
FEW = 20
"""Below this number of training cells, the number is given as the reason of a failure."""


def transfer(context: ComparisonContext) -> dict[str, pd.DataFrame]:
    """Tables `transfer` (scores by model, task and direction) and `failures` (see `failures`), from the classifications."""
    found: dict[str, list[pd.DataFrame]] = {"scores": [], "per_class": [], "confusion": []}
    for encoder_set in context.encoder_sets:
        for name, several in found.items():
            frame = read_classification(encoder_set, name)
            frame = frame[frame["split"] == "species"]
            several.append(frame.assign(model=[encoder_set.model_name(m) for m in frame["model"]]))
    scores, per_class, confusion = (pd.concat(several, ignore_index=True) for several in found.values())
    keys = ["group", "direction", "model", "metric"]
    means = scores.groupby(keys, sort=False)[["value", "low", "high"]].mean()
    sizes = scores.groupby(keys, sort=False)[["num_train", "num_test", "num_classes", "seed"]].agg(
        {"num_train": "first", "num_test": "first", "num_classes": "first", "seed": "nunique"}
    )
    table = means.join(sizes.rename(columns={"seed": "seeds"})).reset_index()
    return {"transfer": table, "failures": failures(per_class, confusion)}


def failures(per_class: pd.DataFrame, confusion: pd.DataFrame) -> pd.DataFrame:
    """Every transferred type: its recall, the type that most missed cells are predicted as, and a first reason for a failure.

    Args:
        per_class: Table per_class of a classification, splits between species only.
        confusion: Table confusion of the same.

    Returns:
        Columns group, direction, model, type, num_train, num_test; recall over all seeds, low and high (Wilson's 95 % interval; cells
        count as independent, and once even if several seeds test them); `into` and `into_share`, the most frequent wrong type and
        its share of all cells of the type (empty and 0 if no cell is missed); `best_control` and `control_f1`, the baseline with the
        highest F1 of the type; and `why`, a reason in words, empty unless the type fails.
    """
    keys = ["group", "direction", "model"]
    right = confusion["true"] == confusion["predicted"]
    count = confusion.groupby([*keys, "true"])["count"].sum().rename("cells")
    hit = confusion[right].groupby([*keys, "true"])["count"].sum().rename("right")
    wrong = confusion[~right].groupby([*keys, "true", "predicted"])["count"].sum().reset_index()
    first = wrong.sort_values(["count", "predicted"], ascending=[False, True]).drop_duplicates([*keys, "true"])
    into = first.set_index([*keys, "true"])[["predicted", "count"]]
    seeds = confusion.groupby(keys)["seed"].nunique()
    sizes = per_class.groupby([*keys, "class"])[["num_train", "num_test"]].max()
    controls = [str(m) for m in confusion["model"].unique() if registry.is_baseline(str(m))]
    called = confusion.groupby([*keys, "predicted"])["count"].sum()
    f1 = {key: 2 * float(hit.get(key, 0)) / (float(cells) + float(called.get(key, 0))) for key, cells in count.items()}
    control = {
        (group, direction, kind): max(
            ((f1[group, direction, m, kind], m) for m in controls if (group, direction, m, kind) in f1), default=(float("nan"), "")
        )
        for group, direction, _, kind in count.index
    }  # fmt: skip
    rows = []
    for key, cells in count.items():
        group, direction, model, kind = key
        num = int(hit.get(key, 0))
        once = max(1, round(int(cells) / seeds[group, direction, model]))
        range_ = binomtest(round(num / int(cells) * once), once).proportion_ci(method="wilson")
        recall, best = num / int(cells), control[group, direction, kind]
        other, missed = (str(into.loc[key, "predicted"]), int(into.loc[key, "count"])) if key in into.index else ("", 0)
        size = sizes.loc[key]
        rows.append({
            "group": group, "direction": direction, "model": model, "type": kind, "num_train": int(size["num_train"]),
            "num_test": int(size["num_test"]), "recall": recall, "low": range_.low, "high": range_.high, "into": other,
            "into_share": missed / int(cells), "best_control": best[1], "control_f1": best[0],
            "why": _why(model, recall, best, int(size["num_train"])),
        })  # fmt: skip
    return pd.DataFrame(rows)


def _why(model: str, recall: float, best: tuple[float, str], num_train: int) -> str:
    """A reason for a failure, from the number of training cells and the best baseline; empty if the type does not fail."""
    if recall >= FAILED:
        return ""
    if num_train < FEW:
        return f"only {num_train} training cells"
    if registry.is_baseline(model):
        return "unknown: this is a baseline"
    if not best[1]:
        return "unknown: no baseline was scored"
    if best[0] >= FAILED:
        return f"a baseline finds it ({best[1]}: F1 {best[0]:.2f}), this model does not"
    return f"all baselines fail too (best {best[1]}: F1 {best[0]:.2f}): labels, markers or states may differ between the data sets"

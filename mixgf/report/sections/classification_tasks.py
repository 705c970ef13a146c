"""Classification, task by task: scores of every model, F1 by cell type, confusion matrices."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mixgf.classification import registry
from mixgf.report import score_tables, verdicts, wording
from mixgf.report.elements import Cell, Figure, Section, Table, Text, count_cell, not_run
from mixgf.report.figures import heatmap, score_marks
from mixgf.report.results import RunResults

TITLE = "Classification: results by task"
MAX_MATRICES, MAX_TRUE, MAX_PREDICTED = 6, 30, 34
"""Most confusion matrices, and most true and predicted types in each."""


def section(results: RunResults) -> Section:
    """For each split wins and losses and a table of scores; then F1 by cell type and confusion matrices."""
    scores = results.tables.get("scores")
    if scores is None or scores.empty:
        return not_run("classification", TITLE, "classify", results)
    mean_scores = score_tables.mean_scores(scores)
    found = verdicts.paired_comparisons(mean_scores, results.tables.get("comparisons"))
    blocks: list[Any] = []
    splits = [s for s in wording.SPLITS if s in set(mean_scores["split"])]
    for split in splits:
        part = mean_scores[mean_scores["split"] == split]
        blocks.append(Text(wording.SPLITS[split], "heading"))
        mine = [d for d in found if d.split == split]
        blocks += [Text(f"{verdicts.tally_sentence(mine, m)}.") for m in registry.OWN if m in {d.model for d in mine}]
        blocks.append(_scores(part, wording.SPLITS[split]))
    model = verdicts.best_own_model(mean_scores, results.tables.get("epochs"))
    blocks += _f1_by_type(results, mean_scores, model) + _confusions(results, model)
    return Section("classification", TITLE, blocks)


def _scores(mean_scores: pd.DataFrame, title: str) -> Table:
    """Scores of one split: a heading row per task, then a row per model. Marks: ★ best model, ◄ best baseline."""
    metrics = [m for m in ("accuracy", "macro_f1") if m in set(mean_scores["metric"])]
    rows: list[list[Cell]] = []
    seeds, by = int(mean_scores["seeds"].max()), sorted(set(mean_scores["interval_by"].dropna().astype(str)))
    for (split, group, direction), task in mean_scores.groupby(verdicts.TASK, sort=True):
        one = task.iloc[0]
        rows.append(
            [
                Cell(
                    f"{wording.task_label(split, group, direction)}: {wording.plural(round(one['num_classes']), 'type')}, trained on "
                    f"{wording.plural(round(one['num_train']), 'cell')}, scored on {wording.plural(round(one['num_test']), 'cell')}"
                )
            ]
        )
        wide = {m: task[task["metric"] == m].set_index("model") for m in metrics}
        best = {m: t.loc[[registry.is_baseline(str(i)) for i in t.index], "value"].max() for m, t in wide.items()}
        top = {m: t["value"].max() for m, t in wide.items()}
        for model in wording.order_models(list(task["model"].unique())):
            own, baseline = model in registry.OWN, registry.is_baseline(model)
            own_seeds = int(task[task["model"] == model]["seeds"].max())
            few = f" ({wording.plural(own_seeds, 'seed')})" if own_seeds < seeds else ""
            row = [Cell(("● " if own else "□ " if baseline else "○ ") + registry.label(model) + few, strong=own)]
            for m in metrics:
                if model not in wide[m].index:
                    row.append(Cell("–", -1.0))
                    continue
                value, low, high = (float(wide[m].loc[model, c]) for c in ("value", "low", "high"))
                mark = " ★" if value == top[m] else ""
                mark += " ◄" if baseline and value == best[m] else ""
                row.append(Cell(wording.interval_text(value, low, high) + mark, value, score_marks.interval_mark(value, low, high, own=own),
                                strong=value == top[m]))  # fmt: skip
            rows.append(row)
    unit = {"donor": "donors", "cell": "cells of one donor"}
    over = " or ".join(unit.get(b, b) for b in by if b != "none")
    note = f"{title}. Value (95 % interval over {over})" if over else f"{title}. Value"
    if "none" in by:
        note += "; no interval with two or three donors, or one that is held out: too few to say"
    note += (
        f", mean over {seeds} seeds"
        if seeds > 1
        else ", one seed, so the interval does not cover the spread between trainings"
    )
    return Table(
        f"{note}. ● models on the encoder of this run, ○ the same on another encoder, □ baselines. All are trained and tested on the same "
        "cells with the same seeds. ★ highest, ◄ best baseline. The scale of the drawings is 0 to 1.",
        ["Model", *[wording.metric_label(m) for m in metrics]],
        rows,
    )


def _f1_by_type(results: RunResults, mean_scores: pd.DataFrame, model: str) -> list[Any]:
    """F1 of a model for every type of every task, beside the best baseline of the task."""
    table = results.tables.get("per_class")
    if table is None or table.empty or not model:
        return []
    name = next(c for c in ("class", "label", "type", "cell_type") if c in table.columns)
    value = "f1" if "f1" in table.columns else "value"
    rows: list[list[Cell]] = []
    frame = table.assign(direction=table["direction"].fillna(""))
    if "metric" in frame.columns:
        frame = frame[frame["metric"] == "f1"]
    f1 = mean_scores[mean_scores["metric"] == "macro_f1"]
    for (split, group, direction), task in frame.groupby(verdicts.TASK, sort=False):
        others = f1[
            (f1["split"] == split)
            & (f1["group"] == group)
            & (f1["direction"] == direction)
            & f1["model"].map(registry.is_baseline)
        ]
        baseline = (
            str(others.sort_values(["value", "model"], ascending=[False, True]).iloc[0]["model"]) if len(others) else ""
        )
        means = task.groupby([name, "model"])[value].mean().unstack("model")
        if model not in means.columns:
            continue
        against = f", against {registry.label(baseline)}" if baseline in means.columns else ""
        rows.append(
            [Cell(f"{wording.SPLITS.get(split, split)}: {wording.task_label(split, group, direction)}{against}")]
        )
        support = next((c for c in ("num_test", "support", "num_cells", "count") if c in task.columns), "")
        sizes = task[task["model"] == model].groupby(name)[support].mean() if support else pd.Series(dtype=float)
        for kind in means.sort_values(model, kind="stable").index:
            mine, theirs = float(means.loc[kind, model]), float(means.loc[kind, baseline]) if against else float("nan")
            sign = (
                ""
                if not np.isfinite(theirs)
                else " ▼ below"
                if mine < theirs - 5e-4
                else " ▲ above"
                if mine > theirs + 5e-4
                else " = equal"
            )
            rows.append([
                Cell(str(kind)), count_cell(float(sizes.get(kind, float("nan")))),
                Cell("", mine, score_marks.pair_mark(mine, theirs)), Cell(wording.score_text(mine) + sign, mine), Cell(wording.score_text(theirs), theirs),
            ])  # fmt: skip
    grid = Table(
        f"F1 of every type: {registry.label(model)} and the baseline with the best macro F1 of that task. The F1 of a type with few "
        "test cells is uncertain, but has the same weight in the macro F1.",
        ["Type", "Test cells", "0 to 1", "● Model", "□ Best baseline"],
        rows,
    )
    return [Text("F1 by cell type", "heading"), grid] if rows else []


def _confusions(results: RunResults, model: str) -> list[Any]:
    """Confusion matrices of a model."""
    table = results.tables.get("confusion")
    if table is None or table.empty or not model:
        return []
    blocks: list[Any] = [Text("Confusion matrices", "heading")]
    frame = table.assign(direction=table["direction"].fillna(""))
    tasks = list(frame[frame["model"] == model].groupby(verdicts.TASK, sort=False))[:MAX_MATRICES]
    for i, ((split, group, direction), part) in enumerate(tasks):
        wide = part.pivot_table(index="true", columns="predicted", values="count", aggfunc="sum", fill_value=0)
        order = list(wide.sum(axis=1).sort_values(ascending=False, kind="stable").index)[:MAX_TRUE]
        columns = order + [t for t in wide.columns if t not in order]
        wide = wide.reindex(index=order, columns=columns[:MAX_PREDICTED], fill_value=0)
        share = wide.div(wide.sum(axis=1).clip(lower=1), axis=0)
        share.index = pd.Index([f"{t} ({n:,.0f})" for t, n in wide.sum(axis=1).items()])
        text = [["" if v < 0.005 else f"{100 * v:.0f}" for v in row] for row in share.to_numpy()]
        blocks.append(
            Figure(
                heatmap.heatmap(
                    share, f"confusion-{i}", rows="true type (test cells)", columns="predicted type", text=text
                ),
                f"{registry.label(model)}, {wording.SPLITS.get(split, split).lower()}: {wording.task_label(split, group, direction)}. Per "
                "cent of the test cells of each true type; off the diagonal are wrong predictions.",
            )
        )
    return blocks

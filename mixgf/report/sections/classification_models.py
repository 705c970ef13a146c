"""Classification, models compared: means over tasks, random against harder splits, few labels, unseen types, doubtful labels."""

from __future__ import annotations

from typing import Any

import pandas as pd

from mixgf.classification import registry
from mixgf.report import score_tables, wording
from mixgf.report.elements import Cell, Figure, Section, Table, Text, count_cell, not_run, number_cell
from mixgf.report.figures import curves
from mixgf.report.results import RunResults

TITLE = "Classification: models compared"
NUM_DISAGREEMENTS = 20
"""Most rows in the table of doubtful labels."""
MIN_DISAGREEMENTS = 3
"""Fewest cells of a row in that table."""


def section(results: RunResults) -> Section:
    """Tables and figures that compare models over all tasks."""
    scores = results.tables.get("scores")
    if scores is None or scores.empty:
        return not_run("models", TITLE, "classify", results)
    mean_scores = score_tables.mean_scores(scores)
    blocks = [
        *_means(mean_scores, results),
        *_split_gaps(mean_scores, results),
        *_label_efficiency(results),
        *_unseen_types(results),
        *_doubtful_labels(mean_scores, results),
    ]
    return Section("models", TITLE, blocks)


def _means(mean_scores: pd.DataFrame, results: RunResults) -> list[Any]:
    """One row per model and split."""
    table = score_tables.model_means(mean_scores, results.tables.get("comparisons"))
    metrics = [m for m in wording.METRICS if m in table.columns]
    rows: list[list[Cell]] = []
    for split in [s for s in wording.SPLITS if s in set(table["split"])]:
        mine = table[table["split"] == split].set_index("model")
        rows.append([Cell(f"{wording.SPLITS[split]}: {wording.plural(int(mine['tasks'].max()), 'task')}")])
        best = {m: mine[m].min() if m == "ece" else mine[m].max() for m in metrics}
        for model in wording.order_models(list(mine.index)):
            row = mine.loc[model]
            scored = [
                Cell(
                    wording.score_text(row[m]) + (" ★" if row[m] == best[m] else ""),
                    float(row[m]),
                    strong=row[m] == best[m],
                )
                for m in metrics
            ]
            against = (
                "–"
                if registry.is_baseline(model)
                else f"{row['ahead']:.0f} / {row['level']:.0f} / {row['behind']:.0f}"
                + (f" / {row['unknown']:.0f} ?" if row["unknown"] else "")
            )
            tested = Cell(f"{row['tasks']:.0f} × {row['seeds']:.0f}", float(row["tasks"]))
            rows.append(
                [
                    Cell(_mark(model) + registry.label(model), strong=model in registry.OWN),
                    *scored,
                    Cell(against, ""),
                    tested,
                ]
            )
    grid = Table(
        "Means over tasks. ● models on the encoder of this run, ○ the same on another encoder, □ baselines; ★ best of the split. Macro F1 gives every type the same weight, however rare. The calibration error is the "
        "difference between the predicted probability and the share of correct predictions (0 is best). Wins, ties and losses count "
        "tasks, in macro F1 against the best baseline of the task. They go by the paired difference at p ≤ 0.05, corrected for the number "
        "of tasks. It is taken over donors, or over cells where all are of one donor. `?` counts tasks with too few donors to say. The last column "
        "tells over how many tasks and seeds a mean is taken.",
        ["Model", *[wording.metric_label(m) for m in metrics], "Wins / ties / losses", "Tasks × seeds"],
        rows,
    )
    return [grid, *_fixed_numbers(sorted(set(table["model"])))]


def _fixed_numbers(models: list[str]) -> list[Any]:
    """Which models have numbers that were chosen with scores in sight."""
    chosen = [registry.label(model) for model in wording.order_models(models) if registry.chosen_on_public(model)]
    if not chosen:
        return []
    text = (
        f"These models have penalties or rates that were chosen with scores of public data sets in sight: {'; '.join(chosen)}. On those "
        "sets (pancreas of Baron et al., pbmc3k, Kang et al. and others) their scores may be too high. The other models have usual values, "
        "or those of their authors."
    )
    return [Text(text)]


def _mark(model: str) -> str:
    return "● " if model in registry.OWN else "□ " if registry.is_baseline(model) else "○ "


def _split_gaps(mean_scores: pd.DataFrame, results: RunResults) -> list[Any]:
    gaps = score_tables.split_gaps(mean_scores, score_tables.groups_of(results.records.get("classify")))
    if gaps.empty:
        return []
    rows: list[list[Cell]] = []
    for split in [s for s in wording.SPLITS if s in set(gaps["split"])]:
        mine = gaps[gaps["split"] == split]
        rows.append(
            [
                Cell(
                    f"{wording.SPLITS[split]}, against random cells of the same groups ({wording.plural(int(mine['tasks'].max()), 'task')})"
                )
            ]
        )
        rows += [
            [Cell(_mark(r.model) + registry.label(r.model)), number_cell(r.random, ".3f"), number_cell(r.harder, ".3f"), number_cell(r.gap, "+.3f")]
            for r in mine.itertuples()
        ]  # fmt: skip
    grid = Table(
        "Macro F1 on the same cells with two splits. Cells of one donor resemble each other, and a random split puts some of them into "
        "training. The gap is the part of the score that does not carry over to new donors, data sets or species. A harder split "
        "leaves out types that only the training or only the test cells have.",
        ["Model", "Random cells", "Harder split", "Gap"],
        rows,
    )
    return [Text("Random split against harder splits", "heading"), grid]


UNLABELLED = "joint_pca_centroid"
"""The baseline of few labels: it reads the unlabelled cells too."""


def _label_efficiency(results: RunResults) -> list[Any]:
    table = results.tables.get("efficiency")
    if table is None or table.empty or table["share"].nunique() < 2:
        return []
    f1 = (
        table[table["metric"] == "macro_f1"]
        .groupby(["model", "share", "group"])["value"]
        .mean()
        .groupby(["model", "share"])
        .mean()
    )
    models = wording.order_models(list(f1.index.get_level_values("model").unique()))
    lines = {registry.label(m): f1[m] for m in models}
    least, top = float(table["share"].min()), {m: line.iloc[0] for m, line in lines.items()}
    winner = max(top, key=lambda m: top[m])
    caption = (
        f"Label efficiency: macro F1 with a part of the training labels (at least one cell of every type), on the same "
        f"test cells, mean over {wording.plural(table['group'].nunique(), 'group')} and {wording.plural(table['seed'].nunique(), 'seed')}."
    )
    said = ""
    if {"probe", UNLABELLED} <= set(models):  # unlabelled cells are free for every model
        shares = [share for share in f1["probe"].index if share < 1 and share in f1[UNLABELLED].index]
        pairs = ", ".join(f"{f1['probe'][s]:.3f} and {f1[UNLABELLED][s]:.3f} with {s:.0%}" for s in shares)
        said = f" Frozen vectors + logistic probe, and PCA of all cells + nearest centroid without an encoder: {pairs}."
    return [
        Text("Few training labels", "heading"),
        Text(f"With {least:.0%} of the labels {wording.lower_first(winner)} scores highest: {top[winner]:.3f}; with all of them "
             f"{wording.lower_first(max(lines, key=lambda m: lines[m].iloc[-1]))}: {max(line.iloc[-1] for line in lines.values()):.3f}.{said}"),
        Figure(curves.label_efficiency(lines), caption),
    ]  # fmt: skip


def _unseen_types(results: RunResults) -> list[Any]:
    table = results.tables.get("rejection")
    if table is None or table.empty:
        return []
    wide = table.pivot_table(index="model", columns="metric", values="value", aggfunc=["mean", "min", "max"])
    rows = []
    for model in wording.order_models(list(wide.index)):
        auroc, low, high = (wide.loc[model, (how, "auroc")] for how in ("mean", "min", "max"))
        rows.append([Cell(_mark(model) + registry.label(model)), Cell(f"{auroc:.3f} ({low:.2f}–{high:.2f})", float(auroc)),
                     Cell(f"{wide.loc[model, ('mean', 'rejected')]:.0%}", float(wide.loc[model, ("mean", "rejected")]))])  # fmt: skip
    cases = len(table[["group", "unseen"]].drop_duplicates())
    grid = Table(
        f"{wording.plural(cases, 'type')} left out of training, one at a time. AUROC: the chance that a cell of the unknown type gets a lower "
        "probability than a cell of a known type (0.5 is chance; mean, and range over types). Rejected: share of the unknown cells "
        "below the threshold that 95 % of the known cells pass.",
        ["Model", "AUROC", "Rejected"],
        rows,
    )
    return [Text("Cell types without training cells", "heading"), grid]


def _doubtful_labels(mean_scores: pd.DataFrame, results: RunResults) -> list[Any]:
    predictions = results.tables.get("predictions")
    if predictions is None or predictions.empty:
        return []
    f1 = (
        mean_scores[(mean_scores["metric"] == "macro_f1") & (mean_scores["split"] == "random")]
        .groupby("model", observed=True)["value"]
        .mean()
    )
    pairs = ([m for m in f1.index if m in registry.OWN], [m for m in f1.index if registry.is_baseline(m)])
    if not all(pairs):
        return []
    first, second = (max(models, key=lambda m: (f1[m], m)) for models in pairs)
    found = score_tables.label_disagreements(predictions, first, second)
    found = found[found["cells"] >= MIN_DISAGREEMENTS].head(NUM_DISAGREEMENTS)
    names = f"{registry.label(first)} and {registry.label(second)}"
    if found.empty:
        return [
            Text("Labels that may be wrong", "heading"),
            Text(f"For no label do {names} agree on another type in {MIN_DISAGREEMENTS} cells or more."),
        ]
    rows = [
        [Cell(r.group), Cell(r.label), Cell(r.both_say), count_cell(r.cells), Cell(f"{r.cells / r.of:.0%}", r.cells / r.of), number_cell(r.probability, ".2f")]
        for r in found.itertuples()
    ]  # fmt: skip
    grid = Table(
        f"Test cells for which {names} predict the same type, and it is not the label. The two use different inputs, so such labels are "
        "worth checking. Closely related types, doublets and intermediate states give the same picture.",
        ["Group", "Label", "Both predict", "Cells", "Share of the label", "Probability"],
        rows,
    )
    return [Text("Labels that may be wrong", "heading"), grid]

"""Section of the report that sets models side by side: averages, what an easy split hides, few labels, unknown types, the paper.

What the words claim is worked out in `findings`; here it is only laid out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mixgf.report import published, verdicts
from mixgf.report.elements import Cell, Grid, Picture, Run, Section, Text, count, missing, number, plural
from mixgf.report.figures import plots

TITLE = "Models side by side"
NUM_DISAGREEMENTS = 20
MIN_DISAGREEMENTS = 3
"""Fewest cells of a label that two models call the same other type, to be listed."""


def section(run: Run) -> Section:
    """Everything that compares models over all tasks at once."""
    scores = run.tables.get("scores")
    if scores is None or scores.empty:
        return missing("models", TITLE, "classify", run)
    board = verdicts.board(scores)
    blocks = _averages(board, run) + _leakage(board, run) + _efficiency(run) + _rejection(run)
    return Section("models", TITLE, blocks + _paper(board, run) + _disagreements(board, run))


def _averages(board: pd.DataFrame, run: Run) -> list[Any]:
    """One row per model and split."""
    table = verdicts.summary(board, run.tables.get("comparisons"))
    metrics = [m for m in verdicts.METRICS if m in table.columns]
    rows: list[list[Cell]] = []
    for split in [s for s in verdicts.SPLITS if s in set(table["split"])]:
        mine = table[table["split"] == split].set_index("model")
        rows.append([Cell(f"{verdicts.SPLITS[split]}: {plural(int(mine['tasks'].max()), 'task')}")])
        best = {m: mine[m].min() if m == "ece" else mine[m].max() for m in metrics}
        for model in verdicts.order_models(list(mine.index)):
            row = mine.loc[model]
            scored = [
                Cell(
                    verdicts.share(row[m]) + (" ★" if row[m] == best[m] else ""),
                    float(row[m]),
                    strong=row[m] == best[m],
                )
                for m in metrics
            ]
            against = (
                "–" if verdicts.is_baseline(model) else f"{row['ahead']:.0f} / {row['level']:.0f} / {row['behind']:.0f}"
            )
            tested = Cell(f"{row['tasks']:.0f} × {row['seeds']:.0f}", float(row["tasks"]))
            rows.append(
                [
                    Cell(_mark(model) + verdicts.label(model), strong=model in verdicts.OWN),
                    *scored,
                    Cell(against, ""),
                    tested,
                ]
            )
    grid = Grid(
        "Means over tasks; ★ best of the split. Macro F1 counts every type alike, however rare; the calibration error says how far "
        "the stated probability is from the share of right answers (0 is best). Wins, ties and losses are tasks against the best "
        "baseline of that task in macro F1, by the 95 % interval of the paired difference. A model with fewer tasks or seeds than "
        "the others has its mean over those.",
        ["Model", *[verdicts.metric_label(m) for m in metrics], "Wins / ties / losses", "Tasks × seeds"],
        rows,
    )
    return [grid]


def _mark(model: str) -> str:
    return "● " if model in verdicts.OWN else "□ " if verdicts.is_baseline(model) else "○ "


def _groups(run: Run) -> dict[str, Any]:
    record = run.records.get("classify")
    return dict(record.details.get("groups", {})) if record is not None else {}


def _leakage(board: pd.DataFrame, run: Run) -> list[Any]:
    gaps = verdicts.leakage(board, _groups(run))
    if gaps.empty:
        return []
    rows: list[list[Cell]] = []
    for split in [s for s in verdicts.SPLITS if s in set(gaps["split"])]:
        mine = gaps[gaps["split"] == split]
        rows.append(
            [
                Cell(
                    f"{verdicts.SPLITS[split]}, against random cells of the same sets ({plural(int(mine['tasks'].max()), 'task')})"
                )
            ]
        )
        rows += [
            [Cell(_mark(r.model) + verdicts.label(r.model)), number(r.random, ".3f"), number(r.harder, ".3f"), number(r.gap, "+.3f")]
            for r in mine.itertuples()
        ]  # fmt: skip
    grid = Grid(
        "Macro F1 on the same cells by two splits. Cells of one donor resemble each other, so a random split, which puts some of "
        "them into training, flatters; the gap is what it hides. Types that only one side has are left out of a harder split.",
        ["Model", "Random cells", "Harder split", "Gap"],
        rows,
    )
    return [Text("What an easy split hides", "heading"), grid]


def _efficiency(run: Run) -> list[Any]:
    table = run.tables.get("efficiency")
    if table is None or table.empty or table["share"].nunique() < 2:
        return []
    f1 = (
        table[table["metric"] == "macro_f1"]
        .groupby(["model", "share", "group"])["value"]
        .mean()
        .groupby(["model", "share"])
        .mean()
    )
    models = verdicts.order_models(list(f1.index.get_level_values("model").unique()))
    curves = {verdicts.label(m): f1[m] for m in models}
    least, top = float(table["share"].min()), {m: line.iloc[0] for m, line in curves.items()}
    winner = max(top, key=lambda m: top[m])
    caption = (
        f"Label efficiency: macro F1 when only a part of the training labels is there (at least one cell of every type), on the same "
        f"test cells, mean over {plural(table['group'].nunique(), 'set')} and {plural(table['seed'].nunique(), 'seed')}."
    )
    return [
        Text("With few labels", "heading"),
        Text(f"With {least:.0%} of the labels {verdicts.lower(winner)} scores highest: {top[winner]:.3f}; with all of them "
             f"{verdicts.lower(max(curves, key=lambda m: curves[m].iloc[-1]))}: {max(line.iloc[-1] for line in curves.values()):.3f}."),
        Picture(plots.efficiency(curves), caption),
    ]  # fmt: skip


def _rejection(run: Run) -> list[Any]:
    table = run.tables.get("rejection")
    if table is None or table.empty:
        return []
    wide = table.pivot_table(index="model", columns="metric", values="value", aggfunc=["mean", "min", "max"])
    rows = []
    for model in verdicts.order_models(list(wide.index)):
        auroc, low, high = (wide.loc[model, (how, "auroc")] for how in ("mean", "min", "max"))
        rows.append([Cell(_mark(model) + verdicts.label(model)), Cell(f"{auroc:.3f} ({low:.2f}–{high:.2f})", float(auroc)),
                     Cell(f"{wide.loc[model, ('mean', 'rejected')]:.0%}", float(wide.loc[model, ("mean", "rejected")]))])  # fmt: skip
    cases = len(table[["group", "unseen"]].drop_duplicates())
    grid = Grid(
        f"{plural(cases, 'type')} left out of training, one at a time. AUROC: the chance that a cell of the unknown type gets a lower "
        "probability than one of a known type (0.5 is guessing; mean, and lowest to highest over types). Rejected: share of the "
        "unknown cells below the limit that lets 95 % of the known ones pass.",
        ["Model", "AUROC", "Rejected"],
        rows,
    )
    return [Text("Types that the model never saw", "heading"), grid]


# The paper


def _paper(board: pd.DataFrame, run: Run) -> list[Any]:
    """Tables 1 to 3 with our columns beside the published ones."""
    accuracy = board[(board["metric"] == "accuracy") & (board["split"] == "random")]
    ours = accuracy.pivot_table(index="group", columns="model", values="value", observed=True)
    types = accuracy.groupby("group", observed=True)["num_classes"].max()
    of: dict[str, list[tuple[str, str]]] = {}  # species to (tissue, group)
    for group, about in _groups(run).items():
        if len(about["species"]) == 1 and group in ours.index:
            of.setdefault(about["species"][0], []).append(
                (published.tissue(" + ".join(t for t in about["tissues"] if t)), group)
            )
    if not of:
        return []
    encoders = ["", *sorted({m.partition(verdicts.OTHER)[2] for m in ours.columns if verdicts.OTHER in m})]
    blocks: list[Any] = [
        Text("Beside the paper", "heading"),
        Text("Published figures are accuracies in per cent on other cells than ours, with other labels, of one seed and without "
             "interval; ours are on the cells of this run. Read the order of models within a row, not a row across.", "plain"),
    ]  # fmt: skip
    blocks += [
        _beside(name, species, mine=of[species], ours=ours, types=types, encoders=encoders)
        for species, (name, _) in published.TABLES.items() if species in of
    ]  # fmt: skip
    if "mouse" in of:
        blocks.append(_conventional(of["mouse"], ours, types))
    return blocks


def _percent(ours: pd.DataFrame, group: str, model: str) -> Cell:
    if group not in ours.index or model not in ours.columns or not np.isfinite(ours.loc[group, model]):
        return Cell("–", -1.0)
    return Cell(f"{100 * ours.loc[group, model]:.1f}", float(ours.loc[group, model]))


def _rows(published: dict[str, int], mine: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """(tissue, group) in the paper's order, then ours that the paper has not; group "" where we have none."""
    found = [(tissue, group) for tissue in published for t, group in mine if t == tissue]
    found += [(tissue, "") for tissue in published if tissue not in {t for t, _ in mine}]
    order = {tissue: i for i, tissue in enumerate(published)}
    return sorted(found, key=lambda pair: order[pair[0]]) + [(t, g) for t, g in mine if t not in published]


def _beside(
    name: str, species: str, *, mine: list[tuple[str, str]], ours: pd.DataFrame, types: pd.Series, encoders: list[str]
) -> Grid:
    _, printed = published.TABLES[species]
    row_of = {row.tissue: row for row in printed}
    models = [m + verdicts.OTHER * bool(e) + e for m in ("finetune", "knn") for e in encoders]
    models = [m for m in models if m in ours.columns]
    rows = []
    for tissue, group in _rows({row.tissue: row.num_types for row in printed}, mine):
        theirs = row_of.get(tissue)
        figures_ = (
            [Cell(f"{v:.1f}", v) for v in (*theirs.tuned, *theirs.zero_shot)] if theirs else [Cell("–", -1.0)] * 6
        )
        counted = [
            count(theirs.num_types) if theirs else Cell("–", -1.0),
            count(float(types[group])) if group else Cell("–", -1.0),
        ]
        rows.append([Cell(f"{tissue} ({group})" if group else tissue), counted[0], *figures_, counted[1],
                     *[_percent(ours, group, m) for m in models]])  # fmt: skip
    columns = [c.format(species.capitalize()) for c in published.COLUMNS]
    head = [
        "Tissue (our set)",
        "Types",
        *[f"{c}, {how}" for how in ("fine-tuned", "zero-shot") for c in columns],
        "Our types",
    ]
    return Grid(
        f"The paper's {name}, accuracy in per cent ({species} tissues; published), and ours on random cells. A dash: not in the "
        "paper, or not in this run.",
        [*head, *[verdicts.label(m) for m in models]],
        rows,
    )


def _conventional(mine: list[tuple[str, str]], ours: pd.DataFrame, types: pd.Series) -> Grid:
    models = [m for m in ("finetune", "scvi", *verdicts.BASELINES) if m in ours.columns]
    models = list(dict.fromkeys(models))
    rows = []
    for tissue, group in _rows(dict.fromkeys(published.CONVENTIONAL, 0), mine):
        theirs = published.CONVENTIONAL.get(tissue)
        figures_ = [Cell(f"{v:.1f}", v) for v in theirs] if theirs else [Cell("–", -1.0)] * 4
        counted = count(float(types[group])) if group else Cell("–", -1.0)
        rows.append(
            [
                Cell(f"{tissue} ({group})" if group else tissue),
                *figures_,
                counted,
                *[_percent(ours, group, m) for m in models],
            ]
        )
    return Grid(
        "The paper's Table 2, accuracy in per cent (mouse tissues; published), and ours on random cells. scVI is a variational "
        "autoencoder of counts as scVAE is; nothing here stands for scDeepSort's graph network, whose package is not kept up.",
        [
            "Tissue (our set)",
            "Mouse-Geneformer",
            "Mix-Geneformer",
            "scDeepSort",
            "scVAE",
            "Our types",
            *[verdicts.label(m) for m in models],
        ],
        rows,
    )


def _disagreements(board: pd.DataFrame, run: Run) -> list[Any]:
    predictions = run.tables.get("predictions")
    if predictions is None or predictions.empty:
        return []
    f1 = (
        board[(board["metric"] == "macro_f1") & (board["split"] == "random")]
        .groupby("model", observed=True)["value"]
        .mean()
    )
    pairs = ([m for m in f1.index if m in verdicts.OWN], [m for m in f1.index if verdicts.is_baseline(m)])
    if not all(pairs):
        return []
    first, second = (max(models, key=lambda m: (f1[m], m)) for models in pairs)
    found = verdicts.disagreements(predictions, first, second)
    found = found[found["cells"] >= MIN_DISAGREEMENTS].head(NUM_DISAGREEMENTS)
    who = f"{verdicts.label(first)} and {verdicts.label(second)}"
    if found.empty:
        return [
            Text("Where labels are in doubt", "heading"),
            Text(f"Nowhere do {who} agree on another type than the label for {MIN_DISAGREEMENTS} cells of it."),
        ]
    rows = [
        [Cell(r.group), Cell(r.label), Cell(r.both_say), count(r.cells), Cell(f"{r.cells / r.of:.0%}", r.cells / r.of), number(r.probability, ".2f")]
        for r in found.itertuples()
    ]  # fmt: skip
    grid = Grid(
        f"Test cells whose label {who} both reject for the same other type: two methods that look at the cell in unlike ways. Such "
        "labels deserve a second look; neighbouring types, doublets and states between two types look like this, too.",
        ["Set of cells", "Label", "Both say", "Cells", "Of the label", "Probability"],
        rows,
    )
    return [Text("Where labels are in doubt", "heading"), grid]

"""Section of the report that sets models side by side: averages, what an easy split hides, few labels, unknown types, the paper.

What the words claim is worked out in `findings`; here it is only laid out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mixgf.report import published_tables, score_tables, wording
from mixgf.report.elements import Cell, Figure, Section, Table, Text, count_cell, not_run, number_cell
from mixgf.report.figures import curves
from mixgf.report.results import RunResults

TITLE = "Models side by side"
NUM_DISAGREEMENTS = 20
MIN_DISAGREEMENTS = 3
"""Fewest cells of a label that two models call the same other type, to be listed."""


def section(results: RunResults) -> Section:
    """Everything that compares models over all tasks at once."""
    scores = results.tables.get("scores")
    if scores is None or scores.empty:
        return not_run("models", TITLE, "classify", results)
    mean_scores = score_tables.mean_scores(scores)
    blocks = (
        _averages(mean_scores, results) + _leakage(mean_scores, results) + _efficiency(results) + _rejection(results)
    )
    return Section("models", TITLE, blocks + _paper(mean_scores, results) + _disagreements(mean_scores, results))


def _averages(mean_scores: pd.DataFrame, results: RunResults) -> list[Any]:
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
                "–" if wording.is_baseline(model) else f"{row['ahead']:.0f} / {row['level']:.0f} / {row['behind']:.0f}"
            )
            tested = Cell(f"{row['tasks']:.0f} × {row['seeds']:.0f}", float(row["tasks"]))
            rows.append(
                [
                    Cell(_mark(model) + wording.model_label(model), strong=model in wording.OWN_MODELS),
                    *scored,
                    Cell(against, ""),
                    tested,
                ]
            )
    grid = Table(
        "Means over tasks; ★ best of the split. Macro F1 counts every type alike, however rare; the calibration error says how far "
        "the stated probability is from the share of right answers (0 is best). Wins, ties and losses are tasks against the best "
        "baseline of that task in macro F1, by the 95 % interval of the paired difference. A model with fewer tasks or seeds than "
        "the others has its mean over those.",
        ["Model", *[wording.metric_label(m) for m in metrics], "Wins / ties / losses", "Tasks × seeds"],
        rows,
    )
    return [grid]


def _mark(model: str) -> str:
    return "● " if model in wording.OWN_MODELS else "□ " if wording.is_baseline(model) else "○ "


def _groups(results: RunResults) -> dict[str, Any]:
    record = results.records.get("classify")
    return dict(record.details.get("groups", {})) if record is not None else {}


def _leakage(mean_scores: pd.DataFrame, results: RunResults) -> list[Any]:
    gaps = score_tables.split_gaps(mean_scores, _groups(results))
    if gaps.empty:
        return []
    rows: list[list[Cell]] = []
    for split in [s for s in wording.SPLITS if s in set(gaps["split"])]:
        mine = gaps[gaps["split"] == split]
        rows.append(
            [
                Cell(
                    f"{wording.SPLITS[split]}, against random cells of the same sets ({wording.plural(int(mine['tasks'].max()), 'task')})"
                )
            ]
        )
        rows += [
            [Cell(_mark(r.model) + wording.model_label(r.model)), number_cell(r.random, ".3f"), number_cell(r.harder, ".3f"), number_cell(r.gap, "+.3f")]
            for r in mine.itertuples()
        ]  # fmt: skip
    grid = Table(
        "Macro F1 on the same cells by two splits. Cells of one donor resemble each other, so a random split, which puts some of "
        "them into training, flatters; the gap is what it hides. Types that only one side has are left out of a harder split.",
        ["Model", "Random cells", "Harder split", "Gap"],
        rows,
    )
    return [Text("What an easy split hides", "heading"), grid]


def _efficiency(results: RunResults) -> list[Any]:
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
    lines = {wording.model_label(m): f1[m] for m in models}
    least, top = float(table["share"].min()), {m: line.iloc[0] for m, line in lines.items()}
    winner = max(top, key=lambda m: top[m])
    caption = (
        f"Label efficiency: macro F1 when only a part of the training labels is there (at least one cell of every type), on the same "
        f"test cells, mean over {wording.plural(table['group'].nunique(), 'set')} and {wording.plural(table['seed'].nunique(), 'seed')}."
    )
    return [
        Text("With few labels", "heading"),
        Text(f"With {least:.0%} of the labels {wording.lower_first(winner)} scores highest: {top[winner]:.3f}; with all of them "
             f"{wording.lower_first(max(lines, key=lambda m: lines[m].iloc[-1]))}: {max(line.iloc[-1] for line in lines.values()):.3f}."),
        Figure(curves.label_efficiency(lines), caption),
    ]  # fmt: skip


def _rejection(results: RunResults) -> list[Any]:
    table = results.tables.get("rejection")
    if table is None or table.empty:
        return []
    wide = table.pivot_table(index="model", columns="metric", values="value", aggfunc=["mean", "min", "max"])
    rows = []
    for model in wording.order_models(list(wide.index)):
        auroc, low, high = (wide.loc[model, (how, "auroc")] for how in ("mean", "min", "max"))
        rows.append([Cell(_mark(model) + wording.model_label(model)), Cell(f"{auroc:.3f} ({low:.2f}–{high:.2f})", float(auroc)),
                     Cell(f"{wide.loc[model, ('mean', 'rejected')]:.0%}", float(wide.loc[model, ("mean", "rejected")]))])  # fmt: skip
    cases = len(table[["group", "unseen"]].drop_duplicates())
    grid = Table(
        f"{wording.plural(cases, 'type')} left out of training, one at a time. AUROC: the chance that a cell of the unknown type gets a lower "
        "probability than one of a known type (0.5 is guessing; mean, and lowest to highest over types). Rejected: share of the "
        "unknown cells below the limit that lets 95 % of the known ones pass.",
        ["Model", "AUROC", "Rejected"],
        rows,
    )
    return [Text("Types that the model never saw", "heading"), grid]


# The paper


def _paper(mean_scores: pd.DataFrame, results: RunResults) -> list[Any]:
    """Tables 1 to 3 with our columns beside the published ones."""
    accuracy = mean_scores[(mean_scores["metric"] == "accuracy") & (mean_scores["split"] == "random")]
    ours = accuracy.pivot_table(index="group", columns="model", values="value", observed=True)
    types = accuracy.groupby("group", observed=True)["num_classes"].max()
    of: dict[str, list[tuple[str, str]]] = {}  # species to (tissue, group)
    for group, about in _groups(results).items():
        if len(about["species"]) == 1 and group in ours.index:
            of.setdefault(about["species"][0], []).append(
                (published_tables.tissue(" + ".join(t for t in about["tissues"] if t)), group)
            )
    if not of:
        return []
    encoders = [
        "",
        *sorted({m.partition(wording.ENCODER_SEPARATOR)[2] for m in ours.columns if wording.ENCODER_SEPARATOR in m}),
    ]
    blocks: list[Any] = [
        Text("Beside the paper", "heading"),
        Text("Published figures are accuracies in per cent on other cells than ours, with other labels, of one seed and without "
             "interval; ours are on the cells of this run. Read the order of models within a row, not a row across.", "plain"),
    ]  # fmt: skip
    blocks += [
        _beside(name, species, mine=of[species], ours=ours, types=types, encoders=encoders)
        for species, (name, _) in published_tables.TABLES.items() if species in of
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
) -> Table:
    _, printed = published_tables.TABLES[species]
    row_of = {row.tissue: row for row in printed}
    models = [m + wording.ENCODER_SEPARATOR * bool(e) + e for m in ("finetune", "knn") for e in encoders]
    models = [m for m in models if m in ours.columns]
    rows = []
    for tissue, group in _rows({row.tissue: row.num_types for row in printed}, mine):
        theirs = row_of.get(tissue)
        figures_ = (
            [Cell(f"{v:.1f}", v) for v in (*theirs.tuned, *theirs.zero_shot)] if theirs else [Cell("–", -1.0)] * 6
        )
        counted = [
            count_cell(theirs.num_types) if theirs else Cell("–", -1.0),
            count_cell(float(types[group])) if group else Cell("–", -1.0),
        ]
        rows.append([Cell(f"{tissue} ({group})" if group else tissue), counted[0], *figures_, counted[1],
                     *[_percent(ours, group, m) for m in models]])  # fmt: skip
    columns = [c.format(species.capitalize()) for c in published_tables.COLUMNS]
    head = [
        "Tissue (our set)",
        "Types",
        *[f"{c}, {how}" for how in ("fine-tuned", "zero-shot") for c in columns],
        "Our types",
    ]
    return Table(
        f"The paper's {name}, accuracy in per cent ({species} tissues; published), and ours on random cells. A dash: not in the "
        "paper, or not in this run.",
        [*head, *[wording.model_label(m) for m in models]],
        rows,
    )


def _conventional(mine: list[tuple[str, str]], ours: pd.DataFrame, types: pd.Series) -> Table:
    models = [m for m in ("finetune", "scvi", *wording.BASELINES) if m in ours.columns]
    models = list(dict.fromkeys(models))
    rows = []
    for tissue, group in _rows(dict.fromkeys(published_tables.CONVENTIONAL, 0), mine):
        theirs = published_tables.CONVENTIONAL.get(tissue)
        figures_ = [Cell(f"{v:.1f}", v) for v in theirs] if theirs else [Cell("–", -1.0)] * 4
        counted = count_cell(float(types[group])) if group else Cell("–", -1.0)
        rows.append(
            [
                Cell(f"{tissue} ({group})" if group else tissue),
                *figures_,
                counted,
                *[_percent(ours, group, m) for m in models],
            ]
        )
    return Table(
        "The paper's Table 2, accuracy in per cent (mouse tissues; published), and ours on random cells. scVI is a variational "
        "autoencoder of counts as scVAE is; nothing here stands for scDeepSort's graph network, whose package is not kept up.",
        [
            "Tissue (our set)",
            "Mouse-Geneformer",
            "Mix-Geneformer",
            "scDeepSort",
            "scVAE",
            "Our types",
            *[wording.model_label(m) for m in models],
        ],
        rows,
    )


def _disagreements(mean_scores: pd.DataFrame, results: RunResults) -> list[Any]:
    predictions = results.tables.get("predictions")
    if predictions is None or predictions.empty:
        return []
    f1 = (
        mean_scores[(mean_scores["metric"] == "macro_f1") & (mean_scores["split"] == "random")]
        .groupby("model", observed=True)["value"]
        .mean()
    )
    pairs = ([m for m in f1.index if m in wording.OWN_MODELS], [m for m in f1.index if wording.is_baseline(m)])
    if not all(pairs):
        return []
    first, second = (max(models, key=lambda m: (f1[m], m)) for models in pairs)
    found = score_tables.label_disagreements(predictions, first, second)
    found = found[found["cells"] >= MIN_DISAGREEMENTS].head(NUM_DISAGREEMENTS)
    who = f"{wording.model_label(first)} and {wording.model_label(second)}"
    if found.empty:
        return [
            Text("Where labels are in doubt", "heading"),
            Text(f"Nowhere do {who} agree on another type than the label for {MIN_DISAGREEMENTS} cells of it."),
        ]
    rows = [
        [Cell(r.group), Cell(r.label), Cell(r.both_say), count_cell(r.cells), Cell(f"{r.cells / r.of:.0%}", r.cells / r.of), number_cell(r.probability, ".2f")]
        for r in found.itertuples()
    ]  # fmt: skip
    grid = Table(
        f"Test cells whose label {who} both reject for the same other type: two methods that look at the cell in unlike ways. Such "
        "labels deserve a second look; neighbouring types, doublets and states between two types look like this, too.",
        ["Set of cells", "Label", "Both say", "Cells", "Of the label", "Probability"],
        rows,
    )
    return [Text("Where labels are in doubt", "heading"), grid]

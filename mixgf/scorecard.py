"""Sections of the report that judge: the summary in sentences, classification against baselines.

What the words claim is worked out in `findings`; here it is only laid out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mixgf import figures, findings, hits
from mixgf.page import Cell, Grid, Picture, Run, Section, Text, count, missing, pair, plural, whisker


def brief(run: Run) -> Section:
    """What was run, on what, what it reaches, and where a baseline beats it, in sentences."""
    blocks: list[Any] = [Text(_scope(run))]
    scores = run.tables.get("scores")
    if scores is not None and len(scores):
        blocks += _verdicts(run, findings.board(scores))
        blocks.append(_seen(run))
    genes = run.tables.get("genes")
    if genes is not None and len(genes):
        for operation, part in genes.groupby("operation", sort=False):
            lines = hits.sentences(part, goal=bool(run.config.perturb.goal))
            tone = "warn" if any(t == "warn" for t, _ in lines) else "plain"
            blocks.append(Text(f"Perturbation, {operation}: " + " ".join(text for _, text in lines[:2]), tone))
        record = run.records.get("perturb")
        if left := record.counts.get("not_scored", 0) if record is not None else 0:
            blocks.append(
                Text(
                    f"Perturbation is not complete: its budget was spent before {plural(left, 'gene')} were scored.",
                    "bad",
                )
            )
    done = {"corpus": "prepare", "pretrain": "pretrain", "embed": "embed", "classify": "classify", "perturb": "perturb"}
    if absent := [stage for key, stage in done.items() if key not in run.records]:
        blocks.append(Text(f"Not run: {', '.join(absent)}. The sections say which command makes each.", "missing"))
    return Section("brief", "In brief", blocks)


def _seen(run: Run) -> Text:
    """How much of the evaluation the encoder was pretrained on, in every report."""
    record = run.records.get("classify")
    found = record.details.get("audit") if record is not None else None
    if not found:
        return Text(
            "Audit: not made; `mixgf audit EVAL CORPUS` counts the evaluation cells in a pretraining corpus.", "warn"
        )
    clean = found["cells"] is not None and found["cells"][0] == 0
    line = str(found["line"])
    return Text(f"Audit: {line}.", "plain" if clean else "warn")


def _scope(run: Run) -> str:
    cells, record = run.tables.get("cells"), run.records.get("corpus")
    if cells is None or record is None or cells.empty:
        return "No cells were prepared yet."
    parts = []
    for species, part in cells.groupby("species", sort=True):
        donors = part.loc[part["donor"] != "", ["source", "donor"]].drop_duplicates().shape[0]
        whose = f" of {plural(donors, 'donor')}" if donors else ""
        parts.append(f"{plural(int(part['cells'].sum()), f'{species} cell')}{whose}")
    kinds = cells.loc[cells["type"] != "", "type"].nunique()
    text = f"This run works on {' and '.join(parts)}, from {plural(cells['source'].nunique(), 'source')}"
    text += f", with {plural(kinds, 'labelled cell type')}." if kinds else ", without cell type labels."
    return (
        text
        if "pretrain" not in run.records
        else f"{text} One encoder was pretrained on the cells of all species together."
    )


def _verdicts(run: Run, board: pd.DataFrame) -> list[Text]:
    """What the model of the headlines reaches; every task in which a baseline scores higher is named first."""
    found = findings.duels(board, run.tables.get("comparisons"))
    head = findings.best_own(board, run.tables.get("epochs"))
    tone_order = {"bad": 0, "warn": 1, "plain": 2, "good": 3}
    blocks: list[Text] = []
    for split in [s for s in findings.SPLITS if s in set(board["split"])]:
        mine = [d for d in found if d.split == split]
        model = _spoken_of(mine, head)
        lines = sorted(
            findings.task_sentences([d for d in mine if d.model == model]), key=lambda line: tone_order[line[0]]
        )
        if len(lines) > 1:
            blocks.append(
                Text(f"{findings.SPLITS[split]}. {_tallies(mine, model)} (tie: within the 95 % margin of error).")
            )
        if model != findings.PAPERS and any(d.model == findings.PAPERS for d in mine):
            blocks.append(Text(f"{_tallies(mine, findings.PAPERS)}."))
        blocks += [Text(text, tone) for tone, text in lines[:6]]
    if gains := findings.gain(board):
        parts = [f"{findings.label(m)} {v:+.3f} ({findings.SPLIT_NAMES.get(s, s)})" for s, m, v, _ in gains]
        none = [v for *_, v, _ in gains if v <= 0]
        blocks.append(
            Text(
                "What pretraining adds, as mean macro F1 over the same classifier on an untrained encoder: "
                f"{'; '.join(parts)}.",
                "warn" if none else "plain",
            )
        )
    return blocks


def _spoken_of(found: list[findings.Duel], head: str) -> str:
    """The model of the headlines where it was scored, else the first of ours that was."""
    there = {d.model for d in found}
    return next((m for m in (head, *findings.OWN) if m in there), "")


def _tallies(found: list[findings.Duel], model: str) -> str:
    parts = [f"{findings.lower(findings.metric_label(m))} {findings.tally([d for d in found if d.model == model and d.metric == m])}"
             for m in ("accuracy", "macro_f1")]  # fmt: skip
    return f"{findings.label(model)}, against the best baseline of each task: {'; '.join(parts)}"


def tiles(run: Run) -> list[tuple[str, str]]:
    """A few large figures for the head of the page: (figure, what it is)."""
    out: list[tuple[str, str]] = []
    cells, history, scores = (run.tables.get(k) for k in ("cells", "history", "scores"))
    if cells is not None and len(cells):
        out.append((f"{cells['cells'].sum():,}", "cells, " + " + ".join(sorted(cells["species"].unique()))))
        out.append((f"{cells.loc[cells['type'] != '', 'type'].nunique()}", "labelled cell types"))
    if history is not None and len(history):
        out.append((f"{int(history['step'].max()):,}", "pretraining steps"))
    if scores is not None and len(scores):
        board = findings.board(scores)
        found = findings.duels(board, run.tables.get("comparisons"), ("macro_f1",))
        head = findings.best_own(board, run.tables.get("epochs"))
        for split in ("random", "species"):
            part = [d for d in found if d.split == split]
            model = _spoken_of(part, head)
            part = [d for d in part if d.model == model]
            if part:
                ours, base = np.mean([d.score[0] for d in part]), np.mean([d.baseline_score[0] for d in part])
                what = "random cells" if split == "random" else "across species"
                out.append((f"{ours:.2f}", f"macro F1, {what} ({findings.label(model)}); best baseline {base:.2f}"))
    return out


# classification


def classification(run: Run) -> Section:
    """One table per split, wins and losses, confusion and per-class scores."""
    scores = run.tables.get("scores")
    if scores is None or scores.empty:
        return missing("classification", "Cell types, task by task", "classify", run)
    board = findings.board(scores)
    found = findings.duels(board, run.tables.get("comparisons"))
    blocks: list[Any] = []
    splits = [s for s in findings.SPLITS if s in set(board["split"])]
    for split in splits:
        part = board[board["split"] == split]
        blocks.append(Text(findings.SPLITS[split], "heading"))
        mine = [d for d in found if d.split == split]
        blocks += [Text(f"{_tallies(mine, m)}.") for m in findings.OWN if m in {d.model for d in mine}]
        blocks.append(_scores(part, findings.SPLITS[split]))
    model = findings.best_own(board, run.tables.get("epochs"))
    blocks += _per_class(run, board, model) + _confusions(run, model)
    return Section("classification", "Cell types, task by task", blocks)


def _scores(board: pd.DataFrame, title: str) -> Grid:
    """One split: for each task a heading row, then a row per model; the best baseline of each metric is marked."""
    metrics = [m for m in ("accuracy", "macro_f1") if m in set(board["metric"])]
    rows: list[list[Cell]] = []
    seeds, by = int(board["seeds"].max()), sorted(set(board["interval_by"].dropna().astype(str)))
    for (split, group, direction), task in board.groupby(findings.TASK, sort=True):
        one = task.iloc[0]
        rows.append(
            [
                Cell(
                    f"{findings.task_label(split, group, direction)}: {plural(round(one['num_classes']), 'type')}, trained on "
                    f"{plural(round(one['num_train']), 'cell')}, scored on {plural(round(one['num_test']), 'cell')}"
                )
            ]
        )
        wide = {m: task[task["metric"] == m].set_index("model") for m in metrics}
        best = {m: t.loc[[findings.is_baseline(str(i)) for i in t.index], "value"].max() for m, t in wide.items()}
        top = {m: t["value"].max() for m, t in wide.items()}
        for model in findings.order_models(list(task["model"].unique())):
            own, rival = model in findings.OWN, findings.is_baseline(model)
            own_seeds = int(task[task["model"] == model]["seeds"].max())
            few = f" ({plural(own_seeds, 'seed')})" if own_seeds < seeds else ""
            row = [Cell(("● " if own else "□ " if rival else "○ ") + findings.label(model) + few, strong=own)]
            for m in metrics:
                if model not in wide[m].index:
                    row.append(Cell("–", -1.0))
                    continue
                value, low, high = (float(wide[m].loc[model, c]) for c in ("value", "low", "high"))
                mark = " ★" if value == top[m] else ""
                mark += " ◄" if rival and value == best[m] else ""
                row.append(Cell(findings.interval(value, low, high) + mark, value, whisker(value, low, high, own=own),
                                strong=value == top[m]))  # fmt: skip
            rows.append(row)
    unit = {"donor": "donors", "cell": "cells"}
    note = f"{title}. Value (95 % interval by resampling {' or '.join(unit.get(b, b) for b in by) or 'cells'})"
    note += (
        f", mean over {seeds} seeds"
        if seeds > 1
        else ", one seed: the spread between training runs is not in the interval"
    )
    return Grid(
        f"{note}. ● the model, ○ the same on another encoder, □ baselines; all on the same cells, seed by seed. ★ highest, ◄ best baseline. Drawings run from 0 to 1.",
        ["Model", *[findings.metric_label(m) for m in metrics]],
        rows,
    )


def _per_class(run: Run, board: pd.DataFrame, model: str) -> list[Any]:
    table = run.tables.get("per_class")
    if table is None or table.empty or not model:
        return []
    name = next(c for c in ("class", "label", "type", "cell_type") if c in table.columns)
    value = "f1" if "f1" in table.columns else "value"
    rows: list[list[Cell]] = []
    frame = table.assign(direction=table["direction"].fillna(""))
    if "metric" in frame.columns:
        frame = frame[frame["metric"] == "f1"]
    f1 = board[board["metric"] == "macro_f1"]
    for (split, group, direction), task in frame.groupby(findings.TASK, sort=False):
        others = f1[
            (f1["split"] == split)
            & (f1["group"] == group)
            & (f1["direction"] == direction)
            & f1["model"].map(findings.is_baseline)
        ]
        rival = (
            str(others.sort_values(["value", "model"], ascending=[False, True]).iloc[0]["model"]) if len(others) else ""
        )
        means = task.groupby([name, "model"])[value].mean().unstack("model")
        if model not in means.columns:
            continue
        against = f", against {findings.label(rival)}" if rival in means.columns else ""
        rows.append(
            [Cell(f"{findings.SPLITS.get(split, split)}: {findings.task_label(split, group, direction)}{against}")]
        )
        support = next((c for c in ("num_test", "support", "num_cells", "count") if c in task.columns), "")
        sizes = task[task["model"] == model].groupby(name)[support].mean() if support else pd.Series(dtype=float)
        for kind in means.sort_values(model, kind="stable").index:
            mine, theirs = float(means.loc[kind, model]), float(means.loc[kind, rival]) if against else float("nan")
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
                Cell(str(kind)), count(float(sizes.get(kind, float("nan")))),
                Cell("", mine, pair(mine, theirs)), Cell(findings.share(mine) + sign, mine), Cell(findings.share(theirs), theirs),
            ])  # fmt: skip
    grid = Grid(
        f"F1 of every type: {findings.label(model)} beside the baseline with the best macro F1 of that task. Types with few "
        "test cells move a macro F1 much and are known badly.",
        ["Type", "Test cells", "0 to 1", "● Model", "□ Best baseline"],
        rows,
    )
    return [Text("Type by type", "heading"), grid] if rows else []


def _confusions(run: Run, model: str) -> list[Any]:
    table = run.tables.get("confusion")
    if table is None or table.empty or not model:
        return []
    blocks: list[Any] = [Text("What is taken for what", "heading")]
    frame = table.assign(direction=table["direction"].fillna(""))
    for i, ((split, group, direction), part) in enumerate(
        frame[frame["model"] == model].groupby(findings.TASK, sort=False)
    ):
        wide = part.pivot_table(index="true", columns="predicted", values="count", aggfunc="sum", fill_value=0)
        order = list(wide.sum(axis=1).sort_values(ascending=False, kind="stable").index)[:30]
        columns = order + [t for t in wide.columns if t not in order]
        wide = wide.reindex(index=order, columns=columns[:34], fill_value=0)
        share = wide.div(wide.sum(axis=1).clip(lower=1), axis=0)
        share.index = pd.Index([f"{t} ({n:,.0f})" for t, n in wide.sum(axis=1).items()])
        text = [["" if v < 0.005 else f"{100 * v:.0f}" for v in row] for row in share.to_numpy()]
        blocks.append(
            Picture(
                figures.heatmap(
                    share, f"confusion-{i}", rows="true type (test cells)", columns="predicted type", text=text
                ),
                f"{findings.label(model)}, {findings.SPLITS.get(split, split).lower()}: {findings.task_label(split, group, direction)}. Per "
                "cent of each true type's test cells; what lies off the diagonal is wrong.",
            )
        )
        if i == 5:
            break
    return blocks

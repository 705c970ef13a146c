"""Tuning: effects of settings with intervals over seeds, interactions, and scores along a field such as the number of cells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mixgf.report import wording
from mixgf.report.elements import Cell, Figure, Section, Table, Text, number_cell
from mixgf.report.figures import sweep_effects
from mixgf.report.results import RunResults
from mixgf.tuning import analysis, search_space

TITLE = "Ablations and tuning"
SCALING_FIELDS = {"train.cells_share": "cells trained on", "train.max_steps": "optimizer steps"}
"""Fields along which a scaling curve is fitted, and their names for readers."""


@dataclass(frozen=True, slots=True)
class _Measure:
    """What a scaling curve is fitted to."""

    column: str
    """Of `analysis.arm_scores`; there is no curve without it."""
    title: str
    label: str
    """Of the axis."""
    short: str
    tolerance: float
    """Difference that is accepted when the text names a sufficient amount."""
    falls: bool


SCALED = (
    _Measure(analysis.HELD_OUT, "Loss on held-out cells", "loss on held-out cells", "held-out loss", 0.01, falls=True),
    _Measure("score", "Zero-shot macro F1", "zero-shot macro F1", "score", 0.01, falls=False),
)
"""Measures of scaling curves. The held-out loss comes first: it needs no labels."""


def section(results: RunResults) -> Section:
    """Effects, means, interactions and scaling curves of a sweep; empty where there is none."""
    record = results.records.get("tune")
    if record is None:
        return Section("tuning", TITLE, [])
    arm_scores, effects = results.tables["arms"], results.tables["effects"]
    settings = record.config["tune"]
    sentence = str(record.details["sentence"])
    blocks: list[Any] = [
        Text(f"{wording.plural(record.counts['arms'], 'arm')} of {wording.plural(settings['seeds'], 'seed')} each. "
             f"{sentence[:1].upper()}{sentence[1:]}."),
        *_final(results.tables.get("final")),
        Text("An effect is the difference from the base with the same seed, at the last rung that both reached, on the cells that choose arms. Intervals (95 %, t) are "
             "over seeds: they cover the spread between trainings, not between donors. Arms that stopped early are compared at an "
             "early rung."),
    ]  # fmt: skip
    if record.details["failed"]:
        why = "; ".join(f"{name}: {text}" for name, text in record.details["failed"].items())
        blocks.append(Text(f"Failed trainings: {why}.", "warn"))
    if len(effects):
        titles = {m: analysis.METRICS[m] for m in ("score", "finetuned", "uniformity")}
        blocks.append(
            Figure(
                sweep_effects.forest(effects, titles, "sweep-effects"),
                "Effects against the base, with 95 % intervals over seeds.",
            )
        )
        blocks.append(_table(arm_scores, effects))
    if (means := _means(arm_scores)) is not None:
        blocks.append(
            Figure(
                sweep_effects.pareto(means, "sweep-pareto"),
                "Zero-shot against fine-tuned score of arms that were trained to the end. Diamonds: no other arm is better in both.",
            )
        )
    interactions = results.tables.get("interactions")
    if interactions is not None and len(interactions):
        blocks.append(_interactions(interactions))
    blocks += _scaling_curves(results, arm_scores)
    return Section("tuning", TITLE, blocks)


def _final(final: pd.DataFrame | None) -> list[Any]:
    """Scores of the best arm and the base on the cells that chose the arm and on test cells."""
    if final is None:
        return [
            Text(
                "This sweep is of an earlier version: the cells that chose the best arm are those of its scores.",
                "warn",
            )
        ]
    rows = [
        [Cell(str(row.what), str(row.what), strong=row.what == analysis.GAIN), Cell(analysis.METRICS[str(row.metric)]),
         number_cell(float(row.select), ".3f"), number_cell(float(row.test), ".3f"),
         Cell(f"[{row.low:.3f}, {row.high:.3f}]" if np.isfinite(row.low) else "one seed"), number_cell(float(row.optimism), "+.3f")]
        for row in final.itertuples()
    ]  # fmt: skip
    caption = (
        "The best arm was chosen on some cells and scored once on others, the test cells. Its advantage on the cells that chose it "
        "is too large, because it is the largest of all arms. The last column is the difference (optimism)."
    )
    head = ["Arm", "Metric", "Cells that chose", "Test cells", "95 % interval", "Optimism"]
    return [Table(caption, head, rows, sortable=True)]


def _table(arm_scores: pd.DataFrame, effects: pd.DataFrame) -> Table:
    last = arm_scores.sort_values("rung").groupby(["arm", "seed"], sort=False).tail(1)
    rows = []
    for arm, part in last.groupby("arm", sort=False):
        name = str(part["name"].iloc[0])
        cells = [
            Cell(name, name, strong=name == search_space.BASE),
            Cell(f"{part['share'].max():.0%}", float(part["share"].max())),
        ]
        for metric in analysis.METRICS:
            values = part[metric].dropna()
            cell = number_cell(float(values.mean()) if len(values) else np.nan, ".3f")
            one = effects[(effects["arm"] == arm) & (effects["metric"] == metric)]
            note = ""
            if len(one) and np.isfinite(one["low"].iloc[0]):
                row = one.iloc[0]
                note = f"{row['effect']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
            cells.append(Cell(cell.text, cell.order, note=note))
        rows.append(cells)
    head = ["Arm", "Trained", *analysis.METRICS.values()]
    return Table(
        "Means over seeds at the last rung of each arm; in small type the paired difference from the base with its 95 % interval.",
        head,
        rows,
        sortable=True,
    )


def _means(arm_scores: pd.DataFrame) -> pd.DataFrame | None:
    ended = arm_scores[(arm_scores["rung"] == arm_scores["rung"].max()) & arm_scores["finetuned"].notna()]
    if ended["arm"].nunique() < 2:
        return None
    groups = ended.groupby("name", sort=False)
    out = groups[["score", "finetuned"]].mean()
    for metric in ("score", "finetuned"):
        out[f"{metric}_low"], out[f"{metric}_high"] = groups[metric].min(), groups[metric].max()
    return out.reset_index()


def _interactions(found: pd.DataFrame) -> Table:
    rows = [
        [Cell(f"{row.first} with {row.second}", str(row.first)), Cell(analysis.METRICS[str(row.metric)]), number_cell(float(row.effect), "+.3f"),
         Cell(f"[{row.low:+.3f}, {row.high:+.3f}]" if np.isfinite(row.low) else "one seed"), number_cell(float(row.p), ".3f")]
        for row in found.itertuples()
    ]  # fmt: skip
    caption = "Interactions: effect of both changes together less the sum of their single effects (paired by seed)."
    return Table(caption, ["Changes", "Metric", "Together less sum", "95 % interval", "p"], rows, sortable=True)


def _scaling_curves(results: RunResults, arm_scores: pd.DataFrame) -> list[Any]:
    """Fitted curves along `SCALING_FIELDS`, each with a sentence on the amount that is sufficient."""
    record, blocks = results.records["tune"], []
    for field, axis in SCALING_FIELDS.items():
        part, leaf = field.split(".")
        of_config = getattr(getattr(results.config, part), leaf)  # sweeps of earlier versions do not name it
        base = float(record.details.get("base", {}).get(field, of_config))
        for measure in SCALED:
            if measure.column not in arm_scores:
                continue
            points = analysis.scores_along(arm_scores, record.details["arms"], field, base, measure.column)
            if points["x"].nunique() < 3 or points["x"].min() <= 0:
                continue
            if field == "train.cells_share" and "corpus" in results.records:
                points["x"] *= results.records["corpus"].counts["kept"]
            blocks += _scaling_curve(points, measure, axis, leaf)
    return blocks


def _scaling_curve(points: pd.DataFrame, measure: _Measure, axis: str, leaf: str) -> list[Any]:
    """A figure of a fitted curve, and a sentence on it."""
    most = float(points["x"].max())
    grid = np.geomspace(float(points["x"].min()), 10 * most, 60)
    curve = analysis.forecast(points, np.append(grid, [most]), falling=measure.falls)
    here, ten = curve.iloc[-1], curve.iloc[-2]
    known = curve.iloc[:-1]
    enough = known[(known["value"] - here["value"]) * (-1 if measure.falls else 1) >= -measure.tolerance]
    between = (
        f"[{ten['low']:.3f}, {ten['high']:.3f}]"
        if np.isfinite(ten["low"])
        else "(too few seeds to say how certain this is)"
    )
    said = (f"{axis[:1].upper()}{axis[1:]}: at {most:,.0f} the fitted {measure.short} is {here['value']:.3f}. By extrapolation, ten times as many would give "
            f"{ten['value']:.3f} {between}, a change of {ten['value'] - here['value']:+.3f}. ")  # fmt: skip
    if len(enough):
        said += f"{float(enough['x'].iloc[0]):,.0f} are sufficient for a {measure.short} within {measure.tolerance:.2f} of that at {most:,.0f}."
    name = f"sweep-curve-{leaf}" + ("-loss" if measure.falls else "")
    caption = (
        f"{measure.title} by {axis}. Dots are trainings; the shaded area is the 95 % interval of the fitted curve (t over "
        "seeds)."
    )
    return [Figure(sweep_effects.scaling_curve(points, known, (axis, measure.label), name), caption), Text(said)]

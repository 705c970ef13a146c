"""The report's section on a sweep: what each factor is worth, what goes with what, and where more cells stop paying."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mixgf.report import wording
from mixgf.report.elements import Cell, Figure, Section, Table, Text, number_cell
from mixgf.report.figures import sweep_effects
from mixgf.report.results import RunResults
from mixgf.tuning import analysis, search_space

LADDERS = {"train.cells_share": "cells trained on", "train.max_steps": "optimizer steps"}
"""Fields along which a curve is fitted, and their name for readers."""
POINT = 0.01
"""A gain of macro F1 that is worth having, for where to stop."""


def section(results: RunResults) -> Section:
    """Section on the sweep; empty of blocks where there is none."""
    record = results.records.get("tune")
    if record is None:
        return Section("sweep", "Ablations", [])
    arm_scores, effects = results.tables["arms"], results.tables["effects"]
    settings = record.config["tune"]
    sentence = str(record.details["sentence"])
    blocks: list[Any] = [
        Text(f"{wording.plural(record.counts['arms'], 'arm')} of {wording.plural(settings['seeds'], 'seed')} each. "
             f"{sentence[:1].upper()}{sentence[1:]}."),
        Text("Effects are differences from the base with the same seed, at the last rung that both reached; intervals (95 %, t) are "
             "over seeds, so they say what another training would give, not what other donors would. Arms that stopped early were "
             "judged early."),
    ]  # fmt: skip
    if record.details["failed"]:
        why = "; ".join(f"{name}: {text}" for name, text in record.details["failed"].items())
        blocks.append(Text(f"Could not be trained: {why}.", "warn"))
    if len(effects):
        titles = {m: analysis.METRICS[m] for m in ("score", "finetuned", "uniformity")}
        blocks.append(
            Figure(
                sweep_effects.forest(effects, titles, "sweep-effects"),
                "What changes against the base, with 95 % intervals over seeds.",
            )
        )
        blocks.append(_table(arm_scores, effects))
    if (means := _means(arm_scores)) is not None:
        blocks.append(
            Figure(
                sweep_effects.pareto(means, "sweep-pareto"),
                "Zero-shot against fine-tuned, arms trained to the end. Diamonds: no arm is better in both; the table above has all.",
            )
        )
    interactions = results.tables.get("interactions")
    if interactions is not None and len(interactions):
        blocks.append(_interactions(interactions))
    blocks += _ladders(results, arm_scores)
    return Section("sweep", "Ablations", blocks)


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
    head = ["arm", "trained", *analysis.METRICS.values()]
    return Table(
        "Means over seeds at the end of each arm; below, the paired difference from the base with its 95 % interval.",
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
    caption = "Interactions: how much more the two changes do together than each alone (paired by seed)."
    return Table(caption, ["changes", "metric", "together minus apart", "95 % interval", "p"], rows, sortable=True)


def _ladders(results: RunResults, arm_scores: pd.DataFrame) -> list[Any]:
    """Curves along `LADDERS`, and in words where to stop."""
    record, blocks = results.records["tune"], []
    for field, axis in LADDERS.items():
        part, leaf = field.split(".")
        base = float(getattr(getattr(results.config, part), leaf))
        rungs = analysis.ladder(arm_scores, record.details["arms"], field, base)
        if rungs["x"].nunique() < 3 or rungs["x"].min() <= 0:
            continue
        if field == "train.cells_share" and "corpus" in results.records:
            rungs["x"] *= results.records["corpus"].counts["kept"]
        most = float(rungs["x"].max())
        grid = np.geomspace(float(rungs["x"].min()), 10 * most, 60)
        curve = analysis.forecast(rungs, np.append(grid, [most]), seed=results.config.seed)
        here, ten = curve.iloc[-1], curve.iloc[-2]
        known = curve.iloc[:-1]
        enough = known[known["value"] >= here["value"] - POINT]
        said = (f"{axis[:1].upper()}{axis[1:]}: at {most:,.0f} the fitted score is {here['value']:.3f}; ten times more would give "
                f"{ten['value']:.3f} [{ten['low']:.3f}, {ten['high']:.3f}], {ten['value'] - here['value']:+.3f}, an extrapolation. ")  # fmt: skip
        said += (
            f"{float(enough['x'].iloc[0]):,.0f} are within {POINT:.2f} of what {most:,.0f} reach."
            if len(enough)
            else ""
        )
        blocks += [
            Figure(
                sweep_effects.ladder(rungs, known, axis, f"sweep-ladder-{leaf}"),
                f"Zero-shot macro F1 by {axis}; a dot is a training, the band a 95 % interval of the fitted curve.",
            ),
            Text(said),
        ]
    return blocks

"""Summary: what a person can now do, what the pretrained encoder adds, what the run holds, and where a baseline is better."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mixgf.classification import registry
from mixgf.perturbation import hits
from mixgf.redact import redact
from mixgf.report import answers, score_tables, verdicts, wording
from mixgf.report.elements import Cell, Section, Table, Text, count_cell, number_cell
from mixgf.report.results import RunResults

_CAN_DO, _ADDS, _RUN = (
    "What you can do with these cells",
    "What the pretrained encoder adds",
    "The run and its scores",
)
"""Headings of the summary."""


def section(results: RunResults) -> Section:
    """Cells, classification against baselines, overlap with the pretraining cells, and perturbation, in sentences."""
    blocks: list[Any] = []
    if told := answers.answers(results):
        blocks += [Text(_CAN_DO, "heading"), *(Text(text, tone) for tone, text in told)]
        blocks += [Text(f"Your own cells: `{command}`") for command in answers.commands(results)]
        blocks += _kept(results)
    if told := answers.encoder_adds(results):
        blocks += [Text(_ADDS, "heading"), *(Text(text[:1].upper() + text[1:], tone) for tone, text in told)]
    blocks += [Text(_RUN, "heading")] * bool(blocks)
    blocks.append(Text(_scope(results)))
    scores = results.tables.get("scores")
    if scores is not None and len(scores):
        blocks += _verdicts(results, score_tables.mean_scores(scores))
        blocks.append(_audit(results))
    genes = results.tables.get("genes")
    if genes is not None and len(genes):
        for operation, part in genes.groupby("operation", sort=False):
            lines = hits.summarise_screen(part, goal=bool(results.config.perturb.goal))
            tone = "warn" if any(t == "warn" for t, _ in lines) else "plain"
            blocks.append(Text(f"Perturbation, {operation}: " + " ".join(text for _, text in lines[:2]), tone))
        record = results.records.get("perturb")
        if left := record.counts.get("not_scored", 0) if record is not None else 0:
            blocks.append(
                Text(
                    f"Perturbation is not complete: its budget was spent before {wording.plural(left, 'gene')} were scored.",
                    "warn",
                )
            )
    done = {"corpus": "prepare", "pretrain": "pretrain", "embed": "embed", "classify": "classify", "perturb": "perturb"}
    if absent := [stage for key, stage in done.items() if key not in results.records]:
        blocks.append(Text(f"Not run yet: {', '.join(absent)}. Each section names the command.", "missing"))
    return Section("summary", "Summary", blocks)


def _kept(results: RunResults) -> list[Table]:
    """The kept classifiers as a table, if there are too many for a sentence each."""
    kept = answers.kept_classifiers(results)
    if len(kept) <= answers.FEW:
        return []
    rows = []
    for one in kept:
        test, name = one["test"], redact(one["uri"]).rpartition("/")[2]
        rows.append([
            Cell(name, name), Cell(registry.label(one["model"]), one["model"]), count_cell(test["cells"]),
            number_cell(test["macro_f1"], ".3f"), number_cell(test["accuracy"], ".3f"), number_cell(test["doubted"], ".1%"),
            number_cell(test.get("accuracy_trusted", float("nan")), ".3f"),
        ])  # fmt: skip
    head = ["NAME", "Model", "Test cells", "Macro F1", "Accuracy", "Doubted", "Accuracy of the others"]
    return [Table("The kept classifiers. Scores are of test cells of the same group.", head, rows, sortable=True)]


def _audit(results: RunResults) -> Text:
    """How many of the evaluation cells are in the pretraining corpus."""
    record = results.records.get("classify")
    found = record.details.get("audit") if record is not None else None
    if not found:
        return Text(
            "It was not checked whether evaluation cells are in the pretraining corpus. `mixgf audit EVAL CORPUS` counts them.",
            "warn",
        )
    clean = found["cells"] is not None and found["cells"][0] == 0
    line = str(found["line"])
    return Text(f"Evaluation cells used in pretraining: {line}.", "plain" if clean else "warn")


def _scope(results: RunResults) -> str:
    """Cells, donors, sources and types of the corpus in a sentence."""
    cells, record = results.tables.get("cells"), results.records.get("corpus")
    if cells is None or record is None or cells.empty:
        return "There is no corpus yet."
    parts = []
    for species, part in cells.groupby("species", sort=True):
        donors = part.loc[part["donor"] != "", ["source", "donor"]].drop_duplicates().shape[0]
        whose = f" of {wording.plural(donors, 'donor')}" if donors else ""
        parts.append(f"{wording.plural(int(part['cells'].sum()), f'{species} cell')}{whose}")
    kinds = cells.loc[cells["type"] != "", "type"].nunique()
    text = f"This run has {' and '.join(parts)} from {wording.plural(cells['source'].nunique(), 'source')}"
    text += f", with {wording.plural(kinds, 'labelled cell type')}." if kinds else ", without cell type labels."
    return text if "pretrain" not in results.records else f"{text} One encoder was pretrained on all of them together."


def _verdicts(results: RunResults, mean_scores: pd.DataFrame) -> list[Text]:
    """Scores of the headline model against the best baseline. Tasks in which a baseline scores higher come first."""
    found = verdicts.paired_comparisons(mean_scores, results.tables.get("comparisons"))
    preferred = verdicts.best_own_model(mean_scores, results.tables.get("epochs"))
    tone_order = {"bad": 0, "warn": 1, "plain": 2, "good": 3}
    blocks: list[Text] = []
    for split in [s for s in wording.SPLITS if s in set(mean_scores["split"])]:
        mine = [d for d in found if d.split == split]
        model = verdicts.headline_model(mine, preferred)
        lines = sorted(
            verdicts.task_sentences([d for d in mine if d.model == model]), key=lambda line: tone_order[line[0]]
        )
        if len(lines) > 1:
            note = "" if blocks else " (a tie is a difference within the 95 % interval)"
            blocks.append(Text(f"{wording.SPLITS[split]}. {verdicts.tally_sentence(mine, model)}{note}."))
        if model != wording.PAPER_MODEL and any(d.model == wording.PAPER_MODEL for d in mine):
            blocks.append(Text(f"{verdicts.tally_sentence(mine, wording.PAPER_MODEL)}."))
        blocks += [Text(text, tone) for tone, text in lines[:6]]
    return blocks


def tiles(results: RunResults) -> list[tuple[str, str]]:
    """Numbers in large type at the head of the page: (number, what it is)."""
    out: list[tuple[str, str]] = []
    cells, history, scores = (results.tables.get(k) for k in ("cells", "history", "scores"))
    if cells is not None and len(cells):
        out.append((f"{cells['cells'].sum():,}", "cells, " + " + ".join(sorted(cells["species"].unique()))))
        out.append((f"{cells.loc[cells['type'] != '', 'type'].nunique()}", "labelled cell types"))
    kept = answers.kept_classifiers(results)
    if len(kept) > answers.FEW:
        middle = float(np.median([one["test"]["macro_f1"] for one in kept]))
        out.append((f"{middle:.2f}", f"macro F1, labels within a group: median of {len(kept)}"))
    else:
        out += [
            (f"{one['test']['macro_f1']:.2f}", f"macro F1, labels of {one['group']} ({registry.label(one['model'])})")
            for one in kept
        ]
    if scores is not None and len(scores):
        means = score_tables.mean_scores(scores)
        model = answers.carrier(results, means)
        carried = means[(means["split"] == "species") & (means["model"] == model) & (means["metric"] == "macro_f1")]
        if len(carried):
            out.append((f"{carried['value'].mean():.2f}", f"macro F1 across species ({registry.label(model)})"))
    if history is not None and len(history):
        out.append((f"{int(history['step'].max()):,}", "pretraining steps"))
    return out

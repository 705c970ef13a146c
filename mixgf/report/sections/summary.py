"""Sections of the report that judge: the summary in sentences, classification against baselines.

What the words claim is worked out in `findings`; here it is only laid out.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mixgf.perturbation import hits
from mixgf.report import score_tables, verdicts, wording
from mixgf.report.elements import Section, Text
from mixgf.report.results import RunResults


def section(results: RunResults) -> Section:
    """What was results, on what, what it reaches, and where a baseline beats it, in sentences."""
    blocks: list[Any] = [Text(_scope(results))]
    scores = results.tables.get("scores")
    if scores is not None and len(scores):
        blocks += _verdicts(results, score_tables.mean_scores(scores))
        blocks.append(_seen(results))
    genes = results.tables.get("genes")
    if genes is not None and len(genes):
        for operation, part in genes.groupby("operation", sort=False):
            lines = hits.sentences(part, goal=bool(results.config.perturb.goal))
            tone = "warn" if any(t == "warn" for t, _ in lines) else "plain"
            blocks.append(Text(f"Perturbation, {operation}: " + " ".join(text for _, text in lines[:2]), tone))
        record = results.records.get("perturb")
        if left := record.counts.get("not_scored", 0) if record is not None else 0:
            blocks.append(
                Text(
                    f"Perturbation is not complete: its budget was spent before {wording.plural(left, 'gene')} were scored.",
                    "bad",
                )
            )
    done = {"corpus": "prepare", "pretrain": "pretrain", "embed": "embed", "classify": "classify", "perturb": "perturb"}
    if absent := [stage for key, stage in done.items() if key not in results.records]:
        blocks.append(Text(f"Not run: {', '.join(absent)}. The sections say which command makes each.", "missing"))
    return Section("brief", "In brief", blocks)


def _seen(results: RunResults) -> Text:
    """How much of the evaluation the encoder was pretrained on, in every report."""
    record = results.records.get("classify")
    found = record.details.get("audit") if record is not None else None
    if not found:
        return Text(
            "Audit: not made; `mixgf audit EVAL CORPUS` counts the evaluation cells in a pretraining corpus.", "warn"
        )
    clean = found["cells"] is not None and found["cells"][0] == 0
    line = str(found["line"])
    return Text(f"Audit: {line}.", "plain" if clean else "warn")


def _scope(results: RunResults) -> str:
    cells, record = results.tables.get("cells"), results.records.get("corpus")
    if cells is None or record is None or cells.empty:
        return "No cells were prepared yet."
    parts = []
    for species, part in cells.groupby("species", sort=True):
        donors = part.loc[part["donor"] != "", ["source", "donor"]].drop_duplicates().shape[0]
        whose = f" of {wording.plural(donors, 'donor')}" if donors else ""
        parts.append(f"{wording.plural(int(part['cells'].sum()), f'{species} cell')}{whose}")
    kinds = cells.loc[cells["type"] != "", "type"].nunique()
    text = f"This run works on {' and '.join(parts)}, from {wording.plural(cells['source'].nunique(), 'source')}"
    text += f", with {wording.plural(kinds, 'labelled cell type')}." if kinds else ", without cell type labels."
    return (
        text
        if "pretrain" not in results.records
        else f"{text} One encoder was pretrained on the cells of all species together."
    )


def _verdicts(results: RunResults, mean_scores: pd.DataFrame) -> list[Text]:
    """What the model of the headlines reaches; every task in which a baseline scores higher is named first."""
    found = verdicts.paired_comparisons(mean_scores, results.tables.get("comparisons"))
    head = verdicts.best_own_model(mean_scores, results.tables.get("epochs"))
    tone_order = {"bad": 0, "warn": 1, "plain": 2, "good": 3}
    blocks: list[Text] = []
    for split in [s for s in wording.SPLITS if s in set(mean_scores["split"])]:
        mine = [d for d in found if d.split == split]
        model = verdicts.headline_model(mine, head)
        lines = sorted(
            verdicts.task_sentences([d for d in mine if d.model == model]), key=lambda line: tone_order[line[0]]
        )
        if len(lines) > 1:
            blocks.append(
                Text(
                    f"{wording.SPLITS[split]}. {verdicts.tally_sentence(mine, model)} (tie: within the 95 % margin of error)."
                )
            )
        if model != wording.PAPER_MODEL and any(d.model == wording.PAPER_MODEL for d in mine):
            blocks.append(Text(f"{verdicts.tally_sentence(mine, wording.PAPER_MODEL)}."))
        blocks += [Text(text, tone) for tone, text in lines[:6]]
    if gains := score_tables.pretraining_gain(mean_scores):
        parts = [f"{wording.model_label(m)} {v:+.3f} ({wording.SPLIT_NAMES.get(s, s)})" for s, m, v, _ in gains]
        none = [v for *_, v, _ in gains if v <= 0]
        blocks.append(
            Text(
                "What pretraining adds, as mean macro F1 over the same classifier on an untrained encoder: "
                f"{'; '.join(parts)}.",
                "warn" if none else "plain",
            )
        )
    return blocks


def tiles(results: RunResults) -> list[tuple[str, str]]:
    """A few large figures for the head of the page: (figure, what it is)."""
    out: list[tuple[str, str]] = []
    cells, history, scores = (results.tables.get(k) for k in ("cells", "history", "scores"))
    if cells is not None and len(cells):
        out.append((f"{cells['cells'].sum():,}", "cells, " + " + ".join(sorted(cells["species"].unique()))))
        out.append((f"{cells.loc[cells['type'] != '', 'type'].nunique()}", "labelled cell types"))
    if history is not None and len(history):
        out.append((f"{int(history['step'].max()):,}", "pretraining steps"))
    if scores is not None and len(scores):
        mean_scores = score_tables.mean_scores(scores)
        found = verdicts.paired_comparisons(mean_scores, results.tables.get("comparisons"), ("macro_f1",))
        head = verdicts.best_own_model(mean_scores, results.tables.get("epochs"))
        for split in ("random", "species"):
            part = [d for d in found if d.split == split]
            model = verdicts.headline_model(part, head)
            part = [d for d in part if d.model == model]
            if part:
                ours, base = np.mean([d.score[0] for d in part]), np.mean([d.baseline_score[0] for d in part])
                what = "random cells" if split == "random" else "across species"
                out.append(
                    (f"{ours:.2f}", f"macro F1, {what} ({wording.model_label(model)}); best baseline {base:.2f}")
                )
    return out

"""What a person can now do with a run, and what its pretrained encoder adds: the lines that open the report and the demo's summary.

Labels are credited to the model that gives them. The encoder is credited only with paired differences to the same models without it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mixgf.classification import registry
from mixgf.perturbation import hits
from mixgf.perturbation.reference_genes import LEVEL
from mixgf.redact import redact
from mixgf.report import score_tables, wording
from mixgf.report.results import RunResults
from mixgf.report.verdicts import TASK
from mixgf.stats.donors import smallest_p

Line = tuple[str, str]
"""Tone (good, plain, warn or bad) and sentence."""
FEW = 6
"""Most classifiers, and most tasks, that have a sentence each. More of them are summed up, and stand in a table of the page."""


def answers(results: RunResults) -> list[Line]:
    """Labels within a group of cells, labels across species, genes that move the state."""
    return [*_labels(results), *_across_species(results), *_genes(results)]


def kept_classifiers(results: RunResults) -> list[dict[str, Any]]:
    """What is known of each kept classifier."""
    record = results.records.get("classify")
    return record.details.get("classifiers", []) if record is not None else []


def _labels(results: RunResults) -> list[Line]:
    kept, out = kept_classifiers(results), []
    if len(kept) > FEW:
        scores = np.sort([one["test"]["macro_f1"] for one in kept])
        low, middle, high = (wording.score_text(value) for value in (scores[0], float(np.median(scores)), scores[-1]))
        with_encoder = sum(not registry.is_baseline(one["model"]) for one in kept)
        text = (
            f"Label cells like those of {len(kept)} groups: macro F1 {low} to {high}, median {middle}, each by the model that validation "
            f"chose; {with_encoder or 'none'} of the models {'uses' if with_encoder < 2 else 'use'} the encoder."
        )
        return [("good" if scores[0] >= 0.9 else "plain", text)]
    for one in kept:
        test = one["test"]
        text = (
            f"Label cells like {one['group']}: macro F1 {wording.score_text(test['macro_f1'])}, accuracy "
            f"{wording.score_text(test['accuracy'])} on {test['cells']:,} test cells; {test['doubted']:.1%} of the labels are doubted"
        )
        if 0 < test["doubted"] < 1:
            text += f", and the others have accuracy {wording.score_text(test['accuracy_trusted'])}"
        text += f". By {_said(one['model'])}, the choice of validation among {wording.plural(len(one['candidates']), 'model')}."
        out.append(("good" if test["macro_f1"] >= 0.9 else "plain", text))
    return out


def commands(results: RunResults) -> list[str]:
    """The commands that label other cells: one for each kept classifier, or one in all if there are many in one folder."""
    uris = [redact(one["uri"]) for one in kept_classifiers(results)]
    folders = {uri.rpartition("/")[0] for uri in uris}
    if len(uris) > FEW and len(folders) == 1:
        uris = [f"{folders.pop()}/NAME"]
    return [f"mixgf annotate my.h5ad --model {uri}" for uri in uris]


def _across_species(results: RunResults) -> list[Line]:
    scores = results.tables.get("scores")
    if scores is None or scores.empty:
        return []
    means = score_tables.mean_scores(scores)
    model = carrier(results, means)
    found = means[(means["split"] == "species") & (means["model"] == model)]
    parts, values = [], []
    for keys, task in found.groupby(TASK, sort=False):
        value = {row.metric: row.value for row in task.itertuples()}
        values.append(value["macro_f1"])
        parts.append(f"{wording.task_label(*keys)} macro F1 {wording.score_text(value['macro_f1'])}, accuracy {wording.score_text(value['accuracy'])}")  # fmt: skip
    if not parts:
        return []
    text = f"Carry labels across species: {'; '.join(parts)}. By {_said(model)}, the one that `mixgf annotate` uses across species."
    return [("good" if min(values) >= 0.9 else "plain", text)]


def carrier(results: RunResults, means: pd.DataFrame) -> str:
    """The model that `mixgf annotate` uses for cells of another species, of those that were scored across species; "" = none was.

    Args:
        results: Of the run.
        means: Scores by model and split.
    """
    kept = kept_classifiers(results)
    scored = set(means.loc[means["split"] == "species", "model"])
    wanted = [one.get("across", one["model"]) for one in kept] + [
        name for name in registry.PREFERRED if registry.parse(name).by_types
    ]
    able = [name for name in wanted if (model := registry.find(name)) is not None and model.by_types]
    return next((name for name in able if name in scored), "")


def _genes(results: RunResults) -> list[Line]:
    genes = results.tables.get("genes")
    if genes is None or genes.empty:
        return []
    tested = hits.tested_genes(genes)
    found, donors = hits.call_hits(genes), int(tested["num_donors"].max())
    scored = f"{wording.plural(len(tested['gene'].unique()), 'gene')} scored"
    if len(found):
        names = ", ".join(dict.fromkeys(found["symbol"].head(8)))
        return [
            (
                "good",
                f"Genes that move the state: {names}, of {scored}: they repeat over {wording.plural(donors, 'donor')}.",
            )
        ]
    text = f"Genes that move the state: none can be told, of {scored}"
    if smallest_p(donors) > LEVEL:
        text += f". With {wording.plural(donors, 'donor')} no test over donors can pass (its smallest p is {smallest_p(donors):.2g})"
    return [("warn", f"{text}.")]


def encoder_adds(results: RunResults) -> list[Line]:
    """What the pretrained encoder adds, from the table `added`: in all, then one line per task.

    Of more than `FEW` tasks, only those in which a difference can be told have a line.
    """
    table = results.tables.get("added")
    if table is None or table.empty:
        return []
    table = table[table["metric"] == "macro_f1"].assign(direction=table["direction"].fillna(""))
    out: list[Line] = []
    alike = 0
    many = len(table[TASK].drop_duplicates()) > FEW
    for split in [s for s in wording.SPLITS if s in set(table["split"])]:
        for keys, task in table[table["split"] == split].groupby(TASK, sort=False):
            rows = task.to_dict("records")
            chosen = [
                row for row in rows if registry.without_encoder(row["model"])
            ] or rows  # with a control without encoder
            parts = [f"{_short(row['model'])} over {_control(row)} {_difference(row)}" for row in chosen]
            outcomes = {row["outcome"] for row in chosen}
            if many and not outcomes & {"win", "loss"}:
                alike += 1
                continue
            tone = "bad" if "loss" in outcomes else "good" if outcomes == {"win"} else "plain"
            out.append((tone, f"{wording.SPLIT_NAMES[split]}, {wording.task_label(*keys)}: {'; '.join(parts)}."))
    if alike:
        out.append(
            ("plain", f"In {'the other ' * bool(out)}{wording.plural(alike, 'task')} no difference can be told.")
        )
    rows = [row for row in table.to_dict("records") if registry.without_encoder(row["model"])]
    return [_verdict(rows or table.to_dict("records")), *out]


def _verdict(rows: list[dict[str, Any]]) -> Line:
    """The first sentence: whether the encoder adds anything."""
    wins, losses, unknown = (sum(row["outcome"] == name for row in rows) for name in ("win", "loss", "unknown"))
    middle = float(np.median([row["difference"] for row in rows]))
    what = f"What the pretrained encoder adds, in macro F1 to the same models without it or with random weights ({wording.plural(len(rows), 'paired comparison')}, median difference {middle:+.3f}, Holm-corrected)"
    if not wins:
        told = (
            f"nothing that can be told from zero; it takes away in {losses}"
            if losses
            else "nothing that can be told from zero"
        )
    else:
        told = (
            f"more in {wins}, less in {losses}, no difference that can be told in {len(rows) - wins - losses - unknown}"
        )
    if unknown:
        told += f"; {unknown} with too few donors to say"
    return "good" if wins and not losses else "warn", f"{what}: {told}."


def _control(row: dict[str, Any]) -> str:
    return "random weights" if registry.is_untrained(row["baseline"]) else _short(row["baseline"])


def _difference(row: dict[str, Any]) -> str:
    if not (np.isfinite(row["low"]) and np.isfinite(row["high"])):
        return f"{row['difference']:+.3f} (too few donors for an interval)"
    return f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"


def _short(model: str) -> str:
    return wording.lower_first(registry.label(model).removeprefix("mixgf, "))


def _said(model: str) -> str:
    """A model in a sentence, and whether it uses the encoder."""
    if registry.is_baseline(model):
        return f"{_short(model)} (no encoder)"
    return f"{_short(model)} (with the encoder)"


def score_matrix(scores: pd.DataFrame) -> list[tuple[str, ...]]:
    """Accuracy / macro F1 of every model (rows) in every task (columns), the first row being the heads; `*` = best macro F1 of a task."""
    means = score_tables.mean_scores(scores)
    tasks = sorted(
        {tuple(row) for row in means[TASK].itertuples(index=False)},
        key=lambda t: (list(wording.SPLITS).index(t[0]), *t[1:]),
    )
    value = {(*row[:5],): row[5] for row in means[[*TASK, "metric", "model", "value"]].itertuples(index=False)}
    best = {t: max(v for k, v in value.items() if k[:4] == (*t, "macro_f1")) for t in tasks}
    models = sorted(
        means["model"].unique(), key=lambda m: (-np.mean([value.get((*t, "macro_f1", m), 0.0) for t in tasks]), m)
    )
    rows = [
        ("accuracy / macro F1", *(f"{wording.SPLIT_NAMES.get(t[0], t[0])}: {wording.task_label(*t)}" for t in tasks))
    ]
    for model in models:
        cells = []
        for t in tasks:
            f1 = value.get((*t, "macro_f1", model))
            if f1 is None:
                cells.append("")
                continue
            cells.append(f"{value[(*t, 'accuracy', model)]:.3f} / {f1:.3f}{' *' if f1 == best[t] else ''}")
        rows.append((registry.label(model), *cells))
    return rows

"""Accuracy on random cells beside the paper's Tables 1 to 3."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mixgf.classification import registry
from mixgf.classification.models.finetuned import Finetune
from mixgf.classification.models.frozen import Neighbours
from mixgf.classification.models.scvi import Scvi
from mixgf.report import published_tables, score_tables
from mixgf.report.elements import Cell, Section, Table, Text, count_cell
from mixgf.report.results import RunResults

ID, TITLE = "published", "Accuracy beside the published tables"
NO_VALUE = Cell("–", -1.0)


def section(results: RunResults) -> Section:
    """Tables 1 to 3 of the paper with the accuracy of this run in further columns.

    Empty where no group of cells is of one species with published results.
    """
    scores = results.tables.get("scores")
    if scores is None or scores.empty:
        return Section(ID, TITLE, [])
    means = score_tables.mean_scores(scores)
    accuracy = means[(means["metric"] == "accuracy") & (means["split"] == "random")]
    own = accuracy.pivot_table(index="group", columns="model", values="value", observed=True)
    num_types = accuracy.groupby("group", observed=True)["num_classes"].max()
    groups: dict[str, list[tuple[str, str]]] = {}  # species to (tissue, group)
    for group, about in score_tables.groups_of(results.records.get("classify")).items():
        if len(about["species"]) == 1 and group in own.index:
            tissue = published_tables.tissue(" + ".join(t for t in about["tissues"] if t))
            groups.setdefault(about["species"][0], []).append((tissue, group))
    blocks: list[Any] = [
        _transformers(species, groups[species], own, num_types)
        for species in published_tables.TABLES
        if species in groups
    ]
    if "mouse" in groups:
        blocks.append(_conventional_models(groups["mouse"], own, num_types))
    if blocks:
        blocks.insert(0, Text(
            "Published values are accuracies in per cent with one seed and without intervals. They were measured on other cells, with "
            "other labels than ours. So compare the models within the published columns and within ours, not one with the other."
        ))  # fmt: skip
    return Section(ID, TITLE, blocks)


def _percent(own: pd.DataFrame, group: str, model: str) -> Cell:
    if group not in own.index or not np.isfinite(own.loc[group, model]):
        return NO_VALUE
    return Cell(f"{100 * own.loc[group, model]:.1f}", float(own.loc[group, model]))


def _num_types(group: str, num_types: pd.Series) -> Cell:
    return count_cell(float(num_types[group])) if group else NO_VALUE


def _tissue(tissue: str, group: str) -> Cell:
    return Cell(f"{tissue} ({group})" if group else tissue)


def _rows(published: list[str], groups: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """(tissue, group) of every row: published tissues in the paper's order, then tissues of this run only.

    The group is empty for a tissue that this run does not have.
    """
    present = {tissue for tissue, _ in groups}
    found = [(tissue, group) for tissue in published for t, group in groups if t == tissue]
    found += [(tissue, "") for tissue in published if tissue not in present]
    found.sort(key=lambda pair: published.index(pair[0]))
    return found + [(tissue, group) for tissue, group in groups if tissue not in published]


def _transformers(species: str, groups: list[tuple[str, str]], own: pd.DataFrame, num_types: pd.Series) -> Table:
    """Table 1 (mouse) or 3 (human): models of the paper and of this run."""
    name, printed = published_tables.TABLES[species]
    row_of = {row.tissue: row for row in printed}
    encoders = sorted({"", *(registry.encoder_of(str(m)) for m in own.columns)})
    names = [kind(encoder).name for kind in (Finetune, Neighbours) for encoder in encoders]
    models = [m for m in names if m in own.columns]
    rows = []
    for tissue, group in _rows(list(row_of), groups):
        published = row_of.get(tissue)
        values = (
            [Cell(f"{v:.1f}", v) for v in (*published.fine_tuned, *published.zero_shot)]
            if published
            else [NO_VALUE] * 6
        )
        rows.append([
            _tissue(tissue, group), count_cell(published.num_types) if published else NO_VALUE, *values, _num_types(group, num_types),
            *(_percent(own, group, m) for m in models),
        ])  # fmt: skip
    columns = [c.format(species.capitalize()) for c in published_tables.COLUMNS]
    head = ["Tissue (our group)", "Types", *(f"{c}, {how}" for how in ("fine-tuned", "zero-shot") for c in columns),
            "Our types", *map(registry.label, models)]  # fmt: skip
    caption = (
        f"The paper's {name}: accuracy in per cent on {species} tissues as published, then of this run on random cells. A dash: not in "
        "the paper, or not in this run."
    )
    return Table(caption, head, rows)


def _conventional_models(groups: list[tuple[str, str]], own: pd.DataFrame, num_types: pd.Series) -> Table:
    """Table 2 (mouse): models without a transformer, beside the baselines of this run."""
    models = [m for m in dict.fromkeys((Finetune.head, Scvi.head, *registry.BASELINES)) if m in own.columns]
    rows = []
    for tissue, group in _rows(list(published_tables.CONVENTIONAL), groups):
        published = published_tables.CONVENTIONAL.get(tissue)
        values = [Cell(f"{v:.1f}", v) for v in published] if published else [NO_VALUE] * 4
        rows.append(
            [_tissue(tissue, group), *values, _num_types(group, num_types), *(_percent(own, group, m) for m in models)]
        )
    head = ["Tissue (our group)", "Mouse-Geneformer", "Mix-Geneformer", "scDeepSort", "scVAE", "Our types",
            *map(registry.label, models)]  # fmt: skip
    caption = (
        "The paper's Table 2: accuracy in per cent on mouse tissues as published, then of this run on random cells. scVI is a "
        "variational autoencoder of counts, like scVAE. No model here corresponds to scDeepSort, a graph network."
    )
    return Table(caption, head, rows)

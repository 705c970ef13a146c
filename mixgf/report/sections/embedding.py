"""Moved here from mixgf/sections.py."""

from __future__ import annotations

from typing import Any

import pandas as pd

from mixgf.classification import integration, umap
from mixgf.report import verdicts
from mixgf.report.elements import Picture, Run, Section, Text, missing, plural
from mixgf.report.figures import plots

# embedding


def embedding(run: Run) -> Section:
    """The joint map of the species, and how near corresponding types lie."""
    record, corpus_record = run.records.get("embed"), run.records.get("corpus")
    if record is not None and corpus_record is not None and record.parents.get("corpus") != corpus_record.fingerprint:
        text = "Not shown: these embeddings were made from another corpus than the one above (inputs.embeddings, inputs.corpus)."
        return Section("embedding", "One space for all species", [Text(text, "missing")])
    if run.vectors_ND is None or run.obs is None or len(run.vectors_ND) < 10:
        return missing("embedding", "One space for all species", "embed", run)
    species, types = run.obs["species"].to_numpy(str), run.obs["type"].to_numpy(str)
    drawn = (
        f"a keyed sample of {len(species):,} of {run.num_embedded:,}"
        if len(species) < run.num_embedded
        else f"all {len(species):,}"
    )
    xy, method = umap.layout(run.vectors_ND, run.config.seed)
    blocks: list[Any] = [
        Picture(
            plots.maps(xy, species, types),
            f"{method} of {drawn} cells' frozen embeddings. The numbers on the right name the types below. Two dimensions bend "
            "distances: read neighbourhoods from them, not lengths; the distances that follow are in the original space.",
        )
    ]
    names = sorted(set(species))
    if len(names) > 1:
        seen, expected = verdicts.mixing(run.vectors_ND, species)
        blocks.insert(
            0,
            Text(
                f"Of a cell's 15 nearest neighbours, {seen:.1%} are of another species; if species played no part, it would be "
                f"{expected:.1%}. "
                + (
                    "The species lie largely apart."
                    if seen < 0.2 * expected
                    else "The species mix in part."
                    if seen < 0.8 * expected
                    else "The species mix."
                )
            ),
        )
    centres = verdicts.centroids(run.vectors_ND, species, types)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            blocks += _centroid_blocks(integration.centroid_table(centres, first, second), first, second)
    return Section("embedding", "One space for all species", blocks)


def _centroid_blocks(table: pd.DataFrame, first: str, second: str) -> list[Any]:
    if table.empty:
        return []
    matched, shared = integration.counterparts(table)
    table = table.iloc[:30, :30]
    text = [[f"{v:.2f}".lstrip("0") if v < 1 else f"{v:.1f}" for v in row] for row in table.to_numpy()]
    if float(table.to_numpy().max()) < 0.1:
        text = [[f"{1000 * v:.0f}" for v in row] for row in table.to_numpy()]
    unit = "Cosine distance, in thousandths," if float(table.to_numpy().max()) < 0.1 else "Cosine distance"
    guess = 1 / max(table.shape[1], 1)
    return [
        Text(
            f"{first} to {second}: for {matched} of {plural(shared, 'type')} found in both species, the nearest {second} centroid "
            f"is that of the same type (chance: {guess:.0%} of them).",
            "good" if shared and matched == shared else "plain",
        ),
        Picture(
            plots.heatmap(
                table, f"centroids-{first}-{second}", rows=first, columns=second, text=text, outline="smallest"
            ),
            f"{unit} between the mean embeddings of each {first} type (row) and each {second} type (column), types "
            f"with at least {integration.MIN_TYPE_CELLS} cells. The box marks each row's nearest type; shared types come first, so "
            "that perfect correspondence is boxes on the diagonal.",
        ),
    ]

"""Moved here from mixgf/sections.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mixgf.classification import integration, umap
from mixgf.report import wording
from mixgf.report.elements import Figure, Section, Text, not_run
from mixgf.report.figures import cell_maps, heatmap
from mixgf.report.results import RunResults

# embedding


def section(results: RunResults) -> Section:
    """The joint map of the species, and how near corresponding types lie."""
    record, corpus_record = results.records.get("embed"), results.records.get("corpus")
    if record is not None and corpus_record is not None and record.parents.get("corpus") != corpus_record.fingerprint:
        text = "Not shown: these embeddings were made from another corpus than the one above (inputs.embeddings, inputs.corpus)."
        return Section("embedding", "One space for all species", [Text(text, "missing")])
    if results.vectors_ND is None or results.obs is None or len(results.vectors_ND) < 10:
        return not_run("embedding", "One space for all species", "embed", results)
    species, types = results.obs["species"].to_numpy(str), results.obs["type"].to_numpy(str)
    drawn = (
        f"a keyed sample of {len(species):,} of {results.num_embedded:,}"
        if len(species) < results.num_embedded
        else f"all {len(species):,}"
    )
    xy, method = umap.layout(results.vectors_ND, results.config.seed)
    blocks: list[Any] = [
        Figure(
            cell_maps.species_and_types(xy, species, types),
            f"{method} of {drawn} cells' frozen embeddings. The numbers on the right name the types below. Two dimensions bend "
            "distances: read neighbourhoods from them, not lengths; the distances that follow are in the original space.",
        )
    ]
    names = sorted(set(species))
    if len(names) > 1:
        seen, expected = species_mixing(results.vectors_ND, species)
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
    centres = type_centroids(results.vectors_ND, species, types)
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
            f"{first} to {second}: for {matched} of {wording.plural(shared, 'type')} found in both species, the nearest {second} centroid "
            f"is that of the same type (chance: {guess:.0%} of them).",
            "good" if shared and matched == shared else "plain",
        ),
        Figure(
            heatmap.heatmap(
                table, f"centroids-{first}-{second}", rows=first, columns=second, text=text, outline="smallest"
            ),
            f"{unit} between the mean embeddings of each {first} type (row) and each {second} type (column), types "
            f"with at least {integration.MIN_TYPE_CELLS} cells. The box marks each row's nearest type; shared types come first, so "
            "that perfect correspondence is boxes on the diagonal.",
        ),
    ]


def type_centroids(
    vectors_ND: np.ndarray, species_N: np.ndarray, types_N: np.ndarray
) -> dict[tuple[str, str], np.ndarray]:
    """Mean vector of each (species, type) with at least `MIN_TYPE_CELLS` cells."""
    found = {}
    for species in sorted(set(species_N)):
        for kind in sorted(set(types_N[species_N == species])):
            rows = (species_N == species) & (types_N == kind)
            if kind and rows.sum() >= integration.MIN_TYPE_CELLS:
                found[str(species), str(kind)] = vectors_ND[rows].mean(axis=0, dtype=np.float64)
    return found


def species_mixing(vectors_ND: np.ndarray, species_N: np.ndarray, k: int = 15) -> tuple[float, float]:
    """Share of the k nearest neighbours (cosine) that are of another species, and the share under perfect mixing."""
    distance = integration.cosine_distances(vectors_ND.astype(np.float32), vectors_ND.astype(np.float32))
    np.fill_diagonal(distance, np.inf)
    k = min(k, len(distance) - 1)
    near = np.argpartition(distance, k - 1, axis=1)[:, :k]
    seen = float((species_N[near] != species_N[:, None]).mean())
    _, counts = np.unique(species_N, return_counts=True)
    expected = float(np.sum(counts * (len(distance) - counts)) / (len(distance) * (len(distance) - 1)))
    return seen, expected

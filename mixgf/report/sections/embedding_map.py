"""Embedding map: all species on one map, and distances between the mean embeddings of cell types."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mixgf.classification import embedding_measures, umap
from mixgf.report import wording
from mixgf.report.elements import Figure, Section, Text, not_run
from mixgf.report.figures import cell_maps, heatmap
from mixgf.report.results import RunResults

TITLE = "Embedding map"


def section(results: RunResults) -> Section:
    """The map of cells of all species, how much species mix, and distances between types of two species."""
    record, corpus_record = results.records.get("embed"), results.records.get("corpus")
    if record is not None and corpus_record is not None and record.parents.get("corpus") != corpus_record.fingerprint:
        text = "Not shown: these embeddings are of another corpus than the one above. Check inputs.embeddings and inputs.corpus."
        return Section("embedding", TITLE, [Text(text, "missing")])
    if results.vectors_ND is None or results.obs is None or len(results.vectors_ND) < 10:
        return not_run("embedding", TITLE, "embed", results)
    species, types = results.obs["species"].to_numpy(str), results.obs["type"].to_numpy(str)
    drawn = (
        f"a random sample of {len(species):,} of {results.num_embedded:,}"
        if len(species) < results.num_embedded
        else f"all {len(species):,}"
    )
    xy, method = umap.layout(results.vectors_ND, results.config.seed)
    blocks: list[Any] = [
        Figure(
            cell_maps.species_and_types(xy, species, types),
            f"{method} of the frozen embeddings of {drawn} cells. Numbers on the right panel refer to the types below it. A map in two "
            "dimensions shows neighbourhoods, not distances. The distances in the next figure are those of the embedding itself.",
        )
    ]
    names = sorted(set(species))
    if len(names) > 1:
        seen, expected = species_mixing(results.vectors_ND, species)
        blocks.insert(
            0,
            Text(
                f"{seen:.1%} of the 15 nearest neighbours of a cell are of another species. With perfectly mixed species it would be "
                f"{expected:.1%}. "
                + (
                    "The species are largely separate."
                    if seen < 0.2 * expected
                    else "The species are partly mixed."
                    if seen < 0.8 * expected
                    else "The species are mixed."
                )
            ),
        )
    centres = type_centroids(results.vectors_ND, species, types)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            blocks += _centroid_blocks(embedding_measures.centroid_table(centres, first, second), first, second)
    return Section("embedding", TITLE, blocks)


def _centroid_blocks(table: pd.DataFrame, first: str, second: str) -> list[Any]:
    if table.empty:
        return []
    matched, shared = embedding_measures.counterparts(table)
    table = table.iloc[:30, :30]
    text = [[f"{v:.2f}".lstrip("0") if v < 1 else f"{v:.1f}" for v in row] for row in table.to_numpy()]
    if float(table.to_numpy().max()) < 0.1:
        text = [[f"{1000 * v:.0f}" for v in row] for row in table.to_numpy()]
    unit = "Cosine distance, in thousandths," if float(table.to_numpy().max()) < 0.1 else "Cosine distance"
    guess = 1 / max(table.shape[1], 1)
    return [
        Text(
            f"{first} to {second}: for {matched} of {wording.plural(shared, 'type')} found in both species, the nearest {second} centroid "
            f"is that of the same type (by chance: {guess:.0%}).",
            "good" if shared and matched == shared else "plain",
        ),
        Figure(
            heatmap.heatmap(
                table, f"centroids-{first}-{second}", rows=first, columns=second, text=text, outline="smallest"
            ),
            f"{unit} between the mean embeddings of each {first} type (row) and each {second} type (column), types "
            f"with at least {embedding_measures.MIN_TYPE_CELLS} cells. A box marks the nearest type of each row. Types of both species come first: "
            "if all of them correspond, the boxes are on the diagonal.",
        ),
    ]


def type_centroids(
    vectors_ND: np.ndarray, species_N: np.ndarray, types_N: np.ndarray
) -> dict[tuple[str, str], np.ndarray]:
    """Mean vector (D,) of each (species, type) with at least `integration.MIN_TYPE_CELLS` cells."""
    found = {}
    for species in sorted(set(species_N)):
        for kind in sorted(set(types_N[species_N == species])):
            rows = (species_N == species) & (types_N == kind)
            if kind and rows.sum() >= embedding_measures.MIN_TYPE_CELLS:
                found[str(species), str(kind)] = vectors_ND[rows].mean(axis=0, dtype=np.float64)
    return found


def species_mixing(vectors_ND: np.ndarray, species_N: np.ndarray, k: int = 15) -> tuple[float, float]:
    """Share of the k nearest neighbours (cosine) that are of another species, and its expectation under perfect mixing."""
    distance = embedding_measures.cosine_distances(vectors_ND.astype(np.float32), vectors_ND.astype(np.float32))
    np.fill_diagonal(distance, np.inf)
    k = min(k, len(distance) - 1)
    near = np.argpartition(distance, k - 1, axis=1)[:, :k]
    seen = float((species_N[near] != species_N[:, None]).mean())
    _, counts = np.unique(species_N, return_counts=True)
    expected = float(np.sum(counts * (len(distance) - counts)) / (len(distance) * (len(distance) - 1)))
    return seen, expected

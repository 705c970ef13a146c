"""Embeddings of the same cells compared: measures of types, species and data sets; maps; positions of type centroids."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mixgf.report import wording
from mixgf.report.elements import Cell, Figure, Section, Table, Text, count_cell, not_run, number_cell
from mixgf.report.figures import cell_maps
from mixgf.report.results import RunResults

TITLE = "Embedding spaces compared"
NAMES = {"trained": "mixgf", "untrained": "untrained encoder", "expression": "variable genes (50 components)"}
MEASURES = {
    "type_silhouette": "Types separate (silhouette)", "type_nmi": "Types found by clustering (NMI)", "type_ari": "Types found by clustering (ARI)",
    "species_mixing": "Species mixed within types", "source_mixing": "Data sets mixed within types", "species_lisi": "Species mixed (iLISI)",
    "source_lisi": "Data sets mixed (iLISI)", "species_probe": "Species by a probe", "species_probe_new_sets": "Species by a probe, new data sets",
}  # fmt: skip
"""Measures of `mixgf.classification.embedding_measures` and their names for readers, in the order of the columns."""
UNIT = 1.0
"""Distance on the map within which centroids correspond, by the paper (section 4.4)."""


def name(space: str) -> str:
    """Name of an embedding for readers."""
    return NAMES.get(space, f"{space} encoder")


def section(results: RunResults) -> Section:
    """Measures of every embedding, maps, and distances between centroids on the maps."""
    measures, maps, centroids = (results.tables.get(k) for k in ("integration", "maps", "centroids"))
    if measures is None or measures.empty:
        if "classify" not in results.records:
            return not_run("spaces", TITLE, "classify", results)
        text = "Not measured. `--set classify.integration_cells=4000` adds the measures to the classification."
        return Section("spaces", TITLE, [Text(text, "missing")])
    blocks = _measures(measures)
    if maps is not None and len(maps):
        spaces = list(dict.fromkeys(maps["space"]))
        caption = (
            f"{maps['map'].iloc[0]} of the same {wording.plural(int(len(maps) / len(spaces)), 'cell')} in each space, one map per space. "
            "Numbers refer to the types below. The axes of a map have no meaning, and a map may be rotated or mirrored."
        )
        blocks += [
            Text("Maps", "heading"),
            Figure(cell_maps.side_by_side({name(s): maps[maps["space"] == s] for s in spaces}), caption),
        ]
    if centroids is not None and len(centroids):
        blocks += _centroids(centroids)
    return Section("spaces", TITLE, blocks)


def _measures(table: pd.DataFrame) -> list[Any]:
    spaces = list(dict.fromkeys(table["space"]))
    columns = [m for m in MEASURES if m in set(table["metric"])]
    at = table.set_index(["space", "metric"])
    rows = []
    for space in spaces:
        row = [Cell(name(space), strong=space == "trained")]
        for metric in columns:
            if (space, metric) not in at.index:
                row.append(Cell("–", -1.0))
                continue
            value, low, high = (float(at.loc[(space, metric), c]) for c in ("value", "low", "high"))
            row.append(Cell(wording.interval_text(value, low, high), value))
        rows.append(row)
    caption = (
        f"Measured on {wording.plural(int(table['num_cells'].iloc[0]), 'cell')}. Types separate and found: 0 to 1, higher is better (a silhouette of 0.5 means "
        "no separation). Mixed: 0 to 1, higher is better, but a space without any information also reaches 1. Probe: balanced "
        "accuracy of a logistic regression that predicts the species from the embedding; 0.5 is chance. The probe on new data sets is "
        "tested on data sets without training cells, so it cannot use differences between laboratories."
    )
    blocks: list[Any] = [Table(caption, ["Embedding", *[MEASURES[m] for m in columns]], rows)]
    probed = table[(table["metric"] == "species_probe") & (table["space"] == "trained")]
    if len(probed):
        value, low, high = (float(probed[c].iloc[0]) for c in ("value", "low", "high"))
        said = "can be predicted from" if low > 0.5 else "cannot be predicted better than by chance from"
        blocks.insert(0, Text(f"The species {said} the embedding: a linear probe reaches a balanced accuracy of "
                              f"{wording.interval_text(value, low, high)} on types of both species.", "warn" if low > 0.5 else "good"))  # fmt: skip
    return blocks


def _centroids(table: pd.DataFrame) -> list[Any]:
    rows, said = [], []
    for space in dict.fromkeys(table["space"]):
        mine = table[table["space"] == space]
        near, turned = (float((mine[c] <= UNIT).mean()) for c in ("umap", "umap_aligned"))
        same = float(mine["distance_correlation"].mean())
        rows.append([
            Cell(name(space)), count_cell(len(mine)), Cell(f"{near:.0%}", near), number_cell(float(mine["umap"].median()), ".1f"), Cell(f"{turned:.0%}", turned),
            number_cell(float(mine["umap_aligned"].median()), ".1f"), number_cell(same, ".2f"), number_cell(float(mine["distance_difference"].mean()), ".3f"),
        ])  # fmt: skip
        if np.isfinite(same):
            said.append(f"{name(space)} {near:.0%} as drawn, {turned:.0%} after rotation, correlation {same:.2f}")
    claim = (
        "The paper states that centroids of corresponding types lie within about one UMAP unit in the maps of two models (Figures 2 and "
        f"3). Share of the centroids here that lie within one unit of their position in the map of mixgf: {'; '.join(said)}."
    )
    grid = Table(
        "Centroids of each type and species, compared with those in the space of mixgf. UMAP units: as drawn, and after the other map is "
        "rotated and mirrored onto ours without scaling. Two embeddings have no common axes, so the last columns compare the cosine "
        "distances of each type to all other types (correlation, 1 = same geometry; mean change of a distance).",
        [
            "Embedding",
            "Types",
            "Within 1 unit",
            "Median units",
            "Within 1, rotated",
            "Median, rotated",
            "Correlation of distances",
            "Change of distances",
        ],
        rows,
    )
    worst = table[table["space"] != "expression"].nsmallest(8, "distance_correlation")
    blocks: list[Any] = [Text("Distance of centroids on the maps", "heading"), Text(claim), grid]
    if len(worst) and np.isfinite(worst["distance_correlation"]).any():
        blocks.append(Table(
            "Types whose distances to the other types differ most between encoders.",
            ["Embedding", "Species", "Type", "Cells", "UMAP units, rotated", "Correlation of distances"],
            [[Cell(name(r.space)), Cell(r.species), Cell(r.type), count_cell(r.num_cells), number_cell(r.umap_aligned, ".1f"), number_cell(r.distance_correlation, ".2f")]
             for r in worst.itertuples()],
        ))  # fmt: skip
    return blocks

"""Section of the report that sets embeddings of the same cells side by side: maps, centroids, what is left of species."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mixgf.report import wording
from mixgf.report.elements import Cell, Figure, Section, Table, Text, count_cell, not_run, number_cell
from mixgf.report.figures import cell_maps
from mixgf.report.results import RunResults

TITLE = "Embeddings side by side"
NAMES = {"trained": "mixgf", "untrained": "untrained encoder", "expression": "variable genes (50 components)"}
MEASURES = {
    "type_silhouette": "Types apart (silhouette)", "type_nmi": "Types found by clustering (NMI)", "type_ari": "Types found by clustering (ARI)",
    "species_mixing": "Species mixed within types", "source_mixing": "Data sets mixed within types", "species_lisi": "Species mixed (iLISI)",
    "source_lisi": "Data sets mixed (iLISI)", "species_probe": "Species read by a probe", "species_probe_new_sets": "Species read, new data sets",
}  # fmt: skip
"""Measures of `mixgf.integration` with a reader's name, in the order of the columns."""
UNIT = 1.0
"""The paper's claim: centroids lie within about one UMAP unit (section 4.4)."""


def name(space: str) -> str:
    """An embedding's name for readers."""
    return NAMES.get(space, f"{space} encoder")


def section(results: RunResults) -> Section:
    """Maps of every embedding, their centroids, and measures of types, species and data sets."""
    measures, maps, centroids = (results.tables.get(k) for k in ("integration", "maps", "centroids"))
    if measures is None or measures.empty:
        if "classify" not in results.records:
            return not_run("spaces", TITLE, "classify", results)
        text = "Not measured: `--set classify.integration_cells=4000` adds it to the same classification."
        return Section("spaces", TITLE, [Text(text, "missing")])
    blocks = _measures(measures)
    if maps is not None and len(maps):
        spaces = list(dict.fromkeys(maps["space"]))
        caption = (
            f"{maps['map'].iloc[0]} of the same {wording.plural(int(len(maps) / len(spaces)), 'cell')} in each space, each on its own; "
            "numbers name the types below. The axes of such maps mean nothing, and each may be turned or mirrored."
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
        f"Measured on {wording.plural(int(table['num_cells'].iloc[0]), 'cell')}. Types apart and found: higher is better (0 to 1; silhouette 0.5 is "
        "none). Mixed: 1 is best, and easily had by a space that keeps nothing. Read by a probe: balanced accuracy of a logistic "
        "regression that guesses the species from a vector; 0.5 would mean that the embedding says nothing of the species. On new "
        "data sets it has not seen the laboratory, so what it reads there is the species itself."
    )
    blocks: list[Any] = [Table(caption, ["Embedding", *[MEASURES[m] for m in columns]], rows)]
    probed = table[(table["metric"] == "species_probe") & (table["space"] == "trained")]
    if len(probed):
        value, low, high = (float(probed[c].iloc[0]) for c in ("value", "low", "high"))
        said = "can be read from" if low > 0.5 else "cannot be told from chance in"
        blocks.insert(0, Text(f"The species {said} the embedding: a linear probe reaches a balanced accuracy of "
                              f"{wording.interval_text(value, low, high)} on types that both have.", "warn" if low > 0.5 else "good"))  # fmt: skip
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
            said.append(f"{name(space)} {near:.0%} as drawn, {turned:.0%} after turning, correlation {same:.2f}")
    claim = (
        "The paper holds that the centroids of corresponding types in the maps of two models lie within about one UMAP unit (Figures 2 and "
        f"3). Here, of the types' centroids, within one unit of their place in the map of mixgf: {'; '.join(said)}."
    )
    grid = Table(
        "Centroids of each type and species against the same in mixgf's own space. UMAP units: as drawn, and after the other map is "
        "turned and mirrored onto ours (never stretched). In the space itself there are no common axes: so each type's cosine distances "
        "to all other types are compared (correlation, 1 = the same geometry; mean change of a distance).",
        [
            "Embedding",
            "Types",
            "Within 1 unit",
            "Median units",
            "Within 1, turned",
            "Median, turned",
            "Correlation of distances",
            "Change of distances",
        ],
        rows,
    )
    worst = table[table["space"] != "expression"].nsmallest(8, "distance_correlation")
    blocks: list[Any] = [Text("The claim of one UMAP unit", "heading"), Text(claim), grid]
    if len(worst) and np.isfinite(worst["distance_correlation"]).any():
        blocks.append(Table(
            "Types whose place among the others differs most between encoders.",
            ["Embedding", "Species", "Type", "Cells", "UMAP units, turned", "Correlation of distances"],
            [[Cell(name(r.space)), Cell(r.species), Cell(r.type), count_cell(r.num_cells), number_cell(r.umap_aligned, ".1f"), number_cell(r.distance_correlation, ".2f")]
             for r in worst.itertuples()],
        ))  # fmt: skip
    return blocks

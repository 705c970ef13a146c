"""Comparison of species (`mixgf compare`): one function per part, listed in `PARTS`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd

from mixgf.classification import registry
from mixgf.report import wording
from mixgf.report.elements import Cell, Figure, Section, Table, Text, count_cell, number_cell
from mixgf.report.figures import cell_maps, heatmap
from mixgf.report.results import COMPARISON_PREFIX, RunResults
from mixgf.report.sections import embedding_spaces

TITLE = "Species compared"
MAX_FAILURES = 40
"""Most rows in the table of types that fail."""
SPACES = {"expression": "expression (one-to-one orthologs)", "ranks": "ranks of orthologs"}


def section(results: RunResults) -> Section:
    """All tables of `mixgf compare`; empty where it has not been run."""
    if "compare" not in results.records:
        return Section("species", TITLE, [])
    tables = {
        name.removeprefix(COMPARISON_PREFIX): table
        for name, table in results.tables.items()
        if name.startswith(COMPARISON_PREFIX)
    }
    blocks: list[Any] = []
    for part in PARTS:
        blocks += part(tables)
    return Section("species", TITLE, blocks)


def name(space: str) -> str:
    """Name of a space for readers."""
    return SPACES.get(space, embedding_spaces.name(space))


def corresponding_types(tables: dict[str, pd.DataFrame]) -> list[Any]:
    """Maps by type, species, donor and data set, and distances between corresponding types."""
    maps, types = tables.get("maps", pd.DataFrame()), tables.get("corresponding", pd.DataFrame())
    blocks: list[Any] = [Text("Corresponding types", "heading")]
    if len(maps):
        shown = {name(str(s)): frame for s, frame in maps.groupby("space", sort=False)}
        caption = (f"{maps['map'].iloc[0]} of the same cells in each space. Numbers refer to the types, one per species. The axes of a map have no meaning, and "
                   "distances on it are distorted; the table below measures distances in the space itself.")  # fmt: skip
        blocks.append(Figure(cell_maps.side_by_side(shown), caption))
        first = next(iter(shown))
        for column, what in (
            ("species", "by species"),
            ("donor", "by donor (grey: not known)"),
            ("group", "by data set"),
        ):
            again = {first: shown[first].assign(type=shown[first][column])}
            blocks.append(Figure(cell_maps.side_by_side(again, column), f"The first map again, {what}."))
    if len(types):
        rows = []
        for (space, species, other), mine in types.groupby(["space", "species", "other_species"], sort=False):
            hit = int((mine["place"] == 1).sum())
            chance = float((1 / mine["num_types"]).sum())
            rows.append([Cell(name(str(space))), Cell(f"{species} to {other}"), Cell(f"{hit} of {len(mine)}", hit), number_cell(chance, ".1f"),
                         number_cell(float(mine["place"].median()), ".1f"), number_cell(float(mine["distance"].median()), ".3f"),
                         number_cell(float(mine["map_distance"].median()), ".1f")])  # fmt: skip
        blocks.append(Table(
            "Types of both species: number of types whose nearest centroid of the other species (cosine distance in the space) is the same "
            "type, the number expected by chance, the median rank of the same type (1 = nearest), and its median distance.",
            ["Space", "Direction", "Nearest is the same type", "By chance", "Median rank", "Median cosine distance", "Distance on the map"], rows,
        ))  # fmt: skip
    return blocks


def compactness(tables: dict[str, pd.DataFrame]) -> list[Any]:
    """Dispersion and local density of each type in the run's own space, relative to every other space (the paper's Figures 2 and 3)."""
    table = tables.get("compactness", pd.DataFrame())
    if table.empty:
        return []
    rows, said = [], []
    for (other, on), mine in table.groupby(["other", "on"], sort=False):
        more, less = int((mine["dispersion_low"] > 1).sum()), int((mine["dispersion_high"] < 1).sum())
        unknown = int(mine["dispersion_low"].isna().sum())
        if on == "map":
            said.append(f"{name(str(other))}: {more} more, {less} less, {len(mine) - more - less - unknown} no difference that can be told"
                        + (f", {unknown} with too few donors to say" if unknown else ""))  # fmt: skip
        rows.append([
            Cell(name(str(other))), Cell("map" if on == "map" else "space itself"), count_cell(len(mine)), Cell(f"{more} / {less}", more),
            number_cell(float(mine["dispersion"].median()), ".2f"),
            Cell(f"{int((mine['radius_low'] > 1).sum())} / {int((mine['radius_high'] < 1).sum())}"), number_cell(float(mine["radius"].median()), ".2f"),
            number_cell(float(mine["density_correlation"].median()), ".2f"),
        ])  # fmt: skip
    claim = (
        "The paper states that clusters are no more dispersed in its joint model than in a model of one species, and that local density is "
        f"preserved (Figures 2 and 3). Types that are more or less dispersed on the map of mixgf than on that of {'; '.join(said)}."
    )
    grid = Table(
        "Dispersion: distance of a type's cells to their centroid. Local radius: mean distance to the 15 nearest cells. Both are ratios, "
        "mixgf over the other space, on the same cells and relative to all cells of the space; 1 = equal, above 1 = wider in mixgf. "
        "More / less: types whose 95 % interval over donors lies above / below 1. Correlation of the local radii of a type's "
        "cells: 1 = local density is preserved.",
        ["Other space", "Measured on", "Types", "More / less dispersed", "Median dispersion", "More / less local radius", "Median radius", "Median correlation"],
        rows,
    )  # fmt: skip
    lost = table[table["on"] == "map"].nlargest(8, "dispersion")
    worst = Table(
        "Types that are most dispersed on the map of mixgf, relative to another map.",
        ["Other space", "Species", "Type", "Cells", "Dispersion", "Local radius", "Correlation of radii"],
        [[Cell(name(r.other)), Cell(r.species), Cell(r.type), count_cell(r.num_cells),
          Cell(wording.interval_text(r.dispersion, r.dispersion_low, r.dispersion_high), r.dispersion),
          Cell(wording.interval_text(r.radius, r.radius_low, r.radius_high), r.radius), number_cell(r.density_correlation, ".2f")] for r in lost.itertuples()],
    )  # fmt: skip
    return [Text("Dispersion and local density of types", "heading"), Text(claim), grid, worst]


def label_transfer(tables: dict[str, pd.DataFrame]) -> list[Any]:
    """Scores of labels that are transferred to the other species, and types for which this fails."""
    table, failed = tables.get("transfer", pd.DataFrame()), tables.get("failures", pd.DataFrame())
    if table.empty:
        return []
    rows: list[list[Cell]] = []
    for (group, direction), mine in table.groupby(["group", "direction"], sort=False):
        wide = mine.set_index(["model", "metric"])
        sizes = mine.iloc[0]
        rows.append([Cell(f"{group}, {str(direction).replace('>', ' → ')}: {wording.plural(int(sizes['num_classes']), 'type')}, "
                          f"{int(sizes['num_test']):,} cells")])  # fmt: skip
        for model in wording.order_models(list(dict.fromkeys(mine["model"]))):
            scores = [
                wide.loc[(model, metric), ["value", "low", "high"]].astype(float) for metric in ("accuracy", "macro_f1")
            ]
            rows.append(
                [Cell(registry.label(model)), *(Cell(wording.interval_text(*s), float(s.iloc[0])) for s in scores)]
            )
    blocks: list[Any] = [
        Text("Label transfer to the other species", "heading"),
        Table("Trained on the labels of one species and tested on cells of the other; types of both species. 95 % intervals over donors, or over "
             "cells where donors are not known.", ["Model", "Accuracy", "Macro F1"], rows),
    ]  # fmt: skip
    if len(failed):
        ours = [
            m for m in dict.fromkeys(failed["model"]) if not registry.is_baseline(m) and not registry.is_untrained(m)
        ]
        bad = failed[failed["model"].isin(ours) & (failed["why"] != "")].sort_values(["num_test"], ascending=False)
        rows = [[Cell(str(r.group)), Cell(str(r.direction).replace(">", " → ")), Cell(registry.label(str(r.model))), Cell(str(r.type)), count_cell(r.num_test),
                 Cell(wording.interval_text(r.recall, r.low, r.high), r.recall), Cell(f"{r.into} ({r.into_share:.0%})"), Cell(str(r.why))]
                for r in bad.head(MAX_FAILURES).itertuples()]  # fmt: skip
        total = failed[failed["model"].isin(ours)]
        blocks.append(Table(
            f"Types that fail (fewer than half of their cells are found): {len(bad)} of {len(total)} pairs of type and model, the largest "
            f"{min(len(bad), MAX_FAILURES)} shown. The last columns name the type that is predicted instead, and a first reason.",
            ["Group", "Direction", "Model", "Type", "Cells", "Recall", "Predicted instead", "First reason"], rows,
        ))  # fmt: skip
    return blocks


def matched_shifts(tables: dict[str, pd.DataFrame]) -> list[Any]:
    """Similarity of shifts between two species."""
    pairs, shifts, tags = (tables.get(k, pd.DataFrame()) for k in ("pairs", "shifts", "together"))
    blocks: list[Any] = [Text("Matched shifts", "heading")]
    if pairs.empty:
        return [*blocks, Text("No shifts were matched, because `compare.shifts` names none.", "missing")]
    blocks.append(Text(
        "A shift is the difference of mean vectors of two conditions of one species, within types. The figure shows the cosine of each pair of "
        "shifts. ★ marks pairs with a false discovery rate of 5 % by permuted labels: both shifts are real and point in similar directions. It does "
        "not mean that the pair is more similar than other pairs."))  # fmt: skip
    for space, mine in pairs.groupby("space", sort=False):
        for (one, other), part in mine.groupby(["species", "other_species"], sort=False):
            values, fdr, best = (
                part.pivot_table(index="shift", columns="other_shift", values=c, sort=False)
                for c in ("cosine", "fdr", "best")
            )
            text = [
                [f"{v:.2f}{'★' if f <= 0.05 else ''}" for v, f in zip(*row, strict=True)]
                for row in zip(values.to_numpy(), fdr.to_numpy(), strict=True)
            ]
            blocks.append(Figure(
                heatmap.heatmap(values.clip(0, 1), f"shifts-{space}-{one}", rows=str(one), columns=str(other), text=text),
                f"{name(str(space))}: in {int(best.to_numpy().sum())} pairs each shift is the best match of the other."))  # fmt: skip
    blocks.append(Table(
        "Shifts that are expected to match, by tag: mean cosine of pairs with one tag and of pairs with two tags; AUROC, the probability that a pair "
        "of the first kind has the higher cosine; and its p by permuting tags among the experiments of the second species (the last column is the smallest p possible).",
        ["Space", "Tag", "Pairs", "Cosine", "Cosine of others", "AUROC", "p", "Smallest p"],
        [[Cell(name(str(r.space))), Cell(str(r.tag)), count_cell(r.num_pairs), number_cell(r.cosine, ".2f"), number_cell(r.cosine_others, ".2f"),
          number_cell(r.auroc, ".2f"), number_cell(r.p, ".3f"), number_cell(r.smallest_p, ".3f")] for r in tags.itertuples()]))  # fmt: skip
    first = shifts[shifts["space"] == shifts["space"].iloc[0]]
    reliable = shifts.pivot_table(index="shift", columns="space", values="reliability")
    rows = []
    for r in first.itertuples():
        caution = (
            ""
            if r.donors_shared
            else "condition and donor are confounded"
            if r.donors_before and r.donors_after
            else "donors unknown"
        )
        rows.append([Cell(str(r.species)), Cell(str(r.shift)), count_cell(r.num_before), count_cell(r.num_after), number_cell(r.log2_length, "+.2f"),
                     *[number_cell(float(reliable.loc[r.shift, s]), ".2f") for s in reliable.columns], number_cell(r.smallest_p, ".3f"), Cell(caution)])  # fmt: skip
    blocks.append(Table(
        "The shifts: cells of each condition, change of the sentence length (log₂), cosine of the shift in two random halves of its cells (its "
        "square root is an upper limit for the cosine with another shift), and the smallest p that its permutations can give.",
        ["Species", "Shift", "Before", "After", "Length", *[f"Reliability: {name(str(s))}" for s in reliable.columns], "Smallest p", "Caution"], rows))  # fmt: skip
    return blocks


MAX_TARGETS = 25
"""Most rows in the table of conserved targets."""


def conserved_responses(tables: dict[str, pd.DataFrame]) -> list[Any]:
    """Shifts of orthologs in two species: similarity, differences, and targets of both species."""
    summary, genes = tables.get("conserved_summary", pd.DataFrame()), tables.get("conserved", pd.DataFrame())
    if summary.empty or genes.empty:
        return []
    one, other = summary.loc[0, ["first", "second"]]
    alike_ = summary.reindex(columns=["whole", "spearman", "low", "high", "null", "null_low", "null_high", "p"])
    rows = [[Cell(str(r.operation)), count_cell(r.num_pairs), number_cell(v["whole"], ".2f"), Cell(wording.interval_text(v["spearman"], v["low"], v["high"])),
             Cell(wording.interval_text(v["null"], v["null_low"], v["null_high"])), number_cell(v["p"], ".3f"), count_cell(r.differ), count_cell(r.towards), count_cell(r.unusual),
             count_cell(r.replicated), Cell("donors" if r.by_donors else "cells (too few donors)")]
            for r, v in zip(summary.itertuples(), alike_.astype(float).to_dict("records"), strict=True)]  # fmt: skip
    blocks: list[Any] = [Text("Conserved and divergent responses", "heading"), Table(
        f"One-to-one orthologs perturbed in {one} and in {other}: rank correlation of the shifts, and of their residuals after rank and coverage of the gene (95 % "
        "interval over genes). The control permutes orthologs among genes of similar rank and coverage. Then numbers of orthologs: shifts that differ (FDR 5 %, "
        "after rank), go towards the goal in both species, are unusual for their rank in both, and are replicated over donors in both.",
        ["Operation", "Orthologs", "Correlation", "Of residuals", "Permuted orthologs", "p", "Differ", "Towards in both", "Unusual in both", "Replicated in both",
         "Intervals over"], rows)]  # fmt: skip
    if not summary["by_donors"].all():
        text = "At least one species has too few donors for a test: differences and targets below may be due to the donors, not to the species."
        blocks.append(Text(text, "warn"))
    best = genes[genes["place"] > 0].sort_values(["place", "operation"]).head(MAX_TARGETS)
    rows = []
    for r in best.to_dict("records"):
        sides = [
            Cell(f"{r[f'shift_{n}']:+.4f} ({r[f'shift_low_{n}']:+.4f} to {r[f'shift_high_{n}']:+.4f})", r[f"shift_{n}"])
            for n in (one, other)
        ]
        rows.append([Cell(f"{r[f'symbol_{one}']} / {r[f'symbol_{other}']}"), Cell(r["operation"]), *sides,
                     *(number_cell(r[f"null_percentile_{n}"], ".0f") for n in (one, other)), *(number_cell(r[f"p_donor_{n}"], ".2g") for n in (one, other)),
                     Cell(r["doubts"])])  # fmt: skip
    blocks.append(Table(
        "Conserved targets: genes whose perturbation moves cells towards the goal in both species, by the lower of their two percentiles among genes of similar rank and coverage.",
        ["Gene", "Operation", *(f"Shift, {n}" for n in (one, other)), *(f"Percentile, {n}" for n in (one, other)),
         *(f"p over donors, {n}" for n in (one, other)), "Doubts"], rows))  # fmt: skip
    return blocks


def gene_networks(tables: dict[str, pd.DataFrame]) -> list[Any]:
    """Overlap of the neighbours of orthologs in two species."""
    table = tables.get("networks", pd.DataFrame())
    if table.empty:
        return []
    blocks: list[Any] = [Text("Gene networks", "heading")]
    known, none = table[table["why"] == ""], table[table["why"] != ""]
    rows = [[Cell(str(r.space)), Cell(f"{r.first} and {r.second}"), count_cell(r.num_genes), count_cell(r.k), Cell(wording.interval_text(r.share, r.low, r.high)),
             number_cell(r.jaccard, ".3f"), Cell(wording.interval_text(r.null, r.null_low, r.null_high)), number_cell(r.chance, ".3f"), number_cell(r.p, ".3f")]
            for r in known.itertuples()]  # fmt: skip
    if rows:
        blocks.append(Table(
            "Share of a gene's nearest genes in one species whose orthologs are also nearest in the other (95 % interval over genes). Control: orthologs permuted among "
            "genes of similar frequency (responses: of similar rank and coverage). A share within the range of the control is explained by frequency or rank alone.",
            ["Space", "Species", "Orthologs", "Neighbours", "Shared", "Jaccard", "Permuted orthologs", "Chance", "p"], rows))  # fmt: skip
    return blocks + [
        Text(f"{r.space}, {r.first} and {r.second}: not compared. {r.why}.", "missing") for r in none.itertuples()
    ]


PARTS: tuple[Callable[[dict[str, pd.DataFrame]], list[Any]], ...] = (
    corresponding_types,
    compactness,
    label_transfer,
    matched_shifts,
    conserved_responses,
    gene_networks,
)
"""Each takes the tables of the comparison by name and returns elements; none where its tables are missing."""

"""Section of the report on species: one space, labels carried over, shifts that match. Each of `BLOCKS` lays out one part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd

from mixgf.report import wording
from mixgf.report.elements import Cell, Figure, Section, Table, Text, count_cell, number_cell
from mixgf.report.figures import cell_maps, heatmap
from mixgf.report.results import COMPARISON_PREFIX, RunResults
from mixgf.report.sections import embedding_spaces

TITLE = "Across species"
MAX_FAILURES = 40
SPACES = {"expression": "expression (one-to-one orthologs)", "ranks": "ranks of orthologs"}


def section(results: RunResults) -> Section:
    """Everything that `mixgf compare` found."""
    if "compare" not in results.records:
        return Section("across", TITLE, [])
    tables = {
        name.removeprefix(COMPARISON_PREFIX): table
        for name, table in results.tables.items()
        if name.startswith(COMPARISON_PREFIX)
    }
    blocks: list[Any] = []
    for block in BLOCKS:
        blocks += block(tables)
    return Section("across", TITLE, blocks)


def name(space: str) -> str:
    """A space's name for readers."""
    return SPACES.get(space, embedding_spaces.name(space))


def one_space(tables: dict[str, pd.DataFrame]) -> list[Any]:
    """Maps by species, type and donor, and how near corresponding types lie."""
    maps, types = tables.get("maps", pd.DataFrame()), tables.get("corresponding", pd.DataFrame())
    blocks: list[Any] = [Text("One space", "heading")]
    if len(maps):
        shown = {name(str(s)): frame for s, frame in maps.groupby("space", sort=False)}
        caption = (f"{maps['map'].iloc[0]} of the same cells in each space; numbers name the types, one for each species. Axes mean nothing, and lengths in a map "
                   "are bent: the table below measures in the space itself.")  # fmt: skip
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
            "Types that both species have: for how many the nearest centroid of the other species (cosine, in the space itself) is the same "
            "type, how many chance would give, the median place of the counterpart (1 = nearest), and how far it lies.",
            ["Space", "Direction", "Nearest is the same type", "By chance", "Median place", "Median cosine distance", "In the map (its units)"], rows,
        ))  # fmt: skip
    return blocks


def carried(tables: dict[str, pd.DataFrame]) -> list[Any]:
    """Labels carried to the other species, and what fails."""
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
                [Cell(wording.model_label(model)), *(Cell(wording.interval_text(*s), float(s.iloc[0])) for s in scores)]
            )
    blocks: list[Any] = [
        Text("Labels carried to the other species", "heading"),
        Table("Learned from one species' labels, scored on the other's cells; types that both have. 95 % intervals over donors where there are, else "
             "over cells.", ["Model", "Accuracy", "Macro F1"], rows),
    ]  # fmt: skip
    if len(failed):
        ours = [m for m in dict.fromkeys(failed["model"]) if not wording.is_baseline(m) and "untrained" not in m]
        bad = failed[failed["model"].isin(ours) & (failed["why"] != "")].sort_values(["num_test"], ascending=False)
        rows = [[Cell(str(r.group)), Cell(str(r.direction).replace(">", " → ")), Cell(wording.model_label(str(r.model))), Cell(str(r.type)), count_cell(r.num_test),
                 Cell(wording.interval_text(r.recall, r.low, r.high), r.recall), Cell(f"{r.into} ({r.into_share:.0%})"), Cell(str(r.why))]
                for r in bad.head(MAX_FAILURES).itertuples()]  # fmt: skip
        total = failed[failed["model"].isin(ours)]
        blocks.append(Table(
            f"Types that fail (fewer than half of their cells are found): {len(bad)} of {len(total)} type and model pairs; the largest "
            f"{min(len(bad), MAX_FAILURES)}. What they are called instead, and what the controls say about it.",
            ["Group", "Direction", "Model", "Type", "Cells", "Found", "Called instead", "First reason"], rows,
        ))  # fmt: skip
    return blocks


def alike(tables: dict[str, pd.DataFrame]) -> list[Any]:
    """Which shift of one species is like which of the other."""
    pairs, shifts, tags = (tables.get(k, pd.DataFrame()) for k in ("pairs", "shifts", "together"))
    blocks: list[Any] = [Text("Shifts that match", "heading")]
    if pairs.empty:
        return [*blocks, Text("No shifts were named (compare.shifts), so none were matched.", "missing")]
    blocks.append(Text(
        "A shift is the difference of mean vectors of two conditions of one species, within types; a cell of the figure is the cosine of two "
        "shifts. ★ marks pairs at a false discovery rate of 5 % over permuted labels: both shifts are real and point the same way. It does not say that "
        "the pair is alike more than others; the place among all shifts says that, and is 1 for a pair in bold outline."))  # fmt: skip
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
                f"{name(str(space))}: {int(best.to_numpy().sum())} pairs are each other's best match."))  # fmt: skip
    blocks.append(Table(
        "Shifts that are expected together, by tag: mean cosine of pairs of one tag and of pairs of two tags, the chance that one of the first "
        "is above one of the second, and its p when tags are exchanged among shifts (p cannot be smaller than the last column).",
        ["Space", "Tag", "Pairs", "Cosine", "Cosine of others", "AUROC", "p", "Smallest p"],
        [[Cell(name(str(r.space))), Cell(str(r.tag)), count_cell(r.num_pairs), number_cell(r.cosine, ".2f"), number_cell(r.cosine_others, ".2f"),
          number_cell(r.auroc, ".2f"), number_cell(r.p, ".3f"), number_cell(r.smallest_p, ".3f")] for r in tags.itertuples()]))  # fmt: skip
    first = shifts[shifts["space"] == shifts["space"].iloc[0]]
    reliable = shifts.pivot_table(index="shift", columns="space", values="reliability")
    rows = []
    for r in first.itertuples():
        alone = (
            ""
            if r.donors_shared
            else "condition and donor cannot be told apart"
            if r.donors_before and r.donors_after
            else "donors not known"
        )
        rows.append([Cell(str(r.species)), Cell(str(r.shift)), count_cell(r.num_before), count_cell(r.num_after), number_cell(r.log2_length, "+.2f"),
                     *[number_cell(float(reliable.loc[r.shift, s]), ".2f") for s in reliable.columns], number_cell(r.smallest_p, ".3f"), Cell(alone)])  # fmt: skip
    blocks.append(Table(
        "The shifts: cells of either condition, how much longer sentences get (log2), the cosine of the shift in two halves of its own cells (no "
        "other shift can be expected to be nearer than its square root allows), and the smallest p that its permutations can give.",
        ["Species", "Shift", "Before", "After", "Length", *[f"Repeats: {name(str(s))}" for s in reliable.columns], "Smallest p", "Caution"], rows))  # fmt: skip
    return blocks


MAX_TARGETS = 25


def conserved(tables: dict[str, pd.DataFrame]) -> list[Any]:
    """Responses of orthologs side by side, those that differ, and targets that hold in both species."""
    summary, genes = tables.get("conserved_summary", pd.DataFrame()), tables.get("conserved", pd.DataFrame())
    if summary.empty or genes.empty:
        return []
    one, other = summary.loc[0, ["first", "second"]]
    alike_ = summary.reindex(columns=["whole", "spearman", "low", "high", "null", "null_low", "null_high", "p"])
    rows = [[Cell(str(r.operation)), count_cell(r.num_pairs), number_cell(v["whole"], ".2f"), Cell(wording.interval_text(v["spearman"], v["low"], v["high"])),
             Cell(wording.interval_text(v["null"], v["null_low"], v["null_high"])), number_cell(v["p"], ".3f"), count_cell(r.differ), count_cell(r.towards), count_cell(r.unusual),
             count_cell(r.replicated), Cell("donors" if r.by_donors else "cells of too few donors")]
            for r, v in zip(summary.itertuples(), alike_.astype(float).to_dict("records"), strict=True)]  # fmt: skip
    blocks: list[Any] = [Text("Conserved and divergent responses", "heading"), Table(
        f"One-to-one orthologs perturbed in {one} and in {other}: rank correlation of shifts as they are, and of what is left beyond the gene's rank and coverage (95 % "
        "over genes), beside orthologs exchanged among genes of like rank and coverage; how many shifts differ (FDR 5 %, beyond what rank predicts), go towards "
        "the goal in both, are unusual for their rank in both, and repeat over donors in both.",
        ["Operation", "Orthologs", "As they are", "Beyond both", "Exchanged", "p", "Differ", "Towards in both", "Unusual in both", "Repeat in both",
         "Intervals over"], rows)]  # fmt: skip
    if not summary["by_donors"].all():
        text = "At least one species has too few donors for a test: differences and targets below may be those of the donors, not of the species."
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
        "Conserved targets: perturbed, they move cells towards the goal in both species; by the weaker of their percentiles among genes of like rank and coverage.",
        ["Gene", "Operation", *(f"Shift, {n}" for n in (one, other)), *(f"Percentile, {n}" for n in (one, other)),
         *(f"p over donors, {n}" for n in (one, other)), "Doubts"], rows))  # fmt: skip
    return blocks


def networks(tables: dict[str, pd.DataFrame]) -> list[Any]:
    """Whether orthologs have the same neighbours."""
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
            "Share of a gene's nearest genes in one species whose orthologs are nearest in the other (95 % over genes), beside orthologs exchanged among genes "
            "as frequent (responses: of like rank and coverage), and chance. A share within the exchanged ones' range is what that alone gives.",
            ["Space", "Species", "Orthologs", "Neighbours", "Shared", "Jaccard", "Exchanged", "Chance", "p"], rows))  # fmt: skip
    return blocks + [
        Text(f"{r.space}, {r.first} and {r.second}: not compared. {r.why}.", "missing") for r in none.itertuples()
    ]


BLOCKS: tuple[Callable[[dict[str, pd.DataFrame]], list[Any]], ...] = (one_space, carried, alike, conserved, networks)
"""Each takes the comparison's tables by name and gives blocks, none where its tables are not there."""

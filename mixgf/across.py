"""Section of the report on species: one space, labels carried over, shifts that match. Each of `BLOCKS` lays out one part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd

from mixgf import figures, findings, spaces
from mixgf.page import Cell, Grid, Picture, Run, Section, Text, count, number, plural

TITLE = "Across species"
PREFIX = "compare_"
"""Before the names of the tables of a comparison in `Run.tables`."""
MAX_FAILURES = 40
SPACES = {"expression": "expression (one-to-one orthologs)", "ranks": "ranks of orthologs"}


def section(run: Run) -> Section:
    """Everything that `mixgf compare` found."""
    if "compare" not in run.records:
        return Section("across", TITLE, [])
    tables = {name.removeprefix(PREFIX): table for name, table in run.tables.items() if name.startswith(PREFIX)}
    blocks: list[Any] = []
    for block in BLOCKS:
        blocks += block(tables)
    return Section("across", TITLE, blocks)


def name(space: str) -> str:
    """A space's name for readers."""
    return SPACES.get(space, spaces.name(space))


def one_space(tables: dict[str, pd.DataFrame]) -> list[Any]:
    """Maps by species, type and donor, and how near corresponding types lie."""
    maps, types = tables.get("maps", pd.DataFrame()), tables.get("corresponding", pd.DataFrame())
    blocks: list[Any] = [Text("One space", "heading")]
    if len(maps):
        shown = {name(str(s)): frame for s, frame in maps.groupby("space", sort=False)}
        caption = (f"{maps['map'].iloc[0]} of the same cells in each space; numbers name the types. Axes mean nothing, and lengths in a map "
                   "are bent: the table below measures in the space itself.")  # fmt: skip
        blocks.append(Picture(figures.side_by_side(shown), caption))
        first = next(iter(shown))
        for column, what in (("donor", "by donor (grey: not known)"), ("group", "by data set")):
            again = {first: shown[first].assign(type=shown[first][column])}
            blocks.append(Picture(figures.side_by_side(again, column), f"The first map again, {what}."))
    if len(types):
        rows = []
        for (space, species, other), mine in types.groupby(["space", "species", "other_species"], sort=False):
            hit = int((mine["place"] == 1).sum())
            chance = float((1 / mine["num_types"]).sum())
            rows.append([Cell(name(str(space))), Cell(f"{species} to {other}"), Cell(f"{hit} of {len(mine)}", hit), number(chance, ".1f"),
                         number(float(mine["place"].median()), ".1f"), number(float(mine["distance"].median()), ".3f"),
                         number(float(mine["map_distance"].median()), ".1f")])  # fmt: skip
        blocks.append(Grid(
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
        rows.append([Cell(f"{group}, {str(direction).replace('>', ' → ')}: {plural(int(sizes['num_classes']), 'type')}, "
                          f"{int(sizes['num_test']):,} cells")])  # fmt: skip
        for model in findings.order_models(list(dict.fromkeys(mine["model"]))):
            scores = [
                wide.loc[(model, metric), ["value", "low", "high"]].astype(float) for metric in ("accuracy", "macro_f1")
            ]
            rows.append([Cell(findings.label(model)), *(Cell(findings.interval(*s), float(s.iloc[0])) for s in scores)])
    blocks: list[Any] = [
        Text("Labels carried to the other species", "heading"),
        Grid("Learned from one species' labels, scored on the other's cells; types that both have. 95 % intervals over donors where there are, else "
             "over cells.", ["Model", "Accuracy", "Macro F1"], rows),
    ]  # fmt: skip
    if len(failed):
        ours = [m for m in dict.fromkeys(failed["model"]) if not findings.is_baseline(m) and "untrained" not in m]
        bad = failed[failed["model"].isin(ours) & (failed["why"] != "")].sort_values(["num_test"], ascending=False)
        rows = [[Cell(str(r.group)), Cell(str(r.direction).replace(">", " → ")), Cell(findings.label(str(r.model))), Cell(str(r.type)), count(r.num_test),
                 Cell(findings.interval(r.recall, r.low, r.high), r.recall), Cell(f"{r.into} ({r.into_share:.0%})"), Cell(str(r.why))]
                for r in bad.head(MAX_FAILURES).itertuples()]  # fmt: skip
        total = failed[failed["model"].isin(ours)]
        blocks.append(Grid(
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
            blocks.append(Picture(
                figures.heatmap(values.clip(0, 1), f"shifts-{space}-{one}", rows=str(one), columns=str(other), text=text),
                f"{name(str(space))}: {int(best.to_numpy().sum())} pairs are each other's best match."))  # fmt: skip
    blocks.append(Grid(
        "Shifts that are expected together, by tag: mean cosine of pairs of one tag and of pairs of two tags, the chance that one of the first "
        "is above one of the second, and its p when tags are exchanged among shifts (p cannot be smaller than the last column).",
        ["Space", "Tag", "Pairs", "Cosine", "Cosine of others", "AUROC", "p", "Smallest p"],
        [[Cell(name(str(r.space))), Cell(str(r.tag)), count(r.num_pairs), number(r.cosine, ".2f"), number(r.cosine_others, ".2f"),
          number(r.auroc, ".2f"), number(r.p, ".3f"), number(r.smallest_p, ".3f")] for r in tags.itertuples()]))  # fmt: skip
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
        rows.append([Cell(str(r.species)), Cell(str(r.shift)), count(r.num_before), count(r.num_after), number(r.log2_length, "+.2f"),
                     *[number(float(reliable.loc[r.shift, s]), ".2f") for s in reliable.columns], number(r.smallest_p, ".3f"), Cell(alone)])  # fmt: skip
    blocks.append(Grid(
        "The shifts: cells of either condition, how much longer sentences get (log2), the cosine of the shift in two halves of its own cells (no "
        "other shift can be expected to be nearer than its square root allows), and the smallest p that its permutations can give.",
        ["Species", "Shift", "Before", "After", "Length", *[f"Repeats: {name(str(s))}" for s in reliable.columns], "Smallest p", "Caution"], rows))  # fmt: skip
    return blocks


BLOCKS: tuple[Callable[[dict[str, pd.DataFrame]], list[Any]], ...] = (one_space, carried, alike)
"""Each takes the comparison's tables by name and gives blocks, none where its tables are not there."""

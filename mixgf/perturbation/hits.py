"""Hits of a perturbation screen, and sentences that summarise the screen.

A gene is a hit (`gene_table.is_hit`) if its shift beyond what its rank predicts repeats over donors (FDR) and lies beyond shifts that
mean nothing (FDR, see `controls`). Where genes were drawn for comparison, it must be unusual among those of like rank and coverage, too.
The published test, a rank-sum test over cells, is reported but makes no hit.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from mixgf.perturbation import gene_table
from mixgf.perturbation.reference_genes import LEVEL
from mixgf.stats.donors import attainable_level, fewest_discoveries, smallest_detectable_effect, smallest_p, spearman


def tested_genes(genes: pd.DataFrame) -> pd.DataFrame:
    """Rows of the genes under test, without those scored for comparison only (role `null`)."""
    return genes[genes["role"] != "null"] if "role" in genes else genes


def comparison_genes(genes: pd.DataFrame) -> pd.DataFrame:
    """Rows of the genes drawn for comparison; empty if all genes are compared with all."""
    return genes[genes["reference"]] if "reference" in genes and not genes["reference"].all() else genes.iloc[:0]


def call_hits(genes: pd.DataFrame) -> pd.DataFrame:
    """Rows of the hits (`gene_table.is_hit`), largest shift first."""
    return tested_genes(genes)[lambda frame: frame["hit"]].sort_values(["shift", "gene"], ascending=[False, True])


CONTROLS = {"hit": "hits", "hit_untrained": "by an untrained encoder", "hit_false_goal": "towards a false goal"}
"""Columns of hits, of the run and of its negative controls."""


def count_hits(genes: pd.DataFrame) -> dict[str, float]:
    """Number of hits of the run and of its controls by operation, for example `hits/delete/untrained`."""
    counts = {}
    for operation, part in tested_genes(genes).groupby("operation", sort=False):
        for column in CONTROLS:
            if column in part:
                kind = column.removeprefix("hit").strip("_") or "model"
                counts[f"hits/{operation}/{kind}"] = float(part[column].sum())
    return counts


def control_sentence(genes: pd.DataFrame) -> tuple[str, str]:
    """(tone, sentence) on the hits of one operation beside those of the negative controls."""
    part = tested_genes(genes)
    own = int(part["hit"].sum())
    others = [(text, int(part[name].sum())) for name, text in CONTROLS.items() if name != "hit" and name in part]
    if not others:
        return "plain", f"{own:,} of {len(part):,} genes are hits; there are no negative controls (perturb.controls)."
    beside = ", ".join(f"{num:,} {text}" for text, num in others)
    tone = "warn" if max(num for _, num in others) > own / 2 and own else "plain"
    return tone, f"{own:,} of {len(part):,} genes are hits; {beside}."


def control_lines(genes: pd.DataFrame) -> list[str]:
    """`control_sentence` of each operation, for the console."""
    return [
        f"{operation}: {control_sentence(part)[1].rstrip('.')}"
        for operation, part in genes.groupby("operation", sort=False)
    ]


def _with_shifts(genes: pd.DataFrame) -> str:
    """The first five genes, each with its shift."""
    first = genes.head(5)
    return ", ".join(f"{s} ({v:+.4f})" for s, v in zip(first["symbol"], first["shift"], strict=True))


def summarise_screen(genes: pd.DataFrame, *, goal: bool, num_tests: int = 0) -> list[tuple[str, str]]:
    """Sentences about the genes of one operation, each with a tone (`good`, `plain` or `warn`).

    Args:
        genes: rows of the gene table.
        goal: whether shifts are towards a goal state.
        num_tests: number of genes that a screen chose these from; 0 = no screen.
    """
    out: list[tuple[str, str]] = []
    nulls = comparison_genes(genes)
    genes = tested_genes(genes)
    top = genes.sort_values(["shift", "gene"], ascending=[False, True])
    names = _with_shifts(top[top["shift"] > 0] if goal else top) or "none"
    if goal and (away := _with_shifts(genes[genes["shift"] < 0].sort_values(["shift", "gene"]))):
        names += f"; away from it: {away}"
    out.append(("plain", f"Largest shifts{' towards the goal state' if goal else ''}: {names}."))
    donors = int(genes["num_donors"].max())
    found, repeated, cell_level = (
        call_hits(genes),
        int((genes["fdr_donor"] <= LEVEL).sum()),
        int((genes["fdr_cell"] <= LEVEL).sum()),
    )
    num = f"{len(genes):,} gene{'s' * (len(genes) != 1)}"
    out += _on_hits(found, num, donors, repeated)
    out.append(control_sentence(genes))
    out += _on_null(genes, max(num_tests, len(genes)))
    if len(found) == 0 and smallest_p(donors) <= LEVEL:
        out.append(("plain", _power(donors, max(num_tests, len(genes)))))
    if len(nulls) and np.isfinite(nulls["fdr_donor"]).any():
        repeating, cells = (float((nulls[name] <= LEVEL).mean()) for name in ("fdr_donor", "fdr_cell"))
        text = (
            f"Of {len(nulls):,} genes that were drawn for comparison, whatever they do, {repeating:.0%} repeat over donors as well, and {cells:.0%} "
            "are significant over cells: neither is enough, a hit must also be unusual among them and lie beyond shifts that mean nothing."
        )
        out.append(("warn" if repeating > 0.1 else "plain", text))
    text = (
        f"{cell_level:,} of {num} have a cell-level FDR below 5 %. Cells of one donor are not replicates: that "
        "figure grows with the number of cells and is no evidence by itself."
    )
    out.append(("warn" if cell_level and found.empty else "plain", text))
    rho = spearman(genes["shift"].to_numpy(float), genes["rank_expected"].to_numpy(float))
    if np.isfinite(rho):
        much = "much" if abs(rho) >= 0.7 else "part" if abs(rho) >= 0.3 else "little"
        text = f"What a gene's rank in the cell alone predicts explains {much} of the shifts (Spearman {rho:.2f})."
        out.append(("warn" if abs(rho) >= 0.7 else "plain", text))
    rho = spearman(genes["shift"].to_numpy(float), genes["de_statistic"].to_numpy(float))
    if np.isfinite(rho):
        text = f"Agreement with differential expression between start and goal: Spearman {rho:.2f}."
        out.append(("plain", text))
    return out


def _on_hits(found: pd.DataFrame, num: str, donors: int, repeated: int) -> list[tuple[str, str]]:
    """Sentences on the hits among `num` genes, or on why there are none; `repeated` genes pass the test over donors."""
    out: list[tuple[str, str]] = []
    if len(found):
        text = (
            f"{len(found):,} of {num} are hits: they repeat over {donors} donors at an FDR of 5 %, beyond what their rank "
            f"predicts, and lie beyond shifts that mean nothing at an FDR of 5 %."
        )
        out.append(("good", text))
        out += _objections(found)
    elif smallest_p(donors) > LEVEL:
        few = f"with {donors} donor{'s' * (donors != 1)} the smallest p that a test over donors can give is {smallest_p(donors):.2g}"
        out.append(("warn", f"No gene can be called a replicated hit: {few}."))
    elif repeated:
        text = f"{repeated:,} of {num} pass an FDR of 5 % over {donors} donors, and none of them lies beyond shifts that mean nothing: no hit."
        out.append(("warn", text))
    else:
        out.append(("warn", f"No gene passes an FDR of 5 % over {donors} donors."))
    return out


def _on_null(genes: pd.DataFrame, num_genes: int) -> list[tuple[str, str]]:
    """Sentence on the null of the hits, and how many genes must pass together."""
    num = int(genes["num_null"].max())
    if not num:
        text = "Genes are compared only with each other, so no error rate of hits can be given: turn perturb.controls on, or draw perturb.null_genes."
        return [("warn", text)]
    fewest = fewest_discoveries(2 / (1 + num), num_genes)
    text = f"The error rate of hits is taken from {num:,} shifts that mean nothing"
    return [("plain", f"{text}; no fewer than {fewest:,} genes can pass together." if fewest > 1 else f"{text}.")]


def _objections(found: pd.DataFrame) -> list[tuple[str, str]]:
    """Sentences on what weakens the hits: many are markers of the goal state themselves."""
    marks = found["warnings"].astype(str).str.contains(gene_table.MARK)
    free = found.loc[found["warnings"].astype(str) == "", "symbol"].tolist()
    out = []
    if marks.any():
        text = (
            f"{int(marks.sum()):,} of {len(found):,} hits differ themselves between start and goal. A cell that is given a mark of the goal looks more "
            "like the goal, whatever the gene does: these hits say little beyond differential expression."
        )
        out.append(("warn", text))
    names = f"{', '.join(free[:12])}{', ...' if len(free) > 12 else ''}" if free else "none"
    out.append(("plain", f"Hits that none of the checks in the table's last column objects to: {names}."))
    return out


def _power(donors: int, num_genes: int) -> str:
    """Sentence on the power of the test with this number of donors."""
    fewest = fewest_discoveries(smallest_p(donors), num_genes)
    text = (
        f"Over {donors} donors, a gene of its own effect {smallest_detectable_effect(donors):.1f} times the spread between donors is found in 80 % "
        "of cases at p ≤ 0.05, before correction"
    )
    if fewest > 1:
        text += f"; after it, no fewer than {fewest:,} genes can pass together, since no p is below {smallest_p(donors):.2g}"
    return f"{text}."


def calibration_sentence(nulls: pd.DataFrame, donors: int) -> tuple[str, str]:
    """(tone, sentence) on both tests under the null hypothesis: their share of p-values up to `LEVEL`."""
    shares = {name: float((nulls[name].dropna() <= LEVEL).mean()) for name in ("p_cell", "p_donor")}
    right = attainable_level(donors, LEVEL)
    text = (
        "When genes of like rank exchange what is their own within every donor, so that nothing is left to find, "
        f"{shares['p_donor']:.1%} of genes have a donor-level p of 0.05 or less ({right:.1%} would be right: p has few values over "
        f"{donors} donors), and {shares['p_cell']:.1%} a cell-level one (5 % would be right)."
    )
    return ("warn" if shares["p_cell"] > 0.1 or shares["p_donor"] > 0.1 else "plain", text)

"""Hits of a perturbation screen, and sentences that summarise the screen.

A gene is a hit if two conditions hold: its shift beyond what its rank predicts repeats over donors (FDR), and the shift is
unusual among genes of like rank and coverage. The published test, a rank-sum test over cells, is reported but makes no hit.
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


def call_hits(genes: pd.DataFrame, level: float = LEVEL) -> pd.DataFrame:
    """Rows of the hits: repeated over donors at an FDR of `level`, and unusual for their rank; largest shift first."""
    genes = tested_genes(genes)
    unusual = (genes["null_percentile"] < gene_table.ORDINARY[0]) | (genes["null_percentile"] > gene_table.ORDINARY[1])
    return genes[(genes["fdr_donor"] <= level) & unusual].sort_values(["shift", "gene"], ascending=[False, True])


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
    if len(found) == 0 and smallest_p(donors) <= LEVEL:
        out.append(("plain", _power(donors, max(num_tests, len(genes)))))
    if len(nulls) and np.isfinite(nulls["fdr_donor"]).any():
        repeating, cells = (float((nulls[name] <= LEVEL).mean()) for name in ("fdr_donor", "fdr_cell"))
        text = (
            f"Of {len(nulls):,} genes that were drawn for comparison, whatever they do, {repeating:.0%} repeat over donors as well, and {cells:.0%} "
            "are significant over cells: neither is enough, a hit must also be unusual among them."
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
            f"predicts, and are unusual among genes of like rank and coverage."
        )
        out.append(("good", text))
        out += _objections(found)
    elif smallest_p(donors) > LEVEL:
        few = f"with {donors} donor{'s' * (donors != 1)} the smallest p that a test over donors can give is {smallest_p(donors):.2g}"
        out.append(("warn", f"No gene can be called a replicated hit: {few}."))
    elif repeated:
        text = f"{repeated:,} of {num} pass an FDR of 5 % over {donors} donors, and none of them is unusual for its rank and coverage: no hit."
        out.append(("warn", text))
    else:
        out.append(("warn", f"No gene passes an FDR of 5 % over {donors} donors."))
    return out


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
    fewest = fewest_discoveries(donors, num_genes)
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

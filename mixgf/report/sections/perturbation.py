"""The report's section on perturbation: genes by operation, what speaks against each, what is known of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

from mixgf.errors import UserError
from mixgf.perturbation import gene_responses, hits, reference_genes
from mixgf.report.elements import Cell, Figure, Section, Table, Text, count_cell, not_run, number_cell
from mixgf.report.figures import screen
from mixgf.report.results import RunResults
from mixgf.stats import donors

MAX_GENES = 40
"""Genes of one operation in the report's table; the artifact holds all."""
NO_DOUBT = "none of the checks objects"
MAX_ROWS, MAX_COLUMNS = 30, 40
"""Perturbed and responding genes in the report's matrix."""


def section(results: RunResults) -> Section:
    """Ranked genes by operation, with effect against test and rank, and what speaks against each hit."""
    genes, config = results.tables.get("genes"), results.config.perturb
    if genes is None or genes.empty:
        return not_run("perturbation", "In silico perturbation", "perturb", results)
    goal = bool(config.goal)
    toward = f" and compared with the state `{config.goal}`" if goal else ""
    variant = ", ".join(sorted(set(genes["variant"].astype(str))))
    blocks: list[Any] = [
        Text(f"Genes were changed one by one in the sentences of cells with `{config.start or 'all cells'}`{toward}; the shift is "
             + ("how much nearer the goal's mean embedding a cell came (cosine)" if goal else "1 − cosine of the cell before and after")
             + f", embedding variant `{variant}`."),
        Text("A shift is a prediction of this model about its own embedding. It becomes evidence only if it repeats over donors, "
             "exceeds what genes of the same rank do, and agrees with an experiment.", "warn"),
    ]  # fmt: skip
    record = results.records.get("perturb")
    screened = record.counts.get("screened_out", 0) if record else 0
    num_tests = genes["gene"].nunique() + screened if screened else 0
    blocks += _others(record.details.get("states", {})) if record else []
    blocks += [
        Text(f"{str(text)[:1].upper()}{str(text)[1:]}.", "warn")
        for text in (record.details.get("warnings", []) if record else [])
    ]
    for operation, part in genes.groupby("operation", sort=False):
        blocks.append(Text(f"{str(operation).capitalize()}", "heading"))
        said = hits.sentences(part, goal=goal, num_tests=num_tests)
        blocks += [Text(text, tone) for tone, text in said]
        tested = bool(np.isfinite(part["p_donor"]).any()) and donors.smallest_p(int(part["num_donors"].max())) <= 0.05
        p, title = ("p_donor", "over donors") if tested else ("p_cell", "over cells, not replicated")
        blocks.append(
            Figure(
                screen.volcano(part, f"volcano-{operation}", p=p, title=title, goal=goal),
                f"{str(operation).capitalize()}, {len(part):,} genes. Left: shift and p value {title}{'' if tested else ', so that height says little more than how many cells there were'}. Right: shift and mean rank of the "
                "gene in the cells; the line is what rank alone predicts, so only the distance from it speaks of the gene; genes that no cell holds have no rank and are not drawn there.",
            )
        )
        blocks += _calibrated(part, results.tables.get("nulls"), str(operation))
        blocks.append(_genes(hits.asked(part), str(operation), goal=goal))
        blocks += _responses(results, str(operation), part)
    blocks += _paper(genes, results) + _known(genes, results)
    return Section("perturbation", "In silico perturbation", blocks)


def _calibrated(part: pd.DataFrame, nulls: pd.DataFrame | None, operation: str) -> list[Any]:
    """Whether the tests keep their word on this run's own shifts."""
    mine = nulls[nulls["operation"] == operation] if nulls is not None else pd.DataFrame()
    if not len(mine) or not np.isfinite(mine["p_donor"]).any():
        return [
            Text(
                "The tests could not be checked against exchanged genes: that needs three named donors and some twenty genes."
            )
        ]
    tone, text = hits.calibration_sentence(mine, int(part["num_donors"].max()))
    return [
        Text(text, tone),
        Figure(
            screen.calibration(part, mine, f"calibration-{operation}"),
            "Every point is a gene, the smallest p to the right. Triangles: genes of like rank exchanged what is their own within each donor, so "
            "there is nothing to find and they should follow the dashed line; where they rise above it, the test calls noise significant. "
            "Only circles that leave the triangles behind are evidence. Steps in the right panel are the few values that p can "
            "take with so few donors.",
        ),
    ]


def _others(states: dict[str, str]) -> list[Any]:
    """Which states an effect should leave alone."""
    names = [text for name, text in states.items() if name.startswith("alternative")]
    if not names:
        return []
    return [Text(f"Other states, for comparison: {'; '.join(f'`{name}`' for name in names)}. A perturbation that moves cells towards these as well "
                 "is no answer to the question: the cells merely change.")]  # fmt: skip


def _responses(results: RunResults, operation: str, genes: pd.DataFrame) -> list[Any]:
    """What perturbing one gene does to the others, general strength and lability taken out."""
    pairs = results.tables.get("responses")
    record = results.records.get("perturb")
    if pairs is None:
        num = record.counts.get("responses", 0) if record else 0
        return [Text(f"The response matrix ({num:,} pairs) is too large for a page: responses.parquet.")] if num else []
    found = gene_responses.specific(pairs[pairs["operation"].astype(str) == operation])
    found = found[found["gene"].astype(str) != found["responding"].astype(str)]
    if found.empty:
        return []
    order = hits.asked(genes).assign(size=genes["shift"].abs()).sort_values(["size", "gene"], ascending=[False, True])
    rows = [gene for gene in order["gene"] if gene in set(found["gene"].astype(str))][:MAX_ROWS]
    shown = found[found["gene"].astype(str).isin(rows)]
    strong = (
        shown["excess"].abs().groupby(shown["responding"].astype(str)).max().sort_values(ascending=False, kind="stable")
    )
    wide = shown[shown["responding"].astype(str).isin(strong.index[:MAX_COLUMNS])]
    table = wide.astype({"gene": str, "symbol": str, "responding": str, "responding_symbol": str}).pivot_table(
        index=["gene", "symbol"], columns=["responding", "responding_symbol"], values="excess", sort=False
    )
    table = table.reindex([key for gene in rows for key in table.index if key[0] == gene])
    table.index, table.columns = (pd.Index([key[1] or key[0] for key in axis]) for axis in (table.index, table.columns))
    lead = (
        found.assign(size=found["excess"].abs())
        .sort_values(["size", "gene", "responding"], ascending=[False, True, True])
        .head(15)
    )
    listed = [
        [Cell(str(r["symbol"] or r["gene"]), strong=True), Cell(str(r["responding_symbol"] or r["responding"]), strong=True),
         number_cell(r["change_same_rank"], ".2g"), number_cell(r["excess"], "+.2f"), count_cell(r["num_same_rank"]), number_cell(r["change"], ".2g"), count_cell(r["num_cells"])]
        for r in lead.to_dict("records")
    ]  # fmt: skip
    caption = (
        f"{operation.capitalize()}: how far the contextual embedding of each gene (column) moves when another (row) is perturbed, in cells where its place stays, as log₂ of "
        "what the two do in general: 1 = twice as far as one would expect of a perturbation so strong and a gene so easily moved. "
        f"The {len(table)} genes of the largest shifts, and the {table.shape[1]} responding genes that stand out most; grey: fewer than {gene_responses.MIN_CELLS} cells."
    )
    doubt = (
        "A response is what the model's attention makes of two genes in one sentence. Neighbours in rank move each other, and genes that are "
        "expressed together do: it is no evidence of regulation, and has no test over donors. Cells in which the perturbation moves the "
        "responding gene to another rank are left out: there, the new place is nearly all of the change."
    )
    return [
        Text(f"{operation.capitalize()}: responses of other genes", "heading"),
        Figure(screen.responses(table, f"responses-{operation}"), caption),
        Text(doubt, "warn"),
        Table("The pairs farthest from what both genes do in general.", ["Perturbed", "Responding", "Change (1 − cosine), place kept", "log₂ of expected", "Cells", "Change, all cells", "All cells"],
             listed, sortable=True),
    ]  # fmt: skip


def _paper(genes: pd.DataFrame, results: RunResults) -> list[Any]:
    table = reference_genes.beside_paper(genes, results.config)
    if table.empty:
        return []
    rows = [
        [Cell(r["symbol"], strong=True), Cell(r["operation"]), count_cell(r["paper_rank"]), number_cell(r["paper_shift"], ".4f"), number_cell(r["paper_p"], ".2e"),
         Cell(f"{r['rank']:,} of {r['of']:,}" if r["rank"] > 0 else "not scored", float(r["rank"])), number_cell(r["shift"], "+.4f"),
         number_cell(r["p_cell"], ".2e"), number_cell(r["p_donor"], ".2g"), number_cell(r["null_percentile"], ".0f"), number_cell(r["coverage"], ".1%"),
         Cell("; ".join(doubts(r["warnings"])) or NO_DOUBT)]
        for r in table.to_dict("records")
    ]  # fmt: skip
    head = ["Gene", "Operation", "Paper: rank", "Paper: shift", "Paper: p", "Rank here", "Shift here", "p, cells (as published)", "p, donors",
            "Null percentile", "Seen in", "Why it may be an artefact"]  # fmt: skip
    caption = (
        f"Genes of the paper's Table 4 ({results.config.perturb.published}) in this run. The paper's p is a rank-sum test over cells; the same test stands "
        "beside it here, and the test over donors, which the paper does not have."
    )
    return [Text("Beside the paper's Table 4", "heading"), Table(caption, head, rows)]


def _known(genes: pd.DataFrame, results: RunResults) -> list[Any]:
    try:
        found = reference_genes.score(genes, results.config)
    except UserError as error:
        return [Text("Known genes", "heading"), Text(str(error), "warn")]
    if found.empty:
        return []
    rows: list[list[Cell]] = []
    for keys, part in found.groupby(["operation", "method", "call", "num_called"], sort=False):
        operation, method, call, num = keys
        value = {r["metric"]: r for r in part.to_dict("records")}
        rows.append([Cell(str(operation)), Cell(reference_genes.SCORES[str(method)], strong=str(method).startswith("shift")), Cell(f"{call}: {num}"),
                     *(_estimate(value[m]) for m in ("auroc", "ppv", "npv", "sensitivity", "specificity"))])  # fmt: skip
    best = found[(found["metric"] == "auroc") & found["call"].str.startswith("top")].sort_values(
        "value", ascending=False, kind="stable"
    )
    first = found.iloc[0]
    texts = []
    for operation, part in best.groupby("operation", sort=False):
        mine, base = (part[part["method"].str.startswith("shift") == own] for own in (True, False))
        if len(mine) and len(base):
            a, b = mine.iloc[0], base.iloc[0]
            said = f"{str(operation).capitalize()}: the model's best score has AUROC {a['value']:.2f}, the best baseline ({reference_genes.SCORES[b['method']].removeprefix('baseline: ')}) {b['value']:.2f}."
            texts.append(Text(said, "good" if a["low"] > b["high"] else "bad" if a["value"] < b["value"] else "warn"))
    caption = (
        f"How well the {first['num_known']} known genes are found among {first['num_genes']:,} scored ones, with 95 % intervals. Positive predictive value: share "
        "of called genes that are known. AUROC 0.5 is chance; below it, known genes move cells away from the goal."
    )
    head = [
        "Operation",
        "Ordered by",
        "Called",
        "AUROC",
        "Positive predictive value",
        "Negative predictive value",
        "Sensitivity",
        "Specificity",
    ]
    return [Text("Known genes", "heading"), *texts, Table(caption, head, rows)]


def _estimate(row: Any) -> Cell:
    if not np.isfinite(row["value"]):
        return Cell("–", "")
    band = f"{row['low']:.2f} to {row['high']:.2f}" if np.isfinite(row["low"]) else ""
    return Cell(f"{row['value']:.2f}", float(row["value"]), note=band)


def doubts(value: Any) -> list[str]:
    """A gene's warnings as a list; the artifact joins them with `; `."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(";") if part.strip()]
    return [str(part) for part in value] if isinstance(value, Iterable) else []


def _genes(genes: pd.DataFrame, operation: str, *, goal: bool) -> Table:
    head = ["Gene", "Shift (95 % interval)", "Cells", "Donors", "Seen in", "Mean rank", "Rank alone predicts", "Excess",
            "Null percentile", "DE log fold", "p, donors", "FDR, donors", "FDR, cells (not replicated)", "Why it may be an artefact"]  # fmt: skip
    ordered = genes.sort_values(["shift", "gene"], ascending=[False, True])
    few = ordered.head(MAX_GENES - 10) if len(ordered) > MAX_GENES and goal else ordered.head(MAX_GENES)
    rows = []
    shown = pd.concat([few, ordered.iloc[len(few) :].tail(10)]) if goal and len(ordered) > len(few) else few
    for gene in shown.to_dict("records"):
        band = f"{gene['shift_low']:+.4f} to {gene['shift_high']:+.4f}" if np.isfinite(gene["shift_low"]) else ""
        why = doubts(gene["warnings"])
        rows.append([
            Cell(f"{gene['symbol'] or gene['gene']}", str(gene["symbol"] or gene["gene"]).upper(), strong=True, note=str(gene["ortholog_symbol"])),
            Cell(f"{gene['shift']:+.4f}", float(gene["shift"]), note=band),
            count_cell(gene["num_cells"]), count_cell(gene["num_donors"]), number_cell(gene["coverage"], ".0%"), number_cell(gene["mean_rank"], ",.0f"),
            number_cell(gene["rank_expected"], "+.4f"), number_cell(gene["shift_minus_rank_expected"], "+.4f"),
            number_cell(gene["null_percentile"], ".0f"), number_cell(gene["de_log_fold"], "+.2f"), number_cell(gene["p_donor"], ".2g"), number_cell(gene["fdr_donor"], ".2g"),
            number_cell(gene["fdr_cell"], ".2g"), Cell("; ".join(why) or NO_DOUBT, len(why)),
        ])  # fmt: skip
    which = f"the {len(few)} largest shifts" + (
        f" and the {len(shown) - len(few)} most negative" if len(shown) > len(few) else ""
    )
    return Table(
        f"{operation.capitalize()}: {which} of {len(genes):,} genes; a click on a heading sorts. Excess: shift less what rank alone "
        "predicts. Null percentile: place among genes of like rank and detection (50 = ordinary). DE: differential "
        "expression of the goal against the start state, of rank scores. Seen in: share of cells whose sentence holds the gene."
        if goal
        else f"{operation.capitalize()}: {which} of {len(genes):,} genes.",
        head,
        rows,
        sortable=True,
    )

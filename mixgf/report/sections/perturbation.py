"""In silico perturbation: ranked genes by operation with their tests, controls, and comparison with reference genes."""

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

TITLE = "In silico perturbation"
MAX_GENES = 40
"""Most rows in the table of an operation; genes.parquet holds all genes."""
NO_DOUBT = "no check failed"
MAX_ROWS, MAX_COLUMNS = 30, 40
"""Most perturbed and responding genes in the matrix of responses."""


def section(results: RunResults) -> Section:
    """For each operation its result in sentences, figures of effects and tests, the ranked genes, and responses of other genes."""
    genes, config = results.tables.get("genes"), results.config.perturb
    if genes is None or genes.empty:
        return not_run("perturbation", TITLE, "perturb", results)
    goal = bool(config.goal)
    toward = f" and compared with the state `{config.goal}`" if goal else ""
    variant = ", ".join(sorted(set(genes["variant"].astype(str))))
    blocks: list[Any] = [Text(text, tone) for tone, text in _beside_covariance(genes, results)]
    blocks += [
        Text(f"Genes were perturbed one at a time in the sentences of cells with `{config.start or 'all cells'}`{toward}. The shift is "
             + ("the increase of a cell's cosine similarity to the mean embedding of the goal state" if goal else "1 − cosine similarity of the cell before and after")
             + f" (embedding variant `{variant}`)."),
        Text("A shift is a property of this model's embedding. It is evidence of biology only if it is replicated over donors, "
             "exceeds the shifts of genes of the same rank, and agrees with an experiment.", "warn"),
    ]  # fmt: skip
    record = results.records.get("perturb")
    screened = record.counts.get("screened_out", 0) if record else 0
    num_tests = genes["gene"].nunique() + screened if screened else 0
    blocks += _alternatives(record.details.get("states", {})) if record else []
    blocks += [
        Text(f"{str(text)[:1].upper()}{str(text)[1:]}.", "warn")
        for text in (record.details.get("warnings", []) if record else [])
    ]
    for operation, part in genes.groupby("operation", sort=False):
        blocks.append(Text(f"{str(operation).capitalize()}", "heading"))
        said = hits.summarise_screen(part, goal=goal, num_tests=num_tests)
        blocks += [Text(text, tone) for tone, text in said]
        tested = bool(np.isfinite(part["p_donor"]).any()) and donors.smallest_p(int(part["num_donors"].max())) <= 0.05
        p, title = ("p_donor", "over donors") if tested else ("p_cell", "over cells, not replicated")
        blocks.append(
            Figure(
                screen.volcano(part, f"volcano-{operation}", p=p, title=title, goal=goal),
                f"{str(operation).capitalize()}, {len(part):,} genes. Left: shift and p value {title}{'' if tested else ', which depends mostly on the number of cells'}. Right: shift and mean rank of the "
                "gene in the cells; the line is the shift that rank alone predicts. Only the distance from the line is specific to the gene. Genes in no cell have no rank and are not drawn.",
            )
        )
        blocks += _calibration(part, results.tables.get("nulls"), str(operation))
        blocks.append(_genes(hits.tested_genes(part), str(operation), goal=goal))
        blocks += _responses(results, str(operation), part)
    blocks += _published_genes(genes, results) + _reference_genes(genes, results)
    return Section("perturbation", TITLE, blocks)


def _beside_covariance(genes: pd.DataFrame, results: RunResults) -> list[tuple[str, str]]:
    """Whether the encoder beats the covariance of untreated cells; nothing where the list of known genes cannot be read."""
    try:
        return reference_genes.covariance_sentences(genes, results.config)
    except UserError:
        return []  # the section on reference genes says why


def _calibration(part: pd.DataFrame, nulls: pd.DataFrame | None, operation: str) -> list[Any]:
    """Calibration of the tests on permuted shifts of this run, where nothing can be found."""
    mine = nulls[nulls["operation"] == operation] if nulls is not None else pd.DataFrame()
    if not len(mine) or not np.isfinite(mine["p_donor"]).any():
        return [
            Text(
                "The calibration of the tests could not be checked: that needs three named donors and about twenty genes."
            )
        ]
    tone, text = hits.calibration_sentence(mine, int(part["num_donors"].max()))
    return [
        Text(text, tone),
        Figure(
            screen.calibration(part, mine, f"calibration-{operation}"),
            "Every point is a gene, the smallest p on the right. Triangles: the residuals of genes of similar rank were permuted within each "
            "donor, so there is no effect, and the triangles should follow the dashed line. Above the line the test calls noise significant. "
            "Only circles above the triangles are evidence. Steps in the right panel: with few donors p has few possible values.",
        ),
    ]


def _alternatives(states: dict[str, str]) -> list[Any]:
    """States other than the goal, towards which cells should not move."""
    names = [text for name, text in states.items() if name.startswith("alternative")]
    if not names:
        return []
    return [Text(f"Alternative states, for comparison: {'; '.join(f'`{name}`' for name in names)}. A perturbation that moves cells towards these too "
                 "is not specific to the goal.")]  # fmt: skip


def _responses(results: RunResults, operation: str, genes: pd.DataFrame) -> list[Any]:
    """Responses of other genes to the perturbation of a gene, relative to what both genes do in general."""
    pairs = results.tables.get("responses")
    record = results.records.get("perturb")
    if pairs is None:
        num = record.counts.get("responses", 0) if record else 0
        return (
            [Text(f"The response matrix ({num:,} pairs) is too large for this page. See responses.parquet.")]
            if num
            else []
        )
    found = gene_responses.specific_responses(pairs[pairs["operation"].astype(str) == operation])
    found = found[found["gene"].astype(str) != found["responding"].astype(str)]
    if found.empty:
        return []
    order = (
        hits.tested_genes(genes)
        .assign(size=genes["shift"].abs())
        .sort_values(["size", "gene"], ascending=[False, True])
    )
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
        f"{operation.capitalize()}: change of the contextual embedding of a gene (column) when another gene (row) is perturbed, in cells where its rank stays the same. "
        "Values are log₂ of the change over its expectation from the general strength of the perturbation and the general responsiveness of the gene: 1 = twice the expected change. "
        f"Rows: the {len(table)} genes with the largest shifts. Columns: the {table.shape[1]} genes with the most specific responses. Grey: fewer than {gene_responses.MIN_CELLS} cells."
    )
    doubt = (
        "A response shows how the model's attention connects two genes in one sentence. Genes of neighbouring ranks and co-expressed genes "
        "respond to each other. It is no evidence of regulation, and it is not tested over donors. Cells in which the perturbation changes the "
        "rank of the responding gene are left out, because there the new rank causes nearly all of the change."
    )
    return [
        Text(f"{operation.capitalize()}: responses of other genes", "heading"),
        Figure(screen.responses(table, f"responses-{operation}"), caption),
        Text(doubt, "warn"),
        Table("Pairs with the most specific responses.", ["Perturbed", "Responding", "Change (1 − cosine), same rank", "log₂ of observed / expected", "Cells", "Change, all cells", "All cells"],
             listed, sortable=True),
    ]  # fmt: skip


def _published_genes(genes: pd.DataFrame, results: RunResults) -> list[Any]:
    table = reference_genes.compare_with_table4(genes, results.config)
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
        f"Genes of the paper's Table 4 ({results.config.perturb.published}) in this run. The paper's p is of a rank-sum test over cells. The table has the same "
        "test for this run, and the test over donors, which the paper does not report."
    )
    return [Text("Table 4 of the paper", "heading"), Table(caption, head, rows)]


def _reference_genes(genes: pd.DataFrame, results: RunResults) -> list[Any]:
    try:
        found = reference_genes.score_reference_genes(genes, results.config)
    except UserError as error:
        return [Text("Reference genes", "heading"), Text(str(error), "warn")]
    if found.empty:
        return []
    rows: list[list[Cell]] = []
    for keys, part in found.groupby(["operation", "method", "call", "num_called"], sort=False):
        operation, method, call, num = keys
        value = {r["metric"]: r for r in part.to_dict("records")}
        rows.append([Cell(str(operation)), Cell(reference_genes.SCORES[str(method)], strong=method in reference_genes.OF_MODEL), Cell(f"{call}: {num}"),
                     *(_estimate(value[m]) for m in ("auroc", "ppv", "npv", "sensitivity", "specificity"))])  # fmt: skip
    best = found[(found["metric"] == "auroc") & found["call"].str.startswith("top")].sort_values(
        "value", ascending=False, kind="stable"
    )
    first = found.iloc[0]
    texts = []
    for operation, part in best.groupby("operation", sort=False):
        mine, base = (part[part["method"].isin(reference_genes.OF_MODEL) == own] for own in (True, False))
        if len(mine) and len(base):
            a, b = mine.iloc[0], base.iloc[0]
            said = f"{str(operation).capitalize()}: the model's best score has AUROC {a['value']:.2f}, the best baseline ({reference_genes.SCORES[b['method']].removeprefix('baseline: ')}) {b['value']:.2f}."
            texts.append(Text(said, "good" if a["low"] > b["high"] else "bad" if a["value"] < b["value"] else "warn"))
    caption = (
        f"Recovery of the {first['num_known']} reference genes among {first['num_genes']:,} scored genes, with 95 % intervals. Positive predictive value: share "
        "of reference genes among the called genes. An AUROC of 0.5 is chance; below 0.5, reference genes move cells away from the goal."
    )
    head = [
        "Operation",
        "Ranked by",
        "Called",
        "AUROC",
        "Positive predictive value",
        "Negative predictive value",
        "Sensitivity",
        "Specificity",
    ]
    return [Text("Reference genes", "heading"), *texts, Table(caption, head, rows)]


def _estimate(row: Any) -> Cell:
    if not np.isfinite(row["value"]):
        return Cell("–", "")
    interval = f"{row['low']:.2f} to {row['high']:.2f}" if np.isfinite(row["low"]) else ""
    return Cell(f"{row['value']:.2f}", float(row["value"]), note=interval)


def doubts(value: Any) -> list[str]:
    """Warnings of a gene as a list; genes.parquet joins them with `; `."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(";") if part.strip()]
    return [str(part) for part in value] if isinstance(value, Iterable) else []


def _read_in(gene: dict[Any, Any]) -> Cell:
    """Start cells whose sentence shows the gene as it is read, of all; beneath, how many hold it at all."""
    read, whole = int(gene["readable_cells"]), int(gene["start_cells"])
    return Cell(f"{read:,} of {whole:,}", float(read), note=f"{int(gene['expressing_cells']):,} hold it")


def _in_controls(gene: dict[Any, Any]) -> str:
    """Whether the gene is a hit in each negative control."""
    names = [name for name in hits.CONTROLS if name != "hit" and name in gene]
    return ", ".join("yes" if gene[name] else "no" for name in names) or "–"


def _genes(genes: pd.DataFrame, operation: str, *, goal: bool) -> Table:
    head = ["Gene", "Shift (95 % interval)", "Cells", "Donors", "Read in", "Mean rank", "Rank alone predicts", "Excess",
            "Null percentile", "FDR, null", "Hit by untrained, false goal", "Covariance", "DE log fold", "p, donors", "FDR, donors", "FDR, cells (not replicated)", "Why it may be an artefact"]  # fmt: skip
    ordered = genes.sort_values(["shift", "gene"], ascending=[False, True])
    few = ordered.head(MAX_GENES - 10) if len(ordered) > MAX_GENES and goal else ordered.head(MAX_GENES)
    rows = []
    shown = pd.concat([few, ordered.iloc[len(few) :].tail(10)]) if goal and len(ordered) > len(few) else few
    for gene in shown.to_dict("records"):
        interval = f"{gene['shift_low']:+.4f} to {gene['shift_high']:+.4f}" if np.isfinite(gene["shift_low"]) else ""
        why = doubts(gene["warnings"])
        rows.append([
            Cell(f"{gene['symbol'] or gene['gene']}", str(gene["symbol"] or gene["gene"]).upper(), strong=True, note=str(gene["ortholog_symbol"])),
            Cell(f"{gene['shift']:+.4f}", float(gene["shift"]), note=interval),
            count_cell(gene["num_cells"]), count_cell(gene["num_donors"]), _read_in(gene), number_cell(gene["mean_rank"], ",.0f"),
            number_cell(gene["rank_expected"], "+.4f"), number_cell(gene["shift_minus_rank_expected"], "+.4f"),
            number_cell(gene["null_percentile"], ".0f"), number_cell(gene["fdr_null"], ".2g"), Cell(_in_controls(gene)),
            number_cell(gene.get("covariance", np.nan), "+.2f"), number_cell(gene["de_log_fold"], "+.2f"), number_cell(gene["p_donor"], ".2g"), number_cell(gene["fdr_donor"], ".2g"),
            number_cell(gene["fdr_cell"], ".2g"), Cell("; ".join(why) or NO_DOUBT, len(why)),
        ])  # fmt: skip
    which = f"the {len(few)} largest shifts" + (
        f" and the {len(shown) - len(few)} most negative" if len(shown) > len(few) else ""
    )
    return Table(
        f"{operation.capitalize()}: {which} of {len(genes):,} genes; click a heading to sort. Excess: shift less the shift that rank alone "
        "predicts. Null percentile: position among comparison genes of what the rank does not predict (50 = ordinary). DE: differential "
        "expression between goal and start state, from rank scores. Seen in: share of cells with the gene in the sentence."
        if goal
        else f"{operation.capitalize()}: {which} of {len(genes):,} genes.",
        head,
        rows,
        sortable=True,
    )

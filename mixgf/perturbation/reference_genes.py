"""Evaluate a screen by reference genes (a list of genes, or another screen), and compare it with the paper's Table 4.

Both use the finished table of genes, so that another list needs no new perturbation. Thresholds are fixed beforehand: the
two tests at an FDR of 5 %, and for scores without a test as many top genes as there are reference genes.

The model's shifts are compared with baselines that need no model: covariance among the start cells (`expression`), differential
expression, coverage and rank.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mixgf.config.perturbation import GENE_TABLES
from mixgf.config.run import Config
from mixgf.errors import UserError
from mixgf.genes.identify import GeneNames, gene_lookup
from mixgf.stats.intervals import Interval, auroc, auroc_difference, wilson
from mixgf.storage import files, tables

_COLUMNS = ("ensembl_id", "gene", "gene_id", "symbol", "gene_symbol", "human_symbol", "mouse_symbol")
LEVEL = 0.05
"""False discovery rate of a call, and of a hit."""
SCORES = {
    "shift": "model: shift",
    "shift_minus_rank_expected": "model: shift less what rank predicts",
    "shift_minus_alternatives": "model: shift less that towards unrelated states",
    "shift_untrained": "control: shift by an untrained encoder",
    "covariance": "baseline: covariance with the goal axis in start cells",
    "de_statistic": "baseline: differential expression (t)",
    "abs_de_statistic": "baseline: differential expression (|t|)",
    "coverage": "baseline: share of cells with the gene",
    "high_rank": "baseline: rank in the cells",
}
"""Scores by which genes are ordered, and their names in reports. Less of a gene is `delete` and `inhibit`; the covariance then
counts with the opposite sign, as the linear response to less of it."""
OF_MODEL = ("shift", "shift_minus_rank_expected", "shift_minus_alternatives")
"""Scores of the model."""
LESS = ("delete", "inhibit")
"""Operations that leave less of a gene."""
MIN_EACH = 5
"""Fewest reference genes, and other genes, for a comparison with the covariance."""


def read_reference_genes(config: Config) -> tuple[set[str], set[str]]:
    """Names (Ensembl ids or symbols) of `perturb.reference_genes`: positives and negatives.

    A plain list has no negatives; all other scored genes then count as such.

    Raises:
        UserError: a table is missing, has no column of genes, or its column `hit` is not true or false.
    """
    reference: set[str] = set()
    tested: set[str] = set()
    for entry in config.perturb.reference_genes:
        if not entry.lower().endswith(GENE_TABLES):
            reference.add(entry.strip())
            continue
        frame = _table(entry)
        column = next((c for c in _COLUMNS if c in frame.columns), frame.columns[0] if frame.shape[1] == 1 else None)
        if column is None:
            msg = f"perturb.reference_genes = {entry!r}: has columns {', '.join(map(str, frame.columns))}; must have one of {', '.join(_COLUMNS)}"
            raise UserError(msg)
        names = frame[column].astype(str).str.strip()
        if "hit" in frame.columns:
            words = frame["hit"].astype(str).str.lower()
            if not words.isin(["true", "false", "1", "0"]).all():
                msg = f"perturb.reference_genes = {entry!r}: hit holds {sorted(set(words))[0]!r}; must be true or false (1 or 0)"
                raise UserError(msg)
            yes = words.isin(["true", "1"])
            reference |= set(names[yes])
            tested |= set(names[~yes])
        else:
            reference |= set(names)
    return reference - {"", "nan"}, tested - reference - {"", "nan"}


def _table(uri: str) -> pd.DataFrame:
    if not files.exists(uri):
        msg = f"perturb.reference_genes = {uri!r}: no such file; give gene names, or a table ({', '.join(GENE_TABLES)}) with a column gene or symbol"
        raise UserError(msg)
    if uri.endswith(".parquet"):
        return tables.read_table(uri).to_pandas()
    lower = uri.lower()
    separator = "," if ".csv" in lower else "\t"
    compression: Any = "gzip" if lower.endswith(".gz") else None
    data = io.BytesIO(files.read_bytes(uri))
    header: Any = None if ".txt" in lower else "infer"
    frame = pd.read_csv(data, sep=separator, compression=compression, header=header, comment="#", dtype=str)
    return frame.rename(columns={0: "gene"})


def match_genes(genes: pd.DataFrame, names: set[str], config: Config) -> np.ndarray:
    """Rows whose gene, or its one-to-one ortholog, is named by Ensembl id, symbol or alias, as `prepare` reads names: bool (G,)."""
    ids = set(names)
    for row in config.species:
        known = GeneNames(gene_lookup(row), names)
        ids.update(gene for name in names if (gene := known.find(name).gene) is not None)
    return np.array(
        [
            bool(ids & {gene, *str(ortholog).split(";")}) or symbol in names
            for gene, symbol, ortholog in zip(genes["gene"], genes["symbol"], genes["ortholog"], strict=True)
        ],
        dtype=bool,
    )


def _with_reference(
    genes: pd.DataFrame, names: set[str], negative: set[str], config: Config
) -> tuple[pd.DataFrame, np.ndarray]:
    """Genes to compare, and which of them are reference genes. With a list of negatives, genes in neither list are left out."""
    reference = match_genes(genes, names, config)
    if negative:
        kept = reference | match_genes(genes, negative, config)
        genes, reference = genes[kept], reference[kept]
    return genes, reference


def score_reference_genes(genes: pd.DataFrame, config: Config) -> pd.DataFrame:
    """How well each score and each test finds the reference genes among the scored ones.

    Returns:
        One row per operation, method, call and metric: columns operation, method (key of `SCORES`), call, num_genes,
        num_known, num_called, metric (ppv, npv, sensitivity, specificity, auroc), value, low, high (95 %). Empty without
        `perturb.reference_genes`.

    Raises:
        UserError: no reference gene is among the scored ones, or no other gene is.
    """
    names, negative = read_reference_genes(config)
    if not names:
        return pd.DataFrame()
    rows: list[dict[str, Any]] = []
    for operation, part in genes.groupby("operation", sort=False):
        frame, reference = _with_reference(part[part["num_cells"] > 0], names, negative, config)
        if not reference.any() or reference.all():
            what = "none of them is" if not reference.any() else "all scored genes are among them:"
            msg = f"perturb.reference_genes names {len(names):,} genes: {what} among the {len(frame):,} scored genes; score more genes (perturb.genes, perturb.min_coverage)"
            raise UserError(msg)
        for method, values, call, called in _calls(frame, int(reference.sum())):
            found = call_metrics(values, called, reference)
            head = {"operation": operation, "method": method, "call": call, "num_genes": len(frame),
                    "num_known": int(reference.sum()), "num_called": int(called.sum())}  # fmt: skip
            rows += [head | {"metric": m, "value": e.value, "low": e.low, "high": e.high} for m, e in found.items()]
    return pd.DataFrame(rows)


def _calls(frame: pd.DataFrame, num: int) -> list[tuple[str, np.ndarray, str, np.ndarray]]:
    """(method, scores, name of the call, called genes): the two tests, then the top genes of every score."""
    shift = frame["shift"].to_numpy(float)
    de = frame["de_statistic"].to_numpy(float)
    scores = {name: frame[name].to_numpy(float) for name in SCORES if name in frame}
    scores |= {"abs_de_statistic": np.abs(de), "high_rank": -frame["mean_rank"].to_numpy(float)}
    if "covariance" in scores and len(frame) and str(frame["operation"].iloc[0]) in LESS:
        scores["covariance"] = -scores["covariance"]
    out = []
    for column, call in (("fdr_donor", "donor-level FDR ≤ 5 %"), ("fdr_cell", "cell-level FDR ≤ 5 %, as published")):
        if np.isfinite(frame[column]).any():
            out.append(("shift", shift, call, (frame[column].to_numpy(float) <= LEVEL) & (shift > 0)))
    for name in SCORES:
        values = scores.get(name)
        if values is None or not np.isfinite(values).any():
            continue
        order = np.argsort(-np.where(np.isnan(values), -np.inf, values), kind="stable")
        called = np.zeros(len(values), dtype=bool)
        called[order[:num]] = True
        out.append((name, values, f"top {num}", called))
    return out


def call_metrics(
    score_G: NDArray[np.float64], hit_G: NDArray[np.bool_], reference_G: NDArray[np.bool_]
) -> dict[str, Interval]:
    """PPV, NPV, sensitivity, specificity and AUROC with 95 % intervals.

    Args:
        score_G: a higher score means more likely; genes without one (NaN) are left out.
        hit_G: called genes.
        reference_G: reference genes.
    """
    scored = np.isfinite(score_G)
    score, hit, reference = score_G[scored], hit_G[scored], reference_G[scored]
    both, neither = int((hit & reference).sum()), int((~hit & ~reference).sum())
    return {
        "ppv": wilson(both, int(hit.sum())),
        "npv": wilson(neither, int((~hit).sum())),
        "sensitivity": wilson(both, int(reference.sum())),
        "specificity": wilson(neither, int((~reference).sum())),
        "auroc": auroc(score, reference),
    }


def compare_with_covariance(genes: pd.DataFrame, config: Config) -> pd.DataFrame:
    """Whether the encoder finds the reference genes better than the covariance among untreated cells does.

    The encoder is given the best of its scores (`OF_MODEL`). All scores are turned so that their AUROC is at least 0.5: reference genes may
    move cells towards the goal or away.

    Returns:
        A row per operation: columns operation, score (of the encoder), num_known, num_genes, encoder, covariance (AUROC), difference,
        low, high (95 %, paired), and `decided` (bool: there are reference genes enough). Empty without a covariance or reference genes.
    """
    names, negative = read_reference_genes(config)
    if not names or "covariance" not in genes:
        return pd.DataFrame()
    rows = []
    for operation, part in genes.groupby("operation", sort=False):
        both = part[np.isfinite(part["shift"]) & np.isfinite(part["covariance"])]
        frame, known = _with_reference(both, names, negative, config)
        scores = {}
        for name in (*OF_MODEL, "covariance"):
            values = frame[name].to_numpy(float)
            if np.isfinite(values).all():
                found = auroc(values, known).value
                scores[name] = (found, values) if not found < 0.5 else (1 - found, -values)
        best = max((name for name in OF_MODEL if name in scores), key=lambda name: scores[name][0])
        apart = auroc_difference(scores[best][1], scores["covariance"][1], known)
        rows.append({
            "operation": operation, "score": best, "num_known": int(known.sum()), "num_genes": len(frame),
            "encoder": scores[best][0], "covariance": scores["covariance"][0],
            "difference": apart.value, "low": apart.low, "high": apart.high,
            "decided": bool(min(int(known.sum()), int((~known).sum())) >= MIN_EACH),
        })  # fmt: skip
    return pd.DataFrame(rows)


def covariance_sentences(genes: pd.DataFrame, config: Config) -> list[tuple[str, str]]:
    """(tone, sentence) on whether the encoder beats the covariance among untreated cells; one per operation, or why there is none."""
    if not config.perturb.goal.strip():
        return []
    if "covariance" not in genes:
        text = "The encoder is not compared with the covariance of untreated cells: their raw counts could not be read."
        return [("warn", text)]
    found = compare_with_covariance(genes, config)
    if found.empty:
        text = (
            "It is not known whether the encoder beats the covariance of untreated cells: no known genes were given "
            "(perturb.reference_genes)."
        )
        return [("warn", text)]
    out = []
    for row in found.to_dict("records"):
        name = str(row["operation"]).capitalize()
        if not row["decided"]:
            text = (
                f"{name}: {row['num_known']} known genes among {row['num_genes']:,} are too few to say whether the encoder beats "
                "the covariance of untreated cells."
            )
            out.append(("warn", text))
            continue
        better, worse = row["low"] > 0, row["high"] < 0
        verdict = "beats" if better else "is worse than" if worse else "does not beat"
        text = (
            f"{name}: the encoder {verdict} the covariance of untreated cells. Its best score ({SCORES[row['score']].removeprefix('model: ')}) "
            f"has an AUROC of {row['encoder']:.2f} on {row['num_known']} known genes, the covariance {row['covariance']:.2f} "
            f"(difference {row['difference']:+.2f}, 95 % {row['low']:+.2f} to {row['high']:+.2f})."
        )
        out.append(("good" if better else "bad" if worse else "warn", text))
    return out


def read_table4(experiment: str) -> pd.DataFrame:
    """Rows of one experiment of the paper's Table 4: species, gene, symbol, operation, rank, shift, p."""
    data = files.read_bytes("resource:table4.tsv").decode()
    table = pd.read_csv(io.StringIO(data), sep="\t", comment="#")
    return table[table["experiment"] == experiment].reset_index(drop=True)


def compare_with_table4(genes: pd.DataFrame, config: Config) -> pd.DataFrame:
    """Genes of the paper's Table 4 (experiment `perturb.published`), with the paper's figures and those of this run.

    Genes are ranked as in the paper: significant over cells (FDR below 5 %) first, then by descending shift, then by FDR.
    Genes that the run did not score have no figures. Empty without an experiment.
    """
    if not config.perturb.published:
        return pd.DataFrame()
    rows = []
    for row in read_table4(config.perturb.published).to_dict("records"):
        part = genes[(genes["operation"] == row["operation"]) & (genes["num_cells"] > 0)]
        order = part.assign(weak=~(part["fdr_cell"] < LEVEL)).sort_values(
            ["weak", "shift", "fdr_cell"], ascending=[True, False, True]
        )
        place = np.flatnonzero(order["gene"].to_numpy() == row["gene"])
        mine: Any = order.iloc[int(place[0])] if len(place) else None
        rows.append({
            "symbol": row["symbol"], "operation": row["operation"], "paper_rank": row["rank"], "paper_shift": row["shift"], "paper_p": row["p"],
            "rank": int(place[0]) + 1 if len(place) else -1, "of": len(part),
            **{name: float(mine[name]) if mine is not None else float("nan")
               for name in ("shift", "p_cell", "p_donor", "num_donors", "coverage", "null_percentile")},
            "warnings": str(mine["warnings"]) if mine is not None else "not scored: in too few of the start cells",
        })  # fmt: skip
    return pd.DataFrame(rows)


def comparison_text(genes: pd.DataFrame, config: Config) -> str:
    """Text that `mixgf perturb` prints on reference genes and Table 4; empty without either."""
    parts = []
    paper = compare_with_table4(genes, config)
    if len(paper):
        lines: list[tuple[str, ...]] = [
            (
                "gene",
                "operation",
                "rank",
                "shift",
                "p",
                "| rank here",
                "shift",
                "p (cells)",
                "p (donors)",
                "null %",
                "cells with it",
            )
        ]
        lines += [
            (r["symbol"], r["operation"], f"{r['paper_rank']}", f"{r['paper_shift']:.4f}", f"{r['paper_p']:.2e}",
             f"| {r['rank']} of {r['of']}" if r["rank"] > 0 else "| not scored", *(_number(r[k], s) for k, s in (
                 ("shift", "+.4f"), ("p_cell", ".2e"), ("p_donor", ".2g"), ("null_percentile", ".0f"), ("coverage", ".1%"))))
            for r in paper.to_dict("records")
        ]  # fmt: skip
        parts.append(f"paper's Table 4 ({config.perturb.published}) | this run:\n{_aligned(lines)}")
    try:
        found = score_reference_genes(genes, config)
    except UserError as error:
        return "\n".join([*parts, str(error)])
    if len(found):
        wide = found.pivot_table(
            index=["operation", "method", "call", "num_called"],
            columns="metric",
            values="value",
            sort=False,
            dropna=False,
        ).dropna(how="all")
        lines = [("operation", "score", "called", "AUROC", "PPV", "sensitivity", "specificity")]
        lines += [
            (operation, SCORES[method], f"{call} ({num})", *(_number(r[k], ".3f") for k in ("auroc", "ppv", "sensitivity", "specificity")))
            for (operation, method, call, num), r in zip(wide.index, wide.to_dict("records"), strict=True)
        ]  # fmt: skip
        first = found.iloc[0]
        parts += [text for _, text in covariance_sentences(genes, config)]
        parts.append(f"known genes, {first['num_known']} of {first['num_genes']:,} scored:\n{_aligned(lines)}")
    return "\n".join(parts)


def _number(value: float, style: str) -> str:
    return format(value, style) if np.isfinite(value) else "-"


def _aligned(lines: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join("  " + "  ".join(t.ljust(w) for t, w in zip(line, widths, strict=True)).rstrip() for line in lines)

"""From the shifts of (cell, gene) pairs to the table of genes, with everything that puts an effect in proportion.

Beside every effect stand what its gene's rank alone predicts, how it ranks among genes like it, whether it repeats in other
donors, what happens towards unrelated states, and how much the gene itself differs between the states (spec section 9).

Differential expression is taken from the corpus, which holds ranks and no counts: a gene's rank score in a cell is
1 - rank / (number of genes in the sentence), 0 where the sentence lacks it. `de_statistic` is Welch's t of the rank scores,
all goal cells against all start cells (over cells: a ranking, no test); `de_log_fold` is the log2 ratio of the mean scores.

Letters: P (cell, gene) pairs, G genes, C donors, S states, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from mixgf import stats
from mixgf.config import Config
from mixgf.dataset import Corpus
from mixgf.perturb import Design, Floats, Ints

LOW_COVERAGE = 0.1
"""Share of cells below which a gene's coverage is worth a warning."""
MARKER_T = 5.0
"""Differential-expression statistic above which the gene itself is a mark of the states."""
PSEUDO_SCORE = 0.01
"""Added to mean rank scores before their ratio is taken."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """Scored pairs of one operation, in the order of the parts."""

    target_P: Ints
    cell_P: Ints
    rank_P: Ints
    """0 = top gene, -1 = absent."""
    response_P: Floats
    shift_SP: Floats

    @classmethod
    def from_table(cls, table: pa.Table, num_states: int) -> Pairs:
        """Read the columns of joined parts."""
        shifts = [table[f"shift_{i}"].to_numpy().astype(np.float64) for i in range(num_states)]
        return cls(
            target_P=table["target"].to_numpy().astype(np.int64),
            cell_P=table["cell"].to_numpy(),
            rank_P=table["rank"].to_numpy().astype(np.int64),
            response_P=table["response"].to_numpy().astype(np.float64),
            shift_SP=np.stack(shifts) if shifts else np.empty((0, table.num_rows)),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Expression:
    """Rank scores of every token in the cells of one state."""

    num_cells: int
    mean_V: Floats
    variance_V: Floats


def state_means(parts: list[pa.Table], num_states: int) -> tuple[Floats, pa.Table]:
    """State embeddings (S, D) over all cells, and a table of them, whole and by donor (donor -1 = all cells).

    Parts are added in the given order, so that the sums do not depend on who finished first.
    """
    table = pa.concat_tables(parts)
    state, donor, num = (table[name].to_numpy() for name in ("state", "donor", "num_cells"))
    sums = np.array(table["sum"].to_pylist(), dtype=np.float64)
    rows: list[tuple[int, int, int, Floats]] = []
    means = np.empty((num_states, sums.shape[1]))
    for s in range(num_states):
        for d in [-1, *np.unique(donor[state == s]).tolist()]:
            chosen = (state == s) & ((donor == d) | (d == -1))
            rows.append((s, d, int(num[chosen].sum()), sums[chosen].sum(axis=0) / num[chosen].sum()))
            if d == -1:
                means[s] = rows[-1][3]
    columns = {
        "state": pa.array([row[0] for row in rows], pa.int32()),
        "donor": pa.array([row[1] for row in rows], pa.int32()),
        "num_cells": pa.array([row[2] for row in rows], pa.int64()),
        "vector": pa.array([row[3].tolist() for row in rows], pa.list_(pa.float64())),
    }
    return means, pa.table(columns)


def expression(corpus: Corpus, cells: Ints, *, block: int = 2048) -> Expression:
    """Rank scores of the given cells, read block by block."""
    size = corpus.vocabulary.size
    total_V, squares_V = np.zeros(size), np.zeros(size)
    lead = int(corpus.cls)
    for part in np.array_split(cells, max(1, -(-len(cells) // block))):
        ids_T, offsets_B1 = corpus.tokens(part)
        lengths_B = np.diff(offsets_B1)
        rank_T = np.arange(len(ids_T)) - np.repeat(offsets_B1[:-1], lengths_B) - lead
        score_T = np.where(rank_T >= 0, 1 - rank_T / np.repeat(lengths_B - lead, lengths_B), 0.0)
        total_V += np.bincount(ids_T, weights=score_T, minlength=size)
        squares_V += np.bincount(ids_T, weights=score_T**2, minlength=size)
    num = len(cells)
    mean_V = total_V / num
    variance_V = np.maximum(squares_V - num * mean_V**2, 0) / max(num - 1, 1)
    return Expression(num_cells=num, mean_V=mean_V, variance_V=variance_V)


def gene_table(plan: Design, pairs: dict[str, Pairs], expressed: dict[str, Expression], config: Config) -> pa.Table:
    """The result: one row per operation and gene, by operation, then falling shift.

    Args:
        plan: what was done.
        pairs: scored pairs by operation.
        expressed: rank scores of the `start` cells and, with a goal, of the `goal` cells.
        config: the run's config.
    """
    return pa.concat_tables(
        [
            _operation_table(plan, operation, pairs[operation], expressed, config)
            for operation in config.perturb.operations
        ]
    )


def _operation_table(
    plan: Design, operation: str, pairs: Pairs, expressed: dict[str, Expression], config: Config
) -> pa.Table:
    settings, num_genes = config.perturb, len(plan.targets)
    values_P = pairs.response_P if plan.goal is None else pairs.shift_SP[plan.goal]
    donor_codes, donor_P = np.unique(plan.donor_of[pairs.cell_P], return_inverse=True)
    by = (pairs.target_P, donor_P.astype(np.int64), num_genes, max(1, len(donor_codes)))
    means = stats.group_means(values_P, *by)
    mean_GC, _ = stats.cluster_means(values_P, *by)
    coverage_G = np.array([target.coverage for target in plan.targets])
    present_P = pairs.rank_P >= 0
    rank_G = _mean_by(pairs.rank_P[present_P] + 1.0, pairs.target_P[present_P], num_genes)
    # the published test takes the whole pool and no correction for ties
    paper = settings.mode == "paper"
    p_cell_G = stats.rank_sums(values_P, pairs.target_P, num_genes, include_self=paper, correct_ties=not paper)[1]
    rng = np.random.default_rng([config.seed, settings.operations.index(operation), 92])
    p_donor_G = stats.sign_flip(stats.less_background(mean_GC), settings.num_permutations, rng)
    expected_G = stats.expected_by_rank(means.mean, rank_G)
    percentile_G = stats.matched_percentile(means.mean, np.stack([rank_G, coverage_G], axis=1))
    others = [i for i, state in enumerate(plan.states) if state.name.startswith("alternative")]
    other_G = np.full(num_genes, np.nan)
    if others:
        other_G = _mean_by(pairs.shift_SP[others].mean(axis=0), pairs.target_P, num_genes)
    de_G, fold_G = _differential(plan, expressed)
    columns: dict[str, object] = {
        "gene": [target.gene for target in plan.targets],
        "symbol": [target.symbol for target in plan.targets],
        "species": [target.species for target in plan.targets],
        "operation": [operation] * num_genes,
        "variant": [settings.variant] * num_genes,
        "num_cells": means.num_values,
        "num_donors": means.num_clusters,
        "coverage": coverage_G,
        "mean_rank": rank_G,
        "shift": means.mean,
        "shift_low": means.low,
        "shift_high": means.high,
        "response": _mean_by(pairs.response_P, pairs.target_P, num_genes),
        "p_cell": p_cell_G,
        "fdr_cell": stats.benjamini_hochberg(p_cell_G),
        "p_donor": p_donor_G,
        "fdr_donor": stats.benjamini_hochberg(p_donor_G),
        "null_percentile": percentile_G,
        "rank_expected": expected_G,
        "shift_minus_rank_expected": means.mean - expected_G,
        "shift_alternatives": other_G,
        "shift_minus_alternatives": means.mean - other_G,
        "de_statistic": de_G,
        "de_log_fold": fold_G,
    }
    columns["warnings"] = _warnings(columns, mean_GC, has_goal=plan.goal is not None)
    order = np.lexsort((np.array(columns["gene"]), -np.nan_to_num(means.mean, nan=-np.inf)))
    return pa.table({name: pa.array(values) for name, values in columns.items()}).take(order)


def _mean_by(values_P: NDArray[np.floating[Any]], group_P: Ints, num_groups: int) -> Floats:
    with np.errstate(invalid="ignore"):
        return np.bincount(group_P, weights=values_P, minlength=num_groups) / np.bincount(group_P, minlength=num_groups)


def _differential(plan: Design, expressed: dict[str, Expression]) -> tuple[Floats, Floats]:
    """Welch's t and log2 ratio of rank scores, goal against start, for targets of one gene; else NaN."""
    empty = np.full(len(plan.targets), np.nan)
    if "goal" not in expressed:
        return empty, empty
    start, goal = expressed["start"], expressed["goal"]
    num = np.broadcast_to(np.array([[start.num_cells], [goal.num_cells]], dtype=np.float64), (2, len(start.mean_V)))
    t_V = stats.welch(num, np.stack([start.mean_V, goal.mean_V]), np.stack([start.variance_V, goal.variance_V]))
    fold_V = np.log2((goal.mean_V + PSEUDO_SCORE) / (start.mean_V + PSEUDO_SCORE))
    first_G = plan.genes_KM[:, 0]
    single_G = np.array([len(target.tokens) == 1 for target in plan.targets])
    return np.where(single_G, t_V[first_G], np.nan), np.where(single_G, fold_V[first_G], np.nan)


def _warnings(columns: dict[str, object], mean_GC: Floats, *, has_goal: bool) -> list[str]:
    """Why each effect may be an artefact, in words; empty = no reason known."""
    coverage, num, donors, shift, percentile, other, de, fdr_cell, p_donor = (
        np.asarray(columns[name], dtype=np.float64)
        for name in (
            "coverage", "num_cells", "num_donors", "shift", "null_percentile", "shift_alternatives", "de_statistic",
            "fdr_cell", "p_donor",
        )
    )  # fmt: skip
    carried = _carried_by_one(mean_GC)
    texts = []
    for g in range(len(shift)):
        found = []
        if num[g] == 0:
            texts.append("in no sentence: not scored")
            continue
        if coverage[g] < LOW_COVERAGE:
            found.append(f"seen in {coverage[g]:.1%} of cells")
        if donors[g] < stats.MIN_CLUSTERS:
            found.append(f"{donors[g]:.0f} donor(s): no donor-level test, the interval is over cells")
        elif carried[g]:
            found.append("one donor carries it")
        if 5 <= percentile[g] <= 95:
            found.append("ordinary for its rank and coverage")
        elif np.isnan(percentile[g]):
            found.append("too few genes for a matched null")
        if fdr_cell[g] < 0.05 and p_donor[g] >= 0.05:
            found.append("significant over cells only, not over donors")
        if abs(other[g]) >= abs(shift[g]) / 2 and other[g] * shift[g] > 0:
            found.append("moves towards the alternatives as well")
        if has_goal and abs(de[g]) > MARKER_T:
            found.append(f"differs itself between start and goal (t = {de[g]:.1f})")
        texts.append("; ".join(found))
    return texts


def _carried_by_one(mean_GC: Floats) -> stats.Bools:
    """Whether the mean over donors turns its sign, or loses three quarters, when one donor is left out."""
    num_G = np.isfinite(mean_GC).sum(axis=1, keepdims=True)
    value_GC = np.nan_to_num(mean_GC)
    total_G = value_GC.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        without_GC = (total_G - value_GC) / (num_G - 1)
        share_GC = without_GC / (total_G / num_G)
    low_GC = np.where(np.isfinite(share_GC), share_GC, 1.0) < 0.25
    return np.asarray(low_GC.any(axis=1))

"""From shifts of (cell, gene) pairs to the table of genes, with tests and comparisons.

For every gene the table has its shift, what its rank alone predicts, and the percentile of the rest among other genes. It also has
tests over cells and over donors, the shift towards unrelated states, and the gene's own difference between the states.

The donor-level test has three steps. In every donor, what the gene's rank predicts is subtracted
(`stats.rank_adjustment.residual_after_rank`). The residual is ranked among genes of like rank (`normal_scores`). A
sign-flip test asks whether it repeats over donors (`stats.donors.sign_flip`). Cells without a donor's name
(`classify.unlabelled`) are left out; in the interval they are one more cluster. `calibrate_tests` applies both tests to
permuted shifts of the same run.

Genes are compared with those drawn at random (`Target.drawn`) if a screen or the user chose the others, else with all.
False discovery rates count every gene that a screen estimated.

A gene is a hit if its shift repeats over donors (FDR) and lies beyond what means nothing (`fdr_null`). Where genes were drawn for
comparison, it must be unusual among those of like rank and coverage, too. All donors share one encoder, so what repeats may still mean nothing: `controls` has the null, and what an untrained
encoder and a false goal give in place of the true ones.

Differential expression (`de_statistic`, `de_log_fold`) and the covariance control (`covariance`) come from `expression`.

Letters: P (cell, gene) pairs, G genes, C donors, S states, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa

from mixgf import arrays
from mixgf.arrays import Float64s, Ints
from mixgf.config.data import SpeciesRow
from mixgf.config.run import Config
from mixgf.genes import species
from mixgf.perturbation import controls
from mixgf.perturbation.expression import Expression
from mixgf.perturbation.group_design import Design
from mixgf.perturbation.readability import Readability
from mixgf.perturbation.reference_genes import LEVEL
from mixgf.stats import rank_adjustment
from mixgf.stats.donors import (
    MIN_BACKGROUND,
    MIN_CLUSTERS,
    GroupMeans,
    benjamini_hochberg,
    cluster_means,
    group_means,
    means_by_group,
    rank_sums,
    sign_flip,
)

LOW_COVERAGE = 0.1
"""Coverage (share of cells with the gene) below which there is a warning."""
MARKER_T = 5.0
"""Differential-expression statistic above which the gene itself is a marker of the states."""
MIN_REFERENCE = 20
"""Fewest genes drawn for comparison; with fewer, genes are compared with all scored genes."""
ORDINARY = (2.5, 97.5)
"""Percentiles among similar genes between which a shift is ordinary."""
MARK = "differs itself between start and goal"
"""Warning on a gene that is a marker of the states."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """Scored pairs of one operation, in the order of the parts."""

    target_P: Ints
    cell_P: Ints
    rank_P: Ints
    """0 = top gene, -1 = absent."""
    response_P: Float64s
    shift_SP: Float64s

    @classmethod
    def from_table(cls, table: pa.Table, num_states: int) -> Pairs:
        """Read the columns of joined part files."""
        shifts = [table[f"shift_{i}"].to_numpy().astype(np.float64) for i in range(num_states)]
        return cls(
            target_P=table["target"].to_numpy().astype(np.int64),
            cell_P=table["cell"].to_numpy(),
            rank_P=table["rank"].to_numpy().astype(np.int64),
            response_P=table["response"].to_numpy().astype(np.float64),
            shift_SP=np.stack(shifts) if shifts else np.empty((0, table.num_rows)),
        )


def state_means(parts: list[pa.Table], num_states: int) -> tuple[Float64s, pa.Table]:
    """State embeddings (S, D) over all cells, and a table of them by donor (donor -1 = all cells).

    Parts are added in the given order, so that the sums do not depend on which task finished first.
    """
    table = pa.concat_tables(parts)
    state, donor, num = (table[name].to_numpy() for name in ("state", "donor", "num_cells"))
    sums = np.array(table["sum"].to_pylist(), dtype=np.float64)
    rows: list[tuple[int, int, int, Float64s]] = []
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


def keep_targets(plan: Design, pairs: dict[str, Pairs], kept: Ints) -> tuple[Design, dict[str, Pairs]]:
    """Keep the targets with the given numbers (ascending), renumbered, and their pairs."""
    found = {}
    for operation, part in pairs.items():
        mine_P = np.isin(part.target_P, kept)
        found[operation] = Pairs(
            target_P=np.searchsorted(kept, part.target_P[mine_P]),
            cell_P=part.cell_P[mine_P],
            rank_P=part.rank_P[mine_P],
            response_P=part.response_P[mine_P],
            shift_SP=part.shift_SP[:, mine_P],
        )
    return replace(plan, targets=tuple(plan.targets[k] for k in kept.tolist())), found


def build_gene_table(
    plan: Design,
    pairs: dict[str, Pairs],
    expressed: Expression | None,
    config: Config,
    *,
    num_tests: int = 0,
    twin: dict[str, Pairs] | None = None,
    readable: Readability | None = None,
) -> pa.Table:
    """Table of genes: one row per operation and gene, by operation, then descending shift.

    Args:
        plan: the design.
        pairs: scored pairs by operation.
        expressed: the genes' own differences between the states; None without a goal.
        config: of the run.
        num_tests: number of genes that a screen chose these from; 0 = no screen.
        twin: the same pairs, scored by the untrained twin; None without that control.
        readable: in how many start cells each gene can be read; None = not known.
    """
    tables = []
    for operation in config.perturb.operations:
        own = Measured(plan=plan, operation=operation, pairs=pairs[operation], config=config, num_tests=num_tests)
        other = None if twin is None else replace(own, pairs=twin[operation])
        tables.append(_operation_table(own, other, expressed, readable))
    return pa.concat_tables(tables)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What is tested of one operation: shifts towards the goal and the false goals, or responses."""

    plan: Design
    operation: str
    pairs: Pairs
    config: Config
    num_tests: int = 0

    @cached_property
    def false(self) -> list[int]:
        """Numbers of the states that are false goals."""
        return controls.false_goals([state.name for state in self.plan.embedded])

    @cached_property
    def donors(self) -> _Donors:
        """Donors of the pairs."""
        return _donors(self.plan, self.pairs, self.config)

    @cached_property
    def rank_G(self) -> Float64s:
        """Mean rank of each gene."""
        return _mean_ranks(self.pairs, len(self.plan.targets))

    @cached_property
    def residuals(self) -> dict[int | None, Float64s]:
        """Residuals after rank (`scaled_residual`), (G,), towards the goal (None = of the responses) and each false goal."""
        place_G, among_G = comparison_ranks(self.rank_G), _reference(self.plan)
        means = {
            towards: means_by_group(_values(self.pairs, towards), self.pairs.target_P, len(place_G))
            for towards in (self.plan.goal, *self.false)
        }
        return {towards: rank_adjustment.scaled_residual(mean_G, place_G, among_G) for towards, mean_G in means.items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Effects:
    """Effects of the genes of one operation, with their tests (G,)."""

    means: GroupMeans
    mean_GC: Float64s
    """Means by named donor; NaN where a donor has no cell."""
    p_donor_G: Float64s
    percentile_G: Float64s
    p_null_G: Float64s
    num_null: int
    fdr_donor_G: Float64s
    fdr_null_G: Float64s
    hit_G: arrays.Bools


def tested_effects(measured: Measured, towards: int | None) -> Effects:
    """Means of the shifts towards a state (None = of the responses), the donor-level test, and the hits.

    The error rate of hits comes from `null_p_values` of the residuals after rank. The null are the comparison genes' residuals
    towards the false goals other than `towards`; without such goals the residuals of the genes that were drawn for comparison. Where
    there are neither, genes could only be compared with each other: no gene is a hit.
    """
    plan, pairs, config, donors = measured.plan, measured.pairs, measured.config, measured.donors
    among_G, null_G = _reference(plan), np.array([target.null for target in plan.targets])
    num_genes = len(plan.targets)
    values_P, place_G = _values(pairs, towards), comparison_ranks(measured.rank_G)
    means = group_means(values_P, pairs.target_P, donors.of_P, num_genes, max(1, donors.num))
    coverage_G = np.array([target.coverage for target in plan.targets])
    rng = _rng(config, measured.operation, 92)
    mean_GC, p_donor_G = _donor_test(values_P, pairs.target_P, place_G, donors, config, among_G=among_G, rng=rng)
    scaled_G = measured.residuals[towards]
    false = [s for s in measured.false if s != towards]
    if towards is not None and false:
        null_GB = np.stack([measured.residuals[s] for s in false], axis=1)
    else:
        null_GB = scaled_G[:, None] if not among_G.all() else np.full((num_genes, 1), np.nan)
    null_GB = np.where(among_G[:, None], null_GB, np.nan)
    p_null_G = rank_adjustment.null_p_values(scaled_G, null_GB)
    fdr_donor_G, fdr_null_G = (_discoveries(p_G, null_G, measured.num_tests) for p_G in (p_donor_G, p_null_G))
    percentile_G = rank_adjustment.residual_percentile(means.mean, scaled_G, place_G, coverage_G, among_G)
    return Effects(
        means=means,
        mean_GC=mean_GC,
        p_donor_G=p_donor_G,
        percentile_G=percentile_G,
        p_null_G=p_null_G,
        num_null=int(np.isfinite(null_GB).sum()),
        fdr_donor_G=fdr_donor_G,
        fdr_null_G=fdr_null_G,
        hit_G=is_hit(fdr_donor_G, fdr_null_G, percentile_G, among_G) & ~null_G,
    )


def is_hit(fdr_donor_G: Float64s, fdr_null_G: Float64s, percentile_G: Float64s, among_G: arrays.Bools) -> arrays.Bools:
    """Hits: the effect repeats over donors, and lies beyond what means nothing.

    Where genes were drawn for comparison (`among_G` is not all), it must also be unusual among those of like rank and coverage. Among all
    genes, no more than 5 % could ever be unusual.
    """
    unusual_G = (percentile_G < ORDINARY[0]) | (percentile_G > ORDINARY[1]) | bool(among_G.all())
    return (fdr_donor_G <= LEVEL) & (fdr_null_G <= LEVEL) & unusual_G


def _operation_table(
    measured: Measured, twin: Measured | None, expressed: Expression | None, readable: Readability | None
) -> pa.Table:
    plan, pairs, config, operation = measured.plan, measured.pairs, measured.config, measured.operation
    settings, num_genes = config.perturb, len(plan.targets)
    among_G, null_G = _reference(plan), np.array([target.null for target in plan.targets])
    found = tested_effects(measured, plan.goal)
    other = tested_effects(twin, plan.goal) if twin is not None else None
    fake = tested_effects(measured, measured.false[0]) if measured.false else None
    p_cell_G = _cell_test(_values(pairs, plan.goal), pairs.target_P, num_genes, config, among_G=among_G)
    others = [i for i, state in enumerate(plan.states) if state.name.startswith("alternative")]
    towards = {plan.states[i].name: means_by_group(pairs.shift_SP[i], pairs.target_P, num_genes) for i in others}
    other_G = np.mean(list(towards.values()), axis=0) if others else np.full(num_genes, np.nan)
    de_G, fold_G, covariance_G = _differential(plan, expressed)
    orthologs = _orthologs(plan, config)
    mean_G, rank_G = found.means.mean, measured.rank_G
    expected_G = rank_adjustment.expected_by_rank(mean_G, comparison_ranks(rank_G), among_G)
    columns: dict[str, object] = {
        "gene": [target.gene for target in plan.targets],
        "symbol": [target.symbol for target in plan.targets],
        "ortholog": [";".join(gene for gene, _ in partners) for partners in orthologs],
        "ortholog_symbol": [";".join(symbol for _, symbol in partners) for partners in orthologs],
        "species": [target.species for target in plan.targets],
        "operation": [operation] * num_genes,
        "variant": [settings.variant] * num_genes,
        "role": ["null" if target.null else "target" for target in plan.targets],
        "reference": among_G,
        "num_cells": found.means.num_values,
        "num_donors": np.isfinite(found.mean_GC).sum(axis=1),
        "coverage": np.array([target.coverage for target in plan.targets]),
        "mean_rank": rank_G,
        "shift": mean_G,
        "shift_low": found.means.low,
        "shift_high": found.means.high,
        "response": means_by_group(pairs.response_P, pairs.target_P, num_genes),
        "p_cell": p_cell_G,
        "fdr_cell": _discoveries(p_cell_G, null_G, measured.num_tests),
        "p_donor": found.p_donor_G,
        "fdr_donor": found.fdr_donor_G,
        "null_percentile": found.percentile_G,
        "p_null": found.p_null_G,
        "fdr_null": found.fdr_null_G,
        "num_null": np.full(num_genes, found.num_null),
        "hit": found.hit_G,
        "rank_expected": expected_G,
        "shift_minus_rank_expected": mean_G - expected_G,
        "shift_alternatives": other_G,
        "shift_minus_alternatives": mean_G - other_G,
        "de_statistic": de_G,
        "de_log_fold": fold_G,
        "de_rank": _ranking(de_G),
    }
    if covariance_G is not None:
        columns["covariance"] = covariance_G
    if other is not None:
        columns |= {"shift_untrained": other.means.mean, "hit_untrained": other.hit_G}
    if fake is not None:
        columns |= {"shift_false_goal": fake.means.mean, "hit_false_goal": fake.hit_G}
    if readable is not None:
        columns |= readable.columns()
    inserted = operation == "overexpress" and settings.insert_absent
    columns["warnings"] = _warnings(columns, found.mean_GC, has_goal=plan.goal is not None, inserted=inserted)
    columns |= {f"shift_{name}": shift_G for name, shift_G in towards.items()}
    order = np.lexsort((np.array(columns["gene"]), -np.nan_to_num(mean_G, nan=-np.inf)))
    return pa.table({name: pa.array(values) for name, values in columns.items()}).take(order)


def calibrate_tests(plan: Design, pairs: dict[str, Pairs], config: Config) -> pa.Table:
    """p-values of both tests under the null hypothesis: columns operation, p_cell, p_donor; a row per gene and permutation.

    Within every donor, genes of like rank exchange their residuals after rank (`rank_adjustment.permute_within_rank`).
    Ranks, effects of rank and the correlation of a donor's cells stay, but no gene has an effect that repeats over donors.
    p-values of a calibrated test are then uniform, up to the discreteness of a sign flip over few donors
    (`donors.attainable_level`). There are no rows with fewer than three named donors. Only genes drawn for comparison
    are exchanged if the others were chosen.
    """
    tables = []
    if not (reference_G := _reference(plan)).all():
        plan, pairs = keep_targets(plan, pairs, np.flatnonzero(reference_G))
    among_G = np.ones(len(plan.targets), dtype=bool)
    for operation in config.perturb.operations:
        part, num_genes = pairs[operation], len(plan.targets)
        donors = _donors(plan, part, config)
        if int(donors.named_C.sum()) < MIN_CLUSTERS or num_genes <= 2 * MIN_BACKGROUND:
            continue
        rank_G, rng = comparison_ranks(_mean_ranks(part, num_genes)), _rng(config, operation, 94)
        values_P, cluster_P = _values(part, plan.goal), (part.target_P, donors.of_P)
        mean_GC, _ = cluster_means(values_P, *cluster_P, num_genes, donors.num)
        expected_GC = mean_GC - rank_adjustment.residual_after_rank(mean_GC, rank_G)
        measured_GC = np.isfinite(expected_GC)
        kept_P = measured_GC[cluster_P]
        target_P, of_P = (column[kept_P] for column in cluster_P)
        own_P = values_P[kept_P] - expected_GC[target_P, of_P]
        kept = replace(donors, of_P=of_P)
        for _ in range(max(1, min(8, 2000 // num_genes))):  # several permutations if there are few genes
            shuffled_P = rank_adjustment.permute_within_rank(rank_G, measured_GC, rng)[of_P, target_P]
            values_Q = own_P + expected_GC[shuffled_P, of_P]
            p_cell_G = _cell_test(values_Q, shuffled_P, num_genes, config, among_G=among_G)
            p_donor_G = _donor_test(values_Q, shuffled_P, rank_G, kept, config, among_G=among_G, rng=rng)[1]
            tables.append(pa.table({"operation": [operation] * num_genes, "p_cell": p_cell_G, "p_donor": p_donor_G}))
    schema = pa.schema([("operation", pa.string()), ("p_cell", pa.float64()), ("p_donor", pa.float64())])
    return pa.concat_tables(tables) if tables else schema.empty_table()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Donors:
    """Donor code of every pair, from 0, and which donors have a name."""

    of_P: Ints
    named_C: arrays.Bools

    @property
    def num(self) -> int:
        return len(self.named_C)


def _values(pairs: Pairs, towards: int | None) -> Float64s:
    return pairs.response_P if towards is None else pairs.shift_SP[towards]


def _donors(plan: Design, pairs: Pairs, config: Config) -> _Donors:
    codes_C, of_P = np.unique(plan.donor_of[pairs.cell_P], return_inverse=True)
    named = [plan.donors[code] not in config.classify.unlabelled for code in codes_C.tolist()]
    return _Donors(of_P=of_P.astype(np.int64), named_C=np.array(named, dtype=bool))


def _rng(config: Config, operation: str, key: int) -> np.random.Generator:
    return np.random.default_rng([config.seed, config.perturb.operations.index(operation), key])


def _reference(plan: Design) -> arrays.Bools:
    """Mask (G,) of the genes with which the others are compared."""
    drawn_G = np.array([target.drawn for target in plan.targets])
    return drawn_G if drawn_G.sum() >= MIN_REFERENCE else np.ones_like(drawn_G)


def _discoveries(p_G: Float64s, null_G: arrays.Bools, num_tests: int) -> Float64s:
    """False discovery rates, separately among the genes under test and among the comparison genes."""
    tested_G = benjamini_hochberg(np.where(null_G, np.nan, p_G), num_tests)
    return np.where(null_G, benjamini_hochberg(np.where(null_G, p_G, np.nan)), tested_G)


def _cell_test(
    values_P: Float64s, target_P: Ints, num_genes: int, config: Config, *, among_G: arrays.Bools
) -> Float64s:
    """p-values of the test over cells, (G,); as published with `perturb.test = published`."""
    # the published test takes the whole pool and no correction for ties
    paper = config.perturb.test == "published"
    pool_G = np.ones_like(among_G) if paper else among_G
    return rank_sums(values_P, target_P, num_genes, among_G=pool_G, include_self=paper, correct_ties=not paper)[1]


def _donor_test(
    values_P: Float64s,
    target_P: Ints,
    rank_G: Float64s,
    donors: _Donors,
    config: Config,
    *,
    among_G: arrays.Bools,
    rng: np.random.Generator,
) -> tuple[Float64s, Float64s]:
    """Means by named donor, (G, C), and p-values of the test over them, (G,)."""
    mean_GC, _ = cluster_means(values_P, target_P, donors.of_P, len(rank_G), max(1, donors.num))
    mean_GC = mean_GC[:, donors.named_C]
    own_GC = rank_adjustment.residual_after_rank(mean_GC, rank_G, among_G) if mean_GC.shape[1] else mean_GC
    place_GC = rank_adjustment.normal_scores(own_GC, rank_G, among_G)
    return mean_GC, sign_flip(place_GC, config.perturb.num_permutations, rng)


def _mean_ranks(pairs: Pairs, num_genes: int) -> Float64s:
    """Mean rank (1 = top) over the cells whose sentences hold the gene."""
    present_P = pairs.rank_P >= 0
    return means_by_group(pairs.rank_P[present_P] + 1.0, pairs.target_P[present_P], num_genes)


def comparison_ranks(rank_G: Float64s) -> Float64s:
    """Logs of mean ranks for comparisons; genes that are in no sentence rank after all others."""
    return np.log(np.where(np.isfinite(rank_G), rank_G, np.nanmax(rank_G, initial=0.0) + 1))


def _ranking(de_G: Float64s) -> Float64s:
    """Rank of the statistic, 1 = largest increase from start to goal; NaN without a statistic."""
    order = np.argsort(-np.where(np.isfinite(de_G) | np.isinf(de_G), de_G, -np.inf), kind="stable")
    rank_G = np.empty(len(de_G))
    rank_G[order] = np.arange(1, len(de_G) + 1)
    return np.where(np.isnan(de_G), np.nan, rank_G)


def _orthologs(plan: Design, config: Config) -> list[list[tuple[str, str]]]:
    """One-to-one orthologs of each target in the other species, as (Ensembl id, symbol); none for sets of genes."""
    maps = species.orthologs(config.vocab.orthologs)
    symbols = {row.name: _symbols(row) for row in config.species}
    found: list[list[tuple[str, str]]] = []
    for target in plan.targets:
        partners = [(row.name, maps.get((target.species, row.name), {}).get(target.gene)) for row in config.species]
        found.append([(gene, symbols[name].get(gene) or gene) for name, gene in partners if gene])
    return found


def _symbols(row: SpeciesRow) -> dict[str, str]:
    table = species.gene_table(row)
    return dict(zip(table["gene"].to_pylist(), table["symbol"].to_pylist(), strict=True))


def _differential(plan: Design, expressed: Expression | None) -> tuple[Float64s, Float64s, Float64s | None]:
    """t, log2 ratio and covariance control of targets of one gene; else NaN, and None where there is no covariance."""
    empty_G = np.full(len(plan.targets), np.nan)
    if expressed is None:
        return empty_G, empty_G, None
    first_G = plan.genes_KM[:, 0]
    single_G = np.array([len(target.tokens) == 1 for target in plan.targets])
    one_of = np.array([expressed.species.index(target.species) for target in plan.targets])

    def of_targets(values_SV: Float64s) -> Float64s:
        return np.where(single_G, values_SV[one_of, first_G], np.nan)

    covariance_SV = expressed.covariance_SV
    covariance_G = None if covariance_SV is None else of_targets(covariance_SV)
    return of_targets(expressed.t_SV), of_targets(expressed.fold_SV), covariance_G


def _warnings(columns: dict[str, object], mean_GC: Float64s, *, has_goal: bool, inserted: bool) -> list[str]:
    """Reasons why each effect may be an artefact; empty = none. `inserted`: cells without the gene were scored, too."""
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
        if inserted and coverage[g] < 0.5:
            found.append(f"seen in {coverage[g]:.1%} of cells, put into the others")
        elif coverage[g] < LOW_COVERAGE:
            found.append(f"seen in {coverage[g]:.1%} of cells")
        if donors[g] < MIN_CLUSTERS:
            found.append(f"{donors[g]:.0f} donor(s): no donor-level test, the interval is over cells")
        elif carried[g]:
            found.append("one donor carries it")
        if ORDINARY[0] <= percentile[g] <= ORDINARY[1]:
            found.append("ordinary for its rank and coverage")
        elif np.isnan(percentile[g]):
            found.append("too few comparison genes of like rank")
        if fdr_cell[g] < 0.05 and p_donor[g] >= 0.05:
            found.append("significant over cells only, not over donors")
        if abs(other[g]) >= abs(shift[g]) / 2 and other[g] * shift[g] > 0:
            found.append("moves cells towards the other states as well")
        if has_goal and abs(de[g]) > MARKER_T:
            found.append(f"{MARK} (t = {de[g]:.1f})")
        texts.append("; ".join(found))
    return texts


def _carried_by_one(mean_GC: Float64s) -> arrays.Bools:
    """Whether the mean over donors changes its sign, or loses three quarters, if one donor is left out."""
    num_G = np.isfinite(mean_GC).sum(axis=1, keepdims=True)
    value_GC = np.nan_to_num(mean_GC)
    total_G = value_GC.sum(axis=1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        without_GC = (total_G - value_GC) / (num_G - 1)
        share_GC = without_GC / (total_G / num_G)
    low_GC = np.where(np.isfinite(share_GC), share_GC, 1.0) < 0.25
    return np.asarray(low_GC.any(axis=1))

"""Perturbation of one-to-one orthologs in two species: similarity and differences of their shifts.

Two finished perturbations, one per species, are joined gene by gene. A correlation of their shifts is not evidence of
conservation by itself: shifts depend on rank and coverage of a gene, and orthologs are similar in both. So the correlation is
compared with that after permuting orthologs among genes of similar rank and coverage (`matched_null`).

Letters: G pairs of orthologs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats as scipy_stats

from mixgf.arrays import Float64s
from mixgf.comparison.matched_null import (
    MIN_PAIRS,
    permutation_p,
    permute_within_bins,
    quantile_interval,
    rank_sums,
    similar_gene_bins,
)
from mixgf.config.run import Config
from mixgf.errors import UserError
from mixgf.genes import species
from mixgf.perturbation import gene_table
from mixgf.stats import rank_adjustment
from mixgf.stats.donors import MIN_BACKGROUND, MIN_CLUSTERS, benjamini_hochberg, spearman
from mixgf.storage import artifacts

LEVEL = 0.05
"""False discovery rate of the counts in the summary."""
EVIDENCE = (
    "gene", "symbol", "num_cells", "num_donors", "coverage", "mean_rank", "shift", "shift_low", "shift_high", "p_cell", "fdr_cell",
    "p_donor", "fdr_donor", "null_percentile", "rank_expected", "rank_error", "de_statistic", "warnings",
)  # fmt: skip
"""Columns of a perturbation table (after `with_errors`) that the joined table has for each species."""
FREE = 2 * MIN_BACKGROUND - 1
"""Degrees of freedom of the expectation by rank: smallest number of genes in its fit, less two parameters."""


def with_errors(genes: pd.DataFrame) -> pd.DataFrame:
    """A perturbation table with the further column `rank_error`, the standard error of `rank_expected`."""
    found = []
    for _, part in genes.sort_values("gene").groupby("operation"):
        among_G = part["reference"].to_numpy(bool) if "reference" in part else None
        error_G = rank_adjustment.expectation_error(
            part["shift"].to_numpy(float), gene_table.comparison_ranks(part["mean_rank"].to_numpy(float)), among_G
        )
        found.append(part.assign(rank_error=error_G))
    return pd.concat(found)


def pair_orthologs(
    one: pd.DataFrame,
    other: pd.DataFrame,
    partners: Mapping[str, str],
    names: tuple[str, str],
    evidence: Sequence[str] = EVIDENCE,
) -> pd.DataFrame:
    """One row per operation and pair of orthologs with cells in both perturbations; column names end in the species.

    Rows are sorted by gene, so that ties (in coverage, for example) are not broken by the order of shifts.

    Args:
        one: Table of genes of the first species' perturbation.
        other: Table of genes of the second species' perturbation.
        partners: One-to-one orthologs, first to second species.
        names: The two species.
        evidence: Columns to keep, `gene` among them.
    """
    a, b = (frame[frame["num_cells"] > 0] for frame in (one, other))
    a = a.assign(partner=a["gene"].map(partners)).dropna(subset="partner")
    columns = ["operation", *evidence]
    both = a[[*columns, "partner"]].merge(
        b[columns],
        left_on=["operation", "partner"],
        right_on=["operation", "gene"],
        suffixes=tuple(f"_{n}" for n in names),
    )
    return both.drop(columns="partner").sort_values(["operation", f"gene_{names[0]}"], ignore_index=True)


def _error(frame: pd.DataFrame, name: str) -> tuple[Float64s, Float64s]:
    """Standard error of the shifts of a species, from their t intervals, and its degrees of freedom; (G,) each."""
    donors, cells = frame[f"num_donors_{name}"].to_numpy(float), frame[f"num_cells_{name}"].to_numpy(float)
    free_G = np.where(donors >= MIN_CLUSTERS, donors, cells) - 1
    half_G = (frame[f"shift_high_{name}"] - frame[f"shift_low_{name}"]).to_numpy(float) / 2
    return half_G / scipy_stats.t.ppf(0.975, np.maximum(free_G, 1)), free_G


def compare_shifts(frame: pd.DataFrame, names: tuple[str, str]) -> pd.DataFrame:
    """Add to paired rows of one operation the difference of the two shifts and the evidence that both go towards the goal.

    Columns added:

    - `difference`, `difference_low`, `difference_high`: first less second species, with its 95 % interval from the intervals of
      both shifts (Zou and Donner 2008).
    - `p_differs`, `fdr_differs`: Welch's t test of the difference less the difference that rank predicts (`rank_expected`), since
      any perturbation may move the cells of one species more. Its error includes those of both shifts and both expectations; NaN
      without them.
    - `interval_by`: donors, or cells if a species has too few donors; intervals over cells do not cover other donors.
    - `direction`: towards (both shifts positive), away (both negative) or opposite.
    - `percentile_both`: the smaller of the two percentiles among genes of similar rank and coverage.
    - `p_both`, `fdr_both`: the larger of the two donor-level p values, since both must hold.
    - `doubts`: warnings of both species.
    - `place`: 1 = first of the rows with direction towards, by `percentile_both`, then by the smaller shift; 0 = other directions.
    """
    a, b = names
    shift_2G = [frame[f"shift_{n}"].to_numpy(float) for n in names]
    low_2G, high_2G = ([frame[f"shift_{end}_{n}"].to_numpy(float) for n in names] for end in ("low", "high"))
    (error_a, free_a), (error_b, free_b) = (_error(frame, n) for n in names)
    difference = shift_2G[0] - shift_2G[1]
    out = frame.assign(
        difference=difference,
        difference_low=difference - np.hypot(shift_2G[0] - low_2G[0], high_2G[1] - shift_2G[1]),
        difference_high=difference + np.hypot(high_2G[0] - shift_2G[0], shift_2G[1] - low_2G[1]),
    )
    excess = difference - (frame[f"rank_expected_{a}"] - frame[f"rank_expected_{b}"]).to_numpy(float)
    errors = [(error_a, free_a), (error_b, free_b), *((frame[f"rank_error_{n}"].to_numpy(float), FREE) for n in names)]
    with np.errstate(invalid="ignore", divide="ignore"):
        error = np.sqrt(sum(e**2 for e, _ in errors))
        free = error**4 / sum(e**4 / f for e, f in errors)
        p = 2 * scipy_stats.t.sf(np.abs(excess) / error, free)
    out["p_differs"], out["fdr_differs"] = p, benjamini_hochberg(p)
    replicated = (frame[[f"num_donors_{n}" for n in names]] >= MIN_CLUSTERS).all(axis=1)
    out["interval_by"] = np.where(replicated, "donors", "cells")
    towards, away = (np.logical_and(*(sign * s > 0 for s in shift_2G)) for sign in (1, -1))
    out["direction"] = np.select([towards, away], ["towards", "away"], "opposite")
    out["percentile_both"] = np.minimum(frame[f"null_percentile_{a}"], frame[f"null_percentile_{b}"])
    out["p_both"] = np.maximum(
        frame[f"p_donor_{a}"].to_numpy(float), frame[f"p_donor_{b}"].to_numpy(float)
    )  # NaN stays NaN
    out["fdr_both"] = benjamini_hochberg(out["p_both"].to_numpy(float))
    out["doubts"] = [
        "; ".join(f"{n}: {text}" for n, text in zip(names, texts, strict=True) if text)
        for texts in zip(*(frame[f"warnings_{n}"] for n in names), strict=True)
    ]
    key = np.lexsort((-np.minimum(*shift_2G), -np.nan_to_num(out["percentile_both"].to_numpy(float), nan=-1), ~towards))
    place = np.zeros(len(frame), dtype=np.int64)
    place[key[: int(towards.sum())]] = np.arange(1, int(towards.sum()) + 1)
    return out.assign(place=place).drop(columns=[f"warnings_{n}" for n in names])


def shift_similarity(
    frame: pd.DataFrame, names: tuple[str, str], num: int, rng: np.random.Generator
) -> dict[str, object]:
    """Spearman correlation of the shifts of one operation, with a bootstrap interval over genes and the matched null.

    `whole` is the correlation of the shifts themselves. The others are of residuals: shifts less their expectation by rank, then
    by coverage, in the same species. The null permutes orthologs among genes of similar rank and coverage: `null` is its mean and
    `p` the share of draws that are at least as high. Intervals over genes do not cover other donors.

    Args:
        frame: Result of `compare_shifts`.
        names: The two species.
        num: Number of bootstrap draws and of permutations.
        rng: Random numbers of both.
    """
    shift_2G = [frame[f"shift_{n}"].to_numpy(float) for n in names]
    rank_2G = [gene_table.comparison_ranks(frame[f"mean_rank_{n}"].to_numpy(float)) for n in names]
    coverage_2G = [frame[f"coverage_{n}"].to_numpy(float) for n in names]
    a_G, b_G = (_residuals(*several) for several in zip(shift_2G, rank_2G, coverage_2G, strict=True))
    bins_G = similar_gene_bins(rank_sums([rank_2G, coverage_2G]))
    value = spearman(a_G, b_G)
    draws = [spearman(a_G[rows], b_G[rows]) for rows in rng.integers(0, len(a_G), (num, len(a_G)))]
    nulls = [spearman(a_G, b_G[permute_within_bins(bins_G, rng)]) for _ in range(num)]
    low, high = quantile_interval(draws)
    null_low, null_high = quantile_interval(nulls)
    return {
        "num_genes": len(frame), "whole": spearman(*shift_2G), "spearman": value, "low": low, "high": high, "null": float(np.mean(nulls)),
        "null_low": null_low, "null_high": null_high, "p": permutation_p(value, nulls), "median_difference": float(np.median(shift_2G[0] - shift_2G[1])),
    }  # fmt: skip


def _residuals(shift_G: Float64s, *features: Float64s) -> Float64s:
    """Residuals (G,) of shifts after the expectation by each feature in turn."""
    for feature_G in features:
        shift_G = shift_G - rank_adjustment.expected_by_rank(shift_G, feature_G)
    return shift_G


def conserved(
    one: pd.DataFrame, other: pd.DataFrame, partners: Mapping[str, str], names: tuple[str, str], *, num: int, seed: int
) -> dict[str, pd.DataFrame]:
    """Tables `conserved` (one row per operation and pair, see `compare_shifts`) and `conserved_summary` (see `shift_similarity`)."""
    rows, summaries = [], []
    for number, (operation, frame) in enumerate(
        pair_orthologs(one, other, partners, names).groupby("operation", sort=True)
    ):
        rows.append(compare_shifts(frame.reset_index(drop=True), names))
        found = rows[-1]
        summary: dict[str, object] = {"operation": operation, "first": names[0], "second": names[1]}
        if len(frame) >= MIN_PAIRS:
            summary |= shift_similarity(frame, names, num, np.random.default_rng([seed, number, 95]))
        usual = found["percentile_both"] > gene_table.ORDINARY[1]
        summary |= {
            "num_pairs": len(frame), "differ": int((found["fdr_differs"] <= LEVEL).sum()), "towards": int((found["direction"] == "towards").sum()),
            "away": int((found["direction"] == "away").sum()), "unusual": int(((found["place"] > 0) & usual).sum()),
            "replicated": int(((found["place"] > 0) & (found["fdr_both"] <= LEVEL)).sum()), "by_donors": bool((found["interval_by"] == "donors").all()),
        }  # fmt: skip
        summaries.append(summary)
    return {
        "conserved": pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(),
        "conserved_summary": pd.DataFrame(summaries),
    }


def load_perturbations(config: Config) -> dict[str, pd.DataFrame]:
    """Species to the table of genes of its perturbation in `compare.responses`; empty where none is given.

    Raises:
        UserError: A perturbation is missing or unfinished, has no gene of its species, or the two have no orthologs in common.
    """
    found = {}
    for name, uri in config.compare.responses.items():
        artifacts.require(uri, "perturbation")
        frame = artifacts.read_artifact_table(uri, "genes").to_pandas()
        mine = frame[frame["species"] == name]
        if mine.empty:
            msg = f"compare.responses = {name}={uri}: its genes are of {', '.join(sorted(set(frame['species'])))}; name each perturbation after its species"
            raise UserError(msg)
        found[name] = mine
    if not found:
        return found
    one, other = found
    if pair_orthologs(found[one], found[other], ortholog_partners(config, one, other), (one, other), ("gene",)).empty:
        msg = (f"compare.responses: {' and '.join(found)} share no operation on a one-to-one ortholog; perturb the orthologs of one species' "
               "genes in the other (perturb.genes), and see vocab.orthologs")  # fmt: skip
        raise UserError(msg)
    return found


def ortholog_partners(config: Config, one: str, other: str) -> Mapping[str, str]:
    """One-to-one orthologs of two species."""
    return species.orthologs(config.vocab.orthologs).get((one, other), {})


def tables(config: Config) -> dict[str, pd.DataFrame]:
    """Tables `conserved` and `conserved_summary` of the perturbations in `compare.responses`; none where none is given."""
    both = load_perturbations(config)
    if not both:
        return {}
    (first, one), (second, other) = ((name, with_errors(genes)) for name, genes in both.items())
    partners = ortholog_partners(config, first, second)
    return conserved(one, other, partners, (first, second), num=config.compare.num_permutations, seed=config.seed)

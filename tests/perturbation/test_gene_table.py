"""The table of genes, from pairs made by hand."""

import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import scipy.stats

from mixgf.config import perturbation, run
from mixgf.corpus.reader import Corpus
from mixgf.perturbation import expression, gene_table, group_design
from mixgf.stats import rank_adjustment
from mixgf.stats.donors import sign_flip, sign_flip_power, subtract_background


def design(num_genes, donor_of, states=("start", "goal"), donors=None):
    genes = tuple(
        group_design.Target(
            gene=f"G{i:02d}", symbol=f"g{i}", species="human", tokens=(i,), coverage=0.05 if i == 1 else 1.0
        )
        for i in range(num_genes)
    )
    return group_design.Design(
        cells_N=np.arange(len(donor_of)),
        states=tuple(group_design.State(name=n, expression="", cells=np.arange(len(donor_of))) for n in states),
        targets=genes,
        donors=donors or tuple(f"d{i}" for i in range(max(donor_of) + 1)),
        donor_of=np.asarray(donor_of),
        warnings=(),
    )


def pairs_of(shift_GN, alternatives=()):
    """Every gene in every cell, gene k at rank k + 1; towards start, goal and the alternatives."""
    target, cell = np.divmod(np.arange(shift_GN.size), shift_GN.shape[1])
    towards = [np.zeros(shift_GN.size), shift_GN.ravel(), *(values.ravel() for values in alternatives)]
    return gene_table.Pairs(
        target_P=target, cell_P=cell, rank_P=target + 1, response_P=np.abs(shift_GN.ravel()), shift_SP=np.stack(towards)
    )


def table(plan, shift_GN, *, alternative=None, expressed=None, **settings):
    pairs = pairs_of(shift_GN, alternatives=[] if alternative is None else [alternative])
    chosen = run.Config(perturb=perturbation.Perturb(operations=("delete",), **settings))
    result = gene_table.build_gene_table(plan, {"delete": pairs}, expressed, chosen)
    return result.to_pandas().set_index("symbol")


def test_a_planted_gene_leads_and_repeats_over_donors_and_a_donor_s_own_gene_is_exposed():
    rng = np.random.default_rng(1)
    donor_of = np.repeat(np.arange(8), 5)
    shift = rng.normal(0, 0.01, (60, 40))
    shift[7] += 0.05
    shift[9, donor_of == 3] += 0.4  # a mean like that of g7, from one donor
    frame = table(design(60, donor_of), shift)
    assert frame.index[0] in ("g7", "g9")
    assert frame.loc["g7", "fdr_cell"] < 0.001
    assert frame.loc["g7", "p_donor"] == 2 / 2**8
    assert frame.loc["g7", "warnings"] == ""
    assert frame.loc["g7", "null_percentile"] > 98
    assert frame.loc["g9", "p_donor"] > 0.05
    assert "one donor carries it" in frame.loc["g9", "warnings"]
    assert "seen in 5.0% of cells" in frame.loc["g1", "warnings"]
    assert frame.loc["g7", "mean_rank"] == 9
    assert frame.loc["g7", "shift_minus_rank_expected"] == pytest.approx(0.05, abs=0.02)


def test_few_donors_have_no_donor_level_p_and_say_so():
    frame = table(design(20, [0, 0, 0, 1, 1, 1]), np.random.default_rng(2).normal(size=(20, 6)))
    assert frame["p_donor"].isna().all()
    assert frame["warnings"].str.contains(r"2 donor\(s\): no donor-level test").all()


def test_cells_without_a_donor_s_name_are_no_donor():
    """Six named donors agree on g3; what cells without a donor do to g5 changes its mean and no donor-level p."""
    rng = np.random.default_rng(12)
    donor_of = np.repeat(np.arange(7), 6)
    shift = rng.normal(0, 0.001, (40, 42))
    shift[3, donor_of < 6] += 0.01
    shift[5, donor_of == 6] += 0.5
    frame = table(design(40, donor_of, donors=(*"abcdef", "unknown")), shift)
    assert (frame["num_donors"] == 6).all()
    assert frame.loc["g3", "p_donor"] == 2 / 2**6
    assert frame.loc["g5", "shift"] > 0.05  # the mean is over all cells
    shift[:, donor_of == 6] = rng.normal(0, 9, (40, 6))
    other = table(design(40, donor_of, donors=(*"abcdef", "nan")), shift)
    assert (other["p_donor"].sort_index() == frame["p_donor"].sort_index()).all()
    named = table(design(40, donor_of, donors=tuple("abcdefg")), shift)
    assert (named["num_donors"] == 7).all()


def screen(rng, *, genes=150, donors=12, planted=0, effect=0.0):
    """Shifts of one screen with 3 to 12 cells of each donor.

    The effect of rank differs by donor. Cells of a donor are correlated gene by gene (sd 1 between donors). Planted effects
    are in units of this sd.
    """
    donor_of = np.repeat(np.arange(donors), rng.integers(3, 13, donors))
    slope = rng.normal(3, 1, donors)
    by_rank = np.exp(-np.arange(genes) / 40)[:, None]
    own = rng.normal(0, 1, (genes, donors))
    own[rng.choice(genes, planted, replace=False)] += effect
    mean = by_rank * slope + own
    return donor_of, mean[:, donor_of] + rng.normal(0, 0.5, (genes, len(donor_of)))


def test_null_screens_give_uniform_p_values_over_donors_and_not_over_cells():
    """A law of the whole table: rank-driven, donor-specific shifts without any gene's own effect, 8 screens."""
    rng = np.random.default_rng(13)
    p_donor, p_cell, plain = [], [], []
    for _ in range(8):
        donor_of, shift = screen(rng)
        frame = table(design(150, donor_of), shift, num_permutations=5000)
        p_donor.append(frame["p_donor"].to_numpy())
        p_cell.append(frame["p_cell"].to_numpy())
        means = np.stack([shift[:, donor_of == d].mean(axis=1) for d in range(12)], axis=1)
        plain.append(sign_flip(subtract_background(means), 5000, rng))
    p = np.concatenate(p_donor)
    assert scipy.stats.kstest(p, "uniform").pvalue > 0.01
    assert 0.04 < (p <= 0.05).mean() < 0.06
    assert (np.concatenate(p_cell) <= 0.05).mean() > 0.4  # pseudo-replication cries wolf
    assert (
        scipy.stats.kstest(np.concatenate(plain), "uniform").pvalue < 1e-6
    )  # and so does rank, unless it is subtracted


def test_donor_flips_act_on_normal_scores_of_places_among_genes_of_like_rank():
    """Skewed residuals: flips of the residuals themselves would give other p-values."""
    rng = np.random.default_rng(23)
    donor_of = np.repeat(np.arange(6), 4)
    shift = rng.lognormal(0, 1.5, (80, 6))[:, donor_of] + rng.normal(0, 0.01, (80, 24))
    frame = table(design(80, donor_of), shift)
    rank = gene_table.comparison_ranks(np.arange(2.0, 82))
    means = np.stack([shift[:, donor_of == d].mean(axis=1) for d in range(6)], axis=1)
    residual = rank_adjustment.residual_after_rank(means, rank)
    expected, plain = (
        sign_flip(values, 10_000, rng) for values in (rank_adjustment.normal_scores(residual, rank), residual)
    )
    found = frame.loc[[f"g{g}" for g in range(80)], "p_donor"].to_numpy()
    assert found == pytest.approx(expected)
    assert np.abs(found - plain).max() > 0.1


def test_num_permutations_bounds_the_flips_and_no_drawn_p_is_0():
    donor_of = np.repeat(np.arange(12), 2)
    shift = np.random.default_rng(24).normal(0, 0.01, (40, 24))
    shift[::2] += 1.0
    shift[1::2] -= 1.0
    for number in (100, 1000):  # fewer than 2 ** 12 patterns: they are drawn
        p = table(design(40, donor_of), shift, num_permutations=number)["p_donor"].to_numpy()
        assert p * (number + 1) == pytest.approx(np.round(p * (number + 1)))
        assert p.min() == pytest.approx(1 / (number + 1))
    exact = table(design(40, donor_of), shift, num_permutations=4096)["p_donor"].to_numpy()
    assert exact.min() == pytest.approx(2 / 4096)


@pytest.mark.parametrize("donors", [3, 4, 6, 8])
def test_with_few_donors_p_values_are_never_too_small(donors):
    rng = np.random.default_rng([14, donors])
    p = np.concatenate(
        [
            table(design(150, donor_of), shift)["p_donor"].to_numpy()
            for donor_of, shift in (screen(rng, donors=donors) for _ in range(6))
        ]
    )
    assert p.min() >= 2 / 2**donors
    for level in (0.05, 0.25, 0.5):
        assert (p <= level).mean() < level + 0.04


@pytest.mark.parametrize(("donors", "effect"), [(6, 2.0), (8, 1.5), (12, 1.0)])
def test_the_stated_power_is_reached_in_whole_screens(donors, effect):
    rng = np.random.default_rng([15, donors])
    found = []
    for _ in range(8):
        before = rng.bit_generator.state
        donor_of, shift = screen(rng, donors=donors, genes=400, planted=10, effect=effect)
        replay = np.random.default_rng()
        replay.bit_generator.state = before
        replay.integers(3, 13, donors), replay.normal(3, 1, donors), replay.normal(0, 1, (400, donors))
        planted = replay.choice(400, 10, replace=False)
        frame = table(design(400, donor_of), shift, num_permutations=5000)
        found += (frame.loc[[f"g{g}" for g in planted], "p_donor"] <= 0.05).tolist()
    # cells add a little noise to donors' means, and neighbours to the expectation: a little less than the formula says
    assert np.mean(found) == pytest.approx(sign_flip_power(donors, effect), abs=0.12)


def test_calibration_shows_what_each_test_says_of_exchanged_genes():
    rng = np.random.default_rng(16)
    donor_of, shift = screen(
        rng, planted=75, effect=6.0
    )  # half of all genes have an effect: observed p are far from uniform
    plan = design(150, donor_of)
    target, cell = np.divmod(np.arange(shift.size), len(donor_of))
    pairs = gene_table.Pairs(
        target_P=target, cell_P=cell, rank_P=target + 1, response_P=np.abs(shift.ravel()),
        shift_SP=np.stack([np.zeros(shift.size), shift.ravel()]),
    )  # fmt: skip
    chosen = run.Config(perturb=perturbation.Perturb(operations=("delete",)))
    nulls = gene_table.calibrate_tests(plan, {"delete": pairs}, chosen).to_pandas()
    observed = gene_table.build_gene_table(plan, {"delete": pairs}, None, chosen).to_pandas()
    assert (observed["p_donor"] <= 0.01).mean() > 0.4
    assert len(nulls) == 8 * 150
    assert 0.03 < (nulls["p_donor"] <= 0.05).mean() < 0.08
    assert (nulls["p_cell"] <= 0.05).mean() > 0.3
    two = gene_table.calibrate_tests(design(150, donor_of % 2), {"delete": pairs}, chosen)
    assert two.num_rows == 0


def test_a_gene_that_no_cell_holds_is_compared_with_others_like_it():
    """Inserted genes without a rank: ten stand after all others, and the one that moves cells most is unusual among them."""
    plan = design(40, [0, 1, 2])
    rng = np.random.default_rng(18)
    shift = rng.normal(0, 0.01, (40, 3))
    shift[35] += 1
    target, cell = np.divmod(np.arange(120), 3)
    pairs = gene_table.Pairs(
        target_P=target, cell_P=cell, rank_P=np.where(target < 30, target, -1), response_P=np.abs(shift.ravel()),
        shift_SP=np.stack([np.zeros(120), shift.ravel()]),
    )  # fmt: skip
    chosen = run.Config(perturb=perturbation.Perturb(operations=("overexpress",)))
    frame = gene_table.build_gene_table(plan, {"overexpress": pairs}, None, chosen).to_pandas().set_index("symbol")
    assert np.isnan(frame.loc["g35", "mean_rank"])
    assert frame.loc["g35", "null_percentile"] == 100
    assert np.isfinite(frame.loc["g35", "rank_expected"])


def test_orthologs_stand_beside_their_genes():
    plan = design(12, [0, 1, 2])
    named = group_design.Target(gene="ENSG00000118515", symbol="SGK1", species="human", tokens=(3,), coverage=1.0)
    pair = group_design.Target(
        gene="ENSG00000118515+ENSG00000118785", symbol="SGK1+SPP1", species="human", tokens=(3, 4), coverage=1.0
    )
    plan = dataclasses.replace(plan, targets=(named, pair, *plan.targets[2:]))
    frame = table(plan, np.random.default_rng(17).normal(size=(12, 3)))
    assert frame.loc["SGK1", ["ortholog", "ortholog_symbol"]].tolist() == ["ENSMUSG00000019970", "Sgk1"]
    assert frame.loc["SGK1+SPP1", "ortholog"] == ""


def test_paper_mode_is_the_published_test():
    shift = np.random.default_rng(3).normal(size=(15, 6))
    frame = table(design(15, [0, 1, 2, 0, 1, 2]), shift, test="published")
    for g in range(15):
        expected = scipy.stats.ranksums(shift[g], shift.ravel()).pvalue
        assert frame.loc[f"g{g}", "p_cell"] == pytest.approx(expected, rel=1e-9)
    honest = table(design(15, [0, 1, 2, 0, 1, 2]), shift)
    assert honest.loc["g4", "p_cell"] == pytest.approx(
        scipy.stats.mannwhitneyu(
            shift[4], np.delete(shift, 4, axis=0).ravel(), method="asymptotic", use_continuity=False
        ).pvalue,
        rel=1e-9,
    )


def test_the_universal_response_is_subtracted_and_named():
    rng = np.random.default_rng(4)
    shift = rng.normal(0.1, 0.001, (15, 6))
    plan = design(15, [0, 1, 2, 0, 1, 2], states=("start", "goal", "alternative_0"))
    frame = table(plan, shift, alternative=shift - 0.01)
    assert frame["shift_minus_alternatives"].to_numpy() == pytest.approx(0.01)
    assert frame["warnings"].str.contains("moves cells towards the other states as well").all()


def test_a_gene_without_cells_has_no_figures():
    plan = design(12, [0, 1, 2])
    values = np.random.default_rng(5).normal(size=33)
    pairs = gene_table.Pairs(
        target_P=np.repeat(np.arange(11), 3), cell_P=np.tile(np.arange(3), 11), rank_P=np.repeat(np.arange(11), 3),
        response_P=values, shift_SP=np.stack([values, values]),
    )  # fmt: skip
    chosen = run.Config(perturb=perturbation.Perturb(operations=("delete",)))
    frame = gene_table.build_gene_table(plan, {"delete": pairs}, None, chosen).to_pandas()
    last = frame.iloc[-1]
    assert (last["symbol"], last["num_cells"], last["warnings"]) == ("g11", 0, "in no sentence: not scored")
    assert last[["shift", "p_cell", "fdr_cell", "p_donor"]].isna().all()
    assert frame.iloc[:-1]["p_cell"].notna().all()


def test_rank_scores_by_hand_and_their_welch_t(make_corpus):
    corpus = Corpus(make_corpus([4, 2, 3, 4, 4], [0] * 5, [5], genes=5, names=("human",)))
    scores = np.zeros((5, corpus.vocabulary.size))
    for cell in range(5):
        sentence = corpus.tokens([cell])[0].tolist()
        for rank, token in enumerate(sentence):
            scores[cell, token] = 1 - rank / len(sentence)
    found = expression.of_ranks(corpus, np.array([0, 1]), np.array([2, 3, 4]), block=2)
    assert found.covariance_SV is None
    plan = group_design.Design(
        cells_N=np.arange(2), states=design(1, [0, 0]).states, donors=("d",), donor_of=np.zeros(5, int), warnings=(),
        targets=tuple(
            group_design.Target(gene=f"G{t}", symbol=f"g{t}", species="human", tokens=tokens, coverage=1.0)
            for t, tokens in enumerate([(3,), (4,), (5,), (6,), (7,), (3, 4)])
        ),
    )  # fmt: skip
    frame = table(plan, np.random.default_rng(6).normal(size=(6, 2)), expressed=found)
    for g, token in enumerate((3, 4, 5, 6, 7)):
        expected = scipy.stats.ttest_ind(scores[2:, token], scores[:2, token], equal_var=False).statistic
        assert frame.loc[f"g{g}", "de_statistic"] == pytest.approx(0 if np.isnan(expected) else expected, rel=1e-9)
        fold = np.log2((scores[2:, token].mean() + 0.01) / (scores[:2, token].mean() + 0.01))
        assert frame.loc[f"g{g}", "de_log_fold"] == pytest.approx(fold)
    assert "covariance" not in frame
    assert np.isnan(frame.loc["g5", "de_statistic"])  # a set has no expression of its own


def test_state_sums_merge_by_donor():
    part = {"state": [0, 0, 1], "donor": [0, 1, 0], "num_cells": [2, 1, 1], "sum": [[2.0, 4.0], [3.0, 3.0], [9.0, 0.0]]}
    means, states = gene_table.state_means([pa.table(part), pa.table({k: v[:1] for k, v in part.items()})], 2)
    assert means.tolist() == [[7 / 5, 11 / 5], [9.0, 0.0]]
    assert states.to_pylist()[1] == {"state": 0, "donor": 0, "num_cells": 4, "vector": [1.0, 2.0]}


def test_chosen_genes_are_compared_with_drawn_ones_and_keep_the_places_that_they_have_among_all():
    """Of 1,000 genes without effects the 50 largest shifts are chosen: among each other they would look ordinary."""
    rng = np.random.default_rng(21)
    donor_of, shift = screen(rng, genes=1000, donors=8)
    plan = design(1000, donor_of)
    every = table(plan, shift)
    assert every["reference"].all()
    own = shift.mean(axis=1) - np.exp(-np.arange(1000) / 40) * 3
    chosen = np.argsort(-own)[:50]
    drawn = rng.choice(1000, 150, replace=False)
    kept = np.union1d(chosen, drawn)
    marked = dataclasses.replace(
        plan, targets=tuple(dataclasses.replace(t, drawn=k in drawn) for k, t in enumerate(plan.targets))
    )
    pairs = {"delete": pairs_of(shift)}
    few_plan, few = gene_table.keep_targets(marked, pairs, kept)
    chosen_config = run.Config(perturb=perturbation.Perturb(operations=("delete",)))
    frame = (
        gene_table.build_gene_table(few_plan, few, None, chosen_config, num_tests=1000).to_pandas().set_index("symbol")
    )
    names = [f"g{k}" for k in chosen]
    assert frame["reference"].sum() == 150
    assert np.abs(frame.loc[names, "null_percentile"] - every.loc[names, "null_percentile"]).mean() < 6
    assert np.abs(frame.loc[names, "rank_expected"] - every.loc[names, "rank_expected"]).median() < 0.25
    plain_plan, plain = gene_table.keep_targets(plan, pairs, np.sort(chosen))
    among = gene_table.build_gene_table(plain_plan, plain, None, chosen_config).to_pandas().set_index("symbol")
    assert np.abs(among.loc[names, "null_percentile"] - every.loc[names, "null_percentile"]).mean() > 25
    assert (frame["fdr_donor"] >= np.minimum(1, frame["p_donor"] * 1000 / len(frame)) - 1e-12).all()
    assert (frame["fdr_donor"] > 0.05).all()  # all thousand count as tests
    nulls = gene_table.calibrate_tests(few_plan, few, chosen_config)
    assert nulls.num_rows % 150 == 0


def test_named_genes_are_compared_with_their_nulls_and_not_with_each_other():
    rng = np.random.default_rng(22)
    shift = rng.normal(0, 0.01, (60, 24))
    shift[::2] += 1.0
    plan = design(60, np.repeat(np.arange(6), 4))
    targets = tuple(dataclasses.replace(t, null=k % 2 == 1, drawn=k % 2 == 1) for k, t in enumerate(plan.targets))
    frame = table(dataclasses.replace(plan, targets=targets), shift)
    asked = frame[frame["role"] == "target"]
    assert len(asked) == 30
    found = asked["null_percentile"].dropna()
    assert len(found) >= 24  # all but those of the first ranks, where no null is like them
    assert (found == 100).all()
    assert (asked["p_donor"] == 2 / 2**6).all()
    assert asked["fdr_donor"].tolist() == pytest.approx([2 / 2**6] * 30)
    few = tuple(dataclasses.replace(t, null=k >= 50, drawn=k >= 50) for k, t in enumerate(plan.targets))
    assert table(dataclasses.replace(plan, targets=few), shift)[
        "reference"
    ].all()  # ten genes are too few for a comparison

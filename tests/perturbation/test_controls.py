"""Negative controls: false goals, and an error rate of hits that holds where all donors share one encoder."""

import sys

import numpy as np
import pytest

from mixgf.config import perturbation, run
from mixgf.perturbation import controls, gene_table, group_design, sampling, screen_selection
from mixgf.stats import rank_adjustment

LAWS = {
    "normal": lambda rng, shape: rng.normal(0, 1, shape),
    "heavy tails": lambda rng, shape: rng.standard_t(3, shape),
    "skewed": lambda rng, shape: rng.lognormal(0, 1, shape) - np.exp(0.5),
}
GENES, PLANTED = 200, 20


def test_halves_are_of_donors_where_there_are_six_and_differ():
    cells = np.arange(0, 120, 2)
    donor_of = np.arange(120) // 2 % 6
    found = controls.halves(cells, donor_of, np.arange(6), 3)
    assert len(found) == controls.NUM_FALSE
    splits = {frozenset([frozenset(donor_of[half]), frozenset(range(6)) - frozenset(donor_of[half])]) for half in found}
    assert len(splits) == 10  # all ways to halve six donors
    for half in found:
        assert len(half) == 30
        assert len(np.unique(donor_of[half])) == 3
    of_cells = controls.halves(cells, donor_of, np.arange(5), 3)  # the sixth has no name
    assert all(len(half) == 30 for half in of_cells)
    assert len(np.unique(donor_of[of_cells[0]])) == 6
    assert controls.halves(cells[:9], donor_of, np.arange(6), 3) == []


def test_a_false_goal_lies_where_its_half_points_as_far_away_as_the_goal():
    vectors = np.random.default_rng(1).normal(size=(10, 4))
    half = np.arange(4)
    means = np.stack([vectors.mean(axis=0), np.full(4, 9.0), vectors[half].mean(axis=0)])
    placed = controls.place_false_goals(means, ["start", "goal", "false_goal_0"], np.array([10, 5, 4]))
    assert (placed[:2] == means[:2]).all()
    away = placed[2] - means[0]
    apart = vectors[half].mean(axis=0) - vectors[4:].mean(axis=0)
    assert away @ apart == pytest.approx(np.linalg.norm(away) * np.linalg.norm(apart))
    assert np.linalg.norm(away) == pytest.approx(np.linalg.norm(means[1] - means[0]))
    assert (controls.place_false_goals(means[::2], ["start", "false_goal_0"], np.array([10, 4])) == means[::2]).all()


def test_null_p_by_hand():
    null = np.array([[1.0, np.nan], [-2.6, 3.0], [0.5, 4.0], [-1.0, 2.0], [-3.0, 10.0]])
    null = np.concatenate([null, np.linspace(-0.1, 0.1, 40).reshape(20, 2)])
    own = np.concatenate([[3.5, -2.5, np.nan, 0.0, 9.0], np.zeros(20)])
    p = rank_adjustment.null_p_values(own, null)
    assert p[0] == pytest.approx(2 * (1 + 2) / (1 + 48))  # 4 and 10 are beyond
    assert p[1] == pytest.approx(2 * (1 + 1) / (1 + 47))  # -3 is beyond; the gene's own -2.6 does not count
    assert np.isnan(p[2])
    assert p[3] == pytest.approx(2 * (1 + 22) / (1 + 47))  # below 0: 20, -2.6 and -3
    assert p[4] == pytest.approx(2 / (1 + 47))  # its own 10 does not count; p is never 0
    assert np.isnan(rank_adjustment.null_p_values(own[:5], null[:5])).all()  # too few to tell


def invented(rng, law, donors, *, planted=False):
    """The effects of a screen: what a gene does is the same in all donors, and means nothing unless it is planted.

    Every gene has an effect of its own towards every state, drawn by one law. Donors add their own, cells theirs.
    """
    states = 1 + controls.NUM_FALSE
    donor_of = np.repeat(np.arange(donors), 5)
    by_rank = 3 * np.exp(-np.arange(GENES) / 40)[:, None]
    own_GS = LAWS[law](rng, (GENES, states))
    if planted:
        own_GS[rng.choice(GENES, PLANTED, replace=False), 0] += 12 * np.median(np.abs(own_GS))
    donor_GDS = by_rank[:, :, None] * rng.normal(1, 0.2, (1, donors, states)) + rng.normal(
        0, 0.5, (GENES, donors, states)
    )
    shift_SGN = np.moveaxis((own_GS[:, None] + donor_GDS)[:, donor_of], 2, 0) + rng.normal(
        0, 0.5, (states, GENES, len(donor_of))
    )
    halves = tuple(
        group_design.State(name=f"{controls.FALSE}{i}", expression="", cells=np.arange(2))
        for i in range(controls.NUM_FALSE)
    )
    target, cell = np.divmod(np.arange(GENES * len(donor_of)), len(donor_of))
    towards = [np.zeros(target.size), *(one.ravel() for one in shift_SGN)]
    pairs = gene_table.Pairs(
        target_P=target, cell_P=cell, rank_P=target + 1, response_P=np.abs(towards[1]), shift_SP=np.stack(towards)
    )
    plan = group_design.Design(
        cells_N=np.arange(len(donor_of)),
        states=tuple(group_design.State(name=n, expression="", cells=np.arange(2)) for n in ("start", "goal")),
        targets=tuple(
            group_design.Target(gene=f"G{i:03d}", symbol=f"g{i}", species="human", tokens=(i,), coverage=1.0)
            for i in range(GENES)
        ),
        donors=tuple(f"d{i}" for i in range(donors)),
        donor_of=donor_of,
        warnings=(),
        halves=halves,
    )
    return plan, pairs, own_GS[:, 0]


def hits_of(plan, pairs):
    """Numbers of the genes that the rule of today calls, and of those that only repeat and are unusual."""
    chosen = run.Config(perturb=perturbation.Perturb(operations=("delete",), num_permutations=5000))
    frame = gene_table.build_gene_table(plan, {"delete": pairs}, None, chosen).to_pandas()
    low, high = gene_table.ORDINARY
    repeats = (frame["fdr_donor"] <= 0.05) & ((frame["null_percentile"] < low) | (frame["null_percentile"] > high))
    number = frame["symbol"].str[1:].astype(int)
    return set(number[frame["hit"]]), set(number[repeats]), int(frame["hit_false_goal"].sum())


def simulate(law, donors, screens, seed):
    """Share of screens with a false hit, of genes that are called, of genes that were called before; hits of the control."""
    rng = np.random.default_rng([seed, donors, sorted(LAWS).index(law)])
    found = [hits_of(*invented(rng, law, donors)[:2]) for _ in range(screens)]
    number = screens * GENES
    return (
        float(np.mean([bool(now) for now, _, _ in found])),
        sum(len(now) for now, _, _ in found) / number,
        sum(len(before) for _, before, _ in found) / number,
        sum(control for _, _, control in found) / number,
    )


def test_genes_drawn_for_comparison_must_be_exceeded_as_well():
    fdr, percentile = np.array([0.01, 0.01, 0.01, 0.2, np.nan]), np.array([99.0, 1.0, 50.0, 99.0, 99.0])
    drawn = np.array([True, False, True, True, True])
    assert gene_table.is_hit(fdr, fdr, percentile, drawn).tolist() == [True, True, False, False, False]
    assert gene_table.is_hit(fdr, fdr, percentile, np.ones(5, bool)).tolist() == [True, True, True, False, False]
    assert not gene_table.is_hit(fdr, fdr + 0.1, percentile, drawn).any()
    assert not gene_table.is_hit(fdr + 0.1, fdr, percentile, drawn).any()


def test_effects_that_repeat_but_mean_nothing_are_no_hits_and_planted_ones_are():
    screens, genes, before, control = simulate("skewed", 8, 6, 1)
    assert before > 0.03  # they repeat, and 5 % of genes are always unusual
    assert screens <= 1 / 6
    assert max(genes, control) < 0.005
    plan, pairs, own = invented(np.random.default_rng(2), "normal", 8, planted=True)
    called, _, _ = hits_of(plan, pairs)
    real = set(np.flatnonzero(own > 5).tolist())
    assert len(called & real) > 0.7 * len(real) > 10
    assert len(called - real) <= 2


@pytest.mark.slow
@pytest.mark.parametrize("donors", [6, 8, 12])
@pytest.mark.parametrize("law", LAWS)
def test_false_hits_are_as_rare_as_stated_where_donors_share_one_encoder(law, donors):
    """Nine settings of 40 screens. The binomial's 99.9 % above a chance of 5 % for a screen with any false hit is 7 of 40."""
    screens, genes, before, control = simulate(law, donors, 40, 3)
    said = f"before {before:.1%} of genes, now {genes:.2%}; {screens:.0%} of screens with any; control {control:.2%}"
    sys.stdout.write(f"{law}, {donors} donors: {said}\n")
    assert screens <= 7 / 40
    assert max(genes, control) <= 0.005


def test_survivors_of_a_screen_are_not_biased_where_other_cells_are_reported():
    """The best tenth by the estimates of some cells: their mean in the same cells is too high, in the others it is right."""
    rng = np.random.default_rng(5)
    biased, fair = [], []
    for draw in range(60):
        true_K = rng.normal(0, 1, 300)
        cells, donor_of = np.arange(24), np.arange(24) % 4
        shift_KN = true_K[:, None] + rng.normal(0, 4, (300, 24))
        reported, screened = sampling.split_cells(cells, donor_of, draw)
        assert np.array_equal(np.union1d(reported, screened), cells)
        assert np.bincount(donor_of[reported]).tolist() == [3, 3, 3, 3]
        estimate_K = shift_KN[:, screened].mean(axis=1)
        features = np.stack([np.arange(300.0), np.ones(300)], axis=1)
        best = screen_selection.choose_shortlist(
            estimate_K[None], features, top=30, sample=0, nulls=0, direction="towards", rng=rng
        ).top
        biased.append((estimate_K[best] - true_K[best]).mean())
        fair.append((shift_KN[best][:, reported].mean(axis=1) - true_K[best]).mean())
    assert np.mean(biased) > 0.5
    assert abs(np.mean(fair)) < 4 * np.std(fair) / np.sqrt(60)

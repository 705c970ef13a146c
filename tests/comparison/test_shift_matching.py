"""Laws of model matching: shifts and cosines worked by hand, p-values that are uniform where nothing is there."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mixgf.comparison import shift_matching
from mixgf.comparison.shift_matching import Shift
from mixgf.comparison.shift_selection import _experiments


def shift(name, species, rows, after, *, strata=None, tag="", experiment=""):
    rows = np.asarray(rows, dtype=np.int64)
    return Shift(name=name, tag=tag, species=species, experiment=experiment or name, rows_N=rows, after_N=np.asarray(after, dtype=bool),
                 strata_N=np.zeros(len(rows), dtype=np.int64) if strata is None else np.asarray(strata, dtype=np.int64))  # fmt: skip


def test_a_shift_within_strata_by_hand():
    """Two strata: (1 before, 1 after) differs by 2, (2 before, 2 after) by 5; weights 1/2 and 1 give (1 + 5) / 1.5 = 4."""
    after, strata = np.array([0, 1, 0, 0, 1, 1], bool), np.array([0, 0, 1, 1, 1, 1])
    values = np.array([10.0, 12, 0, 2, 5, 7])
    assert shift_matching.contrast_weights(after, strata) @ values == pytest.approx((0.5 * 2 + 1 * 5) / 1.5)


def test_a_change_of_composition_is_no_shift():
    """Type 0 lies at 0, type 1 at 9; only their numbers change."""
    strata = np.array([0, 0, 0, 1, 0, 1, 1, 1])
    after = np.array([0, 0, 0, 0, 1, 1, 1, 1], bool)
    values = 9.0 * strata
    assert shift_matching.contrast_weights(after, strata) @ values == pytest.approx(0)
    assert shift_matching.contrast_weights(after, np.zeros(8, np.int64)) @ values == pytest.approx(4.5)


def test_a_constant_of_the_species_cancels():
    rng = np.random.default_rng(0)
    vectors, after = rng.normal(size=(40, 5)), np.arange(40) % 2 == 1
    weights = shift_matching.contrast_weights(after, np.zeros(40, np.int64))
    np.testing.assert_allclose(weights @ (vectors + 100), weights @ vectors, atol=1e-10)


def test_cosines_by_hand_and_over_columns_that_both_have_seen():
    one, two = np.array([[3.0, 4, 7]]), np.array([[4.0, 3, 0], [0, 0, 1]])
    seen = np.array([[True, True, False]]), np.array([[True, True, True], [True, True, False]])
    np.testing.assert_allclose(shift_matching.cosines(one[:, :2], two[:, :2]), [[24 / 25, 0]])
    np.testing.assert_allclose(
        shift_matching.cosines(one, two, *seen), [[24 / 25, 0]]
    )  # the second has nothing in common


def test_the_smallest_p_is_that_of_all_labellings():
    """Strata of 2 (1 after) and 4 (2 after) have 2 x 6 = 12 labellings."""
    after, strata = np.array([0, 1, 0, 0, 1, 1], bool), np.array([0, 0, 1, 1, 1, 1])
    assert shift_matching.smallest_p(after, strata, 999) == pytest.approx(1 / 12)
    assert shift_matching.smallest_p(after, strata, 9) == 0.1


def test_labels_are_exchanged_within_strata_only():
    after, strata = np.array([0, 1, 0, 0, 1, 1], bool), np.array([0, 0, 1, 1, 1, 1])
    weights = shift_matching.contrast_weights(after, strata)
    drawn = shift_matching.permuted_weights(weights, strata, 200, np.random.default_rng(0))
    for s in (0, 1):
        np.testing.assert_allclose(np.sort(drawn[:, strata == s]), np.tile(np.sort(weights[strata == s]), (200, 1)))
    assert len(np.unique(drawn.round(9), axis=0)) == 12


def two_species(rng, effect_one, effect_two, num=40, width=30):
    """Two species with offsets of their own; columns vary by very different amounts, as those of an encoder do."""
    spread = np.exp(rng.normal(size=width))
    vectors = rng.normal(size=(2 * num, width)) * spread
    after = np.arange(num) % 2 == 1
    vectors[:num][after] += effect_one
    vectors[num:][after] += effect_two
    vectors[num:] += 50
    return [shift("s1", "human", np.arange(num), after), shift("s2", "mouse", num + np.arange(num), after)], vectors


def test_p_is_uniform_where_one_species_has_no_shift_and_never_too_small():
    """The other species' shift is real, which is the case in which exchanging both labels at once would fail."""
    rng, p_one, p_both = np.random.default_rng(1), [], []
    for seed in range(200):
        shifts, vectors = two_species(rng, 0, 3 * rng.normal(size=30))
        pairs, _ = shift_matching.match(shifts, vectors, num_permutations=99, seed=seed)
        p_one.append(pairs["p_shift"].iloc[0])
        p_both.append(pairs["p"].iloc[0])
    assert stats.kstest(p_one, "uniform").pvalue > 0.01
    assert np.mean(np.array(p_both) <= 0.05) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 200)


def test_the_same_shift_in_both_species_is_found_and_an_opposite_one_is_not():
    rng = np.random.default_rng(2)
    effect = 2 * rng.normal(size=30)
    shifts, vectors = two_species(rng, effect, effect)
    pairs, table = shift_matching.match(shifts, vectors, num_permutations=99, seed=0)
    row = pairs.iloc[0]
    assert row["p"] == row["smallest_p"] == row["fdr"] == 0.01
    assert row["low"] < row["cosine"] <= 1
    assert (table["reliability"] > 0.5).all()
    shifts, vectors = two_species(rng, effect, -effect)
    assert shift_matching.match(shifts, vectors, num_permutations=99, seed=0)[0].iloc[0]["p"] == 1


@pytest.mark.parametrize("real", ["human", "mouse"])
def test_the_p_of_a_pair_is_the_larger_of_both_sides(real):
    """A match needs a shift in either species: one that is real cannot carry one that is not, whichever it is."""
    rng, larger = np.random.default_rng(5), []
    for seed in range(12):
        effect = 3 * rng.normal(size=30)
        shifts, vectors = two_species(rng, *((effect, 0) if real == "human" else (0, effect)))
        row = shift_matching.match(shifts, vectors, num_permutations=99, seed=seed)[0].iloc[0]
        assert row["p"] == max(row["p_shift"], row["p_other"])
        larger.append(row["p"] - min(row["p_shift"], row["p_other"]))
    assert max(larger) > 0.2


def test_an_interval_counts_columns_that_both_species_have_seen():
    """What stands in a column that one species has not seen moves neither the cosine nor its interval."""
    rng = np.random.default_rng(6)
    effect = 2 * rng.normal(size=30)
    shifts, vectors = two_species(rng, effect, effect)
    seen = np.ones((2, 30), dtype=bool)
    seen[0, :5], seen[1, 5:8] = False, False
    loud = vectors.copy()
    loud[:, :8] += 1000 * rng.normal(size=(len(vectors), 8))
    columns = ["cosine", "low", "high"]
    rows = [
        shift_matching.match(shifts, cells, num_permutations=19, seed=0, seen_KD=seen)[0].iloc[0][columns]
        for cells in (vectors, loud)
    ]
    assert rows[0].to_numpy(float) == pytest.approx(rows[1].to_numpy(float), abs=1e-4)
    both = shift_matching.match(shifts, vectors[:, 8:], num_permutations=19, seed=0)[0].iloc[0][columns]
    assert rows[0].to_numpy(float) == pytest.approx(both.to_numpy(float), abs=1e-4)
    assert rows[0]["low"] > 0.3


def test_halves_of_one_condition_do_not_repeat():
    rng = np.random.default_rng(3)
    shifts, vectors = two_species(rng, 0, 0, num=400)
    _, table = shift_matching.match(shifts, vectors, num_permutations=19, seed=0)
    assert (table["reliability"].abs() < 0.4).all()


def frame(cosine, tags, other_tags, experiments=None):
    of = list(range(len(other_tags))) if experiments is None else experiments
    return pd.DataFrame([
        {"species": "human", "shift": f"h{i}", "tag": a, "other_species": "mouse", "other_shift": f"m{j}", "other_tag": b,
         "other_experiment": f"e{of[j]}", "cosine": cosine[i][j]}
        for i, a in enumerate(tags) for j, b in enumerate(other_tags)
    ])  # fmt: skip


def test_tags_together_by_hand():
    """Same-tag cosines .9 and .1; others .5 and .3: of four comparisons .9 wins two and .1 none, so AUROC is .5."""
    found = shift_matching.tag_agreement(
        frame([[0.9, 0.5], [0.3, 0.1]], ["x", "y"], ["x", "y"]), num_permutations=199, seed=0
    )
    every = found.set_index("tag").loc["all"]
    assert (every["num_pairs"], every["num_others"], every["auroc"]) == (2, 2, 0.5)
    assert found.set_index("tag").loc["x", "auroc"] == 1
    assert 0.3 < every["smallest_p"] < 0.7  # two exchanges, one of which leaves the tags as they are


def test_untagged_shifts_take_no_part_in_tags():
    found = shift_matching.tag_agreement(
        frame([[0.9, 0.5], [0.3, 0.1]], ["x", ""], ["x", ""]), num_permutations=9, seed=0
    )
    assert found.empty  # one pair of a tag, none of two


def test_shifts_of_one_experiment_keep_one_tag():
    """Two shifts a tag, of one experiment each: 2 of the 2! orders of experiments differ, not 4! / (2! 2!) of shifts."""
    cosine = [[0.9, 0.8, 0.1, 0.2], [0.1, 0.1, 0.9, 0.8]]
    found = shift_matching.tag_agreement(
        frame(cosine, ["x", "y"], ["x", "x", "y", "y"], [0, 0, 1, 1]), num_permutations=199, seed=0
    ).set_index("tag")
    assert (found.loc["all", "auroc"], found.loc["all", "num_experiments"]) == (1, 2)
    assert 0.4 < found.loc["all", "p"] < 0.6
    assert 0.4 < found.loc["all", "smallest_p"] < 0.6
    alone = shift_matching.tag_agreement(frame(cosine, ["x", "y"], ["x", "x", "y", "y"]), num_permutations=199, seed=0)
    assert alone.set_index("tag").loc["all", "p"] < 0.25


def test_p_of_tags_is_right_where_shifts_of_a_tag_share_an_experiment():
    """Nothing matches, but shifts of one experiment have a nuisance in common. Permuted shifts reject in over 10 %."""
    tags, rng, p_experiments, p_shifts = np.repeat(list("abcd"), 3), np.random.default_rng(0), [], []
    for seed in range(200):
        one, two = ((rng.normal(size=(4, 20))[np.repeat(range(4), 3)] + rng.normal(size=(12, 20))) for _ in range(2))
        cosine = shift_matching.cosines(one, two)
        for experiments, found in ((np.repeat(range(4), 3), p_experiments), (None, p_shifts)):
            table = shift_matching.tag_agreement(frame(cosine, tags, tags, experiments), num_permutations=99, seed=seed)
            found.append(table.set_index("tag").loc["all", "p"])
    assert np.mean(np.array(p_experiments) <= 0.05) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 200)
    assert np.mean(np.array(p_shifts) <= 0.05) > 0.1


def test_shifts_that_share_a_data_set_are_of_one_experiment():
    assert _experiments([["a", "b"], ["c"], ["b", "d"], ["c"]]) == ["a", "c", "a", "c"]

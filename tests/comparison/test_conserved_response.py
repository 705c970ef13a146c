"""Laws of conserved responses and gene networks: cases worked by hand, planted effects, and nulls that find nothing."""

import numpy as np
import pandas as pd
import pytest

from mixgf.comparison import conserved_response, gene_networks, matched_null

NAMES = ("ant", "bee")


def table(shifts, *, prefix, half=0.1, donors=4, operation="delete", rank=None, percentile=50.0, p=0.5):
    num = len(shifts)
    shifts = np.asarray(shifts, dtype=float)
    return pd.DataFrame({
        "operation": operation, "gene": [f"{prefix}{i}" for i in range(num)], "symbol": [f"{prefix.lower()}{i}" for i in range(num)],
        "num_cells": 20, "num_donors": donors, "coverage": 0.5, "mean_rank": np.arange(1, num + 1) if rank is None else rank, "shift": shifts,
        "shift_low": shifts - half, "shift_high": shifts + half, "p_cell": p, "fdr_cell": p, "p_donor": p, "fdr_donor": p,
        "null_percentile": percentile, "rank_expected": 0.0, "rank_error": 0.0, "de_statistic": 0.0, "warnings": "",
    })  # fmt: skip


def partners(num):
    return {f"A{i}": f"B{i}" for i in range(num)}


def test_only_orthologs_that_both_scored_under_one_operation_are_paired():
    a, b = table([1, 2, 3], prefix="A"), table([5, 6, 7], prefix="B")
    b.loc[1, "num_cells"] = 0
    found = conserved_response.pair_orthologs(a, b, {"A0": "B2", "A1": "B1", "A2": "B9"}, NAMES)
    assert found[["gene_ant", "gene_bee", "shift_ant", "shift_bee"]].values.tolist() == [["A0", "B2", 1.0, 7.0]]
    assert conserved_response.pair_orthologs(a, b.assign(operation="overexpress"), partners(3), NAMES).empty


def test_a_difference_has_the_interval_of_both_and_what_rank_predicts_is_no_finding():
    frame = conserved_response.pair_orthologs(
        table([0.5, 0.1, 0.1, 0.1, 0.1], prefix="A", half=0.03),
        table([0.0] * 5, prefix="B", half=0.04),
        partners(5),
        NAMES,
    )
    frame["rank_expected_ant"] = 0.1
    found = conserved_response.compare_shifts(frame, NAMES)
    assert found["difference"].tolist() == pytest.approx([0.5, 0.1, 0.1, 0.1, 0.1])
    assert (found["difference_high"] - found["difference"]).tolist() == pytest.approx([0.05] * 5)  # 3, 4, 5
    assert found["fdr_differs"].le(0.05).tolist() == [True, False, False, False, False]
    assert found["p_differs"][1:].tolist() == pytest.approx([1.0] * 4)
    assert set(found["interval_by"]) == {"donors"}
    few = conserved_response.compare_shifts(frame.assign(num_donors_bee=1), NAMES)
    assert set(few["interval_by"]) == {"cells"}
    vague = conserved_response.compare_shifts(frame.assign(rank_error_bee=0.2), NAMES)
    assert found["p_differs"][0] < 0.001
    assert vague["p_differs"][0] > 0.05  # what rank does in bees is hardly known
    unknown = conserved_response.compare_shifts(frame.assign(rank_expected_bee=np.nan), NAMES)
    assert unknown["p_differs"].isna().all()


def test_conserved_targets_go_towards_the_goal_in_both_and_the_weaker_side_decides():
    a = table([0.2, 0.3, -0.1, 0.4], prefix="A", percentile=[99.0, 98.0, 1.0, 99.9], p=[0.01, 0.02, 0.01, 0.001])
    b = table([0.1, 0.2, -0.2, -0.1], prefix="B", percentile=[90.0, 97.0, 2.0, 10.0], p=[0.5, 0.03, 0.01, 0.001])
    b.loc[0, "warnings"] = "one donor carries it"
    found = conserved_response.compare_shifts(conserved_response.pair_orthologs(a, b, partners(4), NAMES), NAMES)
    assert found["direction"].tolist() == ["towards", "towards", "away", "opposite"]
    assert found["place"].tolist() == [2, 1, 0, 0]
    assert found["percentile_both"].tolist() == [90.0, 97.0, 1.0, 10.0]
    assert found["p_both"].tolist() == [0.5, 0.03, 0.01, 0.001]
    assert found["doubts"].tolist() == ["bee: one donor carries it", "", "", ""]
    untested = conserved_response.compare_shifts(
        conserved_response.pair_orthologs(a, b.assign(p_donor=np.nan), partners(4), NAMES), NAMES
    )
    assert untested["p_both"].isna().all()  # one side without a test is no evidence from both


def test_bins_hold_genes_alike_and_an_exchange_stays_within_them():
    features = np.stack([np.arange(64), np.zeros(64)], axis=1).astype(float)
    bins = matched_null.similar_gene_bins(features, size=8)
    assert sorted(np.bincount(bins)) == [8] * 8
    assert all(np.ptp(np.flatnonzero(bins == b)) <= 31 for b in range(8))
    place = matched_null.permute_within_bins(bins, np.random.default_rng(0))
    assert sorted(place) == list(range(64))
    assert (bins[place] == bins).all()
    assert (place != np.arange(64)).any()


def test_what_rank_does_in_both_species_is_not_conservation_and_a_planted_effect_is():
    rng = np.random.default_rng(0)
    num = 160
    rank = rng.permutation(num) + 1
    by_rank, own = 2.0 * rank / num, rng.normal(0, 0.5, num)

    def summary(a, b):
        made = conserved_response.conserved(
            table(a, prefix="A", rank=rank), table(b, prefix="B", rank=rank), partners(num), NAMES, num=199, seed=0
        )
        return made["conserved_summary"].iloc[0]

    only_rank = summary(by_rank + rng.normal(0, 0.2, num), by_rank + rng.normal(0, 0.2, num))
    assert only_rank["whole"] > 0.8
    assert only_rank["p"] > 0.05
    assert only_rank["null_low"] < only_rank["spearman"] < only_rank["null_high"]
    planted = summary(by_rank + own, by_rank + own + rng.normal(0, 0.2, num))
    assert planted["p"] == 1 / 200
    assert planted["low"] > planted["null_high"]
    assert planted["low"] < planted["spearman"] < planted["high"]


def test_nothing_depends_on_the_order_of_a_perturbations_genes():
    """Its table is by falling shift; coverage is the same for all genes here, and must not be split by shift."""
    rng = np.random.default_rng(5)
    num = 60
    a, b = (table(rng.normal(size=num), prefix=prefix, rank=rng.permutation(num) + 1) for prefix in "AB")

    def found(one, other):
        return conserved_response.conserved(one, other, partners(num), NAMES, num=99, seed=0)

    plain, by_shift = found(a, b), found(a.sort_values("shift", ascending=False), b.sort_values("shift"))
    for name, frame in plain.items():
        pd.testing.assert_frame_equal(frame, by_shift[name])


def test_neighbours_and_their_overlap_by_hand():
    vectors = np.array([[1, 0], [1, 0.1], [0, 1], [0.1, 1]], dtype=float)
    rng = np.random.default_rng(0)
    for block in (4, 3, 1):
        assert gene_networks.neighbours(vectors, 1, rng, block=block).ravel().tolist() == [1, 0, 3, 2]
    one, other = np.array([[1], [0], [3], [2]]), np.array([[1], [2], [3], [2]])
    assert gene_networks.shared_neighbours(gene_networks.adjacency(one), other, np.arange(4)).tolist() == [1, 0, 1, 1]
    # the second species' genes under each other's names: 0 is called 1 and 1 is called 0
    assert gene_networks.shared_neighbours(gene_networks.adjacency(one), one, np.array([1, 0, 2, 3])).tolist() == [
        1,
        1,
        1,
        1,
    ]
    assert gene_networks.shared_neighbours(gene_networks.adjacency(one), one, np.array([2, 1, 0, 3])).tolist() == [
        0,
        0,
        0,
        0,
    ]


def test_genes_that_are_equally_near_are_no_neighbourhood_in_common():
    """Profiles with nothing in common: taken by number, the first genes would be everyone's neighbours in both species."""
    rng = np.random.default_rng(3)
    found = gene_networks.overlap(np.eye(200), np.eye(200), rng.random((200, 2)), k=10, num=99, rng=rng)
    assert found["share"] == pytest.approx(found["chance"], abs=0.02)
    assert found["p"] > 0.01


def test_neighbourhoods_of_the_same_space_overlap_and_those_of_frequency_alone_do_not_beat_the_null():
    rng = np.random.default_rng(1)
    base, frequency = rng.normal(size=(128, 12)), np.arange(128) % 4 / 4  # four classes, wider than a bin
    features = np.stack([frequency, frequency], axis=1)
    turned = base @ np.linalg.qr(rng.normal(size=(12, 12)))[0]  # another basis: the same neighbours
    same = gene_networks.overlap(base, turned, features, k=5, num=99, rng=rng)
    assert same["share"] == same["jaccard"] == 1
    assert same["p"] == 0.01
    angle = 3 * frequency[:, None]
    by_frequency = [np.hstack([np.cos(angle), np.sin(angle), rng.normal(0, 0.2, (128, 2))]) for _ in range(2)]
    nothing = gene_networks.overlap(*by_frequency, features, k=10, num=99, rng=rng)
    assert nothing["share"] > 1.5 * nothing["chance"]
    assert nothing["p"] > 0.05
    assert nothing["null_low"] <= nothing["share"] <= nothing["null_high"]


def test_response_profiles_are_what_is_specific_and_are_set_side_by_side_by_ortholog():
    """Log2 changes of 0 and 3 for own pairs: what is left of a gene's and a responder's median is 3 where they meet."""
    pairs = [(p, r) for p in range(3) for r in range(3)]
    matrix = pd.DataFrame({
        "operation": "delete", "gene": [f"A{p}" for p, _ in pairs], "responding": [f"A{r}" for _, r in pairs], "num_same_rank": 9,
        "change_same_rank": [8.0 if p == r else 1.0 for p, r in pairs],
    })  # fmt: skip
    found = gene_networks.profiles(matrix, "delete")
    assert found.to_numpy().tolist() == [[3, 0, 0], [0, 3, 0], [0, 0, 3]]
    other = found.rename(index={"A0": "B2", "A1": "B0", "A2": "B1"})
    a, b, genes = gene_networks.align_orthologs(found, other, {"A0": "B0", "A2": "B9", "A1": "B1"})
    assert genes == ["A0", "A1"]
    assert a.tolist() == [[3, 0, 0], [0, 3, 0]]
    assert b.tolist() == [[0, 3, 0], [0, 0, 3]]

"""Dispersion and local density of types between two models of the same cells, on spaces built so that the answer is known."""

import numpy as np
import pytest

from mixgf.comparison import compactness

TYPES, EACH, DONORS = 6, 60, 6


def cells(seed: int = 0, donors: int = DONORS) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Map (N, 2) of six types far from each other, and species, types and donors."""
    rng = np.random.default_rng(seed)
    kind = np.repeat(np.arange(TYPES), EACH)
    centre = 1000 * np.stack([np.cos(kind), np.sin(kind)], axis=1)
    xy = centre + rng.normal(0, 1, (len(kind), 2)) * rng.lognormal(0, 0.5, (len(kind), 1))
    names = np.array([f"t{k}" for k in kind])
    return xy, np.full(len(kind), "ant"), names, np.array([f"d{i % donors}" for i in range(len(kind))])


def widened(xy: np.ndarray, types: np.ndarray, kind: str, times: float) -> np.ndarray:
    out, mine = xy.copy(), types == kind
    centre = out[mine].mean(0)
    out[mine] = centre + times * (out[mine] - centre)
    return out


def test_a_type_that_is_twice_as_wide_is_found_with_its_factor_and_the_others_are_relative_to_the_mean() -> None:
    xy, species, types, donors = cells()
    found = compactness.compare({"map": widened(xy, types, "t2", 2.0)}, {"map": xy}, species, types, donors).set_index(
        "type"
    )
    for column in ("dispersion", "radius"):
        assert found.loc["t2", column] == pytest.approx(2 ** (5 / 6), rel=1e-6)
        assert found.drop("t2")[column].to_numpy() == pytest.approx(2 ** (-1 / 6), rel=1e-6)
    assert found["density_correlation"].to_numpy() == pytest.approx(1.0)
    assert found["num_cells"].tolist() == [EACH] * TYPES
    assert (found["interval_by"] == "donor").all()


def test_turning_and_scaling_a_whole_map_changes_nothing() -> None:
    xy, species, types, donors = cells()
    turned = 7 * xy @ np.array([[0.0, 1.0], [-1.0, 0.0]]) + 3
    found = compactness.compare({"map": turned}, {"map": xy}, species, types, donors)
    for column in ("dispersion", "radius", "density_correlation"):
        assert found[column].to_numpy() == pytest.approx(1.0, abs=1e-6)


def test_in_a_space_lengths_of_vectors_do_not_count() -> None:
    rng = np.random.default_rng(1)
    _, species, types, donors = cells()
    space = rng.normal(0, 1, (len(types), 8)) + 5 * (np.arange(8) == np.repeat(np.arange(TYPES), EACH)[:, None])
    longer = space * rng.uniform(0.5, 3, (len(types), 1))
    found = compactness.compare({"space": longer}, {"space": space}, species, types, donors)
    assert found["dispersion"].to_numpy() == pytest.approx(1.0, abs=1e-6)
    assert not np.allclose(
        compactness.compare({"map": longer}, {"map": space}, species, types, donors)["dispersion"], 1.0
    )


def test_other_dense_places_have_no_correlation() -> None:
    xy, species, types, donors = cells()
    rng, other = np.random.default_rng(2), xy.copy()
    for kind in np.unique(types):
        mine = np.flatnonzero(types == kind)
        other[mine] = xy[rng.permutation(mine)]
    found = compactness.compare({"map": other}, {"map": xy}, species, types, donors)
    assert found["dispersion"].to_numpy() == pytest.approx(1.0, abs=1e-6)  # the same places
    assert np.abs(found["density_correlation"]).max() < 0.45
    assert ((found["density_correlation_low"] < 0) & (found["density_correlation_high"] > 0)).mean() > 0.8


def test_intervals_are_over_donors_over_cells_of_one_donor_and_missing_with_three() -> None:
    xy, species, types, donors = cells()
    own = xy + np.random.default_rng(3).normal(0, 0.3, xy.shape)
    for number, by in ((1, "cell"), (3, "none"), (4, "donor")):
        of = np.array([f"d{i % number}" for i in range(len(types))])
        found = compactness.compare({"map": own}, {"map": xy}, species, types, of)
        assert (found["interval_by"] == by).all()
        assert found["dispersion_low"].isna().all() == (by == "none")
        assert found["density_correlation_low"].isna().all() == (by == "none")
    few = compactness.compare({"map": own[:64]}, {"map": xy[:64]}, species[:64], types[:64], donors[:64])
    assert few["type"].tolist() == ["t0"]  # four cells of the second type are too few


def test_where_donors_differ_and_no_type_does_the_interval_covers_one() -> None:
    """Every donor has its own width in one of the models; 95 % intervals over 8 donors must hold 1 in at least 90 % of types."""
    covered, by_cells = [], []
    for seed in range(30):
        xy, species, types, donors = cells(seed, donors=8)
        rng = np.random.default_rng([seed, 5])
        own = xy.copy()
        for kind in np.unique(types):
            centre = own[types == kind].mean(0)
            for donor in np.unique(donors):
                mine = (types == kind) & (donors == donor)
                own[mine] = centre + rng.lognormal(0, 0.4) * (own[mine] - centre)
        found = compactness.compare({"map": own}, {"map": xy}, species, types, donors)
        covered += ((found["dispersion_low"] < 1) & (found["dispersion_high"] > 1)).tolist()
        naive = compactness.compare({"map": own}, {"map": xy}, species, types, np.full(len(types), "one"))
        by_cells += ((naive["dispersion_low"] < 1) & (naive["dispersion_high"] > 1)).tolist()
    assert np.mean(covered) > 0.9
    assert np.mean(by_cells) < 0.6

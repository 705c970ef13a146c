"""What a sweep says, against scipy and against planted effects."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mixgf.config.run import Config
from mixgf.config.tuning import Tune
from mixgf.tuning import analysis, search_space

CONFIG = Config(tune=Tune(space=({"objective.view": ("mask",), "objective.pooling": ("first",)},)))
ARMS = search_space.arms(CONFIG)


def arm_scores(values, rungs=(0,)):
    """Rows of `analysis.arm_scores`: values[(arm name, rung)] = scores by seed."""
    keys = {arm.name: arm.key for arm in ARMS} | {"base": ARMS[0].key}
    rows = []
    for (name, rung), scores in values.items():
        for seed, score in enumerate(scores):
            rows.append({"arm": keys.get(name, name), "name": name, "seed": seed, "rung": rung, "share": 1.0, "step": 1} |
                        dict.fromkeys(analysis.METRICS, np.nan) | {"score": score})  # fmt: skip
    return pd.DataFrame(rows)


def test_paired_equals_scipys_paired_t_test_and_interval():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5))
    estimate, p = analysis.paired(a - b)
    test = stats.ttest_rel(a, b)
    interval = test.confidence_interval(0.95)
    assert p == pytest.approx(test.pvalue)
    assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high))
    one, p_one = analysis.paired(np.array([0.3]))
    assert one.value == 0.3
    assert np.isnan([one.low, one.high, p_one]).all()
    assert analysis.paired(np.zeros(3))[1] == 1.0
    assert analysis.paired(np.full(3, 0.5))[1] == 0.0


def test_intervals_over_seeds_hold_the_planted_effect_in_95_percent_of_sweeps():
    """Seed luck that both arms share cancels; what is left decides the width."""
    rng = np.random.default_rng(1)
    held, draws = 0, 4000
    for _ in range(draws):
        luck = rng.normal(0, 1.0, 3)
        difference = (luck + 0.02 + rng.normal(0, 0.01, 3)) - (luck + rng.normal(0, 0.01, 3))
        estimate, _ = analysis.paired(difference)
        held += estimate.low <= 0.02 <= estimate.high
    assert stats.binomtest(held, draws, 0.95).pvalue > 1e-3


def test_effects_are_taken_at_the_last_rung_that_both_reached():
    table = arm_scores({
        ("base", 0): [0.5, 0.6], ("base", 1): [0.7, 0.8], ("view=mask", 0): [0.4, 0.5], ("pooling=first", 0): [0.1, 0.1],
        ("pooling=first", 1): [0.9, 0.8],
    })  # fmt: skip
    found = analysis.effects(table).set_index("name")
    assert found.loc["view=mask", ["rung", "effect", "base"]].tolist() == [0, pytest.approx(-0.1), pytest.approx(0.55)]
    assert found.loc["pooling=first", ["rung", "effect", "value"]].tolist() == [
        1,
        pytest.approx(0.1),
        pytest.approx(0.85),
    ]
    assert analysis.best(table) == "pooling=first"


def test_an_additive_pair_has_no_interaction_and_a_planted_one_is_found():
    config = Config(tune=Tune(space=({"objective.view": ("dropout", "mask"), "objective.pooling": ("mean", "first")},)))
    arms = search_space.arms(config)
    keys = {arm.name: arm.key for arm in arms}
    for extra in (0.0, 0.2):
        rng = np.random.default_rng(2)
        scores = {"base": 0.5, "view=mask": 0.6, "pooling=first": 0.4, "pooling=first, view=mask": 0.5 + extra}
        luck = rng.normal(0, 0.1, 4)
        rows = [
            {"arm": keys[name], "name": name, "seed": s, "rung": 0, "share": 1.0, "step": 1}
            | dict.fromkeys(analysis.METRICS, np.nan)
            | {"score": value + luck[s] + rng.normal(0, 1e-3)}
            for name, value in scores.items() for s in range(4)
        ]  # fmt: skip
        found = analysis.interactions(pd.DataFrame(rows), arms, config)
        assert len(found) == 1
        row = found.iloc[0]
        assert (row["first"], row["second"]) == ("objective.view=mask", "objective.pooling=first")
        assert row["low"] <= extra <= row["high"]
        assert abs(row["effect"] - extra) < 5e-3
        assert (row["p"] < 0.01) == bool(extra)


def test_the_sentence_has_the_sign_of_the_contrast_and_says_when_nothing_can_be_told():
    off = "contrast_weight=0.0"

    def sentence(values, tested):
        table, test = arm_scores(values), arm_scores(tested)
        return analysis.sentence(analysis.effects(table), analysis.final_scores(table, test, analysis.best(table)))

    for gain, verdict in ((0.1, "higher"), (-0.1, "lower")):
        base = np.array([0.5, 0.61, 0.69])
        values = {("base", 0): base, (off, 0): base - gain + [0.001, -0.001, 0]}
        text = sentence(values, {("base", 0): base, (off, 0): base - 0.02})
        assert text.startswith(f"with the contrast instead of without, zero-shot macro F1 changes by {gain:+.3f} [")
        assert f", 3 seeds: {verdict}. Best arm: " in text
        if gain < 0:
            assert "on test cells, zero-shot macro F1 changes by -0.020" in text
            assert text.endswith("(+0.100 on the cells that chose the arm)")
        else:
            assert text.endswith("Best arm: base; zero-shot macro F1 on test cells 0.600")
    values = {("base", 0): [0.5, 0.6, 0.7], (off, 0): [0.6, 0.5, 0.7]}
    assert "not different from 0" in sentence(values, values)
    values = {("base", 0): [0.5], (off, 0): [0.6]}
    assert "one seed, no interval" in sentence(values, values)


def test_the_best_of_equal_arms_is_too_good_on_the_cells_that_chose_it_and_not_on_test_cells():
    """Twenty arms without any effect: the choice is optimistic by the largest of twenty draws."""
    rng = np.random.default_rng(3)
    optimism, gains = [], []
    for _ in range(100):
        names = ["base", *(f"lr={i}" for i in range(19))]
        select = arm_scores({(name, 0): 0.5 + rng.normal(0, 0.02, 3) for name in names})
        best = analysis.best(select)
        chosen = ["base", *({best} - {ARMS[0].key})]
        test = arm_scores({(name, 0): 0.5 + rng.normal(0, 0.02, 3) for name in chosen})
        final = analysis.final_scores(select, test, best)
        row = final[final["what"].isin([analysis.GAIN] if len(chosen) == 2 else ["base"])].iloc[0]
        if len(chosen) == 2:
            optimism.append(row["optimism"])
            gains.append(row["test"])
    expected = 0.02 / np.sqrt(3) * stats.norm.expect(lambda z: z * 20 * stats.norm.cdf(z) ** 19)
    assert np.mean(optimism) == pytest.approx(expected, rel=0.15)
    assert abs(np.mean(gains)) < 4 * np.std(gains) / np.sqrt(len(gains))


def test_a_planted_curve_is_found_again_and_a_flat_one_promises_nothing():
    x = np.array([200.0, 600, 2000, 6000, 20000])
    a, b, c = analysis.saturation(x, (0.9 - 3.0 * x**-0.5)[None])[0]
    at = np.array([200.0, 20000, 200000])
    assert a - b * at**-c == pytest.approx(0.9 - 3.0 * at**-0.5, abs=2e-3)
    flat = analysis.saturation(x, np.full((1, 5), 0.5))[0]
    assert flat[0] - flat[1] * at ** -flat[2] == pytest.approx(np.full(3, 0.5), abs=1e-9)
    falling = analysis.saturation(x, (0.5 + 3.0 * x**-0.5)[None])[0]
    assert falling[1] == 0, "more data never hurt in this family: a falling score is called flat"


X = np.array([200.0, 600, 2000, 6000, 20000])


def ladder(curve, seeds, rng, noise=0.004):
    """Scores along `X`; a seed moves its whole curve and each point of it."""
    luck = rng.normal(0, noise, seeds)
    rows = [{"x": v, "seed": s, "value": curve(v) + luck[s] + rng.normal(0, noise)} for v in X for s in range(seeds)]
    return pd.DataFrame(rows)


@pytest.mark.parametrize("seeds", [2, *(pytest.param(number, marks=pytest.mark.slow) for number in (3, 5))])
@pytest.mark.parametrize(
    ("a", "b", "c"),
    [(0.9, 3.0, 0.5), *(pytest.param(*curve, marks=pytest.mark.slow) for curve in ((0.9, 1.5, 0.2), (0.5, 0.0, 1.0)))],
)
def test_the_interval_of_a_forecast_covers_the_truth_at_every_number_of_seeds(a, b, c, seeds):
    """95 %, within the data and ten times beyond: at least 93 % of 400 simulated ladders, less the error of the simulation."""

    def curve(x):
        return a - b * x**-c

    at, rng, draws = np.array([2000.0, 20000, 200000]), np.random.default_rng([seeds, 7]), 400
    held = np.zeros(len(at))
    for _ in range(draws):
        found = analysis.forecast(ladder(curve, seeds, rng), at)
        held += (found["low"] <= curve(at)) & (curve(at) <= found["high"])
    for number in held:
        assert stats.binomtest(int(number), draws, 0.93, alternative="less").pvalue > 0.01, held / draws


def test_the_interval_of_a_forecast_widens_beyond_the_data():
    found = analysis.forecast(ladder(lambda x: 0.9 - 3.0 * x**-0.5, 5, np.random.default_rng(0)), np.array([2e4, 2e5]))
    width = (found["high"] - found["low"]).to_numpy()
    assert width[1] > width[0]


def test_a_forecast_of_one_whole_seed_has_no_interval():
    points = ladder(lambda x: 0.9 - 3.0 * x**-0.5, 2, np.random.default_rng(0))
    for few in (points[points["seed"] == 0], points[(points["seed"] == 0) | (points["x"] > 200)]):
        found = analysis.forecast(few, np.array([2e4]))
        assert np.isfinite(found["value"]).all()
        assert found[["low", "high"]].isna().all(axis=None)


def test_a_seed_that_is_given_twice_is_not_counted_twice():
    points = ladder(lambda x: 0.9 - 3.0 * x**-0.5, 3, np.random.default_rng(0))
    once, twice = (analysis.forecast(p, np.array([2e4, 2e5])) for p in (points, pd.concat([points, points])))
    assert np.allclose(once, twice)


def test_a_falling_curve_is_a_rising_one_upside_down():
    points = ladder(lambda x: 0.9 - 3.0 * x**-0.5, 3, np.random.default_rng(0))
    at = np.array([2e3, 2e5])
    rising = analysis.forecast(points, at)
    falling = analysis.forecast(points.assign(value=5 - points["value"]), at, falling=True)
    assert np.allclose(falling["value"], 5 - rising["value"])
    assert np.allclose(falling[["low", "high"]], 5 - rising[["high", "low"]])
    assert falling["value"].iloc[1] < falling["value"].iloc[0]


def test_a_ladder_has_the_base_and_only_arms_that_change_its_field():
    config = Config(tune=Tune(space=({"train.cells_share": (0.1, 0.3)}, {"train.lr": (0.5,)})))
    arms = search_space.arms(config)
    rows = [{"arm": arm.key, "seed": s, "rung": 0, "score": i + s} for i, arm in enumerate(arms) for s in range(2)]
    details = [{"key": arm.key, "changes": dict(arm.changes)} for arm in arms]
    found = analysis.scores_along(pd.DataFrame(rows), details, "train.cells_share", 1.0)
    assert found["x"].tolist() == [0.1, 0.1, 0.3, 0.3, 1.0, 1.0]
    assert found["value"].tolist() == [1, 2, 2, 3, 0, 1]

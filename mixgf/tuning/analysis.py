"""Results of a sweep: effects of settings with intervals over seeds, interactions, and scaling curves.

All comparisons are paired by seed. Two arms with the same seed start from the same weights (where shapes are equal) and see the
same cells in the same order, so the variation between seeds cancels. Intervals are over seeds: they cover the spread between
trainings on the same cells, not between donors.

Letters: S seeds, R curves, P points of a curve.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats as distributions

from mixgf.arrays import Float64s
from mixgf.classification.models.finetuned import Finetune
from mixgf.config.classification import HEADS
from mixgf.config.run import Config
from mixgf.config.tuning import Tune
from mixgf.stats import donors
from mixgf.stats.intervals import Interval
from mixgf.tuning import evaluate, search_space
from mixgf.tuning.search_space import Arm

KIND = "sweep"
METRICS = {
    "score": "zero-shot macro F1",
    "finetuned": "fine-tuned accuracy",
    "finetuned_f1": "fine-tuned macro F1",
    "alignment": "alignment",
    "uniformity": "uniformity",
}
"""Columns of `arm_scores` by which arms are compared, and their names for readers."""
HELD_OUT = "heldout_loss"
"""Column of `arm_scores` with the loss on cells that are never trained on; only where a sweep has such cells."""
GAIN = "best arm minus base"
"""The row of `final_scores` with the difference."""


def arm_scores(found: pd.DataFrame, settings: Tune) -> pd.DataFrame:
    """One row per training and rung: arm, name, seed, rung, share, step, and the scores of `METRICS` (NaN where not computed).

    There is a column `HELD_OUT` where a training has held-out cells.

    Args:
        found: Rows of `evaluate.zero_shot` and `evaluate.finetuned`, with arm, name, seed, rung, share and step.
        settings: `config.tune`.
    """
    keys = ["arm", "name", "seed", "rung", "share", "step"]
    rows, has_held_out = [], bool((found["model"] == evaluate.TRAINING).any())
    for key, part in found.groupby(keys, sort=False):
        row = dict(zip(keys, key, strict=True))
        row["score"] = evaluate.objective(part, settings.splits, settings.head)
        for name, metric in (("finetuned", "accuracy"), ("finetuned_f1", "macro_f1")):
            row[name] = _mean(part, Finetune.head, metric)
        for metric in ("alignment", "uniformity"):
            row[metric] = _mean(part, "space", metric)
        if has_held_out:
            row[HELD_OUT] = _mean(part, evaluate.TRAINING, HELD_OUT)
        for head, kind in itertools.product(HEADS, settings.splits):
            row[f"{head}/{kind}"] = _mean(part[part["split"] == kind], head, "macro_f1")
        rows.append(row)
    return pd.DataFrame(rows)


def _mean(part: pd.DataFrame, model: str, metric: str) -> float:
    values = part.loc[(part["model"] == model) & (part["metric"] == metric), "value"]
    return float(values.mean()) if len(values) else float("nan")


def paired(difference_S: Float64s) -> tuple[Interval, float]:
    """Mean of paired differences over S seeds with its 95 % t interval, and the p-value of the paired t test.

    One seed gives no interval (NaN). Equal differences give an interval of width 0, and p = 1 if they are 0.
    """
    number, mean = len(difference_S), float(np.mean(difference_S))
    if number < 2:
        return Interval(value=mean, low=float("nan"), high=float("nan")), float("nan")
    error = float(np.std(difference_S, ddof=1)) / np.sqrt(number)
    half = float(distributions.t.ppf(0.975, number - 1)) * error
    p = float(2 * distributions.t.sf(abs(mean) / error, number - 1)) if error > 0 else float(mean == 0)
    return Interval(value=mean, low=mean - half, high=mean + half), p


def _values(found: pd.DataFrame, arm: str, rung: int, metric: str) -> pd.Series:
    mine = found[(found["arm"] == arm) & (found["rung"] == rung)]
    return mine.set_index("seed")[metric].dropna()


def _latest(found: pd.DataFrame, keys: Sequence[str], metric: str) -> tuple[int, list[pd.Series]] | None:
    """The last rung that all these arms reached with at least one common seed, and their values for the common seeds."""
    for rung in sorted(found["rung"].unique(), reverse=True):
        series = [_values(found, key, rung, metric) for key in keys]
        shared = set.intersection(*(set(s.index) for s in series))
        if shared:
            return int(rung), [s.loc[sorted(shared)] for s in series]
    return None


def effects(found: pd.DataFrame) -> pd.DataFrame:
    """Difference of each arm from the base, by metric, at the last rung that both reached.

    Args:
        found: Result of `arm_scores`.

    Returns:
        arm, name, metric, rung, share, num_seeds, effect, low, high (95 %, t over seeds), p (paired t), q (Benjamini-Hochberg
        over the arms of a metric), base, value (means).
    """
    names = dict(zip(found["arm"], found["name"], strict=True))
    base = next(key for key, name in names.items() if name == search_space.BASE)
    rows = []
    for metric in METRICS:
        for arm, name in names.items():
            pair = _latest(found, (arm, base), metric) if arm != base else None
            if pair is None:
                continue
            rung, (mine, theirs) = pair
            estimate, p = paired(mine.to_numpy() - theirs.to_numpy())
            rows.append({
                "arm": arm, "name": name, "metric": metric, "rung": rung,
                "share": float(found.loc[found["rung"] == rung, "share"].iloc[0]), "num_seeds": len(mine),
                "effect": estimate.value, "low": estimate.low, "high": estimate.high, "p": p,
                "base": float(theirs.mean()), "value": float(mine.mean()),
            })  # fmt: skip
    columns = ["arm", "name", "metric", "rung", "share", "num_seeds", "effect", "low", "high", "p", "base", "value"]
    out = pd.DataFrame(rows, columns=columns)
    out["q"] = np.nan
    for _, part in out.groupby("metric"):
        tested = part["p"].notna().to_numpy()
        out.loc[part.index[tested], "q"] = donors.benjamini_hochberg(part["p"].to_numpy(float)[tested])
    return out


def interactions(found: pd.DataFrame, arms: Sequence[Arm], config: Config) -> pd.DataFrame:
    """Interactions of factors that are crossed in a grid search: does the effect of one depend on the value of the other?

    The difference of differences: (both changed − second changed) − (first changed − base), paired by seed.

    Returns:
        first, second (`field=value`), metric, rung, num_seeds, effect, low, high, p.
    """
    known = {arm.key for arm in arms}
    base = arms[0].key
    rows = []
    crossed = search_space.entries(config.tune.space) if config.tune.search == "grid" else []
    for entry in crossed:
        for a, b in itertools.combinations(entry, 2):
            for x, y in itertools.product(a.values, b.values):
                first, second = search_space.make(config, {a.field: x}).key, search_space.make(config, {b.field: y}).key
                both = search_space.make(config, {a.field: x, b.field: y}).key
                if len({base, first, second, both}) < 4 or not {first, second, both} <= known:
                    continue
                for metric in METRICS:
                    pair = _latest(found, (both, second, first, base), metric)
                    if pair is None:
                        continue
                    rung, (v_both, v_second, v_first, v_base) = pair
                    difference = (v_both - v_second) - (v_first - v_base)
                    estimate, p = paired(difference.to_numpy())
                    rows.append({
                        "first": f"{a.field}={x}", "second": f"{b.field}={y}", "metric": metric, "rung": rung,
                        "num_seeds": len(difference), "effect": estimate.value, "low": estimate.low,
                        "high": estimate.high, "p": p,
                    })  # fmt: skip
    columns = ["first", "second", "metric", "rung", "num_seeds", "effect", "low", "high", "p"]
    return pd.DataFrame(rows, columns=columns)


def best(found: pd.DataFrame) -> str:
    """Key of the arm with the best mean score among those trained to the end with the most seeds; among equals the first."""
    finished = found[found["rung"] == found["rung"].max()]
    arms = finished.groupby("arm", sort=False)["score"]
    return str(arms.mean()[arms.count() == arms.count().max()].idxmax())


def final_scores(select: pd.DataFrame, test: pd.DataFrame, best: str) -> pd.DataFrame:
    """Scores of the best arm and the base on the cells that chose the arm and on test cells, after the whole training.

    The best arm's advantage is the largest of many on the cells that chose it, so it is too large there (optimism).

    Args:
        select: Result of `arm_scores` on the cells that chose.
        test: Result of `arm_scores` on the test cells: the best arm and the base.
        best: Key of the best arm.

    Returns:
        what (the base, the best arm, and `GAIN`, their difference paired by seed), metric, num_seeds, select, test (means over
        the seeds that both have), low, high (95 %, t over seeds, of `test`), optimism (select - test).
    """
    names = dict(zip(test["name"], test["arm"], strict=True))
    rung = int(test["rung"].max())
    rows = []
    for metric in (m for m in METRICS if m not in ("alignment", "uniformity")):
        shown = {
            name: tuple(_values(table, key, rung, metric) for table in (select, test))
            for name, key in sorted(names.items(), key=lambda item: item[1] == best)
            if best == key or name == search_space.BASE
        }
        if len(shown) == 2:
            theirs, mine = shown.values()
            shown[GAIN] = mine[0] - theirs[0], mine[1] - theirs[1]
        for what, (on_select, on_test) in shown.items():
            both = pd.concat([on_select, on_test], axis=1, keys=("select", "test")).dropna()
            if both.empty:
                continue
            estimate, _ = paired(both["test"].to_numpy(float))
            chosen = float(both["select"].mean())
            rows.append({
                "what": what, "metric": metric, "num_seeds": len(both), "select": chosen, "test": estimate.value,
                "low": estimate.low, "high": estimate.high, "optimism": chosen - estimate.value,
            })  # fmt: skip
    return pd.DataFrame(rows, columns=["what", "metric", "num_seeds", "select", "test", "low", "high", "optimism"])


def sentence(found: pd.DataFrame, final: pd.DataFrame) -> str:
    """The main results as clauses with their uncertainty: the effect of the contrast where it was varied, and the best arm.

    Args:
        found: Result of `effects`.
        final: Result of `final_scores`.
    """
    clauses = []
    off = found[found["name"] == "contrast_weight=0.0"].set_index("metric")
    parts = [_change(off.loc[m], -1, METRICS[m]) for m in ("score", "finetuned") if m in off.index]
    if parts:
        clauses.append(f"with the contrast instead of without, {'; '.join(parts)}")
    mine = final[final["metric"] == "score"].set_index("what")
    if GAIN in mine.index:
        arm, gain = next(what for what in mine.index if what not in (search_space.BASE, GAIN)), mine.loc[GAIN]
        change = _change(gain.rename({"test": "effect"}), 1, "zero-shot macro F1")
        clauses.append(
            f"best arm: {arm}; on test cells, {change} ({gain['select']:+.3f} on the cells that chose the arm)"
        )
    elif len(mine):
        row = mine.iloc[0]
        clauses.append(f"best arm: {mine.index[0]}; zero-shot macro F1 on test cells {row['test']:.3f}")
    return ". ".join(text if i == 0 else text[:1].upper() + text[1:] for i, text in enumerate(clauses))


def _change(row: pd.Series, sign: int, name: str) -> str:
    value, ends = sign * row["effect"], sorted((sign * row["low"], sign * row["high"]))
    if not np.isfinite(row["low"]):
        return f"{name} changes by {value:+.3f} (one seed, no interval)"
    verdict = "higher" if ends[0] > 0 else "lower" if ends[1] < 0 else "not different from 0"
    return f"{name} changes by {value:+.3f} [{ends[0]:+.3f}, {ends[1]:+.3f}], {int(row['num_seeds'])} seeds: {verdict}"


def scores_along(
    found: pd.DataFrame, arms: Sequence[dict[str, Any]], field: str, base: float, metric: str = "score"
) -> pd.DataFrame:
    """Scores along one numeric field at the last rung, the base included: columns x, seed, value.

    Args:
        found: Result of `arm_scores`.
        arms: `key` and `changes` of each arm (from the record's details).
        field: Dotted field, for example train.cells_share.
        base: Its value in the base.
        metric: Column of `arm_scores`.
    """
    at = {a["key"]: a["changes"].get(field, base) for a in arms if set(a["changes"]) <= {field}}
    last = found[(found["rung"] == found["rung"].max()) & found["arm"].isin(list(at))]
    out = pd.DataFrame({"x": last["arm"].map(at).astype(float), "seed": last["seed"], "value": last[metric]})
    return out.dropna().sort_values(["x", "seed"]).reset_index(drop=True)


def saturation(x_P: Float64s, value_RP: Float64s) -> Float64s:
    """Least-squares fit of value = a - b x^-c with b >= 0 and c in [0.05, 2] for each row: (a, b, c), (R, 3).

    a is the limit for large x. Given c the fit is linear, so c is searched on a grid, and the smallest of equal c is taken. A
    falling score gives b = 0.
    """
    number = len(value_RP)
    answer, least = np.zeros((number, 3)), np.full(number, np.inf)
    mean_R = value_RP.mean(1)
    for c in np.geomspace(0.05, 2.0, 80):
        u_P = -(x_P**-c)
        away_P = u_P - u_P.mean()
        b_R = np.maximum((value_RP - mean_R[:, None]) @ away_P / np.square(away_P).sum(), 0.0)
        a_R = mean_R - b_R * u_P.mean()
        error_R = np.square(a_R[:, None] + b_R[:, None] * u_P - value_RP).sum(1)
        better = error_R < least - 1e-15
        least[better] = error_R[better]
        answer[better] = np.stack([a_R, b_R, np.full(number, c)], axis=1)[better]
    return answer


def forecast(points: pd.DataFrame, at: Float64s, *, falling: bool = False) -> pd.DataFrame:
    """The curve fitted to the means over seeds at given x, with a 95 % t interval over seeds.

    Each seed gives a curve of its own; their spread at an x gives the width there, with S - 1 degrees of freedom. A seed that
    lacks an x gives no curve; with fewer than two curves there is no interval (NaN). `tests/tuning/test_analysis.py` simulates the
    coverage.

    Args:
        points: Result of `scores_along` with at least three different x.
        at: Values of x; beyond the largest x of `points` the curve is an extrapolation.
        falling: Whether the value falls along x, as a loss does; else it rises.

    Returns:
        x, value, low, high.
    """
    if falling:
        risen = forecast(points.assign(value=-points["value"]), at)
        return pd.DataFrame({"x": at, "value": -risen["value"], "low": -risen["high"], "high": -risen["low"]})
    values = points.pivot_table(index="seed", columns="x", values="value")
    xs = values.columns.to_numpy(float)
    assert len(xs) >= 3, "a curve of three parameters needs three points"
    value = _curves(xs, values.mean().to_numpy()[None], at)[0]
    whole_SP = values.dropna().to_numpy()
    half = np.full(len(at), np.nan)
    if len(whole_SP) >= 2:
        error = _curves(xs, whole_SP, at).std(axis=0, ddof=1) / np.sqrt(len(whole_SP))
        half = float(distributions.t.ppf(0.975, len(whole_SP) - 1)) * error
    return pd.DataFrame({"x": at, "value": value, "low": value - half, "high": value + half})


def _curves(x_P: Float64s, value_RP: Float64s, at: Float64s) -> Float64s:
    """Fitted curves at given x, one row per row of values."""
    a_R1, b_R1, c_R1 = np.split(saturation(x_P, value_RP), 3, axis=1)
    curves: Float64s = a_R1 - b_R1 * at**-c_R1
    return curves

"""Similarity of shifts between species: which shift of one species resembles which of the other (paper section 3.4).

A shift is the difference of the mean vectors of two conditions of one species. It is taken within strata (cell types, donors)
and averaged over them, so a change of composition is not a shift. Offsets between species cancel in the difference. The cosine
of two shifts of different species is evaluated in three ways:

- against permuted condition labels: is there a shift in each species at all?
- against the cosine of the same shift in two halves of its cells (reliability): how large can a cosine be?
- against the other pairs: is this pair more similar than the others?

Only the third shows a match. Two real shifts that share a nuisance, such as a change of sequencing depth, also have a cosine
that permuted labels do not explain.

Shapes: N cells of a shift, D width, S strata, K and M shifts of two species, R draws.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import exp, lgamma

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import rankdata

from mixgf.arrays import Bools, Floats, Ints
from mixgf.stats import donors

NUM_RESAMPLES = 200
"""Bootstrap draws of an interval."""
NUM_HALVES = 20
"""Random divisions into halves over which a reliability is averaged."""
LEVEL = 0.05
"""One less the coverage of intervals."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Shift:
    """Cells of two conditions of one species."""

    name: str
    tag: str
    """Shifts with the same tag are expected to match; empty: no expectation."""
    species: str
    rows_N: Ints
    """Rows of the vectors."""
    after_N: Bools
    """Whether a cell is of the second condition."""
    strata_N: Ints
    """Number of each cell's stratum. Every stratum has cells of both conditions."""
    experiment: str
    """Shifts of one experiment share cells, donors or data sets, so they are not independent."""


def contrast_weights(after_N: Bools, strata_N: Ints) -> Floats:
    """Weights (N,) of the cells, so that weights @ vectors is the shift: mean after less mean before, within strata.

    A stratum with a cells before and b after has weight ab / (a + b). This is the estimate of a regression on condition and
    stratum; it has the least variance if all cells have the same variance.
    """
    out_N = np.zeros(len(after_N))
    total = 0.0
    for stratum in np.unique(strata_N):
        before, after = (np.flatnonzero((strata_N == stratum) & (after_N == side)) for side in (False, True))
        if len(before) and len(after):
            size = len(before) * len(after) / (len(before) + len(after))
            out_N[after], out_N[before] = size / len(after), -size / len(before)
            total += size
    assert total > 0, "a stratum with cells of both conditions"
    return out_N / total


def permuted_weights(weights_N: Floats, strata_N: Ints, num: int, rng: np.random.Generator) -> Floats:
    """Weights (R, N) of shifts with condition labels permuted within each stratum."""
    out_RN = np.tile(weights_N, (num, 1))
    for stratum in np.unique(strata_N):
        mine = np.flatnonzero(strata_N == stratum)
        out_RN[:, mine] = rng.permuted(out_RN[:, mine], axis=1)
    return out_RN


def bootstrap_weights(weights_N: Floats, after_N: Bools, strata_N: Ints, num: int, rng: np.random.Generator) -> Floats:
    """Weights (R, N) of shifts of cells drawn with replacement within each stratum and condition."""
    out_RN = np.zeros((num, len(weights_N)))
    for mine in _sides(after_N, strata_N):
        out_RN[:, mine] = rng.multinomial(len(mine), np.full(len(mine), 1 / len(mine)), num) * weights_N[mine]
    return out_RN


def half_weights(after_N: Bools, strata_N: Ints, rng: np.random.Generator) -> tuple[Floats, Floats] | None:
    """Weights (N,) of the shift in two random halves of its cells; None if no stratum has two cells of each condition."""
    first_N = np.zeros(len(after_N), dtype=bool)
    for mine in _sides(after_N, strata_N):
        first_N[rng.permutation(mine)[: (len(mine) + int(rng.integers(2))) // 2]] = True
    found = []
    for half in (first_N, ~first_N):
        whole = [s for s in np.unique(strata_N) if len(np.unique(after_N[half & (strata_N == s)])) == 2]
        rows = np.flatnonzero(half & np.isin(strata_N, whole))
        if not len(rows):
            return None
        weights_N = np.zeros(len(after_N))
        weights_N[rows] = contrast_weights(after_N[rows], strata_N[rows])
        found.append(weights_N)
    return found[0], found[1]


def _sides(after_N: Bools, strata_N: Ints) -> Iterator[Ints]:
    """Cells of every stratum and condition."""
    for stratum in np.unique(strata_N):
        for side in (False, True):
            mine = np.flatnonzero((strata_N == stratum) & (after_N == side))
            if len(mine):
                yield mine


def smallest_p(after_N: Bools, strata_N: Ints, num: int) -> float:
    """The smallest p-value that `num` permutations can give: 1 / (num + 1), or 1 / the number of possible labellings, if larger."""
    logs = 0.0
    for stratum in np.unique(strata_N):
        mine = after_N[strata_N == stratum]
        n, b = len(mine), int(mine.sum())
        logs += lgamma(n + 1) - lgamma(b + 1) - lgamma(n - b + 1)
    return max(1 / (num + 1), exp(-logs))


def cosines(first_KD: Floats, second_MD: Floats, seen_KD: Bools | None = None, seen_MD: Bools | None = None) -> Floats:
    """Cosines of every row with every other (K, M), over the columns that both rows use; 0 where a row is 0."""
    if seen_KD is None or seen_MD is None:
        seen_KD, seen_MD = (np.ones_like(rows, dtype=bool) for rows in (first_KD, second_MD))
    a_KD, b_MD = first_KD * seen_KD, second_MD * seen_MD
    length_KM = np.sqrt(
        np.square(a_KD) @ seen_MD.T.astype(a_KD.dtype) * (seen_KD.astype(a_KD.dtype) @ np.square(b_MD).T)
    )
    return np.divide(a_KD @ b_MD.T, length_KM, out=np.zeros_like(length_KM), where=length_KM > 1e-12)


def match(
    shifts: Sequence[Shift], vectors_ND: Floats, *, num_permutations: int, seed: int, seen_KD: Bools | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Compare every shift of one species with every shift of another, in one space.

    Args:
        shifts: Shifts of two species or more.
        vectors_ND: Vectors of all cells; `Shift.rows_N` are the rows of a shift.
        num_permutations: Number of permutations R.
        seed: Seed of permutations and draws.
        seen_KD: Columns that are used for each shift, such as genes that its cells express; None = all.

    Returns:
        `pairs` and `shifts`.

        `pairs` has species, shift, tag, experiment, the same of the other species (`other_...`), same_tag; cosine, low, high (95 % bootstrap interval: noise moves a
        cosine towards 0, so an interval may lie below its estimate); p_shift and p_other by permuted labels of each shift, p (the
        larger of the two, since a match needs two shifts), fdr over all pairs (Benjamini-Hochberg), smallest_p; place, the rank of
        the other shift among all of its species by cosine (1 = highest); best, whether each is first for the other.

        `shifts` has shift, tag, species, numbers of cells and strata, size (length of the shift vector), reliability (mean cosine
        between two random halves of its cells), smallest_p.
    """
    num = len(shifts)
    rng = np.random.default_rng([seed, 0x4D41])
    seen = np.ones((num, vectors_ND.shape[1]), dtype=bool) if seen_KD is None else seen_KD
    weights = [contrast_weights(s.after_N, s.strata_N) for s in shifts]
    cells = [vectors_ND[s.rows_N].astype(np.float32) for s in shifts]
    found_KD = np.stack([w @ v for w, v in zip(weights, cells, strict=True)])
    drawn = [
        (bootstrap_weights(w, s.after_N, s.strata_N, NUM_RESAMPLES, rng) @ v).astype(np.float32)
        for s, w, v in zip(shifts, weights, cells, strict=True)
    ]
    p_KK = np.full((num, num), np.nan)
    cosine_KK = cosines(found_KD, found_KD, seen, seen)
    for k, (shift, w, v) in enumerate(zip(shifts, weights, cells, strict=True)):
        null_RD = (permuted_weights(w, shift.strata_N, num_permutations, rng) @ v).astype(np.float32)
        null_RK = cosines(null_RD, found_KD, np.broadcast_to(seen[k], null_RD.shape), seen)
        p_KK[k] = (1 + (null_RK >= cosine_KK[k] - 1e-9).sum(0)) / (num_permutations + 1)
    least = [smallest_p(s.after_N, s.strata_N, num_permutations) for s in shifts]
    pairs = _pairs(shifts, drawn, cosine_KK=cosine_KK, p_KK=p_KK, least=least, seen_KD=seen)
    of_shifts = [
        {"shift": s.name, "tag": s.tag, "species": s.species, "num_before": int((~s.after_N).sum()),
         "num_after": int(s.after_N.sum()), "num_strata": len(np.unique(s.strata_N)), "size": float(np.linalg.norm(found_KD[k])),
         "reliability": _reliability(s, cells[k], seen[k], rng), "smallest_p": least[k]}
        for k, s in enumerate(shifts)
    ]  # fmt: skip
    return pairs, pd.DataFrame(of_shifts)


def _pairs(
    shifts: Sequence[Shift],
    drawn: Sequence[Floats],
    *,
    cosine_KK: Floats,
    p_KK: Floats,
    least: Sequence[float],
    seen_KD: Bools,
) -> pd.DataFrame:
    """The table `pairs` of `match`. `drawn` has bootstrap draws (R, D) of each shift, `least` its smallest p."""
    rows = []
    for i, j in [
        (i, j) for i in range(len(shifts)) for j in range(len(shifts)) if shifts[i].species < shifts[j].species
    ]:
        one_RD, two_RD = (drawn[k] * (seen_KD[i] & seen_KD[j]) for k in (i, j))
        lengths_R = np.linalg.norm(one_RD, axis=1) * np.linalg.norm(two_RD, axis=1)
        low, high = np.quantile((one_RD * two_RD).sum(1) / np.maximum(lengths_R, 1e-12), [LEVEL / 2, 1 - LEVEL / 2])
        rows.append({
            "species": shifts[i].species, "shift": shifts[i].name, "tag": shifts[i].tag,
            "experiment": shifts[i].experiment, "other_species": shifts[j].species, "other_shift": shifts[j].name,
            "other_tag": shifts[j].tag, "other_experiment": shifts[j].experiment,
            "same_tag": bool(shifts[i].tag) and shifts[i].tag == shifts[j].tag, "cosine": float(cosine_KK[i, j]),
            "low": float(low), "high": float(high), "p_shift": p_KK[i, j], "p_other": p_KK[j, i],
            "p": max(p_KK[i, j], p_KK[j, i]), "smallest_p": max(least[i], least[j]),
        })  # fmt: skip
    pairs = pd.DataFrame(rows)
    if len(pairs):
        pairs["fdr"] = donors.benjamini_hochberg(pairs["p"].to_numpy())
        place = pairs.groupby(["species", "shift", "other_species"])["cosine"].rank(ascending=False, method="min")
        back = pairs.groupby(["other_species", "other_shift", "species"])["cosine"].rank(ascending=False, method="min")
        pairs["place"], pairs["place_back"] = place.astype(int), back.astype(int)
        pairs["best"] = (place == 1) & (back == 1)
    return pairs


def _reliability(shift: Shift, vectors_ND: Floats, seen_D: Bools, rng: np.random.Generator) -> float:
    """Mean cosine of a shift between two random halves of its cells; NaN where it cannot be halved."""
    found = []
    for _ in range(NUM_HALVES):
        pair = half_weights(shift.after_N, shift.strata_N, rng)
        if pair is not None:
            one_D, two_D = (w @ vectors_ND * seen_D for w in pair)
            found.append(float(cosines(one_D[None], two_D[None])[0, 0]))
    return float(np.mean(found)) if found else float("nan")


def tag_agreement(pairs: pd.DataFrame, *, num_permutations: int, seed: int) -> pd.DataFrame:
    """Whether pairs of one tag have higher cosines than pairs of two tags, for each tag and for `all` tags together.

    Pairs in which a shift has no tag are left out. `auroc` is the probability that a pair of the tag has a higher cosine than a
    pair of two tags, one of which is the tag. `p` permutes the tags among the experiments of the second species: all shifts of
    one experiment and tag keep one tag, since they are not independent. With few experiments few permutations differ:
    `smallest_p` is the share of permutations that leave the tags unchanged.

    Args:
        pairs: Result of `match`.
        num_permutations: Number of permutations R.
        seed: Seed of the permutations.
    """
    known = pairs[(pairs["tag"] != "") & (pairs["other_tag"] != "")]
    columns = [
        "tag",
        "num_pairs",
        "num_others",
        "num_experiments",
        "cosine",
        "cosine_others",
        "auroc",
        "p",
        "smallest_p",
    ]
    if known.empty:
        return pd.DataFrame(columns=columns)
    rng = np.random.default_rng([seed, 0x5447])
    table = known.pivot_table(
        index=["species", "shift", "tag"], columns=["other_species", "other_shift", "other_tag", "other_experiment"],
        values="cosine",
    )  # fmt: skip
    tags_K, tags_M = (np.asarray(axis.get_level_values(2), dtype=np.str_) for axis in (table.index, table.columns))
    cosine_KM = table.to_numpy()
    units, unit_M = np.unique(
        [f"{tag}\t{of}" for _, _, tag, of in table.columns], return_inverse=True
    )  # what is permuted: the shifts of one experiment and tag
    tags_U = np.array([unit.split("\t")[0] for unit in units.tolist()], dtype=np.str_)
    permuted = [tags_M, *(tags_U[rng.permutation(len(units))][unit_M] for _ in range(num_permutations))]
    rows = []
    for tag in ["all", *sorted(set(tags_K.tolist()) & set(tags_M.tolist()))]:
        value_R = np.array([_auroc(cosine_KM, tags_K, new_M, tag) for new_M in permuted])
        if not np.isfinite(value_R[0]):
            continue
        same, other = _kinds(tags_K, tags_M, tag)
        unchanged = np.mean([(_kinds(tags_K, new_M, tag)[0] == same).all() for new_M in permuted[1:]])
        rows.append([
            tag, int(same.sum()), int(other.sum()), len(units), float(cosine_KM[same].mean()), float(cosine_KM[other].mean()), float(value_R[0]),
            float((value_R >= value_R[0] - 1e-12).mean()), max(float(unchanged), 1 / len(permuted)),
        ])  # fmt: skip
    return pd.DataFrame(rows, columns=columns)


def _kinds(tags_K: npt.NDArray[np.str_], tags_M: npt.NDArray[np.str_], tag: str) -> tuple[Bools, Bools]:
    """Which pairs (K, M) are of the tag, and which are of two tags, one of them the tag; for `all`: of any one, of any two."""
    same_KM = tags_K[:, None] == tags_M[None, :]
    if tag == "all":
        return same_KM, ~same_KM
    one_KM = (tags_K == tag)[:, None] | (tags_M == tag)[None, :]
    return same_KM & one_KM, ~same_KM & one_KM


def _auroc(cosine_KM: Floats, tags_K: npt.NDArray[np.str_], tags_M: npt.NDArray[np.str_], tag: str) -> float:
    same, other = _kinds(tags_K, tags_M, tag)
    known = np.isfinite(cosine_KM)
    same, other = same & known, other & known
    a, b = int(same.sum()), int(other.sum())
    if not a or not b:
        return float("nan")
    ranks = rankdata(np.concatenate([cosine_KM[same], cosine_KM[other]]))
    return float((ranks[:a].sum() - a * (a + 1) / 2) / (a * b))

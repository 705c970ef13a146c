"""What one-to-one orthologs do alike in two species, and what they do not (spec section 10).

Two finished perturbations, one per species, are joined gene by gene. A correlation of their shifts is not yet conservation: a
shift follows much from a gene's rank and coverage, which orthologs share. So it stands beside the same correlation after
orthologs were exchanged among genes of like rank and coverage. Neighbourhoods of genes (in an encoder's token vectors, in
response matrices) are compared in the same way.

Letters: G pairs of orthologs, D width, K neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import stats as scipy_stats

from mixgf import artifacts, checkpoint, effects, keyed, responses, species, stats, storage
from mixgf.config import Config, UserError, split_named
from mixgf.dataset import Corpus
from mixgf.parts import Places
from mixgf.progress import say
from mixgf.stats import Floats, Ints

LEVEL = 0.05
BIN = 8
"""Fewest genes that exchange places."""
TIE = np.float32(1e-6)
"""Cosines nearer than this are as good as equal."""
EVIDENCE = (
    "gene", "symbol", "num_cells", "num_donors", "coverage", "mean_rank", "shift", "shift_low", "shift_high", "p_cell", "fdr_cell",
    "p_donor", "fdr_donor", "null_percentile", "rank_expected", "rank_error", "de_statistic", "warnings",
)  # fmt: skip
"""Columns of a perturbation's table, and of `with_errors`, that stand on either side."""
FREE = 2 * stats.MIN_BACKGROUND - 1
"""Degrees of freedom of a rank's expectation: the fewest genes of its fit less its two parameters."""


def alike_bins(features_GF: Floats, size: int = BIN) -> Ints:
    """Bins of genes that are alike: halves by one feature after the other, while both halves hold `size` genes."""
    ranks = np.stack([scipy_stats.rankdata(column, method="ordinal") for column in features_GF.T], axis=1)
    open_, done = [(np.arange(len(ranks)), 0)], []
    while open_:
        rows, turn = open_.pop()
        if len(rows) < 2 * size:
            done.append(rows)
            continue
        order = rows[np.argsort(ranks[rows, turn % ranks.shape[1]], kind="stable")]
        open_ += [(half, turn + 1) for half in (order[len(order) // 2 :], order[: len(order) // 2])]
    bins_G = np.empty(len(ranks), dtype=np.int64)
    for number, rows in enumerate(done):
        bins_G[rows] = number
    return bins_G


def exchanged(bins_G: Ints, rng: np.random.Generator) -> Ints:
    """A random exchange of places within bins, (G,)."""
    order = np.lexsort((rng.random(len(bins_G)), bins_G))
    out_G = np.empty(len(bins_G), dtype=np.int64)
    out_G[np.argsort(bins_G, kind="stable")] = order
    return out_G


def _interval(draws: list[float]) -> tuple[float, float]:
    low, high = np.nanquantile(draws, [0.025, 0.975]) if np.isfinite(draws).any() else (np.nan, np.nan)
    return float(low), float(high)


def with_errors(genes: pd.DataFrame) -> pd.DataFrame:
    """A perturbation's table with `rank_error`, the standard error of `rank_expected`."""
    found = []
    for _, part in genes.sort_values("gene").groupby("operation"):
        among_G = part["reference"].to_numpy(bool) if "reference" in part else None
        error_G = stats.expectation_error(
            part["shift"].to_numpy(float), effects.places(part["mean_rank"].to_numpy(float)), among_G
        )
        found.append(part.assign(rank_error=error_G))
    return pd.concat(found)


def pair(
    one: pd.DataFrame,
    other: pd.DataFrame,
    partners: Mapping[str, str],
    names: tuple[str, str],
    evidence: Sequence[str] = EVIDENCE,
) -> pd.DataFrame:
    """A row per operation and pair of orthologs that both perturbations scored; columns of either end in its species.

    Rows are by gene: a perturbation's table is by falling shift, and whatever goes by order where genes are equal (coverage often is)
    would see it.

    Args:
        one: table of genes of a perturbation of the first species.
        other: of the second.
        partners: one-to-one orthologs, first to second species.
        names: the species.
        evidence: the columns, `gene` among them.
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


def _error(frame: pd.DataFrame, name: str) -> tuple[Floats, Floats]:
    """Standard error of the shift of either side, from its t interval, and its degrees of freedom."""
    donors, cells = frame[f"num_donors_{name}"].to_numpy(float), frame[f"num_cells_{name}"].to_numpy(float)
    free_G = np.where(donors >= stats.MIN_CLUSTERS, donors, cells) - 1
    half_G = (frame[f"shift_high_{name}"] - frame[f"shift_low_{name}"]).to_numpy(float) / 2
    return half_G / scipy_stats.t.ppf(0.975, np.maximum(free_G, 1)), free_G


def judged(frame: pd.DataFrame, names: tuple[str, str]) -> pd.DataFrame:
    """Paired rows of one operation with the difference of their shifts, and how well both reverse the state.

    Added: `difference` (first less second species) with its interval (Zou and Donner 2008, from either side's), `p_differs`
    of the difference less the one that the gene's rank predicts in either species (`rank_expected`; perturbing anything may move one
    species' cells more), Welch's t with the errors of both shifts and of both expectations (NaN without these), with its `fdr_differs`;
    `interval_by` (donors, or cells, which says nothing about other donors); `direction` (towards, away, opposite);
    `percentile_both`, the smaller of the percentiles among genes of like rank and coverage; `p_both`, the larger donor-level p
    (both must hold), `fdr_both`; `doubts`, either side's warnings; `place`, 1 = the best of those that go towards the goal in both
    species, by `percentile_both`, then by the smaller shift; 0 = it does not.
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
    out["p_differs"], out["fdr_differs"] = p, stats.benjamini_hochberg(p)
    replicated = (frame[[f"num_donors_{n}" for n in names]] >= stats.MIN_CLUSTERS).all(axis=1)
    out["interval_by"] = np.where(replicated, "donors", "cells")
    towards, away = (np.logical_and(*(sign * s > 0 for s in shift_2G)) for sign in (1, -1))
    out["direction"] = np.select([towards, away], ["towards", "away"], "opposite")
    out["percentile_both"] = np.minimum(frame[f"null_percentile_{a}"], frame[f"null_percentile_{b}"])
    out["p_both"] = np.maximum(
        frame[f"p_donor_{a}"].to_numpy(float), frame[f"p_donor_{b}"].to_numpy(float)
    )  # NaN stays NaN
    out["fdr_both"] = stats.benjamini_hochberg(out["p_both"].to_numpy(float))
    out["doubts"] = [
        "; ".join(f"{n}: {text}" for n, text in zip(names, texts, strict=True) if text)
        for texts in zip(*(frame[f"warnings_{n}"] for n in names), strict=True)
    ]
    key = np.lexsort((-np.minimum(*shift_2G), -np.nan_to_num(out["percentile_both"].to_numpy(float), nan=-1), ~towards))
    place = np.zeros(len(frame), dtype=np.int64)
    place[key[: int(towards.sum())]] = np.arange(1, int(towards.sum()) + 1)
    return out.assign(place=place).drop(columns=[f"warnings_{n}" for n in names])


def response(frame: pd.DataFrame, names: tuple[str, str], num: int, rng: np.random.Generator) -> dict[str, object]:
    """How alike the shifts of one operation are: Spearman, its bootstrap interval over genes, and the matched null.

    `whole` is of the shifts as they are. The rest is of what is left of them beyond what a gene's rank and then its coverage predict in
    its own species (`stats.expected_by_rank` among these genes). The null exchanges orthologs among genes of like rank and coverage (in
    the mean of both species): `null` is its mean, `p` how often it is at least as high. Intervals over genes say nothing
    about other donors.
    """
    shift_2G = [frame[f"shift_{n}"].to_numpy(float) for n in names]
    rank_2G = [effects.places(frame[f"mean_rank_{n}"].to_numpy(float)) for n in names]
    coverage_2G = [frame[f"coverage_{n}"].to_numpy(float) for n in names]
    a_G, b_G = (_beyond(*several) for several in zip(shift_2G, rank_2G, coverage_2G, strict=True))
    bins_G = alike_bins(_between([rank_2G, coverage_2G]))
    value = stats.spearman(a_G, b_G)
    draws = [stats.spearman(a_G[rows], b_G[rows]) for rows in rng.integers(0, len(a_G), (num, len(a_G)))]
    nulls = [stats.spearman(a_G, b_G[exchanged(bins_G, rng)]) for _ in range(num)]
    low, high = _interval(draws)
    null_low, null_high = _interval(nulls)
    return {
        "num_genes": len(frame), "whole": stats.spearman(*shift_2G), "spearman": value, "low": low, "high": high, "null": float(np.mean(nulls)),
        "null_low": null_low, "null_high": null_high, "p": _p(value, nulls), "median_difference": float(np.median(shift_2G[0] - shift_2G[1])),
    }  # fmt: skip


def _beyond(shift_G: Floats, *features: Floats) -> Floats:
    """What is left of shifts beyond what one feature after the other predicts."""
    for feature_G in features:
        shift_G = shift_G - stats.expected_by_rank(shift_G, feature_G)
    return shift_G


def _between(features: Sequence[Sequence[Floats]]) -> Floats:
    """Features of both species as one, (G, F): sums of a gene's places."""
    return np.stack([sum(map(scipy_stats.rankdata, both)) for both in features], axis=1)


def _p(value: float, nulls: list[float]) -> float:
    """How often nothing gives as much, the value itself counted; NaN where there is no value."""
    return (1 + sum(n >= value for n in nulls)) / (1 + len(nulls)) if np.isfinite(value) else float("nan")


MIN_PAIRS = 2 * BIN
"""Fewest pairs of orthologs of which anything is said."""


def conserved(
    one: pd.DataFrame, other: pd.DataFrame, partners: Mapping[str, str], names: tuple[str, str], *, num: int, seed: int
) -> dict[str, pd.DataFrame]:
    """Tables `conserved` (a row per operation and pair, see `judged`) and `conserved_summary` (see `response`)."""
    rows, summaries = [], []
    for number, (operation, frame) in enumerate(pair(one, other, partners, names).groupby("operation", sort=True)):
        rows.append(judged(frame.reset_index(drop=True), names))
        found = rows[-1]
        summary: dict[str, object] = {"operation": operation, "first": names[0], "second": names[1]}
        if len(frame) >= MIN_PAIRS:
            summary |= response(frame, names, num, np.random.default_rng([seed, number, 95]))
        usual = found["percentile_both"] > effects.ORDINARY[1]
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


# networks


def neighbours(vectors_GD: NDArray[np.floating], k: int, rng: np.random.Generator, *, block: int = 1024) -> Ints:
    """The `k` nearest other genes of every gene by cosine, (G, K), in no order.

    Equally near ones (profiles with nothing in common) are drawn: taken by number they would be the same in two species.
    """
    unit = vectors_GD / np.maximum(np.linalg.norm(vectors_GD, axis=1, keepdims=True), 1e-12)
    found = np.empty((len(unit), k), dtype=np.int64)
    for start in range(0, len(unit), block):
        scores = (unit[start : start + block] @ unit.T).astype(np.float32)
        scores += TIE * rng.random(scores.shape, dtype=np.float32)
        rows = np.arange(len(scores))
        scores[rows, start + rows] = -np.inf
        found[start : start + block] = np.argpartition(-scores, k - 1, axis=1)[:, :k]
    return found


def near(neighbours_GK: Ints) -> NDArray[np.bool_]:
    """Whether a gene is among another's neighbours, (G, G)."""
    out_GG = np.zeros((len(neighbours_GK),) * 2, dtype=bool)
    np.put_along_axis(out_GG, neighbours_GK, values=True, axis=1)
    return out_GG


def shared(near_GG: NDArray[np.bool_], other_GK: Ints, place_G: Ints) -> Floats:
    """Share of each gene's neighbours in the first species whose orthologs are neighbours in the second, (G,).

    `place_G` says which gene of the second is taken for the ortholog of each of the first (a permutation).
    """
    back_G = np.argsort(place_G)  # names of the second species' genes
    return near_GG[np.arange(len(near_GG))[:, None], back_G[other_GK[place_G]]].mean(axis=1)


def overlap(
    one_GD: NDArray[np.floating],
    other_GD: NDArray[np.floating],
    features_GF: Floats,
    *,
    k: int,
    num: int,
    rng: np.random.Generator,
) -> dict[str, object]:
    """How much of the neighbourhoods of orthologs is the same: mean share of `k`, Jaccard, interval, and the matched null.

    The interval is a bootstrap over genes (which share neighbours, so it is somewhat narrow). The null exchanges orthologs among
    genes of like `features_GF` (how frequent they are in either species), as like as `BIN` to twice as many genes can be.
    """
    ours_GK, theirs_GK = (neighbours(v, k, rng) for v in (one_GD, other_GD))
    own, bins_G, near_GG = np.arange(len(one_GD)), alike_bins(features_GF), near(ours_GK)
    share_G = shared(near_GG, theirs_GK, own)
    low, high = _interval([float(share_G[rows].mean()) for rows in rng.integers(0, len(own), (num, len(own)))])
    nulls = [float(shared(near_GG, theirs_GK, exchanged(bins_G, rng)).mean()) for _ in range(num)]
    null_low, null_high = _interval(nulls)
    return {
        "num_genes": len(own), "k": k, "share": float(share_G.mean()), "low": low, "high": high, "jaccard": float((share_G / (2 - share_G)).mean()),
        "null": float(np.mean(nulls)), "null_low": null_low, "null_high": null_high, "chance": k / (len(own) - 1),
        "p": _p(float(share_G.mean()), nulls),
    }  # fmt: skip


def profiles(matrix: pd.DataFrame, operation: str) -> pd.DataFrame:
    """Perturbed genes by what is specific in the responses of other genes (`responses.specific`), 0 where that is not known.

    Genes of which nothing specific is known are left out.
    """
    found = responses.specific(matrix[matrix["operation"] == operation])
    frame = pd.DataFrame({c: found[c].astype(str) for c in ("gene", "responding")}).assign(excess=found["excess"])
    table = frame.pivot_table(index="gene", columns="responding", values="excess").fillna(0.0)
    return table[(table != 0).any(axis=1)]


def aligned(one: pd.DataFrame, other: pd.DataFrame, partners: Mapping[str, str]) -> tuple[Floats, Floats, list[str]]:
    """Rows of both frames (indexed by gene) that are orthologs, in one order, and the first species' genes."""
    there = set(other.index)
    genes = [g for g in one.index if partners.get(g) in there]
    return one.loc[genes].to_numpy(float), other.loc[[partners[g] for g in genes]].to_numpy(float), genes


# from artifacts

SAMPLE = 2000
"""Cells of a species by which a gene's frequency is judged."""
MIN_FREQUENCY = 0.01
"""Genes in fewer of these cells have hardly been trained."""
RESAMPLED = 200
"""Exchanges and bootstrap draws of a network."""


def given(config: Config) -> dict[str, pd.DataFrame]:
    """Table of genes of either perturbation of `compare.responses`, by species; none where none are given.

    Raises:
        UserError: one is not there or not finished, or holds no gene of its species, or they have no ortholog in common.
    """
    found = {}
    for name, uri in map(split_named, config.compare.responses):
        artifacts.require(uri, "perturbation")
        frame = storage.read_table(storage.join(uri, "genes.parquet")).to_pandas()
        mine = frame[frame["species"] == name]
        if mine.empty:
            msg = f"compare.responses = {name}={uri}: its genes are of {', '.join(sorted(set(frame['species'])))}; name each perturbation after its species"
            raise UserError(msg)
        found[name] = mine
    if not found:
        return found
    one, other = found
    if pair(found[one], found[other], _partners(config, one, other), (one, other), ("gene",)).empty:
        msg = (f"compare.responses: {' and '.join(found)} share no operation on a one-to-one ortholog; perturb the orthologs of one species' "
               "genes in the other (perturb.genes), and see vocab.orthologs")  # fmt: skip
        raise UserError(msg)
    return found


def _partners(config: Config, one: str, other: str) -> Mapping[str, str]:
    """One-to-one orthologs of two species."""
    return species.orthologs(config.vocab.orthologs).get((one, other), {})


def tables(config: Config) -> dict[str, pd.DataFrame]:
    """Conserved and divergent responses, and conserved targets (`conserved`), of the perturbations that the config names."""
    both = given(config)
    if not both:
        return {}
    (first, one), (second, other) = ((name, with_errors(genes)) for name, genes in both.items())
    partners = _partners(config, first, second)
    return conserved(one, other, partners, (first, second), num=config.compare.num_permutations, seed=config.seed)


def networks(config: Config, encoders: Mapping[str, Places]) -> dict[str, pd.DataFrame]:
    """Table `networks`: overlap of orthologs' neighbourhoods by pair of species and space (`overlap`), or `why` there is none.

    Spaces: the token vectors of every trained encoder, and the responses that the perturbations of `compare.responses` measured
    (`perturb.response`). None with `compare.neighbours` = 0.
    """
    if not config.compare.neighbours:
        return {}
    rows: list[dict[str, object]] = []
    often: dict[tuple[str, str], Floats] = {}
    for name, places in encoders.items():
        corpus, (encoder, _) = Corpus(places.corpus), checkpoint.load_encoder(places.checkpoint)
        for s in corpus.species:
            if (places.corpus, s) not in often:
                often[places.corpus, s] = _frequency(corpus, s, config.seed)
        vectors_VD = encoder.tokens.detach().numpy()
        for one, other in combinations(corpus.species, 2):
            rows.append(
                _of_tokens(config, name, corpus, vectors_VD, {s: often[places.corpus, s] for s in (one, other)})
            )
    rows += _of_responses(config)
    for row in rows:
        if row["why"]:
            say(f"compare: no network of {row['first']} and {row['second']} by {row['space']}: {row['why']}")
    return {"networks": pd.DataFrame(rows)} if rows else {}


def _of_tokens(
    config: Config, encoder: str, corpus: Corpus, vectors_VD: NDArray[np.floating], often: dict[str, Floats]
) -> dict[str, object]:
    """The row of an encoder's token vectors and two species, by the share of their cells that hold each gene."""
    one, other = often
    partners, space = _partners(config, one, other), f"{encoder}: token vectors"
    if _shared_ids(corpus, one, other, partners):
        return {
            "space": space,
            "first": one,
            "second": other,
            "num_genes": 0,
            "why": "orthologs share an id, and so a vector",
        }
    first, second = (_vectors(corpus, s, vectors_VD, often[s]) for s in often)
    share = [dict(zip(corpus.vocabulary.of(s).genes, often[s], strict=True)) for s in often]
    a, b, genes = aligned(first, second, partners)
    features = np.array([[share[0][g], share[1][partners[g]]] for g in genes])
    return _row(config, space, (one, other), (a, b), features)


def _of_responses(config: Config) -> list[dict[str, object]]:
    """The rows of the response matrices of `compare.responses`, by operation."""
    both, uris = given(config), dict(map(split_named, config.compare.responses))
    if not both:
        return []
    one, other = both
    files = {s: storage.join(uris[s], "responses.parquet") for s in both}
    lacking = [s for s, file in files.items() if not storage.exists(file)]
    if lacking:
        why = f"{' and '.join(lacking)} perturbed without a response matrix (perturb.response)"
        return [{"space": "responses", "first": one, "second": other, "num_genes": 0, "why": why}]
    matrices = [storage.read_table(file).to_pandas() for file in files.values()]
    partners, rows = _partners(config, one, other), []
    for operation in sorted(set(matrices[0]["operation"]) & set(matrices[1]["operation"])):
        first, second = (profiles(matrix, str(operation)) for matrix in matrices)
        a, b, genes = aligned(first, second, partners)
        tables = [both[s][both[s]["operation"] == operation].set_index("gene") for s in both]
        mine = [tables[0].loc[genes], tables[1].loc[[partners[g] for g in genes]]]
        features = _between(
            [
                [effects.places(t["mean_rank"].to_numpy(float)) for t in mine],
                [t["coverage"].to_numpy(float) for t in mine],
            ]
        )
        row = _row(config, f"responses to {operation}", (one, other), (a, b), features)
        if row["why"]:
            few = f"known is what {responses.MIN_CELLS} cells show in which the responding gene kept its place: perturb more cells (perturb.max_cells)"
            row["why"] = f"{row['why']}; {few}"
        rows.append(row)
    return rows


def _row(
    config: Config, space: str, names: tuple[str, str], vectors: tuple[Floats, Floats], features_GF: Floats
) -> dict[str, object]:
    """The row of one space; why there is none where too few orthologs are in it."""
    num = len(features_GF)
    row: dict[str, object] = {"space": space, "first": names[0], "second": names[1], "num_genes": num, "why": ""}
    if num < MIN_PAIRS:
        return row | {"why": f"{num} orthologs are known in both species, {MIN_PAIRS} are needed"}
    rng = np.random.default_rng([config.seed, num, 96])
    k = min(config.compare.neighbours, num // 5)
    return row | overlap(*vectors, features_GF, k=k, num=RESAMPLED, rng=rng)


def _shared_ids(corpus: Corpus, one: str, other: str, partners: Mapping[str, str]) -> bool:
    tokens = [dict(zip((g := corpus.vocabulary.of(s)).genes, g.tokens.tolist(), strict=True)) for s in (one, other)]
    return any(tokens[0][a] == tokens[1].get(b) for a, b in partners.items() if a in tokens[0])


def _frequency(corpus: Corpus, name: str, seed: int) -> Floats:
    """Share of a species' cells (of a sample) whose sentences hold each of its genes, in the vocabulary's order."""
    cells = np.flatnonzero(corpus.species_N == corpus.species.index(name))
    if not len(cells):
        return np.zeros(len(corpus.vocabulary.of(name).tokens))
    cells = np.sort(cells[np.argsort(keyed.hashed(seed, 97, cells), kind="stable")][:SAMPLE])
    counts_V = np.bincount(corpus.tokens(cells)[0], minlength=corpus.vocabulary.size)
    return counts_V[corpus.vocabulary.species_tokens(name)] / len(cells)


def _vectors(corpus: Corpus, name: str, vectors_VD: NDArray[np.floating], frequency_G: Floats) -> pd.DataFrame:
    genes = corpus.vocabulary.of(name)
    known = frequency_G >= MIN_FREQUENCY
    return pd.DataFrame(vectors_VD[genes.tokens[known]], index=genes.genes[known])

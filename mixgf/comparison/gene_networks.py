"""Overlap of the neighbourhoods of orthologs in two species.

The neighbours of a gene are its nearest genes by cosine: of token vectors of an encoder, or of its responses to perturbations.

Letters: G pairs of orthologs, D width, K neighbours, V token ids.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from mixgf.arrays import Float64s, Ints
from mixgf.classification.paths import ArtifactPaths
from mixgf.comparison.conserved_response import load_perturbations, ortholog_partners
from mixgf.comparison.matched_null import (
    MIN_PAIRS,
    permutation_p,
    permute_within_bins,
    quantile_interval,
    rank_sums,
    similar_gene_bins,
)
from mixgf.config.run import Config
from mixgf.console import say
from mixgf.corpus.reader import Corpus
from mixgf.encoder import checkpoint
from mixgf.perturbation import gene_responses, gene_table
from mixgf.rng import hashed
from mixgf.storage import artifacts, files

TIE = np.float32(1e-6)
"""Cosines that differ by less are treated as equal."""


def neighbours(vectors_GD: NDArray[np.floating], k: int, rng: np.random.Generator, *, block: int = 1024) -> Ints:
    """The `k` nearest other genes of every gene by cosine, (G, K), in no order.

    Ties (profiles without common entries) are broken at random. Broken by position they would agree between species by
    construction.
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


def adjacency(neighbours_GK: Ints) -> NDArray[np.bool_]:
    """Whether a gene (column) is a neighbour of another (row), (G, G)."""
    out_GG = np.zeros((len(neighbours_GK),) * 2, dtype=bool)
    np.put_along_axis(out_GG, neighbours_GK, values=True, axis=1)
    return out_GG


def shared_neighbours(near_GG: NDArray[np.bool_], other_GK: Ints, place_G: Ints) -> Float64s:
    """Share of each gene's neighbours in the first species whose orthologs are its neighbours in the second, (G,).

    `place_G` is the position in the second species of the ortholog of each gene of the first (a permutation).
    """
    back_G = np.argsort(place_G)  # position in the first species of each gene of the second
    return near_GG[np.arange(len(near_GG))[:, None], back_G[other_GK[place_G]]].mean(axis=1)


def overlap(
    one_GD: NDArray[np.floating],
    other_GD: NDArray[np.floating],
    features_GF: Float64s,
    *,
    k: int,
    num: int,
    rng: np.random.Generator,
) -> dict[str, object]:
    """Overlap of the neighbourhoods of orthologs: mean share of the `k` neighbours, mean Jaccard index, interval, and matched null.

    The interval is a bootstrap over genes. Genes share neighbours, so it is somewhat too narrow. The null permutes orthologs among
    genes with similar `features_GF` (`matched_null.similar_gene_bins`).
    """
    ours_GK, theirs_GK = (neighbours(v, k, rng) for v in (one_GD, other_GD))
    own, bins_G, near_GG = np.arange(len(one_GD)), similar_gene_bins(features_GF), adjacency(ours_GK)
    share_G = shared_neighbours(near_GG, theirs_GK, own)
    low, high = quantile_interval([float(share_G[rows].mean()) for rows in rng.integers(0, len(own), (num, len(own)))])
    nulls = [float(shared_neighbours(near_GG, theirs_GK, permute_within_bins(bins_G, rng)).mean()) for _ in range(num)]
    null_low, null_high = quantile_interval(nulls)
    return {
        "num_genes": len(own), "k": k, "share": float(share_G.mean()), "low": low, "high": high, "jaccard": float((share_G / (2 - share_G)).mean()),
        "null": float(np.mean(nulls)), "null_low": null_low, "null_high": null_high, "chance": k / (len(own) - 1),
        "p": permutation_p(float(share_G.mean()), nulls),
    }  # fmt: skip


def profiles(matrix: pd.DataFrame, operation: str) -> pd.DataFrame:
    """Perturbed genes (rows) by specific responses of other genes (columns; `gene_responses.specific_responses`), 0 where not measured.

    Genes without any specific response are left out.
    """
    found = gene_responses.specific_responses(matrix[matrix["operation"] == operation])
    frame = pd.DataFrame({c: found[c].astype(str) for c in ("gene", "responding")}).assign(excess=found["excess"])
    table = frame.pivot_table(index="gene", columns="responding", values="excess").fillna(0.0)
    return table[(table != 0).any(axis=1)]


def align_orthologs(
    one: pd.DataFrame, other: pd.DataFrame, partners: Mapping[str, str]
) -> tuple[Float64s, Float64s, list[str]]:
    """Rows of both frames (indexed by gene) for genes with an ortholog in the other, in the same order, and the first species' genes."""
    there = set(other.index)
    genes = [g for g in one.index if partners.get(g) in there]
    return one.loc[genes].to_numpy(float), other.loc[[partners[g] for g in genes]].to_numpy(float), genes


SAMPLE = 2000
"""Cells of a species in which the frequency of genes is counted."""
MIN_FREQUENCY = 0.01
"""Share of these cells that a gene must be in; vectors of rarer genes are hardly trained."""
RESAMPLED = 200
"""Permutations and bootstrap draws of a network."""


def networks(config: Config, encoders: Mapping[str, ArtifactPaths]) -> dict[str, pd.DataFrame]:
    """Table `networks`: `overlap` by pair of species and space, or the reason `why` it is missing.

    Spaces are the token vectors of every trained encoder, and the responses that the perturbations of `compare.responses`
    measured (`perturb.response`). No table with `compare.neighbours` = 0.
    """
    if not config.compare.neighbours:
        return {}
    rows: list[dict[str, object]] = []
    often: dict[tuple[str, str], Float64s] = {}
    for name, paths in encoders.items():
        corpus, (encoder, _) = Corpus(paths.corpus), checkpoint.load_encoder(paths.checkpoint)
        for s in corpus.species:
            if (paths.corpus, s) not in often:
                often[paths.corpus, s] = _frequency(corpus, s, config.seed)
        vectors_VD = encoder.tokens.detach().numpy()
        for one, other in combinations(corpus.species, 2):
            rows.append(_of_tokens(config, name, corpus, vectors_VD, {s: often[paths.corpus, s] for s in (one, other)}))
    rows += _of_responses(config)
    for row in rows:
        if row["why"]:
            say(f"compare: no network of {row['first']} and {row['second']} by {row['space']}: {row['why']}")
    return {"networks": pd.DataFrame(rows)} if rows else {}


def _of_tokens(
    config: Config, encoder: str, corpus: Corpus, vectors_VD: NDArray[np.floating], often: dict[str, Float64s]
) -> dict[str, object]:
    """The row of an encoder's token vectors and two species. `often` has the share of cells with each gene, by species."""
    one, other = often
    partners, space = ortholog_partners(config, one, other), f"{encoder}: token vectors"
    if _shared_ids(corpus, one, other, partners):
        return {
            "space": space,
            "first": one,
            "second": other,
            "num_genes": 0,
            "why": "orthologs share a token id, and so a vector",
        }
    first, second = (_vectors(corpus, s, vectors_VD, often[s]) for s in often)
    share = [dict(zip(corpus.vocabulary.species_genes(s).genes, often[s], strict=True)) for s in often]
    a, b, genes = align_orthologs(first, second, partners)
    features = np.array([[share[0][g], share[1][partners[g]]] for g in genes])
    return _row(config, space, (one, other), (a, b), features)


def _of_responses(config: Config) -> list[dict[str, object]]:
    """The rows of the response matrices of `compare.responses`, one per operation."""
    both, uris = load_perturbations(config), config.compare.responses
    if not both:
        return []
    one, other = both
    paths = {s: files.join(uris[s], "responses.parquet") for s in both}
    lacking = [s for s, file in paths.items() if not files.exists(file)]
    if lacking:
        why = f"{' and '.join(lacking)} perturbed without a response matrix (perturb.response)"
        return [{"space": "responses", "first": one, "second": other, "num_genes": 0, "why": why}]
    matrices = [artifacts.read_artifact_table(uris[s], "responses").to_pandas() for s in paths]
    partners, rows = ortholog_partners(config, one, other), []
    for operation in sorted(set(matrices[0]["operation"]) & set(matrices[1]["operation"])):
        first, second = (profiles(matrix, str(operation)) for matrix in matrices)
        a, b, genes = align_orthologs(first, second, partners)
        tables = [both[s][both[s]["operation"] == operation].set_index("gene") for s in both]
        mine = [tables[0].loc[genes], tables[1].loc[[partners[g] for g in genes]]]
        features = rank_sums(
            [
                [gene_table.comparison_ranks(t["mean_rank"].to_numpy(float)) for t in mine],
                [t["coverage"].to_numpy(float) for t in mine],
            ]
        )
        row = _row(config, f"responses to {operation}", (one, other), (a, b), features)
        if row["why"]:
            few = f"a response needs {gene_responses.MIN_CELLS} cells in which the responding gene keeps its rank: perturb more cells (perturb.max_cells)"
            row["why"] = f"{row['why']}; {few}"
        rows.append(row)
    return rows


def _row(
    config: Config, space: str, names: tuple[str, str], vectors: tuple[Float64s, Float64s], features_GF: Float64s
) -> dict[str, object]:
    """The row of one space; with too few orthologs it has the reason only."""
    num = len(features_GF)
    row: dict[str, object] = {"space": space, "first": names[0], "second": names[1], "num_genes": num, "why": ""}
    if num < MIN_PAIRS:
        return row | {"why": f"{num} orthologs have vectors in both species, {MIN_PAIRS} are needed"}
    rng = np.random.default_rng([config.seed, num, 96])
    k = min(config.compare.neighbours, num // 5)
    return row | overlap(*vectors, features_GF, k=k, num=RESAMPLED, rng=rng)


def _shared_ids(corpus: Corpus, one: str, other: str, partners: Mapping[str, str]) -> bool:
    tokens = [
        dict(zip((g := corpus.vocabulary.species_genes(s)).genes, g.tokens.tolist(), strict=True)) for s in (one, other)
    ]
    return any(tokens[0][a] == tokens[1].get(b) for a, b in partners.items() if a in tokens[0])


def _frequency(corpus: Corpus, name: str, seed: int) -> Float64s:
    """Share of a sample of a species' cells with each of its genes in the sentence, in the order of the vocabulary, (G,)."""
    cells = np.flatnonzero(corpus.species_N == corpus.species.index(name))
    if not len(cells):
        return np.zeros(len(corpus.vocabulary.species_genes(name).tokens))
    cells = np.sort(cells[np.argsort(hashed(seed, 97, cells), kind="stable")][:SAMPLE])
    counts_V = np.bincount(corpus.tokens(cells)[0], minlength=corpus.vocabulary.size)
    return counts_V[corpus.vocabulary.species_tokens(name)] / len(cells)


def _vectors(corpus: Corpus, name: str, vectors_VD: NDArray[np.floating], frequency_G: Float64s) -> pd.DataFrame:
    genes = corpus.vocabulary.species_genes(name)
    known = frequency_G >= MIN_FREQUENCY
    return pd.DataFrame(vectors_VD[genes.tokens[known]], index=genes.genes[known])

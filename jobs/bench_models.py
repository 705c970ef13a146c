"""All models on raw counts beside each other, without an encoder: `bench.py models`.

A random fifth of the cells of each file is tested, as in `classify.splits=random`; the figures are macro F1 and the CPU time of
training and prediction. Baseline: logistic regression on z-scored variable genes (`hvg_logreg`). One seed.

Then the genes of a new data set, decided on validation cells: a model is trained on one file, and tested on cells of the same file in
which the genes are zero that another file never detects. It reads the genes of both files, or (baseline) all genes.

Then the strength of the regressions' penalty, which is the same on all data: `genes_logreg` and `pca_logreg` with the strength that
cross-validation inside the training cells prefers, beside the fixed one (baseline). Most cells of a file: `MOST_CELLS`; five splits.

Inputs: labelled cells in MIXGF_SHARED/data/h5ad/.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import anndata
import numpy as np
from bench_annotate import macro_f1
from bench_doublets import folder
from measure import Figure
from scipy import sparse

from mixgf.classification import linear_start, registry, simple_classifiers, splits
from mixgf.classification.labels import Labelled
from mixgf.classification.models.baselines import GenesLogisticRegression
from mixgf.classification.models.protocol import CountMatrix, CountsModel, Problem, problem_of
from mixgf.classification.readings import fit_reading
from mixgf.config.classification import Classify
from mixgf.config.run import Config

SETS = ("lung_mouse_zilionis", "immune_mouse_tabulamuris", "pbmc_human_pbmc3k")


def read(path: Path) -> tuple[sparse.csr_matrix, Labelled, np.ndarray]:
    """Raw counts, labelled cells and ids of the genes of one file, as one data set of one donor."""
    data = anndata.read_h5ad(path)
    data = data[~data.obs["cell_type"].astype(str).isin(["", "nan", "unknown"]).to_numpy()]
    same = np.full(data.n_obs, path.stem)
    labels = data.obs["cell_type"].astype(str).to_numpy().astype(np.str_)
    table = Labelled(
        cells=np.arange(data.n_obs), names=data.obs_names.to_numpy().astype(np.str_), labels=labels, species=same, groups=same,
        donors=same, datasets=same, transfer=same, sources=same,
    )  # fmt: skip
    return sparse.csr_matrix(data.X, dtype=np.float32), table, data.var["ensembl_id"].to_numpy().astype(np.str_)


PAIRS = (
    ("pbmc_human_pbmc3k", "pbmc_human_kang_ifnb"), ("pbmc_human_kang_ifnb", "pbmc_human_pbmc3k"),
    ("immune_mouse_tabulamuris", "lung_mouse_zilionis"), ("lung_mouse_zilionis", "immune_mouse_tabulamuris"),
)  # fmt: skip
"""Training file, and the file whose genes decide."""


def new_genes(config: Config) -> Iterator[Figure]:
    """Macro F1 with the genes of both files beside that with all genes."""
    for name, other in PAIRS:
        counts, table, genes = read(folder() / f"{name}.h5ad")
        (split,) = splits.make(table, config.classify, seed=0)
        theirs, _, their_genes = read(folder() / f"{other}.h5ad")
        both = np.isin(genes, their_genes[np.asarray((theirs > 0).sum(0)).ravel() > 0])
        true, scores = split.ids(table.labels[split.test]), []
        masked = sparse.csr_matrix(counts @ sparse.diags(both.astype(np.float32)))
        for train, target in ((counts[:, both], counts[:, both]), (counts, masked)):
            problem = problem_of(table, split, config, train[split.train], target[split.test])
            guess = GenesLogisticRegression().fit(problem).predict(problem.target).argmax(1)
            scores.append(macro_f1(true, guess, np.unique(true).tolist()))
        label = f"genes_logreg on {name}, {both.mean():.0%} of its genes are in {other}: genes of both / all, macro F1"
        yield Figure(figure=label, value=scores[0], unit="F1", baseline=scores[1], ratio=scores[0] / scores[1])


STRENGTHS = (1.0, 10.0, 100.0, 1000.0)
"""scikit-learn's `C` that are tried."""
MOST_CELLS = 750
LABELLED = (
    "brain_mouse_marques", "cellline_human_hashing", "cellline_human_scmixology", "gut_mouse_mca", "immune_mouse_tabulamuris",
    "kidney_mouse_tabulamuris", "lung_mouse_zilionis", "pancreas_human_baron", "pancreas_mouse_baron", "pbmc_human_kang_ifnb",
    "pbmc_human_pbmc3k", "spleen_mouse_jaitin",
)  # fmt: skip


def nested_strength(config: Config) -> Iterator[Figure]:
    """Macro F1 with the strength chosen inside the training cells beside that with the fixed one; of each file, and their mean."""
    fixed = simple_classifiers.STRENGTH
    means: dict[str, list[tuple[float, float]]] = {"genes_logreg": [], "pca_logreg": []}
    for name in LABELLED:
        counts, table, _ = read(folder() / f"{name}.h5ad")
        capped = splits.capped(table, config.classify, seed=0)
        counts = counts[capped.cells]
        found: dict[str, list[tuple[float, float]]] = {head: [] for head in means}
        for split in splits.make(capped, config.classify, seed=0):
            problem = problem_of(capped, split, config, counts[split.train], counts[split.test])
            true = split.ids(capped.labels[split.test])
            for head, scores in found.items():
                by_strength = _scores(problem, true, components=head == "pca_logreg")
                chosen = max(STRENGTHS, key=lambda c: (by_strength[c][0], c == fixed))
                scores.append((by_strength[chosen][1], by_strength[fixed][1]))
        for head, scores in found.items():
            means[head].append((float(np.mean([a for a, _ in scores])), float(np.mean([b for _, b in scores]))))
            yield _beside(f"{head} on {name}", *means[head][-1])
    for head, several in means.items():
        gap = np.array([a - b for a, b in several])
        error = gap.std(ddof=1) / len(gap) ** 0.5
        label = (
            f"{head}, mean of {len(gap)} files (difference {gap.mean():+.4f}, standard error over files {error:.4f})"
        )
        yield _beside(label, *(float(np.mean(side)) for side in zip(*several, strict=True)))


def _beside(label: str, chosen: float, fixed: float) -> Figure:
    label = f"{label}: strength chosen inside the training cells / fixed, macro F1"
    return Figure(figure=label, value=chosen, unit="F1", baseline=fixed, ratio=chosen / fixed)


def _scores(problem: Problem[CountMatrix], true: np.ndarray, *, components: bool) -> dict[float, tuple[float, float]]:
    """By strength, macro F1 of left-out training cells (three folds) and of the test cells."""
    reading = fit_reading(problem, "expression", components=components, length="common" if components else "cell")
    train, target = reading(problem.train), reading(problem.target)
    fold = linear_start.folds(problem.labels, problem.seed(7))

    def predict(rows: np.ndarray, cells: np.ndarray, strength: float) -> np.ndarray:
        head = simple_classifiers.logistic_regression(
            train[rows], problem.labels[rows], problem.num_classes, strength=strength, balanced=True
        )
        return head(cells).argmax(1)

    out = {}
    for strength in STRENGTHS:
        said = problem.labels.copy()
        for k in np.unique(fold[fold >= 0]):
            said[fold == k] = predict(fold != k, train[fold == k], strength)
        inside = macro_f1(problem.labels[fold >= 0], said[fold >= 0], np.unique(problem.labels[fold >= 0]).tolist())
        test = macro_f1(true, predict(fold >= -1, target, strength), np.unique(true).tolist())
        out[strength] = inside, test
    return out


def figures(*, quick: bool = False) -> Iterator[Figure]:
    """All figures."""
    config = Config(classify=Classify(splits=("random",)))
    kinds = [kind() for kind in registry.MODELS.values() if issubclass(kind, CountsModel)]
    for name in SETS[: 1 if quick else None]:
        counts, table, _ = read(folder() / f"{name}.h5ad")
        (split,) = splits.make(table, config.classify, seed=0)
        problem = problem_of(table, split, config, counts[split.train], counts[split.test])
        true = split.ids(table.labels[split.test])
        found: dict[str, tuple[float, float]] = {}
        for model in kinds:
            if model.skipped or (quick and model.seconds > 1):
                continue
            start = time.process_time()
            guess = model.fit(problem).predict(problem.target).argmax(1)
            f1 = macro_f1(true, guess, np.unique(true).tolist())
            found[model.head] = f1, time.process_time() - start
        usual = found["hvg_logreg"][0]
        label = f"{name} ({len(split.train):,} + {len(true):,} cells, {len(split.classes)} types)"
        for head, (f1, cpu) in found.items():
            yield Figure(figure=f"{label}: {head}, macro F1", value=f1, unit="F1", baseline=usual, ratio=f1 / usual)
            yield Figure(figure=f"{label}: {head}, CPU", value=cpu, unit="s")
    if not quick:
        yield from new_genes(config)
        yield from nested_strength(Config(classify=Classify(splits=("random",), seeds=5, max_cells=MOST_CELLS)))

"""All models on raw counts beside each other, without an encoder: `bench.py models`.

A random fifth of the cells of each file is tested, as in `classify.splits=random`; the figures are macro F1 and the CPU time of
training and prediction. Baseline: logistic regression on z-scored variable genes (`hvg_logreg`). One seed.

Then the genes of a new data set, decided on validation cells: a model is trained on one file, and tested on cells of the same file in
which the genes are zero that another file never detects. It reads the genes of both files, or (baseline) all genes.

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

from mixgf.classification import registry, splits
from mixgf.classification.labels import Labelled
from mixgf.classification.models.baselines import GenesLogisticRegression
from mixgf.classification.models.protocol import CountsModel, problem_of
from mixgf.config.classification import Classify
from mixgf.config.run import Config

SETS = ("lung_mouse_zilionis", "immune_mouse_tabulamuris", "pbmc_human_pbmc3k")


def read(path: Path) -> tuple[sparse.csr_matrix, Labelled, np.ndarray]:
    """Raw counts, labelled cells and ids of the genes of one file, as one data set of one donor."""
    data = anndata.read_h5ad(path)
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
    yield from () if quick else new_genes(config)

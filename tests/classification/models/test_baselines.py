"""Baselines: each stage against an independent form, and on the bundled real pancreas cells a floor that must be reached."""

from functools import cache

import anndata
import numpy as np
import pytest
from scipy import sparse, special, stats
from sklearn import metrics

from mixgf.classification import features, registry, simple_classifiers
from mixgf.classification.labels import Labelled
from mixgf.classification.models.protocol import Needs, Problem, problem_of
from mixgf.classification.registry import BASELINES
from mixgf.classification.splits import Split, make
from mixgf.config.classification import Classify
from mixgf.config.run import Config
from mixgf.corpus import raw_counts
from mixgf.corpus.raw_counts import Counts
from mixgf.genes import species
from mixgf.storage import files

ORTHOLOGS = ("resource:orthologs.parquet",)


@cache
def pancreas(name: str, every: int = 1) -> tuple[Counts, np.ndarray]:
    data = anndata.read_h5ad(files.local_path(f"resource:pancreas_{name}_baron.h5ad"))
    matrix = sparse.csr_matrix(
        (data.X.data.astype(np.float32), data.X.indices.astype(np.int32), data.X.indptr), shape=data.shape
    )
    genes = data.var["ensembl_id"].astype(str).to_numpy().astype(np.str_)
    _, first = np.unique(genes, return_index=True)
    first = np.sort(first[genes[first] != ""])
    found = Counts(matrix=matrix[::every][:, first], genes=genes[first], species=name)
    return found, data.obs["cell_type"].astype(str).to_numpy().astype(np.str_)[::every]


def labelled(labels: np.ndarray, species_: np.ndarray) -> Labelled:
    names = np.array([f"cell{i}" for i in range(len(labels))])
    same = np.full(len(labels), "pancreas")
    return Labelled(cells=np.arange(len(labels)), names=names, labels=labels, species=species_, groups=species_, donors=same,
                    datasets=species_, transfer=same, sources=species_)  # fmt: skip


def problem(matrix: sparse.csr_matrix, table: Labelled, split: Split) -> tuple[Problem, np.ndarray]:
    made = problem_of(table, split, Config(), matrix[split.train], matrix[split.test])
    return made, split.ids(table.labels[split.test])


def predicted(name: str, made: Problem) -> np.ndarray:
    return registry.parse(name).fit(made).predict(made.target)


@pytest.fixture(scope="module")
def within() -> tuple[Problem, np.ndarray]:
    cells, labels = pancreas("human", 4)
    table = labelled(labels, np.full(len(labels), "human"))
    (split,) = make(table, Classify(splits=("random",)), seed=0)
    return problem(cells.matrix, table, split)


@pytest.fixture(scope="module")
def between() -> tuple[Problem, np.ndarray]:
    (human, human_labels), (mouse, mouse_labels) = pancreas("human", 3), pancreas("mouse", 2)
    (a, b), _ = raw_counts.shared_gene_space([human, mouse], species.orthologs(ORTHOLOGS))
    labels = np.concatenate([human_labels, mouse_labels])
    table = labelled(labels, np.repeat(["human", "mouse"], [len(human_labels), len(mouse_labels)]))
    split = make(table, Classify(splits=("species",)), seed=0)[0]
    assert split.direction == "human>mouse"
    return problem(sparse.csr_matrix(sparse.vstack([a, b])), table, split)


INSTALLED = sorted(
    name for name in BASELINES if not registry.parse(name).skipped and registry.parse(name).needs is Needs.COUNTS
)
NAMES = [pytest.param(name, marks=[pytest.mark.slow] * (name == "scdeepsort")) for name in INSTALLED]
FLOORS = {
    "majority": 0.15,
    "celltypist": 0.93,
    "celltypist_vote": 0.88,
    "scdeepsort": 0.9,
    "genes_centroid": 0.9,
    "genes_logreg": 0.95,
    "genes_vote": 0.95,
    "hvg_logreg": 0.93,
    "joint_pca": 0.93,
    "joint_pca_centroid": 0.9,
    "pca_knn": 0.93,
    "pca_logreg": 0.93,
    "pseudobulk": 0.9,
    "rank_pca": 0.93,
}


@pytest.mark.parametrize("name", NAMES)
def test_on_real_cells_a_baseline_reaches_its_floor(name: str, within: tuple[Problem, np.ndarray]) -> None:
    made, true = within
    found = predicted(name, made)
    assert found.shape == (len(true), made.num_classes)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
    assert metrics.accuracy_score(true, found.argmax(1)) >= FLOORS[name]


@pytest.mark.parametrize(
    ("name", "floor"),
    [
        ("hvg_logreg", 0.8),
        ("pseudobulk", 0.7),
        ("pca_knn", 0.85),
        ("rank_pca", 0.7),
        ("joint_pca", 0.9),
        ("genes_vote", 0.8),
    ],
)
def test_between_species_a_baseline_carries_types_over(
    name: str, floor: float, between: tuple[Problem, np.ndarray]
) -> None:
    made, true = between
    assert made.across
    assert metrics.accuracy_score(true, predicted(name, made).argmax(1)) >= floor


@pytest.mark.parametrize("name", [name for name in INSTALLED if name not in {"celltypist_vote", "scdeepsort"}])
def test_a_cell_gets_the_same_prediction_whoever_is_tested_beside_it(
    name: str, within: tuple[Problem, np.ndarray]
) -> None:
    made, _ = within
    few = [0, 5, 17]
    fitted = registry.parse(name).fit(made)
    np.testing.assert_allclose(fitted.predict(made.target[few]), fitted.predict(made.target)[few], atol=1e-5)


def test_the_majority_is_the_training_frequencies() -> None:
    matrix = sparse.csr_matrix(np.ones((4, 2), dtype=np.float32))
    table = labelled(np.array(["b", "b", "a", "b", "a", "a"]), np.full(6, "human"))
    split = Split(group="", kind="random", direction="", seed=0, classes=("a", "b"), train=np.arange(4),
                  validation=np.arange(1), test=np.array([4, 5]))  # fmt: skip
    made, _ = problem(sparse.vstack([matrix, matrix[:2]], format="csr"), table, split)
    assert predicted("majority", made).tolist() == [[0.25, 0.75], [0.25, 0.75]]


def test_hand_worked_normalisation() -> None:
    logged = features.log_normalise(sparse.csr_matrix(np.array([[1, 3, 0], [0, 0, 0]], dtype=np.float32)))
    np.testing.assert_allclose(logged.toarray(), [[np.log1p(2500), np.log1p(7500), 0], [0, 0, 0]], rtol=1e-6)


def test_variable_genes_are_those_of_scanpy() -> None:
    import scanpy

    cells, _ = pancreas("mouse", 3)
    logged = features.log_normalise(cells.matrix)
    data = anndata.AnnData(logged[:, np.asarray(logged.sum(0)).ravel() > 0])
    scanpy.pp.highly_variable_genes(data, flavor="seurat", n_top_genes=500)
    ours = features.variable_genes(logged, 500)
    theirs = np.flatnonzero(np.asarray(logged.sum(0)).ravel() > 0)[data.var["highly_variable"].to_numpy()]
    assert len(np.intersect1d(ours, theirs)) >= 498  # single-precision dispersions differ at the edge


def test_rank_scores_are_normal_scores_of_mean_ranks() -> None:
    cells = sparse.csr_matrix(np.array([[0, 5, 2, 0, 2]], dtype=np.float32))
    expected = stats.norm.ppf((np.array([1.5, 5, 3.5, 1.5, 3.5]) - 0.5) / 5)
    np.testing.assert_allclose(features.rank_scores(cells, np.arange(5))[0], expected, rtol=1e-5)
    np.testing.assert_allclose(features.rank_scores(2 * cells, np.array([1, 4]))[0], expected[[1, 4]], rtol=1e-5)


def test_standardise_uses_training_cells_where_the_group_was_trained_on_else_its_own() -> None:
    train, test = np.array([[0.0], [2.0]]), np.array([[4.0], [10.0], [30.0]])
    out = features.Scale.fit(train, np.array(["h", "h"]))(test, np.array(["h", "m", "m"]))
    assert out.ravel().tolist() == [3.0, -1.0, 1.0]


def test_centroids_of_unit_vectors_worked_by_hand() -> None:
    train = np.array([[2.0, 0.0], [0.0, 3.0], [0.0, 1.0]])
    found = simple_classifiers.nearest_centroid(train, np.array([0, 1, 1]), 2)(np.array([[1.0, 1.0], [5.0, 0.0]]))
    np.testing.assert_allclose(found, special.softmax([[0, 0], [10, 0]], axis=1))


def test_neighbours_by_cosine_ignore_length_and_ties_go_to_the_first_class() -> None:
    train = np.array([[1.0, 0.0], [100.0, 0.0], [0.0, 1.0], [0.0, 50.0]])
    labels = np.array([1, 1, 0, 0])
    found = simple_classifiers.nearest_neighbours(train, labels, 2, number=4, metric="cosine")(
        np.array([[3.0, 0.1], [1.0, 1.0]])
    )
    assert found.tolist() == [[0.5, 0.5], [0.5, 0.5]]
    near = simple_classifiers.nearest_neighbours(train, labels, 2, number=2, metric="cosine")(np.array([[3.0, 0.1]]))
    assert near.tolist() == [[0.0, 1.0]]

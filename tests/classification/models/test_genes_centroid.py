"""The nearest centroid on one scale, worked out by hand."""

import numpy as np
from scipy import sparse, special

from mixgf.classification import registry
from mixgf.classification.models.protocol import CellSet, Problem
from mixgf.config.run import Config


def predicted(
    train: list, labels: list, target: list, *, species: str = "human", model: str = "genes_centroid"
) -> np.ndarray:
    counts, other = (sparse.csr_matrix(np.array(rows, dtype=np.float32)) for rows in (train, target))
    problem = Problem(
        config=Config(), train=CellSet(counts, np.full(len(train), "human")), labels=np.array(labels), num_classes=2,
        is_validation=np.zeros(len(train), dtype=bool), target=CellSet(other, np.full(len(target), species)),
    )  # fmt: skip
    return registry.parse(model).fit(problem).predict(problem.target)


def test_two_genes_worked_by_hand() -> None:
    """Centred, the two training cells are (d, -d) and (-d, d); a cell of equal genes is (e, e), at a right angle to both."""
    found = predicted([[3, 1], [1, 3]], [0, 1], [[3, 1], [2, 2], [10, 30]])
    np.testing.assert_allclose(found, special.softmax([[10, -10], [0, 0], [-10, 10]], axis=1), atol=1e-6)


def test_a_gene_counts_by_how_much_it_varies() -> None:
    """Gene 0 tells the classes apart by much, gene 1 by little; a cell between them follows gene 0.

    Every cell has 10,000 counts; the last gene fills it up. z-scores, as in `pseudobulk`, let the cell follow gene 1.
    """
    train = [[1000, 90, 8910], [0, 110, 9890]]
    assert predicted(train, [0, 1], [[700, 120, 9180]])[0, 0] > 0.99
    assert predicted(train, [0, 1], [[700, 120, 9180]], model="pseudobulk")[0, 1] > 0.5


def test_cells_of_a_species_without_training_cells_are_centred_on_their_own_mean() -> None:
    """Both have more of gene 0 than any training cell; by their own mean, the first lies with class 0 and the second with 1."""
    found = predicted([[3, 1], [1, 3]], [0, 1], [[9, 1], [4, 1]], species="mouse")
    assert found.argmax(1).tolist() == [0, 1]
    same = predicted([[3, 1], [1, 3]], [0, 1], [[9, 1], [4, 1]])
    assert same.argmax(1).tolist() == [0, 0]


def test_it_is_registered() -> None:
    assert "genes_centroid" in registry.BASELINES
    assert registry.label("genes_centroid") == "variable genes on one scale, nearest centroid"

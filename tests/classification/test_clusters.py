"""Labels by majority over small clusters."""

import numpy as np
from scipy import sparse

from mixgf.classification import clusters


def test_the_most_frequent_label_of_a_cluster_is_that_of_all_its_cells() -> None:
    labels = np.array(["b", "a", "b", "c", "a", "c"])
    said, share = clusters.majority(labels, np.array([7, 7, 7, 2, 2, 2]))
    assert said.tolist() == ["b", "b", "b", "c", "c", "c"]
    np.testing.assert_allclose(share, 2 / 3)
    assert clusters.majority(np.array(["b", "a"]), np.array([0, 0]))[0].tolist() == ["a", "a"]


def test_single_wrong_labels_inside_a_type_are_outvoted() -> None:
    """Three types far apart; a tenth of the labels are wrong, at random. Dense and sparse values give the same clusters."""
    rng = np.random.default_rng(0)
    true = np.repeat(np.arange(3), 200)
    values = (np.eye(3)[true] @ rng.normal(size=(3, 40)) * 3 + rng.normal(size=(600, 40))).astype(np.float32)
    labels = np.where(rng.random(600) < 0.1, rng.integers(0, 3, 600), true)
    for made in (values, sparse.csr_matrix(values)):
        found = clusters.find(clusters.vectors(made, clusters.components(made)))
        assert len(np.unique(found)) > 10
        said, _ = clusters.majority(labels.astype(np.str_), found)
        assert (said == true.astype(np.str_)).mean() > 0.995 > (labels == true).mean()


def test_few_cells_and_one_feature_are_no_error() -> None:
    for shape in ((1, 5), (2, 1), (3, 2)):
        values = np.ones(shape, dtype=np.float32)
        found = clusters.find(clusters.vectors(values, clusters.components(values)))
        assert found.tolist() == [0] * shape[0]

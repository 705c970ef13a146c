"""How cells become vectors: centred within a study, on one scale, and what is subtracted from a study without training cells."""

from dataclasses import replace

import numpy as np
import pytest

from mixgf.classification.models.protocol import CellSet, Problem
from mixgf.classification.readings import fit_reading
from mixgf.config.classification import Classify
from mixgf.config.run import Config

TRAIN = np.array([[1.0, 0.0], [3.0, 0.0], [10.0, 5.0], [12.0, 9.0]], dtype=np.float32)
STUDIES = np.array(["a", "a", "b", "b"])
OTHER = np.array([[100.0, 1.0], [104.0, 1.0]], dtype=np.float32)


def problem(*, align: bool = True) -> Problem[np.ndarray]:
    human = np.full(4, "human")
    return Problem(
        config=Config(classify=Classify(align=align)), train=CellSet(TRAIN, human, STUDIES), labels=np.array([0, 1, 0, 1]),
        num_classes=2, is_validation=np.zeros(4, dtype=bool), target=CellSet(OTHER, human[:2], np.full(2, "c")),
    )  # fmt: skip


def test_each_study_is_centred_on_its_own_mean_and_columns_stay_on_one_scale() -> None:
    made = problem()
    reading = fit_reading(made, "vectors", length="none")
    np.testing.assert_allclose(reading(made.train), [[-1, 0], [1, 0], [-1, -2], [1, 2]])


@pytest.mark.parametrize(("align", "expected"), [(True, [[-2, 0], [2, 0]]), (False, [[93.5, -2.5], [97.5, -2.5]])])
def test_a_study_without_training_cells_is_centred_on_itself_or_on_the_training_cells(align, expected) -> None:
    made = problem(align=align)
    reading = fit_reading(made, "vectors", length="none")
    np.testing.assert_allclose(reading(made.target), expected)
    np.testing.assert_allclose(reading(made.target[[1]]), expected[1:])  # whoever is read beside it


def test_cells_have_length_one_or_a_common_one() -> None:
    made = problem()
    np.testing.assert_allclose(np.linalg.norm(fit_reading(made, "vectors")(made.train), axis=1), 1, rtol=1e-6)
    values = fit_reading(made, "vectors", length="common")(made.train)
    assert (np.asarray(values) ** 2).sum(1).mean() == pytest.approx(1)
    assert np.linalg.norm(values[2]) == pytest.approx(5**0.5 * np.linalg.norm(values[0]))


def test_z_scores_are_within_the_study() -> None:
    made = problem()
    values = fit_reading(made, "vectors", z_scores=True, length="none")(made.train)
    np.testing.assert_allclose(values, [[-1, 0], [1, 0], [-1, -1], [1, 1]])


def test_a_gene_that_a_file_lacks_counts_as_the_mean() -> None:
    made = problem()
    reading = replace(fit_reading(made, "vectors", length="none"), absent_H=np.array([True, False]))
    np.testing.assert_allclose(reading(made.train)[:, 0], 0)
    np.testing.assert_allclose(reading(made.train)[:, 1], [0, 0, -2, 2])

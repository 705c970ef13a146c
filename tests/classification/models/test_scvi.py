"""scVI: skipped where it is not installed, with a message that says so."""

import numpy as np
import pytest
from scipy import sparse

from mixgf.classification.models.protocol import CellSet, Problem
from mixgf.classification.models.scvi import Scvi
from mixgf.config.classification import Classify
from mixgf.config.run import Config


def problem(species: tuple[str, str] = ("human", "human")) -> Problem[sparse.csr_matrix]:
    """Three types of 40 cells; each has ten genes that are ten times as high."""
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 3
    mean = np.where(np.arange(60) // 10 == labels[:, None], 10.0, 1.0)
    counts = sparse.csr_matrix(rng.poisson(mean).astype(np.float32))
    return Problem(
        config=Config(classify=Classify(num_hvgs=60)), train=CellSet(counts[:90], np.full(90, species[0])), labels=labels[:90],
        num_classes=3, is_validation=np.zeros(90, dtype=bool), target=CellSet(counts[90:], np.full(30, species[1])),
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("species", [("human", "human"), ("human", "mouse")], ids=["one species", "two species"])
def test_scvi_tells_types_apart(species: tuple[str, str]) -> None:
    if why := Scvi().skipped:
        pytest.skip(why)
    made = problem(species)
    found = Scvi().fit(made).predict(made.target)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
    assert (found.argmax(1) == np.arange(90, 120) % 3).mean() > 0.9


def test_what_is_not_installed_is_named_with_the_way_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scvi, "package", "no_such_package_of_anyone")
    assert Scvi().skipped == "scvi is not installed (pip install 'mixgf[baselines]')"

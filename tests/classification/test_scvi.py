"""Baselines of other projects: skipped where they are not installed, and then said so."""

import numpy as np
import pytest
from scipy import sparse

from mixgf.classification import baselines, scvi


def problem(species: tuple[str, str] = ("human", "human")) -> baselines.Problem:
    """Three types of 40 cells; each has ten genes that are ten times as high."""
    rng = np.random.default_rng(0)
    labels = np.arange(120) % 3
    mean = np.where(np.arange(60) // 10 == labels[:, None], 10.0, 1.0)
    counts = sparse.csr_matrix(rng.poisson(mean).astype(np.float32))
    return baselines.Problem(
        train=counts[:90], test=counts[90:], labels=labels[:90], num_classes=3, train_species=np.full(90, species[0]),
        test_species=np.full(30, species[1]), num_hvgs=60,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("species", [("human", "human"), ("human", "mouse")], ids=["one species", "two species"])
def test_scvi_tells_types_apart(species: tuple[str, str]) -> None:
    if why := scvi.missing("scvi"):
        pytest.skip(why)
    found = scvi.scvi(problem(species))
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-6)
    assert (found.argmax(1) == np.arange(90, 120) % 3).mean() > 0.9


def test_what_is_not_installed_is_named_with_the_way_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(scvi.PACKAGES, "scvi", "no_such_package_of_anyone")
    assert scvi.missing("scvi") == "scvi is not installed (pip install 'mixgf[baselines]')"
    assert not scvi.missing("hvg_logreg")
    assert set(scvi.RIVALS) == set(scvi.PACKAGES)

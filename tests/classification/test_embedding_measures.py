"""Laws of whole embeddings: measures on spaces built so that the answer is known."""

import numpy as np
import pytest

from mixgf.classification import embedding_measures
from mixgf.classification.labels import Labelled

RNG = np.random.default_rng(0)
EACH = 40


def cells(sources: int = 2) -> Labelled:
    """Two species, two types in both and one in each alone, `sources` data sets per species."""
    rows = [
        (species, kind, f"{species}{i % sources}")
        for species, kinds in (("human", "abh"), ("mouse", "abm"))
        for kind in kinds
        for i in range(EACH)
    ]
    species, types, source = (np.array(column) for column in zip(*rows, strict=True))
    number = len(rows)
    return Labelled(
        cells=np.arange(number), names=np.array([f"c{i}" for i in range(number)]), labels=types, species=species, groups=source,
        donors=np.array([f"d{i % 7}" for i in range(number)]), datasets=source, transfer=species, sources=source,
    )  # fmt: skip


def space(data: Labelled, *, by_type: float, by_species: float, by_source: float = 0.0) -> np.ndarray:
    """Noise, and a direction of its own for each type, species and data set."""
    out = RNG.normal(0, 1, (len(data), 24))
    for column, size, start in (
        (data.labels, by_type, 0),
        (data.species, by_species, 8),
        (data.sources, by_source, 12),
    ):
        for i, value in enumerate(np.unique(column)):
            out[column == value, start + i] += size
    return out.astype(np.float32)


def test_types_kept_and_species_apart_are_told_from_the_reverse() -> None:
    data = cells()
    good = embedding_measures.measure(space(data, by_type=8, by_species=0), data, seed=0)
    bad = embedding_measures.measure(space(data, by_type=0, by_species=8), data, seed=0)
    for name in ("type_silhouette", "type_nmi", "type_ari", "species_mixing"):
        assert good[name][0].value > bad[name][0].value + 0.1, name
    assert good["type_ari"][0].value > 0.95
    assert good["species_mixing"][0].value > 0.9


def test_a_probe_reads_species_where_they_are_and_guesses_where_they_are_not() -> None:
    data = cells()
    apart, by = embedding_measures.measure(space(data, by_type=0, by_species=6), data, seed=0)["species_probe"]
    mixed, _ = embedding_measures.measure(space(data, by_type=6, by_species=0), data, seed=0)["species_probe"]
    assert by == "donor"
    assert apart.value > 0.99
    assert mixed.value == pytest.approx(0.5, abs=0.12)  # seven donors: an interval of its own is rough


def test_reading_the_data_set_is_not_reading_the_species() -> None:
    """Vectors that tell data sets only: species is read from known data sets, and not from new ones."""
    data = cells(sources=3)
    found = embedding_measures.measure(space(data, by_type=0, by_species=0, by_source=8), data, seed=0)
    assert found["species_probe"][0].value > 0.95
    probe, by = found["species_probe_new_sets"]
    assert by == "source"
    assert probe.value < 0.8
    truly = embedding_measures.measure(space(data, by_type=0, by_species=8, by_source=8), data, seed=0)
    assert truly["species_probe_new_sets"][0].value > 0.95
    assert "species_probe_new_sets" not in embedding_measures.measure(
        space(cells(1), by_type=0, by_species=8), cells(1), seed=0
    )


def test_mixing_is_scib_metrics_own_where_that_is_installed() -> None:
    scib = pytest.importorskip("scib_metrics")
    data = cells()
    vectors = space(data, by_type=6, by_species=1)
    shared = np.isin(data.labels, ["a", "b"])
    ours = embedding_measures.mixing(vectors[shared], data.labels[shared], data.species[shared])
    theirs = scib.silhouette_batch(vectors[shared], data.labels[shared], data.species[shared])
    assert ours == pytest.approx(float(theirs), abs=2e-3)
    found = embedding_measures.measure(vectors, data, seed=0)
    assert found["type_silhouette"][0].value == pytest.approx(
        float(scib.silhouette_label(vectors, data.labels)), abs=2e-3
    )
    apart = embedding_measures.measure(space(data, by_type=0, by_species=8), data, seed=0)
    assert found["species_lisi"][0].value > apart["species_lisi"][0].value + 0.2
    assert apart["species_lisi"][0].value < 0.05


def test_a_turned_and_mirrored_map_lies_on_the_other_and_is_never_stretched() -> None:
    xy = RNG.normal(0, 3, (50, 2))
    turn = np.array([[0.0, 1.0], [1.0, 0.0]])  # a mirror image
    np.testing.assert_allclose(embedding_measures.aligned(xy @ turn + 7, xy), xy, atol=1e-9)
    twice = embedding_measures.aligned(2 * xy, xy)
    assert np.ptp(twice, axis=0).max() == pytest.approx(2 * np.ptp(xy, axis=0).max(), rel=0.2)
    kinds = np.repeat(np.array(list("abcde")), 10)
    names = np.unique(kinds)
    away = embedding_measures.centroids(
        embedding_measures.aligned(xy @ turn + 7, xy), kinds, names
    ) - embedding_measures.centroids(xy, kinds, names)
    assert np.abs(away).max() < 1e-9


def test_spaces_agree_up_to_a_rotation_and_not_when_a_type_moved() -> None:
    kinds = np.repeat(np.array(list("abcdef")), 20)
    names = np.unique(kinds)
    first = np.repeat(RNG.normal(0, 2, (6, 8)), 20, axis=0) + RNG.normal(0, 0.05, (120, 8))
    turned = first @ np.linalg.qr(RNG.normal(size=(8, 8)))[0]
    one, two = (embedding_measures.profiles(v, kinds, names) for v in (first, turned))
    np.testing.assert_allclose(one, two, atol=1e-9)
    np.testing.assert_allclose(embedding_measures.agreement(one, two), 1.0)
    moved = first.copy()
    moved[kinds == "c"] = -first[kinds == "c"]
    found = embedding_measures.agreement(one, embedding_measures.profiles(moved, kinds, names))
    assert found.argmin() == 2
    assert np.isnan(embedding_measures.agreement(one[:3, :3], two[:3, :3])).all()

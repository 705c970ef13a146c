"""Scores against a measured screen, on an invented screen whose effects are known."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import mixgf as mg
from mixgf.perturbation import measured_effects

GENES, NAMES = 120, tuple(f"p{i}" for i in range(8))


def expected(level, effects):
    """Changes of the values of log-normalised counts, without noise: a gene that rises takes its share from all others."""
    rates = level * np.exp(effects)
    values = np.log1p(1e4 * rates / rates.sum(axis=-1, keepdims=True))
    return values - np.log1p(1e4 * level / level.sum())


@pytest.fixture(scope="module")
def screen():
    """Eight perturbations with a common effect and effects of their own, 120 cells each, and controls."""
    rng = np.random.default_rng(1)
    level = rng.uniform(2, 20, GENES)
    common = rng.normal(0, 0.4, GENES) * (rng.random(GENES) < 0.2)
    own = rng.normal(0, 0.8, (8, GENES)) * (rng.random((8, GENES)) < 0.15)
    effects = {"control": np.zeros(GENES), "few": common} | {n: common + own[i] for i, n in enumerate(NAMES)}
    cells = {"control": 300, "few": 5} | dict.fromkeys(NAMES, 120)
    counts = np.concatenate([rng.poisson(level * np.exp(effects[n]), (num, GENES)) for n, num in cells.items()])
    labels = np.concatenate([[n] * num for n, num in cells.items()])
    true = expected(level, np.stack([effects[n] for n in NAMES]))
    return measured_effects.measure(sparse.csr_matrix(counts), labels, "control"), true


def scaled(scores):
    return measured_effects.summarise(scores).set_index("metric")["scaled"]


def test_the_replicate_scores_1_and_the_mean_response_0(screen):
    measured, _ = screen
    assert measured.names == NAMES  # the controls, and what has too few cells, are no perturbations
    none = np.full(8, -1)
    assert (scaled(measured_effects.score(measured.replicate_PG, measured, none)) == 1).all()
    total = measured.replicate_PG.sum(axis=0)
    mean = np.stack([(total - row) / 7 for row in measured.replicate_PG])
    assert (scaled(measured_effects.score(mean, measured, none)) == 0).all()


def test_the_true_effects_beat_a_replicate_s_noise_and_opposite_or_exchanged_ones_fail(screen):
    measured, true = screen
    none = np.full(8, -1)
    assert (scaled(measured_effects.score(true, measured, none)) > 0.8).all()
    opposite = measured_effects.summarise(measured_effects.score(-true, measured, none)).set_index("metric")["value"]
    assert opposite["correlation"] < -0.8
    assert opposite["direction"] < 0.1
    exchanged = measured_effects.summarise(measured_effects.score(np.roll(true, 1, 0), measured, none))
    exchanged = exchanged.set_index("metric")
    assert exchanged.loc["discrimination", "value"] == pytest.approx(0.5, abs=0.2)  # chance
    assert exchanged.loc["correlation", "scaled"] < 0.3


def test_metrics_by_hand():
    truth = np.array([[1.0, -2.0, 0.0, 3.0], [0.0, 1.0, 1.0, 0.0], [5.0, 5.0, 5.0, 5.0]])
    fdr = np.array([[0.01, 0.01, 0.9, 0.01]] * 3)
    measured = measured_effects.Measured(names=("a", "b", "c"), truth_PG=truth, replicate_PG=truth, fdr_PG=fdr)
    predicted = np.array([[1.0, 2.0, 0.5, np.nan], [0.0, 0.9, 0.9, 0.1], [0.0, 0.0, 0.0, 0.1]])
    found = measured_effects.score(predicted, measured, np.array([0, -1, -1]))
    value = found.set_index(["perturbation", "metric"])["value"]
    # of a: gene 0 is the perturbed one, gene 3 is not predicted; left are (2, .5) against (-2, 0)
    assert value["a", "direction"] == 0
    assert value["a", "overlap"] == 1
    # distances to a (4 + .5) / 2, to b (1 + .5) / 2, to c (3 + 4.5) / 2
    assert value["a", "discrimination"] == 0.5
    assert value["b", "correlation"] == pytest.approx(np.corrcoef(predicted[1], truth[1])[0, 1])
    assert value["b", "discrimination"] == 1
    # the genes of b by size: 1, 2, 0, 3 measured, of which 0, 1 and 3 differ; three of the largest are compared
    assert value["b", "overlap"] == pytest.approx(2 / 3)


def test_the_perturbed_gene_itself_does_not_count(screen):
    measured, true = screen
    silly = true.copy()
    silly[:, 3] = 1000.0
    found = measured_effects.score(silly, measured, np.full(8, 3))
    assert found[found["metric"] == "correlation"]["value"].min() > 0.8


def test_predictions_without_a_sign_are_compared_with_sizes(screen):
    measured, true = screen
    found = measured_effects.score(np.abs(true), measured, np.full(8, -1), signed=False)
    value = measured_effects.summarise(found).set_index("metric")
    assert value.loc["correlation", "value"] > 0.8
    assert value.loc["discrimination", "scaled"] > 0.8
    assert np.isnan(value.loc["direction", "value"])


def test_the_api_matches_names_and_leaves_the_perturbed_gene_out():
    """Genes `p0` to `p7` are perturbed; predictions of other genes and perturbations are not in the data."""
    rng = np.random.default_rng(4)
    genes = [f"p{i}" for i in range(8)] + [f"g{i}" for i in range(40)]
    effects = rng.normal(0, 0.8, (8, 48)) * (rng.random((8, 48)) < 0.3)
    effects[np.arange(8), np.arange(8)] = -3
    level = rng.uniform(2, 20, 48)
    counts = np.concatenate([rng.poisson(level * np.exp(row), (80, 48)) for row in [np.zeros(48), *effects]])
    labels = np.repeat(["non-targeting", *genes[:8]], 80)
    adata = ad.AnnData(
        sparse.csr_matrix(counts.astype(np.float32)), obs=pd.DataFrame({"guide": labels}, index=[f"c{i}" for i in range(720)]),
        var=pd.DataFrame(index=genes),
    )  # fmt: skip
    predicted = pd.DataFrame(expected(level, effects), index=genes[:8], columns=genes).assign(unknown=1.0).iloc[::-1]
    predicted.loc["elsewhere"] = 0.0
    found = mg.score_perturbations(predicted, adata, perturbation="guide", control="non-targeting")
    assert found["perturbation"].unique().tolist() == [*genes[:8], "all"]
    every = found[found["perturbation"] == "all"].set_index("metric")
    assert (every["scaled"] > 0.7).all()
    wild = predicted.copy()
    for name in genes[:8]:
        wild.loc[name, name] = 1e6
    again = mg.score_perturbations(wild, adata, perturbation="guide", control="non-targeting")
    pd.testing.assert_frame_equal(again, found)
    for change, said in (
        ({"perturbation": "gide"}, r"perturbation = 'gide': no such column of obs"),
        ({"control": "none"}, r"control = 'none': no cell of guide"),
    ):
        with pytest.raises(mg.UserError, match=said):
            mg.score_perturbations(predicted, adata, **({"perturbation": "guide", "control": "non-targeting"} | change))
    with pytest.raises(mg.UserError, match=r"predicted: none of its 1 perturbations"):
        mg.score_perturbations(predicted.loc[["elsewhere"]], adata, perturbation="guide", control="non-targeting")

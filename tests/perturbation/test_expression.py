"""Controls without a model: differential expression of counts, and the covariance with the goal axis."""

import numpy as np
import pytest
import scipy.stats
from scipy import sparse

from mixgf.corpus.reader import Corpus
from mixgf.perturbation import expression


def values(counts):
    return np.log1p(1e4 * counts / counts.sum(axis=1, keepdims=True))


def drawn(rng, num, mean_G):
    return rng.poisson(np.broadcast_to(mean_G, (num, len(mean_G)))) + (np.arange(len(mean_G)) == 0)


def test_differential_expression_of_counts_equals_scipy():
    rng = np.random.default_rng(1)
    start, goal = drawn(rng, 30, np.arange(1.0, 7)), drawn(rng, 20, np.arange(6.0, 0, -1))
    t, fold = expression.differential(sparse.csr_matrix(start), sparse.csr_matrix(goal))
    assert t == pytest.approx(scipy.stats.ttest_ind(values(goal), values(start), equal_var=False).statistic)
    per = [1e4 * counts / counts.sum(axis=1, keepdims=True) for counts in (start, goal)]
    assert fold == pytest.approx(np.log2((per[1].mean(axis=0) + 0.01) / (per[0].mean(axis=0) + 0.01)))


def test_the_covariance_leaves_the_gene_and_the_donors_levels_out():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(40, 6)) * (rng.random((40, 6)) < 0.7)
    x[:, 5] = 0
    axis, donor = rng.normal(size=6), np.arange(40) % 3
    found = expression.axis_correlation(sparse.csr_matrix(x), axis, donor)
    centred = x - np.stack([x[donor == d].mean(axis=0) for d in donor])
    for g in range(5):
        rest = np.delete(centred, g, axis=1) @ np.delete(axis, g)
        assert found[g] == pytest.approx(np.corrcoef(centred[:, g], rest)[0, 1])
    assert np.isnan(found[5])
    far = x + 100 * (donor == 1)[:, None]  # a donor of another level
    assert expression.axis_correlation(sparse.csr_matrix(far), axis, donor)[:5] == pytest.approx(found[:5], rel=1e-6)


def test_a_programme_that_varies_among_untreated_cells_predicts_the_treatment(make_corpus):
    """Twenty of 200 genes rise with one factor, which the treatment turns on: their covariance is the highest of all."""
    corpus = Corpus(make_corpus([5] * 4, [0] * 4, [4], genes=200, names=("human",)))
    rng = np.random.default_rng(3)
    level = rng.uniform(1, 5, 200)
    on = np.arange(200) < 20

    def cells(factor):
        return sparse.csr_matrix(rng.poisson(level * np.where(on, np.exp(factor[:, None]), 1)))

    start = expression.StateCounts(counts_NG=cells(rng.normal(0, 0.5, 300)), donor_N=np.arange(300) % 4)
    goal = expression.StateCounts(counts_NG=cells(np.full(100, 1.0)), donor_N=np.zeros(100, int))
    found = expression.of_counts(corpus, {"human": (start, goal)})
    tokens = corpus.vocabulary.species_genes("human").tokens
    covariance = found.covariance_SV[0, tokens]
    assert covariance[on].min() > np.nanmax(np.abs(covariance[~on]))
    assert found.t_SV[0, tokens][on].min() > 5
    assert "raw counts" in found.origin
    few = expression.StateCounts(counts_NG=goal.counts_NG[:9], donor_N=goal.donor_N[:9])
    assert np.isnan(expression.of_counts(corpus, {"human": (start, few)}).t_SV).all()

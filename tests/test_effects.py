"""The table of genes, from pairs made by hand."""

import numpy as np
import pyarrow as pa
import pytest
import scipy.stats

from mixgf import config, effects, perturb
from mixgf.dataset import Corpus


def design(num_genes, donor_of, states=("start", "goal")):
    targets = tuple(
        perturb.Target(gene=f"G{i:02d}", symbol=f"g{i}", species="human", tokens=(i,), coverage=0.05 if i == 1 else 1.0)
        for i in range(num_genes)
    )
    return perturb.Design(
        cells_N=np.arange(len(donor_of)),
        states=tuple(perturb.State(name=n, expression="", cells=np.arange(len(donor_of))) for n in states),
        targets=targets,
        donors=tuple(f"d{i}" for i in range(max(donor_of) + 1)),
        donor_of=np.asarray(donor_of),
        warnings=(),
    )


def table(plan, shift_GN, *, alternative=None, expressed=None, **settings):
    genes, cells = shift_GN.shape
    target, cell = np.divmod(np.arange(genes * cells), cells)
    towards = [np.zeros(genes * cells), shift_GN.ravel()] + ([] if alternative is None else [alternative.ravel()])
    pairs = effects.Pairs(
        target_P=target, cell_P=cell, rank_P=target + 1, response_P=np.abs(shift_GN.ravel()), shift_SP=np.stack(towards)
    )
    chosen = config.Config(perturb=config.Perturb(operations=("delete",), **settings))
    result = effects.gene_table(plan, {"delete": pairs}, expressed or {}, chosen)
    return result.to_pandas().set_index("symbol")


def test_a_planted_gene_leads_and_repeats_over_donors_and_a_donor_s_own_gene_is_exposed():
    rng = np.random.default_rng(1)
    donor_of = np.repeat(np.arange(8), 5)
    shift = rng.normal(0, 0.01, (60, 40))
    shift[7] += 0.05
    shift[9, donor_of == 3] += 0.4  # a mean like that of g7, from one donor
    frame = table(design(60, donor_of), shift)
    assert frame.index[0] in ("g7", "g9")
    assert frame.loc["g7", "fdr_cell"] < 0.001
    assert frame.loc["g7", "p_donor"] == 2 / 2**8
    assert frame.loc["g7", "warnings"] == ""
    assert frame.loc["g7", "null_percentile"] > 98
    assert frame.loc["g9", "p_donor"] > 0.2
    assert "one donor carries it" in frame.loc["g9", "warnings"]
    assert "seen in 5.0% of cells" in frame.loc["g1", "warnings"]
    assert frame.loc["g7", "mean_rank"] == 9
    assert frame.loc["g7", "shift_minus_rank_expected"] == pytest.approx(0.05, abs=0.02)


def test_few_donors_have_no_donor_level_p_and_say_so():
    frame = table(design(20, [0, 0, 0, 1, 1, 1]), np.random.default_rng(2).normal(size=(20, 6)))
    assert frame["p_donor"].isna().all()
    assert frame["warnings"].str.contains(r"2 donor\(s\): no donor-level test").all()


def test_paper_mode_is_the_published_test():
    shift = np.random.default_rng(3).normal(size=(15, 6))
    frame = table(design(15, [0, 1, 2, 0, 1, 2]), shift, mode="paper")
    for g in range(15):
        expected = scipy.stats.ranksums(shift[g], shift.ravel()).pvalue
        assert frame.loc[f"g{g}", "p_cell"] == pytest.approx(expected, rel=1e-9)
    honest = table(design(15, [0, 1, 2, 0, 1, 2]), shift)
    assert honest.loc["g4", "p_cell"] == pytest.approx(
        scipy.stats.mannwhitneyu(
            shift[4], np.delete(shift, 4, axis=0).ravel(), method="asymptotic", use_continuity=False
        ).pvalue,
        rel=1e-9,
    )


def test_the_universal_response_is_subtracted_and_named():
    rng = np.random.default_rng(4)
    shift = rng.normal(0.1, 0.001, (15, 6))
    plan = design(15, [0, 1, 2, 0, 1, 2], states=("start", "goal", "alternative_0"))
    frame = table(plan, shift, alternative=shift - 0.01)
    assert frame["shift_minus_alternatives"].to_numpy() == pytest.approx(0.01)
    assert frame["warnings"].str.contains("moves towards the alternatives as well").all()


def test_a_gene_without_cells_has_no_figures():
    plan = design(12, [0, 1, 2])
    values = np.random.default_rng(5).normal(size=33)
    pairs = effects.Pairs(
        target_P=np.repeat(np.arange(11), 3), cell_P=np.tile(np.arange(3), 11), rank_P=np.repeat(np.arange(11), 3),
        response_P=values, shift_SP=np.stack([values, values]),
    )  # fmt: skip
    chosen = config.Config(perturb=config.Perturb(operations=("delete",)))
    frame = effects.gene_table(plan, {"delete": pairs}, {}, chosen).to_pandas()
    last = frame.iloc[-1]
    assert (last["symbol"], last["num_cells"], last["warnings"]) == ("g11", 0, "in no sentence: not scored")
    assert last[["shift", "p_cell", "fdr_cell", "p_donor"]].isna().all()
    assert frame.iloc[:-1]["p_cell"].notna().all()


def test_rank_scores_by_hand_and_their_welch_t(make_corpus):
    corpus = Corpus(make_corpus([4, 2, 3, 4, 4], [0] * 5, [5], genes=5, names=("human",)))
    scores = np.zeros((5, corpus.vocabulary.size))
    for cell in range(5):
        sentence = corpus.tokens([cell])[0].tolist()
        for rank, token in enumerate(sentence):
            scores[cell, token] = 1 - rank / len(sentence)
    start, goal = effects.expression(corpus, np.array([0, 1])), effects.expression(corpus, np.array([2, 3, 4]), block=2)
    assert goal.mean_V == pytest.approx(scores[2:].mean(axis=0))
    assert goal.variance_V == pytest.approx(scores[2:].var(axis=0, ddof=1))
    plan = perturb.Design(
        cells_N=np.arange(2), states=design(1, [0, 0]).states, donors=("d",), donor_of=np.zeros(5, int), warnings=(),
        targets=tuple(
            perturb.Target(gene=f"G{t}", symbol=f"g{t}", species="human", tokens=tokens, coverage=1.0)
            for t, tokens in enumerate([(3,), (4,), (5,), (6,), (7,), (3, 4)])
        ),
    )  # fmt: skip
    frame = table(plan, np.random.default_rng(6).normal(size=(6, 2)), expressed={"start": start, "goal": goal})
    for g, token in enumerate((3, 4, 5, 6, 7)):
        expected = scipy.stats.ttest_ind(scores[2:, token], scores[:2, token], equal_var=False).statistic
        assert frame.loc[f"g{g}", "de_statistic"] == pytest.approx(0 if np.isnan(expected) else expected, rel=1e-9)
        fold = np.log2((scores[2:, token].mean() + 0.01) / (scores[:2, token].mean() + 0.01))
        assert frame.loc[f"g{g}", "de_log_fold"] == pytest.approx(fold)
    assert np.isnan(frame.loc["g5", "de_statistic"])  # a set has no expression of its own


def test_state_sums_merge_by_donor():
    part = {"state": [0, 0, 1], "donor": [0, 1, 0], "num_cells": [2, 1, 1], "sum": [[2.0, 4.0], [3.0, 3.0], [9.0, 0.0]]}
    means, states = effects.state_means([pa.table(part), pa.table({k: v[:1] for k, v in part.items()})], 2)
    assert means.tolist() == [[7 / 5, 11 / 5], [9.0, 0.0]]
    assert states.to_pylist()[1] == {"state": 0, "donor": 0, "num_cells": 4, "vector": [1.0, 2.0]}

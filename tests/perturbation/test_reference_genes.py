"""A screen against what is known: figures by hand, names found, and the paper's table as it was printed."""

import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from sklearn.metrics import roc_auc_score

from mixgf.config.perturbation import Perturb
from mixgf.config.run import Config
from mixgf.errors import UserError
from mixgf.perturbation import reference_genes
from mixgf.perturbation.reference_genes import call_metrics
from mixgf.stats.intervals import auroc, auroc_difference

SHARED = Path(os.environ.get("MIXGF_SHARED", Path(__file__).parents[3] / "shared"))


def _genes(symbols, shift, **columns):
    num = len(symbols)
    frame = {
        "gene": [f"ENSG9{i:05d}" for i in range(num)], "symbol": symbols, "ortholog": "", "ortholog_symbol": "", "species": "human",
        "operation": "overexpress", "role": "target", "num_cells": 9, "num_donors": 8, "coverage": np.linspace(0.9, 0.1, num),
        "mean_rank": np.arange(1.0, num + 1), "shift": np.asarray(shift, float), "shift_minus_rank_expected": np.asarray(shift, float),
        "shift_minus_alternatives": np.nan, "de_statistic": np.linspace(-1, 1, num), "p_cell": 0.5, "fdr_cell": 0.5, "p_donor": 0.5,
        "fdr_donor": 0.5, "null_percentile": 50.0, "warnings": "",
    }  # fmt: skip
    return pd.DataFrame(frame | columns)


def _config(*entries, published=""):
    return Config(perturb=Perturb(reference_genes=entries, published=published))


def test_shifts_and_baselines_are_scored_by_hand_on_the_same_genes():
    # known: a, c, f; the shift orders a c b d e f, differential expression f e d c b a
    genes = _genes(list("abcdef"), [6, 4, 5, 3, 2, 1], fdr_donor=[0.01, 0.01, 0.9, 0.9, 0.9, 0.01])
    found = reference_genes.score_reference_genes(genes, _config("a", "c", "f"))
    value = found.set_index(["method", "call", "metric"])["value"]
    assert value["shift", "top 3", "ppv"] == pytest.approx(2 / 3)
    assert value["shift", "top 3", "sensitivity"] == pytest.approx(2 / 3)
    assert value["shift", "top 3", "specificity"] == pytest.approx(2 / 3)
    assert value["shift", "top 3", "auroc"] == pytest.approx(6 / 9)  # pairs in order: a 3, c 3, f 0
    assert value["de_statistic", "top 3", "auroc"] == pytest.approx(4 / 9)  # f 3, c 1 (only b is below it), a 0
    tested = "donor-level FDR ≤ 5 %"
    assert value["shift", tested, "ppv"] == pytest.approx(2 / 3)  # a and f of a, b, f
    assert (found["num_known"] == 3).all()
    assert "shift_minus_alternatives" not in set(found["method"])  # no figures, no row
    told = found.dropna(subset=["value"])  # no gene is called at a cell-level FDR: no predictive value
    assert ((told["low"] <= told["value"]) & (told["value"] <= told["high"])).all()


def test_a_gene_is_found_by_id_former_symbol_and_ortholog_and_a_screen_s_misses_are_the_negatives(tmp_path):
    genes = _genes(["SGK1", "b", "c", "d"], [3, 2, 1, 0], gene=["ENSG00000118515", "ENSG2", "ENSG3", "ENSG4"],
                   ortholog=["ENSMUSG00000019970", "", "", ""])  # fmt: skip
    config = _config("x")
    for name in ("SGK1", "ENSG00000118515", "ENSMUSG00000019970", "Sgk1", "SGK"):
        assert reference_genes.match_genes(genes, {name}, config).tolist() == [True, False, False, False], name
    screen = tmp_path / "screen.tsv"
    screen.write_text("symbol\thit\nSGK1\ttrue\nd\tfalse\nnever\t1\n")
    found = reference_genes.score_reference_genes(genes, _config(str(screen)))
    assert (found["num_genes"] == 2).all()  # b and c were not in the screen
    plain = tmp_path / "list.txt"
    plain.write_text("SGK1\nd\n")
    assert reference_genes.read_reference_genes(_config(str(plain), "b")) == ({"SGK1", "d", "b"}, set())


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a\tb\nx\ty\n", r"perturb\.reference_genes = .*has columns a, b; must have one of ensembl_id, gene"),
        ("gene\thit\nx\tmaybe\n", r"hit holds 'maybe'; must be true or false"),
    ],
    ids=["no gene column", "hit is no truth value"],
)
def test_a_table_that_cannot_be_read_is_named(tmp_path, content, said):
    path = tmp_path / "list.tsv"
    path.write_text(content)
    with pytest.raises(UserError, match=said):
        reference_genes.read_reference_genes(_config(str(path)))


def test_a_missing_table_and_genes_that_were_not_scored_are_said():
    with pytest.raises(UserError, match=r"no such file; give gene names, or a table"):
        reference_genes.read_reference_genes(_config("none.tsv"))
    with pytest.raises(UserError, match=r"names 1 genes: none of them is among the 3 scored genes"):
        reference_genes.score_reference_genes(_genes(list("abc"), [1, 2, 3]), _config("z"))
    assert "none of them is" in reference_genes.comparison_text(_genes(list("abc"), [1, 2, 3]), _config("z"))


def test_rank_beside_the_paper_s_is_the_published_order():
    """Significant over cells first, then by shift; a gene that was not scored has no rank."""
    genes = _genes(["x", "y", "Sgk1", "Cfb"], [9, 5, 3, 1], species="mouse", fdr_cell=[0.5, 0.01, 0.01, 0.01],
                   gene=["m1", "m2", "ENSMUSG00000019970", "ENSMUSG00000090231"], p_cell=1e-4)  # fmt: skip
    table = reference_genes.compare_with_table4(genes, _config(published="dkd")).set_index("symbol")
    assert table.loc["Sgk1", ["rank", "of"]].tolist() == [2, 4]
    assert table.loc["Cfb", "rank"] == 3
    assert table.loc["Rock2", "rank"] == -1
    assert table.loc["Sgk1", ["paper_rank", "paper_shift", "paper_p"]].tolist() == [19, 0.0161, 1.47e-4]
    said = reference_genes.comparison_text(genes, _config(published="dkd"))
    assert re.search(r"Sgk1 +overexpress +19 +0\.0161 +1\.47e-04 +\| 2 of 4 +\+3\.0000 +1\.00e-04", said)
    assert re.search(r"Rock2 .*not scored", said)
    wrong_operation = reference_genes.compare_with_table4(genes.assign(operation="delete"), _config(published="dkd"))
    assert (wrong_operation["rank"] == -1).all()


def test_table_4_is_as_printed():
    paper = SHARED / "paper.txt"
    if not paper.exists():
        pytest.skip("the paper's text is not beside this checkout (../shared/paper.txt, or MIXGF_SHARED)")
    printed = {
        tuple(line.split("\t"))
        for line in paper.read_text().splitlines()
        if re.search(r"\t(DKD|ADPKD|Alzheimer) \(\w+\)\t\d+\t", line)
    }
    names = {"dkd": "DKD (Mouse)", "adpkd": "ADPKD (Mouse)", "alzheimer": "Alzheimer (Human)"}
    ours = {
        (r["symbol"], names[experiment], str(r["rank"]), f"{r['shift']:.4f}", f"{r['p']:.2e}")
        for experiment in names
        for r in reference_genes.read_table4(experiment).to_dict("records")
    }
    assert ours == printed
    assert len(ours) == 7


def test_scores_against_known_genes_by_hand():
    score = np.array([5.0, 4.0, 3.0, 2.0, 1.0, np.nan])
    known = np.array([True, False, True, False, False, True])
    result = call_metrics(score, score > 3.5, known)
    assert (result["ppv"].value, result["sensitivity"].value) == (0.5, 0.5)
    assert (result["npv"].value, result["specificity"].value) == pytest.approx((2 / 3, 2 / 3))
    assert result["auroc"].value == pytest.approx(5 / 6)  # of the 6 pairs one is the wrong way round
    for estimate in result.values():
        assert 0 <= estimate.low < estimate.value < estimate.high <= 1


def test_auroc_equals_sklearn_and_its_interval_covers():
    rng = np.random.default_rng(9)
    covered = 0
    for _ in range(200):
        known = np.arange(120) < 40
        score = np.round(rng.normal(known * 0.8, 1), 1)
        estimate = auroc(score, known)
        assert estimate.value == pytest.approx(roc_auc_score(known, score), rel=1e-12)
        covered += estimate.low < scipy.stats.norm.cdf(0.8 / np.sqrt(2)) < estimate.high
    assert 0.9 < covered / 200 < 0.99


def test_the_interval_of_a_difference_of_two_auroc_is_paired_and_covers():
    """Two scores of the same genes with the same truth: their difference is 0, and correlated scores give a narrow interval."""
    rng = np.random.default_rng(6)
    positive = np.arange(120) < 30
    covered, widths = [], []
    for _ in range(300):
        common = rng.normal(0, 1, 120) + positive
        one, other = (common + rng.normal(0, 0.3, 120) for _ in range(2))
        found = auroc_difference(one, other, positive)
        assert found.value == pytest.approx(auroc(one, positive).value - auroc(other, positive).value)
        covered.append(found.low <= 0 <= found.high)
        widths.append(found.high - found.low)
        plain = auroc(one, positive)
    assert 0.91 < np.mean(covered) < 0.985
    assert np.mean(widths) < 0.6 * (plain.high - plain.low)
    assert np.isnan(auroc_difference(one, other, np.zeros(120, bool)).value)


@pytest.mark.parametrize(
    ("encoder", "covariance", "verdict"),
    [(3.0, 0.3, "beats"), (0.3, 3.0, "is worse than"), (1.0, 1.0, "does not beat")],
)
def test_it_is_said_whether_the_encoder_beats_the_covariance(encoder, covariance, verdict):
    """Known genes stand out by so many standard deviations; deletions move them away, which counts as much."""
    rng = np.random.default_rng(7)
    known = np.arange(200) < 40
    symbols = [f"s{i}" for i in range(200)]
    columns = {
        "covariance": rng.normal(0, 1, 200) + covariance * known, "operation": "delete",
        "shift_minus_alternatives": rng.normal(0, 1, 200),
    }  # fmt: skip
    genes = _genes(symbols, rng.normal(0, 1, 200) - encoder * known, **columns)
    config = Config(perturb=Perturb(reference_genes=tuple(symbols[:40]), goal="state == 'b'"))
    ((tone, text),) = reference_genes.covariance_sentences(genes, config)
    assert text.startswith(f"Delete: the encoder {verdict} the covariance of untreated cells.")
    assert tone == {"beats": "good", "is worse than": "bad", "does not beat": "warn"}[verdict]
    assert "on 40 known genes" in text
    scored = reference_genes.score_reference_genes(genes, config).set_index(["method", "metric"])["value"]
    if covariance > 1:
        assert scored["covariance", "auroc"].max() < 0.1  # less of a gene: the linear response is the opposite
    few = Config(perturb=Perturb(reference_genes=tuple(symbols[:4]), goal="state == 'b'"))
    assert "too few to say" in reference_genes.covariance_sentences(genes, few)[0][1]
    blind = reference_genes.covariance_sentences(genes.drop(columns="covariance"), config)[0][1]
    assert "raw counts could not be read" in blind
    none = Config(perturb=Perturb(goal="state == 'b'"))
    assert "no known genes were given" in reference_genes.covariance_sentences(genes, none)[0][1]

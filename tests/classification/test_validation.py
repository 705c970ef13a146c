"""Which classifier is kept: folds inside the training cells, the one-standard-error rule, and fine-tuned models on validation cells."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from mixgf.classification import kept_classifier, registry, validation
from mixgf.classification.models.protocol import CellSet, Problem
from mixgf.classification.validation import FOLD, SPLIT, Validation
from mixgf.config.run import Config

LABELS = np.arange(60) % 3


def said(wrong: int, *, part: str = FOLD, seed: int = 0) -> Validation:
    """Predictions with so many wrong cells."""
    predicted = LABELS.copy()
    predicted[np.random.default_rng(seed).permutation(60)[:wrong]] += 1
    p = np.eye(3)[predicted % 3]
    return Validation(
        by="cell", rows_N=np.arange(60), labels_N=LABELS, probabilities_NC=p, distance_N=np.zeros(60), part_N=np.full(60, part)
    )  # fmt: skip


def both(folds: Validation, split: Validation) -> Validation:
    names = ("rows_N", "labels_N", "probabilities_NC", "distance_N", "part_N")
    return Validation(by="cell", **{n: np.concatenate([getattr(one, n) for one in (folds, split)]) for n in names})


def test_data_sets_are_left_out_together_then_donors_then_cells() -> None:
    same, ten = np.full(60, "x"), np.array([f"d{i % 10}" for i in range(60)])
    by, folds = validation.folds_of(ten, same, LABELS, 0)
    assert by == "data set"
    assert len(np.unique(folds)) == 5
    for name in np.unique(ten):
        assert len(np.unique(folds[ten == name])) == 1
    assert validation.folds_of(same, ten, LABELS, 0)[0] == "donor"
    by, folds = validation.folds_of(same, same, LABELS, 0)
    assert by == "cell"
    assert [np.bincount(folds[LABELS == c]).tolist() for c in range(3)] == [[4] * 5] * 3


def test_a_donor_with_most_of_the_cells_is_not_left_out() -> None:
    """The rest would be too few to stand for the whole: folds are of cells."""
    donors = np.array(["big"] * 40 + ["a"] * 10 + ["b"] * 10)
    assert validation.folds_of(np.full(60, "x"), donors, LABELS, 0)[0] == "cell"
    unknown = np.array([""] * 20 + ["a"] * 20 + ["b"] * 20)
    assert validation.folds_of(np.full(60, "x"), unknown, LABELS, 0)[0] == "cell"


def test_donors_with_types_of_their_own_are_not_left_out() -> None:
    """A cell line per donor: no type of a left-out donor is known from the others, so nothing could be validated."""
    same = np.full(60, "x")
    lines = np.array([f"line {label}" for label in LABELS])
    by, folds = validation.folds_of(same, lines, LABELS, 0)
    assert by == "cell"
    assert all(np.isin(LABELS[folds == fold], LABELS[folds != fold]).all() for fold in range(5))
    four = np.arange(60) % 4
    for shared, expected in ((24, "cell"), (36, "donor")):  # of 60 cells, so many have a type that other donors have
        labels = np.where(np.arange(60) < shared, 0, 1 + four)
        assert validation.folds_of(same, four.astype(str), labels, 0)[0] == expected


def test_models_that_cannot_be_told_apart_are_chosen_by_order_and_others_by_score() -> None:
    near = {"pca_knn": said(3), "genes_vote": said(4, seed=1)}
    assert validation.choose(near, ["genes_vote", "pca_knn"], 0)[0] == "genes_vote"
    far = {"pca_knn": said(2), "genes_vote": said(25, seed=1)}
    chosen, why = validation.choose(far, ["genes_vote", "pca_knn"], 0)
    assert chosen == "pca_knn"
    assert why == f"macro F1 {said(2).macro_f1:.3f} on training cells, left out by cell"


def test_the_error_over_folds_is_that_of_their_differences() -> None:
    """Four folds of 15 cells: the first model is right in all; the second has no type right in one fold, and is right in the others."""
    fold = np.arange(60) // 15
    other = np.where(fold == 0, (LABELS + 1) % 3, LABELS)
    assert validation.fold_error(LABELS, LABELS, other, fold) == pytest.approx(np.std([1, 0, 0, 0], ddof=1) / 2)
    assert validation.fold_error(LABELS, LABELS, other, np.zeros(60, dtype=int)) == 0


def test_a_model_that_is_better_in_one_fold_only_is_not_preferred() -> None:
    good, p = said(0), np.eye(3)
    fold = np.arange(60) // 15
    worse = replace(
        said(0), probabilities_NC=p[np.where((fold == 0) & (np.arange(60) % 2 == 0), (LABELS + 1) % 3, LABELS)]
    )
    order = ["genes_vote", "pca_knn"]
    assert validation.choose({"pca_knn": good, "genes_vote": worse}, order, 0)[0] == "pca_knn"  # by cells alone
    found = {"pca_knn": replace(good, fold_N=fold), "genes_vote": replace(worse, fold_N=fold)}
    assert validation.choose(found, order, 0)[0] == "genes_vote"


@pytest.mark.parametrize(("wrong", "chosen"), [(0, "finetune"), (19, "pca_knn"), (30, "pca_knn")])
def test_a_fine_tuned_model_must_be_better_on_the_validation_cells(wrong: int, chosen: str) -> None:
    found = {"pca_knn": both(said(2), said(20, part=SPLIT)), "finetune": said(wrong, part=SPLIT, seed=0)}
    assert validation.choose(found, ["pca_knn"], 0)[0] == chosen


def test_cells_are_predicted_by_a_model_that_did_not_see_them() -> None:
    """Labels are noise and every cell has its own gene: a model that saw the cell would be right, one that did not is not."""
    rng = np.random.default_rng(0)
    counts = sparse.csr_matrix(np.eye(60) * 50 + rng.poisson(1.0, (60, 60)), dtype=np.float32)
    labels = rng.integers(0, 2, 60)
    problem = Problem(
        config=Config(), train=CellSet(counts, np.full(60, "human")), labels=labels, num_classes=2,
        is_validation=np.arange(60) < 12, target=CellSet(counts[:0], np.empty(0, dtype="U5")),
    )  # fmt: skip
    model = registry.parse("genes_logreg")
    fitted = model.fit(problem)
    assert (fitted.predict(problem.train).argmax(1) == labels).all()
    fold_N = np.arange(60) % 5
    found = validation.validate(model, problem, fitted, fold_N, by="cell", also_split=True)
    folded, split = found.of(FOLD), found.of(SPLIT)
    assert sorted(folded.rows_N.tolist()) == list(range(60))
    assert sorted(split.rows_N.tolist()) == list(range(12))
    assert (folded.fold_N == fold_N[folded.rows_N]).all()
    assert folded.accuracy < 0.8


def test_a_validation_is_read_as_it_was_written(tmp_path) -> None:
    uri = str(tmp_path / "v.parquet")
    written = replace(both(said(3), said(5, part=SPLIT)), fold_N=np.arange(120) - 60)
    validation.save(uri, written)
    found = validation.load(uri)
    assert found.of(SPLIT).fold_N.tolist() == list(range(60))
    assert found.by == "cell"
    assert found.main.macro_f1 == said(3).macro_f1
    np.testing.assert_array_equal(found.of(SPLIT).probabilities_NC, said(5).probabilities_NC)


@pytest.mark.parametrize("known", [None, [7, None, 5], [7.0, float("nan"), 5.0]])
def test_cells_without_a_number_of_detected_genes_count_their_tokens(known):
    columns = [] if known is None else ["n_genes"]
    obs = pd.DataFrame({"n_genes": pd.Series(known, dtype=object)} if columns else {})
    corpus = SimpleNamespace(columns=columns, lengths_N=np.array([3, 4, 2]), obs=lambda names: obs[names])
    expected = [3, 4] if known is None else [7, 4]
    assert kept_classifier.genes_of(corpus, np.array([0, 1])).tolist() == expected

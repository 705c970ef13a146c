"""The opening lines: what a person can do, credited to the model that does it, and what the encoder adds."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from mixgf.config.run import Config
from mixgf.report import answers
from mixgf.report.results import RunResults
from mixgf.report.sections import summary


def row(model: str, baseline: str, difference: float, outcome: str, *, split: str = "random") -> dict:
    low, high = (difference - 0.01, difference + 0.01) if outcome != "unknown" else (np.nan, np.nan)
    return {
        "group": "pancreas", "split": split, "direction": "", "model": model, "baseline": baseline, "metric": "macro_f1",
        "difference": difference, "low": low, "high": high, "outcome": outcome,
    }  # fmt: skip


def results(**tables: pd.DataFrame) -> RunResults:
    return RunResults(config=Config(), uris={}, tables=tables)


def test_labels_are_credited_to_the_model_that_gives_them() -> None:
    test = {"macro_f1": 0.951, "accuracy": 0.97, "cells": 300, "doubted": 0.05, "accuracy_trusted": 0.99}
    kept = {"group": "pancreas", "model": "genes_vote", "candidates": [{}] * 9, "test": test}
    record = SimpleNamespace(details={"classifiers": [kept]})
    run = RunResults(config=Config(), uris={}, records={"classify": record})
    ((tone, text),) = answers.answers(run)
    assert tone == "good"
    assert "macro F1 0.951" in text
    assert "5.0% of the labels are doubted" in text
    assert "regression and pseudobulk, mean of both (no encoder)" in text
    assert "9 models" in text
    kept["model"] = "encoder_pca"
    assert "(with the encoder)" in answers.answers(run)[0][1]


@pytest.mark.parametrize(
    ("across", "expected"),
    [("genes_vote", "0.930"), ("genes_logreg", "0.910"), ("hvg_logreg", "0.930"), (None, "0.930")],
)
def test_labels_across_species_are_those_of_the_model_that_annotate_uses(across: str | None, expected: str) -> None:
    """That of the kept classifier if it was scored and centres by types, else the preferred one that does; never the best score."""
    rows = [
        {"group": "pancreas", "split": "species", "direction": "human>mouse", "seed": 0, "model": model, "metric": metric, "value": value,
         "low": value, "high": value, "num_train": 9, "num_test": 9, "num_classes": 2, "interval_by": "cell"}
        for model, value in (("genes_vote", 0.93), ("genes_logreg", 0.91), ("joint_pca", 0.99), ("hvg_logreg", 0.98))
        for metric in ("accuracy", "macro_f1")
    ]  # fmt: skip
    run = results(scores=pd.DataFrame(rows))
    if across is not None:
        test = {"macro_f1": 0.9, "accuracy": 0.9, "cells": 3, "doubted": 0.0}
        kept = {"group": "pancreas", "model": "probe", "across": across, "candidates": [], "test": test}
        run.records["classify"] = SimpleNamespace(details={"classifiers": [kept]})
    text = answers.answers(run)[-1][1]
    assert f"human → mouse (pancreas) macro F1 {expected}" in text
    assert "0.99" not in text


@pytest.mark.parametrize(
    ("outcomes", "said"),
    [
        (("tie", "tie"), "nothing that can be told from zero."),
        (("tie", "loss"), "nothing that can be told from zero; it takes away in 1."),
        (("win", "tie"), "more in 1, less in 0, no difference that can be told in 1."),
        (("unknown", "unknown"), "nothing that can be told from zero; 2 with too few donors to say."),
    ],
)
def test_the_encoder_is_credited_with_paired_differences_only(outcomes: tuple[str, str], said: str) -> None:
    rows = [
        row("encoder_pca", other, 0.02, one)
        for other, one in zip(("pca_logreg", "encoder_pca@untrained"), outcomes, strict=True)
    ]
    rows.append(
        row("probe", "probe@untrained", 0.4, "win")
    )  # its control has random weights only: no credit in the first line
    (_, first), (_, line) = answers.encoder_adds(results(added=pd.DataFrame(rows)))
    assert first.endswith(said)
    assert "2 paired comparisons, median difference +0.020, Holm-corrected" in first
    assert "over PCA + logistic regression +0.020" in line
    assert "over random weights +0.020" in line
    assert "probe" not in line


def test_many_groups_are_summed_up_and_stand_in_a_table() -> None:
    """Twelve sentences, tiles and commands would hide what the page says first."""
    number = answers.FEW + 1
    test = {"accuracy": 0.9, "cells": 30, "doubted": 0.0}
    kept = [
        {"group": f"g{i}", "model": "probe" if i == 3 else "genes_vote", "candidates": [], "uri": f"runs/a/classifiers/g{i}",
         "test": test | {"macro_f1": 0.8 + i / 100}}
        for i in range(number)
    ]  # fmt: skip
    run = RunResults(config=Config(), uris={}, records={"classify": SimpleNamespace(details={"classifiers": kept})})
    ((_, text),) = answers.answers(run)
    assert text.startswith(f"Label cells like those of {number} groups: macro F1 0.800 to 0.860, median 0.830")
    assert text.endswith("1 of the models uses the encoder.")
    assert answers.commands(run) == ["mixgf annotate my.h5ad --model runs/a/classifiers/NAME"]
    (table,) = summary._kept(run)
    assert [row[0].text for row in table.rows] == [f"g{i}" for i in range(number)]
    assert [row[3].text for row in table.rows] == [f"{0.8 + i / 100:.3f}" for i in range(number)]
    assert summary.tiles(run) == [("0.83", f"macro F1, labels within a group: median of {number}")]
    few = RunResults(config=Config(), uris={}, records={"classify": SimpleNamespace(details={"classifiers": kept[1:]})})
    assert len(answers.commands(few)) == len(summary.tiles(few)) == len(answers.answers(few)) == answers.FEW
    assert not summary._kept(few)


def test_of_many_tasks_those_with_a_difference_have_a_line() -> None:
    outcomes = ["tie"] * 6 + ["win", "loss"]
    rows = [
        row("encoder_pca", "pca_logreg", 0.02, one) | {"group": f"g{i}", "direction": None}
        for i, one in enumerate(outcomes)
    ]
    _, *lines = answers.encoder_adds(results(added=pd.DataFrame(rows)))
    assert [tone for tone, _ in lines] == ["good", "bad", "plain"]
    assert "g6" in lines[0][1]
    assert "g7" in lines[1][1]
    assert lines[2][1] == "In the other 6 tasks no difference can be told."


def test_the_matrix_has_every_model_once_and_marks_the_best_of_each_task() -> None:
    base = {"group": "g", "direction": "", "seed": 0, "low": 0.0, "high": 1.0, "num_train": 9, "num_test": 9, "num_classes": 2, "interval_by": "cell"}  # fmt: skip
    rows = [
        base | {"split": split, "model": model, "metric": metric, "value": value}
        for split, model, value in (("random", "knn", 0.8), ("random", "pca_knn", 0.9), ("donor", "knn", 0.7))
        for metric in ("accuracy", "macro_f1")
    ]
    head, *lines = answers.score_matrix(pd.DataFrame(rows))
    assert head == ("accuracy / macro F1", "random cells: g", "new donors: g")
    assert lines == [
        ("mixgf, frozen 5-NN (“zero-shot”)", "0.800 / 0.800", "0.700 / 0.700 *"),
        ("PCA + 5-NN", "0.900 / 0.900 *", ""),
    ]

"""The report's section on the classifier of `mixgf finetune`."""

import dataclasses

from mixgf.config.run import Config
from mixgf.report import load
from mixgf.report.sections import finetuned_classifier
from mixgf.storage import artifacts

ABOUT = {
    "classes": ["alpha", "beta"], "training_cells": 1064, "split": "donor", "epoch": 2,
    "test": {"accuracy": 0.9123, "macro_f1": 0.8765, "cells": 321},
    "history": [
        {"epoch": 1.0, "loss": 0.5, "accuracy": 0.8, "train_loss": 0.7},
        {"epoch": 2.0, "loss": 0.25, "accuracy": 0.9, "train_loss": 0.3},
    ],
}  # fmt: skip


def test_scores_on_test_cells_and_the_chosen_epoch_are_said(tmp_path):
    results = load.load_results(Config(output=str(tmp_path)))
    assert finetuned_classifier.section(results).blocks == []
    record = dataclasses.replace(artifacts.plan("classifier", 3, {}, {}), details=ABOUT)
    text, table = finetuned_classifier.section(dataclasses.replace(results, records={"finetune": record})).blocks
    for said in ("1,064 cells of 2 types", "321 test cells (donor split)", "accuracy is 0.912", "macro F1 0.876"):
        assert said in text.text
    assert f"mixgf annotate --model {tmp_path}/finetune" in text.text
    assert "chose epoch 2" in table.caption
    assert [[cell.text for cell in row] for row in table.rows] == [
        ["1", "0.7000", "0.5000", "0.800"],
        ["2", "0.3000", "0.2500", "0.900"],
    ]

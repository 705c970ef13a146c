"""One prediction at a time: a model on a split, scored and kept, and the classifiers that users get.

A piece reads artifacts, computes one thing and writes one part file, atomically, so that pieces can run anywhere, in any
order, any number of times. `mixgf.classification.intermediates` has what pieces share, `mixgf.classification.tables` puts them together.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mixgf.arrays import Floats, Ints
from mixgf.classification import classifier, finetune, integration, intermediates, metrics, probes, registry, umap
from mixgf.classification.baselines import BASELINES
from mixgf.classification.intermediates import ArtifactPaths
from mixgf.classification.labels import Labelled
from mixgf.classification.splits import Split
from mixgf.config.run import Config
from mixgf.corpus.reader import Corpus
from mixgf.encoder import embed
from mixgf.encoder.bert import Encoder
from mixgf.encoder.device import pick_device
from mixgf.storage import artifacts, files, tables
from mixgf.training.context import LocalContext


def predict(run: Config, places: ArtifactPaths, table: Labelled, split: Split, model: str) -> None:
    """Keep predictions of one model on the test cells of one split, with their scores."""
    began = time.perf_counter()
    probabilities_MC, details = _probabilities(run, places, table, split, model)
    labels_M, classes = table.labels[split.test], np.asarray(split.classes)
    predicted_M, confidence_M = probabilities_MC.argmax(1).astype(np.int64), probabilities_MC.max(1).astype(np.float64)
    rng = np.random.default_rng([run.seed, split.seed, 7])
    donors_M = table.donors[split.test]
    if split.unseen:
        found, by = metrics.rejection(confidence_M, labels_M == split.unseen, donors_M, rng=rng)
    else:
        true_M = split.ids(labels_M)
        found, by = metrics.score(true_M, predicted_M, confidence_M, donors_M, len(split.classes), rng=rng)
    made = pa.table({
        "cell": table.cells[split.test], "true": labels_M, "predicted": classes[predicted_M],
        "probability": confidence_M.astype(np.float32),
    })  # fmt: skip
    meta = details | {
        "seconds": time.perf_counter() - began, "interval_by": by,
        "scores": {name: [one.value, one.low, one.high] for name, one in found.items()},
    }  # fmt: skip
    tables.write_table(
        intermediates.prediction_part(places, split, model), made.replace_schema_metadata({"mixgf": json.dumps(meta)})
    )


def _probabilities(
    run: Config, places: ArtifactPaths, table: Labelled, split: Split, model: str
) -> tuple[Floats, dict[str, Any]]:
    """Class probabilities of the test cells (M, C), and what is kept beside them; a wanted classifier becomes a part."""
    if model in BASELINES:
        return BASELINES[model](intermediates.problem(run, places, table, split)), {}
    head, encoder = registry.parse(model)
    kept = encoder == registry.CHECKPOINT and split.whole and classifier.wanted(run, split)
    if head in registry.HEADS:
        if head == "probe" and kept:
            corpus = Corpus(places.corpus)
            weights = registry.load(places.checkpoint, encoder, run, corpus)  # only kept: nothing is computed with it
            _keep(run, places, corpus, table, split, model, weights, None)
        train_ND, test_MD = (
            intermediates.vectors(places, encoder, table.cells[rows]) for rows in (split.train, split.test)
        )
        return probes.frozen(head, train_ND, test_MD, table=table, split=split, settings=run.classify), {}
    corpus, context = Corpus(places.corpus), LocalContext(pick_device(run.compute.gpus_per_worker))
    start = registry.load(places.checkpoint, encoder, run, corpus, context.device)
    run = registry.recipe(run, model)
    tuned = finetune.finetune(start, corpus, table, split, run=run, context=context)
    if kept:
        _keep(run, places, corpus, table, split, model, tuned.model.encoder, tuned.model.linear())
    return tuned.probabilities, finetune.notes(tuned)


def integrate(run: Config, places: ArtifactPaths, table: Labelled, space: str) -> None:
    """Keep what is known of one embedding as a whole: map coordinates and vectors of a sample of cells, and its measures."""
    rows = intermediates.sample(run, table)
    vectors_ND = np.asarray(intermediates.space_vectors(run, places, table, space, rows), dtype=np.float32)
    found = integration.measure(vectors_ND, table.only(rows), seed=run.seed)
    xy_N2, method = umap.layout(vectors_ND, run.seed)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.reshape(-1)), vectors_ND.shape[1])
    made = pa.table({"cell": table.cells[rows], "x": xy_N2[:, 0], "y": xy_N2[:, 1], "vector": flat})
    meta = {"map": method, "measures": {name: [one.value, one.low, one.high, by] for name, (one, by) in found.items()}}
    uri = intermediates.integration_part(run, places, space)
    tables.write_table(uri, made.replace_schema_metadata({"mixgf": json.dumps(meta)}))


def _keep(  # noqa: PLR0917 (as `predict`, which calls it)
    run: Config, places: ArtifactPaths, corpus: Corpus, table: Labelled, split: Split, model: str, encoder: Encoder,
    head: tuple[Floats, Floats, Floats] | None,
) -> None:  # fmt: skip
    """Write a trained classifier as a part. A tuned head pools `classify.layer`, a probe `embed.layer`."""
    frozen = head is None
    max_len = 0 if frozen else finetune.longest(encoder, run.classify)
    layer = run.embed.layer if frozen else run.classify.layer

    def of_cells(cells: Ints) -> Floats:
        if frozen:  # those that the probe is scored on are there already
            return intermediates.vectors(places, registry.CHECKPOINT, cells)
        return embed.embed_cells(
            encoder, corpus, cells, run.embed.pooling, layer, run.train.micro_tokens, max_len=max_len
        )

    made = classifier.of_split(
        encoder,
        head,
        of_cells,
        model=model,
        corpus=corpus,
        table=table,
        split=split,
        run=run,
        max_len=max_len,
        layer=layer,
    )
    classifier.save(intermediates.classifier_part(places, split.group, model), made, corpus.vocabulary)


def keep_best(
    run: Config, places: ArtifactPaths, splits: Sequence[Split], parents: dict[str, str]
) -> list[dict[str, Any]]:
    """Publish the classifier with the lowest validation loss of each group; returns what is known of each.

    One that is already published stays unless a new one (of a model that was added since) is better.
    """
    kept = []
    for split in [s for s in splits if s.whole and classifier.wanted(run, s)]:
        uri = files.join(places.output, classifier.FOLDER, intermediates.named(split.group, splits))
        candidates = [
            intermediates.classifier_part(places, split.group, model) for model in registry.scored(run.classify, split)
        ]
        candidates = [c for c in candidates if files.list_dir(c)]
        there = artifacts.find(uri) is not None
        if not candidates and not there:
            continue
        best = min([uri] * there + candidates, key=_validation_loss)
        if best != uri:
            files.remove(uri)
            classifier.publish(uri, best, {role: parents[role] for role in ("corpus", "checkpoint")})
        about = classifier.facts(uri)["about"]
        kept.append({"uri": uri, **{name: about[name] for name in ("group", "model", "validation", "test")}})
    return kept


def _validation_loss(uri: str) -> float:
    return float(classifier.facts(uri)["about"]["validation"]["loss"])

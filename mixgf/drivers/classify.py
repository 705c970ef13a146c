"""`classify`: every model on every split, as independent Ray tasks whose results are parts in storage.

First what many tasks share: raw counts of each source, vectors of blocks of cells. Then one task per (split, model), the
longest first. A part that is there is not made again, so a run killed at any moment continues; only splits travel through
Ray. All arithmetic is in `mixgf.evaluation`, `mixgf.classify`, `mixgf.baselines` and `mixgf.scores`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from mixgf import artifacts, audit, classify, evaluation, splits, storage, tracking
from mixgf.baselines import BASELINES
from mixgf.classify import HEADS, TUNINGS, UNTRAINED
from mixgf.config import Config, UserError, to_dict
from mixgf.dataset import Corpus
from mixgf.drivers.metrics import Meter, watch
from mixgf.evaluation import Places
from mixgf.progress import Progress, say, warn
from mixgf.splits import Labelled, Split

SCHEMA = 1
EPOCH_COST = 3.0
"""Cost of a training epoch in forward passes over the same tokens."""
BASELINE_COST = 0.5
"""Cost of a baseline per cell, in forward passes over a sentence. Only progress uses it."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One part to be made, if its file is not there."""

    uri: str
    call: Callable[..., None]
    args: tuple[Any, ...]
    cost: float
    """In tokens passed forward, roughly; for the order and the time left."""
    threads: int = 1
    gpu: bool = False


Spread = Callable[[Sequence[Piece]], Iterator[int]]
"""Makes pieces in any order; yields the number of each finished piece."""


def loop(pieces: Sequence[Piece]) -> Iterator[int]:
    """The plain loop: what Ray must equal."""
    for i, piece in enumerate(pieces):
        piece.call(*piece.args)
        yield i


def ray_tasks(config: Config) -> Spread:
    """Spread pieces over Ray tasks; lost workers and network errors are tried again."""
    import ray
    import torch

    def make(call: Callable[..., None], threads: int, *args: Any) -> None:
        torch.set_num_threads(threads)
        call(*args)

    task = ray.remote(make)
    cpus, gpus = config.compute.cpus_per_worker, config.compute.gpus_per_worker

    def spread(pieces: Sequence[Piece]) -> Iterator[int]:
        shared: dict[int, Any] = {}  # what many pieces carry is put into the object store once

        def reference(value: Any) -> Any:
            if not isinstance(value, (Labelled, Split)):
                return value
            return shared.setdefault(id(value), ray.put(value))

        running: dict[Any, int] = {}
        for i, piece in enumerate(pieces):
            options = {
                "num_cpus": max(cpus, float(piece.threads)), "num_gpus": gpus if piece.gpu else 0, "max_retries": 3,
                "retry_exceptions": [OSError],
            }  # fmt: skip
            args = [reference(a) for a in piece.args]
            running[task.options(**options).remote(piece.call, piece.threads, *args)] = i
        while running:
            for ref in ray.wait(list(running), num_returns=1)[0]:
                number = running.pop(ref)
                try:
                    ray.get(ref)
                except ray.exceptions.RayTaskError as error:
                    for other in running:
                        ray.cancel(other, force=True)
                    raise (error.cause or error) from None
                yield number

    return spread


def run(config: Config, *, spread: Spread | None = None) -> str:
    """Score every model on every split; returns the artifact's URI. `spread` replaces Ray (`loop` in tests)."""
    classify.require_models(config.classify)
    skipped = classify.skipped(config.classify)
    for why in skipped.values():
        warn(f"classify: left out: {why}")
    models = tuple(m for m in config.classify.models if m not in skipped)
    config = replace(config, classify=replace(config.classify, models=models))
    uri = storage.join(config.output, "classify")
    places, record = _plan(config, uri)
    finished = artifacts.find(uri)
    if finished is not None and finished.fingerprint == record.fingerprint:
        storage.remove(places.parts)
        return uri
    table = classify.labelled(Corpus(places.corpus), config.classify)
    made = splits.make(table, config.classify, seed=config.seed)
    artifacts.begin(uri, record)  # only now: a config that cannot be scored leaves nothing behind
    for split in made:
        dropped = ", ".join(f"{n:,} ({reason})" for reason, n in split.dropped.items())
        if split.seed == 0:
            say(f"classify: {split.name}: {len(split.classes)} types, {len(split.train):,} training cells, {len(split.test):,} test cells"
                + (f"; not used: {dropped}" if dropped else ""))  # fmt: skip
    with tracking.stage(config, "classify", to_dict(config.classify), record.fingerprint) as tracked:
        if spread is not None:
            _make(config, places, table, made, spread, meter=Meter("classify", tracked.id))
        else:
            from mixgf.drivers.session import session

            with session(config), watch(config, "classify", tracked, uri) as watched:
                _make(config, places, table, made, ray_tasks(config), meter=watched.meter)
                watched.made(cells=len(table))
        done = _publish(config, places, record, table, made)
        tracked.log(done)
    storage.remove(places.parts)
    return uri


def _plan(config: Config, uri: str) -> tuple[Places, artifacts.Record]:
    """Inputs of the stage and the record of its artifact."""
    corpus_uri = config.inputs.corpus or storage.join(config.output, "corpus")
    checkpoint_uri = config.inputs.checkpoint or storage.join(config.output, "pretrain")
    corpus = artifacts.require(corpus_uri, "corpus")
    if "imported" in corpus.details and (counted := [m for m in config.classify.models if m in BASELINES]):
        others = ",".join(m for m in config.classify.models if m not in BASELINES) or "finetune"
        msg = (f"classify.models: {', '.join(counted)} need raw counts, which the imported corpus {corpus_uri} does not have; "
               f"leave them out: --set classify.models={others}")  # fmt: skip
        raise UserError(msg)
    checkpoint = artifacts.require(checkpoint_uri, "checkpoint")
    embeddings, embedded = evaluation.embeddings(config, corpus, checkpoint)
    data = to_dict(config)
    train = {name: data["train"][name] for name in ("schedule", "weight_decay", "clip", "precision")}
    content = {name: data[name] for name in ("classify", "embed", "seed")} | {
        "train": train,
        "orthologs": data["vocab"]["orthologs"],
    }
    parents = {"corpus": corpus.fingerprint, "checkpoint": checkpoint.fingerprint}
    parents |= {"embeddings": embedded.fingerprint} if embedded is not None else {}
    places = Places(corpus=corpus_uri, checkpoint=checkpoint_uri, output=uri, embeddings=embeddings)
    return places, artifacts.plan("classification", SCHEMA, content, parents)


def _make(
    config: Config, places: Places, table: Labelled, made: Sequence[Split], spread: Spread, *, meter: Meter
) -> None:
    corpus = Corpus(places.corpus)
    _spread("classify: counts and vectors", _shared(config, places, corpus, table, made), spread, meter)
    _spread("classify: models", _scored(config, places, corpus, table, made), spread, meter)


def _shared(config: Config, places: Places, corpus: Corpus, table: Labelled, made: Sequence[Split]) -> list[Piece]:
    """Counts of each source and vectors of each block that the asked models need."""
    rows = np.unique(np.concatenate([np.concatenate([s.train, s.test]) for s in made]))
    cells = np.sort(table.cells[rows])
    pieces = []
    if any(m in BASELINES for m in config.classify.models):
        for source in np.unique(table.sources[rows]).tolist():
            mine = np.sort(table.cells[rows][table.sources[rows] == source])
            pieces.append(Piece(uri=evaluation.counts_part(places, source), call=evaluation.read_counts,
                                args=(config, places, source, mine), cost=float(corpus.lengths_N[mine].sum())))  # fmt: skip
    needed = {UNTRAINED if m.startswith(UNTRAINED) else evaluation.TRAINED for m in config.classify.models
              if m.removeprefix(UNTRAINED) in HEADS}  # fmt: skip
    for encoder in sorted(needed):
        if encoder == evaluation.TRAINED and places.embeddings:
            continue
        for number, start in enumerate(range(0, len(cells), evaluation.BLOCK_CELLS)):
            mine = cells[start : start + evaluation.BLOCK_CELLS]
            pieces.append(Piece(uri=evaluation.vectors_part(places, encoder, number), call=evaluation.embed_block,
                                args=(config, places, encoder, number, mine), cost=float(corpus.lengths_N[mine].sum()),
                                threads=config.train.threads, gpu=True))  # fmt: skip
    return pieces


def _scored(config: Config, places: Places, corpus: Corpus, table: Labelled, made: Sequence[Split]) -> list[Piece]:
    """One piece per split and model."""
    pieces = []
    for split in made:
        lengths = corpus.lengths_N[table.cells[split.train]].astype(np.int64)
        tokens = float(np.minimum(lengths, config.classify.max_len or lengths).sum())
        for model in config.classify.models:
            tuned = model.removeprefix(UNTRAINED) in TUNINGS
            cost = tokens * (EPOCH_COST * config.classify.epochs if tuned else BASELINE_COST)
            pieces.append(Piece(uri=evaluation.prediction_part(places, split, model), call=evaluation.predict,
                                args=(config, places, table, split, model), cost=cost,
                                threads=config.train.threads if tuned else 1, gpu=tuned))  # fmt: skip
    return pieces


def _spread(what: str, pieces: Sequence[Piece], spread: Spread, meter: Meter) -> None:
    """Make the pieces that are not there, the longest first."""
    todo = sorted((p for p in pieces if not storage.exists(p.uri)), key=lambda p: (-p.cost, p.uri))
    total = sum(p.cost for p in pieces)
    done = total - sum(p.cost for p in todo)
    with Progress(what, total, "tokens", done=done) as progress:
        for finished, i in enumerate(spread(todo), 1):
            done += todo[i].cost
            progress.update(done)
            meter.units(waiting=len(todo) - finished, done=finished)


def _publish(
    config: Config, places: Places, record: artifacts.Record, table: Labelled, made: Sequence[Split]
) -> dict[str, float]:
    """Put the parts together; returns the figures of the run."""
    uri = places.output
    found = evaluation.tables(config, places, table, made, table.names.tolist())
    files = {}
    for name, frame in found.items():
        size, digest = storage.write_table(
            storage.join(uri, f"{name}.parquet"), pa.Table.from_pandas(frame, preserve_index=False)
        )
        files[f"{name}.parquet"] = {"bytes": size, "sha256": digest}
    shown = evaluation.write_cells(storage.join(uri, "cells.h5ad"), config, table, found, table.names.tolist())
    seen = _audit(places, table)
    say(f"classify: {seen['line']}")
    kept = evaluation.keep_best(config, places, made, record.parents)
    details = {
        "models": list(config.classify.models), "cells_h5ad": shown, "classifiers": kept, "audit": seen,
        "splits": [{"group": s.group, "split": s.kind, "direction": s.direction, "seed": s.seed, "classes": list(s.classes), "num_train": len(s.train),
                    "num_validation": len(s.validation), "num_test": len(s.test), "dropped": s.dropped, "donors": list(s.donors)} for s in made],
    }  # fmt: skip
    counts = {"labelled": len(table), "splits": len(made), "predictions": len(found["predictions"])}
    artifacts.finish(uri, record, counts=counts, files=files, details=details)
    for one in kept:
        say(
            f"classify: kept the {one['model']} of {one['group']} (test accuracy {one['test']['accuracy']:.3f}): mixgf annotate --model {one['uri']} FILE"
        )
    return _figures(found["scores"])


def _audit(places: Places, table: Labelled) -> dict[str, Any]:
    """How many of the labelled cells the encoder was pretrained on, as plain data with one `line` for people."""
    mine, trained = artifacts.require(places.corpus, "corpus"), artifacts.require(places.checkpoint, "checkpoint")
    if trained.parents.get("corpus") == mine.fingerprint:  # one corpus: nothing to compare
        return audit.Overlap(cells=(len(table), len(table)), by="the corpus' fingerprint", names=None, same=True).json()
    try:
        theirs = audit.of_corpus(audit.trained_on(places.checkpoint))
    except UserError:
        line = "not known how many evaluation cells were in the pretraining corpus, which does not lie beside the checkpoint: mixgf audit EVAL CORPUS"
        return {"line": line, "cells": None}
    return audit.compare(audit.of_corpus(places.corpus).only(table.cells), theirs).json()


def _figures(scores: pd.DataFrame) -> dict[str, float]:
    """Mean over seeds of each score, by the name it has in MLflow."""
    keys = ["model", "split", "group", "direction", "metric"]
    means = scores.groupby(keys, sort=False)["value"].mean()
    return {
        "/".join(evaluation.slug(str(part)) for part in key if part): float(value)
        for key, value in zip(means.index, means.to_numpy(), strict=True)
    }

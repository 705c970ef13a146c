"""`classify`: every model on every split, as independent Ray tasks whose results are parts in storage.

First what many tasks share: raw counts of each source, vectors of blocks of cells. Then one task per (split, model), the
longest first. A part that is there is not made again, so a run killed at any moment continues, and models, seeds and splits
can be added to a finished one; only splits travel through Ray. All arithmetic is in `mixgf.classification.predict`, `mixgf.classification.finetune`,
`mixgf.classification.baselines` and `mixgf.classification.metrics`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from mixgf.classification import intermediates, labels, predict, registry, splits, tables
from mixgf.classification.baselines import BASELINES
from mixgf.classification.intermediates import ArtifactPaths
from mixgf.classification.labels import Labelled
from mixgf.classification.splits import Split
from mixgf.config.fields import content
from mixgf.config.parse import fingerprint, to_dict
from mixgf.config.run import Config
from mixgf.console import duration, say, warn
from mixgf.corpus import overlap
from mixgf.corpus.reader import Corpus
from mixgf.distributed.metrics import Meter, watch
from mixgf.encoder import checkpoint, embed
from mixgf.errors import UserError
from mixgf.stages import pieces
from mixgf.stages.pieces import Piece, Spread, loop, ray_tasks
from mixgf.storage import artifacts, files
from mixgf.storage.artifacts import Record
from mixgf.tracking import mlflow_runs

__all__ = ["Piece", "Spread", "dry_run", "loop", "run"]

SCHEMA = 2
EPOCH_COST = 3.0
"""Cost of a training epoch in forward passes over the same tokens."""
SECONDS = {
    "majority": 0.1,
    "hvg_logreg": 0.5,
    "pca_knn": 0.4,
    "pseudobulk": 0.3,
    "rank_pca": 1.2,
    "probe": 0.3,
    "scvi": 60.0,
}
"""Seconds of a model per 1,000 training cells on an EPYC core, roughly. Only the projection and progress use them."""
FEWEST_SECONDS = 0.1
"""Of any prediction, and of models that are not listed."""
WHOLE_SECONDS, START_SECONDS = 10.0, 40.0
"""Of the measures and the map of an embedding, per 1,000 cells; and of a process that draws its first map (compilation)."""


def run(config: Config, *, spread: Spread | None = None) -> str:
    """Score every model on every split; returns the artifact's URI. `spread` replaces Ray (`loop` in tests)."""
    config = _possible(config)
    uri = files.join(config.output, "classify")
    places, record = _plan(config, uri)
    finished = artifacts.find(uri)
    if finished is not None and finished.fingerprint == record.fingerprint:
        _clean(places)
        return uri
    table, made = _splits(config, places)
    if finished is not None and _extends(finished, record):
        say(f"classify: {uri} is extended; what it has is used again")
    artifacts.begin(
        uri, record, replaces=lambda there: _extends(there, record)
    )  # a config that cannot be scored leaves nothing
    for split in made:
        dropped = ", ".join(f"{n:,} ({reason})" for reason, n in split.dropped.items())
        if split.seed == 0 and split.whole:
            say(f"classify: {split.name}: {len(split.classes)} types, {len(split.train):,} training cells, {len(split.test):,} test cells"
                + (f"; not used: {dropped}" if dropped else ""))  # fmt: skip
    work = _Work(config, places, table, made)
    say(work.projection())
    with mlflow_runs.stage(
        config, "classify", _fixed(record), fingerprint(_fixed(record) | {"output": config.output})
    ) as tracked:
        if spread is not None:
            work.do(spread, Meter("classify", tracked.id), tracked)
        else:
            from mixgf.distributed.session import session

            with session(config), watch(config, "classify", tracked, uri) as watched:
                work.do(ray_tasks(config), watched.meter, tracked)
                watched.made(cells=len(table))
        done = _publish(config, places, record, table, made)
        tracked.log(done)
    _clean(places)
    return uri


def dry_run(config: Config) -> str:
    """What a run would score and how long that takes, as text for people; makes nothing."""
    config = _possible(config)
    places, _ = _plan(config, files.join(config.output, "classify"))
    table, made = _splits(config, places)
    work = _Work(config, places, table, made)
    lines = [f"{len(table):,} labelled cells, {len(np.unique(table.groups))} groups"]
    for kind in dict.fromkeys(s.kind for s in made):
        of_kind = [s for s in made if s.kind == kind]
        tasks = {(s.group, s.direction) for s in of_kind}
        extra = sum(not s.whole for s in of_kind)
        lines.append(
            f"  {kind:<8} {len(tasks):>4} tasks, {len(of_kind) - extra:>5} splits"
            + (f", {extra:,} with fewer labels or types" if extra else "")
        )
    scored = [(m, s) for s in made for m in registry.scored(config.classify, s)]
    for model in config.classify.models:
        mine = [s for m, s in scored if m == model]
        seconds = sum(work.seconds(model, s) for s in mine)
        lines.append(f"  {model:<22} {len(mine):>5} predictions  {duration(seconds):>12} of one core")
    return "\n".join([*lines, work.projection()])


def _possible(config: Config) -> Config:
    """The same without the models whose packages are not installed, each of which is warned of."""
    registry.require(config.classify)
    skipped = registry.skipped(config.classify.models)
    for why in skipped.values():
        warn(f"classify: left out: {why}")
    models, curve = (
        tuple(m for m in names if m not in skipped) for names in (config.classify.models, config.classify.curve_models)
    )
    return replace(config, classify=replace(config.classify, models=models, curve_models=curve))


def _splits(config: Config, places: ArtifactPaths) -> tuple[Labelled, list[Split]]:
    table = splits.capped(labels.labelled(Corpus(places.corpus), config.classify), config.classify, seed=config.seed)
    return table, splits.make(table, config.classify, seed=config.seed)


def _clean(places: ArtifactPaths) -> None:
    """Remove the parts that no later model needs."""
    for kind in intermediates.SCRATCH:
        files.remove(files.join(places.parts, kind))


def _plan(config: Config, uri: str) -> tuple[ArtifactPaths, Record]:
    """Inputs of the stage and the record of its artifact."""
    corpus_uri = config.inputs.corpus or files.join(config.output, "corpus")
    checkpoint_uri = config.inputs.checkpoint or files.join(config.output, "pretrain")
    corpus = artifacts.require(corpus_uri, "corpus")
    if "imported" in corpus.details and (counted := [m for m in config.classify.models if m in BASELINES]):
        others = ",".join(m for m in config.classify.models if m not in BASELINES) or "finetune"
        msg = (f"classify.models: {', '.join(counted)} need raw counts, which the imported corpus {corpus_uri} does not have; "
               f"leave them out: --set classify.models={others}")  # fmt: skip
        raise UserError(msg)
    encoders = registry.records(checkpoint_uri, config, Corpus(corpus_uri))
    embeddings, embedded = intermediates.embeddings(config, corpus, encoders[registry.CHECKPOINT])
    parents = {"corpus": corpus.fingerprint}
    parents |= {f"encoder {name}" if name else "checkpoint": one.fingerprint for name, one in encoders.items()}
    parents |= {"embeddings": embedded.fingerprint} if embedded is not None else {}
    places = ArtifactPaths(corpus=corpus_uri, checkpoint=checkpoint_uri, output=uri, embeddings=embeddings)
    return places, artifacts.plan("classification", SCHEMA, _content(config), parents)


def _content(config: Config) -> dict[str, Any]:
    """What decides the artifact: the cells, what is asked of them, and the settings of each model."""
    data, settings = to_dict(config), config.classify
    asked = content(settings, role="asked")
    asked |= {f"seeds of {model}": number for model, number in registry.seeds(settings).items()}
    asked |= {"curve": list(registry.curve(settings)) if settings.label_shares or settings.unseen_types else []}
    models = {model: registry.reads(model, data) for model in settings.models}
    if settings.integration_cells:
        models["integration"] = {"cells": settings.integration_cells, "embed": data["embed"]}
    return {
        "cells": content(settings, role="cells"),
        "asked": asked,
        "seed": config.seed,
        "models": models,
    }


def _fixed(record: Record) -> dict[str, Any]:
    """What stays as it is when a classification is extended: its runs in MLflow have one parent."""
    return {name: record.config[name] for name in ("cells", "seed")} | {
        role: record.parents[role] for role in ("corpus", "checkpoint")
    }


def _extends(there: Record, record: Record) -> bool:
    """Whether a classification has all of another one, by the same settings, and more models, seeds, splits or shares."""
    old, new = there.config, record.config
    if (there.kind, there.schema) != (record.kind, record.schema) or any(old[n] != new[n] for n in ("cells", "seed")):
        return False
    if not old["asked"].keys() <= new["asked"].keys():
        return False
    asked = [(value, new["asked"][name]) for name, value in old["asked"].items()]
    return (
        all(new["models"].get(model) == settings for model, settings in old["models"].items())
        and all(set(a) <= set(b) if isinstance(a, list) else a <= b for a, b in asked)
        and there.parents.items() <= record.parents.items()
    )


class _Work:
    """The pieces of a run, and what they cost."""

    def __init__(self, config: Config, places: ArtifactPaths, table: Labelled, made: Sequence[Split]) -> None:
        self.config, self.places, self.table, self.made = config, places, table, made
        heads, longest = any(m not in BASELINES for m in config.classify.models), 0
        if heads:
            longest = int(artifacts.require(places.checkpoint, checkpoint.KIND).details["model"]["max_positions"])
        self.corpus, self.plain = Corpus(places.corpus, max_len=longest), to_dict(config)
        self.tokens_per_s = _speed(config, places, self.corpus, table) if heads else 1.0
        self.scored = self._scored()
        self.whole = self._whole()
        self.todo = pieces.missing(list(self.scored))
        self.shared = self._shared() if self.todo or pieces.missing(self.whole) else []

    def do(self, spread: Spread, meter: Meter, tracked: mlflow_runs.Run) -> None:
        """Make all that is not there; every prediction becomes a run under `tracked`, once."""
        logged = tracked.children()

        def log(piece: Piece) -> None:
            split, model = self.scored[piece]
            key = piece.uri.rpartition("/")[2]
            if key in logged:
                return
            found = tables.facts(piece.uri)
            params = split.task | {"model": model, "share": split.share, "unseen": split.unseen, "num_train": len(split.train),
                                   "num_test": len(split.test), "num_classes": len(split.classes)}  # fmt: skip
            params |= registry.reads(model, self.plain)
            tracked.child(f"{model}: {split.name}", key, params, tables.figures(found))

        todo = set(self.todo)
        for piece in [p for p in self.scored if p not in todo]:
            log(piece)  # made before, by a run that was killed before it could say so
        pieces.make("classify: counts and vectors", self.shared, spread, meter)
        pieces.make("classify: models", list(self.scored), spread, meter, log)
        pieces.make("classify: embeddings as a whole", self.whole, spread, meter)

    def projection(self) -> str:
        """The time that is left, as a line."""
        cores = os.cpu_count() or 1
        seconds = sum(p.cost for p in (*self.todo, *pieces.missing(self.shared), *pieces.missing(self.whole)))
        there = f" ({len(self.scored) - len(self.todo):,} are there)" if len(self.todo) < len(self.scored) else ""
        return (f"classify: {len(self.todo):,} predictions to make{there}: about {duration(seconds)} of one core, "
                f"{duration(seconds / cores)} on {cores} free ones like this")  # fmt: skip

    def seconds(self, model: str, split: Split) -> float:
        """Of one core, roughly, for a prediction."""
        if not registry.is_tuned(model):
            per_thousand = SECONDS.get(registry.parse(model)[0], FEWEST_SECONDS)
            return FEWEST_SECONDS + per_thousand * len(split.train) / 1000
        settings = self.config.classify
        lengths = self.corpus.lengths_N[self.table.cells[split.train]].astype(np.int64)
        tokens = float(np.minimum(lengths, settings.max_len or lengths).sum())
        epochs = registry.recipe(self.config, model).classify.epochs
        return tokens * EPOCH_COST * epochs / self.tokens_per_s

    def _scored(self) -> dict[Piece, tuple[Split, str]]:
        """One piece per split and model."""
        found = {}
        for split in self.made:
            for model in registry.scored(self.config.classify, split):
                tuned = registry.is_tuned(model)
                piece = Piece(
                    uri=intermediates.prediction_part(self.places, split, model), call=predict.predict,
                    args=(self.config, self.places, self.table, split, model), cost=self.seconds(model, split),
                    threads=self.config.train.threads if tuned else 1, gpu=tuned,
                )  # fmt: skip
                found[piece] = split, model
        return found

    def _whole(self) -> list[Piece]:
        """One piece per embedding."""
        cells = min(len(self.table), self.config.classify.integration_cells)
        return [
            Piece(uri=intermediates.integration_part(self.config, self.places, space), call=predict.integrate,
                  args=(self.config, self.places, self.table, space), cost=START_SECONDS + WHOLE_SECONDS * cells / 1000)
            for space in intermediates.spaces(self.config, self.table)
        ]  # fmt: skip

    def _shared(self) -> list[Piece]:
        """Counts of each source and vectors of each block that the models to come need."""
        config, places, table = self.config, self.places, self.table
        cells, models = np.sort(table.cells), {self.scored[piece][1] for piece in self.todo}
        asked = {str(piece.args[-1]) for piece in pieces.missing(self.whole)}
        found = []
        if models & set(BASELINES) or intermediates.EXPRESSION in asked:
            for source in np.unique(table.sources).tolist():
                mine = np.sort(table.cells[table.sources == source])
                found.append(Piece(uri=intermediates.counts_part(places, source), call=intermediates.read_counts,
                                   args=(config, places, source, mine), cost=len(mine) / 1000))  # fmt: skip
        for encoder in sorted(set(registry.of_encoders(models, registry.HEADS)) | asked - {intermediates.EXPRESSION}):
            if encoder == registry.CHECKPOINT and places.embeddings:
                continue
            for number, start in enumerate(range(0, len(cells), intermediates.BLOCK_CELLS)):
                mine = cells[start : start + intermediates.BLOCK_CELLS]
                cost = float(self.corpus.lengths_N[mine].sum()) / self.tokens_per_s
                found.append(Piece(uri=intermediates.vectors_part(places, encoder, number), call=intermediates.embed_block,
                                   args=(config, places, encoder, number, mine), cost=cost, threads=config.train.threads,
                                   gpu=True))  # fmt: skip
        return found


def _speed(config: Config, places: ArtifactPaths, corpus: Corpus, table: Labelled) -> float:
    """Tokens per second that a core of this machine passes forward, by a short look."""
    import torch

    encoder = registry.load(places.checkpoint, registry.CHECKPOINT, config, corpus)
    threads, cells = torch.get_num_threads(), table.cells[:: max(1, len(table) // 32)][:32]
    torch.set_num_threads(1)
    best = 0.0
    for _ in range(2):
        began = time.process_time()
        embed.embed_cells(encoder, corpus, cells, config.embed.pooling, config.embed.layer)
        best = max(best, float(corpus.lengths_N[cells].sum()) / (time.process_time() - began))
    torch.set_num_threads(threads)
    return best


def _publish(
    config: Config, places: ArtifactPaths, record: Record, table: Labelled, made: Sequence[Split]
) -> dict[str, float]:
    """Put the parts together; returns the figures of the run."""
    uri = places.output
    found = tables.tables(config, places, table, made, table.names.tolist())
    artifacts.reopen(uri)  # an extended classification has its old record until now
    made_of = {name: pa.Table.from_pandas(frame, preserve_index=False) for name, frame in found.items()}
    checksums = artifacts.write_tables(uri, made_of)
    shown = tables.write_cells(files.join(uri, "cells.h5ad"), config, table, found, table.names.tolist())
    seen = _audit(places, table)
    say(f"classify: {seen['line']}")
    kept = predict.keep_best(config, places, made, record.parents)
    details = {
        "models": list(config.classify.models), "encoders": _encoders(config, places), "groups": _groups(table), "cells_h5ad": shown,
        "classifiers": kept, "audit": seen,
        "splits": [s.task | {"classes": list(s.classes), "num_train": len(s.train), "num_validation": len(s.validation),
                             "num_test": len(s.test), "dropped": s.dropped, "donors": list(s.donors)} for s in made if s.whole],
    }  # fmt: skip
    counts = {"labelled": len(table), "splits": len(made), "predictions": len(found["predictions"])}
    artifacts.finish(uri, record, counts=counts, files=checksums, details=details)
    for one in kept:
        say(
            f"classify: kept the {one['model']} of {one['group']} (test accuracy {one['test']['accuracy']:.3f}): mixgf annotate --model {one['uri']} FILE"
        )
    return _figures(found["scores"])


def _encoders(config: Config, places: ArtifactPaths) -> dict[str, dict[str, Any]]:
    """What each encoder was trained to do, by its name in the tables."""
    found = registry.records(places.checkpoint, config, Corpus(places.corpus))
    return {registry.called(name): {"objective": one.details.get("objective")} for name, one in found.items()}


def _groups(table: Labelled) -> dict[str, dict[str, list[str]]]:
    """Species and tissues of each group of cells."""
    return {
        group: {
            "species": sorted(set(table.species[table.groups == group].tolist())),
            "tissues": sorted(set(table.transfer[table.groups == group].tolist())),
        }
        for group in np.unique(table.groups).tolist()
    }


def _audit(places: ArtifactPaths, table: Labelled) -> dict[str, Any]:
    """How many of the labelled cells the encoder was pretrained on, as plain data with one `line` for people."""
    mine, trained = artifacts.require(places.corpus, "corpus"), artifacts.require(places.checkpoint, "checkpoint")
    if trained.parents.get("corpus") == mine.fingerprint:  # one corpus: nothing to compare
        return overlap.Overlap(
            cells=(len(table), len(table)), by="the corpus' fingerprint", names=None, same=True
        ).json()
    try:
        theirs = overlap.corpus_cells(overlap.training_corpus(places.checkpoint))
    except UserError:
        line = "not known how many evaluation cells were in the pretraining corpus, which does not lie beside the checkpoint: mixgf audit EVAL CORPUS"
        return {"line": line, "cells": None}
    return overlap.compare_cells(overlap.corpus_cells(places.corpus).only(table.cells), theirs).json()


def _figures(scores: pd.DataFrame) -> dict[str, float]:
    """Mean over seeds of each score, by the name it has in MLflow."""
    keys = ["model", "split", "group", "direction", "metric"]
    means = scores.groupby(keys, sort=False)["value"].mean()
    return {
        "/".join(intermediates.slug(str(part)) for part in key if part): float(value)
        for key, value in zip(means.index, means.to_numpy(), strict=True)
    }

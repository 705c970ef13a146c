"""`classify`: every model on every split, as independent tasks that each write one intermediate file.

First come the inputs that many tasks share: raw counts of each source, vectors of blocks of cells. Then one task per split and
model, the longest first. A file that is there is not made again, so a killed run continues, and models, seeds and splits can be
added to a finished one. Only the workspace and splits are sent to workers. `mixgf.classification` computes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from mixgf.classification import encoders, kept_classifier, labels, prediction_task, registry, splits, tables
from mixgf.classification.labels import Labelled
from mixgf.classification.models.finetuned import Finetune
from mixgf.classification.models.protocol import FEWEST_SECONDS, Model
from mixgf.classification.paths import ArtifactPaths, unique_slugs
from mixgf.classification.splits import Split
from mixgf.classification.workspace import BLOCK_CELLS, Workspace, find_embeddings
from mixgf.config.fields import content_of
from mixgf.config.parse import fingerprint, to_dict
from mixgf.config.run import Config
from mixgf.console import duration, say, warn
from mixgf.corpus import overlap
from mixgf.corpus.reader import Corpus
from mixgf.distributed.executor import ALL_CPUS, RayExecutor
from mixgf.distributed.metrics import Meter, watch
from mixgf.encoder import checkpoint, embed
from mixgf.errors import UserError
from mixgf.execution import Executor, Shared, Task
from mixgf.stages.fan_out import fan_out, missing
from mixgf.storage import artifacts, files, layout
from mixgf.storage.artifacts import Record
from mixgf.tracking import mlflow_runs, model_card, packaged_model

SCHEMA = 4
EPOCH_COST = 3.0
"""Cost of a training epoch in forward passes over the same tokens."""
WHOLE_SECONDS, START_SECONDS = 10.0, 40.0
"""Seconds for the measures and the map of an embedding, per 1,000 cells; and for a process's first map (compilation)."""


def run(config: Config, *, executor: Executor | None = None) -> str:
    """Score every model on every split; returns the artifact's URI. `executor` runs the tasks; None = Ray."""
    config = _possible(config)
    executor = executor or RayExecutor(config, in_flight=ALL_CPUS)
    uri = files.join(config.output, "classify")
    paths, record = _plan(config, uri)
    finished = artifacts.find(uri)
    if finished is not None and finished.fingerprint == record.fingerprint:
        _clean(paths)
        return uri
    workspace, made = _splits(config, paths)
    if finished is not None and _extends(finished, record):
        say(f"classify: {uri} is extended; its predictions are used again")
    # a config that cannot be scored leaves nothing
    if not artifacts.begin(uri, record, replaces=lambda there: _extends(there, record)):
        return uri
    for split in made:
        dropped = ", ".join(f"{n:,} ({reason})" for reason, n in split.dropped.items())
        if split.seed == 0 and split.whole:
            say(f"classify: {split.name}: {len(split.classes)} types, {len(split.train):,} training cells, {len(split.test):,} test cells"
                + (f"; not used: {dropped}" if dropped else ""))  # fmt: skip
    work = _Work(workspace, made)
    say(work.projection())
    fixed = _fixed(record)
    with mlflow_runs.stage(config, "classify", fixed, fingerprint(fixed | {"output": config.output})) as tracked:
        with executor.session(), watch(config, "classify", tracked, uri) as watched:
            tracked.corpus(paths.corpus, "evaluation")
            work.run(executor, watched.meter, tracked)
            watched.made(cells=len(workspace.table))
        scores, kept = _publish(workspace, record, made)
        _track_results(config, tracked, scores, kept)
    _clean(paths)
    return uri


def dry_run(config: Config) -> str:
    """The predictions of a run and how long they take, as text for people; nothing is written."""
    config = _possible(config)
    paths, _ = _plan(config, files.join(config.output, "classify"))
    workspace, made = _splits(config, paths)
    work, table = _Work(workspace, made), workspace.table
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
    for model in registry.models(config.classify):
        mine = [s for m, s in scored if m == model]
        seconds = sum(work.seconds(model, s) for s in mine)
        lines.append(f"  {model.name:<22} {len(mine):>5} predictions  {duration(seconds):>12} of one core")
    return "\n".join([*lines, work.projection()])


def _possible(config: Config) -> Config:
    """The config without models whose packages are not installed; a warning names each."""
    registry.require(config.classify)
    skipped = registry.skipped(config.classify.models)
    for why in skipped.values():
        warn(f"classify: left out: {why}")
    models, curve = (
        tuple(m for m in names if m not in skipped) for names in (config.classify.models, config.classify.curve_models)
    )
    return replace(config, classify=replace(config.classify, models=models, curve_models=curve))


def _splits(config: Config, paths: ArtifactPaths) -> tuple[Workspace, list[Split]]:
    table = splits.capped(labels.labelled(Corpus(paths.corpus), config.classify), config.classify, seed=config.seed)
    return Workspace(config=config, paths=paths, table=table), splits.make(table, config.classify, seed=config.seed)


def _clean(paths: ArtifactPaths) -> None:
    """Remove the intermediate files that no later model needs."""
    layout.remove_own(paths.output, "classification", scratch=True)


def _plan(config: Config, uri: str) -> tuple[ArtifactPaths, Record]:
    """Inputs of the stage and the record of its artifact."""
    corpus_uri = config.inputs.corpus or files.join(config.output, "corpus")
    checkpoint_uri = config.inputs.checkpoint or files.join(config.output, "pretrain")
    corpus = artifacts.require(corpus_uri, "corpus")
    models = registry.models(config.classify)
    if "imported" in corpus.details and (counted := [m.name for m in models if m.reads_counts]):
        others = ",".join(m.name for m in models if not m.reads_counts) or Finetune.head
        msg = (f"classify.models: {', '.join(counted)} need raw counts, which the imported corpus {corpus_uri} does not have; "
               f"leave them out: --set classify.models={others}")  # fmt: skip
        raise UserError(msg)
    found = encoders.records(checkpoint_uri, config, Corpus(corpus_uri), registry.encoders_of(models))
    embeddings, embedded = find_embeddings(config, corpus, found[encoders.CHECKPOINT])
    parents = {"corpus": corpus.fingerprint}
    parents |= {f"encoder {name}" if name else "checkpoint": one.fingerprint for name, one in found.items()}
    parents |= {"embeddings": embedded.fingerprint} if embedded is not None else {}
    paths = ArtifactPaths(corpus=corpus_uri, checkpoint=checkpoint_uri, output=uri, embeddings=embeddings)
    return paths, artifacts.plan("classification", SCHEMA, _content(config), parents)


def _content(config: Config) -> dict[str, Any]:
    """The settings that decide the artifact: of the cells, of splits and extras, and of each model."""
    data, settings = to_dict(config), config.classify
    asked = content_of(settings, role="asked")
    asked |= {f"seeds of {model}": number for model, number in registry.seeds(settings).items()}
    asked |= {
        "curve": [m.name for m in registry.curve(settings)] if settings.label_shares or settings.unseen_types else []
    }
    models = {model.name: model.reads(data) for model in registry.models(settings)}
    if settings.integration_cells:
        models["integration"] = {"cells": settings.integration_cells, "embed": data["embed"]}
    return {
        "cells": content_of(settings, role="cells"),
        "asked": asked,
        "seed": config.seed,
        "models": models,
    }


def _fixed(record: Record) -> dict[str, Any]:
    """The settings that an extended classification keeps; they identify the parent of its runs in MLflow."""
    return {name: record.config[name] for name in ("cells", "seed")} | {
        role: record.parents[role] for role in ("corpus", "checkpoint")
    }


def _extends(there: Record, record: Record) -> bool:
    """Whether `record` asks for all that is there, by the same settings, and for more models, seeds, splits or shares."""
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
    """The tasks of a run; weights are seconds of one core."""

    def __init__(self, workspace: Workspace, made: Sequence[Split]) -> None:
        self.workspace, self.config, self.paths, self.table = (
            workspace,
            workspace.config,
            workspace.paths,
            workspace.table,
        )
        self.made, longest = made, 0
        encoded = any(m.encoder is not None for m in registry.models(self.config.classify))
        if encoded:
            longest = int(artifacts.require(self.paths.checkpoint, checkpoint.KIND).details["model"]["max_positions"])
        self.corpus, self.plain = Corpus(self.paths.corpus, max_len=longest), to_dict(self.config)
        self.tokens_per_s = _speed(workspace, self.corpus) if encoded else 1.0
        self.scored = self._scored()
        self.whole = self._whole()
        self.todo = missing(self.scored)
        self.shared = self._shared() if self.todo or missing(self.whole) else []

    def run(self, executor: Executor, meter: Meter, tracked: mlflow_runs.Run) -> None:
        """Make every missing file; each prediction becomes one run under `tracked`."""
        logged = tracked.children()

        def log(task: Task, _: object = None) -> None:
            split, model = self.scored[task]
            key = task.part.rpartition("/")[2]
            if key in logged:
                return
            found = tables.facts(task.part)
            params = split.task | {"model": model.name, "share": split.share, "unseen": split.unseen, "num_train": len(split.train),
                                   "num_test": len(split.test), "num_classes": len(split.classes)}  # fmt: skip
            params |= model.reads(self.plain)
            tracked.child(f"{model.name}: {split.name}", key, params, tables.figures(found))

        todo = set(self.todo)
        for task in [t for t in self.scored if t not in todo]:
            log(task)  # made by a run that was killed before it could log it
        run = partial(fan_out, run=executor.run, meter=meter, longest_first=True)
        run("classify: counts and vectors", self.shared)
        run("classify: models", list(self.scored), done=log)
        run("classify: embeddings as a whole", self.whole)

    def projection(self) -> str:
        """The time that is left, as a line."""
        cores = os.cpu_count() or 1
        seconds = sum(task.weight for task in (*self.todo, *missing(self.shared), *missing(self.whole)))
        there = f" ({len(self.scored) - len(self.todo):,} are there)" if len(self.todo) < len(self.scored) else ""
        return (f"classify: {len(self.todo):,} predictions to make{there}: about {duration(seconds)} of one core, "
                f"{duration(seconds / cores)} on {cores} free ones like this")  # fmt: skip

    def seconds(self, model: Model, split: Split) -> float:
        """Seconds of one core for a prediction, roughly."""
        epochs = model.epochs(self.config)
        if not epochs:
            return FEWEST_SECONDS + model.seconds * len(split.train) / 1000
        settings = self.config.classify
        lengths = self.corpus.lengths_N[self.table.cells[split.train]].astype(np.int64)
        tokens = float(np.minimum(lengths, settings.max_len or lengths).sum())
        return tokens * EPOCH_COST * epochs / self.tokens_per_s

    def _scored(self) -> dict[Task, tuple[Split, Model]]:
        """One task per split and model."""
        found, workspace = {}, Shared(self.workspace)
        for split in self.made:
            shared = Shared(split)
            for model in registry.scored(self.config.classify, split):
                trains = model.trains_encoder
                task = Task(
                    part=self.paths.prediction(split, model.name), function=prediction_task.predict, args=(workspace, shared, model),
                    weight=self.seconds(model, split), threads=self.config.train.threads if trains else 1, gpu=trains,
                )  # fmt: skip
                found[task] = split, model
        return found

    def _whole(self) -> list[Task]:
        """One task per embedding."""
        cells = min(len(self.table), self.config.classify.integration_cells)
        return [
            Task(
                part=self.workspace.integration_uri(space), function=prediction_task.integrate, threads=1,
                args=(Shared(self.workspace), space), weight=START_SECONDS + WHOLE_SECONDS * cells / 1000,
            )
            for space in prediction_task.measured_spaces(self.workspace)
        ]  # fmt: skip

    def _shared(self) -> list[Task]:
        """Counts of each source and vectors of each block that the models to come need."""
        workspace, paths, table = Shared(self.workspace), self.paths, self.table
        cells, models = np.sort(table.cells), {self.scored[task][1] for task in self.todo}
        asked = {str(task.args[-1]) for task in missing(self.whole)}
        found = []
        if any(model.reads_counts for model in models) or encoders.EXPRESSION in asked:
            for source in np.unique(table.sources).tolist():
                mine = np.sort(table.cells[table.sources == source])
                found.append(
                    Task(
                        part=paths.counts(source), function=Workspace.write_counts, args=(workspace, source, mine),
                        weight=len(mine) / 1000, threads=1,
                    )
                )  # fmt: skip
        for encoder in sorted(set(registry.encoders_of(models, registry.FROZEN)) | asked - {encoders.EXPRESSION}):
            if encoder == encoders.CHECKPOINT and paths.embeddings:
                continue
            for number, start in enumerate(range(0, len(cells), BLOCK_CELLS)):
                mine = cells[start : start + BLOCK_CELLS]
                cost = float(self.corpus.lengths_N[mine].sum()) / self.tokens_per_s
                found.append(
                    Task(
                        part=paths.vectors_block(encoder, number), function=Workspace.write_vectors,
                        args=(workspace, encoder, number, mine), weight=cost, threads=self.config.train.threads, gpu=True,
                    )
                )  # fmt: skip
        return found


def _speed(workspace: Workspace, corpus: Corpus) -> float:
    """Tokens per second of a forward pass on one core of this machine, measured on 32 cells."""
    import torch

    config, table = workspace.config, workspace.table
    encoder = encoders.load(workspace.paths.checkpoint, encoders.CHECKPOINT, config, corpus)
    threads, cells = torch.get_num_threads(), table.cells[:: max(1, len(table) // 32)][:32]
    torch.set_num_threads(1)
    best = 0.0
    for _ in range(2):
        began = time.process_time()
        embed.embed_cells(encoder, corpus, cells, config.embed.pooling, config.embed.layer)
        best = max(best, float(corpus.lengths_N[cells].sum()) / (time.process_time() - began))
    torch.set_num_threads(threads)
    return best


def _publish(workspace: Workspace, record: Record, made: Sequence[Split]) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Write the tables and the record; returns the scores, and what is known of each kept classifier."""
    config, paths, table = workspace.config, workspace.paths, workspace.table
    uri = paths.output
    found = tables.tables(workspace, made, prediction_task.measured_spaces(workspace))
    artifacts.reopen(uri)  # an extended classification keeps its old record until here
    made_of = {name: pa.Table.from_pandas(frame, preserve_index=False) for name, frame in found.items()}
    checksums = artifacts.write_tables(uri, made_of)
    shown = tables.write_cells(files.join(uri, "cells.h5ad"), workspace, found)
    seen = _audit(workspace)
    say(f"classify: {seen['line']}")
    kept = prediction_task.keep_best(workspace, made, record.parents)
    details = {
        "models": list(config.classify.models), "encoders": _encoders(workspace), "groups": _groups(table), "cells_h5ad": shown,
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
    return found["scores"], kept


def _track_results(
    config: Config, tracked: mlflow_runs.Run, scores: pd.DataFrame, kept: Sequence[dict[str, Any]]
) -> None:
    """Log scores, and the kept classifiers as models."""
    tracked.log(_figures(scores))
    means = scores.groupby(["split", "group", "direction", "model", "metric"], sort=False)["value"].mean().unstack()
    tracked.table("scores", pa.Table.from_pandas(means.reset_index(), preserve_index=False))
    tests = [{name: float(one["test"][name]) for name in ("accuracy", "macro_f1")} for one in kept]
    if tests:
        tracked.summary({f"kept/{name}": float(np.mean([test[name] for test in tests])) for name in tests[0]})
    names = unique_slugs(one["group"] for one in kept)
    for one, test in zip(kept, tests, strict=True):
        group = names[one["group"]]
        tracked.summary({f"kept/{group}/{name}": value for name, value in test.items()})
        model = packaged_model.classifier(
            one["uri"], model_card.classifier(kept_classifier.facts(one["uri"])), {f"test/{n}": v for n, v in test.items()}
        )  # fmt: skip
        name = f"{config.tracking.register}-{group}" if config.tracking.register else ""
        tracked.model(f"classifier-{group}", model, register=name)


def _encoders(workspace: Workspace) -> dict[str, dict[str, Any]]:
    """Training objective of each encoder, by its name in the tables."""
    names = registry.encoders_of(registry.models(workspace.config.classify))
    found = encoders.records(workspace.paths.checkpoint, workspace.config, workspace.corpus, names)
    return {encoders.space_name(name): {"objective": one.details.get("objective")} for name, one in found.items()}


def _groups(table: Labelled) -> dict[str, dict[str, list[str]]]:
    """Species and tissues of each group of cells."""
    return {
        group: {
            "species": sorted(set(table.species[table.groups == group].tolist())),
            "tissues": sorted(set(table.transfer[table.groups == group].tolist())),
        }
        for group in np.unique(table.groups).tolist()
    }


def _audit(workspace: Workspace) -> dict[str, Any]:
    """How many of the labelled cells the encoder was pretrained on, as plain data with one `line` for people."""
    paths, table = workspace.paths, workspace.table
    mine, trained = artifacts.require(paths.corpus, "corpus"), artifacts.require(paths.checkpoint, "checkpoint")
    if trained.parents.get("corpus") == mine.fingerprint:  # one corpus: nothing to compare
        held_out = overlap.held_out_of(trained, workspace.corpus)
        unseen = None if held_out is None else int(np.isin(table.cells, held_out).sum())
        return overlap.Overlap(
            cells=(len(table) - (unseen or 0), len(table)), by="the corpus' fingerprint", names=None, same=True,
            held_out=unseen,
        ).json()  # fmt: skip
    try:
        theirs = overlap.training_cells(paths.checkpoint)
    except UserError:
        line = "not known how many evaluation cells were in the pretraining corpus, which does not lie beside the checkpoint: mixgf audit EVAL CORPUS"
        return {"line": line, "cells": None}
    return overlap.compare_cells(overlap.corpus_cells(paths.corpus).only(table.cells), theirs).json()


def _figures(scores: pd.DataFrame) -> dict[str, float]:
    """Mean over seeds of each score, by the name it has in MLflow."""
    keys = ["model", "split", "group", "direction", "metric"]
    means = scores.groupby(keys, sort=False)["value"].mean()
    names = [unique_slugs(str(value) for value in scores[key].unique()) for key in keys]
    return {
        "/".join(of[str(part)] for of, part in zip(names, key, strict=True) if part): float(value)
        for key, value in zip(means.index, means.to_numpy(), strict=True)
    }

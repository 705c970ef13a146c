"""Embedding of a corpus: one task per shard, then one AnnData file."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa

from mixgf.config.parse import from_dict, to_dict
from mixgf.config.run import Config
from mixgf.config.training import Model
from mixgf.console import say
from mixgf.corpus.h5ad import write_h5ad
from mixgf.corpus.reader import Corpus
from mixgf.distributed.executor import RayExecutor
from mixgf.distributed.metrics import Meter, watch
from mixgf.encoder import checkpoint
from mixgf.encoder.bert import require_layer
from mixgf.encoder.embed import embed_shard, plan_shards
from mixgf.errors import UserError
from mixgf.execution import Executor, Task
from mixgf.stages.fan_out import fan_out
from mixgf.storage import artifacts, files, layout, tables
from mixgf.tracking import mlflow_runs

KIND, SCHEMA = "embeddings", 1
OBSM = "X_mixgf"


def run(config: Config, *, executor: Executor | None = None) -> str:
    """Embed all cells of the corpus with the checkpoint's encoder; returns the URI of the artifact.

    `executor` runs the tasks; None = Ray.
    """
    executor = executor or RayExecutor(config)
    uri = files.join(config.output, "embed")
    corpus = Corpus(config.inputs.corpus or files.join(config.output, "corpus"))
    weights = config.inputs.checkpoint or files.join(config.output, "pretrain")
    trained = artifacts.require(weights, checkpoint.KIND, checkpoint.SCHEMA)
    checkpoint.require_sentences(trained, corpus)
    require_layer(from_dict(Model, trained.details["model"]), config.embed.layer, "embed.layer")
    parents = {"corpus": corpus.record.fingerprint, "checkpoint": trained.fingerprint}
    record = artifacts.plan(KIND, SCHEMA, to_dict(config.embed), parents)
    if not artifacts.begin(uri, record):
        say(f"embed: {uri} is already there")
        return uri
    with (
        executor.session(),
        mlflow_runs.stage(config, "embed", to_dict(config.embed), record.fingerprint) as tracked,
        watch(config, "embed", tracked, uri) as watched,
    ):
        tracked.corpus(corpus.uri, "embedding")
        _embed(config, corpus, trained, weights, uri, executor=executor, meter=watched.meter, tracked=tracked)
        watched.made(cells=corpus.num_cells)
        dim = _assemble(corpus, uri)
        names = [f"shards/{_name(i)}" for i in range(len(corpus.shards))] + ["cells.h5ad"]
        checksums = artifacts.checksums_of(uri, names)
        details = {"vocabulary": corpus.vocabulary.hash, "dim": dim, "obsm": OBSM}
        artifacts.finish(uri, record, counts={"cells": corpus.num_cells}, files=checksums, details=details)
        tracked.summary({"cells": float(corpus.num_cells), "dim": float(dim)})
    layout.remove_own(uri, KIND, scratch=True)
    say(f"embed: {corpus.num_cells:,} cells, {dim} dimensions: {uri}/cells.h5ad (obsm {OBSM!r})")
    return uri


def load(uri: str) -> np.ndarray:
    """All vectors of a finished artifact in cell order, float32 (N, D)."""
    known = artifacts.require(uri, KIND, SCHEMA).files
    names = sorted(name for name in known if name.endswith(".parquet"))
    return np.concatenate([_read(files.join(uri, name), known[name]["sha256"]) for name in names])


def _read(uri: str, sha256: str) -> np.ndarray:
    column = tables.read_table(uri, sha256=sha256).column("vector").combine_chunks()
    chunk = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    return chunk.values.to_numpy().reshape(-1, chunk.type.list_size)


def _name(shard: int) -> str:
    return f"{shard:05d}.parquet"


def _embed(
    config: Config, corpus: Corpus, trained: artifacts.Record, weights: str, uri: str, *, executor: Executor, meter: Meter,
    tracked: mlflow_runs.Run,
) -> None:  # fmt: skip
    """Write the vectors of every shard."""
    parts = [files.join(uri, "shards", _name(shard)) for shard in range(len(corpus.shards))]
    tasks = [
        Task(part=plan.to, function=embed_shard, args=(plan,), weight=int(rows), gpu=True)
        for plan, rows in zip(
            plan_shards(config, corpus, weights, trained.fingerprint, parts), corpus.shard_rows, strict=True
        )
    ]
    errors: list[str] = []
    fan_out(
        "embed", tasks, executor.run, meter=meter, tracked=tracked, unit="cells", counter="cells_encoded",
        done=lambda *_: meter.add("shards_written"), failed=lambda _, error: errors.append(error),
    )  # fmt: skip
    if errors:
        msg = f"embed: {len(errors)} shards cannot be used, for instance {errors[0]}; the others are kept, run it again"
        raise UserError(msg)


def _assemble(corpus: Corpus, uri: str) -> int:
    """Write cells.h5ad: obs and the vectors, no X. Returns the width."""
    parts = (tables.read_table(files.join(uri, "shards", _name(shard))) for shard in range(len(corpus.shards)))
    with tempfile.TemporaryDirectory(prefix="mixgf-embed-") as folder:
        path = Path(folder) / "cells.h5ad"
        dim = write_h5ad(path, corpus, OBSM, parts, own_names=True)
        files.upload(path, files.join(uri, "cells.h5ad"))
    return dim

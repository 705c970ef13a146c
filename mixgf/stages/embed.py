"""Embedding of a corpus: one task per shard on a pool of actors, then one AnnData file."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pyarrow as pa
import torch

from mixgf.config.parse import from_dict, to_dict
from mixgf.config.run import Config
from mixgf.config.training import Model
from mixgf.console import Progress, say
from mixgf.corpus.reader import Corpus
from mixgf.distributed.actor_pool import Pool, Size
from mixgf.distributed.metrics import Meter, watch
from mixgf.distributed.session import session
from mixgf.encoder import checkpoint
from mixgf.encoder.bert import require_layer
from mixgf.encoder.device import pick_device
from mixgf.encoder.embed import embed_cells
from mixgf.errors import UserError
from mixgf.storage import artifacts, files, tables
from mixgf.tracking import mlflow_runs

KIND, SCHEMA = "embeddings", 1
OBSM = "X_mixgf"


def run(config: Config) -> str:
    """Embed all cells of the corpus with the checkpoint's encoder; returns the URI of the artifact."""
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
        session(config),
        mlflow_runs.stage(config, "embed", to_dict(config.embed), record.fingerprint) as tracked,
        watch(config, "embed", tracked, uri) as watched,
    ):
        _spread(config, corpus, weights, uri, watched.meter)
        watched.made(cells=corpus.num_cells)
        dim = _assemble(corpus, uri)
        names = [f"shards/{_name(i)}" for i in range(len(corpus.shards))] + ["cells.h5ad"]
        checksums = artifacts.checksums_of(uri, names)
        details = {"vocabulary": corpus.vocabulary.hash, "dim": dim, "obsm": OBSM}
        artifacts.finish(uri, record, counts={"cells": corpus.num_cells}, files=checksums, details=details)
        tracked.log({"cells": float(corpus.num_cells), "dim": float(dim)})
    say(f"embed: {corpus.num_cells:,} cells, {dim} dimensions: {uri}/cells.h5ad (obsm {OBSM!r})")
    return uri


def load(uri: str) -> np.ndarray:
    """All vectors of a finished artifact in cell order, float32 (N, D)."""
    artifacts.require(uri, KIND, SCHEMA)
    return _vectors(uri)


def _vectors(uri: str) -> np.ndarray:
    folder = files.join(uri, "shards")
    parts = [_read(files.join(folder, name)) for name in files.list_dir(folder) if name.endswith(".parquet")]
    return np.concatenate(parts)


def _read(uri: str) -> np.ndarray:
    column = tables.read_table(uri).column("vector").combine_chunks()
    chunk = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    return chunk.values.to_numpy().reshape(-1, chunk.type.list_size)


def _name(shard: int) -> str:
    return f"{shard:05d}.parquet"


def _worker(config: Config, corpus_uri: str, weights: str, uri: str) -> Callable[[], Callable[[int], int]]:
    """What an actor builds once: the encoder on its device, and a function of a shard's number."""

    def make() -> Callable[[int], int]:
        torch.set_num_threads(config.train.threads)
        corpus = Corpus(corpus_uri, cached_shards=1)
        encoder, _ = checkpoint.load_encoder(weights, pick_device(config.compute.gpus_per_worker))

        def embed(shard: int) -> int:
            cells = np.arange(corpus.starts[shard], corpus.starts[shard + 1])
            precision = config.train.precision if encoder.tokens.is_cuda else "fp32"
            vectors = embed_cells(
                encoder,
                corpus,
                cells,
                config.embed.pooling,
                config.embed.layer,
                config.train.micro_tokens,
                precision=precision,
            )
            flat = pa.array(vectors.reshape(-1), pa.float32())
            column = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
            tables.write_table(files.join(uri, "shards", _name(shard)), pa.table({"vector": column}))
            return len(cells)

        return embed

    return make


def _spread(config: Config, corpus: Corpus, weights: str, uri: str, meter: Meter) -> None:
    done = set(files.list_dir(files.join(uri, "shards")))
    todo: dict[str, Any] = {_name(i): i for i in range(len(corpus.shards)) if _name(i) not in done}
    if not todo:
        return
    compute = config.compute
    size = Size(max_actors=compute.num_workers, cpus=compute.cpus_per_worker, gpus=compute.gpus_per_worker)
    cells = corpus.num_cells - sum(int(corpus.shard_rows[i]) for i in todo.values())
    progress = Progress("embed", corpus.num_cells, "cells", done=cells)
    finished = 0
    meter.units(waiting=len(todo))

    def count(_: str, embedded: int) -> None:
        nonlocal cells, finished
        cells, finished = cells + embedded, finished + 1
        progress.update(cells)
        meter.add("cells_encoded", embedded)
        meter.add("shards_written")
        meter.units(waiting=len(todo) - finished, done=finished)

    with Pool(_worker(config, corpus.uri, weights, uri), size) as pool:
        dead = pool.run(todo, count)
    progress.close()
    if dead:
        meter.units(done=finished, failed=len(dead))
        name, reason = next(iter(dead.items()))
        msg = f"embed: {len(dead)} shards failed every time, for instance {name}: {reason}; the others are kept, run it again"
        raise UserError(msg)


def _assemble(corpus: Corpus, uri: str) -> int:
    """Write cells.h5ad: obs and the vectors, no X. Returns the width."""
    vectors = _vectors(uri)
    obs = corpus.obs().set_index("cell")
    obs.index = obs.index.astype(str)
    cells = ad.AnnData(obs=obs, obsm={OBSM: vectors})
    with tempfile.TemporaryDirectory(prefix="mixgf-embed-") as folder:
        path = Path(folder) / "cells.h5ad"
        cells.write_h5ad(path, compression="gzip")
        files.upload(path, files.join(uri, "cells.h5ad"))
    return int(vectors.shape[1])

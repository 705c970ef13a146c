"""Read the artifacts of a run into `RunResults`."""

from __future__ import annotations

import numpy as np
import pandas as pd
import polars as pl

from mixgf.config.run import Config
from mixgf.console import warn
from mixgf.report.results import COMPARISON_PREFIX, RunResults
from mixgf.storage import artifacts, files
from mixgf.storage.artifacts import Record
from mixgf.storage.tables import read_schema, read_table

MAX_PAIRS = 2_000_000
"""Most pairs of genes in a response matrix that is read."""
MAX_CELLS = 4000
"""Most cells on the map of embeddings, which also count neighbours."""
MAX_SHARDS = 64
"""Most shards from which these cells are drawn."""
TABLES = {
    "mapping": ("corpus", "mapping.parquet"),
    "dropped": ("corpus", "dropped.parquet"),
    "doublets": ("corpus", "doublets.parquet"),
    "near_duplicates": ("corpus", "near_duplicates.parquet"),
    "history": ("pretrain", "history.parquet"),
    "scores": ("classify", "scores.parquet"),
    "efficiency": ("classify", "efficiency.parquet"),
    "rejection": ("classify", "rejection.parquet"),
    "integration": ("classify", "integration.parquet"),
    "centroids": ("classify", "centroids.parquet"),
    "comparisons": ("classify", "comparisons.parquet"),
    "added": ("classify", "added.parquet"),
    "epochs": ("classify", "epochs.parquet"),
    "per_class": ("classify", "per_class.parquet"),
    "confusion": ("classify", "confusion.parquet"),
    "genes": ("perturb", "genes.parquet"),
    "nulls": ("perturb", "calibration.parquet"),
    "responses": ("perturb", "responses.parquet"),
    "arms": ("tune", "arms.parquet"),
    "effects": ("tune", "effects.parquet"),
    "interactions": ("tune", "interactions.parquet"),
    "final": ("tune", "final.parquet"),
}
"""Table name to stage and file."""
CELL_TABLES = {"predictions": ("classify", "predictions.parquet"), "maps": ("classify", "maps.parquet")}
"""Tables with a row per cell, which the short summary leaves out."""


def artifact_uris(config: Config) -> dict[str, str]:
    """Stage to the URI where its artifact is, or would be."""
    inputs = config.inputs
    named = {
        "corpus": inputs.corpus,
        "pretrain": inputs.checkpoint,
        "embed": inputs.embeddings,
        "classify": inputs.classification,
        "perturb": inputs.perturbation,
        "finetune": "",
        "tune": "",
        "compare": "",
    }
    return {stage: uri or files.join(config.output, stage) for stage, uri in named.items()}


def load_results(config: Config, *, light: bool = False) -> RunResults:
    """Read records and tables of a run.

    Args:
        config: Of the run.
        light: Leave out tables of cells and embeddings, whose size grows with the corpus.
    """
    uris = artifact_uris(config)
    records = {stage: record for stage, uri in uris.items() if (record := artifacts.find(uri)) is not None}
    tables = _tables(uris, records, TABLES if light else TABLES | CELL_TABLES)
    if "genes" in tables and "hit" not in tables["genes"]:
        warn(f"report: {uris['perturb']} is of an earlier version, without controls; it is left out: perturb again")
        del records["perturb"]
        for name in ("genes", "nulls", "responses"):
            tables.pop(name, None)
    if light:
        return RunResults(config=config, uris=uris, records=records, tables=tables)
    tables |= _comparison_tables(uris, records)
    lengths: dict[str, np.ndarray] = {}
    vectors, obs, num_embedded = None, None, 0
    if "corpus" in records:
        tables["cells"], lengths = _cell_counts(config, uris["corpus"], records["corpus"])
        embedded = records.get("embed")
        if embedded is not None and embedded.parents.get("corpus") == records["corpus"].fingerprint:
            vectors, obs, num_embedded = _embedding_sample(config, uris, records["corpus"])
    return RunResults(
        config=config, uris=uris, records=records, tables=tables, lengths=lengths, vectors_ND=vectors, obs=obs,
        num_embedded=num_embedded,
    )  # fmt: skip


def _tables(
    uris: dict[str, str], records: dict[str, Record], wanted: dict[str, tuple[str, str]]
) -> dict[str, pd.DataFrame]:
    """The wanted tables that are there; a response matrix of more than `MAX_PAIRS` rows is left out."""
    tables: dict[str, pd.DataFrame] = {}
    for name, (stage, file) in wanted.items():
        if stage not in records or not files.exists(files.join(uris[stage], file)):
            continue
        if name != "responses" or records[stage].counts.get(name, 0) <= MAX_PAIRS:
            tables[name] = _read(uris[stage], records[stage], file)
    return tables


def _comparison_tables(uris: dict[str, str], records: dict[str, Record]) -> dict[str, pd.DataFrame]:
    """Every table of `mixgf compare`, named after its file."""
    if "compare" not in records:
        return {}
    uri, record = uris["compare"], records["compare"]
    names = [file.removesuffix(".parquet") for file in record.files if file.endswith(".parquet")]
    return {COMPARISON_PREFIX + name: _read(uri, record, f"{name}.parquet") for name in names}


def _read(uri: str, record: Record, file: str) -> pd.DataFrame:
    """A table of a finished artifact."""
    known = record.files.get(file, {})
    return read_table(files.join(uri, file), sha256=known.get("sha256", "")).to_pandas()


def _obs(config: Config, shard: str, extra: tuple[str, ...] = ()) -> pl.DataFrame:
    """Columns species, source, type, donor and `extra` of a shard's cells.

    `type` is empty where the label is missing or means "no label" (`classify.unlabelled`); `donor` is empty where it is missing.
    """
    present = set(read_schema(shard).names)
    label, donor = config.classify.label, config.classify.donor
    columns = [c for c in dict.fromkeys(("species", "source", label, donor, *extra)) if c in present]
    frame = pl.DataFrame(read_table(shard, columns))
    text = {
        name: _text(pl.col(column), frame.schema[column]) if column in present else pl.lit("")
        for name, column in (("type", label), ("donor", donor))
    }
    unlabelled = text["type"].is_in(list(config.classify.unlabelled))
    return frame.select(
        pl.col("species", "source").cast(pl.String),
        pl.when(unlabelled).then(pl.lit("")).otherwise(text["type"]).alias("type"),
        text["donor"].alias("donor"),
        *extra,
    )


def _text(column: pl.Expr, dtype: pl.DataType) -> pl.Expr:
    """A column as text, empty where a value is missing."""
    return (column.fill_nan(None) if dtype.is_float() else column).cast(pl.String).fill_null("")


def _cell_counts(config: Config, corpus: str, record: Record) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Number of cells by source, species, type and donor, and by species and sentence length.

    Shards are counted one at a time, so memory holds one shard's columns and the counts.
    """
    groups, columns = ["source", "species", "type", "donor"], ["species", "length"]
    cells, lengths = list[pl.DataFrame](), list[pl.DataFrame]()
    for shard in record.details["shards"]:
        obs = _obs(config, files.join(corpus, "shards", shard["name"]), ("length",))
        cells.append(obs.group_by(groups).len("cells"))
        lengths.append(obs.group_by(columns).len("cells"))
    if not cells:
        return pd.DataFrame(columns=[*groups, "cells"]), {}
    by_length = pl.concat(lengths).group_by(columns).agg(pl.col("cells").sum()).sort(columns)
    counts = {
        str(species): np.bincount(part["length"], weights=part["cells"]).astype(np.int64)
        for (species,), part in by_length.group_by("species", maintain_order=True)
    }
    table = pl.concat(cells).group_by(groups).agg(pl.col("cells").sum().cast(pl.Int64)).sort(groups)
    return table.to_pandas(), counts


def _embedding_sample(config: Config, uris: dict[str, str], record: Record) -> tuple[np.ndarray, pd.DataFrame, int]:
    """Vectors, species and type of a sample of the embedded cells, and the number of embedded cells.

    The sample depends on the seed only.
    """
    shards = record.details["shards"]
    rng = np.random.default_rng([config.seed, 0x4D4150])
    chosen = sorted(rng.choice(len(shards), min(len(shards), MAX_SHARDS), replace=False).tolist())
    sizes = [int(shards[i]["rows"]) for i in chosen]
    picked = np.sort(rng.choice(sum(sizes), min(sum(sizes), MAX_CELLS), replace=False))
    vectors, frames, start = [], [], 0
    for i, size in zip(chosen, sizes, strict=True):
        rows = picked[(picked >= start) & (picked < start + size)] - start
        start += size
        name = shards[i]["name"]
        column = read_table(files.join(uris["embed"], "shards", name), ["vector"])["vector"].combine_chunks()
        vectors.append(column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)[rows])
        frames.append(_obs(config, files.join(uris["corpus"], "shards", name))[rows].select("species", "type"))
    return np.concatenate(vectors), pl.concat(frames).to_pandas(), sum(int(s["rows"]) for s in shards)

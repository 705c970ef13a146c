"""Moved here from mixgf/report.py."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from mixgf.config.run import Config
from mixgf.report.elements import Run
from mixgf.report.sections import species_comparison
from mixgf.storage import artifacts, files
from mixgf.storage.tables import read_table

MAX_PAIRS = 2_000_000
"""Pairs of genes in a response matrix that is still read."""
MAX_CELLS = 4000
"""Most cells in the map and its neighbour counts."""
MAX_SHARDS = 64
"""Most shards of embeddings that are read, drawn with a key."""


def uris(config: Config) -> dict[str, str]:
    """Where each stage's artifact is, or would be."""
    given = config.inputs
    places = {"corpus": given.corpus, "pretrain": given.checkpoint, "embed": given.embeddings, "classify": given.classification,
              "perturb": given.perturbation, "tune": "", "compare": ""}  # fmt: skip
    return {stage: uri or files.join(config.output, stage) for stage, uri in places.items()}


def load(config: Config, *, light: bool = False) -> Run:
    """Read what a run left behind; `light` leaves out cells and embeddings, which a large corpus has many of."""
    places = uris(config)
    records = {stage: record for stage, uri in places.items() if (record := artifacts.find(uri)) is not None}
    wanted = {
        "mapping": ("corpus", "mapping.parquet"), "dropped": ("corpus", "dropped.parquet"), "history": ("pretrain", "history.parquet"),
        "scores": ("classify", "scores.parquet"), "efficiency": ("classify", "efficiency.parquet"), "rejection": ("classify", "rejection.parquet"),
        "integration": ("classify", "integration.parquet"), "centroids": ("classify", "centroids.parquet"), "comparisons": ("classify", "comparisons.parquet"), "epochs": ("classify", "epochs.parquet"),
        "per_class": ("classify", "per_class.parquet"),
        "confusion": ("classify", "confusion.parquet"), "genes": ("perturb", "genes.parquet"), "nulls": ("perturb", "calibration.parquet"),
        "arms": ("tune", "arms.parquet"), "effects": ("tune", "effects.parquet"), "interactions": ("tune", "interactions.parquet"),
        "responses": ("perturb", "responses.parquet"),
    }  # fmt: skip
    if not light:
        wanted |= {"predictions": ("classify", "predictions.parquet"), "maps": ("classify", "maps.parquet")}
    tables: dict[str, pd.DataFrame] = {}
    for name, (stage, file) in wanted.items():
        uri = files.join(places[stage], file)
        if name == "responses" and stage in records and records[stage].counts.get(name, 0) > MAX_PAIRS:
            continue  # the section says so
        if stage in records and files.exists(uri):
            tables[name] = read_table(uri).to_pandas()
    for file in records["compare"].files if "compare" in records else ():
        stem = file.removesuffix(".parquet")
        if not light and stem != file:
            tables[species_comparison.PREFIX + stem] = read_table(files.join(places["compare"], file)).to_pandas()
    lengths: dict[str, np.ndarray] = {}
    vectors, obs, total = None, None, 0
    if not light and "corpus" in records:
        tables["cells"], lengths = _cells(config, places["corpus"], records["corpus"])
        embedded = records.get("embed")
        if embedded is not None and embedded.parents.get("corpus") == records["corpus"].fingerprint:
            vectors, obs, total = _embeddings(config, places, records["corpus"])
    return Run(
        config=config,
        uris=places,
        records=records,
        tables=tables,
        lengths=lengths,
        vectors_ND=vectors,
        obs=obs,
        num_embedded=total,
    )


def _columns(config: Config, shard: str, extra: tuple[str, ...] = ()) -> pd.DataFrame:
    """Species, source, type, donor (and more) of a shard's cells; a label that means "no label" is empty."""
    with files.open_read(shard) as file:
        there = set(pq.read_schema(file).names)
    label, donor = config.classify.label, config.classify.donor
    frame = read_table(
        shard, [c for c in dict.fromkeys(("species", "source", label, donor, *extra)) if c in there]
    ).to_pandas()
    types = frame[label].astype(object).fillna("").astype(str) if label in there else pd.Series("", index=frame.index)
    donors = frame[donor].astype(object).fillna("").astype(str) if donor in there else pd.Series("", index=frame.index)
    return frame.assign(type=types.where(~types.isin(config.classify.unlabelled), ""), donor=donors)


def _cells(config: Config, corpus: str, record: artifacts.Record) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """Numbers of cells by source, species, type and donor, and of cells by length, over all shards, one at a time."""
    keys = ["source", "species", "type", "donor"]
    counts: list[pd.DataFrame] = []
    lengths: dict[str, np.ndarray] = {}
    for shard in record.details["shards"]:
        frame = _columns(config, files.join(corpus, "shards", shard["name"]), ("length",))
        counts.append(frame.groupby(keys, observed=True).size().rename("cells").reset_index())
        for species, part in frame.groupby("species", observed=True):
            more = np.bincount(part["length"].to_numpy())
            old = lengths.get(str(species), np.zeros(0, np.int64))
            size = max(len(more), len(old))
            lengths[str(species)] = np.pad(old, (0, size - len(old))) + np.pad(more, (0, size - len(more)))
    if not counts:
        return pd.DataFrame(columns=[*keys, "cells"]), lengths
    return pd.concat(counts).groupby(keys)["cells"].sum().reset_index(), dict(sorted(lengths.items()))


def _embeddings(
    config: Config, places: dict[str, str], record: artifacts.Record
) -> tuple[np.ndarray, pd.DataFrame, int]:
    """Vectors, and species and type, of a sample of the embedded cells that depends on the seed only."""
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
        column = read_table(files.join(places["embed"], "shards", name), ["vector"])["vector"].combine_chunks()
        vectors.append(column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), -1)[rows])
        frames.append(_columns(config, files.join(places["corpus"], "shards", name)).iloc[rows][["species", "type"]])
    return np.concatenate(vectors), pd.concat(frames, ignore_index=True), sum(int(s["rows"]) for s in shards)

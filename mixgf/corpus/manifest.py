"""The end of a corpus: its index, its reports, and last of all its record, which makes it visible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mixgf.storage import artifacts


def index(done: Sequence[tuple[np.ndarray, dict[str, Any]]], species: Sequence[str], known: Sequence[str]) -> pa.Table:
    """Length (int32) and species (int8, its place in `known`) of every cell, in order.

    Args:
        done: lengths and manifest entry of every shard, as `units.read_done` gives them.
        species: of every shard.
        known: the vocabulary's species.
    """
    codes = [known.index(name) for name in species]
    lengths = [np.asarray(lengths) for lengths, _ in done]
    return pa.table({
        "length": pa.array(np.concatenate(lengths), pa.int32()),
        "species": pa.array(np.repeat(codes, [len(x) for x in lengths]), pa.int8()),
    })  # fmt: skip


def publish(
    uri: str, record: artifacts.Record, *, tables: dict[str, pa.Table], counts: dict[str, Any], details: dict[str, Any]
) -> artifacts.Record:
    """Write the tables (as NAME.parquet) beside the shards, then the record."""
    files = artifacts.write_tables(uri, tables)
    return artifacts.finish(uri, record, counts=counts, files=files, details=details)

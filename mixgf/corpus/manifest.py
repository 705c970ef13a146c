"""The last step of a corpus: its index and report tables, then its record, which makes the corpus visible."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from mixgf.storage import artifacts


def build_index(
    done: Sequence[tuple[np.ndarray, dict[str, Any]]], species: Sequence[str], all_species: Sequence[str]
) -> pa.Table:
    """Index of a corpus: length (int32) and species (int8, position in `all_species`) of every cell, in order.

    Args:
        done: lengths and manifest entry of every shard, from `shards.read_shard_info`.
        species: species of every shard.
        all_species: species of the vocabulary.
    """
    codes = [all_species.index(name) for name in species]
    lengths = [np.asarray(lengths) for lengths, _ in done]
    return pa.table({
        "length": pa.array(np.concatenate(lengths), pa.int32()),
        "species": pa.array(np.repeat(codes, [len(x) for x in lengths]), pa.int8()),
    })  # fmt: skip


def publish_corpus(
    uri: str, record: artifacts.Record, *, tables: dict[str, pa.Table], counts: dict[str, Any], details: dict[str, Any]
) -> artifacts.Record:
    """Write the tables (as NAME.parquet) beside the shards, then the record."""
    files = artifacts.write_tables(uri, tables)
    return artifacts.finish(uri, record, counts=counts, files=files, details=details)

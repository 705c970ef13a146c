"""The files of a corpus: parts while it is made, shards of sentences, and at the end its index and its record."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa

from mixgf.cells.packed_counts import INT32S
from mixgf.errors import DamagedError
from mixgf.storage import artifacts, files
from mixgf.storage.sealed import read_sealed
from mixgf.storage.tables import read_table, write_table, write_tables

ROW_GROUP_CELLS = 2_500
SENTENCES = pa.field("tokens", INT32S, nullable=False)
COMPUTED_COLUMNS = {
    "cell": pa.string(), "species": pa.string(), "source": pa.string(), "source_row": pa.int64(), "length": pa.int32(),
    "n_counts": pa.int64(), "n_genes": pa.int32(), "mito_fraction": pa.float64(),
}  # fmt: skip
DOUBLET_COLUMNS = {"doublet_score": pa.float64(), "predicted_doublet": pa.bool_()}
"""Columns where doublets are looked for, with scanpy's names. The score is null in cells that Scrublet did not see."""
RESERVED = (SENTENCES.name, *COMPUTED_COLUMNS)
"""Columns that mixgf computes; an obs column of the same name is kept as `original_NAME`."""
OBS_TYPES = {"str": pa.string(), "float": pa.float64(), "int": pa.int64()}


def part_uri(work: str, kind: str, name: int | str) -> str:
    """URI of a part file."""
    return files.join(work, kind, f"{name:05d}.parquet" if isinstance(name, int) else f"{name}.parquet")


def facts_uri(work: str, index: int) -> str:
    """URI of the facts of a source (JSON)."""
    return files.join(work, "sources", f"{index:05d}.json")


def read_facts(work: str, indices: Sequence[int], *, again: bool) -> dict[int, dict[str, Any]]:
    """Facts of sources by number. They are also written as one file, which is read if it is there.

    Args:
        work: URI of the work folder.
        indices: numbers of the sources.
        again: Whether facts of some sources were written since, so that all are read anew.
    """
    uri = part_uri(work, "facts", 0)
    if not again and files.exists(uri):
        with suppress(DamagedError):  # it is written again
            table = read_table(uri)
            found = dict(zip(table["source"].to_pylist(), map(json.loads, table["facts"].to_pylist()), strict=True))
            if list(found) == list(indices):
                return found
    found = dict(zip(indices, files.map_reads(work, lambda i: read_sealed(facts_uri(work, i)), indices), strict=True))
    write_table(uri, pa.table({"source": list(found), "facts": [json.dumps(facts) for facts in found.values()]}))
    return found


def shard_name(shard: int) -> str:
    """File name of a shard."""
    return f"{shard:05d}.parquet"


def write_shard_info(work: str, shard: int, length_N: np.ndarray, entry: dict[str, Any]) -> None:
    """Write the information on a finished shard: lengths (int32[N]) and manifest entry. It marks the shard as done."""
    table = pa.table({"length": pa.array(length_N, pa.int32())})
    write_table(part_uri(work, "done", shard), table.replace_schema_metadata({"shard": json.dumps(entry)}))


def read_shard_info(work: str, shard: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Lengths (int32[N]) and manifest entry of a finished shard."""
    table = read_table(part_uri(work, "done", shard))
    return table["length"].to_numpy(), json.loads(table.schema.metadata[b"shard"])


def read_shard_infos(work: str, count: int) -> list[tuple[np.ndarray, dict[str, Any]]]:
    """What `read_shard_info` gives for the first `count` shards."""
    return list(files.map_reads(work, lambda shard: read_shard_info(work, shard), range(count)))


def write_shard(uri: str, schema: pa.Schema, tables: Iterable[pa.Table]) -> tuple[int, str]:
    """Write one shard (zstd, tokens byte-stream split, row groups of `ROW_GROUP_CELLS`); returns its bytes and SHA-256.

    The tokens are declared non-nullable, which saves a third of the writing time.
    """
    text = [f.name for f in schema if pa.types.is_string(f.type) and f.name != "cell"]
    sums = [f.name for f in schema if f.name not in ("tokens", "cell")]
    return write_tables(
        uri, schema, tables, compression="zstd", compression_level=1, row_group_size=ROW_GROUP_CELLS, use_dictionary=text,
        write_statistics=sums, column_encoding={"tokens.list.element": "BYTE_STREAM_SPLIT"},
    )  # fmt: skip


def sentence_schema(obs: Mapping[str, str], *, doublets: bool = False) -> pa.Schema:
    """Columns of a shard; `obs` has the kind of every obs column of the corpus, `doublets` adds `DOUBLET_COLUMNS`."""
    more = DOUBLET_COLUMNS.items() if doublets else ()
    kept = ((name, OBS_TYPES[kind]) for name, kind in obs.items())
    return pa.schema([SENTENCES, *COMPUTED_COLUMNS.items(), *more, *kept])


def write_sentences(tables: Iterable[pa.Table], schema: pa.Schema, *, to: str, work: str, shard: int) -> None:
    """Write tables of sentences as a shard, then its information to the work folder.

    Args:
        tables: at least one row; the file does not depend on how rows are cut into tables.
        schema: of the shard.
        to: URI of the folder of shards.
        work: URI of the work folder.
        shard: number of the shard.
    """
    lengths: list[np.ndarray] = []

    def row_groups() -> Iterator[pa.Table]:
        for group in regroup(tables, ROW_GROUP_CELLS):
            lengths.append(group["length"].to_numpy())
            yield group
            del group

    name = shard_name(shard)
    size, digest = write_shard(files.join(to, name), schema, row_groups())
    length_N = np.concatenate(lengths)
    write_shard_info(work, shard, length_N, {"name": name, "rows": len(length_N), "bytes": size, "sha256": digest})


def regroup(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The rows of several tables in tables of `rows` rows, of one chunk each; the last may be shorter.

    A table that is yielded is not held here: with row groups of 20 MB this is a good part of a worker's memory.
    """
    held: list[pa.Table] = []
    num = 0
    for table in tables:
        held.append(table)
        num += table.num_rows
        del table
        while num >= rows:
            yield _first_rows(held, rows)
            num -= rows
    if num:
        yield _first_rows(held, num)


def _first_rows(held: list[pa.Table], rows: int) -> pa.Table:
    """Take the first rows of some tables out of the list, as one table of one chunk."""
    whole = pa.concat_tables(held)
    held[:] = [whole.slice(rows)]
    return whole.slice(0, rows).combine_chunks()


def name_obs(columns: Mapping[str, str], replaced: Sequence[str] = ()) -> tuple[dict[str, str], list[str]]:
    """Names of obs columns in the corpus, beside those that mixgf computes. A column of such a name is kept as `original_NAME`.

    Args:
        columns: wanted name to name in the file.
        replaced: further columns that this run computes, such as `DOUBLET_COLUMNS`; those of the file are left out.

    Returns:
        Name to name in the file, and a sentence for the user where a column is renamed or left out.
    """
    out = {new: old for new, old in columns.items() if new not in (*RESERVED, *replaced)}
    moved = {f"original_{new}": old for new, old in columns.items() if new in RESERVED and f"original_{new}" not in out}
    lost = [old for new, old in columns.items() if new not in out and f"original_{new}" not in moved]
    notes = []
    if moved:
        shown = ", ".join(f"{old} as {new}" for new, old in moved.items())
        notes.append(f"obs columns that mixgf computes itself are kept under another name: {shown}")
    if lost:
        notes.append(f"obs columns {', '.join(lost)} are left out: mixgf computes columns of these names")
    return out | moved, notes


def obs_kind(values: np.ndarray) -> str:
    """Kind of an obs column, a key of `OBS_TYPES`, from some of its values."""
    return "str" if values.dtype == object else "float" if values.dtype.kind == "f" else "int"


def merge_kinds(kinds: Mapping[str, set[str]]) -> dict[str, str]:
    """One kind per obs column from its kinds in all sources: numbers only where every source has numbers."""
    return {name: next((k for k in ("str", "float") if k in found), "int") for name, found in kinds.items()}


def obs_array(values: np.ndarray | None, kind: str, num: int) -> pa.Array:
    wanted = OBS_TYPES[kind]
    if values is None:
        return pa.nulls(num, wanted)
    if kind == "str":
        return pa.array([None if v is None or v != v else str(v) for v in values], wanted)  # noqa: PLR0124 (NaN)
    return pa.array([None if v != v else v for v in values.tolist()], wanted)  # noqa: PLR0124 (NaN)


def build_index(
    done: Sequence[tuple[np.ndarray, dict[str, Any]]], species: Sequence[str], all_species: Sequence[str]
) -> pa.Table:
    """Index of a corpus: length (int32) and species (int8, position in `all_species`) of every cell, in order.

    Args:
        done: lengths and manifest entry of every shard, from `read_shard_info`.
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
    checksums = artifacts.write_tables(uri, tables)
    return artifacts.finish(uri, record, counts=counts, files=checksums, details=details)

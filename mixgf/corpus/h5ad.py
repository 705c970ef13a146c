"""Write obs of a corpus and vectors of its cells as an .h5ad file, slice by slice; and columns into the .h5ad file of a user.

Memory: one shard's obs, one column of obs (8 bytes per cell), and one slice of vectors, whatever the number of cells.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa

from mixgf.cells import frames
from mixgf.cells.open import format_of
from mixgf.config.data import Source
from mixgf.corpus.reader import Corpus
from mixgf.corpus.shards import regroup
from mixgf.storage import files

CHUNK_BYTES = 1 << 20
"""Of vectors that HDF5 compresses together."""
SLICE_CHUNKS = 8
INDEX = "cell"
"""Column of a corpus that becomes the index of obs."""
INDEX_NAME = "_index"
"""What anndata calls an index without a name."""
OWN_NAME = "cell_name"
"""Column with the name that the cell has in its source file: the index without the source's name."""
_COMPRESSED = {"compression": "gzip"}


def write_h5ad(path: Path, corpus: Corpus, obsm: str, vectors: Iterable[pa.Table], *, own_names: bool = False) -> int:
    """Write obs and vectors of all cells, without X; returns the width of the vectors.

    Args:
        path: of the .h5ad file.
        corpus: its columns become obs, `cell` the index.
        obsm: name of the vectors in obsm.
        vectors: tables of all cells in order, with the column `vector` (fixed-size list of float32).
        own_names: also write the column `OWN_NAME`, if the corpus has none of that name.
    """
    ad.AnnData(obs=pd.DataFrame(index=pd.Index([], dtype=str))).write_h5ad(path)
    with h5py.File(path, "r+") as file, tempfile.TemporaryDirectory(prefix="mixgf-obs-") as folder:
        obs = _local_obs(corpus, Path(folder) / "obs.arrow")
        del file["obs"]
        group = file.create_group("obs")
        names = [name for name in obs.column_names if name != INDEX]
        own = [OWN_NAME] if own_names and OWN_NAME not in names else []
        paths = path_names(names)
        group.attrs.update({
            "_index": INDEX, "column-order": np.array([*paths, *own], h5py.string_dtype()), "encoding-type": "dataframe",
            "encoding-version": "0.2.0",
        })  # fmt: skip
        _write_texts(group, INDEX, len(obs), (chunk.to_numpy(zero_copy_only=False) for chunk in obs[INDEX].chunks))
        if own:
            _write_texts(group, OWN_NAME, len(obs), _own_names(obs[INDEX], obs["source"]))
        for path_name, name in zip(paths, names, strict=True):
            write_column(group, path_name, _values(obs[name]), dataset_kwargs=_COMPRESSED)
        return _write_vectors(file["obsm"], obsm, corpus.num_cells, vectors)


def _own_names(cells: pa.ChunkedArray, sources: pa.ChunkedArray) -> Iterator[np.ndarray]:
    """Names of cells without the name of their source and a colon, chunk by chunk."""
    for a, b in zip(cells.chunks, sources.chunks, strict=True):
        pairs = zip(a.to_pylist(), b.to_pylist(), strict=True)
        yield np.asarray([cell.removeprefix(f"{source}:") for cell, source in pairs], object)


def write_column(group: h5py.Group, name: str, values: Any, **options: Any) -> None:
    """Write a column of a data frame. A name with slashes is a path in the group, which anndata reads as one name."""
    folder, _, leaf = name.rpartition("/")
    ad.io.write_elem(group.require_group(folder) if folder else group, leaf, values, **options)


def path_names(columns: Iterable[object]) -> list[str]:
    """Names of columns that are paths in HDF5. Where slashes cannot be (`NK` beside `NK/T`, `/x`), they become U+2215."""
    names = [str(column) for column in columns]
    clash = any(name != name.strip("/") or "//" in name for name in names) or any(
        name.startswith(f"{other}/") for name in names if "/" in name for other in names
    )
    return [name.replace("/", "\u2215") for name in names] if clash else names


def write_frame(group: h5py.Group, name: str, frame: pd.DataFrame, index: Any = None) -> None:
    """Write a data frame with any names of columns, in place of an earlier one.

    `index`: index of another frame of the file, which is copied as it is stored; None = that of the frame.
    """
    if name in group:
        del group[name]
    columns = path_names(frame.columns)
    made = group.create_group(name)
    made.attrs.update({
        "_index": INDEX_NAME, "column-order": np.array(columns, h5py.string_dtype()), "encoding-type": "dataframe",
        "encoding-version": "0.2.0",
    })  # fmt: skip
    if index is None:
        ad.io.write_elem(made, INDEX_NAME, frame.index.to_numpy().astype(object))
    else:
        group.copy(index, made, INDEX_NAME)
    for column, (_, values) in zip(columns, frame.items(), strict=True):
        write_column(made, column, values.array if values.dtype == "category" else values.to_numpy())


def add_columns(file: h5py.File, added: pd.DataFrame) -> None:
    """Add columns to obs of an open .h5ad file, in place of earlier ones of these names; everything else stays as it is."""
    obs = file["obs"]
    if isinstance(obs, h5py.Dataset):  # before anndata 0.7: an array of records
        held = frames.open_frame(file, "obs")
        index = pd.Index(frames.read_strings(frames.index_of(held), 0, len(obs)), dtype=object)
        frame = pd.DataFrame(
            {n: frames.read_column(held[n], 0, len(obs)) for n in frames.columns_of(held)}, index=index
        )
        del file["obs"]
        write_frame(file, "obs", frame)
        obs = file["obs"]
    for name, values in added.items():
        if name in obs:
            del obs[name]
        write_column(obs, str(name), values.array if values.dtype == "category" else values.to_numpy())
    before = [str(name) for name in obs.attrs.get("column-order", [])]
    names = list(dict.fromkeys([*before, *map(str, added.columns)]))
    obs.attrs["column-order"] = np.array(names, h5py.string_dtype())


FORMULAS = ("=", "+", "-", "@", "\t", "\r")
"""First characters of text that a spreadsheet runs as a formula."""


def for_spreadsheets(frame: pd.DataFrame) -> pd.DataFrame:
    """A table for CSV: text that a spreadsheet would run as a formula has a quote before it."""
    out = frame.rename(columns=lambda name: _quoted(str(name)))
    for name in out.columns:
        if out[name].dtype == object or isinstance(out[name].dtype, pd.CategoricalDtype | pd.StringDtype):
            out[name] = out[name].astype(object).map(lambda value: _quoted(value) if isinstance(value, str) else value)
    return out


def _quoted(text: str) -> str:
    return f"'{text}" if text.startswith(FORMULAS) else text


def _local_obs(corpus: Corpus, path: Path) -> pa.Table:
    """Columns of all shards in one file, which is mapped into memory; a column that a shard lacks is null there."""
    schemas = [corpus.shard_schema(i) for i in range(len(corpus.shards))]
    whole = pa.unify_schemas(schemas)
    whole = pa.schema([field.with_nullable(True) for field in whole if field.name != "tokens"])
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, whole) as writer:
        for i, schema in enumerate(schemas):
            table = corpus.table(i, [name for name in whole.names if name in schema.names])
            for field in whole:
                if field.name not in schema.names:
                    table = table.append_column(field, pa.nulls(table.num_rows, field.type))
            writer.write_table(table.select(whole.names).cast(whole).combine_chunks())
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _write_texts(group: h5py.Group, name: str, num: int, chunks: Iterable[np.ndarray]) -> None:
    data = group.create_dataset(name, (num,), h5py.string_dtype(), **_COMPRESSED)
    data.attrs.update({"encoding-type": "string-array", "encoding-version": "0.2.0"})
    start = 0
    for texts in chunks:
        data[start : start + len(texts)] = texts
        start += len(texts)


def _values(column: pa.ChunkedArray) -> Any:
    """A column as anndata writes it: text that repeats is categorical, integers with gaps are floats."""
    if not pa.types.is_string(column.type):
        return column.to_pandas().to_numpy()
    coded = column.dictionary_encode().combine_chunks()
    coded = pa.chunked_array([coded]) if isinstance(coded, pa.Array) else coded.unify_dictionaries()
    labels = coded.chunk(0).dictionary.to_pylist()
    if len(labels) == len(column):
        return column.to_numpy()
    order = sorted(range(len(labels)), key=labels.__getitem__)
    place = np.empty(len(labels) + 1, dtype=np.int32)
    place[order], place[-1] = np.arange(len(labels)), -1
    codes = np.concatenate([
        place[chunk.indices.fill_null(len(labels)).to_numpy(zero_copy_only=False)] for chunk in coded.chunks
    ])  # fmt: skip
    return pd.Categorical.from_codes(codes, [labels[i] for i in order])


def _write_vectors(group: h5py.Group, name: str, num: int, vectors: Iterable[pa.Table]) -> int:
    data: h5py.Dataset | None = None
    start = 0
    for table in _slices(vectors):
        column = table["vector"].combine_chunks()
        flat = column.flatten().to_numpy().reshape(-1, column.type.list_size)
        if data is None:
            rows = max(1, min(num, _chunk_rows(flat.shape[1])))
            data = group.create_dataset(
                name, (num, flat.shape[1]), np.float32, chunks=(rows, flat.shape[1]), **_COMPRESSED
            )
            data.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        data[start : start + len(flat)] = flat
        start += len(flat)
        del table, column, flat
    assert data is not None
    assert start == num, f"vectors of {start} of {num} cells"
    return int(data.shape[1])


def _chunk_rows(width: int) -> int:
    return max(1, CHUNK_BYTES // (4 * width))


def _slices(vectors: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The vectors in tables of whole chunks."""
    tables = iter(vectors)
    first = next(tables)
    rows = _chunk_rows(first.schema.field("vector").type.list_size) * SLICE_CHUNKS

    def all_tables() -> Iterator[pa.Table]:
        yield first
        yield from tables

    yield from regroup(all_tables(), rows)


def write_copy(
    source: Source, to: str, names: Sequence[str], *, obs: pd.DataFrame | None = None, obsm: Mapping[str, Any], uns: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write a copy of a file of counts as .h5ad, with more columns, matrices and facts.

    Everything in an .h5ad source stays as it is, the other columns of obs too, and X is not read. The copy of another format has no counts.

    Args:
        source: The file.
        to: URI of the copy.
        names: Of the cells, where the source is no .h5ad file.
        obs: Columns to add, one row per cell in the order of the file; None = none.
        obsm: Matrices to add, by name; frames get the names of the cells.
        uns: Facts to add, by name.
    """
    with tempfile.TemporaryDirectory(prefix="mixgf-copy-") as folder:
        path = Path(folder) / "cells.h5ad"
        if format_of(source.uri, source.layer) == "h5ad":
            with files.local_copy(source.uri) as original:
                shutil.copyfile(original, path)
        else:
            ad.AnnData(obs=pd.DataFrame(index=pd.Index(names, dtype=object))).write_h5ad(path)
        with h5py.File(path, "r+") as file:
            add_columns(file, pd.DataFrame() if obs is None else obs)
            for name, value in obsm.items():
                if isinstance(value, pd.DataFrame):
                    write_frame(file.require_group("obsm"), name, value, frames.index_of(file["obs"]))
                else:
                    ad.io.write_elem(file.require_group("obsm"), name, value)
            for name, value in uns.items():
                ad.io.write_elem(file.require_group("uns"), name, value)  # anndata 0.13 takes no path as a name
        files.upload(path, to)

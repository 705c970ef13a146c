"""Reader of an annbatch collection: a Zarr group of AnnData groups `dataset_0`, `dataset_1`, ... with the same genes.

Rows are numbered through the data sets in the order of their numbers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from mixgf.cells.anndata_file import open_anndata
from mixgf.cells.frames import Group
from mixgf.cells.reader import RawBlock, Reader, file_error

_DATASET = re.compile(r"dataset_(\d+)")


def dataset_names(root: Group) -> list[str]:
    """Names of the data sets of a collection, in order; none in another group."""
    found = [(int(match.group(1)), name) for name in root if (match := _DATASET.fullmatch(name))]
    return [name for _, name in sorted(found)]


def open_annbatch(uri: str, root: Group, layer: str) -> Reader:
    """Reader of all data sets of a collection, one after another.

    Raises:
        UserError: a data set is damaged, or has other genes than the first.
    """
    names = dataset_names(root)
    return concatenate(uri, [open_anndata(f"{uri}/{name}", root[name], layer) for name in names])


def concatenate(uri: str, readers: list[Reader]) -> Reader:
    """One reader of the rows of several, which have the same genes.

    Raises:
        UserError: the genes differ.
    """
    first = readers[0]
    for other in readers[1:]:
        same = other.num_columns == first.num_columns and np.array_equal(other.gene_names(""), first.gene_names(""))
        if not same:
            raise file_error(other.uri, f"other genes than {first.uri}; give each data set as a source of its own")
    starts = np.cumsum([0, *(reader.num_rows for reader in readers)]).tolist()

    def pieces(start: int, stop: int) -> Iterator[tuple[Reader, int, int, int]]:
        """Reader, its first row's number, and its rows of [start, stop)."""
        for reader, begin in zip(readers, starts, strict=False):
            a, z = max(start, begin) - begin, min(stop, begin + reader.num_rows) - begin
            if a < z:
                yield reader, begin, a, z

    def read(start: int, stop: int, rows: int) -> Iterator[RawBlock]:
        for reader, begin, a, z in pieces(start, stop):
            for block in reader.read(a, z, rows):
                yield replace(block, start=begin + block.start)

    def joined(values: list[np.ndarray]) -> np.ndarray:
        text = any(v.dtype == object for v in values)
        return np.concatenate([_as_text(v) if text else v for v in values]) if values else np.empty(0)

    columns = list(dict.fromkeys(name for reader in readers for name in reader.obs_columns))

    def obs(name: str, start: int, stop: int) -> np.ndarray:
        return joined([
            reader.obs(name, a, z) if name in reader.obs_columns else np.full(z - a, None, object)
            for reader, _, a, z in pieces(start, stop)
        ])  # fmt: skip

    def cell_names(start: int, stop: int) -> np.ndarray:
        return joined([reader.cell_names(a, z) for reader, _, a, z in pieces(start, stop)])

    return Reader(
        uri=uri, num_rows=starts[-1], num_columns=first.num_columns, gene_names=first.gene_names, read=read,
        cell_names=cell_names, obs_columns=columns, obs=obs, is_gene=first.is_gene,
        kinds=first.kinds, gene_columns=first.gene_columns,
    )  # fmt: skip


def _as_text(values: np.ndarray) -> np.ndarray:
    if values.dtype == object:
        return values
    texts: list[Any] = [None if v != v else str(v) for v in values.tolist()]  # noqa: PLR0124 (NaN)
    return np.asarray(texts, object)

"""Reader of TileDB-SOMA experiments: sparse counts of one measurement, in blocks of rows.

Cells are numbered in the order of their `soma_joinid`. Object storage is read by TileDB itself, with the settings of `s3://`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mixgf.cells.features import choose_gene_names, find_kinds, gene_columns
from mixgf.cells.reader import RawBlock, Reader, by_row, cut_rows, file_error
from mixgf.errors import StorageError, require_package
from mixgf.storage import files
from mixgf.storage.s3 import tiledb_options

T = TypeVar("T")
WINDOW_ROWS = 2_048
"""Cells that are read at a time: a query takes about 20 ms, however few cells it asks for."""
_BUFFER_BYTES = 64 << 20
_CELL_NAMES = ("obs_id", "observation_joinid", "barcode")
_GENE_NAMES = ("var_id", "feature_id")


@contextmanager
def open_soma(uri: str, layer: str) -> Iterator[Reader]:
    """Reader of an experiment.

    `layer` is `X` (of the measurement RNA, or of the only one: the layer `data`, or the only one), `raw` (of that measurement, or
    `data` of the measurement `raw`), the name of a layer, or MEASUREMENT/LAYER.

    Raises:
        UserError: no such measurement or layer, or it is not sparse.
    """
    require_package("tiledbsoma", uri, "mixgf[soma]")
    import tiledbsoma  # noqa: PLC0415 (an extra, slow to import)

    options = {"soma.init_buffer_bytes": _BUFFER_BYTES, **({} if files.is_local(uri) else tiledb_options())}
    context = _context(tuple(sorted(options.items())))
    where = str(files.local_path(uri)) if files.is_local(uri) else uri
    with _ask(uri, lambda: tiledbsoma.open(where, context=context)) as experiment:
        if experiment.soma_type != "SOMAExperiment":
            raise file_error(uri, f"a {experiment.soma_type}; give the SOMAExperiment that holds it")
        measurement, matrix = _find_layer(uri, experiment, layer)
        if matrix.soma_type != "SOMASparseNDArray":
            raise file_error(uri, f"layer = {layer!r}: a {matrix.soma_type}; must be a SOMASparseNDArray")
        yield _reader(uri, experiment.obs, measurement.var, matrix)


@lru_cache(maxsize=4)
def _context(options: tuple[tuple[str, Any], ...]) -> Any:
    """TileDB's context for some options, one per process: every context has pools of threads of its own."""
    import tiledbsoma  # noqa: PLC0415 (an extra, slow to import)

    return tiledbsoma.SOMATileDBContext(tiledb_config=dict(options))


def _ask(uri: str, call: Callable[[], T]) -> T:
    """TileDB has retries of its own; what fails after them is an error of storage, not of the file."""
    try:
        return call()
    except Exception as error:
        if not files.is_local(uri) and any(word in str(error) for word in ("S3", "curl", "HTTP")):
            msg = f"{uri}: {' '.join(str(error).split())}; the same command tries again"
            raise StorageError(msg) from error
        raise


def _find_layer(uri: str, experiment: Any, layer: str) -> tuple[Any, Any]:
    have = {name: list(experiment.ms[name].X) for name in experiment.ms if "X" in experiment.ms[name]}
    shown = ", ".join(f"{name}/{x}" for name, layers in have.items() for x in layers)
    measurement, _, name = layer.rpartition("/")
    if not measurement:
        others = [one for one in have if one != "raw"]
        measurement = "RNA" if "RNA" in have else others[0] if len(others) == 1 else ""
        if layer == "raw" and "raw" in have and "raw" not in have.get(measurement, []):
            measurement, name = "raw", "X"
    layers = have.get(measurement, [])
    if name == "X" and name not in layers:
        name = "data" if "data" in layers else layers[0] if len(layers) == 1 else name
    if name not in layers:
        raise file_error(uri, f"layer = {layer!r}: not in the experiment; it has {shown or 'no counts'}")
    return experiment.ms[measurement], experiment.ms[measurement].X[name]


def _ids(uri: str, frame: Any) -> range | np.ndarray:
    """`soma_joinid` of all rows, ascending; where they follow each other, without reading them."""
    if tuple(frame.index_column_names) == ("soma_joinid",) and frame.count:
        first, last = _ask(uri, lambda: frame.non_empty_domain()[0])
        if last - first + 1 == frame.count:
            return range(first, last + 1)
    table = _ask(uri, lambda: frame.read(column_names=["soma_joinid"]).concat())
    return np.sort(table["soma_joinid"].to_numpy())


def _reader(uri: str, obs: Any, var: Any, matrix: Any) -> Reader:
    row_ids, column_ids = _ids(uri, obs), np.asarray(_ids(uri, var))

    def read_frame(frame: Any, name: str, ids: range | np.ndarray) -> np.ndarray:
        """A column of the rows with these ids, which ascend and follow each other among all ids."""
        if not len(ids):
            return np.empty(0, object)
        first, last = int(ids[0]), int(ids[-1])
        by_id = tuple(frame.index_column_names) == ("soma_joinid",)
        how: dict[str, Any] = {"coords": (slice(first, last),)} if by_id else {}
        if not by_id:
            how["value_filter"] = f"soma_joinid >= {first} and soma_joinid <= {last}"
        names = list(dict.fromkeys(["soma_joinid", name]))
        table = _ask(uri, lambda: frame.read(column_names=names, **how).concat())
        order = np.argsort(table["soma_joinid"].to_numpy(), kind="stable")
        return _values(table[name].take(pa.array(order)))

    def read(start: int, stop: int, rows: int) -> Iterator[RawBlock]:
        window = max(rows, WINDOW_ROWS // rows * rows)
        for a in range(start, stop, window):
            ids = np.asarray(row_ids[a : min(a + window, stop)])
            whole = slice(int(ids[0]), int(ids[-1]))
            table = _ask(uri, partial(_entries, matrix, whole))
            row, column, data = (table[name].to_numpy() for name in ("soma_dim_0", "soma_dim_1", "soma_data"))
            there = np.isin(row, ids) if whole.stop - whole.start + 1 > len(ids) else np.ones(len(row), bool)
            place = np.searchsorted(column_ids, column)
            if (place >= len(column_ids)).any() or (column_ids[place] != column).any():
                raise file_error(uri, f"an entry of a gene that var lacks, near cell {a}: damaged; copy it again")
            number = np.searchsorted(ids, row[there]).astype(np.int32)
            by = np.lexsort((place[there], number))
            csr = by_row(number[by], place[there][by].astype(np.int32), data[there][by], len(ids))
            yield from cut_rows(*csr, a, rows)

    obs_names, var_names = list(obs.keys()), list(var.keys())
    cell_name = next((name for name in _CELL_NAMES if name in obs_names), "soma_joinid")
    index = next((name for name in _GENE_NAMES if name in var_names), "soma_joinid")
    is_gene, kinds = find_kinds(uri, var_names, lambda name: read_frame(var, name, column_ids))
    return Reader(
        uri=uri,
        num_rows=len(row_ids),
        num_columns=len(column_ids),
        gene_names=lambda column: choose_gene_names(
            uri, _texts(read_frame(var, index, column_ids)), var_names, lambda n: read_frame(var, n, column_ids), column
        ),
        read=read,
        cell_names=lambda a, b: _texts(read_frame(obs, cell_name, row_ids[a:b])),
        obs_columns=[name for name in obs_names if name not in ("soma_joinid", cell_name)],
        obs=lambda name, a, b: read_frame(obs, name, row_ids[a:b]),
        is_gene=is_gene,
        kinds=kinds,
        gene_columns=gene_columns([name for name in var_names if name not in ("soma_joinid", index)]),
    )


def _entries(matrix: Any, rows: slice) -> pa.Table:
    return matrix.read((rows,)).tables().concat()


def _texts(values: np.ndarray) -> np.ndarray:
    return np.asarray([str(v) for v in values.tolist()], dtype=object)


def _values(column: pa.ChunkedArray) -> np.ndarray:
    """A column as readers give it: float64 (NaN = missing), int64, or objects (str or None)."""
    if pa.types.is_dictionary(column.type):
        column = pa.chunked_array([chunk.dictionary_decode() for chunk in column.chunks], column.type.value_type)
    kind = column.type
    if pa.types.is_boolean(kind):
        column = pc.cast(column, pa.int8())
    elif not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return np.asarray([None if v is None else str(v) for v in column.to_pylist()], dtype=object)
    whole = not pa.types.is_floating(kind) and not column.null_count
    return np.asarray(pc.cast(column, pa.int64() if whole else pa.float64()).to_numpy())

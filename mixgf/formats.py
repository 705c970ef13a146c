"""Readers of count files in bounded row blocks: `.h5ad`, 10x `.h5`, 10x Matrix Market folders; local or object storage.

A reader gives facts of the file, names of its rows and columns, `obs` values of a row range, and raw counts of a row
range as CSR blocks. Nothing here knows genes or checks counts (that is `mixgf.corpus`).

Memory: row-major files (CSR, dense, 10x .h5) hold one block of rows. Column-major files (CSC, Matrix Market) are
scanned from end to end in chunks of 4 M entries, of which those of the asked rows are kept, as often as rows are asked
for: to read them more than once, turn them into rows first (`mixgf.bands`).
"""

from __future__ import annotations

import gzip
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import deflate
import h5py
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
from scipy import sparse

from mixgf import storage
from mixgf.config import StorageError, UserError

SCAN_ENTRIES = 4_000_000
"""Counts held at a time while a column-major file is scanned."""
DENSE_BYTES = 64 << 20
"""Most bytes of a dense matrix held at a time."""
_CHUNK_CACHE = 32 << 20
_EXPRESSION = "Gene Expression"


@dataclass(frozen=True, slots=True)
class RawBlock:
    """Counts of consecutive rows as CSR; values as stored in the file."""

    start: int
    """Row in the file of the first row."""
    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray


Triples = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Row, column and value of some entries."""


@dataclass(kw_only=True)
class Reader:
    """One open file. `num_rows` cells x `num_columns` features."""

    uri: str
    num_rows: int
    num_columns: int
    gene_names: Callable[[str], np.ndarray]
    """Names (ids or symbols) of the columns, by `Source.genes`."""
    read: Callable[[int, int, int], Iterator[RawBlock]]
    """Blocks of rows [start, stop), each of at most so many rows. The arrays of one may be used again for the next."""
    cell_names: Callable[[int, int], np.ndarray]
    obs_columns: list[str] = field(default_factory=list)
    obs: Callable[[str, int, int], np.ndarray] = lambda *_: np.empty(0)
    """Values of one obs column: float64, int64, or objects that are str or None."""
    is_gene: np.ndarray | None = None
    """Which columns are genes, where the file holds other features too; the others are not read."""
    scan: Callable[[], Iterator[Triples]] | None = None
    """Of column-major files: all entries, in the file's order. Reading a row range of one is a scan of the whole file."""


def format_of(uri: str) -> str:
    """`h5ad`, `10x_h5` or `mtx`, from the name; a `UserError` otherwise."""
    name = uri.rstrip("/").rsplit("/", 1)[-1]
    if name.endswith(".h5ad"):
        return "h5ad"
    if name.endswith((".h5", ".hdf5")):
        return "10x_h5"
    if name in ("matrix.mtx", "matrix.mtx.gz") or {"matrix.mtx", "matrix.mtx.gz"} & set(storage.list_dir(uri)):
        return "mtx"
    msg = (
        f"{uri}: not a known format; give an .h5ad, a 10x .h5, or a folder with matrix.mtx(.gz), features and barcodes"
    )
    raise UserError(msg)


@contextmanager
def open_reader(uri: str, layer: str = "X") -> Iterator[Reader]:
    """Open one source file; a file that is not there, truncated or damaged is a `UserError`."""
    if not storage.exists(uri):
        msg = f"{uri}: no such file; check the path (and the endpoint and keys, on object storage)"
        raise UserError(msg)
    kind = format_of(uri)
    try:
        if kind == "mtx":
            yield _mtx(uri, layer)
            return
        with _h5(uri) as file:
            yield _h5ad(uri, file, layer) if kind == "h5ad" else _tenx(uri, file, layer)
    except StorageError:
        raise  # the network, not the file (h5py, gzip and Arrow pass it on as it is): the caller tries again
    except (OSError, EOFError) as error:
        text = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        msg = f"{uri}: truncated or damaged ({text}); fetch it again"
        raise UserError(msg) from None


@contextmanager
def _h5(uri: str) -> Iterator[h5py.File]:
    options: dict[str, Any] = {"rdcc_nbytes": _CHUNK_CACHE}
    if storage.is_local(uri):
        with storage.local_copy(uri) as path, h5py.File(path, "r", **options) as file:
            yield file
        return
    with storage.open_read(uri) as stream, h5py.File(stream, "r", **options) as file:
        yield file


def _refuse(uri: str, what: str) -> UserError:
    return UserError(f"{uri}: {what}")


# .h5ad


def _h5ad(uri: str, file: h5py.File, layer: str) -> Reader:
    where = {"X": "X", "raw": "raw/X"}.get(layer, f"layers/{layer}")
    if where not in file:
        have = [*(k for k in ("X",) if k in file), *(["raw"] if "raw/X" in file else []), *file.get("layers", {})]
        raise _refuse(uri, f"layer = {layer!r}: not in the file; it has {', '.join(have) or 'no counts'}")
    var = file["raw/var" if layer == "raw" else "var"]
    obs = file["obs"]
    if isinstance(obs, h5py.Dataset) or isinstance(var, h5py.Dataset):
        raise _refuse(uri, "written by anndata before 0.7; read it with anndata and write it again")
    matrix = file[where]
    num_rows, num_columns = (int(n) for n in _shape(matrix))
    index = _index(obs)
    if (length := _length(index)) != num_rows:
        raise _refuse(uri, f"obs has {length} rows, {where} has {num_rows}; the file is damaged")
    read, scan = _matrix_reader(uri, matrix, num_rows, num_columns)
    return Reader(
        uri=uri,
        num_rows=num_rows,
        num_columns=num_columns,
        gene_names=lambda column: _h5ad_genes(uri, var, column),
        read=read,
        scan=scan,
        cell_names=lambda a, b: _strings(index, a, b),
        obs_columns=[str(name) for name in obs.attrs.get("column-order", [])],
        obs=lambda name, a, b: _column(obs[name], a, b),
    )


def _shape(matrix: h5py.Group | h5py.Dataset) -> tuple[int, int]:
    if isinstance(matrix, h5py.Dataset):
        return cast("tuple[int, int]", matrix.shape)
    return cast(
        "tuple[int, int]", tuple(matrix.attrs["shape"] if "shape" in matrix.attrs else matrix.attrs["h5sparse_shape"])
    )


def _index(frame: h5py.Group) -> h5py.Group | h5py.Dataset:
    """A data frame's index: a column of strings, or, of a pandas CategoricalIndex, codes and categories."""
    return frame[frame.attrs.get("_index", "_index")]


def _length(column: h5py.Group | h5py.Dataset) -> int:
    return int((column["codes"] if isinstance(column, h5py.Group) else column).shape[0])


def _strings(column: h5py.Group | h5py.Dataset, start: int, stop: int) -> np.ndarray:
    if isinstance(column, h5py.Group):
        values = _column(column, start, stop)
    elif h5py.check_string_dtype(column.dtype) is not None:
        return np.asarray(column.asstr()[start:stop], dtype=object)
    else:
        values = column[start:stop]
    return np.asarray([str(v) for v in values], dtype=object)


def _column(node: h5py.Group | h5py.Dataset, start: int, stop: int) -> np.ndarray:
    """One column of a data frame on disk as float64, int64, or str objects (None where missing)."""
    if isinstance(node, h5py.Dataset):
        if h5py.check_string_dtype(node.dtype) is not None:
            return _strings(node, start, stop)
        return _plain(node[start:stop])
    if "codes" in node:
        codes = node["codes"][start:stop].astype(np.int64)
        categories = node["categories"]
        values = _column(categories, 0, categories.shape[0])
        last = np.asarray(
            [None if values.dtype == object else np.nan], dtype=object if values.dtype == object else float
        )
        if (codes < 0).any():
            values = np.concatenate([values, last])
        return cast("np.ndarray", values[codes])  # -1 takes the appended missing value
    values = _column(node["values"], start, stop)  # nullable integer, boolean or string
    mask = node["mask"][start:stop].astype(bool)
    if not mask.any():
        return values
    values = values.astype(object if values.dtype == object else np.float64)
    values[mask] = None if values.dtype == object else np.nan
    return values


def _plain(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float64 if values.dtype.kind == "f" else np.int64)


def _h5ad_genes(uri: str, var: h5py.Group, column: str) -> np.ndarray:
    index = _index(var)
    length = _length(index)
    symbols = _strings(index, 0, length)
    names = column or next((n for n in ("ensembl_id", "gene_ids") if n in var), "")
    if not names:
        return symbols
    if names not in var:
        have = ", ".join(str(n) for n in var.attrs.get("column-order", [])) or "none"
        raise _refuse(uri, f"genes = {names!r}: no such column of var; it has {have} (empty = the index)")
    ids = _column(var[names], 0, length)
    return np.asarray([i if isinstance(i, str) and i else s for i, s in zip(ids, symbols, strict=True)], dtype=object)


# matrices


def _matrix_reader(
    uri: str, matrix: h5py.Group | h5py.Dataset, num_rows: int, num_columns: int
) -> tuple[Callable[[int, int, int], Iterator[RawBlock]], Callable[[], Iterator[Triples]] | None]:
    if isinstance(matrix, h5py.Dataset):
        return lambda a, b, rows: _dense_blocks(matrix, a, b, rows), None
    encoding = str(matrix.attrs.get("encoding-type", matrix.attrs.get("h5sparse_format", "")))
    major = {"csr_matrix": num_rows, "csr": num_rows, "csc_matrix": num_columns, "csc": num_columns}.get(encoding)
    if major is None:
        raise _refuse(uri, f"matrix encoding {encoding!r}: must be csr_matrix, csc_matrix or dense")
    indptr = matrix["indptr"]
    if indptr.shape[0] != major + 1 or int(indptr[-1]) != matrix["data"].shape[0]:
        raise _refuse(uri, "its row pointers do not fit its data: truncated or damaged; fetch it again")
    if encoding.startswith("csr"):
        return lambda a, b, rows: _csr_blocks(matrix, a, b, rows), None

    def scan() -> Iterator[Triples]:
        return _csc_scan(matrix)

    return lambda a, b, rows: _gather(scan(), a, b, rows, num_columns), scan


class _Column1D:
    """Ranges of a 1-D dataset, read in order, straight into the caller's arrays.

    Chunks that are not filtered, or by plain gzip, are read past HDF5 (libdeflate decompresses about twice as fast). One that
    a range only begins is kept for the next range, so that none is decompressed twice.
    """

    def __init__(self, dataset: h5py.Dataset) -> None:
        self._dataset, self._id, self.dtype = dataset, dataset.id, dataset.dtype
        plist = dataset.id.get_create_plist()
        filters = [plist.get_filter(i)[0] for i in range(plist.get_nfilters())]
        self._rows = dataset.chunks[0] if dataset.chunks else 0
        self._plain = not filters
        plain_type = self.dtype.isnative and self.dtype.kind in "iuf"
        self._direct = bool(self._rows) and plain_type and filters in ([], [h5py.h5z.FILTER_DEFLATE])
        self._number, self._values = -1, np.empty(0, self.dtype)

    def read(self, lo: int, hi: int, out: np.ndarray) -> None:
        """Values [lo, hi) into `out`, of that length and of this dataset's type."""
        if hi <= lo:
            return
        if not self._direct:
            self._dataset.read_direct(out, np.s_[lo:hi])
            return
        rows = self._rows
        for number in range(lo // rows, (hi - 1) // rows + 1):
            begin = number * rows
            a, b = max(lo, begin), min(hi, begin + rows)
            to = out[a - lo : b - lo]
            if not (self._plain and b - a == rows and self._stored(begin, to)):
                to[:] = self._chunk(number)[a - begin : b - begin]

    def _stored(self, begin: int, out: np.ndarray | None = None) -> Any:
        """The filter mask and bytes (in `out`, where given) of a chunk as stored; None for one that was never written."""
        try:
            return self._id.read_direct_chunk((begin,), out=None if out is None else out.view(np.uint8))
        except RuntimeError:
            return None

    def _chunk(self, number: int) -> np.ndarray:
        if number != self._number:
            begin = number * self._rows
            stored = self._stored(begin)
            if stored is None:  # it holds the fill value
                return cast("np.ndarray", self._dataset[begin : begin + self._rows])
            skipped, data = stored
            if not (skipped or self._plain):
                try:
                    data = deflate.zlib_decompress(data, self._rows * self.dtype.itemsize)
                except deflate.DeflateError as error:
                    msg = f"chunk {number} of {self._dataset.name} is truncated or damaged ({error})"
                    raise OSError(msg) from None
            self._values, self._number = np.frombuffer(data, self.dtype), number
        return self._values


def _csr_blocks(matrix: h5py.Group, start: int, stop: int, rows: int) -> Iterator[RawBlock]:
    indptr = matrix["indptr"][start : stop + 1].astype(np.int64)
    columns = _Column1D(matrix["data"]), _Column1D(matrix["indices"])
    firsts = np.arange(start, stop, rows) - start
    room = int((indptr[np.minimum(firsts + rows, stop - start)] - indptr[firsts]).max(initial=0))
    held = [np.empty(room, column.dtype) for column in columns]
    for a in range(start, stop, rows):
        p = indptr[a - start : min(a + rows, stop) - start + 1]
        lo, hi = int(p[0]), int(p[-1])
        data, indices = (values[: hi - lo] for values in held)
        for column, out in zip(columns, (data, indices), strict=True):
            column.read(lo, hi, out)
        yield RawBlock(a, data, indices.astype(np.int32, copy=False), p - lo)


def _dense_blocks(matrix: h5py.Dataset, start: int, stop: int, rows: int) -> Iterator[RawBlock]:
    most = max(1, DENSE_BYTES // max(1, matrix.shape[1] * matrix.dtype.itemsize))  # chunks hold many rows
    for a in range(start, stop, most):
        held = sparse.csr_array(matrix[a : min(a + most, stop)])
        yield from cut_rows(held.data, held.indices.astype(np.int32), held.indptr.astype(np.int64), a, rows)


def _csc_scan(matrix: h5py.Group) -> Iterator[Triples]:
    indptr = matrix["indptr"][:].astype(np.int64)
    columns = _Column1D(matrix["data"]), _Column1D(matrix["indices"])
    for lo in range(0, int(indptr[-1]), SCAN_ENTRIES):
        hi = min(lo + SCAN_ENTRIES, int(indptr[-1]))
        data, indices = (np.empty(hi - lo, column.dtype) for column in columns)
        for column, out in zip(columns, (data, indices), strict=True):
            column.read(lo, hi, out)
        first = int(np.searchsorted(indptr, lo, side="right")) - 1
        last = int(np.searchsorted(indptr, hi, side="left"))
        lengths = np.diff(np.clip(indptr[first : last + 1], lo, hi))
        major = np.repeat(np.arange(first, last, dtype=np.int32), lengths)
        yield indices.astype(np.int32, copy=False), major, data


def _gather(scan: Iterator[Triples], start: int, stop: int, rows: int, num_columns: int) -> Iterator[RawBlock]:
    """Rows [start, stop) of a scan, as blocks."""
    kept: list[Triples] = []
    for row, column, value in scan:
        mask = (row >= start) & (row < stop)
        if mask.any():
            kept.append(((row[mask] - start).astype(np.int32), column[mask].astype(np.int32), value[mask]))
    if kept:
        r, c, v = (np.concatenate(parts) for parts in zip(*kept, strict=True))
    else:
        r, c, v = np.empty(0, np.int32), np.empty(0, np.int32), np.empty(0, np.int32)
    del kept
    data, indices, indptr = by_row(r, c, v, stop - start)
    yield from cut_rows(data, indices, indptr, start, rows)


def by_row(
    row: np.ndarray, column: np.ndarray, value: np.ndarray, num_rows: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Entries as CSR (data, int32 indices, int64 indptr): rows in order, and the entries of a row in the order given."""
    small = row.astype(np.uint16) if num_rows < 1 << 16 else row  # numpy sorts 16 bits by radix
    order = np.argsort(small, kind="stable")
    indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=num_rows))]).astype(np.int64)
    return value[order], column[order], indptr


def cut_rows(data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, start: int, rows: int) -> Iterator[RawBlock]:
    """A CSR matrix whose first row is row `start` of a file, in blocks of so many rows."""
    for a in range(0, len(indptr) - 1, rows):
        p = indptr[a : a + rows + 1]
        yield RawBlock(start + a, data[p[0] : p[-1]], indices[p[0] : p[-1]], p - p[0])


# 10x


def _tenx(uri: str, file: h5py.File, layer: str) -> Reader:
    if layer != "X":
        raise _refuse(uri, f"layer = {layer!r}: a 10x file has only 'X'")
    group = file.get("matrix")
    if group is None:  # Cell Ranger 2: one group per genome
        genomes = [name for name, node in file.items() if isinstance(node, h5py.Group) and "indptr" in node]
        if len(genomes) != 1:
            raise _refuse(
                uri, f"holds {len(genomes)} genomes ({', '.join(genomes)}): must be one; give one file per species"
            )
        group = file[genomes[0]]
    features = group.get("features")
    ids = features["id"] if features is not None else group["genes"]
    symbols = features["name"] if features is not None else group["gene_names"]
    is_gene = None
    if features is not None and "feature_type" in features:
        is_gene = _strings(features["feature_type"], 0, ids.shape[0]) == _EXPRESSION
    num_columns, num_rows = (int(n) for n in group["shape"][:])
    if group["indptr"].shape[0] != num_rows + 1 or int(group["indptr"][-1]) != group["data"].shape[0]:
        raise _refuse(uri, "its row pointers do not fit its data: truncated or damaged; fetch it again")
    return Reader(
        uri=uri,
        num_rows=num_rows,
        num_columns=num_columns,
        gene_names=lambda column: _strings(symbols if column == "name" else ids, 0, num_columns),
        read=lambda a, b, rows: _csr_blocks(group, a, b, rows),  # genes x cells by column = cells by row
        cell_names=lambda a, b: _strings(group["barcodes"], a, b),
        is_gene=is_gene,
    )


def _mtx(uri: str, layer: str) -> Reader:
    if layer != "X":
        raise _refuse(uri, f"layer = {layer!r}: a Matrix Market folder has only 'X'")
    folder = uri.rstrip("/").rsplit("/", 1)[0] if ".mtx" in uri.rstrip("/").rsplit("/", 1)[-1] else uri
    have = storage.list_dir(folder)

    def find(*names: str) -> str:
        for name in names:
            if name in have:
                return storage.join(folder, name)
        raise _refuse(
            folder, f"no {names[0]}; a Matrix Market folder has matrix.mtx, features.tsv (genes.tsv) and barcodes.tsv"
        )

    matrix = find("matrix.mtx.gz", "matrix.mtx")
    features = _lines(find("features.tsv.gz", "features.tsv", "genes.tsv.gz", "genes.tsv"))
    barcodes = np.asarray([line[0] for line in _lines(find("barcodes.tsv.gz", "barcodes.tsv"))], dtype=object)
    skip, num_columns, num_rows, num_entries = _mtx_header(matrix)
    if (num_columns, num_rows) != (len(features), len(barcodes)):
        shapes = f"{num_columns} x {num_rows} but {len(features)} features and {len(barcodes)} barcodes"
        raise _refuse(folder, f"matrix is {shapes}; the files do not belong together")
    genes = {"": 0, "id": 0, "name": 1}

    def scan() -> Iterator[Triples]:
        return _mtx_scan(matrix, skip, num_entries)

    kinds = np.asarray([line[2] if len(line) > 2 else _EXPRESSION for line in features], dtype=object)
    return Reader(
        uri=uri,
        num_rows=num_rows,
        num_columns=num_columns,
        gene_names=lambda column: np.asarray(
            [line[genes.get(column, 0) if len(line) > 1 else 0] for line in features], dtype=object
        ),
        read=lambda a, b, rows: _gather(scan(), a, b, rows, num_columns),
        scan=scan,
        cell_names=lambda a, b: barcodes[a:b],
        is_gene=kinds == _EXPRESSION,
    )


@contextmanager
def _text(uri: str) -> Iterator[BinaryIO]:
    with storage.open_read(uri) as raw:
        if not uri.endswith(".gz"):
            yield raw
            return
        with gzip.GzipFile(fileobj=raw) as stream:
            yield cast("BinaryIO", stream)


def _lines(uri: str) -> list[list[str]]:
    with _text(uri) as stream:
        return [line.split("\t") for line in stream.read().decode().splitlines() if line]


def _mtx_header(uri: str) -> tuple[int, int, int, int]:
    """Lines before the entries, then rows (genes), columns (cells) and entries of the file."""
    with _text(uri) as stream:
        first = stream.readline().decode("latin-1").lower().split()
        if first[:3] != ["%%matrixmarket", "matrix", "coordinate"]:
            raise _refuse(uri, "not a coordinate Matrix Market file; give the matrix.mtx that Cell Ranger writes")
        skip = 1
        while (line := stream.readline().decode("latin-1")).startswith("%"):
            skip += 1
        sizes = [int(n) for n in line.split()]
        if len(sizes) != 3:
            raise _refuse(uri, "empty or truncated: no line of sizes; fetch it again")
        return skip + 1, sizes[0], sizes[1], sizes[2]


def _mtx_scan(uri: str, skip: int, num_entries: int) -> Iterator[Triples]:
    seen = 0
    with _text(uri) as stream:
        for _ in range(skip):
            stream.readline()
        if num_entries == 0:
            return
        names = ["gene", "cell", "count"]
        with pa_csv.open_csv(
            pa.PythonFile(stream, mode="r"),
            read_options=pa_csv.ReadOptions(column_names=names, block_size=16 << 20, use_threads=False),
            parse_options=pa_csv.ParseOptions(delimiter=" "),
            convert_options=pa_csv.ConvertOptions(
                column_types={"gene": pa.int32(), "cell": pa.int32(), "count": pa.float64()}
            ),
        ) as reader:
            for batch in reader:
                gene, cell, count = (batch.column(i).to_numpy(zero_copy_only=False) for i in range(3))
                seen += len(gene)
                yield cell - 1, gene - 1, count
    if seen != num_entries:
        raise _refuse(uri, f"has {seen} of the {num_entries} entries that its header states: truncated; fetch it again")

"""Readers of 10x Genomics files: Cell Ranger .h5 (versions 2 and 3), and Matrix Market folders."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, cast

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from mixgf.cells.hdf5 import csr_blocks, read_strings
from mixgf.cells.reader import Reader, Triples, file_error, gather_rows
from mixgf.storage import files

_EXPRESSION = "Gene Expression"


def open_tenx_h5(uri: str, file: h5py.File, layer: str) -> Reader:
    """Reader of an open 10x .h5 file; features that are not genes are marked in `is_gene`."""
    if layer != "X":
        raise file_error(uri, f"layer = {layer!r}: a 10x file has only 'X'")
    group = file.get("matrix")
    if group is None:  # Cell Ranger 2: one group per genome
        genomes = [name for name, node in file.items() if isinstance(node, h5py.Group) and "indptr" in node]
        if len(genomes) != 1:
            raise file_error(
                uri, f"holds {len(genomes)} genomes ({', '.join(genomes)}): must be one; give one file per species"
            )
        group = file[genomes[0]]
    features = group.get("features")
    ids = features["id"] if features is not None else group["genes"]
    symbols = features["name"] if features is not None else group["gene_names"]
    is_gene = None
    if features is not None and "feature_type" in features:
        is_gene = read_strings(features["feature_type"], 0, ids.shape[0]) == _EXPRESSION
    num_columns, num_rows = (int(n) for n in group["shape"][:])
    if group["indptr"].shape[0] != num_rows + 1 or int(group["indptr"][-1]) != group["data"].shape[0]:
        raise file_error(uri, "its row pointers do not fit its data: truncated or damaged; fetch it again")
    return Reader(
        uri=uri,
        num_rows=num_rows,
        num_columns=num_columns,
        gene_names=lambda column: read_strings(symbols if column == "name" else ids, 0, num_columns),
        read=lambda a, b, rows: csr_blocks(group, a, b, rows),  # genes x cells by column = cells by row
        cell_names=lambda a, b: read_strings(group["barcodes"], a, b),
        is_gene=is_gene,
    )


def open_mtx(uri: str, layer: str) -> Reader:
    """Reader of a Matrix Market folder (matrix.mtx, features.tsv or genes.tsv, barcodes.tsv; each may be .gz)."""
    if layer != "X":
        raise file_error(uri, f"layer = {layer!r}: a Matrix Market folder has only 'X'")
    folder = uri.rstrip("/").rsplit("/", 1)[0] if ".mtx" in uri.rstrip("/").rsplit("/", 1)[-1] else uri
    have = files.list_dir(folder)

    def find(*names: str) -> str:
        for name in names:
            if name in have:
                return files.join(folder, name)
        raise file_error(
            folder, f"no {names[0]}; a Matrix Market folder has matrix.mtx, features.tsv (genes.tsv) and barcodes.tsv"
        )

    matrix = find("matrix.mtx.gz", "matrix.mtx")
    features = _lines(find("features.tsv.gz", "features.tsv", "genes.tsv.gz", "genes.tsv"))
    barcodes = np.asarray([line[0] for line in _lines(find("barcodes.tsv.gz", "barcodes.tsv"))], dtype=object)
    skip, num_columns, num_rows, num_entries = _mtx_header(matrix)
    if (num_columns, num_rows) != (len(features), len(barcodes)):
        shapes = f"{num_columns} x {num_rows} but {len(features)} features and {len(barcodes)} barcodes"
        raise file_error(folder, f"matrix is {shapes}; the files do not belong together")
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
        read=lambda a, b, rows: gather_rows(scan(), a, b, rows, num_columns),
        scan=scan,
        cell_names=lambda a, b: barcodes[a:b],
        is_gene=kinds == _EXPRESSION,
    )


@contextmanager
def _text(uri: str) -> Iterator[BinaryIO]:
    with files.open_read(uri) as raw:
        if not uri.endswith(".gz"):
            yield raw
            return
        with gzip.GzipFile(fileobj=raw) as stream:
            yield cast("BinaryIO", stream)


def _lines(uri: str) -> list[list[str]]:
    with _text(uri) as stream:
        return [line.split("\t") for line in stream.read().decode().splitlines() if line]


def _mtx_header(uri: str) -> tuple[int, int, int, int]:
    """Number of lines before the entries, rows (genes), columns (cells) and entries of the file."""
    with _text(uri) as stream:
        first = stream.readline().decode("latin-1").lower().split()
        if first[:3] != ["%%matrixmarket", "matrix", "coordinate"]:
            raise file_error(uri, "not a coordinate Matrix Market file; give the matrix.mtx that Cell Ranger writes")
        skip = 1
        while (line := stream.readline().decode("latin-1")).startswith("%"):
            skip += 1
        sizes = [int(n) for n in line.split()]
        if len(sizes) != 3:
            raise file_error(uri, "empty or truncated: no line of sizes; fetch it again")
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
        raise file_error(
            uri, f"has {seen} of the {num_entries} entries that its header states: truncated; fetch it again"
        )

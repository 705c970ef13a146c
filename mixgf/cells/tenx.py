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

from mixgf.cells.features import fill_missing, find_genes
from mixgf.cells.frames import read_strings
from mixgf.cells.matrices import check_pointers, csr_blocks
from mixgf.cells.reader import Reader, Triples, check_entries, file_error, gather_rows
from mixgf.storage import files

MTX_FILES = tuple(
    f"{name}{gz}" for name in ("matrix.mtx", "features.tsv", "genes.tsv", "barcodes.tsv") for gz in ("", ".gz")
)
"""Files of a Matrix Market folder; others are not looked at."""


def genome_groups(file: h5py.File) -> list[str]:
    """Names of the matrices, one per genome, in a file of Cell Ranger 2."""
    return [name for name, node in file.items() if isinstance(node, h5py.Group) and {"indptr", "barcodes"} <= set(node)]


def open_tenx_h5(uri: str, file: h5py.File, layer: str) -> Reader:
    """Reader of an open 10x .h5 file; features that are not genes are marked in `is_gene`."""
    if layer != "X":
        raise file_error(uri, f"layer = {layer!r}: a 10x file has only 'X'")
    group = file.get("matrix")
    if group is None:  # Cell Ranger 2: one group per genome
        genomes = genome_groups(file)
        if len(genomes) > 1:
            raise file_error(
                uri, f"holds {len(genomes)} genomes ({', '.join(genomes)}): must be one; give one file per species"
            )
        group = file[genomes[0]]
    features = group.get("features")
    num_columns, num_rows = (int(n) for n in group["shape"][:])
    nodes = (group["genes"], group["gene_names"]) if features is None else (features["id"], features["name"])
    for name, node, expected in (("features", nodes[0], num_columns), ("barcodes", group["barcodes"], num_rows)):
        if node.shape[0] != expected:
            raise file_error(uri, f"{node.shape[0]} {name}, and the matrix has {expected}: damaged; fetch it again")
    kinds = None
    if features is not None and "feature_type" in features:
        kinds = find_genes(uri, read_strings(features["feature_type"], 0, num_columns), "feature_type")
    check_pointers(uri, group, num_rows)
    return Reader(
        uri=uri,
        num_rows=num_rows,
        num_columns=num_columns,
        gene_names=lambda column: _names([read_strings(node, 0, num_columns) for node in nodes], column),
        read=lambda a, b, rows: csr_blocks(
            uri, group, a, b, rows, num_columns
        ),  # genes x cells by column = cells by row
        cell_names=lambda a, b: read_strings(group["barcodes"], a, b),
        is_gene=kinds,
    )


def open_mtx(uri: str, folder: str, layer: str) -> Reader:
    """Reader of a Matrix Market folder (matrix.mtx, features.tsv or genes.tsv, barcodes.tsv; each may be .gz)."""
    if layer != "X":
        raise file_error(uri, f"layer = {layer!r}: a Matrix Market folder has only 'X'")
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
    skip, (num_columns, num_rows, num_entries), mark = _mtx_header(matrix)
    if (num_rows, num_columns) == (len(features), len(barcodes)) and num_rows != num_columns:
        raise file_error(
            folder, f"matrix is {num_columns} x {num_rows}, cells in rows; transpose it: genes must be in rows"
        )
    if (num_columns, num_rows) != (len(features), len(barcodes)):
        shapes = f"{num_columns} x {num_rows} but {len(features)} features and {len(barcodes)} barcodes"
        raise file_error(folder, f"matrix is {shapes}; the files do not belong together")
    names = [np.asarray([line[min(i, len(line) - 1)] for line in features], dtype=object) for i in (0, 1)]

    def scan() -> Iterator[Triples]:
        return check_entries(matrix, _mtx_scan(matrix, skip, num_entries, mark), num_rows, num_columns)

    kinds = np.asarray([line[2] if len(line) > 2 else None for line in features], dtype=object)
    return Reader(
        uri=uri,
        num_rows=num_rows,
        num_columns=num_columns,
        gene_names=lambda column: _names(names, column),
        read=lambda a, b, rows: gather_rows(scan(), a, b, rows, num_columns),
        scan=scan,
        cell_names=lambda a, b: barcodes[a:b],
        is_gene=find_genes(folder, kinds, "third column of features.tsv"),
    )


def _names(ids_and_symbols: list[np.ndarray], column: str) -> np.ndarray:
    ids, symbols = ids_and_symbols
    return fill_missing(symbols, ids) if column == "name" else fill_missing(ids, symbols)


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


def _mtx_header(uri: str) -> tuple[int, tuple[int, int, int], str]:
    """Number of lines before the entries; rows (genes), columns (cells) and entries of the file; what separates columns."""
    with _text(uri) as stream:
        first = stream.readline().decode("latin-1").lower().split()
        if first[:3] != ["%%matrixmarket", "matrix", "coordinate"]:
            what = "its first line must be '%%MatrixMarket matrix coordinate integer general', as Cell Ranger writes it"
            raise file_error(uri, f"not a coordinate Matrix Market file; {what}")
        if wrong := {"pattern", "complex", "symmetric", "skew-symmetric", "hermitian"} & set(first[3:]):
            raise file_error(uri, f"a matrix of the kind {wrong.pop()!r}: must be 'integer general' or 'real general'")
        skip = 1
        while (line := stream.readline().decode("latin-1")).startswith("%"):
            skip += 1
        sizes = [int(n) for n in line.split()]
        if len(sizes) != 3:
            raise file_error(uri, "empty or truncated: no line of sizes; fetch it again")
        entry = stream.readline().decode("latin-1")
        if entry and len(entry.split()) != 3:
            what = f"{len(entry.split())} columns ({entry.strip()!r}): must be gene, cell and one count"
            raise file_error(uri, f"{what}; write spliced, unspliced and ambiguous counts as files of their own")
        return skip + 1, (sizes[0], sizes[1], sizes[2]), "\t" if "\t" in entry else " "


def _mtx_scan(uri: str, skip: int, num_entries: int, mark: str) -> Iterator[Triples]:
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
            parse_options=pa_csv.ParseOptions(delimiter=mark),
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

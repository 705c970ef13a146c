"""Readers of 10x Genomics files: Cell Ranger .h5 (versions 2 and 3), and Matrix Market folders of several programs.

A Matrix Market sample is three files: entries, genes, cells. `LAYOUTS` has the names that programs give them; the files of
a sample may begin with a prefix of its own (`GSM123_S1_matrix.mtx.gz`).
"""

from __future__ import annotations

import codecs
import csv
import gzip
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO, cast

import h5py
import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from mixgf.cells.features import fill_missing, find_genes
from mixgf.cells.frames import read_strings
from mixgf.cells.hdf5 import child
from mixgf.cells.matrices import check_pointers, csr_blocks
from mixgf.cells.reader import OPTION, SCAN_ENTRIES, Reader, Triples, check_entries, file_error, gather_rows, setting
from mixgf.errors import UserError
from mixgf.storage import files


@dataclass(frozen=True, slots=True)
class Layout:
    """Names of the files of a Matrix Market sample, without prefix and `.gz`."""

    matrix: str
    genes: tuple[str, ...]
    cells: tuple[str, ...]
    symbols: str = ""
    """A file of symbols beside the ids; empty = they are in the file of the genes."""


LAYOUTS = (
    Layout("matrix.mtx", ("features.tsv", "genes.tsv"), ("barcodes.tsv",)),  # Cell Ranger, STARsolo
    Layout("cells_x_genes.mtx", ("cells_x_genes.genes.txt",), ("cells_x_genes.barcodes.txt",), "cells_x_genes.genes.names.txt"),  # kb-python
    Layout("quants_mat.mtx", ("quants_mat_cols.txt",), ("quants_mat_rows.txt",)),  # alevin-fry
)  # fmt: skip
PLAIN_MATRICES = tuple(layout.matrix for layout in LAYOUTS)
"""Files with the entries of a sample without a name of its own."""
_GZ = ("", ".gz")
_GZIP = b"\x1f\x8b"
"""First bytes of a gzip file."""
ANY_SPACE = r"\s+"
"""What separates the columns of a Matrix Market file that are aligned by spaces."""
_HEADER_WORDS = {
    "barcode", "barcodes", "cell", "cells", "cell_id", "cellid", "cell_barcode", "x", "v1", "index", "gene_id", "geneid", "gene_ids",
    "gene", "genes", "gene_name", "gene_symbol", "symbol", "feature", "features", "feature_id", "id", "ensembl_id", "name",
}  # fmt: skip
"""What the first word of a line of column names is called."""


def mtx_matrices(names: Sequence[str]) -> list[str]:
    """Names of the Matrix Market files with entries in a folder, by the layouts; with a prefix or without."""
    endings = tuple(f"{layout.matrix}{gz}" for layout in LAYOUTS for gz in _GZ)
    return sorted(name for name in names if name.endswith(endings))


def mtx_files(name: str, names: Sequence[str]) -> list[str]:
    """Names of the files of a sample in a folder: of the entries, the genes, the cells and the symbols, each if it is there."""
    layout, prefix = _layout(name)
    groups = ((layout.matrix,), layout.cells, (layout.symbols,) if layout.symbols else ())
    found = [*(_first(names, prefix, group) for group in groups), _genes_file(names, layout, prefix)]
    return [one for one in found if one]


def _layout(name: str) -> tuple[Layout, str]:
    """Layout and prefix of a sample, by the name of the file with its entries."""
    bare = name.removesuffix(".gz")
    layout = next(layout for layout in LAYOUTS if bare.endswith(layout.matrix))
    return layout, bare.removesuffix(layout.matrix)


def _first(names: Sequence[str], prefix: str, group: Sequence[str]) -> str:
    wanted = (f"{prefix}{name}{gz}" for name in group for gz in reversed(_GZ))
    return next((name for name in wanted if name in names), "")


def _genes_file(names: Sequence[str], layout: Layout, prefix: str) -> str:
    """File of the genes of a sample; without one of its own, the only one in the folder that belongs to no other sample."""
    if own := _first(names, prefix, layout.genes):
        return own
    others = {_layout(name)[1] for name in mtx_matrices(names)}
    endings = {f"{name}{gz}": name for name in layout.genes for gz in _GZ}
    shared = [name for name in names for end in endings if name.endswith(end) and name.removesuffix(end) not in others]
    return shared[0] if len(shared) == 1 else ""


def genome_groups(file: h5py.File) -> list[str]:
    """Names of the matrices, one per genome, in a file of Cell Ranger 2."""
    inside = (name for name in file if not isinstance(file.get(name, getlink=True), h5py.ExternalLink))
    groups = {name: file[name] for name in inside}
    return [
        name for name, node in groups.items() if isinstance(node, h5py.Group) and {"indptr", "barcodes"} <= set(node)
    ]


def open_tenx_h5(uri: str, file: h5py.File, layer: str, option: str = OPTION) -> Reader:
    """Reader of an open 10x .h5 file; features that are not genes are marked in `is_gene`.

    `layer` is `X`, or the name of a genome in a file of several; `option` is `Reader.option`, for messages.
    """
    if "matrix" in file:
        group = child(file, "matrix")
        genomes = _genomes(group)
    else:  # Cell Ranger 2: one group per genome
        genomes = dict.fromkeys(genome_groups(file))
        group = child(file, layer if layer in genomes else next(iter(genomes)))
    if layer not in ("X", *genomes):
        raise file_error(
            uri,
            f"layer = {layer!r}: a 10x file has only 'X'" + (f", or a genome: {', '.join(genomes)}" if genomes else ""),
        )
    if len(genomes) > 1 and layer == "X":
        ways = " or ".join(setting(option, "layer", name) for name in genomes)
        raise file_error(
            uri, f"genes of {len(genomes)} genomes ({', '.join(genomes)}), that is cells of several species; take the genes of one: {ways}, "
            "and leave out the cells of the others (their counts of these genes are ambient RNA)"
        )  # fmt: skip
    features = child(group, "features") if "features" in group else None
    num_columns, num_rows = (int(n) for n in child(group, "shape")[:])
    at = (group, "genes", "gene_names") if features is None else (features, "id", "name")
    nodes = (child(at[0], at[1]), child(at[0], at[2]))
    barcodes = child(group, "barcodes")
    for name, node, expected in (("features", nodes[0], num_columns), ("barcodes", barcodes, num_rows)):
        if node.shape[0] != expected:
            raise file_error(uri, f"{node.shape[0]} {name}, and the matrix has {expected}: damaged; fetch it again")
    is_gene = kinds = None
    if features is not None and "feature_type" in features:
        kinds = read_strings(child(features, "feature_type"), 0, num_columns)
        is_gene = find_genes(uri, kinds, "feature_type")
    if features is not None and layer in genomes and len(genomes) > 1:
        of = read_strings(child(features, "genome"), 0, num_columns)
        mine = of == layer
        kinds = np.where(mine, kinds if kinds is not None else "", [f"of the genome {name}" for name in of]).astype(
            object
        )
        is_gene = mine if is_gene is None else mine & is_gene
    check_pointers(uri, group, num_rows)
    return Reader(
        uri=uri,
        num_rows=num_rows,
        num_columns=num_columns,
        gene_names=lambda column: _names([read_strings(node, 0, num_columns) for node in nodes], column),
        gene_columns=["id", "name"],
        read=lambda a, b, rows: csr_blocks(
            uri, group, a, b, rows, num_columns
        ),  # genes x cells by column = cells by row
        value_type=child(group, "data").dtype,
        cell_names=lambda a, b: read_strings(barcodes, a, b),
        is_gene=is_gene,
        kinds=kinds,
    )


def _genomes(group: h5py.Group) -> dict[str, None]:
    """Genomes of the genes in a file of Cell Ranger 3 or later; none where features have no genome."""
    if "features" not in group or "genome" not in group["features"]:
        return {}
    features = child(group, "features")
    of = read_strings(child(features, "genome"), 0, features["genome"].shape[0])
    kinds = read_strings(child(features, "feature_type"), 0, len(of)) if "feature_type" in features else None
    genes = np.ones(len(of), bool) if kinds is None or len(kinds) != len(of) else kinds == "Gene Expression"
    return dict.fromkeys(name for name in of[genes] if name)


def open_mtx(uri: str, folder: str, name: str, layer: str) -> Reader:
    """Reader of a Matrix Market sample; the matrix may have genes or cells in its rows.

    Args:
        uri: What the user gave, for messages.
        folder: That holds the files.
        name: Of the file with the entries.
        layer: Must be `X`.
    """
    if layer != "X":
        raise file_error(uri, f"layer = {layer!r}: a Matrix Market folder has only 'X'")
    have = files.list_dir(folder)
    layout, prefix = _layout(name)

    def find(*names: str) -> str:
        found = _first(have, prefix, names)
        if found:
            return files.join(folder, found)
        if "peaks.bed" in have:
            raise file_error(uri, "peaks of ATAC-seq (peaks.bed), not genes; give the folder with the RNA counts")
        if "all_genes.csv" in have:
            raise file_error(uri, "the output of Parse Biosciences' pipeline; give the anndata.h5ad of the same folder")
        raise file_error(
            uri, f"no {prefix}{names[0]} beside {name}; a Matrix Market sample is {layout.matrix}, {' or '.join(layout.genes)} and {layout.cells[0]}"
        )  # fmt: skip

    matrix = files.join(folder, name)
    shared = _genes_file(have, layout, prefix)
    features = _lines(files.join(folder, shared) if shared else find(*layout.genes))
    barcodes = [line[0] for line in _lines(find(*layout.cells))]
    skip, (num_columns, num_rows, num_entries), mark = _mtx_header(matrix)
    for columns, rows in ((num_columns, num_rows), (num_rows, num_columns)):
        genes, cells = _without_header(features, columns), _without_header([[name] for name in barcodes], rows)
        if (len(genes), len(cells)) == (columns, rows):
            transposed = columns != num_columns
            features, barcodes, num_columns, num_rows = genes, [line[0] for line in cells], columns, rows
            break
    else:
        shapes = f"{num_columns} x {num_rows} but {len(features)} features and {len(barcodes)} barcodes"
        if len(features) in (2 * num_columns, 3 * num_columns) or len(features) * 3 == num_rows:
            shapes += " (spliced, unspliced and ambiguous counts?)"
        raise file_error(uri, f"matrix is {shapes}; the files do not belong together")
    names = [np.asarray([line[min(i, len(line) - 1)] for line in features], dtype=object) for i in (0, 1)]
    if layout.symbols and (symbols := _first(have, prefix, [layout.symbols])):
        found = [line[0] if line else "" for line in _lines(files.join(folder, symbols), empty=True)]
        names[1] = np.asarray(found, dtype=object) if len(found) == num_columns else names[1]

    def scan() -> Iterator[Triples]:
        entries = _mtx_scan(matrix, skip, num_entries, mark)
        if transposed:
            entries = ((gene, cell, count) for cell, gene, count in entries)
        return check_entries(matrix, entries, num_rows, num_columns)

    kinds = np.asarray([line[2] if len(line) > 2 else None for line in features], dtype=object)
    is_gene = find_genes(uri, kinds, "third column of features.tsv")
    return Reader(
        uri=uri,
        num_rows=num_rows,
        num_columns=num_columns,
        gene_names=lambda column: _names(names, column),
        gene_columns=["id", "name"],
        read=lambda a, b, rows: gather_rows(scan(), a, b, rows, num_columns),
        scan=scan,
        cell_names=lambda a, b: np.asarray(barcodes[a:b], dtype=object),
        is_gene=is_gene,
        kinds=None if is_gene is None else kinds,
    )


def _without_header(lines: list[list[str]], expected: int) -> list[list[str]]:
    """The lines without comments (`#`) or a line of column names before them, where there are too many."""
    more = len(lines) - expected
    above = lines[: max(0, more)]
    comments = all(line[0].startswith("#") for line in above)
    return (
        lines[more:] if above and (comments or (more == 1 and above[0][0].strip().lower() in _HEADER_WORDS)) else lines
    )


def _names(ids_and_symbols: list[np.ndarray], column: str) -> np.ndarray:
    ids, symbols = ids_and_symbols
    return fill_missing(symbols, ids) if column == "name" else fill_missing(ids, symbols)


@contextmanager
def _text(uri: str) -> Iterator[BinaryIO]:
    with files.open_read(uri) as raw:
        packed = raw.read(2) == _GZIP  # names do not tell: browsers unpack files on the way, or leave .gz out
        raw.seek(0)
        if not packed:
            yield raw
            return
        try:
            with gzip.GzipFile(fileobj=raw) as stream:
                if stream.peek(2)[:2] == _GZIP:
                    raise file_error(uri, f"packed with gzip twice; run: gunzip {uri.rpartition('/')[2]}")
                yield cast("BinaryIO", stream)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise file_error(uri, f"truncated or damaged ({error}); fetch it again") from None


def _lines(uri: str, *, empty: bool = False) -> list[list[str]]:
    """Lines of a table in tab-separated columns, without quotes; empty lines only where they are asked for."""
    with _text(uri) as stream:
        data = stream.read()
    try:
        lines = data.decode(
            "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
        ).splitlines()
    except UnicodeDecodeError as error:
        raise file_error(
            uri, f"text that is not UTF-8 ({data[error.start : error.start + 40]!r}); write the file again"
        ) from None
    if any(line.startswith('"') for line in lines[:2]):
        rows: Any = csv.reader(lines, delimiter="\t")
        return [row for row in rows if row or empty]
    return [line.split("\t") for line in lines if line or empty]


def _mtx_header(uri: str) -> tuple[int, tuple[int, int, int], str]:
    """Number of lines before the entries; rows (genes), columns (cells) and entries of the file; what separates columns."""
    with _text(uri) as stream:
        head = stream.readline()
        if not head:
            raise file_error(uri, "an empty file; fetch it again")
        first = head.removeprefix(codecs.BOM_UTF8).decode("latin-1").lower().split()
        if first and set(first[0]) == {"%"} and len(first) == 1:
            first = ["%%matrixmarket", "matrix", "coordinate"]  # some programs write %% and nothing else
        if first[:3] != ["%%matrixmarket", "matrix", "coordinate"]:
            what = "its first line must be '%%MatrixMarket matrix coordinate integer general', as Cell Ranger writes it"
            raise file_error(uri, f"not a coordinate Matrix Market file; {what}")
        if wrong := {"pattern", "complex", "symmetric", "skew-symmetric", "hermitian"} & set(first[3:]):
            raise file_error(uri, f"a matrix of the kind {wrong.pop()!r}: must be 'integer general' or 'real general'")
        skip = 1
        while (line := stream.readline().decode("latin-1")) and (line.startswith("%") or not line.strip()):
            skip += 1
        sizes = [int(n) for n in line.split() if n.isdigit()]
        if len(sizes) != 3 or len(line.split()) != 3:
            raise file_error(uri, "empty or truncated: no line of sizes; fetch it again")
        entry = stream.readline().decode("latin-1")
        if entry and len(entry.split()) != 3:
            what = f"{len(entry.split())} columns ({entry.strip()!r}): must be gene, cell and one count"
            raise file_error(uri, f"{what}; write spliced, unspliced and ambiguous counts as files of their own")
        plain = entry.rstrip("\r\n")
        mark = next((mark for mark in " \t" if plain.count(mark) == 2 and plain == plain.strip()), "")
        return skip + 1, (sizes[0], sizes[1], sizes[2]), mark or ANY_SPACE


def _mtx_scan(uri: str, skip: int, num_entries: int, mark: str) -> Iterator[Triples]:
    seen = 0
    with _text(uri) as stream:
        for _ in range(skip):
            stream.readline()
        if num_entries == 0:
            return
        for gene, cell, count in _aligned(uri, stream) if mark == ANY_SPACE else _separated(uri, stream, mark):
            seen += len(gene)
            if len(gene) and (gene.min() == 0 or cell.min() == 0):
                raise file_error(
                    uri, "an entry of gene or cell 0: Matrix Market counts from 1; add 1 to both numbers of every entry"
                )
            yield cell - 1, gene - 1, count
    if seen != num_entries:
        raise file_error(
            uri, f"has {seen} of the {num_entries} entries that its header states: truncated; fetch it again"
        )


_ENTRY = ("gene", "cell", "count")


@contextmanager
def _entries_of(uri: str) -> Iterator[None]:
    """Turn a line that is no entry into a refusal."""
    try:
        yield
    except (pa.ArrowInvalid, ValueError) as error:
        if isinstance(error, UserError):
            raise
        what = str(error).splitlines()[0].removeprefix("CSV parse error: ")
        raise file_error(uri, f"a line that is not gene, cell and count ({what}): damaged; fetch it again") from None


def _separated(uri: str, stream: BinaryIO, mark: str) -> Iterator[Triples]:
    """Gene, cell (from 1) and count of entries whose columns are separated by one character."""
    with (
        _entries_of(uri),
        pa_csv.open_csv(
            pa.PythonFile(stream, mode="r"),
            read_options=pa_csv.ReadOptions(column_names=list(_ENTRY), block_size=16 << 20, use_threads=False),
            parse_options=pa_csv.ParseOptions(delimiter=mark),
            convert_options=pa_csv.ConvertOptions(
                column_types={"gene": pa.int32(), "cell": pa.int32(), "count": pa.float64()}, null_values=[]
            ),
        ) as reader,
    ):
        for batch in reader:
            gene, cell, count = (batch.column(i).to_numpy(zero_copy_only=False) for i in range(3))
            yield gene, cell, count


def _aligned(uri: str, stream: BinaryIO) -> Iterator[Triples]:
    """`_separated` for columns that are aligned by spaces."""
    import pandas as pd  # noqa: PLC0415 (few files need it)

    types = {"gene": np.int32, "cell": np.int32, "count": np.float64}
    with (
        _entries_of(uri),
        pd.read_csv(
            stream,
            sep=r"\s+",
            header=None,
            names=_ENTRY,
            dtype=types,
            chunksize=SCAN_ENTRIES,
            engine="c",
            index_col=False,
        ) as chunks,
    ):
        for chunk in chunks:
            gene, cell, count = (chunk[name].to_numpy() for name in _ENTRY)
            yield gene, cell, count

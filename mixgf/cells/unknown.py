"""What a file is that is no count file of a known format, by its content, and the one thing to do: for refusals."""

from __future__ import annotations

import gzip
import re
import zipfile
import zlib
from typing import Any

import h5py

from mixgf.storage import files

KNOWN = "give an .h5ad, a .zarr, a 10x .h5, or a folder with matrix.mtx(.gz), features and barcodes"
_HEAD = 4096
_HDF5 = b"\x89HDF\r\n\x1a\n"
_PYTHON = 'convert it: python -c "import anndata as ad; {code}"'


def _head(uri: str) -> bytes:
    with files.open_read(uri) as file:
        return file.read(_HEAD)


def is_hdf5(uri: str) -> bool:
    """Whether a file is HDF5. Its signature stands at the start, or after a user block of 512 bytes, or of more."""
    head = _head(uri)
    return _HDF5 in (head[at : at + len(_HDF5)] for at in (0, 512, 1024, 2048))


def _stem(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1].split(".")[0] or "cells"


def describe_file(uri: str) -> str:
    """What a file is that is not HDF5."""
    head, name = _head(uri), uri.rsplit("/", 1)[-1]
    text = head.lstrip().lower()
    found = next((what for mark, what in _MARKS if head.startswith(mark) or text.startswith(mark)), "")
    if not head:
        found = "an empty file; fetch it again"
    elif head.startswith(b"PK\x03\x04"):
        found = _describe_zip(uri)
    elif _is_tar(head):
        found = _TAR
    elif head.startswith(b"\x1f\x8b"):
        inner = _gunzipped(head)
        if inner.startswith(_HDF5):
            found = f"HDF5 in gzip; run: gunzip {name}"
        else:
            found = _TAR if _is_tar(inner) else _describe_text(inner, name, _stem(uri))
    elif found and name.lower().endswith((".rds", ".rda", ".rdata")):
        found = _RDS  # in bzip2 or xz
    found = found or _describe_text(head, name, _stem(uri)) or f"not a known format; {KNOWN}"
    return found.replace("{name}", name).replace("{stem}", _stem(uri))


def _convert(table: str) -> str:
    """Command that makes AnnData of a table of cells and genes, which pandas reads as `table` says."""
    code = f"import anndata, pandas as pd; anndata.AnnData(pd.{table}.astype('float32')).write_h5ad('{{stem}}.h5ad')"
    return f'convert it: python -c "{code}" (genes in rows: write .T after the reading)'


_PACKED = f"a compressed file (bzip2, xz or zstd); unpack it, and {KNOWN}"
_EXCEL = "an Excel table; " + _convert("read_excel('{name}', index_col=0)")
_PICKLE = "a pickle of Python, which is not opened, because it can run code; write the AnnData in it: adata.write_h5ad('{stem}.h5ad')"
_TAR = f"a tar archive; run: tar -xf {{name}}, and {KNOWN}"
_UTF16 = f"a text in UTF-16, as a spreadsheet saves it; save it as CSV in UTF-8, or {KNOWN}"
_READS = f"reads of a sequencer, not counts; count them first (Cell Ranger, STARsolo, alevin-fry, kb), and {KNOWN}"
_PEAKS = "regions of a genome (fragments or peaks of ATAC-seq), not counts of genes; give the file with the RNA counts"
_MARKS = (
    (b"version https://git-lfs", "a pointer of git-lfs, not the file itself; run: git lfs pull --include '*{name}'"),
    (b"<!doctype", "a web page, not the file itself: the download failed; fetch it again"),
    (b"<html", "a web page, not the file itself: the download failed; fetch it again"),
    (b"<?xml", "an XML text, as a server sends it with an error; fetch the file again"),
    (b"BZh", _PACKED),
    (b"\xfd7zXZ", _PACKED),
    (b"\x28\xb5\x2f\xfd", _PACKED),
    (b"PAR1", "a Parquet table; " + _convert("read_parquet('{name}')")),
    (b"ARROW1", "a Feather table; " + _convert("read_feather('{name}')")),
    (b"\x93NUMPY", f"an array of NumPy, without names of genes; {KNOWN}"),
    *((b"\x80" + version, _PICKLE) for version in (b"\x02", b"\x03", b"\x04", b"\x05")),
    (b"\xff\xfe", _UTF16),
    (b"\xfe\xff", _UTF16),
    (b"outs:\n", "a pointer of DVC, not the file itself; run: dvc pull"),
    (b'{"', "a text of JSON, not the file itself, as a server sends it with an error; fetch the file again"),
    (b"\xd0\xcf\x11\xe0", _EXCEL),
    (b"%PDF", f"a PDF; {KNOWN}"),
)
"""First bytes of files, and what they are."""
_RDS = (
    "an object of R; convert it in R: zellkonverter::writeH5AD(X, 'cells.h5ad'), where X is a SingleCellExperiment "
    "(of a Seurat object: Seurat::as.SingleCellExperiment)"
)


def _is_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"


def _describe_zip(uri: str) -> str:
    """What is in a zip archive that is not called .zarr.zip."""
    try:
        with files.open_read(uri) as file, zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError):
        return "a zip archive, truncated or damaged; fetch it again"
    if "xl/workbook.xml" in names:
        return _EXCEL
    if names and all(name.endswith(".npy") for name in names):
        return f"arrays of NumPy (.npz), without names of genes; {KNOWN}"
    if {"zarr.json", ".zgroup"} & set(names):
        return "a Zarr store in a zip archive; rename it to {stem}.zarr.zip"
    return f"a zip archive (it holds {', '.join(names[:3]) or 'nothing'}); run: unzip {{name}}, and {KNOWN}"


def _gunzipped(head: bytes) -> bytes:
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, _HEAD)
    except (zlib.error, gzip.BadGzipFile):
        return b""


def _describe_text(head: bytes, name: str, stem: str) -> str:
    """What a text, or a binary format that is packed with gzip, is; "" for something else."""
    if head[:5] in (b"RDX2\n", b"RDX3\n", b"RDA2\n", b"RDA3\n") or head[:2] in (b"X\n", b"A\n", b"B\n"):
        return _RDS
    if head.lower().startswith(b"%%matrixmarket"):
        return (
            "a Matrix Market file alone; put it into a folder as matrix.mtx(.gz), with features.tsv(.gz) and barcodes.tsv(.gz), "
            "and give the folder"
        )
    lines = head.decode("utf-8-sig", errors="replace").splitlines()
    comments = next((i for i, line in enumerate(lines) if not line.startswith("#")), 0)
    first = lines[comments] if lines else ""
    if head.startswith(b"BAM\x01") or (first.startswith("@") and len(lines) > 2 and lines[2].startswith("+")):
        return _READS
    if "\ufffd" in first or not all(c.isprintable() or c == "\t" for c in first):
        return ""
    return _PEAKS if re.fullmatch(r"\w+\t\d+\t\d+(\t.*)?", first) else _describe_table(first, comments, name, stem)


def _describe_table(line: str, comments: int, name: str, stem: str) -> str:
    """What a text is by its first line after some lines of comments: a table, as a rule."""
    if comments:
        marks = {mark: line.count(mark) for mark in ",\t;"}
        how = f"read_csv('{name}', comment='#', index_col=0, sep={max(marks, key=marks.__getitem__)!r})"
        return f"a table below lines of comments ({comments}); {_convert(how)}"
    for mark, kind, call in (
        ("\t", "tab-separated", f"read_text('{name}', delimiter='\\t')"),
        (";", "semicolon-separated", f"read_csv('{name}', delimiter=';')"),
        (",", "comma-separated", f"read_csv('{name}')"),
        (" ", "space-separated", f"read_text('{name}')"),
    ):
        if mark in line:
            how = _PYTHON.format(code=f"ad.io.{call}.write_h5ad('{stem}.h5ad')")
            return f"a {kind} table; {how} (genes in rows: add .T after the reading)"
    return f"a text file, not a known format; {KNOWN}"


def describe_hdf5(uri: str, file: h5py.File) -> str:
    """What an HDF5 file is that is neither AnnData nor a matrix of 10x."""
    name, stem, top = uri.rsplit("/", 1)[-1], _stem(uri), set(file)
    if {"row_attrs", "col_attrs"} <= top:
        return f"a loom file; pip install loompy, then {_PYTHON.format(code=f'''ad.io.read_loom('{name}').write_h5ad('{stem}.h5ad')''')}"
    if "mod" in top:
        first = next((m for m in ("rna", "gex", "RNA") if m in file["mod"]), "MODALITY")
        return (
            f"MuData with the modalities {', '.join(file['mod'])}; take one: pip install mudata, then "
            f"python -c \"import mudata; mudata.read_h5mu('{name}')['{first}'].write_h5ad('{stem}.h5ad')\""
        )
    if {"assays", "cell.names"} <= top:
        return f"an h5seurat file; convert it in R: SeuratDisk::Convert('{name}', dest = 'h5ad')"
    return _describe_tables(file, top, name, stem)


def _describe_tables(file: h5py.File, top: set[str], name: str, stem: str) -> str:
    """What an HDF5 file of tables is, or of something else."""
    if {"barcode_idx", "umi"} <= top or {"barcode", "umi", "gem_group"} <= top:
        return (
            "the molecule table of Cell Ranger, not the matrix; give filtered_feature_bc_matrix.h5 of the same folder"
        )
    if table := next((key for key in file if "pandas_type" in file[key].attrs), ""):
        return "a table of pandas; " + _convert(f"read_hdf('{name}', {table!r})").replace("{stem}", stem)
    shown = ", ".join(sorted(top)[:6]) or "nothing"
    if top & {"obs", "var", "X"}:
        return f"AnnData without {' and '.join(sorted({'obs', 'var'} - top))} (it holds {shown}); write it again with anndata"
    return f"HDF5 without a matrix of counts (it holds {shown}); {KNOWN}"


def describe_zarr(uri: str, root: Any) -> str:
    """What a Zarr store is that is not AnnData."""
    top = list(root)
    if "mod" in top:
        return f"MuData with the modalities {', '.join(root['mod'])}; give one of them: {uri.rstrip('/')}/mod/{next(iter(root['mod']), 'rna')}"
    if within := [name for name in top if {"obs", "var"} <= set(_members(root[name]))]:
        more = f" ({len(within)} such stores)" if len(within) > 1 else ""
        return f"a Zarr group with AnnData in it{more}; give {uri.rstrip('/')}/{within[0]}"
    if "tables" in top:
        return f"SpatialData; give its table: {uri.rstrip('/')}/tables/{next(iter(root['tables']), 'table')}"
    return f"a Zarr store that is not AnnData (it holds {', '.join(top[:6]) or 'nothing'}); {KNOWN}"


def describe_no_group(uri: str) -> str:
    """What a Zarr store, or an archive of one, is that has no group at its root."""
    if not uri.endswith(".zip"):
        return "a Zarr store without a group: an incomplete copy, or not finished; copy it again"
    with files.open_read(uri) as file, zipfile.ZipFile(file) as archive:
        names = archive.namelist()
    folder = next((name.rpartition("/")[0] for name in names if name.endswith(("/zarr.json", "/.zgroup"))), "")
    if folder:
        return f"the Zarr store lies in the folder {folder} of the archive; zip what is in that folder: unzip, cd {folder}, zip -0 -r ../{uri.rsplit('/', 1)[-1]} ."
    return f"a zip archive without a Zarr store (it holds {', '.join(names[:3]) or 'nothing'}); {KNOWN}"


def _members(node: Any) -> list[str]:
    return list(node) if hasattr(node, "__iter__") else []


_TENX = (
    "filtered_feature_bc_matrix.h5", "filtered_feature_bc_matrix", "filtered_gene_bc_matrices_h5.h5", "sample_filtered_feature_bc_matrix.h5",
    "sample_filtered_feature_bc_matrix", "cell_feature_matrix.h5", "cell_feature_matrix",
)  # fmt: skip
"""Names of the matrix of cells in a folder of 10x Genomics' programs (Cell Ranger, Space Ranger, Xenium)."""


def describe_folder(uri: str, names: list[str]) -> str:
    """What a folder is that holds no counts of a known format."""
    here = uri.rstrip("/")
    if here.endswith(".zarr"):
        return "a Zarr store without zarr.json or .zgroup: an incomplete copy, or not finished; copy it again"
    if matrices := [name for name in names if name.endswith((".mtx", ".mtx.gz"))]:
        return _describe_matrices(here, names, matrices)
    return _describe_program(here, names) or _describe_several(here, names)


def _describe_program(here: str, names: list[str]) -> str:
    """What a folder is that a known program wrote; empty for another one."""
    outs = f"{here}/outs" if "outs" in names else here
    if found := [name for name in _TENX if files.exists(f"{outs}/{name}")]:
        return (
            f"a folder of Cell Ranger or Space Ranger, with several matrices; give the one of cells: {outs}/{found[0]}"
        )
    if packed := [name for name in names if re.search(r"\.mtx\.(bz2|xz|zst|zip)$", name)]:
        return f"the files of a matrix, packed in another way than gzip ({packed[0]}); unpack them"
    if "quants_mat.gz" in names:
        return "the binary matrix of alevin (salmon); load it in R with tximport, or count with alevin-fry, whose folder is read"
    return ""


def _describe_several(here: str, names: list[str]) -> str:
    """What a folder of files or folders is."""
    for ending in (".h5ad", ".h5", ".zarr"):
        if any(name.endswith(ending) for name in names):
            return f"a folder of several files; give them by a pattern: {here}/*{ending}"
    if deeper := _deeper(here, names):
        more = f" ({len(deeper)} of them)" if len(deeper) > 1 else ""
        return f"a folder in whose folders the matrices are{more}; give {' or '.join(deeper[:3])}"
    what = f"a folder of something else (it holds {', '.join(names[:4])})" if names else "an empty folder"
    return f"{what}; {KNOWN}"


_LOOKED_AT = 60
"""Folders that are listed to find matrices in them."""


def _deeper(here: str, names: list[str]) -> list[str]:
    """Folders and files with the matrices of cells in the folders of a folder; those of all barcodes only if there are no others."""
    found: list[str] = []
    waiting = [f"{here}/{name}" for name in names]
    at = 0
    while at < min(len(waiting), _LOOKED_AT):
        place, at = waiting[at], at + 1
        inside = files.list_dir(place)
        if known := [name for name in _TENX if name in inside and name.endswith(".h5")]:
            found.append(f"{place}/{known[0]}")
        elif any(name in inside for name in ("matrix.mtx", "matrix.mtx.gz")):
            found.append(place)
        else:
            waiting += [f"{place}/{name}" for name in inside]
    return [place for place in found if "raw" not in place.removeprefix(here)] or found


def _describe_matrices(here: str, names: list[str], matrices: list[str]) -> str:
    """What a folder of Matrix Market files is that is not one sample."""
    if len(matrices) > 1 and all(name.removesuffix(".gz").endswith("matrix.mtx") for name in matrices):
        return f"a folder of {len(matrices)} samples ({', '.join(matrices[:3])}); give their matrices by a pattern: '{here}/*matrix.mtx*'"
    if {"spliced.mtx", "spliced.mtx.gz"} & set(names):
        return "spliced and unspliced counts of STARsolo (Velocyto); give the folder Gene or GeneFull beside it"
    return f"{', '.join(matrices[:3])}, and a Matrix Market folder has matrix.mtx(.gz), features.tsv(.gz) and barcodes.tsv(.gz); rename the files"

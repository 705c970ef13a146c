"""More members of the kinds of `make_cases.py`, invented to fall: each is read right, read with a doubt that is said, or refused.

`READ`: the cells are those of the good file. `DOUBTED`: they are read as they are, and prepare says what is wrong with them.
`REFUSED`: exit code 2, one line with the file, what it is, and what to do.
"""

import gzip
import pickle
import re
import shlex
import subprocess
import sys
import tarfile
import warnings
import zipfile

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from mixgf.cells.counts import read_blocks
from mixgf.cells.open import open_reader
from mixgf.cells.reader import OPTION
from mixgf.cells.tenx import mtx_files
from mixgf.config.data import HUMAN
from mixgf.corpus.anndata import open_cells
from mixgf.errors import UserError
from mixgf.genes.identify import gene_lookup, identify_columns
from tests.field import make_cases as make
from tests.field.prepared import run_prepare
from tests.field.test_cases import GOOD

IDS, NAMES = make.genes()
ROWS = "%%MatrixMarket matrix coordinate integer general\n%"


def h5ad(a, d, change=None):
    a.write_h5ad(d / "in.h5ad")
    if change is not None:
        with h5py.File(d / "in.h5ad", "r+") as f:
            change(f)
    return d / "in.h5ad"


def with_values(function, dtype=None):
    """The good cells with changed counts."""
    a = make.cells()
    x = a.X.copy()
    x.data = np.asarray(function(x.data), dtype=dtype or x.dtype)
    a.X = x
    return a


def stored(f, name, dtype):
    values = f[name][:].astype(dtype)
    del f[name]
    f[name] = values


def index(f, frame, values):
    name = f[frame].attrs["_index"]
    del f[frame][name]
    f[frame][name] = values


def obs_column(f, name, values):
    f["obs"][name] = values
    f["obs"].attrs["column-order"] = [*f["obs"].attrs["column-order"], name]


def named(names, **columns):
    return make.renamed(make.cells(), names, **columns)


def mtx(d, features=None, **options):
    make.mtx(d / "in", make.cells().X, features or make.lines(), **options)
    return d / "in"


def table():
    a = make.cells()
    return pd.DataFrame(a.X.toarray().astype(int), index=a.obs_names, columns=NAMES)


def written(d, name, data):
    (d / name).write_bytes(data)
    return d / name


def saved(d, name, function):
    function(d / name)
    return d / name


def shuffled_with_duplicates(f):
    """The same counts: columns of a row in no order, and one count of each row as two entries."""
    x = make.cells().X
    parts = []
    for r in range(x.shape[0]):
        values, columns = (part[x.indptr[r] : x.indptr[r + 1]] for part in (x.data, x.indices))
        k = int(np.argmax(values > 1))
        values, columns = np.append(values, 1), np.append(columns, columns[k])
        values[k] -= 1
        order = np.random.default_rng(r).permutation(len(values))
        parts.append((values[order], columns[order]))
    for name, data in (("data", [p[0] for p in parts]), ("indices", [p[1] for p in parts])):
        del f["X"][name]
        f["X"][name] = np.concatenate(data)
    del f["X/indptr"]
    f["X/indptr"] = np.cumsum([0, *(len(p[0]) for p in parts)])


def zeros_stored():
    a = make.cells()
    x = sparse.csr_matrix(a.X.toarray() + 1)
    x.data -= 1
    a.X = x
    return a


def without_order(f):
    del f["obs"].attrs["column-order"]
    for key in ("encoding-type", "encoding-version"):
        del f["obs"].attrs[key]


def velocity(d):
    a = make.cells()
    a.layers["spliced"], a.layers["unspliced"] = a.X.copy(), a.X.copy()
    a.X = None
    return h5ad(a, d)


def raw_of_all_genes(d):
    a = make.cells()
    b = a[:, :50].copy()
    b.raw, b.X = a, make.logged(b)
    return h5ad(b, d)


def raw_cite(d):
    """Genes and antibodies in raw, whose own table does not tell them apart."""
    make.make(d, "citeseq-h5ad")
    a = ad.read_h5ad(d / "citeseq-h5ad/in.h5ad")
    a.raw = a.copy()
    a.write_h5ad(d / "in.h5ad")
    with h5py.File(d / "in.h5ad", "r+") as f:
        del f["raw/var/feature_types"]
        f["raw/var"].attrs["column-order"] = ["gene_ids"]
    return d / "in.h5ad"


def tenx(d, change=None, **options):
    make.tenx(d / "in.h5", make.cells().X, IDS, NAMES, **options)
    if change is not None:
        with h5py.File(d / "in.h5", "r+") as f:
            change(f)
    return d / "in.h5"


def shared_features(d):
    """One file of features for all samples of a series of GEO."""
    folder = mtx(d, prefix="GSM1_S1_")
    (folder / "GSM1_S1_features.tsv.gz").rename(folder / "GSE9_features.tsv.gz")
    return folder / "GSM1_S1_matrix.mtx.gz"


def in_columns():
    a = make.cells()
    x = sparse.csc_matrix(a.X)
    for c in range(x.shape[1]):
        part = slice(x.indptr[c], x.indptr[c + 1])
        order = np.random.default_rng(c).permutation(part.stop - part.start)
        x.data[part], x.indices[part] = x.data[part][order], x.indices[part][order]
    a.X = x
    return a


def without_gz(folder):
    for path in list(folder.iterdir()):
        path.rename(path.with_suffix(""))
    return folder


def unpacked(folder):
    for path in folder.iterdir():
        path.write_bytes(gzip.decompress(path.read_bytes()))
    return folder


READ = {
    # name: (maker, what is said; empty = nothing, settings)
    "uint8": (lambda d: h5ad(with_values(lambda v: v, np.uint8), d), ""),
    "float16": (lambda d: h5ad(make.cells(), d, lambda f: stored(f, "X/data", "f2")), ""),
    "uint64 and uint16 indices": (lambda d: h5ad(make.cells(), d, lambda f: (stored(f, "X/indptr", "u8"), stored(f, "X/indices", "u2"))), ""),
    "unsorted columns and duplicate entries": (lambda d: h5ad(make.cells(), d, shuffled_with_duplicates), ""),
    "explicit zeros": (lambda d: h5ad(zeros_stored(), d), ""),
    "names of cells are numbers": (lambda d: h5ad(make.cells(), d, lambda f: index(f, "obs", np.arange(60))), ""),
    "names of genes are numbers": (lambda d: h5ad(named(range(300), symbol=NAMES), d, lambda f: index(f, "var", np.arange(300))), r"read from var\['symbol'\]"),
    "duplicate names of cells": (lambda d: h5ad(make.cells(), d, lambda f: index(f, "obs", make.text([f"c{k % 20}" for k in range(60)]))), ""),
    "no names of columns": (lambda d: h5ad(make.cells(), d, without_order), ""),
    "names padded with spaces": (lambda d: h5ad(named(NAMES), d, lambda f: index(f, "var", np.array([n.encode().ljust(30) for n in NAMES]))), "without quotes"),
    "no-break spaces": (lambda d: h5ad(named([f"{n}\u00a0" for n in NAMES]), d), "without quotes"),
    "dashes of a word processor": (lambda d: h5ad(named([n.replace("-", "\u2010") for n in NAMES]), d), "with dashes for dots"),
    "ids and symbols in turn": (lambda d: h5ad(named([i if k % 2 else n for k, (i, n) in enumerate(zip(IDS, NAMES, strict=True))]), d), ""),
    "PAR_Y": (lambda d: h5ad(named([f"{i}.{k % 9}" + "_PAR_Y" * (k % 50 == 3) for k, i in enumerate(IDS)]), d), ""),
    "dates beside ids": (lambda d: h5ad(named(["1-Mar", "2-Sep", *NAMES[2:]], gene_ids=IDS), d), ""),
    "raw with antibodies": (raw_cite, r"6 Antibody Capture", {"sources__layer": "raw"}),
    "a layer with a slash": (lambda d: h5ad(make.cells(), d, lambda f: f.copy("X", f["layers"], "a/b")), "", {"sources__layer": "a/b"}),
    "h5 without genomes": (lambda d: tenx(d, lambda f: f["matrix/features"].__delitem__("genome")), ""),
    "features with four columns": (lambda d: mtx(d, [f"{line}\tchr1\t7" for line in make.lines()]), ""),
    "features with coordinates for kinds": (lambda d: mtx(d, [f"{i}\t{n}\tchr1\t7" for i, n in zip(IDS, NAMES, strict=True)]), ""),
    "features numbered": (lambda d: mtx(d, [f"{k}\t{i}\t{n}" for k, (i, n) in enumerate(zip(IDS, NAMES, strict=True))]), r"read from var\['name'\]"),
    "features of Windows": (lambda d: mtx(d, ["\ufeff" + make.lines()[0], *make.lines()[1:]], newline="\r\n"), ""),
    "features without ids": (lambda d: mtx(d, [f"\t{n}\tGene Expression" for n in NAMES]), ""),
    "features with commas": (lambda d: mtx(d, [line.replace("\t", ",") for line in make.lines()]), "by the id within the name"),
    "features of another name": (shared_features, ""),
    "barcodes with columns": (lambda d: mtx(d, barcodes=[f"B{k}\t{k}\t3" for k in range(60)]), ""),
    "a matrix with a byte order mark": (lambda d: mtx(d, head=f"\ufeff{ROWS}"), ""),
    "a matrix in two spaces": (lambda d: mtx(d, line="{g}  {c}  {v}"), ""),
    "a matrix aligned": (lambda d: mtx(d, line="{g:>6} {c:>4} {v:>3} "), ""),
    "a matrix in exponents": (lambda d: mtx(d, head=ROWS.replace("integer", "real"), line="{g} {c} {v:.6e}"), ""),
    "a header in capitals": (lambda d: mtx(d, head=ROWS.replace("matrix coordinate integer", "MATRIX COORDINATE INTEGER")), ""),
    "csc unsorted": (lambda d: h5ad(in_columns(), d), ""),
    "no ending": (lambda d: h5ad(make.cells(), d).rename(d / "cells"), ""),
    "an ending in capitals": (lambda d: h5ad(make.cells(), d).rename(d / "IN.H5AD"), ""),
    "a name with signs": (lambda d: h5ad(make.cells(), d).rename(d / "a=b c%20 [1] \u03b1.h5ad"), ""),
    "a link": (lambda d: saved(d, "link.h5ad", lambda to: to.symlink_to(h5ad(make.cells(), d))), ""),
    "gzip without the ending": (lambda d: without_gz(mtx(d)), ""),
    "the ending without gzip": (lambda d: unpacked(mtx(d)), ""),
    "blank lines at the end": (lambda d: mtx(d, [*make.lines(), "", ""], change=lambda rows: [*rows, "", ""]), ""),
}  # fmt: skip


def linked(d):
    (d / "links").mkdir()
    for path in mtx(d).iterdir():
        (d / "links" / path.name).symlink_to(path)
    return d / "links"


def filtered(d, **options):
    """Chunks of a size of their own, and filters that are not gzip alone."""

    def change(f):
        for name, type_ in (("data", "i4"), ("indices", "i4")):
            values = f["X"][name][:].astype(type_)
            del f["X"][name]
            f["X"].create_dataset(name, data=values, chunks=(37,), **options)

    return h5ad(make.cells(), d, change)


def without_reference(f):
    """Categories of anndata 0.7, whose columns do not point to them."""
    g = f["obs"]
    codes, names = g["cell_type/codes"][:], g["cell_type/categories"][:]
    del g["cell_type"]
    g["cell_type"], g.create_group("__categories")["cell_type"] = codes, names


def table_of_ids(d):
    ids = [str(1_000 + k) for k in range(300)]
    return h5ad(named(ids, entrez=range(300), SYMBOL=NAMES), d)


def quoted_tabs(d):
    a = make.cells()
    a.obs_names = [f"c\t{k}\n\u03b1" for k in range(60)]
    return h5ad(a, d)


SPELLED = "300 names are read in another spelling: "
MORE_READ = {
    "ids of GENCODE on GRCh37": (lambda d: h5ad(named([f"{i}.{3 + k % 9}_{1 + k % 4}" for k, i in enumerate(IDS)]), d), ""),
    "names of NCBI's GFF": (lambda d: h5ad(named([f"gene-{n}" for n in NAMES]), d), SPELLED + r"without the word before the name \(gene-MT-CO1 = MT-CO1\)"),
    "names of Ensembl's GFF": (lambda d: h5ad(named([f"gene:{i}.4" for i in IDS]), d), SPELLED + "without the word"),
    "keys of Seurat": (lambda d: h5ad(named([f"rna_{n}" for n in NAMES]), d), SPELLED + "without the word"),
    "the species before names": (lambda d: h5ad(named([f"human_{n}" for n in NAMES]), d), SPELLED + "without the name of the reference"),
    "symbol and id in brackets": (lambda d: h5ad(named([f"{n} ({i})" for i, n in zip(IDS, NAMES, strict=True)]), d), SPELLED + "by the id within the name"),
    "small letters of ids": (lambda d: h5ad(named([f"{i.lower()}.3" for i in IDS]), d), SPELLED + "with the capital letters"),
    "ids of NCBI Gene beside symbols": (table_of_ids, r"read from var\['SYMBOL'\]"),
    "symbols before ids": (lambda d: mtx(d, [f"{n}\t{i}\tGene Expression" for i, n in zip(IDS, NAMES, strict=True)]), ""),
    "comments before features": (lambda d: mtx(d, ["#made by", "#gene_id\tname", *make.lines()]), ""),
    "comments before barcodes": (lambda d: mtx(d, barcodes=["# made by", *(f"B{k}" for k in range(60))]), ""),
    "unsigned integers": (lambda d: mtx(d, head=ROWS.replace("integer", "unsigned-integer")), ""),
    "a folder of links": (linked, ""),
    "a link to a folder": (lambda d: saved(d, "link", lambda to: to.symlink_to(mtx(d))), ""),
    "fletcher32 and lzf": (lambda d: filtered(d, fletcher32=True, shuffle=True, compression="lzf"), ""),
    "scaleoffset": (lambda d: filtered(d, scaleoffset=0), ""),
    "categories without a reference": (lambda d: h5ad(make.cells(), d, without_reference), ""),
    "log1p in uns, counts in X": (lambda d: h5ad(ad.AnnData(make.cells().X, obs=make.cells().obs, var=make.cells().var, uns={"log1p": {"base": 2.0}}), d), ""),
    "tabs and line ends in names of cells": (quoted_tabs, ""),
    "barcodes of two lanes": (lambda d: h5ad(make.cells(), d, lambda f: index(f, "obs", make.text([f"ACGT-{k % 2}" for k in range(60)]))), ""),
    "kinds in small letters": (lambda d: tenx(d, types="gene expression"), ""),
    "an h5ad with the ending .gz": (lambda d: h5ad(make.cells(), d).rename(d / "in.h5ad.gz"), ""),
    "a URI of a file": (lambda d: FileUri(h5ad(make.cells(), d)), ""),
}  # fmt: skip
READ |= MORE_READ


class FileUri:
    """A path that is given as `file://...`."""

    def __init__(self, path):
        self.name, self._uri = path.name, f"file://{path}"

    def __str__(self):
        return self._uri

    __fspath__ = __str__


def usa_mode(d):
    """Spliced, unspliced and ambiguous counts side by side."""
    a = make.cells()
    other = sparse.csr_matrix(np.floor(make.cells(seed=5).X.toarray() * 0.3))
    x = sparse.hstack([a.X, other, other]).T.tocoo()  # genes x cells
    rows = ["%%MatrixMarket matrix coordinate real general", f"60 900 {x.nnz}"]
    rows += [f"{c + 1} {g + 1} {v:g}" for g, c, v in zip(x.row, x.col, x.data, strict=True)]
    names = [f"{i}{end}" for end in ("", "-U", "-A") for i in IDS]
    (d / "in").mkdir()
    for name, lines in (("mtx", rows), ("cols.txt", names), ("rows.txt", [f"B{k}" for k in range(60)])):
        (d / "in" / f"quants_mat{'.' if name == 'mtx' else '_'}{name}").write_text("\n".join(lines) + "\n")
    return d / "in"


def binarised_with_others(d):
    """Ones on genes that may enter the vocabulary, and on 40 that may not."""
    lookup = gene_lookup(HUMAN)
    others = [g for g, kind in lookup.biotype.items() if kind == "lncRNA"][:40]
    x = sparse.hstack([make.cells().X > 0, np.ones((60, 40))], format="csr").astype(np.float32)
    return h5ad(ad.AnnData(x, obs=make.cells().obs, var=pd.DataFrame(index=[*IDS, *others])), d)


DOUBTED = {
    # name: (maker, cells and counts, what is said)
    "uint8 cut at 255": (lambda d: h5ad(with_values(lambda v: np.minimum(40 * v, 255), np.uint8), d), (60, 971_105), r"stored as uint8, which ends at 255, and the largest is 255"),
    "uint8 begun again at 0": (lambda d: h5ad(with_values(lambda v: (40 * v).astype(int) % 256, np.uint8), d), (60, 898_608), r"stored as uint8, .* begun again at 0; write them as int32"),
    "float16 above 2,048": (lambda d: h5ad(with_values(lambda v: 501 * v), d, lambda f: stored(f, "X/data", "f2")), (60, 12_655_841), r"float16, which has no exact whole numbers above 2,048"),
    "true and false": (lambda d: h5ad(with_values(lambda v: v > 0, bool), d), (60, 10_888), r"every count above 0 is 1: binarised"),
    "zeros and ones": (lambda d: h5ad(with_values(lambda v: v > 0), d), (60, 10_888), r"every count above 0 is 1: binarised"),
    "dates for symbols": (lambda d: h5ad(named([*NAMES[:20], "1-Mar", "2-Sep", "2023-09-01 00:00:00", "2.31E+13", *NAMES[24:]]), d), (60, 25_262), r"4 of them are dates or exponents \(.*\): a spreadsheet changed symbols"),
    "empty rows and columns": (lambda d: h5ad(with_empty(), d), (58, 24_342), r"$^|few_genes|depth"),
    "two species without prefixes": (lambda d: h5ad(barnyard("", ""), d), (60, 25_262), r"with 50\.0% of the counts .*they are mouse genes"),
    "an entry twice": (lambda d: mtx(d, change=lambda rows: [*rows[:-1], rows[0]]), (60, 25_266), ""),
    "alevin-fry with unspliced counts": (usa_mode, (60, 30_974), r"600 are no known human gene, with 18\.4% .* unspliced \(-U\) and ambiguous \(-A\) counts of alevin-fry"),
    "ones of all biotypes": (binarised_with_others, (60, 13_288), r"every count above 0 is 1: binarised"),
    "counts per million as whole numbers": (lambda d: h5ad(with_sums(1e6, np.rint), d), (60, 60_000_046), r"same sum of counts \(1,000,000\)"),
    "names without letters": (lambda d: h5ad(named(["", *NAMES[1:]]), d), (60, 25_262), r"1 are no known human gene, .* \(no name, \.\.\.\)"),
    "codewords of Xenium": (lambda d: tenx(d, types=["Gene Expression"] * 280 + ["Deprecated Codeword"] * 10 + ["Genomic Control"] * 10), (60, 24_185), r"20 features are no genes and are left out: 10 Deprecated Codeword"),
    "guides and custom features": (lambda d: tenx(d, types=["Gene Expression"] * 290 + ["CRISPR Guide Capture"] * 5 + ["Custom"] * 5), (60, 24_797), r"10 features are no genes and are left out: 5 CRISPR Guide Capture"),
}  # fmt: skip


def with_sums(total, function):
    a = make.cells()
    x = sparse.csr_matrix(a.X.multiply(total / np.asarray(a.X.sum(1))))
    x.data = function(x.data).astype(np.float32)
    a.X = x
    return a


def with_empty():
    a = make.cells()
    x = a.X.tolil()
    x[5], x[59], x[:, 7], x[:, 299] = 0, 0, 0, 0
    a.X = sparse.csr_matrix(x)
    return a


def barnyard(human, mouse):
    ids, names = make.genes("mouse")
    x = sparse.block_diag([make.cells().X, make.cells(species="mouse").X], format="csr")
    mine, theirs = (NAMES, names) if human else (IDS, ids)
    return ad.AnnData(x, var=pd.DataFrame(index=[f"{human}{n}" for n in mine] + [f"{mouse}{n}" for n in theirs]))


def layer_alone(d):
    a = make.cells()
    a.layers["raw counts"] = a.X.copy()
    a.X = None
    return h5ad(a, d)


def mudata(d, name):
    with h5py.File(d / name, "w") as f:
        a = make.cells()
        for part, cells in (("prot", a[:, :5].copy()), ("rna", a)):
            ad.io.write_elem(f.require_group("mod"), part, cells)
        ad.io.write_elem(f, "obs", a.obs)
        ad.io.write_elem(f, "var", a.var)
    return d / name


def outs(d, folder=""):
    """The folder of Space Ranger."""
    (d / "in" / folder / "spatial").mkdir(parents=True)
    for name in ("filtered_feature_bc_matrix.h5", "raw_feature_bc_matrix.h5"):
        make.tenx(d / "in" / folder / name, make.cells().X, IDS, NAMES)
    return d / "in"


def packed(d, name, mode):
    folder = mtx(d)
    with tarfile.open(d / name, mode) as archive:
        archive.add(folder, "in")
    return d / name


def zipped(d, name, files):
    with zipfile.ZipFile(d / name, "w") as archive:
        for path, data in files.items():
            archive.writestr(path, data)
    return d / name


def zarr_in_a_folder(d):
    pytest.importorskip("zarr")
    make.cells().write_zarr(d / "x.zarr")
    files = {str(p.relative_to(d)): p.read_bytes() for p in sorted((d / "x.zarr").rglob("*")) if p.is_file()}
    return zipped(d, "in.zarr.zip", files)


def logged(base, genes=300):
    a = make.cells()
    x = make.logged(a)
    x.data = (x.data / np.log(base)).astype(np.float32)
    a.X = x
    return a[:, :genes].copy()


def swapped():
    a = make.cells()
    return ad.AnnData(sparse.csr_matrix(a.X.T), obs=pd.DataFrame(index=NAMES), var=pd.DataFrame(index=a.obs_names))


def latin_features(d):
    folder = mtx(d)
    (folder / "features.tsv.gz").write_bytes(gzip.compress("\n".join(make.lines()).encode() + b"\nd\xe9"))
    return folder


def half(d):
    file = mtx(d) / "matrix.mtx.gz"
    file.write_bytes(file.read_bytes()[:2_000])
    return file.parent


def molecules(d):
    make.make(d, "h5-molecule-info")
    return (d / "h5-molecule-info/in.h5").rename(d / "molecule_info.h5")


def from_zero(rows):
    return [f"{int(g) - 1} {int(c) - 1} {v}" for g, c, v in (row.split() for row in rows)]


def parse(d):
    (d / "in").mkdir()
    for name in ("count_matrix.mtx", "all_genes.csv", "cell_metadata.csv"):
        (d / "in" / name).write_text("x")
    return d / "in"


def deeper(d, *folders):
    for folder in folders:
        make.mtx(d / "in" / folder, make.cells().X, make.lines())
    return d / "in"


def several_outs(d):
    for sample in ("S1", "S2"):
        folder = d / "in/outs/per_sample_outs" / sample / "count"
        folder.mkdir(parents=True)
        make.tenx(folder / "sample_filtered_feature_bc_matrix.h5", make.cells().X, IDS, NAMES)
    return d / "in"


def peaks(d):
    folder = mtx(d)
    (folder / "features.tsv.gz").rename(folder / "peaks.bed")
    return folder


def in_gzip_again(d):
    folder = mtx(d)
    for path in folder.iterdir():
        path.write_bytes(gzip.compress(path.read_bytes()))
    return folder


def in_bzip2(d):
    folder = mtx(d)
    (folder / "matrix.mtx.gz").rename(folder / "matrix.mtx.bz2")
    return folder


def alevin(d):
    for name in ("quants_mat.gz", "quants_mat_rows.txt", "quants_mat_cols.txt"):
        (d / "in").mkdir(exist_ok=True)
        (d / "in" / name).write_bytes(gzip.compress(b"0"))
    return d / "in"


def pandas_hdf(d):
    with h5py.File(d / "in.h5", "w") as f:  # as pandas writes it, with pytables
        f.create_group("counts").attrs["pandas_type"] = np.bytes_("frame")
    return d / "in.h5"


def empty_then_logged():
    a = make.cells(n=200)
    a.X = sparse.vstack([sparse.csr_matrix((100, 300), dtype=np.float32), make.logged(a[100:])], format="csr")
    return a


def nested(d):
    zarr = pytest.importorskip("zarr")
    zarr.open_group(d / "outer.zarr", mode="w", zarr_format=2)
    make.cells().write_zarr(d / "outer.zarr/sample1")
    return d / "outer.zarr"


REFUSED = {
    "X is none, a layer holds counts": (layer_alone, r"layer = 'X': not in the file; it has raw counts: --set sources\.layer='raw counts'"),
    "annotations alone": (lambda d: h5ad(ad.AnnData(obs=make.cells().obs, obsm={"X_pca": np.ones((60, 3), "f4")}), d), r"AnnData without a matrix of cells and genes \(it holds obs, obsm.*\)"),
    "MuData": (lambda d: mudata(d, "in.h5mu"), r"MuData with the modalities prot, rna; take one: .*\['rna'\]"),
    "MuData called .h5ad": (lambda d: mudata(d, "in.h5ad"), r"MuData with the modalities prot, rna"),
    "a folder of Visium": (outs, r"give the one of cells: .*/in/filtered_feature_bc_matrix\.h5"),
    "a run of Cell Ranger": (lambda d: outs(d, "outs"), r"give the one of cells: .*/in/outs/filtered_feature_bc_matrix\.h5"),
    "antibodies alone": (lambda d: tenx(d, types="Antibody Capture"), r"no feature is of the kind Gene Expression \(feature_type: Antibody Capture\)"),
    "a table in spaces": (lambda d: saved(d, "in.txt", lambda to: table().to_csv(to, sep=" ")), r"a space-separated table; convert it: .*read_text\('in\.txt'\)"),
    "a table in semicolons": (lambda d: saved(d, "in.csv", lambda to: table().to_csv(to, sep=";")), r"a semicolon-separated table; .*delimiter=';'"),
    "a table in gzip": (lambda d: saved(d, "in.csv.gz", lambda to: table().to_csv(to)), r"a comma-separated table; .*read_csv\('in\.csv\.gz'\)"),
    "Parquet": (lambda d: saved(d, "in.parquet", lambda to: table().to_parquet(to)), r"a Parquet table; convert it: .*read_parquet\('in\.parquet'\)"),
    "Feather": (lambda d: saved(d, "in.feather", lambda to: table().to_feather(to)), r"a Feather table; convert it: .*read_feather\('in\.feather'\)"),
    "a pickle": (lambda d: saved(d, "in.pkl", lambda to: table().to_pickle(to)), r"a pickle of Python, which is not opened"),
    "NumPy": (lambda d: saved(d, "in.npz", lambda to: sparse.save_npz(to, make.cells().X)), r"arrays of NumPy \(\.npz\), without names of genes"),
    "Excel": (lambda d: zipped(d, "in.xlsx", {"[Content_Types].xml": "", "xl/workbook.xml": ""}), r"an Excel table; convert it: .*read_excel\('in\.xlsx'"),
    "zip": (lambda d: zipped(d, "in.zip", {"x.h5ad": "x"}), r"a zip archive \(it holds x\.h5ad\); run: unzip in\.zip"),
    "tar": (lambda d: packed(d, "GSE1_RAW.tar", "w"), r"a tar archive; run: tar -xf GSE1_RAW\.tar"),
    "tar in gzip": (lambda d: packed(d, "in.tar.gz", "w:gz"), r"a tar archive; run: tar -xf in\.tar\.gz"),
    "gzip of an h5ad": (lambda d: written(d, "in.h5ad.gz", gzip.compress(h5ad(make.cells(), d).read_bytes())), r"HDF5 in gzip; run: gunzip in\.h5ad\.gz"),
    "an archive of a folder of Zarr": (zarr_in_a_folder, r"lies in the folder x\.zarr of the archive"),
    "features in UTF-8 that is none": (latin_features, r"features\.tsv\.gz: text that is not UTF-8"),
    "a symmetric matrix": (lambda d: mtx(d, head=ROWS.replace("general", "symmetric")), r"of the kind 'symmetric'"),
    "a pattern": (lambda d: mtx(d, head=ROWS.replace("integer", "pattern"), line="{g} {c}"), r"of the kind 'pattern'"),
    "numbers from 0": (lambda d: mtx(d, change=from_zero), r"an entry of gene or cell 0: Matrix Market counts from 1"),
    "log2": (lambda d: h5ad(logged(2), d), r"log-normalised \(every cell sums to 10,000\): give raw counts"),
    "log2 of some genes": (lambda d: h5ad(logged(2, genes=120), d), r"log-normalised: give raw counts"),
    "log10": (lambda d: h5ad(logged(10), d), r"log-normalised \(every cell sums to 10,000\)"),
    "fractions of many counts": (lambda d: h5ad(with_values(lambda v: 40 * v * (1 - 0.05 * np.random.default_rng(0).random(len(v)))), d), r"fractions of counts .*--set sources\.round=true"),
    "not a number": (lambda d: h5ad(with_values(lambda v: np.where(np.arange(len(v)) == 77, np.nan, v)), d), r"count nan of cell cell\d+ \(row \d+\), gene ENSG\d+ is not a finite number"),
    "negative int8": (lambda d: h5ad(with_values(lambda v: (40 * v).astype(int).astype(np.int8), np.int8), d), r"count -\d+ of cell cell000 .* is negative"),
    "two references": (lambda d: h5ad(barnyard("hg19_", "mm10___"), d), r"genes of 2 references \(hg19: 300, mm10: 300\)"),
    "genes in rows": (lambda d: h5ad(swapped(), d), r"the names of the cells are genes: cells stand in columns; turn it round \(adata\.T\)"),
    "transcripts": (lambda d: h5ad(named([i.replace("ENSG", "ENST") + ".1" for i in IDS]), d), r"they are ids of transcripts"),
    "ids of NCBI Gene": (lambda d: h5ad(named([str(1_000 + k) for k in range(300)]), d), r"bare numbers \(rows, or ids of NCBI Gene\)"),
    "no counts at all": (lambda d: h5ad(with_values(lambda v: 0 * v), d), r"every count is 0"),
    "no cells": (lambda d: h5ad(make.cells()[:0].copy(), d), r"empty \(0 cells x 300 genes\)"),
    "no genes": (lambda d: h5ad(make.cells()[:, :0].copy(), d), r"empty \(60 cells x 0 genes\)"),
    "a column of two dimensions": (lambda d: h5ad(make.cells(), d, lambda f: obs_column(f, "two", np.ones((60, 2)))), r"obs column 'two': .* --set sources\.obs="),
    "a column of complex numbers": (lambda d: h5ad(make.cells(), d, lambda f: obs_column(f, "z", np.ones(60, complex))), r"obs column 'z': .* --set sources\.obs="),
    "half a matrix": (half, r"truncated or damaged"),
    "a link to nothing": (lambda d: saved(d, "in.h5ad", lambda to: to.symlink_to(d / "gone.h5ad")), r"no such file"),
    "a parse of Cell Ranger's molecules": (molecules, r"molecule table of Cell Ranger.* filtered_feature_bc_matrix\.h5"),
    "words for entries": (lambda d: mtx(d, change=lambda rows: [*rows[:9], "NA NA NA", *rows[10:]]), r"matrix\.mtx\.gz: a line that is not gene, cell and count \(.*'NA'"),
    "an entry of two numbers": (lambda d: mtx(d, change=lambda rows: [*rows[:9], "1 1", *rows[10:]]), r"matrix\.mtx\.gz: a line that is not gene, cell and count"),
    "an empty matrix": (lambda d: written(mtx(d), "matrix.mtx.gz", b"").parent, r"matrix\.mtx\.gz: an empty file; fetch it again"),
    "nan in a matrix": (lambda d: mtx(d, change=lambda rows: [*rows[:9], "1 1 nan", *rows[10:]]), r"count nan of cell AAAC0+-1 \(row 0\)"),
    "whole numbers but for errors": (lambda d: h5ad(with_values(lambda v: v + 1e-6, np.float64), d), r"fractions of counts .*--set sources\.round=true"),
    "Parse Biosciences": (parse, r"output of Parse Biosciences' pipeline; give the anndata\.h5ad"),
    "a single gene": (lambda d: h5ad(make.cells()[:, :1].copy(), d), r"only 1 of 1 genes are known .*: the file has no others"),
    "a folder of Cell Ranger 2": (lambda d: deeper(d, "hg19"), r"give .*/in/hg19"),
    "a run of STARsolo": (lambda d: deeper(d, "Solo.out/Gene/raw", "Solo.out/Gene/filtered"), r"; give .*/in/Solo\.out/Gene/filtered$"),
    "several samples of Cell Ranger": (several_outs, r"\(2 of them\); give .*/S1/count/sample_filtered_feature_bc_matrix\.h5 or .*/S2/count/"),
    "comments before a table": (lambda d: written(d, "S_RSEC_MolsPerCell.csv", b"## BD\n## v2\n" + table().to_csv().encode()), r"a table below lines of comments \(2\); convert it: .*comment='#'.*sep=','"),
    "peaks in a folder": (peaks, r"peaks of ATAC-seq \(peaks\.bed\)"),
    "peaks in an h5": (lambda d: tenx(d, types="Peaks"), r"no feature is of the kind Gene Expression \(feature_type: Peaks\)"),
    "fragments": (lambda d: written(d, "fragments.tsv.gz", gzip.compress(b"# id=x\nchr1\t10\t90\tAAAC-1\t2\n")), r"regions of a genome \(fragments or peaks"),
    "gzip twice": (in_gzip_again, r"features\.tsv\.gz: packed with gzip twice; run: gunzip features\.tsv\.gz"),
    "bzip2": (in_bzip2, r"packed in another way than gzip \(matrix\.mtx\.bz2\); unpack"),
    "alevin before alevin-fry": (alevin, r"the binary matrix of alevin"),
    "a table of pandas in HDF5": (pandas_hdf, r"a table of pandas; convert it: .*read_hdf\('in\.h5', 'counts'\)"),
    "BAM": (lambda d: written(d, "x.bam", gzip.compress(b"BAM\x01" + bytes(99))), r"reads of a sequencer, not counts"),
    "FASTQ": (lambda d: written(d, "x.fastq.gz", gzip.compress(b"@r1\nACGT\n+\nFFFF\n")), r"reads of a sequencer, not counts"),
    "an old pickle": (lambda d: written(d, "in.pkl", pickle.dumps({}, protocol=2)), r"a pickle of Python, which is not opened"),
    "a pointer of DVC": (lambda d: written(d, "in.h5ad", b"outs:\n- md5: a304\n  path: in.h5ad\n"), r"a pointer of DVC.* dvc pull"),
    "an answer of a server": (lambda d: written(d, "in.h5ad", b'{"message": "Not Found"}'), r"a text of JSON"),
    "UTF-16": (lambda d: written(d, "in.csv", table().to_csv().encode("utf-16")), r"a text in UTF-16"),
    "a dense Matrix Market file": (lambda d: mtx(d, head=ROWS.replace("coordinate", "array")), r"its first line must be '%%MatrixMarket matrix coordinate"),
    "numbers above 2**63": (lambda d: h5ad(make.cells(), d, lambda f: obs_column(f, "hash", np.arange(60, dtype="u8") + np.uint64(2**63))), r"obs column 'hash': .* above 2\*\*63 - 1"),
    "spliced and unspliced layers alone": (velocity, r"it has spliced, unspliced: --set sources\.layer=spliced"),
    "logarithms in X, raw with more genes": (raw_of_all_genes, r"X is already log-normalised \(every cell sums to 10,000\); raw holds counts: --set sources\.layer=raw"),
    "transcripts per million": (lambda d: h5ad(with_sums(1e6, lambda v: v), d), r"already normalised \(every cell sums to 1,000,000\)"),
    "square roots": (lambda d: h5ad(with_values(np.sqrt), d), r"X holds square roots of counts: give raw counts"),
    "empty cells, then logarithms": (lambda d: h5ad(empty_then_logged(), d), r"cell cell100 .* X is already log-normalised"),
    "two species by their names": (lambda d: h5ad(barnyard("human_", "mouse_"), d), r"genes of 2 references \(human: 300, mouse: 300\)"),
    "ids of HGNC": (lambda d: h5ad(named([f"HGNC:{1_000 + k}" for k in range(300)]), d), r"ids of another database: name the column of var .* \(--set sources\.genes=COLUMN\)"),
    "a Zarr group of samples": (nested, r"a Zarr group with AnnData in it; give .*/outer\.zarr/sample1"),
}  # fmt: skip


def said_of(outcome):
    progress = r"(prepare|vocabulary|corpus): |\d"
    return [line for line in outcome.lines if not re.match(progress, line)]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    return run_prepare(folder / "run", f"human={h5ad(make.cells(), folder)}")


def prepared(make_file, tmp_path, settings=None):
    (tmp_path / "files").mkdir()
    path = make_file(tmp_path / "files")
    return path, run_prepare(tmp_path / "run", f"human=in={path}", **(settings or {}))


@pytest.mark.parametrize("name", READ)
def test_the_good_cells_are_read(name, good, tmp_path):
    make_file, said, *settings = READ[name]
    _, found = prepared(make_file, tmp_path, *settings)
    assert (found.code, found.sums) == (0, GOOD), found.lines
    assert found.sentences == good.sentences
    lines = said_of(found)
    assert len(lines) == bool(said), lines
    assert re.search(said, "".join(lines)), lines


@pytest.mark.parametrize("name", DOUBTED)
def test_what_is_doubtful_is_read_and_said(name, tmp_path):
    make_file, (cells, counts), said = DOUBTED[name]
    _, found = prepared(make_file, tmp_path)
    assert (found.code, *found.sums[:2]) == (0, cells, counts), found.lines
    assert re.search(said, "\n".join(found.lines)), found.lines


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_one_line_with_the_way_out(name, tmp_path):
    make_file, said = REFUSED[name]
    path, found = prepared(make_file, tmp_path)
    assert found.code == 2, found.lines
    assert re.search(said, "\n".join(found.lines)), found.lines
    assert "\n" not in found.error
    assert not re.search(r"KeyError|ArrowInvalid|CSV parse|TypeError|ValueError|Traceback", found.error), found.error
    assert path.name in found.error or name == "no counts at all"


@pytest.mark.parametrize(
    ("option", "way"), [("--{field} {value}", "--layer 'raw counts'"), ("{field}={value!r}", "layer='raw counts'")]
)
def test_a_layer_is_named_in_the_spelling_of_the_command(option, way, tmp_path):
    path = layer_alone(tmp_path)
    with pytest.raises(UserError, match=re.escape(f"it has raw counts: {way}")), open_reader(str(path), option=option):
        pass


CONVERTED = {
    "comma": lambda d: saved(d, "in.csv", lambda to: table().to_csv(to)),
    "semicolon": lambda d: saved(d, "in.csv", lambda to: table().to_csv(to, sep=";")),
    "tab in gzip": lambda d: saved(d, "in.tsv.gz", lambda to: table().to_csv(to, sep="\t")),
    "space": lambda d: saved(d, "in.txt", lambda to: table().to_csv(to, sep=" ")),
    "comments": lambda d: written(d, "in.csv", b"## BD\n" + table().to_csv().encode()),
    "R": lambda d: saved(d, "in.tsv", lambda to: to.write_text(table().to_csv(sep="\t").removeprefix("\t"))),
    "Parquet": lambda d: saved(d, "in.parquet", lambda to: table().to_parquet(to)),
    "Feather": lambda d: saved(d, "in.feather", lambda to: table().to_feather(to)),
}  # fmt: skip


@pytest.mark.parametrize("name", CONVERTED)
def test_the_command_of_a_refusal_makes_a_file_that_is_read(name, good, tmp_path, monkeypatch):
    (tmp_path / "files").mkdir()
    path = CONVERTED[name](tmp_path / "files")
    line = run_prepare(tmp_path / "no", f"human={path}").error
    monkeypatch.chdir(tmp_path / "files")
    _, option, code = shlex.split(re.search(r'python -c "[^"]*"', line).group())
    assert option == "-c"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(code, {})  # what the user is told to run
    found = run_prepare(tmp_path / "run", f"human={tmp_path / 'files/in.h5ad'}")
    assert (found.code, found.sums, found.sentences) == (0, GOOD, good.sentences), found.lines


def test_a_file_that_another_program_writes_to_is_said_to_be_that(tmp_path):
    path = h5ad(make.cells(), tmp_path)
    code = f"import h5py, sys; f = h5py.File({str(path)!r}, 'r+'); print('open', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"open\n"
    found = run_prepare(tmp_path / "run", f"human={path}")
    other.communicate(b"")
    assert "another program writes to it: close it there" in found.error
    assert run_prepare(tmp_path / "again", f"human={path}").code == 0


def test_a_web_address_is_downloaded_first(tmp_path):
    found = run_prepare(tmp_path, "human=https://127.0.0.1:9/in.h5ad")
    assert (found.code, found.error.endswith("download the file first (curl -LO URL), and give its path")) == (2, True)


def test_no_rounding_makes_counts_of_square_roots(tmp_path):
    path = h5ad(with_values(np.sqrt), tmp_path)
    assert run_prepare(tmp_path / "run", f"human={path}", sources__round="true").code == 2


def test_the_matrices_of_two_genomes_are_not_confused(tmp_path):
    with h5py.File(tmp_path / "in.h5", "w") as f:
        for genome, species in (("hg19", "human"), ("mm10", "mouse")):
            x, (ids, names) = make.cells(species=species, seed=len(species)).X.astype(np.int32), make.genes(species)
            g = f.create_group(genome)
            g["barcodes"] = make.text([f"A{k}-1" for k in range(60)])
            g["data"], g["indices"], g["indptr"] = x.data, x.indices.astype("i8"), x.indptr.astype("i8")
            g["shape"], g["genes"], g["gene_names"] = np.array([300, 60]), make.text(ids), make.text(names)
    for genome, species in (("hg19", "human"), ("mm10", "mouse")):
        with open_reader(str(tmp_path / "in.h5"), genome) as reader:
            (block,) = reader.read(0, 60, 60)
            assert reader.gene_names("").tolist() == make.genes(species)[0]
            assert block.data.sum() == make.cells(species=species, seed=len(species)).X.sum()


@pytest.mark.parametrize(
    ("names", "genes"),
    [
        (["S1_matrix.mtx", "S1_barcodes.tsv", "GSE9_features.tsv"], "GSE9_features.tsv"),
        (["S1_matrix.mtx", "S1_barcodes.tsv", "S1_features.tsv", "GSE9_features.tsv"], "S1_features.tsv"),
        (["S1_matrix.mtx", "S1_barcodes.tsv", "S2_matrix.mtx", "S2_features.tsv"], ""),  # of another sample
        (["S1_matrix.mtx", "S1_barcodes.tsv", "a_features.tsv", "b_features.tsv"], ""),
    ],
)
def test_the_file_of_genes_of_a_sample_is_its_own_or_the_only_one_of_none(names, genes):
    assert set(mtx_files("S1_matrix.mtx", names)) == {"S1_matrix.mtx", "S1_barcodes.tsv", *filter(None, [genes])}


def test_the_only_category_of_a_file_of_2018_is_read(tmp_path):
    x = make.cells(n=12).X.toarray()
    kinds = [("index", "S8"), ("cell_type", "i1")]
    with h5py.File(tmp_path / "in.h5ad", "w") as f:
        f["X"] = x
        f["obs"] = np.array([(f"c{k}".encode(), 0) for k in range(12)], dtype=kinds)
        f["var"] = np.array([(n.encode(),) for n in IDS], dtype=[("index", "S20")])
        f["uns/cell_type_categories"] = "alpha cell"
    with open_reader(str(tmp_path / "in.h5ad")) as reader:
        assert reader.obs("cell_type", 0, 12).tolist() == ["alpha cell"] * 12


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("uri", ["ftp://127.0.0.1/in.h5ad", "sftp://host/in.h5ad", "nonsense://x/in.h5ad"])
def test_a_storage_that_is_not_known_is_one_line(uri, tmp_path):
    found = run_prepare(tmp_path, f"human={uri}")
    assert found.code == 2
    assert f"{uri.partition(':')[0]}:// is not a known storage: use a local path or s3://" in found.error


def test_columns_of_a_frame_without_a_list_of_them_are_read(tmp_path):
    a = make.cells()
    with open_reader(str(h5ad(a, tmp_path, without_order))) as reader:
        assert sorted(reader.obs_columns) == ["cell_type", "donor"]
        assert reader.obs("donor", 0, 60).tolist() == a.obs["donor"].tolist()


def test_rounding_is_offered_where_the_command_has_it(tmp_path):
    path = h5ad(with_values(lambda v: v + 0.3), tmp_path)
    columns = identify_columns(IDS, gene_lookup(HUMAN), biotypes=())
    for option, way in (
        (OPTION, "--set sources.round=true"),
        ("--{field} {value}", "round them in the file first (numpy.rint)"),
    ):
        with open_reader(str(path), option=option) as reader, pytest.raises(UserError, match=re.escape(way)):
            list(read_blocks(reader, columns, 0, 60, rows=60))


@pytest.mark.parametrize("memory", [False, True])
def test_antibodies_in_raw_are_known_by_var_on_disk_and_in_memory(memory, tmp_path):
    path = raw_cite(tmp_path)
    with open_cells(ad.read_h5ad(path) if memory else path, "raw") as reader:
        assert reader.is_gene.tolist() == [True] * 300 + [False] * 6
        assert set(reader.kinds[300:]) == {"Antibody Capture"}

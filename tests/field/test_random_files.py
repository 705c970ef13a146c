"""What mixgf reads is what anndata reads: random valid AnnData files over layouts, encodings, types and spellings of genes.

`python tests/field/test_random_files.py N` tries N files and prints how many of each layout were tried.
"""

import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

from mixgf.cells import counts
from mixgf.cells.features import identify_genes
from mixgf.cells.open import open_reader
from mixgf.config.data import HUMAN
from mixgf.genes import identify
from tests.field import make_cases

TRIED = Counter()
CONTAINERS = ("h5ad", "zarr 2", "zarr 3")
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x00", exclude_categories=("Cs", "Cc")), max_size=12)
NAMES = st.text(
    st.characters(codec="ascii", categories=("L", "N"), include_characters=" .-_()%"), min_size=1, max_size=10
).filter(lambda name: name.strip(" .") and name not in ("_index", "index"))
SPELLINGS = {
    "id": lambda gene, symbol: gene,
    "version": lambda gene, symbol: f"{gene}.7",
    "symbol": lambda gene, symbol: symbol,
    "prefix": lambda gene, symbol: f"GRCh38_{symbol}",
    "prefixed id": lambda gene, symbol: f"hg38_{gene}",
    "joined": lambda gene, symbol: f"{symbol}_{gene}",
    "dots": lambda gene, symbol: symbol.replace("-", "."),
    "quotes": lambda gene, symbol: f'"{symbol}"',
}
KINDS = ("category", "numbers category", "text", "int", "float", "bool", "Int64", "boolean", "string", "gaps")


def column(kind, texts, whole, gap):
    """A column of a kind from some texts, whole numbers and flags."""
    words = [texts[i % len(texts)] for i in whole]
    missing = [None if g else v for g, v in zip(gap, whole, strict=True)]
    words_missing = [None if g else v for g, v in zip(gap, words, strict=True)]
    make = {
        "category": lambda: pd.Categorical(words_missing, categories=texts),
        "numbers category": lambda: pd.Categorical([v % 3 for v in whole]),
        "text": lambda: words,
        "int": lambda: np.asarray(whole, np.int64),
        "float": lambda: np.asarray(whole, np.float64) / 7,
        "bool": lambda: np.asarray(gap),
        "Int64": lambda: pd.array(missing, dtype="Int64"),
        "boolean": lambda: pd.array([None if v is None else v % 2 == 0 for v in missing], dtype="boolean"),
        "string": lambda: pd.array(words_missing, dtype="string"),
        "gaps": lambda: np.where(gap, np.nan, np.asarray(whole, np.float64)),
    }
    return make[kind]()


@st.composite
def columns(draw, num):
    """Columns of obs of every kind that AnnData writes."""
    out = {}
    for name in draw(st.lists(NAMES, max_size=5, unique_by=str.lower)):
        kind = draw(st.sampled_from(KINDS))
        texts = draw(st.lists(TEXTS, min_size=1, max_size=4, unique=True))
        whole = draw(st.lists(st.integers(-(2**40), 2**40), min_size=num, max_size=num))
        gap = draw(st.lists(st.booleans(), min_size=num, max_size=num))
        out[name] = column(kind, texts, whole, gap)
    return out


@st.composite
def files(draw):
    """How a file is written, and its AnnData."""
    num, genes = draw(st.integers(1, 25)), draw(st.integers(10, 24))
    x = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).negative_binomial(0.6, 0.2, (num, genes))
    dtype = draw(st.sampled_from(["f4", "f8", "i4", "i8", "u2", "u4", "i2", "f2"]))
    form = draw(st.sampled_from(["csr", "csc", "dense"]))
    matrix = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray}[form](
        x.astype("f4" if dtype == "f2" else dtype)
    )
    ids, symbols = make_cases.genes()
    spelling = draw(st.sampled_from(list(SPELLINGS)))
    names = [SPELLINGS[spelling](g, s) for g, s in zip(ids[:genes], symbols[:genes], strict=True)]
    index = [f"c{i}-{draw(TEXTS)}" for i in range(num)]
    kind = draw(st.sampled_from(["str", "string", "category"]))
    place = draw(st.sampled_from(["index", "ensembl_id", "gene_ids"]))
    var = (
        pd.DataFrame(index=names)
        if place == "index"
        else pd.DataFrame({place: names}, index=[f"g{i}" for i in range(genes)])
    )
    a = ad.AnnData(matrix, obs=pd.DataFrame(draw(columns(num)), index=pd.Index(index, dtype=object)), var=var)
    if kind == "string":
        a.obs.index, a.var.index = a.obs.index.astype("string"), a.var.index.astype("string")
    layer = draw(st.sampled_from(["X", "raw", "my layer"]))
    if layer == "raw":
        a.raw = a.copy()
    elif layer != "X":
        a.layers[layer] = a.X.copy()
    container = draw(st.sampled_from(CONTAINERS))
    options = {"compression": draw(st.sampled_from([None, "gzip", "lzf"]))} if container == "h5ad" else {}
    changes = (
        draw(st.sets(st.sampled_from(["old categories", "big endian", "bytes", "chunks"])))
        if container == "h5ad"
        else set()
    )
    tried = {
        "container": container,
        "form": form,
        "dtype": dtype,
        "spelling": spelling,
        "index": kind,
        "layer": layer,
        "names": place,
    }
    return a, ids[:genes], layer, container, options, changes, tried


def write(a, folder, container, options):
    path = folder / ("in.h5ad" if container == "h5ad" else "in.zarr")
    with ad.settings.override(allow_write_nullable_strings=True, zarr_write_format=2 if container == "zarr 2" else 3):
        if container == "h5ad":
            a.write_h5ad(path, **options)
        else:
            a.write_zarr(path)
    return path


def change(path, changes, layer):
    """The same content in the layouts of other writers and machines."""
    where = {"X": "X", "raw": "raw/X"}.get(layer, f"layers/{layer}")
    if "old categories" in changes:
        make_cases.old_categories(path)
    with h5py.File(path, "r+") as f:
        if isinstance(f[where], h5py.Group):
            for name in ("data", "indices", "indptr"):
                values = f[where][name][:]
                del f[where][name]
                order = ">" if "big endian" in changes else "="
                chunked = {"chunks": (7,), "maxshape": (None,)} if "chunks" in changes and len(values) else {}
                f[where].create_dataset(name, data=values.astype(values.dtype.newbyteorder(order)), **chunked)
        if "bytes" in changes:
            index = f["obs"].attrs["_index"]
            if isinstance(f["obs"][index], h5py.Dataset):
                values = np.array([v.encode() for v in f["obs"][index].asstr()[:]], dtype=h5py.string_dtype("ascii"))
                values = np.array([bytes(v) for v in values])
                if all(v.isascii() and not v.endswith(b"\x00") for v in values):
                    del f["obs"][index]
                    f["obs"][index] = values


def plain(values):
    return [None if v is None or (not isinstance(v, str) and pd.isna(v)) else v for v in values]


def expected(column):
    """A column of pandas as mixgf reads it: numbers stay numbers, everything else is text, a gap is None."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        numeric = pd.api.types.is_numeric_dtype(column.cat.categories.dtype)
        return plain(
            column.astype(object) if numeric else [None if pd.isna(v) else str(v) for v in column.astype(object)]
        )
    if pd.api.types.is_bool_dtype(column.dtype) or pd.api.types.is_numeric_dtype(column.dtype):
        return [None if pd.isna(v) else int(v) if isinstance(v, bool | np.bool_) else v for v in column.astype(object)]
    return [None if pd.isna(v) else str(v) for v in column.astype(object)]


def check(made):
    a, genes, layer, container, options, changes, tried = made
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = write(a, Path(folder), container, options)
        known = ad.read_h5ad(path) if container == "h5ad" else ad.read_zarr(path)
        if changes:
            change(path, changes, layer)
        matrix = known.raw.X if layer == "raw" else known.X if layer == "X" else known.layers[layer]
        matrix = matrix.toarray() if sparse.issparse(matrix) else np.asarray(matrix)
        with open_reader(str(path), layer) as reader:
            assert (reader.num_rows, reader.num_columns) == matrix.shape
            assert reader.cell_names(0, reader.num_rows).tolist() == known.obs_names.astype(str).tolist()
            assert reader.obs_columns == list(known.obs.columns)
            for name in known.obs.columns:
                assert plain(reader.obs(name, 0, reader.num_rows).tolist()) == expected(known.obs[name]), name
            found, _ = identify_genes(reader, identify.gene_lookup(HUMAN))
            assert found["gene"].to_pylist() == genes
            blocks = [
                sparse.csr_matrix(
                    (b.data.copy(), b.indices.copy(), b.indptr.copy()), (len(b.indptr) - 1, len(genes))
                ).toarray()
                for b in counts.read_blocks(reader, found, 0, reader.num_rows, rows=4)
            ]
            np.testing.assert_array_equal(np.vstack(blocks), matrix)
    TRIED.update(f"{name} {value}" for name, value in tried.items())
    TRIED.update(f"layout {one}" for one in changes)


def tries(number):
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]
    return settings(max_examples=number, deadline=None, derandomize=True, database=None, suppress_health_check=quiet)


@tries(40)
@given(files())
def test_what_is_read_is_what_anndata_reads(made):
    check(made)


@pytest.mark.slow
@tries(2_000)
@given(files())
def test_what_is_read_is_what_anndata_reads_in_many_files(made):
    check(made)


if __name__ == "__main__":
    tries(int(sys.argv[1]))(given(files())(check))()
    lines = [f"{name:<24}{number:>7,}" for name, number in sorted(TRIED.items())]
    sys.stdout.write("\n".join([f"{sum(TRIED[f'container {name}'] for name in CONTAINERS):,} files", *lines, ""]))

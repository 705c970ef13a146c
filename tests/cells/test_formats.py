"""Laws of formats: what a file is shows in its content; every layout of AnnData gives what anndata reads; the rest is one line."""

import bz2
import gzip
import io
import shutil

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from scipy import sparse

from mixgf.cells import open as opening
from mixgf.cells import zarr_store
from mixgf.cells.counts import read_blocks
from mixgf.cells.open import open_reader
from mixgf.config.run import Config
from mixgf.corpus.anndata import open_cells
from mixgf.errors import UserError
from mixgf.genes import identify

N, G = 31, 12


@pytest.fixture(autouse=True)
def nullable_strings():
    with anndata.settings.override(allow_write_nullable_strings=True):
        yield


@pytest.fixture
def counts():
    x = np.random.default_rng(3).negative_binomial(0.5, 0.2, (N, G)).astype(np.float32)
    x[[0, 7, N - 1]] = 0
    return x


def adata_of(x):
    """Every kind of matrix and of obs column."""
    k = np.arange(len(x))
    obs = {
        "type": pd.Categorical(np.where(k % 5 == 2, None, np.asarray(["alpha", "beta", "δ-cell"], object)[k % 3])),
        "code": pd.Categorical(5 + 2 * (k % 2)),
        "text": [f"t{i}" for i in k],
        "whole": k.astype(np.int8),
        "share": (k / 7).astype(np.float32),
        "flag": k % 2 == 0,
        "gaps": pd.array([None if i % 4 == 1 else int(i) for i in k], dtype="Int64"),
        "maybe": pd.array([None if i % 4 == 1 else bool(i % 2) for i in k], dtype="boolean"),
        "nullable": pd.array([None if i % 4 == 1 else f"n{i}" for i in k], dtype="string"),
    }
    var = pd.DataFrame({"ensembl_id": [f"ENSG{i:011d}" for i in range(G)]}, index=[f"Gen{i}" for i in range(G)])
    a = anndata.AnnData(sparse.csr_matrix(x), obs=pd.DataFrame(obs, index=[f"c{i}" for i in k]), var=var)
    a.layers["csc"], a.layers["dense"], a.raw = sparse.csc_matrix(x), x, a.copy()
    return a


def write(a, path, form):
    """The AnnData in a layout; returns its URI."""
    if form == "h5ad":
        a.write_h5ad(path / "cells.h5ad", compression="gzip")
        return str(path / "cells.h5ad")
    to = path / "cells.zarr"
    if form == "zarr sharded":
        write_sharded(a, zarr.open_group(to, mode="w", zarr_format=3))
    else:
        with anndata.settings.override(zarr_write_format=2 if form == "zarr 2" else 3):
            a.write_zarr(to)
    if form == "zarr zip":
        shutil.make_archive(str(path / "cells.zarr"), "zip", to)
        return f"{to}.zip"
    return str(to)


def write_sharded(a, group, key="/"):
    """As annbatch writes a data set: sparse matrices in many chunks per shard, and the smallest types of indices."""

    def callback(function, store, name, elem, dataset_kwargs, *, iospec):
        if iospec.encoding_type in ("csr_matrix", "csc_matrix"):
            dataset_kwargs = {**dataset_kwargs, "chunks": (10,), "shards": (40,)}
        function(store, name, elem, dataset_kwargs=dataset_kwargs)

    with anndata.settings.override(zarr_write_format=3, write_csr_csc_indices_with_min_possible_dtype=True):
        anndata.experimental.write_dispatched(group, key, a, callback=callback)
    zarr.consolidate_metadata(group.store)


FORMS = ["h5ad", "zarr 2", "zarr 3", "zarr sharded", "zarr zip"]


def read_rows(reader, start=0, stop=N, rows=4):
    parts = [
        sparse.csr_array((b.data.copy(), b.indices.copy(), b.indptr), shape=(len(b.indptr) - 1, reader.num_columns))
        for b in reader.read(start, stop, rows)
    ]
    obs = {name: reader.obs(name, start, stop).tolist() for name in reader.obs_columns}
    return sparse.vstack(parts).toarray(), reader.cell_names(start, stop).tolist(), reader.gene_names("").tolist(), obs


def read_all(uri, layer="X", start=0, stop=N):
    with open_reader(uri, layer) as reader:
        return read_rows(reader, start, stop)


def checked(uri, layer):
    """Counts as `prepare` reads them."""
    with open_reader(uri, layer) as reader:
        known = identify.gene_lookup(Config().species[0])
        columns = identify.identify_columns(reader.gene_names(""), known, biotypes=())
        blocks = [
            sparse.csr_array((b.data, b.indices, b.indptr), shape=(len(b.indptr) - 1, G)).toarray()
            for b in read_blocks(reader, columns, 0, N, rows=9)
        ]
    return np.vstack(blocks)


def plain(values):
    return [None if pd.isna(v) else v for v in values]


def as_read(column):
    """A column of pandas as a reader gives it."""
    values = column.astype(object).where(column.notna(), None).tolist()
    text = any(isinstance(v, str) for v in values)
    return [None if v is None else v if text else float(v) for v in values]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", ["X", "raw", "csc", "dense"])
def test_a_reader_gives_what_anndata_reads(form, layer, counts, tmp_path, monkeypatch):
    monkeypatch.setattr(zarr_store, "WINDOW", 16)  # several windows, of whole chunks
    uri = write(adata_of(counts), tmp_path, form)
    read = anndata.read_h5ad if form == "h5ad" else anndata.read_zarr
    known = read(str(tmp_path / ("cells.h5ad" if form == "h5ad" else "cells.zarr")))
    with open_reader(uri, layer) as reader:
        for start, stop, rows in [(0, N, N), (5, 23, 7), (N - 1, N, 3)]:
            x, cells, genes, obs = read_rows(reader, start, stop, rows)
            assert np.array_equal(x, counts[start:stop])
            assert cells == known.obs_names[start:stop].tolist()
            assert genes == known.var["ensembl_id"].tolist()
            assert list(obs) == known.obs.columns.tolist()
            for name, values in obs.items():
                found = plain(values)
                assert found == as_read(known.obs[name].iloc[start:stop]), name


def test_a_collection_of_annbatch_is_one_source(counts, tmp_path):
    a = adata_of(counts)
    group = zarr.open_group(tmp_path / "all.zarr", mode="w", zarr_format=3)
    for number, rows in (
        (0, slice(0, 9)),
        (1, slice(9, 20)),
        (10, slice(27, N)),
        (2, slice(20, 27)),
    ):  # 10 comes after 2
        write_sharded(a[rows].copy(), group, f"dataset_{number}")
    group.attrs.update({"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0"})
    uri = str(tmp_path / "all.zarr")
    assert opening.format_of(uri) == "annbatch"
    for start, stop in [(0, N), (7, 22), (20, 21)]:
        x, cells, genes, obs = read_all(uri, "X", start, stop)
        assert np.array_equal(x, counts[start:stop])
        assert cells == a.obs_names[start:stop].tolist()
        assert genes == a.var["ensembl_id"].tolist()
        assert plain(obs["type"]) == as_read(a.obs["type"].iloc[start:stop])
    other = a[:3].copy()
    other.var_names = [*a.var_names[1:], "x"]
    other.var["ensembl_id"] = other.var_names
    write_sharded(other, group, "dataset_11")
    with (
        pytest.raises(UserError, match=r"dataset_11: other genes than .*dataset_0; give each data set"),
        open_reader(uri),
    ):
        pass


@pytest.mark.parametrize("array", ["X/data", "X/indices", "X/indptr", "layers/csc/data", "layers/csc/indices"])
def test_a_lost_chunk_of_counts_is_refused_and_not_read_as_zeros(array, counts, tmp_path):
    group = zarr.open_group(tmp_path / "cells.zarr", mode="w", zarr_format=3)
    write_sharded(adata_of(counts + 1), group)
    shards = sorted((tmp_path / "cells.zarr" / array / "c").iterdir())
    shards[len(shards) // 2].unlink()
    with pytest.raises(UserError, match=r"cells\.zarr: .*(not in the store|do not ascend|do not fit)"):
        read_all(str(tmp_path / "cells.zarr"), "csc" if "csc" in array else "X")


@pytest.mark.parametrize("array", ["X/data", "obs/text", "obs/type/codes", "var/ensembl_id"])
def test_damaged_bytes_of_a_store_are_a_refusal(array, counts, tmp_path):
    uri = write(adata_of(counts), tmp_path, "zarr 3")
    chunk = next(p for p in (tmp_path / "cells.zarr" / array / "c").rglob("*") if p.is_file())
    chunk.write_bytes(chunk.read_bytes()[:-7])
    with pytest.raises(UserError, match=r"^.*cells\.zarr: [^\n]*$"):
        read_all(uri)


def test_a_store_that_is_not_finished_is_refused(counts, tmp_path):
    uri = write(adata_of(counts), tmp_path, "zarr 3")
    (tmp_path / "cells.zarr/zarr.json").unlink()
    with pytest.raises(UserError, match=r"without zarr\.json or \.zgroup: an incomplete copy"):
        read_all(uri)


def test_the_format_is_told_by_the_content_not_by_the_name(counts, tmp_path):
    uri = write(adata_of(counts), tmp_path, "h5ad")
    for name in ("cells.h5", "cells.hdf5", "cells.anndata", "cells"):
        shutil.copy(uri, tmp_path / name)
        assert opening.format_of(str(tmp_path / name)) == "h5ad"
        assert np.array_equal(read_all(str(tmp_path / name))[0], counts)
    with h5py.File(uri, "r+") as file:
        del file["X"]
    assert opening.format_of(uri, "csc") == "h5ad"


def test_the_files_of_a_source_are_those_that_are_read(counts, tmp_path):
    uri = write(adata_of(counts), tmp_path, "zarr 3")
    found = opening.source_files(uri)
    assert f"{uri}/X/data/c/0" in found
    assert sum(found.values()) == sum(p.stat().st_size for p in (tmp_path / "cells.zarr").rglob("*") if p.is_file())
    folder = tmp_path / "tenx"
    (folder / "analysis").mkdir(parents=True)
    for name in ("matrix.mtx.gz", "features.tsv.gz", "barcodes.tsv.gz", "README.txt", "analysis/x"):
        (folder / name).write_bytes(b"123")
    assert list(opening.source_files(str(folder))) == [
        f"{folder}/{n}.gz" for n in ("barcodes.tsv", "features.tsv", "matrix.mtx")
    ]
    assert opening.source_files(str(tmp_path / "none.h5ad")) == {}


# layouts of the past


def test_categories_of_anndata_07_are_names(counts, tmp_path):
    uri = write(adata_of(counts), tmp_path, "h5ad")
    known = anndata.read_h5ad(uri).obs
    with h5py.File(uri, "r+") as file:
        for frame in ("obs", "var", "raw/var"):
            group = file[frame]
            if frame != "obs":
                anndata.io.write_elem(group, "kind", pd.Categorical(["p", "q"] * (G // 2)))
                group.attrs["column-order"] = [*group.attrs["column-order"], "kind"]
            store = group.create_group("__categories")
            group.attrs["encoding-version"] = "0.1.0"
            for name in list(group.attrs["column-order"]):
                if isinstance(group[name], h5py.Group) and "codes" in group[name]:
                    codes, names = group[name]["codes"][:], group[name]["categories"][:]
                    del group[name]
                    store.create_dataset(name, data=names)
                    group.create_dataset(name, data=codes).attrs["categories"] = store[name].ref
    for layer in ("X", "raw"):
        with open_reader(uri, layer) as reader:
            assert reader.gene_names("kind").tolist() == ["p", "q"] * (G // 2)
            for name in ("type", "code"):
                found = plain(reader.obs(name, 0, N))
                assert found == as_read(known[name])


def test_codes_outside_the_categories_are_refused(counts, tmp_path):
    uri = write(adata_of(counts), tmp_path, "h5ad")
    with h5py.File(uri, "r+") as file:
        file["obs/type/codes"][4] = 9
    with pytest.raises(UserError, match=r"obs column 'type': cannot be read \(a code of a category is"):
        read_all(uri)


@pytest.mark.parametrize("kind", [">f4", ">i4", "<f2", "<u2", "|b1", ">f8"])
@pytest.mark.parametrize("layer", ["X", "csc", "dense"])
def test_numbers_of_any_machine_are_read(kind, layer, counts, tmp_path):
    x = np.minimum(counts, 1) if kind == "|b1" else counts
    uri = write(adata_of(x), tmp_path, "h5ad")
    with h5py.File(uri, "r+") as file:
        for name in {"X": ["X/data"], "csc": ["layers/csc/data"], "dense": ["layers/dense"]}[layer]:
            values = file[name][:].astype(kind)
            attributes = dict(file[name].attrs)
            del file[name]
            file.create_dataset(name, data=values).attrs.update(attributes)
    found = checked(uri, layer)
    assert np.array_equal(found, x)


def test_a_filter_that_is_not_installed_is_named(counts, tmp_path):
    uri = write(adata_of(counts), tmp_path, "h5ad")
    with h5py.File(uri, "r+") as file:
        del file["X/data"]
        how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        how.set_chunk((50,))
        how.set_filter(32099, h5py.h5z.FLAG_OPTIONAL, ())
        space = h5py.h5s.create_simple((file["X/indices"].shape[0],))
        h5py.h5d.create(file["X"].id, b"data", h5py.h5t.py_create(np.dtype("<f4")), space, how)
    with pytest.raises(UserError, match=r"the HDF5 filter 32099 .* is not installed; run: pip install hdf5plugin, or"):
        read_all(uri)


# genes and other features


@pytest.mark.parametrize("column", ["feature_types", "feature_type", "modality"])
@pytest.mark.parametrize(
    ("gene", "other"),
    [("Gene Expression", "Antibody Capture"), ("Gene Expression", "Peaks"), ("GEX", "ADT"), ("rna", "prot"), ("RNA", "ATAC"),
     ("Gene Expression", "CRISPR Guide Capture"), ("Gene Expression", "Something New"), (None, "Custom"), ("gene", "HTO")],
)  # fmt: skip
@pytest.mark.parametrize("categorical", [False, True])
def test_features_of_other_kinds_are_no_genes(column, gene, other, categorical, counts, tmp_path):  # noqa: PLR0917
    a = adata_of(counts)
    kinds = [other if i % 3 == 0 else gene for i in range(G)]
    a.var[column] = pd.Categorical(kinds) if categorical else pd.Series(kinds, a.var_names).astype(object)
    expected = [i % 3 != 0 for i in range(G)]
    a.write_h5ad(tmp_path / "a.h5ad")
    with open_reader(str(tmp_path / "a.h5ad")) as reader:
        assert reader.is_gene.tolist() == expected
    with open_cells(a, "X") as reader:
        assert reader.is_gene.tolist() == expected


@pytest.mark.parametrize("kinds", [["protein_coding", "lncRNA"], ["", ""], ["chr1", "chr2"]])
def test_a_column_of_biotypes_says_nothing_about_features(kinds, counts, tmp_path):
    a = adata_of(counts)
    a.var["feature_type"] = kinds * (G // 2)  # as CELLxGENE writes it
    a.write_h5ad(tmp_path / "a.h5ad")
    with open_reader(str(tmp_path / "a.h5ad")) as reader:
        assert reader.is_gene is None


@pytest.mark.parametrize("kind", ["Antibody Capture", "Peaks", "CRISPR Guide Capture", "ADT", "HTO"])
def test_a_file_without_rna_is_refused(kind, counts, tmp_path):
    a = adata_of(counts)
    a.var["feature_types"] = kind
    a.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(UserError, match=rf"no feature is of the kind Gene Expression .*{kind}"):
        read_all(str(tmp_path / "a.h5ad"))


@pytest.mark.parametrize("word", ["NA", "NaN", "nan", "None", "N/A", "null", "-", "", "NA.7", "NA-12", "<NA>"])
def test_a_word_for_missing_is_no_gene(word, counts, tmp_path):
    a = adata_of(counts)
    ids = a.var["ensembl_id"].tolist()
    a.var["ensembl_id"] = [word if i % 2 else gene for i, gene in enumerate(ids)]
    a.write_h5ad(tmp_path / "a.h5ad")
    with open_reader(str(tmp_path / "a.h5ad")) as reader:
        assert reader.gene_names("").tolist() == [f"Gen{i}" if i % 2 else gene for i, gene in enumerate(ids)]
    known = identify.gene_lookup(Config().species[0])
    found = identify.identify_columns([word, "INS", "NKX2-1"], known, biotypes=())
    assert found["gene"].to_pylist() == [None, "ENSG00000254647", "ENSG00000136352"]


# what cannot be read


def h5(**groups):
    held = io.BytesIO()
    with h5py.File(held, "w") as file:
        for name, value in groups.items():
            file[name.replace("__", "/").replace("_DOT_", ".")] = value
    return held.getvalue()


REFUSALS = {
    "empty.h5ad": (b"", "an empty file; fetch it again"),
    "pointer.h5ad": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        r"pointer of git-lfs.*git lfs pull --include '\*pointer.h5ad'",
    ),
    "page.h5ad": (b"<!DOCTYPE html><html>404</html>", "a web page, not the file itself"),
    "denied.h5ad": (
        b"<?xml version='1.0'?><Error>AccessDenied</Error>",
        "an XML text, as a server sends it with an error",
    ),
    "cells.csv": (b"cell,INS,GCG\nc0,1,2\n", r"comma-separated table; convert it: python -c .*read_csv\('cells.csv'\)"),
    "cells.csv.gz": (gzip.compress(b"cell,INS,GCG\nc0,1,2\n"), "comma-separated table"),
    "cells.tsv": (b"cell\tINS\tGCG\nc0\t1\t2\n", r"tab-separated table; convert it: .*delimiter='\\t'"),
    "counts.mtx": (
        b"%%MatrixMarket matrix coordinate integer general\n1 1 1\n1 1 5\n",
        r"Matrix Market file alone; put it into a folder",
    ),
    "cells.rds": (
        gzip.compress(b"X\n\x00\x00\x00\x03\x00\x04"),
        "object of R; convert it in R: zellkonverter::writeH5AD",
    ),
    "cells.Rda": (gzip.compress(b"RDX3\nX\n"), "object of R"),
    "xz.rds": (b"\xfd7zXZ\x00\x00", "object of R"),
    "cells.h5ad.bz2": (bz2.compress(b"x"), "a compressed file"),
    "cells.h5ad.gz": (gzip.compress(h5(obs=1)), r"HDF5 in gzip; run: gunzip cells.h5ad.gz"),
    "cells.parquet": (b"PAR1....PAR1", "a Parquet table"),
    "cells.zip": (b"PK\x03\x04....", "a zip archive"),
    "noise.bin": (bytes(range(128, 256)), "not a known format"),
    "note.txt": (b"hello", "a text file, not a known format"),
    "cells.loom": (
        h5(matrix=np.ones((2, 2)), row_attrs__Gene=[1, 2], col_attrs__CellID=[1, 2]),
        r"a loom file; pip install loompy, then .*read_loom\('cells.loom'\)",
    ),
    "cells.h5mu": (
        h5(mod__rna__X=[1], mod__prot__X=[1]),
        r"MuData with the modalities prot, rna; take one: .*\['rna'\]",
    ),
    "cells.h5seurat": (
        h5(assays__RNA=[1], cell_DOT_names=[1]),
        r"an h5seurat file; convert it in R: SeuratDisk::Convert\('cells.h5seurat'",
    ),
    "molecule_info.h5": (h5(barcode_idx=[1], umi=[1]), "molecule table of Cell Ranger.*filtered_feature_bc_matrix.h5"),
    "other.h5": (h5(dataset=[1]), r"HDF5 without a matrix of counts \(it holds dataset\)"),
    "no_var.h5ad": (h5(X=[1], obs__a=[1]), "AnnData without var"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_what_is_no_count_file_is_one_line_with_the_way_out(name, tmp_path):
    content, message = REFUSALS[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as refused:
        read_all(str(tmp_path / name))
    assert str(refused.value).startswith(f"{tmp_path / name}: ")
    assert "\n" not in str(refused.value)


def test_folders_that_hold_no_counts_are_one_line(counts, tmp_path):
    for name, inside, message in (
        (
            "geo",
            ["GSM1_a_matrix.mtx.gz", "GSM1_a_barcodes.tsv.gz"],
            r"no GSM1_a_features.tsv beside GSM1_a_matrix.mtx.gz",
        ),
        ("many", ["a.h5ad", "b.h5ad"], r"a folder of several files; give them by a pattern: .*many/\*.h5ad"),
        ("what", ["x.png"], r"a folder of something else \(it holds x.png\)"),
        ("none", [], "an empty folder"),
    ):
        (tmp_path / name).mkdir()
        for file in inside:
            (tmp_path / name / file).touch()
        with pytest.raises(UserError, match=message):
            read_all(str(tmp_path / name))
    spatial = zarr.open_group(tmp_path / "spatial.zarr", mode="w")
    anndata.io.write_elem(spatial, "tables/table", adata_of(counts))
    with pytest.raises(UserError, match=r"SpatialData; give its table: .*spatial.zarr/tables/table"):
        read_all(str(tmp_path / "spatial.zarr"))
    assert np.array_equal(read_all(str(tmp_path / "spatial.zarr/tables/table"))[0], counts)


def mtx(
    folder,
    *,
    head="%%MatrixMarket matrix coordinate integer general\n%",
    size="3 2 3",
    entries=("1 1 5", "3 1 2", "2 2 7"),
):
    folder.mkdir()
    (folder / "matrix.mtx").write_text("\n".join([head, size, *entries]) + "\n")
    (folder / "features.tsv").write_text("g0\tA\ng1\tB\ng2\tC\n")
    (folder / "barcodes.tsv").write_text("c0\nc1\n")
    return str(folder)


def test_matrix_market_files_are_read_or_refused_by_what_is_in_them(tmp_path):
    good = [[5, 0, 2], [0, 7, 0]]
    for number, change in enumerate((
        {}, {"size": "3\t2\t3", "entries": ("1\t1\t5", "3\t1\t2", "2\t2\t7")}, {"entries": ("1 1 5.0", "3 1 2.0", "2 2 7.0")},
        {"head": "%%\n%"}, {"size": "2 3 3", "entries": ("1 1 5", "1 3 2", "2 2 7")},  # the last: cells in rows
    )):  # fmt: skip
        assert read_all(mtx(tmp_path / f"good{number}", **change), stop=2)[0].tolist() == good
    for number, (change, message) in enumerate((
        ({"entries": ("1 1 5", "3 99 2", "2 2 7")}, r"an entry of cell 99 \(of 2\)"),
        ({"entries": ("1 1 5", "0 1 2", "2 2 7")}, r"an entry of gene or cell 0: Matrix Market counts from 1"),
        ({"entries": ("1 1 5", "4 1 2", "2 2 7")}, r"an entry of gene 4 \(of 3\)"),
        ({"entries": ("1 1 5 0 0", "3 1 2 0 0")}, r"5 columns \('1 1 5 0 0'\): must be gene, cell and one count"),
        ({"head": "%%Matrix\n%"}, r"its first line must be '%%MatrixMarket matrix coordinate integer general'"),
        ({"head": "%%MatrixMarket matrix coordinate integer symmetric"}, "of the kind 'symmetric'"),
        ({"size": "2 4 3"}, "the files do not belong together"),
        ({"entries": ("1 1 5", "3 x 2", "2 2 7")}, r"matrix\.mtx: a line that is not gene, cell and count \(.*conversion error"),
        ({"entries": ("1 1 5",)}, "has 1 of the 3 entries that its header states"),
    )):  # fmt: skip
        with pytest.raises(UserError, match=message):
            read_all(mtx(tmp_path / f"bad{number}", **change), stop=2)


def test_entries_out_of_range_are_refused_in_every_sparse_layout(counts, tmp_path):
    for layer, name, wrong in (("X", "X", G), ("X", "X", -1), ("csc", "layers/csc", N), ("csc", "layers/csc", -2)):
        uri = write(adata_of(counts), tmp_path, "h5ad")
        with h5py.File(uri, "r+") as file:
            indices = file[f"{name}/indices"][:]
            indices[17] = wrong
            file[f"{name}/indices"][:] = indices
        with pytest.raises(UserError, match=r"(outside the matrix|an entry of cell)"):
            checked(uri, layer)


def test_errors_of_the_caller_and_of_storage_are_no_refusals(counts, tmp_path, monkeypatch):
    uri = write(adata_of(counts), tmp_path, "h5ad")
    for error in (KeyError("x"), OSError("disk full"), ValueError("y")):
        with pytest.raises(type(error)) as raised, open_reader(uri):
            raise error
        assert raised.value is error


def test_a_column_that_the_file_lacks_is_no_column(counts, tmp_path):
    uri = write(adata_of(counts), tmp_path, "h5ad")
    with h5py.File(uri, "r+") as file:
        del file["obs/text"]
    with open_reader(uri) as reader:
        assert "text" not in reader.obs_columns
        assert "type" in reader.obs_columns


def test_text_that_is_not_utf8_names_file_and_column(counts, tmp_path):
    uri = write(adata_of(counts), tmp_path, "h5ad")
    with h5py.File(uri, "r+") as file:
        del file["obs/type/categories"]
        file["obs/type/categories"] = np.array([b"d\xe9", b"b", b"c"], dtype="S")
    with pytest.raises(UserError, match=r"cells\.h5ad: obs column 'type': text that is not UTF-8 \(b'd\\xe9'\)"):
        read_all(uri)

"""Laws of reading: every format gives the same counts, every wrong input one clear line; columns become genes."""

import gzip

import anndata
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import io as scipy_io
from scipy import sparse

from mixgf.cells import sources
from mixgf.cells.counts import read_blocks
from mixgf.cells.open import open_reader
from mixgf.config.data import Source, SpeciesRow
from mixgf.errors import UserError
from mixgf.genes import identify

NAMES = [f"ENSYYYG{i:04d}" for i in range(9)]


@pytest.fixture
def row(tmp_path):
    genes = [*NAMES, "ENSYYYG0050", "ENSYYYG0051"]
    table = pa.table({
        "gene": genes, "symbol": [f"Gen{i}" for i in range(9)] + ["Twin", "Twin"],
        "biotype": ["protein_coding"] * 8 + ["lncRNA"] + ["lncRNA", "protein_coding"],
        "is_mito": [i == 7 for i in range(11)],
        "previous": [["Old0"], ["Both"]] + [[]] * 9, "alias": [["Nick0", "Gen1"], []] + [["Nick2"], ["Both2"], ["Both2"]] + [[]] * 6,
    })  # fmt: skip
    path = tmp_path / "genes.parquet"
    pq.write_table(table, path)
    return SpeciesRow(name="yeti", taxon=1, gene_prefix="ENSYYYG", genes=str(path))


@pytest.fixture
def counts():
    return np.random.default_rng(0).negative_binomial(0.4, 0.1, (23, 9))


def cells(x, names=NAMES, **obs):
    frame = pd.DataFrame(
        {"type": pd.Categorical(["a", None, "b"] * 8)[: x.shape[0]], **obs}, index=[f"c{i}" for i in range(x.shape[0])]
    )
    return anndata.AnnData(x, obs=frame, var=pd.DataFrame(index=list(names)))


def write_tenx(path, x, kinds=None, version=3):
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix" if version == 3 else "GRCx")
        m = sparse.csc_array(x.T)  # genes x cells
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(m, name)
        group["shape"] = np.asarray(m.shape)
        group["barcodes"] = np.asarray([f"c{i}" for i in range(len(x))], dtype="S")
        ids, symbols = np.asarray(NAMES, dtype="S"), np.asarray([f"Gen{i}" for i in range(9)], dtype="S")
        if version == 3:
            group["features/id"], group["features/name"] = ids, symbols
            group["features/feature_type"] = np.asarray(kinds or ["Gene Expression"] * 9, dtype="S")
        else:
            group["genes"], group["gene_names"] = ids, symbols


def write_mtx(folder, x):
    folder.mkdir()
    scipy_io.mmwrite(folder / "matrix.mtx", sparse.coo_array(x.T.astype(int)), field="integer")
    (folder / "matrix.mtx.gz").write_bytes(gzip.compress((folder / "matrix.mtx").read_bytes()))
    (folder / "matrix.mtx").unlink()
    (folder / "features.tsv.gz").write_bytes(
        gzip.compress("".join(f"{n}\tGen{i}\tGene Expression\n" for i, n in enumerate(NAMES)).encode())
    )
    (folder / "barcodes.tsv.gz").write_bytes(gzip.compress("".join(f"c{i}\n" for i in range(len(x))).encode()))


def write(kind, path, x):
    if kind == "10x v3":
        write_tenx(path.with_suffix(".h5"), x)
        return str(path.with_suffix(".h5")), "X"
    if kind == "10x v2":
        write_tenx(path.with_suffix(".h5"), x, version=2)
        return str(path.with_suffix(".h5")), "X"
    if kind == "mtx":
        write_mtx(path, x)
        return str(path), "X"
    form, layer = kind.split()
    matrix = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": np.asarray}[form](x.astype(np.float32))
    if layer == "X":
        a = cells(matrix)
    elif layer == "raw":
        a = cells(matrix)
        a.raw = a
        a = a[:, :3].copy()
        a.X = np.ones(a.shape, dtype=np.float32) / 3
    else:
        a = cells(np.full(x.shape, 0.5, dtype=np.float32))
        a.layers[layer] = matrix
    a.write_h5ad(path.with_suffix(".h5ad"), compression="gzip" if form == "csr" else None)
    return str(path.with_suffix(".h5ad")), layer


def read(uri, layer, columns, start, stop, rows):  # noqa: PLR0917
    with open_reader(uri, layer) as reader:
        x: list[np.ndarray] = []
        for b in read_blocks(reader, columns, start, stop, rows=rows):
            assert b.data.dtype == np.int32
            assert len(b.indptr) - 1 <= rows
            assert b.start == start + sum(len(y) for y in x)
            found = sparse.csr_array((b.data, b.indices, b.indptr), shape=(len(b.indptr) - 1, reader.num_columns))
            x.append(found.toarray())
        return np.vstack(x), reader.cell_names(start, stop).tolist(), reader.gene_names("").tolist()


def plain_columns(row, names=NAMES):
    return identify.identify_columns(names, identify.gene_lookup(row), biotypes=("protein_coding",))


@pytest.mark.parametrize(
    "kind", ["csr X", "csc X", "dense X", "csr raw", "csc counts", "dense raw", "csr counts", "10x v3", "10x v2", "mtx"]
)
def test_every_format_and_any_row_range_gives_the_counts(kind, row, counts, tmp_path, monkeypatch):
    monkeypatch.setattr("mixgf.cells.matrices.SCAN_ENTRIES", 7)  # many scan chunks
    monkeypatch.setattr("mixgf.cells.matrices.DENSE_BYTES", 9 * 4 * 3)  # three dense rows
    uri, layer = write(kind, tmp_path / "cells", counts)
    for start, stop, rows in [(0, 23, 23), (0, 23, 5), (4, 17, 4), (22, 23, 9)]:
        x, names, genes = read(uri, layer, plain_columns(row), start, stop, rows)
        assert np.array_equal(x, counts[start:stop])
        assert names == [f"c{i}" for i in range(start, stop)]
        assert genes == NAMES


def test_obs_values_are_strings_or_numbers_and_missing_ones_none(counts, tmp_path):
    n = len(counts)
    frame = {
        "text": [f"t{i}" for i in range(n)], "number": np.arange(n, dtype=np.int8), "share": np.linspace(0, 1, n, dtype=np.float32),
        "flag": np.arange(n) % 2 == 0, "nullable": pd.array([1, None] * 11 + [3], dtype="Int64"), "codes": pd.Categorical([5, 7] * 11 + [5]),
    }  # fmt: skip
    cells(counts.astype(np.float32), **frame).write_h5ad(tmp_path / "a.h5ad")
    with open_reader(str(tmp_path / "a.h5ad")) as reader:
        assert reader.obs_columns == ["type", *frame]
        assert reader.obs("type", 0, 4).tolist() == ["a", None, "b", "a"]
        assert reader.obs("text", 21, 23).tolist() == ["t21", "t22"]
        assert reader.obs("number", 1, 3).tolist() == [1, 2]
        assert reader.obs("share", 22, 23).tolist() == [1.0]
        assert reader.obs("flag", 0, 2).tolist() == [1, 0]
        assert np.isnan(reader.obs("nullable", 0, 2)[1])
        assert reader.obs("codes", 0, 2).tolist() == [5, 7]


# genes


def test_ids_lose_their_version_and_symbols_resolve_by_trust(row):
    names = [
        "ENSYYYG0003.12",
        "ENSYYYG0004_PAR_Y",
        "Gen1",
        "Old0",
        "Nick2",
        "Both2",
        "Twin",
        "Gen5-1",
        "nothing",
        "ENSYYYG9999",
    ]
    found = identify.identify_columns(names, identify.gene_lookup(row), biotypes=("protein_coding",))
    assert list(zip(found["gene"].to_pylist(), found["how"].to_pylist(), strict=True)) == [
        ("ENSYYYG0003", "id"), ("ENSYYYG0004", "id"), ("ENSYYYG0001", "symbol"), ("ENSYYYG0000", "previous"), ("ENSYYYG0002", "alias"),
        (None, "ambiguous"), ("ENSYYYG0051", "symbol"), ("ENSYYYG0005", "symbol"), (None, "unknown"), (None, "unknown"),
    ]  # fmt: skip


def test_only_asked_biotypes_or_given_genes_may_enter_the_vocabulary(row):
    known = identify.gene_lookup(row)
    assert plain_columns(row)["candidate"].to_pylist() == [True] * 8 + [False]
    assert identify.identify_columns(NAMES, known, biotypes=("lncRNA",))["candidate"].to_pylist() == [False] * 8 + [
        True
    ]
    given = frozenset({"ENSYYYG0008", "ENSYYYG7777"})
    found = identify.identify_columns([*NAMES, "ENSYYYG7777"], known, biotypes=(), vocabulary=given)
    assert found["candidate"].to_pylist() == [False] * 8 + [True, True]
    assert found["mito"].to_pylist() == [False] * 7 + [True, False, False]


def test_columns_of_one_gene_are_summed_and_other_columns_kept(row, counts, tmp_path):
    names = ["ENSYYYG0000", "Old0", "x", "Gen0", "ENSYYYG0002", "Nick2", "ENSYYYG0003", "y", "ENSYYYG0004"]
    columns = plain_columns(row, names)
    cells(sparse.csr_matrix(counts.astype(np.float32)), names).write_h5ad(tmp_path / "a.h5ad")
    x, _, _ = read(str(tmp_path / "a.h5ad"), "X", columns, 0, 23, 6)
    expected = counts.copy()
    expected[:, 0] += counts[:, 1] + counts[:, 3]
    expected[:, 4] += counts[:, 5]
    expected[:, [1, 3, 5]] = 0
    assert np.array_equal(x, expected)
    report = identify.report_mapping(columns, x.sum(0), [])
    assert (report.columns, report.mapped, report.renamed, report.summed, report.unmapped) == (9, 7, 2, 3, 2)
    assert report.counts_lost == pytest.approx(counts[:, [2, 7]].sum() / counts.sum())
    assert set(report.unmapped_names) == {"x", "y"}


def test_the_report_names_the_likely_cause(row, tmp_path):
    table = pa.table({"gene": ["ENSQ1"], "symbol": ["Quail1"], "biotype": ["protein_coding"], "is_mito": [False]})
    pq.write_table(table, tmp_path / "q.parquet")
    quail = identify.gene_lookup(
        SpeciesRow(name="quail", taxon=2, gene_prefix="ENSQ", genes=str(tmp_path / "q.parquet"))
    )
    for names, cause in {
        ("Quail1", "Gen1"): "they are quail genes: wrong species?",
        ("ENSMUSG00000000001", "Gen1"): "another species, or retired ids",
        ("17", "Gen1"): "bare numbers",
        ("what", "Gen1"): "neither Ensembl ids nor known symbols",
    }.items():
        assert cause in identify.report_mapping(plain_columns(row, names), np.asarray([9, 1]), [quail]).cause


def test_antibodies_and_other_features_are_left_out(row, counts, tmp_path):
    write_tenx(tmp_path / "a.h5", counts, kinds=["Gene Expression"] * 7 + ["Antibody Capture"] * 2)
    with open_reader(str(tmp_path / "a.h5")) as reader:
        found = identify.identify_columns(
            reader.gene_names(""), identify.gene_lookup(row), biotypes=("protein_coding",), is_gene=reader.is_gene
        )
    assert found["counted"].to_pylist() == [True] * 7 + [False] * 2
    assert found["gene"].to_pylist()[7:] == [None, None]


# refusals


def wrong(x, i, value):
    x = x.astype(np.float64)
    x[i] = value
    return x


def normalised(x):
    return x / x.sum(1, keepdims=True) * 10_000


@pytest.mark.parametrize("form", [sparse.csr_matrix, sparse.csc_matrix, np.asarray], ids=["csr", "csc", "dense"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: wrong(x, (4, 2), 1.5),
            r"a\.h5ad: count 1\.5 of cell c4 \(row 4\), gene ENSYYYG0002 is not a whole number; .*raw",
        ),
        (lambda x: wrong(x, (5, 1), -3), r"count -3\.0 of cell c5 .* is negative; .*scaled"),
        (lambda x: wrong(x, (5, 1), np.nan), "count nan of cell c5 .* is not a finite number"),
        (lambda x: wrong(x, (5, 1), np.inf), "count inf of cell c5 .* is not a finite number"),
        (lambda x: wrong(x, (5, 1), 2.0**31), r"above 2\*\*31"),
        (normalised, r"already normalised \(every cell sums to 10,000\): give raw counts"),
        (lambda x: np.log1p(normalised(x)), r"already log-normalised \(every cell sums to 10,000\)"),
    ],
    ids=["fraction", "negative", "nan", "inf", "huge", "normalised", "log"],
)
def test_wrong_values_are_refused_with_cell_gene_and_way_out(form, change, message, row, counts, tmp_path):  # noqa: PLR0917
    cells(form(change(counts + 1))).write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(UserError, match=message):
        read(str(tmp_path / "a.h5ad"), "X", plain_columns(row), 0, 23, 23)


def test_files_that_cannot_be_read_are_refused(row, counts, tmp_path):
    def opened(path, layer="X", genes=""):
        with open_reader(str(path), layer) as reader:
            reader.gene_names(genes)

    good = tmp_path / "good.h5ad"
    cells(sparse.csr_matrix(counts.astype(np.float32))).write_h5ad(good)
    with pytest.raises(UserError, match=r"none\.h5ad: no such file"):
        opened(tmp_path / "none.h5ad")
    with pytest.raises(UserError, match=r"layer = 'counts': not in the file; it has X"):
        opened(good, "counts")
    with pytest.raises(UserError, match=r"genes = 'feature': no such column of var; it has none"):
        opened(good, genes="feature")
    cut = tmp_path / "cut.h5ad"
    cut.write_bytes(good.read_bytes()[:-5_000])
    with pytest.raises(UserError, match="truncated or damaged"):
        opened(cut)
    (tmp_path / "cells.csv").write_text("a,b\n")
    with pytest.raises(UserError, match=r"a comma-separated table; convert it: .*read_csv\('cells.csv'\)"):
        opened(tmp_path / "cells.csv")
    with h5py.File(good, "r+") as file:
        indptr = file["X/indptr"]
        indptr[-1] = indptr[-1] + 4
    with pytest.raises(UserError, match="row pointers do not fit"):
        opened(good)


def test_truncated_matrix_market_is_refused(row, counts, tmp_path):
    write_mtx(tmp_path / "m", counts)
    path = tmp_path / "m" / "matrix.mtx.gz"
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    path.write_bytes(gzip.compress(b"".join(lines[:-2])))
    with pytest.raises(UserError, match="entries that its header states: truncated"):
        read(str(tmp_path / "m"), "X", plain_columns(row), 0, 23, 23)
    (tmp_path / "m" / "barcodes.tsv.gz").write_bytes(gzip.compress(b"c0\n"))
    with pytest.raises(UserError, match="9 x 23 but 9 features and 1 barcodes"):
        read(str(tmp_path / "m"), "X", plain_columns(row), 0, 23, 23)


def test_globs_expand_and_names_must_differ(tmp_path):
    for name in ("b.h5ad", "a.h5ad"):
        (tmp_path / name).touch()
    found = sources.expand_sources(
        [Source(uri=f"{tmp_path}/*.h5ad", species="human", name="x"), Source(uri="resource:q.h5ad", species="human")]
    )
    assert [s.name for s in found] == ["x-a", "x-b", "q"]
    with pytest.raises(UserError, match="matches no file"):
        sources.expand_sources([Source(uri=f"{tmp_path}/*.h5", species="human")])
    with pytest.raises(UserError, match=r"sources\.name = 'a': used by 2 sources"):
        sources.expand_sources([Source(uri=f"{tmp_path}/{n}.h5ad", species="human", name="a") for n in ("a", "b")])
    with pytest.raises(UserError, match="must name at least one file"):
        sources.expand_sources([])


def test_names_in_a_categorical_index_are_read_as_others(tmp_path):
    adata = anndata.AnnData(sparse.csr_matrix(np.ones((3, 2), dtype=np.float32)))
    adata.obs_names, adata.var_names = pd.CategoricalIndex(["b", "a", "c"]), pd.CategoricalIndex(["INS", "GCG"])
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with open_reader(str(tmp_path / "cells.h5ad")) as reader:
        assert reader.gene_names("").tolist() == ["INS", "GCG"]
        assert reader.cell_names(1, 3).tolist() == ["a", "c"]


def test_strings_with_a_mask_are_read_as_others(tmp_path):
    # as anndata 0.13 with pandas 3 writes every column of strings; the layout is made here, for any version of anndata
    adata = anndata.AnnData(sparse.csr_matrix(np.ones((3, 2), dtype=np.float32)))
    adata.obs_names, adata.var_names = ["b", "a", "c"], ["INS", "GCG"]
    adata.obs["donor"] = ["x", "y", "z"]
    adata.obs["type"] = pd.Categorical(["p", "q", "p"])
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        for name, missing in {"obs/_index": [], "var/_index": [], "obs/donor": [1], "obs/type/categories": []}.items():
            values = file[name]["values"] if isinstance(file[name], h5py.Group) else file[name]
            texts = values.asstr()[:]
            del file[name]
            file[f"{name}/values"] = texts.astype(object)
            file[f"{name}/mask"] = np.isin(np.arange(len(texts)), missing)
            file[name].attrs["encoding-type"] = "nullable-string-array"
    with open_reader(str(tmp_path / "cells.h5ad")) as reader:
        assert reader.gene_names("").tolist() == ["INS", "GCG"]
        assert reader.cell_names(1, 3).tolist() == ["a", "c"]
        assert reader.obs("donor", 0, 3).tolist() == ["x", None, "z"]
        assert reader.obs("type", 0, 3).tolist() == ["p", "q", "p"]

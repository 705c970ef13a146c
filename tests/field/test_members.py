"""Laws of every kind of field file, on many members of the kind: names of genes, layouts, matrices, hostile files."""

import gzip
import re
import warnings

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from mixgf.cells import kinds
from mixgf.cells.open import open_reader
from mixgf.cells.sources import expand_sources
from mixgf.config.data import HUMAN, MOUSE, Source
from mixgf.corpus import h5ad
from mixgf.errors import UserError
from mixgf.genes import identify
from tests.field import make_cases as make
from tests.field.prepared import run_prepare

# names of genes

SPELLED = {
    # name: (symbol, spelling)
    "GRCh38_MT-CO1": ("MT-CO1", "prefix"),
    "GRCh38___HLA-A": ("HLA-A", "prefix"),
    "hg19_CD4": ("CD4", "prefix"),
    "hg38-CD4": ("CD4", "prefix"),
    "GRCh38_premrna_CD4": ("CD4", "prefix"),
    "refdata-gex-GRCh38-2020-A_CD4": ("CD4", "prefix"),
    "CD4_GRCh38": ("CD4", "prefix"),
    "GRCh38_ENSG00000010610.12": ("CD4", "prefix"),
    "MT.CO1": ("MT-CO1", "separators"),
    "HLA.DRA": ("HLA-DRA", "separators"),
    "Y-RNA": ("Y_RNA", "separators"),
    "C4B-2": ("C4B_2", "separators"),
    "HLA.A.1": ("HLA-A", "unique"),
    "CD4-1": ("CD4", "unique"),
    "CD4.2": ("CD4", "unique"),
    "ENSG00000010610-1": ("CD4", "unique"),
    "ENSG00000010610_CD4": ("CD4", "joined"),
    "CD4|ENSG00000010610.5": ("CD4", "joined"),
    '"CD4"': ("CD4", "quotes"),
    " CD4 ": ("CD4", "quotes"),
    "ensg00000010610": ("CD4", "case"),
    "X5S_rRNA": ("5S_rRNA", "digit"),
    "human_CD4": ("CD4", "prefix"),
    "gene-CD4": ("CD4", "word"),
    "gene:ENSG00000010610.12": ("CD4", "word"),
    "rna_HLA-A": ("HLA-A", "word"),
    "ENSG00000010610.12_3": ("CD4", ""),
    "ENSG00000010610.12": ("CD4", ""),
    "T4": ("CD4", ""),
}
NO_GENE = (
    "NKX6.1", "cd4", "Cd4", "mm10___Cd4", "ADT_CD4", "CD4-ADT", "1-Mar", "Mar-01", "225", "3635", "0", "1.0", "NA", "nan", "N/A", "-", "",
    "NA.3", "SNORD115.1", "ENSG00000010610-U", "ENSG00000000000", "ENSMUSG00000023274", "chr1:100-200", "ERCC-00002", "XYZ_CD4", "NKX6.1.1", "mouse_CD4", "CD4_mouse", "gene-", "rna_cd4",
    "generic-CD4", "HGNC:1678",
)  # fmt: skip


def resolve(name, *others, row=HUMAN):
    lookup = identify.gene_lookup(row)
    found = identify.GeneNames(lookup, [name, *others]).find(name)
    return lookup.symbols.get(found.gene, found.gene), found.spelling


@pytest.mark.parametrize("name", SPELLED)
def test_a_name_in_another_spelling_is_the_gene_that_alone_can_be_meant(name):
    assert resolve(name) == SPELLED[name]


@pytest.mark.parametrize("name", NO_GENE)
def test_a_name_that_may_be_another_gene_or_none_is_unknown(name):
    assert resolve(name)[0] is None


def test_dots_stand_for_dashes_only_in_a_file_without_dashes():
    mangled = ["MT.CO1", "HLA.A", "HLA.B"]
    assert resolve("NKX6.1", *mangled) == ("NKX6-1", "separators")
    assert resolve("SNORD115.1", *mangled) == ("SNORD115-1", "separators")
    assert resolve("NKX6.1", *mangled, "HLA-C")[0] is None


def test_a_symbol_with_a_dash_is_never_the_gene_without():
    assert resolve("NKX6-1") == ("NKX6-1", "")
    assert resolve("NKX6.1", "NKX6-2") != ("NKX6-2", "")


def test_unspliced_counts_of_a_gene_are_not_added_to_it():
    names = [f"{gene}-U" for gene in list(identify.gene_lookup(HUMAN).symbols)[:50]]
    known = identify.GeneNames(identify.gene_lookup(HUMAN), names)
    assert {known.find(name).gene for name in names} == {None}


def test_every_current_symbol_and_id_is_itself_in_both_species():
    for row in (HUMAN, MOUSE):
        lookup = identify.gene_lookup(row)
        known = identify.GeneNames(lookup, lookup.names[0][1])
        for name, gene in list(lookup.names[0][1].items())[::37]:
            assert known.find(name) == (gene, "symbol", ""), name
            assert known.find(gene)[:2] == (gene, "id")


def cause(names, row=HUMAN, other=MOUSE):
    return identify.likely_cause(names, identify.gene_lookup(row), [identify.gene_lookup(other)])


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["Cd4", "Cd8a", "Ptprc"], "they are mouse genes: wrong species"),
        (["cd4", "cd8a", "mt-co1"], r"only the case of their letters .*cd4: CD4"),
        (["ENSRNOG00000000001", "ENSRNOG00000000002"], "another species, or retired"),
        (["0", "1", "2"], "bare numbers"),
        (["1.0", "2.0", "3.0"], "bare numbers"),
        (["chr1:100-200", "chr2:5-900"], "regions of a genome"),
        (["1-Mar", "2-Sep", "Dec-01"], "a spreadsheet"),
        (["ADT_CD4", "ADT_CD8A", "ADT_X"], "begin with 'ADT_'"),
        (["CD4_q", "CD8A_q", "X_q"], "end with '_q'"),
        (["mm10___Gm1", "mm10___Gm2"], r"name of a reference \(mm10\)"),
        (["HGNC:1678", "MGI:88335"], "ids of another database"),
        (
            ["ENSG00000010610-U", "ENSG00000010610-A", "CD8A-U"],
            r"unspliced \(-U\) and ambiguous \(-A\) counts of alevin-fry",
        ),
        (["mouse_Gm1", "mouse_Gm2"], r"name of a reference \(mouse\)"),
        (["foo", "bar"], "neither Ensembl ids nor known symbols"),
    ],
)
def test_the_cause_of_unknown_names_is_said(names, said):
    assert re.search(said, cause(names))


def test_capital_letters_of_mouse_symbols_are_not_called_a_wrong_species_alone():
    assert re.search("human genes: wrong species.*or only the case", cause(["CD4", "CD8A", "PTPRC"], MOUSE, HUMAN))


@pytest.mark.parametrize("shift", [1, 5, -3])
@pytest.mark.parametrize("columns", [("gene_ids",), ("ensembl_id", "n_cells")])
def test_ids_of_other_rows_are_refused_by_row_however_far_they_moved(shift, columns, tmp_path):
    ids, names = make.genes()
    a = make.renamed(
        make.cells(), names, **{columns[0]: np.roll(ids, shift), **{c: range(len(ids)) for c in columns[1:]}}
    )
    a.write_h5ad(tmp_path / "in.h5ad")
    found = run_prepare(tmp_path / "run", f"human={tmp_path / 'in.h5ad'}")
    assert found.code == 2
    assert re.search(
        r"different genes in 300 of 300 rows, for instance ENSG\d+ \(.+\) and MT-CO1 in row 0", found.error
    )


def test_some_ids_of_other_rows_are_said(tmp_path):
    ids, names = make.genes()
    ids = [*np.roll(ids[:30], 1), *ids[30:]]
    make.renamed(make.cells(), names, gene_ids=ids).write_h5ad(tmp_path / "in.h5ad")
    found = run_prepare(tmp_path / "run", f"human={tmp_path / 'in.h5ad'}")
    assert found.code == 0
    assert any("different genes in 30 of 300 rows" in line for line in found.lines)


@pytest.mark.parametrize("column", ["feature_name", "gene_symbols", "gene_name", "my own column"])
def test_known_names_are_found_in_another_column_where_the_index_has_none(column, tmp_path):
    _, names = make.genes()
    make.renamed(make.cells(), [f"row{i}" for i in range(300)], **{"n": range(300), column: names}).write_h5ad(
        tmp_path / "in.h5ad"
    )
    found = run_prepare(tmp_path / "run", f"human={tmp_path / 'in.h5ad'}")
    assert found.sums == (60, 25_262, 10_888, 0.0063, 300)
    assert any(f"read from var[{column!r}], because the index" in line for line in found.lines)


def test_cells_of_two_references_in_one_h5ad_are_refused(tmp_path):
    (_, human), (_, mouse) = make.genes(), make.genes("mouse")
    x = sparse.block_diag([make.cells().X, make.cells(species="mouse").X], format="csr")
    names = [f"GRCh38_{n}" for n in human] + [f"mm10___{n}" for n in mouse]
    ad.AnnData(x, var=pd.DataFrame(index=names)).write_h5ad(tmp_path / "in.h5ad")
    found = run_prepare(tmp_path / "run", f"human={tmp_path / 'in.h5ad'}")
    assert found.code == 2
    assert re.search(r"genes of 2 references \(GRCh38: 300, mm10: 300\)", found.error)


# where the counts are


def kind_of(change, rows=20, genes=80):
    x = np.random.default_rng(0).poisson(2.0, (rows, genes)).astype(np.float64)
    m = sparse.csr_matrix(change(x))
    return kinds.of_rows(m.data, m.indptr)


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda x: x, kinds.COUNTS),
        (lambda x: x / x.sum(1, keepdims=True) * 1e4, kinds.NORMALISED),
        (lambda x: np.log1p(x / x.sum(1, keepdims=True) * 1e4), kinds.LOGGED),
        (lambda x: np.log1p(x / x.sum(1, keepdims=True) * 1e4)[:, :30], kinds.LOGGED),
        (lambda x: (x / x.sum(1, keepdims=True) * np.arange(1, len(x) + 1)[:, None] * 97.3)[:, :40], kinds.NORMALISED),
        (lambda x: (x - x.mean(0)) / x.std(0), kinds.SCALED),
        (lambda x: x * 0.95 + np.random.default_rng(1).random(x.shape) * 0.01, kinds.FRACTIONS),
        (lambda x: x / 3 * np.random.default_rng(1).random(x.shape), kinds.FRACTIONS),
        (np.sqrt, kinds.ROOTS),
        (lambda x: x + 1e-6, kinds.FRACTIONS),
        (lambda x: np.where(x == 3, np.nan, x), kinds.NOT_NUMBERS),
    ],
)
def test_the_kind_of_a_matrix_is_told_by_its_values(change, kind):
    assert kind_of(change) == kind


@pytest.mark.parametrize("layer", ["raw", "counts", "raw counts", "umi"])
def test_the_layer_with_counts_is_named_so_that_it_can_be_typed(layer, tmp_path):
    a = make.cells()
    if layer == "raw":
        a.raw = a.copy()
    else:
        a.layers[layer] = a.X.copy()
    a.layers["spliced"] = (a.X * 0.5).astype(np.float32)
    a.X = make.logged(a)
    a.write_h5ad(tmp_path / "in.h5ad")
    found = run_prepare(tmp_path / "run", f"human={tmp_path / 'in.h5ad'}")
    typed = f"'{layer}'" if " " in layer else layer
    assert found.error.endswith(f"holds counts: --set sources.layer={typed}")
    assert run_prepare(tmp_path / "again", f"human={tmp_path / 'in.h5ad'}", sources__layer=layer).code == 0


# layouts


def read(uri, layer="X"):
    with open_reader(str(uri), layer) as reader:
        blocks = list(reader.read(0, reader.num_rows, 16))
        rows = [
            sparse.csr_matrix((b.data, b.indices, b.indptr), (len(b.indptr) - 1, reader.num_columns)).toarray()
            for b in blocks
        ]
        obs = {name: reader.obs(name, 0, reader.num_rows).tolist() for name in reader.obs_columns}
        return np.vstack(rows), reader.cell_names(0, reader.num_rows).tolist(), reader.gene_names("").tolist(), obs


def records(names, **columns):
    """An array of records, as anndata wrote data frames before 0.7."""
    kinds_of = [("index", "S20"), *((name, np.asarray(values).dtype) for name, values in columns.items())]
    return np.array(list(zip([n.encode() for n in names], *columns.values(), strict=True)), dtype=kinds_of)


@pytest.mark.parametrize("raw", [False, True])
def test_data_frames_of_2018_are_read(raw, tmp_path):
    a = make.cells(n=12)
    x = a.X.toarray()
    with h5py.File(tmp_path / "in.h5ad", "w") as f:
        name = "raw.X" if raw else "X"
        group = f.create_group(name)
        group.attrs["h5sparse_format"], group.attrs["h5sparse_shape"] = "csr", x.shape
        for part in ("data", "indices", "indptr"):
            group[part] = getattr(sparse.csr_matrix(x), part)
        if raw:
            f["X"], f["raw.var"] = np.zeros((12, 2), "f4"), records(a.var_names)
        codes = a.obs["cell_type"].cat.codes.to_numpy()
        f["obs"] = records(a.obs_names, cell_type=codes, n=np.arange(12))
        f["var"] = records(a.var_names[:2] if raw else a.var_names)
        f["uns/cell_type_categories"] = make.text(a.obs["cell_type"].cat.categories)
    values, cells, genes, obs = read(tmp_path / "in.h5ad", "raw" if raw else "X")
    np.testing.assert_array_equal(values, x)
    assert (cells, genes) == (a.obs_names.tolist(), a.var_names.tolist())
    assert obs == {"cell_type": a.obs["cell_type"].tolist(), "n": list(range(12))}


def folder(path, x, names, cells, *, transpose=False, gz=False, extra=()):
    """Three files of a Matrix Market sample under the given names."""
    path.mkdir(parents=True, exist_ok=True)
    t = sparse.csr_matrix(x if transpose else x.T).tocoo()
    rows = ["%%MatrixMarket matrix coordinate integer general", f"{t.shape[0]} {t.shape[1]} {t.nnz}"]
    rows += [f"{i + 1} {j + 1} {int(v)}" for i, j, v in zip(t.row, t.col, t.data, strict=True)]
    for name, lines in ((names[0], rows), (names[1], make.genes()[0]), (names[2], cells), *extra):
        data = "".join(f"{line}\n" for line in lines).encode()
        (path / f"{name}{'.gz' * gz}").write_bytes(gzip.compress(data) if gz else data)


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize(
    ("names", "transpose"),
    [
        (("matrix.mtx", "features.tsv", "barcodes.tsv"), False),  # Cell Ranger, STARsolo
        (("matrix.mtx", "genes.tsv", "barcodes.tsv"), False),
        (("matrix.mtx", "genes.tsv", "barcodes.tsv"), True),
        (("GSM1_S1_matrix.mtx", "GSM1_S1_features.tsv", "GSM1_S1_barcodes.tsv"), False),  # GEO
        (("S1.matrix.mtx", "S1.genes.tsv", "S1.barcodes.tsv"), False),
        (("cells_x_genes.mtx", "cells_x_genes.genes.txt", "cells_x_genes.barcodes.txt"), True),  # kb-python
        (("quants_mat.mtx", "quants_mat_cols.txt", "quants_mat_rows.txt"), True),  # alevin-fry
    ],
)
def test_matrix_market_folders_of_all_programs_are_read(names, transpose, gz, tmp_path):
    a = make.cells()
    folder(tmp_path / "in", a.X, names, a.obs_names, transpose=transpose, gz=gz)
    for uri in (tmp_path / "in", tmp_path / "in" / f"{names[0]}{'.gz' * gz}"):
        values, cells, genes, _ = read(uri)
        np.testing.assert_array_equal(values, a.X.toarray())
        assert (cells, genes) == (a.obs_names.tolist(), a.var_names.tolist())


def test_several_samples_of_one_folder_are_given_by_a_pattern(tmp_path):
    a = make.cells()
    for sample in ("GSM1_S1_", "GSM2_S2_"):
        folder(
            tmp_path / "in",
            a.X,
            [sample + name for name in ("matrix.mtx", "features.tsv", "barcodes.tsv")],
            a.obs_names,
        )
    with pytest.raises(UserError, match=r"a folder of 2 samples .* by a pattern: '.*/in/\*matrix\.mtx\*'"):
        read(tmp_path / "in")
    found = expand_sources([Source(uri=f"{tmp_path}/in/*matrix.mtx*", species="human")])
    assert [source.name for source in found] == ["GSM1_S1", "GSM2_S2"]


@pytest.mark.parametrize(
    ("uris", "names"),
    [
        (["S1/outs/a.h5", "S2/outs/a.h5"], ["S1", "S2"]),
        (["r1/S1/outs/a.h5", "r2/S1/outs/a.h5"], ["r1", "r2"]),
        (["r1/S1/outs/a.h5", "r2/S2/outs/a.h5"], ["r1-S1", "r2-S2"]),
        (["S1/a.h5", "S2/a.h5ad"], ["S1", "S2"]),
        (["S1/a.h5", "S2/a.h5", "S1.h5"], ["S1-a", "S2-a", "S1"]),
        (["a.h5", "b.h5"], ["a", "b"]),
        (["S1/filtered_feature_bc_matrix", "S2/filtered_feature_bc_matrix"], ["S1", "S2"]),
        (["S1/matrix.mtx.gz", "S2/matrix.mtx.gz"], ["S1", "S2"]),
    ],
)
def test_files_of_one_name_are_named_by_the_parts_of_the_path_that_differ(uris, names, tmp_path):
    found = expand_sources([Source(uri=f"{tmp_path}/{uri}", species="human") for uri in uris])
    assert [re.sub(r"-a\.h5(ad)?$", "", source.name) for source in found] == names


def test_a_file_that_is_given_twice_is_refused(tmp_path):
    source = Source(uri=f"{tmp_path}/a.h5", species="human")
    with pytest.raises(UserError, match=r"given 2 times"):
        expand_sources([source, source])


def test_a_name_can_be_given_on_the_command_line(tmp_path):
    make.make(tmp_path, "machine")
    found = run_prepare(tmp_path / "run", f"human=donor 7={tmp_path / 'machine/in.h5ad'}")
    assert set(found.obs["source"]) == {"donor 7"}


# hostile files


def other_file(path):
    with h5py.File(path, "w") as f:
        f["secret"] = make.text(["secret"] * 60)
        f["x"] = np.ones(60)
    path.with_suffix(".raw").write_bytes(np.arange(60, dtype="<f8").tobytes())


def external_link(f, name, path):
    f[name] = h5py.ExternalLink(str(path), "secret")


def external_storage(f, name, path):
    f.create_dataset(name, (60,), "<f8", external=[(str(path.with_suffix(".raw")), 0, 480)])


def virtual(f, name, path):
    layout = h5py.VirtualLayout((60,), "f8")
    layout[:] = h5py.VirtualSource(str(path), "x", (60,))
    f.create_virtual_dataset(name, layout)


@pytest.mark.parametrize("trick", [external_link, external_storage, virtual])
@pytest.mark.parametrize(
    "place", ["obs/donor", "obs/_index", "X/data", "var/feature_types", "obs/cell_type/categories"]
)
def test_no_other_file_is_read_through_an_h5ad(trick, place, tmp_path):
    path, other = tmp_path / "in.h5ad", tmp_path / "other.h5"
    other_file(other)
    make.cells().write_h5ad(path)
    with h5py.File(path, "r+") as f:
        if place in f:
            del f[place]
        elif place == "var/feature_types":
            f["var"].attrs["column-order"] = ["feature_types"]
        trick(f, place, other)
    found = run_prepare(tmp_path / "run", f"human={path}")
    assert found.code == 2
    assert "lies in another file" in found.error
    assert "secret" not in "".join(found.lines)


@pytest.mark.parametrize("pointers", ["falling", "negative", "beyond", "first"])
@pytest.mark.parametrize("form", ["csr", "csc"])
def test_pointers_of_a_sparse_matrix_are_checked_before_compiled_code(pointers, form, tmp_path):
    a = make.cells()
    a.X = sparse.csr_matrix(a.X) if form == "csr" else sparse.csc_matrix(a.X)
    a.write_h5ad(tmp_path / "in.h5ad")
    with h5py.File(tmp_path / "in.h5ad", "r+") as f:
        indptr = f["X/indptr"][:].astype(np.int64)
        change = {"falling": (5, 1), "negative": (3, -7), "beyond": (4, 1 << 40), "first": (0, 9)}[pointers]
        indptr[change[0]] = change[1]
        del f["X/indptr"]
        f["X/indptr"] = indptr
    found = run_prepare(tmp_path / "run", f"human={tmp_path / 'in.h5ad'}")
    assert found.code == 2
    assert re.search(r"pointers do not (ascend|fit)", found.error)


def test_a_column_of_another_length_is_refused_before_other_sources_depend_on_it(tmp_path):
    make.cells().write_h5ad(tmp_path / "in.h5ad")
    make.cells(seed=3).write_h5ad(tmp_path / "other.h5ad")
    with h5py.File(tmp_path / "in.h5ad", "r+") as f:
        f["obs/short"] = np.arange(7)
        f["obs"].attrs["column-order"] = [*f["obs"].attrs["column-order"], "short"]
    found = run_prepare(tmp_path / "run", f"human={tmp_path / 'in.h5ad'}", f"human={tmp_path / 'other.h5ad'}")
    assert found.code == 3
    assert re.search(r"in\.h5ad: obs column 'short' has 7 rows, and there are 60 cells", found.error)


# outputs


def test_text_that_a_spreadsheet_runs_is_quoted():
    frame = pd.DataFrame({"cell": ["=cmd()", "-1+2", "plain"], "n": [-1, 2, 3], "c": pd.Categorical(["@x", "+y", "z"])})
    assert h5ad.for_spreadsheets(frame).to_csv(index=False) == "cell,n,c\n'=cmd(),-1,'@x\n'-1+2,2,'+y\nplain,3,z\n"


@pytest.mark.parametrize(
    ("names", "kept"),
    [
        (["NK/T", "G1/S", "B"], ["NK/T", "G1/S", "B"]),
        (["NK", "NK/T"], ["NK", "NK\u2215T"]),
        (["/x", "a//b", "c/"], ["\u2215x", "a\u2215\u2215b", "c\u2215"]),
        (["Zell-Typ \u03b1", "..", "\u65e5\u672c"], ["Zell-Typ \u03b1", "..", "\u65e5\u672c"]),
    ],
)
@pytest.mark.filterwarnings("error")
def test_columns_of_any_name_are_written_and_read_without_a_warning(names, kept, tmp_path):
    a = make.cells(n=4)
    a.write_h5ad(tmp_path / "a.h5ad")
    frame = pd.DataFrame(np.arange(4.0 * len(names)).reshape(4, -1), index=a.obs_names, columns=names)
    with h5py.File(tmp_path / "a.h5ad", "r+") as f:
        h5ad.write_frame(f["obsm"], "p", frame)
        h5ad.add_columns(f, pd.DataFrame({"mixgf_label": pd.Categorical(["x", "y", "x", "y"])}))
    found = ad.read_h5ad(tmp_path / "a.h5ad")
    assert found.obsm["p"].columns.tolist() == kept
    np.testing.assert_array_equal(found.obsm["p"].to_numpy(), frame.to_numpy())
    assert found.obs.columns.tolist() == ["cell_type", "donor", "mixgf_label"]


@pytest.mark.parametrize(
    "case",
    ["machine/in", "nullable-string-index/in", "bytes-for-text/in", "categories-of-2020/a", "column-called-index/in"],
)
def test_a_copy_with_labels_is_read_by_anndata_whatever_the_layout_of_obs(case, tmp_path):
    make.make(tmp_path, case.partition("/")[0])
    before = ad.read_h5ad(tmp_path / f"{case}.h5ad")
    num = before.n_obs
    frame = pd.DataFrame(np.ones((num, 2), np.float32), columns=["NK/T", "G1/S"])
    labels = pd.DataFrame({"mixgf_label": pd.Categorical(["NK/T"] * num)})
    source = Source(uri=f"{tmp_path}/{case}.h5ad", species="human")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        h5ad.write_copy(
            source,
            f"{tmp_path}/out.h5ad",
            [],
            obs=labels,
            obsm={"p": frame, "X": frame.to_numpy()},
            uns={"facts": {"a": 1}},
        )
    found = ad.read_h5ad(tmp_path / "out.h5ad")
    pd.testing.assert_frame_equal(found.obs.drop(columns="mixgf_label"), before.obs)
    assert found.obsm["p"].columns.tolist() == ["NK/T", "G1/S"]
    assert found.obsm["p"].index.tolist() == before.obs_names.tolist()
    assert set(found.obs["mixgf_label"]) == {"NK/T"}


def test_columns_are_added_to_an_obs_that_anndata_cannot_write(tmp_path):
    make.make(tmp_path, "column-called-index")
    path = tmp_path / "column-called-index/in.h5ad"
    with h5py.File(path, "r+") as f:
        before = f["obs/_index"][:]
        h5ad.add_columns(f, pd.DataFrame({"mixgf_label": pd.Categorical(["x"] * 160)}))
        np.testing.assert_array_equal(f["obs/_index"][:], before)
    assert set(ad.read_h5ad(path).obs["mixgf_label"]) == {"x"}

"""Small files as people have them, one folder per case: `python tests/field/make_cases.py OUT [CASE ...]`.

Made after public reports on scanpy, anndata, Seurat, Cell Ranger and the tools around them. `test_cases.py` says what is right
for each. Invented counts, deterministic; the names are those of the gene tables of mixgf. Where nothing else is said, a file holds
the same 60 cells x 300 genes: 25,262 counts; alpha, beta, delta cells in turn; donors d0, d1.
"""

import gzip
import shutil
import sys
import warnings
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse

import mixgf

TYPES = ("alpha cell", "beta cell", "delta cell")
FIRST = {
    "human": [
        "MT-CO1",
        "MT-CO2",
        "MT-ND1",
        "HLA-A",
        "HLA-B",
        "HLA-DRA",
        "NKX6-1",
        "NKX6-2",
        "CD4",
        "CD8A",
        "PTPRC",
        "CD3E",
        "INS",
        "GCG",
        "SST",
        "ACTB",
        "LYZ",
    ],
    "mouse": [
        "mt-Co1",
        "mt-Co2",
        "mt-Nd1",
        "H2-K1",
        "H2-D1",
        "H2-Aa",
        "Nkx6-1",
        "Nkx2-1",
        "Cd4",
        "Cd8a",
        "Ptprc",
        "Cd3e",
        "Ins1",
        "Gcg",
        "Sst",
        "Actb",
        "Lyz2",
    ],
}
CASES = {}


def case(function):
    """Register the maker of a case; its name is the function's, with dashes."""
    CASES[function.__name__.replace("_", "-")] = function
    return function


# What cases are made of


def genes(species="human", n=300):
    """Ensembl ids and symbols of n protein-coding genes, the well known ones first."""
    t = pq.read_table(Path(mixgf.__file__).parent / "resources" / f"genes_{species}.parquet").to_pandas()
    t = t[t["primary"] & (t["symbol"] != "")].drop_duplicates("symbol").set_index("symbol")
    first = FIRST[species]
    plain = t.index.str.fullmatch(r"[A-Za-z]+[0-9]*[A-Za-z]?")
    rest = t[(t["biotype"] == "protein_coding") & plain & ~t.index.isin([*first, "XK", "SCN11A", "TBXT"])]
    names = first + rest.index[200 : 200 + n - len(first)].tolist()
    return t.loc[names, "gene"].tolist(), names


def cells(n=60, species="human", types=TYPES, seed=0):
    """n cells of whole counts (CSR float32); the index of var has Ensembl ids."""
    rng = np.random.default_rng(seed)
    ids, _ = genes(species)
    kind = np.arange(n) % len(types)
    mean = rng.gamma(0.6, 2.0, (len(types), len(ids))) + 0.3
    x = sparse.csr_matrix(rng.poisson(mean[kind]).astype(np.float32))
    obs = {
        "cell_type": pd.Categorical([types[k] for k in kind]),
        "donor": pd.Categorical([f"d{k // 3 % 2}" for k in range(n)]),
    }
    return ad.AnnData(x, obs=pd.DataFrame(obs, index=[f"cell{k:03d}" for k in range(n)]), var=pd.DataFrame(index=ids))


def renamed(a, names, **columns):
    """The same cells with these names of genes and these columns of var."""
    b = a.copy()
    b.var = pd.DataFrame(columns, index=pd.Index(list(names), dtype=object))
    return b


def logged(a):
    """log1p of counts per 10,000."""
    x = sparse.csr_matrix(a.X.multiply(1e4 / np.asarray(a.X.sum(1))))
    x.data = np.log1p(x.data).astype(np.float32)
    return x


def old_categories(path, frames=("obs",)):
    """Turn categorical columns into the layout of anndata 0.7: integer codes, and the categories in FRAME/__categories."""
    with h5py.File(path, "r+") as f:
        for frame in frames:
            g = f[frame]
            g.attrs["encoding-version"] = "0.1.0"
            store = g.create_group("__categories")
            for name in list(g.attrs["column-order"]):
                if isinstance(g[name], h5py.Group) and "codes" in g[name]:
                    codes = g[name]["codes"][:]
                    g.copy(g[name]["categories"], store, name)  # names or numbers, as they are
                    del g[name]
                    g.create_dataset(name, data=codes).attrs["categories"] = store[name].ref


def text(values):
    return np.array([str(v).encode() for v in values], dtype="S")


def tenx(path, x, ids, names, *, types="Gene Expression", genome="GRCh38"):
    """A matrix .h5 of Cell Ranger 3 and later; x is cells x features."""
    x = sparse.csr_matrix(x).astype(np.int32)
    with h5py.File(path, "w") as f:
        m = f.create_group("matrix")
        m["barcodes"] = text([f"AAAC{k:012d}-1" for k in range(x.shape[0])])
        m["data"], m["indices"], m["indptr"] = x.data, x.indices.astype(np.int64), x.indptr.astype(np.int64)
        m["shape"] = np.array([x.shape[1], x.shape[0]], np.int32)
        g = m.create_group("features")
        g["id"], g["name"] = text(ids), text(names)
        g["feature_type"] = text([types] * len(ids) if isinstance(types, str) else types)
        g["genome"] = text([genome] * len(ids) if isinstance(genome, str) else genome)


def mtx(
    folder,
    x,
    features,
    *,
    barcodes=None,
    head="%%MatrixMarket matrix coordinate integer general\n%made for a test",
    line="{g} {c} {v}",
    size="{G} {C} {N}",
    prefix="",
    newline="\n",
    change=None,
):
    """A gzipped Matrix Market folder; x is cells x features, `features` the lines of features.tsv; `change` edits the lines of entries."""
    folder.mkdir(parents=True, exist_ok=True)
    t = sparse.csr_matrix(x).tocoo()
    entries = [line.format(g=g + 1, c=c + 1, v=int(v)) for c, g, v in zip(t.row, t.col, t.data, strict=True)]
    rows = [
        *head.splitlines(),
        size.format(G=x.shape[1], C=x.shape[0], N=t.nnz),
        *(change(entries) if change else entries),
    ]
    barcodes = barcodes or [f"AAAC{k:012d}-1" for k in range(x.shape[0])]
    for name, lines in (("matrix.mtx", rows), ("features.tsv", features), ("barcodes.tsv", barcodes)):
        (folder / f"{prefix}{name}.gz").write_bytes(
            gzip.compress("".join(f"{r}{newline}" for r in lines).encode(), mtime=0)
        )


def lines():
    return [f"{i}\t{n}\tGene Expression" for i, n in zip(*genes(), strict=True)]


# 1 gene names


@case
def id_spelled_na(d):
    """A merge left 40 % of the genes without an id, written as the text NA."""
    a, (ids, names) = cells(), genes()
    gone = np.random.default_rng(1).random(len(ids)) < 0.4
    renamed(a, names, gene_ids=np.where(gone, "NA", ids)).write_h5ad(d / "in.h5ad")


@case
def dots_for_dashes(d):
    """R put dots where symbols have dashes."""
    a, (_, names) = cells(), genes()
    renamed(a, [s if s.startswith("NKX") else s.replace("-", ".") for s in names]).write_h5ad(d / "in.h5ad")


@case
def genome_prefix(d):
    """The reference's name before every symbol or id."""
    a, (ids, names) = cells(), genes()
    for file, before, what in (
        ("symbols", "GRCh38_", names),
        ("symbols3", "GRCh38___", names),
        ("ids", "GRCh38_", ids),
    ):
        renamed(a, [before + s for s in what]).write_h5ad(d / f"{file}.h5ad")


@case
def id_and_symbol_joined(d):
    """Id and symbol in one name."""
    a, (ids, names) = cells(), genes()
    for file, form in (("underscore", "{i}_{s}"), ("bar", "{s}|{i}"), ("colon", "{s}:{i}")):
        renamed(a, [form.format(i=i, s=s) for i, s in zip(ids, names, strict=True)]).write_h5ad(d / f"{file}.h5ad")


@case
def ids_of_other_rows(d):
    """The ids were joined one row too low: id and symbol of a row are different genes."""
    ids, names = genes()
    renamed(cells(), names, gene_ids=np.roll(ids, 1)).write_h5ad(d / "in.h5ad")


@case
def numbers_for_index(d):
    """The index counts 0, 1, 2; names stand in columns."""
    a, (ids, names) = cells(), genes()
    renamed(a, map(str, range(len(ids))), feature_id=ids, feature_name=names).write_h5ad(d / "in.h5ad")


@case
def a_third_unknown(d):
    """36 % of the counts are on names that no gene has."""
    a, (_ids, names) = cells(), genes()
    renamed(a, [f"XYZ{j}.{j % 9}_q" if j > 20 and j % 5 < 2 else s for j, s in enumerate(names)]).write_h5ad(
        d / "in.h5ad"
    )


@case
def small_letters(d):
    """Human symbols in small letters."""
    renamed(cells(), [s.lower() for s in genes()[1]]).write_h5ad(d / "in.h5ad")


@case
def concat_left_two_columns(d):
    """A concatenation left gene_ids-0 and gene_ids-1, each with gaps."""
    a, (ids, names) = cells(), genes()
    k, b = np.arange(len(ids)), renamed(a, names)
    for part in (0, 1):
        b.var[f"gene_ids-{part}"] = np.where(k % 3 == part, None, np.array(ids, object))
    b.write_h5ad(d / "in.h5ad")


@case
def versions_and_duplicates(d):
    """Ids with versions, one twice; symbols twice, and made unique with -1."""
    a, (ids, names) = cells(), genes()
    versions = [f"{i}.{3 + k % 15}" for k, i in enumerate(ids)]
    versions[11] = versions[10]
    symbols = list(names)
    symbols[11], symbols[21] = symbols[10], symbols[20] + "-1"
    renamed(a, versions).write_h5ad(d / "ids.h5ad")
    renamed(a, symbols).write_h5ad(d / "symbols.h5ad")


@case
def rat_ids(d):
    """Rat, given as mouse."""
    renamed(cells(), [f"ENSRNOG{k:011d}" for k in range(300)]).write_h5ad(d / "in.h5ad")


# 2 features that are no genes


@case
def citeseq_h5ad(d):
    """Genes and antibodies side by side, told apart by var['feature_types']."""
    a, (ids, names) = cells(), genes()
    tags = ["CD4", "CD45", "CD8", "PD-1", "CD19", "IgG2b"]
    x = sparse.hstack(
        [a.X, sparse.csr_matrix(np.random.default_rng(0).poisson(300, (60, len(tags))).astype(np.float32))],
        format="csr",
    )
    kinds = ["Gene Expression"] * len(ids) + ["Antibody Capture"] * len(tags)
    c = ad.AnnData(
        x, obs=a.obs, var=pd.DataFrame({"gene_ids": [*ids, *tags], "feature_types": kinds}, index=[*names, *tags])
    )
    c.var_names_make_unique()
    c.write_h5ad(d / "in.h5ad")
    renamed(a, names, gene_ids=ids).write_h5ad(d / "rna.h5ad")


@case
def no_rna_h5ad(d):
    """Antibodies only; their names are also genes' names."""
    tags = [
        "CD4",
        "CD8A",
        "CD19",
        "CD14",
        "CD33",
        "CD38",
        "CD44",
        "CD69",
        "CD27",
        "CD28",
        "CD7",
        "CD2",
        "CD5",
        "CD52",
        "CD74",
        "CD86",
    ]
    x = sparse.csr_matrix(np.random.default_rng(0).poisson(20, (60, len(tags))).astype(np.float32))
    ad.AnnData(x, obs=cells().obs, var=pd.DataFrame({"feature_types": "Antibody Capture"}, index=tags)).write_h5ad(
        d / "in.h5ad"
    )


# 3 h5ad layouts, old and new


@case
def categories_of_2020(d):
    """Two files in the layout of anndata 0.7, with other cell types each."""
    for file, types, seed in (("a", ("alpha cell", "beta cell"), 0), ("b", ("acinar cell", "ductal cell"), 1)):
        cells(types=types, seed=seed).write_h5ad(d / f"{file}.h5ad")
        old_categories(d / f"{file}.h5ad")
        assert ad.read_h5ad(d / f"{file}.h5ad").obs["cell_type"].iloc[0] == types[0], "anndata itself reads it"


@case
def nullable_string_index(d):
    """Both indices as nullable strings (a group with values and mask), what newer anndata with newer pandas writes."""
    a = cells()
    a.obs.index, a.var.index = a.obs.index.astype("string"), a.var.index.astype("string")
    with ad.settings.override(allow_write_nullable_strings=True):
        a.write_h5ad(d / "in.h5ad")


@case
def text_in_latin1(d):
    """A donor's name with an accent, in Latin-1 bytes."""
    cells().write_h5ad(d / "in.h5ad")
    with h5py.File(d / "in.h5ad", "r+") as f:
        del f["obs/donor/categories"]
        f["obs/donor"].create_dataset("categories", data=np.array([b"d\xe9", b"d1"], dtype="S"))


@case
def big_endian(d):
    """X written on another kind of machine."""
    cells().write_h5ad(d / "in.h5ad")
    with h5py.File(d / "in.h5ad", "r+") as f:
        for name, kind in (("data", ">f4"), ("indices", ">i4"), ("indptr", ">i4")):
            v = f["X"][name][:].astype(kind)
            del f["X"][name]
            f["X"].create_dataset(name, data=v, dtype=kind)


@case
def zstd(d):
    """X compressed by an HDF5 filter that is not installed (32015, zstd)."""
    cells().write_h5ad(d / "in.h5ad")
    with h5py.File(d / "in.h5ad", "r+") as f:
        for name in ("data", "indices"):
            v = f["X"][name][:]
            del f["X"][name]
            how = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            how.set_obj_track_times(False)
            how.set_chunk((len(v),))
            how.set_filter(32015, h5py.h5z.FLAG_OPTIONAL, (3,))
            to = h5py.h5d.create(
                f["X"].id, name.encode(), h5py.h5t.py_create(v.dtype), h5py.h5s.create_simple((len(v),)), how
            )
            to.write_direct_chunk((0,), pa.compress(v.tobytes(), codec="zstd", asbytes=True), 0)


@case
def column_that_is_not_there(d):
    """The list of obs columns names one that the file lacks."""
    cells().write_h5ad(d / "in.h5ad")
    with h5py.File(d / "in.h5ad", "r+") as f:
        del f["obs/donor"]


@case
def not_the_file(d):
    """A git-lfs pointer, a web page, an empty file and half a file, all called .h5ad; AnnData called .h5."""
    (d / "pointer.h5ad").write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n")
    (d / "page.h5ad").write_text("<!DOCTYPE html><html><body>404</body></html>")
    (d / "empty.h5ad").write_bytes(b"")
    cells().write_h5ad(d / "anndata.h5")
    whole = (d / "anndata.h5").read_bytes()
    (d / "half.h5ad").write_bytes(whole[: len(whole) // 2])


@case
def columns_of_our_names(d):
    """obs has columns that mixgf computes, too: cell, source, species, n_genes."""
    a = cells()
    a.obs["source"], a.obs["species"], a.obs["n_genes"], a.obs["cell"] = (
        "blood",
        "Homo sapiens",
        7,
        [f"T{k}" for k in range(60)],
    )
    a.write_h5ad(d / "in.h5ad")


@case
def gaps_in_columns(d):
    """Nullable integers, booleans and texts with gaps, some in the first cell."""
    a, k = cells(), np.arange(60)
    gap = k % 5 == 1
    a.obs["n"] = pd.array([None if g else int(i % 7) for i, g in zip(k, gap, strict=True)], dtype="Int64")
    a.obs["b"] = pd.array([None if g else bool(i % 2) for i, g in zip(k, gap, strict=True)], dtype="boolean")
    a.obs["s"] = pd.array([None if g else f"s{i % 3}" for i, g in zip(k, gap, strict=True)], dtype="string")
    a.obs["first"] = pd.array([None if i == 0 else int(i) for i in k], dtype="Int64")
    with ad.settings.override(allow_write_nullable_strings=True):
        a.write_h5ad(d / "in.h5ad")


@case
def bytes_for_text(d):
    """Categories and index as fixed-length bytes, as R writes them."""
    cells().write_h5ad(d / "in.h5ad")
    with h5py.File(d / "in.h5ad", "r+") as f:
        index = f["obs"].attrs["_index"]
        for group, name in ((f["obs/cell_type"], "categories"), (f["obs/donor"], "categories"), (f["obs"], index)):
            v = group[name].asstr()[:]
            del group[name]
            group.create_dataset(name, data=text(v))


# 4 where the counts are


@case
def log_in_x_counts_in_a_layer(d):
    """X log-normalised, layers['counts'] has the counts, layers['spliced'] halves of them."""
    a = cells()
    a.layers["counts"], a.layers["spliced"] = a.X.copy(), a.X * 0.5
    a.X = logged(a)
    a.write_h5ad(d / "in.h5ad")


@case
def no_counts_anywhere(d):
    """X scaled, raw log-normalised."""
    a = cells()
    a.X = logged(a)
    a.raw = a.copy()
    x = a.X.toarray()
    a.X = ((x - x.mean(0)) / (x.std(0) + 1e-3)).astype(np.float32)
    a.write_h5ad(d / "in.h5ad")


@case
def ambient_corrected(d):
    """Counts after an ambient-RNA correction: each a little below a whole number."""
    a = cells()
    x = a.X.copy()
    x.data = (x.data * (1 - 0.05 * np.random.default_rng(0).random(len(x.data)))).astype(np.float32)
    a.X = x
    a.write_h5ad(d / "in.h5ad")


@case
def rounded_per_10k(d):
    """Counts per 10,000, rounded: whole numbers, and every cell sums to 10,000 within rounding."""
    a = cells()
    x = sparse.csr_matrix(a.X.multiply(1e4 / np.asarray(a.X.sum(1))))
    x.data = np.round(x.data).astype(np.float32)
    a.X = x
    a.write_h5ad(d / "in.h5ad")


@case
def counts_then_log(d):
    """Two files put together: cells 0 to 44 have counts, 45 to 59 log-normalised values."""
    a = cells()
    a.X = sparse.vstack([a.X[:45], logged(a)[45:]], format="csr")
    a.write_h5ad(d / "in.h5ad")


@case
def one_negative(d):
    """One count of -1 in cell010."""
    a = cells()
    x = a.X.copy()
    x.data[x.indptr[10] + 3] = -1
    a.X = x
    a.write_h5ad(d / "in.h5ad")


# 5 10x folders and files


@case
def h5_two_species(d):
    """A matrix .h5 of human and mouse cells, names with GRCh38_ and mm10___ before them."""
    (ids, names), (mi, mn) = genes(), genes("mouse")
    x = sparse.block_diag([cells().X, cells(species="mouse").X])
    tenx(d / "in.h5", x, [f"GRCh38_{i}" for i in ids] + [f"mm10___{i}" for i in mi], [f"GRCh38_{i}" for i in names] + [f"mm10___{i}" for i in mn],
         genome=["GRCh38"] * 300 + ["mm10"] * 300)  # fmt: skip


@case
def h5_molecule_info(d):
    """The molecule table of Cell Ranger instead of the matrix."""
    with h5py.File(d / "in.h5", "w") as f:
        for name in ("barcode_idx", "count", "feature_idx", "gem_group", "library_idx", "umi"):
            f[name] = np.arange(10)
        f["barcodes"] = text(["A"] * 10)
        f.create_group("features")["id"] = text(genes()[0][:5])


@case
def h5_of_something_else(d):
    """HDF5 without any matrix of Cell Ranger."""
    with h5py.File(d / "latents.h5", "w") as f:
        f.create_group("droplet_latents")["x"] = np.ones(3)
        f.create_group("metadata")["barcodes_analyzed"] = text(["A"])
    with h5py.File(d / "table.h5", "w") as f:
        f["dataset"] = np.ones((3, 3))


@case
def samples_in_folders(d):
    """Two samples, each in a folder of its own, under the same file name."""
    for k in (1, 2):
        (d / f"S{k}/outs").mkdir(parents=True)
        tenx(d / f"S{k}/outs/filtered_feature_bc_matrix.h5", cells(seed=k).X, *genes())


@case
def mtx_tabs(d):
    """Tabs between the columns of matrix.mtx."""
    mtx(d / "in", cells().X, lines(), line="{g}\t{c}\t{v}", size="{G}\t{C}\t{N}")


@case
def mtx_bare_header(d):
    """The first line is %% and nothing else."""
    mtx(d / "in", cells().X, lines(), head="%%\n%")


@case
def mtx_five_columns(d):
    """Three counts a line: spliced, unspliced, ambiguous."""
    mtx(d / "in", cells().X, lines(), line="{g} {c} {v} 0 0")


@case
def mtx_transposed(d):
    """Cells in rows."""
    mtx(d / "in", cells().X, lines(), line="{c} {g} {v}", size="{C} {G} {N}")


@case
def mtx_prefix(d):
    """The three files have the sample's name before theirs, as in GEO."""
    mtx(d / "in", cells().X, lines(), prefix="GSM123_S1_")


@case
def mtx_quotes(d):
    """Names in double quotes, as R's write.table leaves them."""
    quoted = ["\t".join(f'"{word}"' for word in line.split("\t")) for line in lines()]
    mtx(d / "in", cells().X, quoted, barcodes=[f'"AAAC{k:012d}-1"' for k in range(60)])


@case
def mtx_and_a_subfolder(d):
    """A folder and a note beside the three files."""
    mtx(d / "in", cells().X, lines())
    (d / "in/analysis").mkdir()
    (d / "in/README.txt").write_text("a note\n")


@case
def mtx_header_lines(d):
    """A line of column names in barcodes.tsv, or in features.tsv."""
    mtx(d / "barcodes", cells().X, lines(), barcodes=["barcode", *[f"AAAC{k:012d}-1" for k in range(60)]])
    mtx(d / "features", cells().X, ["gene_id\tgene_name\ttype", *lines()])


@case
def mtx_cell_out_of_range(d):
    """The last five entries are of cell 99, and there are 60."""
    mtx(
        d / "in",
        cells().X,
        lines(),
        change=lambda rows: rows[:-5] + [f"{r.split()[0]} 99 {r.split()[2]}" for r in rows[-5:]],
    )


@case
def mtx_that_pass(d):
    """Windows line ends; 3.0 under a header that says real; symbols alone; values 1.125 under integer."""
    mtx(d / "crlf", cells().X, lines(), newline="\r\n")
    mtx(d / "real", cells().X, lines(), head="%%MatrixMarket matrix coordinate real general\n%", line="{g} {c} {v}.0")
    mtx(d / "symbols", cells().X, genes()[1])
    mtx(d / "fractions", cells().X, lines(), line="{g} {c} {v}.125")


# 6 names in expressions, labels and outputs


@case
def names_of_columns_and_labels(d):
    """160 cells of four types with columns that are hard to name, labels that are hard to write, and two unusual genes."""
    a = cells(n=160, types=("alpha cell", "beta cell", "delta cell", "acinar cell"))
    t, k = a.obs["cell_type"].astype(str).to_numpy(), np.arange(160)
    a.obs["Cell Type"], a.obs["class"] = t, t
    a.obs["leiden"] = pd.Categorical(pd.factorize(t)[0].astype(str))
    a.obs["rough"] = pd.Categorical(np.where(k % 5 == 0, "Unknown", t))
    a.obs["slashed"] = pd.Categorical([{"alpha cell": "NK/T", "beta cell": "G1/S"}.get(x, x) for x in t])
    x = sparse.hstack(
        [a.X, sparse.csr_matrix(np.random.default_rng(0).poisson(30, (160, 1)).astype(np.float32))], format="csr"
    )
    ad.AnnData(x, obs=a.obs, var=pd.DataFrame(index=[*genes()[0], "ENSG00000251562"])).write_h5ad(
        d / "in.h5ad"
    )  # the last: MALAT1


@case
def column_called_index(d):
    """obs has a column _index beside its index, as converted objects have."""
    a = cells(n=160, types=("alpha cell", "beta cell", "delta cell", "acinar cell"))
    a.write_h5ad(d / "in.h5ad")
    with h5py.File(d / "in.h5ad", "r+") as f:
        g = f["obs"]
        old = g.attrs["_index"]
        v = g[old][:]
        del g[old]
        for name in ("index", "_index"):
            g.create_dataset(name, data=v, dtype=h5py.string_dtype())
        g.attrs["_index"] = "index"
        g.attrs["column-order"] = np.array(["_index", *g.attrs["column-order"]], dtype=object)


# 7 machine and environment


@case
def machine(d):
    """One plain file."""
    cells().write_h5ad(d / "in.h5ad")


def make(out, *names):
    """Write cases into folders of their own under `out`."""
    for name in names or CASES:
        shutil.rmtree(out / name, ignore_errors=True)
        (out / name).mkdir(parents=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            CASES[name](out / name)


if __name__ == "__main__":
    make(Path(sys.argv[1]), *sys.argv[2:])

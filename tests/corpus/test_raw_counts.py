"""Raw counts come back as they are in the file, whatever the block size, and orthologs share a column."""

import anndata
import numpy as np
import pytest
from scipy import sparse

from mixgf.cells import counts, qc
from mixgf.cells.open import open_reader
from mixgf.config.data import MOUSE, Source
from mixgf.corpus import raw_counts
from mixgf.corpus.raw_counts import Counts
from mixgf.errors import UserError
from mixgf.genes import identify
from mixgf.genes.vocabulary import SpeciesGenes
from mixgf.storage import files

URI = "resource:pancreas_mouse_baron.h5ad"
SOURCE = Source(uri=URI, species="mouse", name="baron")


def reference(rows: np.ndarray, genes: list[str]) -> np.ndarray:
    data = anndata.read_h5ad(files.local_path(URI))
    ids = data.var["ensembl_id"].astype(str).tolist()
    dense = np.zeros((data.n_obs, len(genes)), dtype=np.int64)
    matrix = data.X.tocsc()
    for i, gene in enumerate(genes):
        for column in (j for j, name in enumerate(ids) if name == gene):
            dense[:, i] += matrix[:, [column]].toarray().ravel().astype(np.int64)
    return dense[rows]


def vocabulary() -> SpeciesGenes:
    data = anndata.read_h5ad(files.local_path(URI), backed="r")
    genes = sorted({name for name in data.var["ensembl_id"].astype(str) if name})[::700]
    genes = np.array(["ENSMUSG99999999999", *genes], dtype=object)  # one gene that the file does not have
    return SpeciesGenes(genes, np.arange(3, 3 + len(genes), dtype=np.int32), np.ones(len(genes)))


def known(rows: np.ndarray, *, hashed: bool = True) -> raw_counts.CellsOfSource:
    """What a corpus of the file knows of its cells, by `prepare`'s own reading."""
    with open_reader(URI) as reader:
        columns = identify.identify_columns(
            reader.gene_names(""), identify.gene_lookup(MOUSE), biotypes=("protein_coding",), vocabulary=None,
            is_gene=reader.is_gene,
        )  # fmt: skip
        masks = {f"{name}_G": columns[name].to_numpy() for name in ("counted", "mito", "candidate", "key")}
        sums = np.zeros(columns.num_rows, dtype=np.int64)
        parts = [
            qc.cell_metrics(b.data, b.indices, b.indptr, **masks, sums_G=sums)
            for b in counts.read_blocks(reader, columns, 0, int(rows.max()) + 1, rows=200)
        ]
        names = np.array(list(reader.cell_names(0, reader.num_rows)), dtype=object)
    found = qc.Metrics.merge(parts)
    hashes = qc.Hashes(found.hash_a[rows], found.hash_b[rows]) if hashed else None
    return raw_counts.CellsOfSource(rows_N=rows, names_N=names[rows], depth_N=found.n_counts[rows], hashes_N=hashes)


@pytest.mark.parametrize("block_cells", [97, 5000])
def test_counts_of_chosen_rows_equal_the_file(block_cells: int) -> None:
    rows, genes = np.array([555, 3, 4, 1000, 100]), vocabulary()
    found = raw_counts.read_counts(SOURCE, MOUSE, genes, known(rows), block_cells=block_cells)
    assert found.toarray().tolist() == reference(rows, genes.genes.tolist()).tolist()
    assert found.sum() > 0


def test_saved_counts_come_back(tmp_path) -> None:
    matrix = sparse.csr_matrix(np.array([[0, 2, 0], [0, 0, 0], [1, 0, 7]], dtype=np.int32))
    uri = str(tmp_path / "counts.parquet")
    raw_counts.save_counts(uri, np.array([5, 8, 13]), matrix)
    cells, back = raw_counts.load_counts(uri, 3)
    assert cells.tolist() == [5, 8, 13]
    assert back.toarray().tolist() == matrix.toarray().tolist()


def test_a_source_that_is_gone_is_named() -> None:
    gone = Source(uri="/nowhere/gone.h5ad", species="mouse", name="gone")
    with pytest.raises(UserError, match="put it back, or leave baselines out of"):
        raw_counts.read_counts(gone, MOUSE, vocabulary(), known(np.array([0])), block_cells=10)


def write(path, data: anndata.AnnData) -> Source:
    data.write_h5ad(path)
    return Source(uri=str(path), species="mouse", name="baron")


def source_of(num: int = 40) -> anndata.AnnData:
    data = anndata.read_h5ad(files.local_path(URI))[:num].copy()
    data.X = data.X.tocsr().astype(np.int32)
    return data


@pytest.mark.parametrize(
    "change", ["reversed", "shuffled", "cells in front", "cells behind", "columns", "dense", "csc"]
)
def test_cells_are_found_by_name_whatever_their_rows_are(change, tmp_path, caplog) -> None:
    data, rows, genes = source_of(), np.array([31, 2, 3, 17]), vocabulary()
    expected = reference(rows, genes.genes.tolist()).tolist()
    order = {
        "reversed": np.arange(40)[::-1], "shuffled": np.random.default_rng(1).permutation(40),
    }.get(change, np.arange(40))  # fmt: skip
    other = data[order].copy()
    if "cells" in change:
        more = source_of(60)[40:].copy()
        other = anndata.concat([more, data] if "front" in change else [data, more], merge="same")
    if change == "columns":
        other = other[:, ::-1].copy()
    if change in {"dense", "csc"}:
        other.X = other.X.toarray() if change == "dense" else other.X.tocsc()
    found = raw_counts.read_counts(write(tmp_path / "x.h5ad", other), MOUSE, genes, known(rows), block_cells=16)
    assert found.toarray().tolist() == expected
    moved = change in {"reversed", "shuffled", "cells in front"}
    assert ("cells are found by their names" in caplog.text) == moved


@pytest.mark.parametrize("hashed", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("a cell is gone", r"1 of 4 cells of the corpus are not there, such as '.*'"),
        ("other names", r"4 of 4 cells of the corpus are not there"),
        ("two of a name", r"two are called '.*'"),
        ("names of others", r"cells have other counts .* has a depth of [\d,]+, not [\d,]+"),
        ("one count", r"1 of 4 cells have other counts .* has a depth of"),
        ("another gene", r"1 of 4 cells have other counts .* has the same depth on other genes"),
        ("fewer rows", r"4 of 4 cells of the corpus are not there"),
    ],
)
def test_other_cells_or_other_counts_are_refused(change, message, hashed, tmp_path) -> None:
    data, rows = source_of(), np.array([31, 2, 3, 17])
    names = data.obs_names.to_numpy().astype(object)
    if change == "a cell is gone":
        data = data[np.arange(40) != 17].copy()
    elif change == "fewer rows":
        data = data[[0, 1, 5]].copy()
    elif change == "other names":
        data.obs_names = [f"x{i}" for i in range(40)]
    elif change == "two of a name":
        data = data[np.arange(40)[::-1]].copy()
        data.obs_names = [names[31] if i == 5 else name for i, name in enumerate(data.obs_names)]
    elif change == "names of others":
        data = data[np.arange(40)[::-1]].copy()
        data.obs_names = names
    else:
        dense = data.X.toarray()
        dense[17, int(np.flatnonzero(dense[17])[0])] += 1
        if change == "another gene":
            dense[17] = source_of().X.toarray()[17]
            dense[17] = np.roll(dense[17], 1)
        data.X = sparse.csr_matrix(dense)
    source, wanted = write(tmp_path / "x.h5ad", data), known(rows, hashed=hashed)
    if change == "another gene" and not hashed:
        return  # without hashes only depth and names are known
    with pytest.raises(UserError, match=message) as refusal:
        raw_counts.read_counts(source, MOUSE, vocabulary(), wanted, block_cells=16)
    assert "x.h5ad" in str(refusal.value)
    assert "prepare the corpus again" in str(refusal.value)


def test_the_shared_space_of_two_species_counts_orthologs_in_one_column() -> None:
    human = Counts(matrix=sparse.csr_matrix([[1, 2, 3]]), genes=np.array(["H1", "H2", "H3"]), species="human")
    mouse = Counts(matrix=sparse.csr_matrix([[7, 8, 9]]), genes=np.array(["M3", "M9", "M1"]), species="mouse")
    orthologs = {("human", "mouse"): {"H1": "M1", "H2": "M2", "H3": "M3"}}
    (a, b), genes = raw_counts.shared_gene_space([human, mouse], orthologs)
    assert genes.tolist() == ["H1", "H3"]  # H2's partner was not measured
    assert (a.toarray().tolist(), b.toarray().tolist()) == ([[1, 3]], [[9, 7]])
    with pytest.raises(UserError, match="no one-to-one orthologs of human and mouse"):
        raw_counts.shared_gene_space([human, mouse], {})


def test_the_shared_space_of_one_species_is_the_union_of_genes() -> None:
    one = Counts(matrix=sparse.csr_matrix([[1, 2]]), genes=np.array(["H2", "H1"]), species="human")
    two = Counts(matrix=sparse.csr_matrix([[5]]), genes=np.array(["H3"]), species="human")
    (a, b), genes = raw_counts.shared_gene_space([one, two], {})
    assert genes.tolist() == ["H1", "H2", "H3"]
    assert (a.toarray().tolist(), b.toarray().tolist()) == ([[2, 1, 0]], [[0, 0, 5]])

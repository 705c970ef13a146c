"""Raw counts come back as they are in the file, whatever the block size, and orthologs share a column."""

import anndata
import numpy as np
import pytest
from scipy import sparse

from mixgf.config.data import MOUSE, Source
from mixgf.corpus import raw_counts
from mixgf.corpus.raw_counts import Counts
from mixgf.errors import UserError
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


@pytest.mark.parametrize("block_cells", [97, 5000])
def test_counts_of_chosen_rows_equal_the_file(block_cells: int) -> None:
    rows, genes = np.array([3, 4, 100, 555, 1000]), vocabulary()
    found = raw_counts.read_counts(SOURCE, MOUSE, genes, rows, block_cells=block_cells)
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
        raw_counts.read_counts(gone, MOUSE, vocabulary(), np.array([0]), block_cells=10)


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

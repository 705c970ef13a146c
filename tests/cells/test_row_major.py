"""Column-major files written as rows: the same rows as the file's own, whatever the chunks, ranges and blocks."""

import anndata
import numpy as np
import pytest
from scipy import io, sparse

import mixgf.cells.matrices
from mixgf.cells import row_major
from mixgf.cells.open import open_reader


@pytest.fixture
def counts():
    x = np.random.default_rng(0).negative_binomial(0.3, 0.2, (23, 11))
    x[[0, 9, 22]] = 0  # empty rows at the ends and in between
    return x


def csc(counts, path):
    anndata.AnnData(sparse.csc_matrix(counts.astype(np.float32))).write_h5ad(path / "a.h5ad", compression="gzip")
    return str(path / "a.h5ad")


def shuffled_mtx(counts, path):
    """A Matrix Market folder whose entries stand in no order."""
    (path / "m").mkdir()
    x = sparse.coo_array(counts.T)
    order = np.random.default_rng(1).permutation(x.nnz)
    x = sparse.coo_array((x.data[order], (x.coords[0][order], x.coords[1][order])), shape=x.shape)
    io.mmwrite(path / "m" / "matrix.mtx", x, field="integer")
    (path / "m" / "features.tsv").write_text("".join(f"g{i}\tG{i}\tGene Expression\n" for i in range(11)))
    (path / "m" / "barcodes.tsv").write_text("".join(f"c{i}\n" for i in range(23)))
    return str(path / "m")


@pytest.mark.parametrize("make", [csc, shuffled_mtx])
@pytest.mark.parametrize("chunk_rows", [1, 7, 23, 100])
def test_chunks_hold_the_rows_of_the_file(make, chunk_rows, counts, tmp_path, monkeypatch):
    monkeypatch.setattr(row_major, "CHUNK_ROWS", chunk_rows)
    monkeypatch.setattr(mixgf.cells.matrices, "SCAN_ENTRIES", 5)
    with open_reader(make(counts, tmp_path)) as reader:
        row_major.write_rows(reader, str(tmp_path / "rows"))
    for start, stop, rows in [(0, 23, 4), (0, 23, 100), (6, 15, 3), (7, 14, 7), (22, 23, 1), (5, 5, 2)]:
        found, at = np.zeros((23, 11)), start
        for b in row_major.read_rows(str(tmp_path / "rows"), start, stop, rows):
            num = len(b.indptr) - 1
            assert b.start == at
            assert 1 <= num <= rows
            found[at : at + num] = sparse.csr_array((b.data, b.indices, b.indptr), shape=(num, 11)).toarray()
            at += num
        assert at == stop
        assert np.array_equal(found[start:stop], counts[start:stop])


def test_row_major_files_need_no_reordering(counts, tmp_path):
    anndata.AnnData(sparse.csr_matrix(counts.astype(np.float32))).write_h5ad(tmp_path / "a.h5ad")
    with open_reader(str(tmp_path / "a.h5ad")) as reader:
        assert reader.scan is None

"""An AnnData is read as its file is: in memory, backed, as a view, whatever its matrix; and it stays as it was."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from mixgf.cells.open import open_reader
from mixgf.corpus import anndata
from mixgf.errors import UserError

NUM_CELLS, NUM_GENES = 23, 12


def table(matrix):
    obs = pd.DataFrame(
        {
            "kind": pd.Categorical(["a", "b", None] * NUM_CELLS)[:NUM_CELLS],
            "whole": np.arange(NUM_CELLS),
            "share": np.linspace(0, 1, NUM_CELLS),
            "flag": np.arange(NUM_CELLS) % 2 == 0,
            "text": [f"t{i % 3}" for i in range(NUM_CELLS)],
            "some": pd.array([None if i == 4 else i for i in range(NUM_CELLS)], dtype="Int64"),
        },
        index=[f"c{i}" for i in range(NUM_CELLS)],
    )
    var = pd.DataFrame(
        {"ensembl_id": ["", *[f"ENSG{i:011d}" for i in range(1, NUM_GENES)]]}, index=[f"g{i}" for i in range(NUM_GENES)]
    )
    made = ad.AnnData(matrix, obs=obs, var=var)
    made.raw = ad.AnnData(matrix.copy(), var=var)
    made.layers["twice"] = matrix * 2
    return made


@pytest.fixture(params=[sparse.csr_matrix, sparse.csc_matrix, np.asarray], ids=["csr", "csc", "dense"])
def cells(request):
    counts = np.random.default_rng(0).poisson(0.7, (NUM_CELLS, NUM_GENES)).astype(np.float32)
    return table(request.param(counts))


def dense(reader, start, stop, rows=5):
    """Counts of rows [start, stop), and the largest block that was given out."""
    parts = [
        sparse.csr_array((b.data, b.indices, b.indptr), shape=(len(b.indptr) - 1, reader.num_columns)).toarray()
        for b in reader.read(start, stop, rows)
    ]
    assert max(map(len, parts)) <= rows
    return np.concatenate(parts)


@pytest.mark.parametrize("layer", ["X", "raw", "twice"])
def test_a_table_in_memory_and_a_backed_one_are_read_as_their_file(cells, layer, tmp_path):
    path = tmp_path / "cells.h5ad"
    cells.write_h5ad(path)
    backed = ad.read_h5ad(path, backed="r")
    with open_reader(str(path), layer) as wanted:
        expected = dense(wanted, 3, 20)
        assert expected.any()
        for given in (cells, backed, str(path), path):
            with anndata.open_cells(given, layer) as found:
                assert np.array_equal(dense(found, 3, 20), expected)
                assert (found.num_rows, found.num_columns) == (NUM_CELLS, NUM_GENES)
                assert found.cell_names(2, 4).tolist() == wanted.cell_names(2, 4).tolist()
                assert found.obs_columns == wanted.obs_columns
                for column in ("", "ensembl_id"):
                    assert found.gene_names(column).tolist() == wanted.gene_names(column).tolist()
                assert found.gene_names("").tolist()[:2] == ["g0", "ENSG00000000001"]  # no id: its name stands in
                for name in wanted.obs_columns:
                    mine, theirs = found.obs(name, 1, 9), wanted.obs(name, 1, 9)
                    assert mine.dtype == theirs.dtype, name
                    np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("layer", ["X", "raw", "twice"])
def test_views_give_their_own_rows_and_columns_block_by_block(cells, layer, tmp_path):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    rows, columns = [20, 3, 4, 5, 11, 0, 7, 9], slice(2, 9)
    expected = cells.X[rows] if isinstance(cells.X, np.ndarray) else cells.X.toarray()[rows]
    expected = expected * (2 if layer == "twice" else 1)
    expected = expected if layer == "raw" else expected[:, columns]
    for whole in (cells, backed):
        view = whole[rows, columns]
        assert view.is_view
        with anndata.open_cells(view, layer) as found:
            assert np.array_equal(dense(found, 1, 8, rows=3), expected[1:])
            assert found.num_columns == expected.shape[1]
            assert found.cell_names(0, 2).tolist() == ["c20", "c3"]


def test_what_cannot_be_read_is_one_line(cells):
    with pytest.raises(UserError, match=r"adata: layer = 'counts': not there; it has X, raw, twice"):
        anndata.open_cells(cells, "counts").__enter__()
    with pytest.raises(UserError, match=r"adata is DataFrame: must be an AnnData, or the path or URI"):
        anndata.open_cells(cells.obs).__enter__()
    with anndata.open_cells(cells) as reader, pytest.raises(UserError, match=r"genes = 'name': no such column of var"):
        reader.gene_names("name")
    with pytest.raises(UserError, match=r"adata: layer = 'X': not there; it has no counts"):
        anndata.open_cells(ad.AnnData(obs=cells.obs)).__enter__()

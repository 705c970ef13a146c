"""An .h5ad file that is written slice by slice reads back as the one that anndata writes in one piece."""

import anndata as ad
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pandas.testing import assert_frame_equal

from mixgf.corpus import h5ad
from mixgf.corpus.reader import Corpus
from mixgf.storage import tables


def vectors(values_ND, cut):
    for start in range(0, len(values_ND), cut):
        part = values_ND[start : start + cut]
        yield pa.table({"vector": pa.FixedSizeListArray.from_arrays(pa.array(part.reshape(-1)), part.shape[1])})


@pytest.fixture
def corpus(make_corpus):
    """23 cells in three shards. The second shard lacks a number and a text that the others have."""
    uri = make_corpus(np.random.default_rng(0).integers(5, 30, 23), np.arange(23) % 2, [9, 10, 4])
    found = Corpus(uri)
    for shard in range(3):
        table = tables.read_table(found.shard_uri(shard))
        if shard != 1:
            num = table.num_rows
            table = table.append_column("age", pa.array(range(num), pa.int64()))
            table = table.append_column("donor", pa.array([None, "b", *("a" * (num - 2))]))
        table = table.append_column("code", pa.array([f"{shard}-{i}" for i in range(table.num_rows)]))
        tables.write_table(found.shard_uri(shard), table)
    return Corpus(uri)


@pytest.mark.parametrize("chunk_bytes", [64, h5ad.CHUNK_BYTES])
@pytest.mark.parametrize("cut", [1, 7, 23])
def test_slices_read_back_as_the_whole(corpus, tmp_path, monkeypatch, chunk_bytes, cut):
    monkeypatch.setattr(h5ad, "CHUNK_BYTES", chunk_bytes)
    values_ND = np.random.default_rng(1).normal(size=(23, 5)).astype(np.float32)
    assert h5ad.write_h5ad(tmp_path / "cells.h5ad", corpus, "X_mixgf", vectors(values_ND, cut)) == 5
    found = ad.read_h5ad(tmp_path / "cells.h5ad")
    obs = corpus.obs().set_index("cell")
    ad.AnnData(obs=obs, obsm={"X_mixgf": values_ND}).write_h5ad(tmp_path / "whole.h5ad")
    whole = ad.read_h5ad(tmp_path / "whole.h5ad")
    assert found.shape == whole.shape == (23, 0)
    assert found.X is None
    assert_frame_equal(found.obs, whole.obs, check_like=True)
    assert isinstance(found.obs["donor"].dtype, pd.CategoricalDtype)
    assert found.obsm["X_mixgf"].dtype == np.float32
    assert np.array_equal(found.obsm["X_mixgf"], values_ND)


def test_cells_have_the_names_of_their_own_file_beside_those_of_the_corpus(corpus, tmp_path):
    values_ND = np.zeros((23, 5), np.float32)
    h5ad.write_h5ad(tmp_path / "cells.h5ad", corpus, "X", vectors(values_ND, 7), own_names=True)
    obs = ad.read_h5ad(tmp_path / "cells.h5ad").obs
    assert [f"{s}:{c}" for s, c in zip(obs["source"], obs["cell_name"], strict=True)] == obs.index.tolist()


def test_vectors_that_do_not_belong_to_all_cells_are_an_error(corpus, tmp_path):
    with pytest.raises(AssertionError, match="vectors of 22 of 23 cells"):
        h5ad.write_h5ad(tmp_path / "cells.h5ad", corpus, "X", vectors(np.zeros((22, 3), np.float32), 5))

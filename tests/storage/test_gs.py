"""Cells in gs:// on an emulator in this process; skipped without gcsfs and gcp-storage-emulator (they are in no extra of the tests)."""

import os

os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # its gRPC does not speak to an emulator

import anndata
import numpy as np
import pandas as pd
import pytest
from processes import free_port
from scipy import sparse

from mixgf.cells import open as opening
from mixgf.storage import files

pytest.importorskip("gcsfs", reason="gs:// needs gcsfs")
server = pytest.importorskip("gcp_storage_emulator.server", reason="gs:// is tested with gcp-storage-emulator")


@pytest.fixture
def bucket(monkeypatch):
    port = free_port()
    running = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="cells")
    running.start()
    for name, value in (("TOKEN", "anon"), ("ENDPOINT_URL", f"http://127.0.0.1:{port}")):
        monkeypatch.setenv(f"FSSPEC_GS_{name}", value)
    yield "gs://cells"
    running.stop()


def test_files_and_stores_are_read_and_folders_are_listed(bucket, tmp_path):
    x = np.random.default_rng(0).negative_binomial(1, 0.3, (40, 15)).astype(np.float32)
    obs = pd.DataFrame({"kind": pd.Categorical(["a", "b"] * 20)}, index=[f"c{i}" for i in range(40)])
    cells = anndata.AnnData(sparse.csr_matrix(x), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(15)]))
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with anndata.settings.override(zarr_write_format=3):
        cells.write_zarr(tmp_path / "cells.zarr")
    for file in sorted(tmp_path.rglob("*")):
        if file.is_file():
            files.write_bytes(f"{bucket}/data/{file.relative_to(tmp_path)}", file.read_bytes())
    for name in ("cells.h5ad", "cells.zarr"):
        with opening.open_reader(f"{bucket}/data/{name}") as reader:
            blocks = [
                sparse.csr_array((b.data.copy(), b.indices.copy(), b.indptr), shape=(len(b.indptr) - 1, 15)).toarray()
                for b in reader.read(0, 40, 7)
            ]
            assert reader.obs("kind", 0, 3).tolist() == ["a", "b", "a"]
        assert np.array_equal(np.vstack(blocks), x)
    assert files.list_dir(f"{bucket}/data") == ["cells.h5ad", "cells.zarr"]
    assert files.glob(f"{bucket}/data/*.h5ad") == [f"{bucket}/data/cells.h5ad"]
    with (
        pytest.raises(opening.UserError, match=r"gs://cells/none\.h5ad: no such file"),
        opening.open_reader(f"{bucket}/none.h5ad"),
    ):
        pass

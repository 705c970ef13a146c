"""Laws of TileDB-SOMA experiments: what is read is what was written, on disk and in object storage; the rest is one line.

They are slow tests, to run alone (`pytest -m slow -n0 tests/cells/test_soma.py`): in a process with many other threads
tiledbsoma ended the whole process twice (SIGABRT), and its cause is not known.
"""

import anndata
import boto3
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from scipy import sparse

from mixgf.cells import soma
from mixgf.cells.open import format_of, open_reader, source_files
from mixgf.errors import StorageError, UserError

pytestmark = pytest.mark.slow
N, G = 37, 9


@pytest.fixture
def cells():
    x = np.random.default_rng(1).negative_binomial(0.5, 0.2, (N, G)).astype(np.float32)
    x[[0, 8, N - 1]] = 0
    obs = pd.DataFrame(
        {
            "type": pd.Categorical(["alpha", "beta", None, "δ"] * 9 + ["beta"]),
            "text": [f"t{i}" for i in range(N)],
            "whole": np.arange(N),
            "share": np.linspace(0, 1, N, dtype=np.float32),
            "flag": np.arange(N) % 2 == 0,
        },
        index=[f"c{i}" for i in range(N)],
    )
    var = pd.DataFrame({"gene_ids": [f"ENSG{i:011d}" for i in range(G)]}, index=[f"Gen{i}" for i in range(G)])
    return anndata.AnnData(sparse.csr_matrix(x), obs=obs, var=var)


def write(cells, to, **options):
    import tiledbsoma.io

    tiledbsoma.io.from_anndata(str(to), cells, measurement_name="RNA", **options)
    return str(to)


def read(uri, layer="X", start=0, stop=N, rows=4):
    with open_reader(uri, layer) as reader:
        blocks = [
            sparse.csr_array((b.data.copy(), b.indices.copy(), b.indptr), shape=(len(b.indptr) - 1, reader.num_columns))
            for b in reader.read(start, stop, rows)
        ]
        obs = {name: reader.obs(name, start, stop).tolist() for name in reader.obs_columns}
        names = reader.cell_names(start, stop).tolist(), reader.gene_names("").tolist()
        assert [b.shape[0] for b in blocks] == [min(rows, stop - a) for a in range(start, stop, rows)]
        return sparse.vstack(blocks).toarray(), *names, obs


@pytest.mark.parametrize("window", [1, 5, 2_048])
def test_a_reader_gives_what_was_written(window, cells, tmp_path, monkeypatch):
    monkeypatch.setattr(soma, "WINDOW_ROWS", window)
    cells.layers["twice"], cells.raw = cells.X * 2, cells.copy()
    cells.X = cells.X * 3
    uri = write(cells, tmp_path / "e", X_layer_name="data")
    assert format_of(uri) == "soma"
    x = cells.raw.X.toarray()
    for layer, times in (("X", 3), ("data", 3), ("raw", 1), ("twice", 2), ("RNA/twice", 2)):
        for start, stop, rows in ((0, N, 4), (5, 23, 7), (N - 1, N, 3)):
            found, names, genes, obs = read(uri, layer, start, stop, rows)
            assert np.array_equal(found, x[start:stop] * times)
            assert names == cells.obs_names[start:stop].tolist()
            assert genes == cells.var["gene_ids"].tolist()
            part = cells.obs.iloc[start:stop]
            assert obs["type"] == [None if pd.isna(v) else v for v in part["type"]]
            assert obs["text"] == part["text"].tolist()
            assert obs["whole"] == part["whole"].tolist()
            assert obs["share"] == pytest.approx(part["share"].tolist())
            assert obs["flag"] == part["flag"].astype(int).tolist()
    assert sum(source_files(uri).values()) == sum(p.stat().st_size for p in (tmp_path / "e").rglob("*") if p.is_file())


def test_cells_with_gaps_in_their_numbers_are_counted_through(tmp_path):
    row_ids, column_ids = np.array([3, 4, 9, 20]), np.array([1, 5])
    x = np.array([[1, 0], [0, 2], [3, 4], [0, 5]])
    import tiledbsoma

    uri = str(tmp_path / "e")
    with tiledbsoma.Experiment.create(uri) as experiment:
        measurement = experiment.add_new_collection("ms").add_new_collection("RNA", tiledbsoma.Measurement)
        for to, name, ids in ((experiment, "obs", row_ids), (measurement, "var", column_ids)):
            schema = pa.schema([("soma_joinid", pa.int64()), (f"{name}_id", pa.large_string())])
            frame = to.add_new_dataframe(name, schema=schema, index_column_names=["soma_joinid"], domain=[(0, 99)])
            order = np.argsort(-ids)
            frame.write(
                pa.table({"soma_joinid": ids[order], f"{name}_id": [f"n{i}" for i in ids[order]]}, schema=schema)
            )
        layers = measurement.add_new_collection("X")
        matrix = layers.add_new_sparse_ndarray("counts", type=pa.int32(), shape=(100, 100))
        row, column = np.nonzero(x)
        columns = {
            "soma_dim_0": row_ids[row],
            "soma_dim_1": column_ids[column],
            "soma_data": x[row, column].astype(np.int32),
        }
        matrix.write(pa.table(columns))
        matrix.write(
            pa.table({"soma_dim_0": [10], "soma_dim_1": [1], "soma_data": pa.array([77], pa.int32())})
        )  # of no cell
    found, names, genes, _ = read(uri, "X", 0, 4, 3)
    assert np.array_equal(found, x)
    assert (names, genes) == (["n3", "n4", "n9", "n20"], ["n1", "n5"])
    assert np.array_equal(read(uri, "X", 1, 3)[0], x[1:3])


def test_what_cannot_be_read_is_one_line(cells, tmp_path):
    uri = write(cells, tmp_path / "e")
    with pytest.raises(UserError, match=r"layer = 'spliced': not in the experiment; it has RNA/data$"):
        read(uri, "spliced")
    cells.var["feature_types"] = "Antibody Capture"
    with pytest.raises(UserError, match="no feature is of the kind Gene Expression"):
        read(write(cells, tmp_path / "adt"))
    with pytest.raises(UserError, match=r"a SOMACollection; give the SOMAExperiment that holds it"):
        read(f"{uri}/ms")
    fragment = max((tmp_path / "e/ms/RNA/X/data/__fragments").rglob("a0.tdb"), key=lambda p: p.stat().st_size)
    fragment.write_bytes(fragment.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"^\S+/e: [^\n]*$"):
        read(uri)


def test_an_experiment_in_object_storage_is_read(cells, tmp_path, s3_server, s3_settings, monkeypatch):
    s3_settings(s3_server)
    s3 = boto3.client("s3", endpoint_url=s3_server)
    s3.create_bucket(Bucket="soma", ACL="public-read")
    uri = write(cells, tmp_path / "e")
    for file in (tmp_path / "e").rglob("*"):
        if file.is_file():
            s3.upload_file(str(file), "soma", str(file.relative_to(tmp_path)), ExtraArgs={"ACL": "public-read"})
    known = read(uri)
    for anonymous in (False, True):
        if anonymous:
            for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                monkeypatch.delenv(name)
            monkeypatch.setenv("HOME", str(tmp_path))
            monkeypatch.setenv("FSSPEC_S3_ANON", "true")
        found = read("s3://soma/e")
        assert np.array_equal(found[0], known[0])
        assert found[1:] == known[1:]
        assert len(source_files("s3://soma/e")) == len(source_files(uri))
    soma._context.cache_clear()  # what was read is in its cache
    with open_reader("s3://soma/e") as reader:
        s3.delete_objects(
            Bucket="soma",
            Delete={
                "Objects": [{"Key": k.removeprefix("s3://soma/")} for k in source_files("s3://soma/e/ms/RNA/X/data")]
            },
        )
        with pytest.raises((UserError, StorageError)):
            list(reader.read(0, N, 5))

"""`prepare` makes the same corpus of the same cells in every format, and a bad source of any format ends no run."""

import dataclasses
import gzip

import anndata
import pytest
import zarr
from scipy import io as scipy_io
from scipy import sparse

from mixgf.config.data import Source
from mixgf.corpus.reader import Corpus
from mixgf.execution import LocalExecutor
from mixgf.stages import prepare
from mixgf.storage import artifacts, tables


def as_zarr(cells, path, form):
    with anndata.settings.override(zarr_write_format=form):
        cells.write_zarr(path)


def as_annbatch(cells, path):
    group = zarr.open_group(path, mode="w", zarr_format=3)
    group.attrs.update({"encoding-type": "annbatch-preshuffled", "encoding-version": "0.1.0"})
    for number, rows in enumerate((slice(0, 14), slice(14, None))):
        anndata.io.write_elem(group, f"dataset_{number}", cells[rows].copy())


def as_folder(cells, path):
    path.mkdir()
    scipy_io.mmwrite(path / "matrix.mtx", sparse.coo_array(cells.X.T), field="integer")
    (path / "features.tsv.gz").write_bytes(gzip.compress("".join(f"{g}\n" for g in cells.var_names).encode()))
    (path / "barcodes.tsv.gz").write_bytes(gzip.compress("".join(f"{c}\n" for c in cells.obs_names).encode()))


def as_soma(cells, path):
    import tiledbsoma.io  # not in every test process: see tests/cells/test_soma.py

    tiledbsoma.io.from_anndata(str(path), cells, measurement_name="RNA")


FORMATS = {
    "zarr2": lambda cells, path: as_zarr(cells, path, 2),
    "zarr3": lambda cells, path: as_zarr(cells, path, 3),
    "annbatch": as_annbatch,
    "soma": as_soma,
    "folder": as_folder,
    "anndata.h5": lambda cells, path: cells.write_h5ad(path),
}


@pytest.fixture
def ants(world):
    config, _ = world
    ant = next(source for source in config.sources if source.name == "ant" or source.uri.endswith("ant.h5ad"))
    return dataclasses.replace(config, sources=(ant,)), anndata.read_h5ad(ant.uri)


def rows_of(uri):
    corpus = Corpus(uri)
    rows = [row for i in range(len(corpus.shards)) for row in tables.read_table(corpus.shard_uri(i)).to_pylist()]
    return [
        {k: v for k, v in row.items() if k in ("tokens", "source_row", "n_counts", "n_genes", "mito_fraction")}
        | {"name": row["cell"].split(":")[1]}
        for row in rows
    ]


SOME = tuple(name for name in FORMATS if name != "soma")
WITH_SOMA = pytest.param(tuple(FORMATS), marks=pytest.mark.slow)


@pytest.mark.parametrize("names", [SOME, WITH_SOMA])
def test_the_corpus_of_a_file_does_not_depend_on_its_format(ants, tmp_path, names):
    config, cells = ants
    known = rows_of(prepare.run(config, executor=LocalExecutor()))
    for name in names:
        FORMATS[name](cells, tmp_path / name)
        source = Source(uri=str(tmp_path / name), species="ant")
        found = dataclasses.replace(config, sources=(source,), output=str(tmp_path / f"run-{name}"))
        assert rows_of(prepare.run(found, executor=LocalExecutor())) == known, name


@pytest.mark.parametrize(
    "names", [("zarr3", "annbatch"), pytest.param(("zarr3", "annbatch", "soma"), marks=pytest.mark.slow)]
)
def test_a_bad_source_of_any_format_ends_no_run(ants, tmp_path, names):
    config, cells = ants
    for name in names:
        FORMATS[name](cells, tmp_path / name)
    for folder, pattern in (
        ("zarr3", "X/data/c/0"),
        ("annbatch", "dataset_1/X/indices/c/0"),
        ("soma", "ms/RNA/X/data/__fragments/*/a0.tdb"),
    ):
        for file in (tmp_path / folder).glob(pattern):
            file.write_bytes(file.read_bytes()[:-9])
    (tmp_path / "loom.h5ad").write_text("cell\tgene\n")
    bad = tuple(Source(uri=str(tmp_path / name), species="ant") for name in (*names, "loom.h5ad"))
    uri = prepare.run(dataclasses.replace(config, sources=(*config.sources, *bad)), executor=LocalExecutor())
    record = artifacts.find(uri)
    assert [entry["name"] for entry in record.details["refused"]] == [*names, "loom"]
    assert all("\n" not in entry["error"] and str(tmp_path) in entry["error"] for entry in record.details["refused"])
    assert [entry["name"] for entry in record.details["sources"]] == ["ant"]

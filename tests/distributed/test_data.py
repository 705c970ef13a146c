"""Cells as Ray Data: every cell once with its values, and row passes with the bytes and errors of the local executor."""

import gzip
import itertools
import re
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from scipy import io as scipy_io
from scipy import sparse

from mixgf.config.run import Compute, Config
from mixgf.corpus.reader import Corpus
from mixgf.distributed.data import read_cells, read_corpus
from mixgf.distributed.executor import RayExecutor
from mixgf.distributed.pipelines import pipeline_dataset
from mixgf.errors import StorageError, UserError
from mixgf.execution import LocalExecutor, Pipeline, Task
from mixgf.genes import species
from mixgf.storage import tables

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]


@pytest.fixture
def corpus(make_corpus):
    """21 cells in three shards."""
    rng = np.random.default_rng(4)
    return make_corpus(rng.integers(3, 30, 21), rng.integers(0, 2, 21), [7, 5, 9])


def test_the_guides_own_lines_get_every_cell_of_a_corpus_once(corpus, tmp_path, monkeypatch):
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/corpus").symlink_to(corpus)
    monkeypatch.chdir(tmp_path)
    guide = (Path(__file__).parents[2] / "jobs/README.md").read_text()
    (lines,) = re.findall(r"## Ray Data\n.*?```python\n(.*?)```", guide, re.DOTALL)
    names = {}
    exec(lines, names)

    tokens, offsets = Corpus(corpus).tokens(np.arange(21))
    found = names["found"]
    assert len(found) == 21
    assert dict(zip(found["cell"], found["token"], strict=True)) == {
        f"source:{i}": tokens[offsets[i]] for i in range(21)
    }


def test_a_function_of_batches_sees_all_tokens(corpus):
    def summed(batch):
        return {"cell": batch["cell"], "sum": np.array([tokens.sum() for tokens in batch["tokens"]])}

    found = read_corpus(corpus, ["cell", "tokens"]).map_batches(summed).to_pandas()
    tokens, offsets = Corpus(corpus).tokens(np.arange(21))
    expected = {f"source:{i}": tokens[a:b].sum() for i, (a, b) in enumerate(itertools.pairwise(offsets))}
    assert len(found) == 21
    assert dict(zip(found["cell"], found["sum"], strict=True)) == expected


def test_all_columns_of_a_run_come_with_their_types_one_block_per_shard(corpus, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "corpus").symlink_to(corpus)
    found = read_corpus(str(run))
    table = pa.concat_tables(tables.read_table(Corpus(corpus).shard_uri(i)) for i in range(3))
    assert found.schema().names == table.column_names
    assert sorted(block.num_rows for block in found.iter_batches(batch_size=None, batch_format="pyarrow")) == [5, 7, 9]
    rows = sorted(found.take_all(), key=lambda row: row["source_row"])
    assert rows == table.to_pylist()
    found.explain()
    assert "ReadCorpus" in capsys.readouterr().out


def test_columns_that_are_not_asked_for_are_not_read(corpus, monkeypatch):
    from mixgf.distributed import data

    asked = []
    group = data.pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        data.pq.ParquetFile, "read_row_group", lambda *args, **named: (asked.append(args[2]), group(*args, **named))[1]
    )
    (table,) = data._read_shard(Corpus(corpus).shard_uri(1), ("length", "species"))
    assert (asked, table.column_names, table.num_rows) == ([["length", "species"]], ["length", "species"], 5)


def test_a_column_that_a_shard_lacks_is_null_there(corpus):
    uri = Corpus(corpus).shard_uri(1)
    tables.write_table(uri, tables.read_table(uri).drop_columns(["cell_type"]))
    found = read_corpus(corpus, ["source_row", "cell_type"]).to_pandas().set_index("source_row")["cell_type"]
    assert found.isna().to_numpy().nonzero()[0].tolist() != []
    assert sorted(found.index[found.isna()]) == [7, 8, 9, 10, 11]
    with pytest.raises(UserError, match="no column 'nonsense'; there are tokens, cell, cell_type"):
        read_corpus(corpus, ["nonsense"])
    with pytest.raises(UserError, match="no finished"):
        read_corpus(f"{corpus}/shards")


def write_folder(folder, x, names):
    """A 10x Matrix Market folder, as Cell Ranger writes it."""
    folder.mkdir()
    scipy_io.mmwrite(folder / "matrix.mtx", sparse.coo_array(x.T), field="integer")
    lines = "".join(f"{name}\t{name}\tGene Expression\n" for name in names)
    (folder / "features.tsv.gz").write_bytes(gzip.compress(lines.encode()))
    (folder / "barcodes.tsv.gz").write_bytes(gzip.compress("".join(f"b{i}\n" for i in range(len(x))).encode()))


def test_counts_of_a_file_and_a_folder_come_once_and_right(world, tmp_path, monkeypatch):
    config, counts = world
    (row,) = [row for row in config.species if row.name == "ant"]
    genes = species.gene_table(row)["gene"].to_pylist()
    x = np.random.default_rng(8).negative_binomial(1, 0.3, (13, len(genes)))
    order = np.random.default_rng(9).permutation(len(genes))  # another order of genes, and an unknown one
    write_folder(tmp_path / "tenx", np.hstack([x[:, order], x[:, :1]]), [*(genes[i] for i in order), "no-gene"])
    monkeypatch.chdir(tmp_path)  # relative paths must mean the same to workers
    found = read_cells({"ant": ["ant.h5ad", "tenx"]}, obs=["score"], species_rows=config.species, block_cells=5)
    rows = found.take_all()
    assert found.schema().names == ["cell", "species", "source", "source_row", "genes", "counts", "score"]
    assert len(rows) == 37 + 13
    for name, label, values in (("ant", "c", counts["ant"]), ("tenx", "b", x)):
        mine = sorted((r for r in rows if r["source"] == name), key=lambda r: r["source_row"])
        assert [r["cell"] for r in mine] == [f"{name}:{label}{i}" for i in range(len(values))]
        dense = np.zeros(values.shape, int)
        for i, r in enumerate(mine):
            assert np.all(np.diff(r["genes"]) > 0)
            dense[i, r["genes"]] = r["counts"]
        assert np.array_equal(dense, values)
        assert [r["score"] for r in mine] == (list(range(37)) if name == "ant" else [None] * 13)


def test_what_cannot_be_read_is_said_before_anything_runs(world):
    config, _ = world
    for wrong, why in (
        ({"fish": "a.h5ad"}, "sources.species = 'fish': must be one of ant, bee, cow"),
        ({"ant": "none.h5ad"}, "no such file"),
    ):
        with pytest.raises(UserError, match=why):
            read_cells(wrong, species_rows=config.species)
    with pytest.raises(UserError, match="obs = 'age': no source has such a column"):
        read_cells(config.sources, obs=["age"], species_rows=config.species)


# pipelines


def fails(name, step):
    if name == f"refused in {step}":
        msg = f"{step}: not usable"
        raise UserError(msg)
    if name == f"wrong in {step}":
        raise KeyError(step)


def read(folder, name, number):
    """Three tables of rows; leaves a mark."""
    (folder / f"read {name} {time.monotonic_ns()}").touch()
    for k in range(3):
        if k == 1:
            fails(name, "read")
        yield pa.table({"x": np.arange(k + 1) + number})


def square(tables, folder, name, number):
    fails(name, "square")
    for table in tables:
        yield pa.table({"square": table["x"].to_numpy() ** 2})


def write(tables, folder, name, number):
    fails(name, "write")
    if name == "storage" and len(list(folder.glob("read storage *"))) < 3:
        msg = "the way to object storage"
        raise StorageError(msg)
    if name == "long":
        time.sleep(600)
    return sum(table["square"].to_numpy().sum() for table in tables).item()


squares = Pipeline(name="squares", source="Numbers", read=read, steps=(square,), write=write)


def tasks(folder, names):
    folder.mkdir(exist_ok=True)
    return [Task(part="", function=squares, args=(folder, name, i)) for i, name in enumerate(names)]


@pytest.fixture
def executor():
    return RayExecutor(Config(compute=Compute(num_workers=2)))


def test_receipts_of_a_pipeline_are_those_of_the_local_executor(executor, tmp_path):
    names = ["a", "refused in read", "b", "refused in square", "refused in write", "c", "d"]
    local = list(LocalExecutor().run(tasks(tmp_path / "here", names)))
    found = sorted(executor.run(tasks(tmp_path / "ray", names)), key=lambda receipt: receipt.number)
    assert found == local
    assert [receipt.error for receipt in local[3:5]] == ["square: not usable", "write: not usable"]
    assert local[2].result == sum(x * x for x in (2, 2, 3, 2, 3, 4))
    assert len(list((tmp_path / "ray").iterdir())) == len(names), "each task ran once"


def test_an_error_of_storage_repeats_the_task_and_another_error_comes_through(executor, tmp_path):
    (receipt,) = executor.run(tasks(tmp_path, ["storage"]))
    assert receipt.error == ""
    assert len(list(tmp_path.glob("read storage *"))) == 3
    for step in ("read", "square", "write"):
        with pytest.raises(KeyError, match=step):
            list(executor.run(tasks(tmp_path, ["a", f"wrong in {step}"])))
    with pytest.raises(KeyError):
        list(executor.run(tasks(tmp_path, ["long", "wrong in read"])))
    assert next(executor.run(tasks(tmp_path, ["after"]))).error == ""  # its worker is free again


def test_the_operators_of_a_pass_are_fused_and_each_task_is_one_block(tmp_path, capsys):
    planned = pipeline_dataset(tasks(tmp_path, "abcdef"), cpus=1, in_flight=2)
    blocks = [batch.num_rows for batch in planned.iter_batches(batch_size=None, batch_format="pyarrow")]
    assert blocks == [1] * 6
    assert "Operator 1 ReadNumbers->MapBatches(square)->MapBatches(write): 6 tasks executed" in planned.stats()

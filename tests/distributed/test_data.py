"""Cells as Ray Data: every cell once with its values, and row passes with the bytes and errors of the local executor."""

import dataclasses
import functools
import gzip
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from ray import cloudpickle
from scipy import io as scipy_io
from scipy import sparse

from mixgf.classification import annotate
from mixgf.config.run import Compute, Config
from mixgf.corpus import import_passes, prepare_passes
from mixgf.corpus.reader import Corpus
from mixgf.distributed import data, pipelines
from mixgf.distributed.data import read_cells, read_corpus
from mixgf.distributed.executor import RayExecutor
from mixgf.distributed.pipelines import Needs, pipeline_dataset
from mixgf.encoder import embed
from mixgf.errors import StorageError, UserError
from mixgf.execution import LocalExecutor, Pipeline, Receipt, Task
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


def asked_of_parquet(monkeypatch):
    """The columns that are read from row groups in this process."""
    asked = []
    group = tables.pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        tables.pq.ParquetFile,
        "read_row_group",
        lambda *args, **named: (asked.append(args[2]), group(*args, **named))[1],
    )
    return asked


def source_of(planned):
    """The data source that Ray Data reads, after its own optimization of the plan."""
    from ray.data._internal.logical.optimizers import LogicalOptimizer

    (read,) = [
        op
        for op in LogicalOptimizer().optimize(planned._logical_plan).dag.post_order_iter()
        if not op.input_dependencies
    ]
    return read.datasource


def test_columns_that_are_not_asked_for_are_not_read(corpus, monkeypatch):
    asked = asked_of_parquet(monkeypatch)
    for planned in (
        read_corpus(corpus, ["length", "species"]),
        read_corpus(corpus).select_columns(["length", "species"]),
        read_corpus(corpus, ["tokens", "length", "species"]).select_columns(["length", "species"]),
    ):
        task = source_of(planned).get_read_tasks(1)[1]
        (table,) = task()
        assert (asked, table.column_names, table.num_rows) == ([["length", "species"]], ["length", "species"], 5)
        assert task.schema.names == ["length", "species"]
        asked.clear()
    rows = read_corpus(corpus).select_columns(["length"]).take_all()
    assert sorted(row["length"] for row in rows) == sorted(Corpus(corpus).lengths_N.tolist())
    assert read_corpus(corpus).count() == 21


def test_a_column_that_a_shard_lacks_is_null_there(corpus):
    uri = Corpus(corpus).shard_uri(1)
    tables.write_table(uri, tables.read_table(uri).drop_columns(["cell_type"]))
    found = read_corpus(corpus, ["source_row", "cell_type"]).to_pandas().set_index("source_row")["cell_type"]
    assert found.isna().to_numpy().nonzero()[0].tolist() != []
    assert sorted(found.index[found.isna()]) == [7, 8, 9, 10, 11]
    with pytest.raises(UserError, match="no column 'nonsense'; there are tokens, cell, species"):
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


def csc_file(path, counts, genes):
    import anndata
    import pandas as pd

    obs = pd.DataFrame({"score": np.arange(len(counts))}, index=[f"c{i}" for i in range(len(counts))])
    matrix = sparse.csc_matrix(counts.astype(np.float32))
    anndata.AnnData(matrix, obs=obs, var=pd.DataFrame(index=genes)).write_h5ad(path)


@pytest.fixture
def ants(world, tmp_path):
    """The invented ants as a row-major file and as a column-major one, and their counts."""
    config, counts = world
    (row,) = [row for row in config.species if row.name == "ant"]
    csc_file(tmp_path / "csc.h5ad", counts["ant"], species.gene_table(row)["gene"].to_pylist())
    return [str(tmp_path / "ant.h5ad"), str(tmp_path / "csc.h5ad")], counts["ant"], config.species


def dense(rows, like):
    out = np.zeros(like.shape, int)
    for row in rows:
        out[row["source_row"], row["genes"]] = row["counts"]
    return out


def test_a_column_major_file_is_one_task_that_scans_once_and_streams(ants, monkeypatch):
    files, counts, rows = ants
    planned = read_cells({"ant": files}, species_rows=rows, block_cells=10)
    tasks = source_of(planned).get_read_tasks(1)
    assert [task.metadata.num_rows for task in tasks] == [10, 10, 10, 7, 37]
    scans, spilled = [], []
    from mixgf.cells import matrices, row_major

    scan, write = matrices._csc_scan, row_major.write_rows
    monkeypatch.setattr(matrices, "_csc_scan", lambda *args: (scans.append(1), scan(*args))[1])
    monkeypatch.setattr(row_major, "write_rows", lambda reader, to: (spilled.append(to), write(reader, to))[1])
    monkeypatch.setattr(row_major, "CHUNK_ROWS", 8)
    found = list(tasks[4]())
    assert len(scans) == 1
    assert max(table.num_rows for table in found) == 8, "chunks of rows, not the whole file"
    assert np.array_equal(dense(pa.concat_tables(found).to_pylist(), counts), counts)
    assert not Path(spilled[0]).exists()


def test_without_counts_no_matrix_is_read(ants, monkeypatch):
    from mixgf.cells import hdf5, matrices

    files, _, rows = ants

    def refuse(*_):
        raise AssertionError

    everything = read_cells({"ant": files}, species_rows=rows)
    for planned in (
        everything.select_columns(["cell", "score"]),
        read_cells({"ant": files}, species_rows=rows, columns=["cell", "score"]),
        read_cells({"ant": files}, species_rows=rows, columns=["cell", "counts", "score"]).select_columns(
            ["cell", "score"]
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(hdf5.RangeReader, "read", refuse)
            patch.setattr(matrices, "_csc_scan", refuse)
            table = pa.concat_tables(table for task in source_of(planned).get_read_tasks(1) for table in task())
        assert table.column_names == ["cell", "score"]
        assert table["score"].to_pylist() == [*range(37)] * 2
    assert everything.count() == 74
    assert "score" in everything.schema().names
    found = everything.select_columns(["score"]).to_pandas()
    assert sorted(found["score"]) == sorted([*range(37)] * 2)
    obs = read_cells({"ant": files}, species_rows=rows, obs=[]).schema().names
    assert obs == ["cell", "species", "source", "source_row", "genes", "counts"]


def test_a_limit_reads_no_more_blocks_than_it_needs(ants, monkeypatch):
    files, _, rows = ants
    monkeypatch.setattr(data, "READ_CELLS", 4)
    found = read_cells({"ant": files[0]}, species_rows=rows)
    assert len(found.limit(6).take_all()) == 6
    reads = []
    block = data.counts.read_blocks
    monkeypatch.setattr(
        data.counts, "read_blocks", lambda *args, **named: (reads.append(1) or b for b in block(*args, **named))
    )
    (task,) = source_of(found).get_read_tasks(1, per_task_row_limit=6)
    assert sum(table.num_rows for table in task()) == 6
    assert len(reads) == 2


def test_the_driver_opens_no_file(ants, monkeypatch):
    files, _, rows = ants
    monkeypatch.setattr(data, "open_source", None)
    monkeypatch.setattr(data, "DESCRIBED", 2)
    found = read_cells({"ant": files}, species_rows=rows)
    assert found.count() == 74


def dies_once(batch, *, mark):
    """Ends its worker at the first call of all."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return batch
    os._exit(1)


def test_a_lost_worker_loses_and_repeats_no_cell(ants, corpus, tmp_path):
    files, counts, rows = ants
    for name, planned, expected in (
        ("cells", read_cells({"ant": files}, species_rows=rows, block_cells=10), 74), ("corpus", read_corpus(corpus), 21),
    ):  # fmt: skip
        mark = tmp_path / name
        found = planned.map_batches(dies_once, batch_format="pyarrow", fn_kwargs={"mark": mark}).take_all()
        assert mark.exists()
        assert len(found) == expected
        assert len({row["cell"] for row in found}) == expected
        if name == "cells":
            for source in ("ant", "csc"):
                assert np.array_equal(dense([row for row in found if row["source"] == source], counts), counts)


REMOTE = """
import json, sys
from mixgf.config.data import SpeciesRow
from mixgf.distributed.data import read_cells, read_corpus

rows = [SpeciesRow(**row) for row in json.loads(sys.argv[2])]
cells = read_cells({"ant": f"{sys.argv[1]}/data/*", "bee": f"{sys.argv[1]}/bee.zarr"}, species_rows=rows)
sentences = read_corpus(f"{sys.argv[1]}/corpus").select_columns(["cell", "length"]).take_all()
print(json.dumps([cells.take_all(), sentences]))
"""


def test_cells_and_corpora_in_object_storage_are_those_on_disk(world, corpus, ants, s3_server, s3_settings, tmp_path):  # noqa: PLR0917
    import anndata
    import boto3

    config, counts = world
    s3_settings(s3_server)
    s3 = boto3.client("s3", endpoint_url=s3_server)
    s3.create_bucket(Bucket="raydata")
    anndata.read_h5ad(tmp_path / "bee.h5ad").write_zarr(tmp_path / "bee.zarr")
    (row,) = [row for row in config.species if row.name == "ant"]
    write_folder(tmp_path / "tenx", counts["ant"], species.gene_table(row)["gene"].to_pylist())
    put = {f"data/{Path(file).name}": Path(file) for file in ants[0]}
    put |= {f"data/tenx/{file.name}": file for file in (tmp_path / "tenx").iterdir()}
    for folder, name in ((tmp_path / "bee.zarr", "bee.zarr"), (Path(corpus), "corpus")):
        put |= {f"{name}/{file.relative_to(folder)}": file for file in folder.rglob("*") if file.is_file()}
    for key, file in put.items():
        s3.upload_file(str(file), "raydata", key)
    species_rows = json.dumps([dataclasses.asdict(row) for row in config.species])
    done = subprocess.run(
        [sys.executable, "-c", REMOTE, "s3://raydata", species_rows], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cells, sentences = json.loads(done.stdout.splitlines()[-1])
    for source, known in (("ant", "ant"), ("csc", "ant"), ("tenx", "ant"), ("bee", "bee")):
        mine = [row for row in cells if row["source"] == source]
        assert len(mine) == len(counts[known])
        assert np.array_equal(dense(mine, counts[known]), counts[known]), source
    assert {row["cell"]: row["length"] for row in sentences} == {
        f"source:{i}": n for i, n in enumerate(Corpus(corpus).lengths_N.tolist())
    }


def test_what_cannot_be_read_is_said_before_anything_runs(world):
    config, _ = world
    for wrong, why in (
        ({"fish": "a.h5ad"}, "sources.species = 'fish': must be one of ant, bee, cow"),
        ({"ant": "none.h5ad"}, "no such file"),
        ({"ant": [f"none{i}.h5ad" for i in range(6)]}, r"none0.h5ad: .*none2.h5ad: .*; and 3 more of 6 sources$"),
    ):
        with pytest.raises(UserError, match=why):
            read_cells(wrong, species_rows=config.species)
    with pytest.raises(UserError, match="obs = 'age': no source has such a column"):
        read_cells(config.sources, obs=["age"], species_rows=config.species)
    with pytest.raises(UserError, match="columns = 'age': no such column; there are cell, species"):
        read_cells(config.sources, columns=["age"], species_rows=config.species)


# pipelines


def fails(name, step):
    if name == f"refused in {step}":
        msg = f"{step}: not usable"
        raise UserError(msg)
    if name == f"wrong in {step}":
        raise KeyError(step)


def read(folder, name, number):
    """Three tables of rows; leaves a mark."""
    (folder / f"read {name} {time.monotonic_ns()} {os.getpid()}").touch()
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
    if name == "deadly":
        os.kill(os.getpid(), signal.SIGKILL)
    return sum(table["square"].to_numpy().sum() for table in tables).item()


squares = Pipeline(name="squares", source="Numbers", read=read, steps=(square,), write=write)


def tasks(folder, names):
    folder.mkdir(exist_ok=True)
    return [Task(part="", function=squares, args=(folder, name, i)) for i, name in enumerate(names)]


@pytest.fixture
def executor():
    return RayExecutor(Config(compute=Compute(num_workers=2)))


@functools.lru_cache
def remembered(number):
    return number


def read_remembered(folder):
    yield pa.table({"held": [remembered.cache_info().currsize]})
    remembered(1)


def tell_remembered(tables, folder):
    return [held for table in tables for held in table["held"].to_pylist()]


def test_a_pass_releases_what_is_held_before_each_task_in_workers_of_ray(executor, tmp_path):
    remembered.cache_clear()
    told = Pipeline(
        name="told", source="Held", read=read_remembered, write=tell_remembered, release=remembered.cache_clear
    )
    work = [Task(part=f"{tmp_path}/{n}", function=told, args=(str(tmp_path),)) for n in range(6)]
    assert [receipt.result for receipt in executor.run(work)] == [[0]] * 6
    assert [receipt.result for receipt in LocalExecutor().run(work)] == [[0], *[[1]] * 5]


def test_receipts_of_a_pipeline_are_those_of_the_local_executor(executor, tmp_path):
    names = ["a", "refused in read", "b", "refused in square", "refused in write", "c", "d"]
    local = list(LocalExecutor().run(tasks(tmp_path / "here", names)))
    found = sorted(executor.run(tasks(tmp_path / "ray", names)), key=lambda receipt: receipt.number)
    assert found == local
    assert [receipt.error for receipt in local[3:5]] == ["square: not usable", "write: not usable"]
    assert local[2].result == sum(x * x for x in (2, 2, 3, 2, 3, 4))
    assert len(list((tmp_path / "ray").iterdir())) == len(names), "each task ran once"


@pytest.mark.parametrize("size", [8, 40, 4 << 20])
def test_no_size_of_blocks_changes_a_receipt(executor, tmp_path, monkeypatch, size):
    monkeypatch.setattr(pipelines, "BLOCK_BYTES", size)
    names = ["a", "refused in read", "refused in square", "b", "refused in write"]
    local = list(LocalExecutor().run(tasks(tmp_path / "here", names)))
    found = sorted(executor.run(tasks(tmp_path / "ray", names)), key=lambda receipt: receipt.number)
    assert found == local


def read_large(folder, num):
    for k in range(num):
        (folder / f"{time.monotonic_ns()} read {k}").touch()
        yield pa.table({"x": [bytes(1 << 20)] * 5})  # 5 MB: a block of its own


def pass_on(tables, folder, num):
    try:
        yield from tables
    finally:
        (folder / f"{time.monotonic_ns()} closed").touch()


def write_large(tables, folder, num):
    for k, _ in enumerate(tables):
        if folder.name == "refused":
            msg = "not writable"
            raise UserError(msg)
        (folder / f"{time.monotonic_ns()} write {k}").touch()
    return k


@pytest.mark.parametrize("name", ["whole", "refused"])
def test_rows_flow_through_the_operators_block_by_block(executor, tmp_path, name):
    large = Pipeline(name="large", source="Large", read=read_large, steps=(pass_on,), write=write_large)
    folder = tmp_path / name
    folder.mkdir()
    (receipt,) = executor.run([Task(part="", function=large, args=(folder, 8))])
    events = [path.name.split(" ", 1)[1] for path in sorted(folder.iterdir())]
    if name == "refused":
        assert receipt.error == "not writable"
        assert [event for event in events if event != "closed"] == [f"read {k}" for k in range(8)]
    else:
        assert receipt.result == 7
        # each of the two operators before the write holds one block back
        assert all(events.index(f"read {k + 4}") > events.index(f"write {k}") for k in range(4)), events
        assert events[-2:] == ["write 7", "closed"] or events[-2:] == ["closed", "write 7"]


def test_a_step_that_gets_no_more_tables_is_closed_at_once():
    seen = []

    def step(tables):
        try:
            for table in tables:
                seen.append(table)
                yield -table
        except ValueError:
            seen.append("an error of its own")
        finally:
            seen.append("closed")

    running = pipelines._Step(step)
    assert [*running.feed(1), *running.feed(2)] == [-1, -2]
    del running
    assert seen == [1, 2, "closed"]
    ended = pipelines._Step(step)
    assert [list(ended.feed(table)) for table in (3, None)] == [[-3], []]
    assert seen[3:] == [3, "closed"]


def test_a_block_without_its_beginning_is_an_error_and_no_part_is_written():
    begins, goes_on = pipelines._Outgoing(cloudpickle.dumps((0, tasks(Path(), "a")[0]))), []
    for number in range(3):
        goes_on += begins.add(pa.table({"square": [number]}))
    write = pipelines._writing(squares.write)
    with pytest.raises(RuntimeError, match="not fused"):
        list(write(goes_on[1]))
    assert list(write(goes_on[0])) == []


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


def test_a_task_that_kills_its_worker_is_named_and_the_others_end(executor, tmp_path):
    found = {receipt.number: receipt for receipt in executor.run(tasks(tmp_path / "ray", ["a", "deadly", "b", "c"]))}
    assert found[1] == Receipt(1, error="it ended its worker each of the 4 times it ran", lost=True)
    assert len(list((tmp_path / "ray").glob("read deadly *"))) == 4
    local = list(LocalExecutor().run(tasks(tmp_path / "here", ["a", "b", "b", "c"])))
    assert [found[i] for i in (0, 2, 3)] == [local[i] for i in (0, 2, 3)]


GPUS = """
import contextlib, io, json, sys
from pathlib import Path
import ray
from ray.data import DataContext
from test_data import tasks
from mixgf.distributed.pipelines import Needs, pipeline_dataset, run_pipeline

ray.init("local", num_cpus=2, num_gpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
work, needs = tasks(Path(sys.argv[1]), ["deadly", *map(str, range(9))]), Needs(gpus=0.5, in_flight=2)
plan = io.StringIO()
with contextlib.redirect_stdout(plan):
    pipeline_dataset(work, needs).explain()
found = [[r.number, r.error, r.lost, r.result] for r in run_pipeline(work, needs)]
print(json.dumps([plan.getvalue(), found]))
"""


def test_a_pass_with_gpus_runs_in_a_pool_of_actors_and_loses_only_the_task_that_kills_them(tmp_path):
    """GPUs that only Ray knows of: what a task computes on is tested elsewhere."""
    path = os.pathsep.join(
        [str(Path(__file__).parent), str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    done = subprocess.run(
        [sys.executable, "-c", GPUS, str(tmp_path / "ray")], capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    plan, found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))
    assert "ActorPoolMapOperator[ReadNumbers->MapBatches(square)->MapBatches(write)]" in plan
    local = LocalExecutor().run(tasks(tmp_path / "here", ["0", *map(str, range(9))]))
    assert sorted(found[:-1]) == [[r.number, "", False, r.result] for r in local][1:]
    assert found[-1] == [0, "it ended its worker each of the 4 times it ran", True, None]
    processes = [path.name.rsplit(" ", 1)[1] for path in (tmp_path / "ray").glob("read [0-9] *")]
    assert len(processes) == 9
    assert len(set(processes)) <= 5, "a process for each actor, and four that died"


PASSES = [
    ("prepare, metrics", prepare_passes.measure_cells),
    ("prepare, medians", prepare_passes.sketch_medians),
    ("prepare, sentences", prepare_passes.encode_shard),
    ("import, sentences", import_passes.translate_shard),
    ("embed", embed.embed_shard),
    ("annotate", annotate.label_cells),
]


@pytest.mark.parametrize(("name", "pipeline"), PASSES)
def test_the_guide_shows_each_pass_as_ray_prints_it(name, pipeline, capsys):
    pipeline_dataset([Task(part="", function=pipeline)], Needs()).explain()
    operator = capsys.readouterr().out.split("Physical Plan (Optimized)")[1].split("\n")[1]
    lines = (Path(__file__).parents[2] / "jobs/README.md").read_text().split("\n")
    assert f"{name:<20} {operator}" in lines


def test_the_operators_of_a_pass_are_fused_and_each_task_is_one_block(tmp_path, capsys):
    planned = pipeline_dataset(tasks(tmp_path, "abcdef"), Needs(in_flight=2))
    blocks = [batch.num_rows for batch in planned.iter_batches(batch_size=None, batch_format="pyarrow")]
    assert blocks == [1] * 6
    assert "Operator 1 ReadNumbers->MapBatches(square)->MapBatches(write): 6 tasks executed" in planned.stats()

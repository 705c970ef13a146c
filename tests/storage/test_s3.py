"""Laws of prepare over S3 (moto's server) and over a network that fails (tests/fault_proxy.py)."""

import dataclasses
import gc
import json
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import anndata
import h5py
import numpy as np
import pyarrow as pa
import pytest
import s3_world
from fault_proxy import Proxy, Rule, every, first
from processes import free_port
from scipy import sparse

import mixgf.storage.s3
from mixgf import cli
from mixgf.cells import open as opening
from mixgf.cells.open import open_reader
from mixgf.config.data import Source
from mixgf.config.parse import to_dict
from mixgf.corpus import prepare_passes
from mixgf.errors import AccessError, StorageError
from mixgf.execution import LocalExecutor
from mixgf.stages import prepare
from mixgf.storage import artifacts, files, retry, tables

ROOT = f"s3://{s3_world.BUCKET}/data"


@pytest.fixture(scope="module")
def world(small_world):
    return small_world


@pytest.fixture(scope="module")
def bucket(s3_server, world):
    """boto3's client of the server, past the proxy."""
    s3 = s3_world.client(s3_server)
    s3_world.put_sources(s3, world)
    return s3


@pytest.fixture(scope="module")
def shared_proxy(s3_server):
    with Proxy(s3_server.removeprefix("http://")) as proxy:
        yield proxy


@pytest.fixture
def proxy(shared_proxy, bucket, s3_settings):
    s3_settings(shared_proxy.url)
    shared_proxy.fresh()
    return shared_proxy


def made(config):
    return prepare.run(config, executor=LocalExecutor())


def bucket_keys(uri):
    """Names of all objects under a URI, relative to it."""
    fs, key = mixgf.storage.s3.filesystem_and_key(uri)
    return {name.removeprefix(f"{key}/") for name in fs.find(key)}


def test_prepare_from_and_to_s3_gives_the_bytes_of_local_disk_and_does_nothing_twice(world, proxy, capsys):
    config = world.on(ROOT, f"s3://{s3_world.BUCKET}/plain")
    uri = made(config)
    listed = Counter(
        found.group(1)
        for p in proxy.passed
        if (found := re.search(r"list-type=2.*prefix=plain%2Fcorpus%2Fwork%2F([^%&]+)", p.what))
    )
    passes = {"sources", "metrics", "gene_reports", "doublets", "sketch", "done"}
    assert {name: listed[name] for name in passes & set(listed)} == dict.fromkeys(
        passes - {"doublets"}, 1
    )  # no parts of doublets
    assert s3_world.contents(uri) == world.local
    proxy.fresh()
    assert made(config) == uri
    assert [p.what for p in proxy.passed if p.what.startswith(("PUT", "POST", "DELETE"))] == []
    assert not any("/shards/" in p.what for p in proxy.passed)
    capsys.readouterr()
    assert cli.main(["inspect", uri]) == 0
    assert "67 read" in capsys.readouterr().out


def test_a_run_killed_in_the_middle_continues_to_the_same_bytes(world, proxy, tmp_path):
    config = world.on(ROOT, f"s3://{s3_world.BUCKET}/killed")
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    code = (
        "import json; from mixgf.config.run import Config; from mixgf.config.parse import from_dict; from mixgf.execution import LocalExecutor; from mixgf.stages import prepare\n"
        f"prepare.run(from_dict(Config, json.load(open({str(tmp_path / 'config.json')!r}))), executor=LocalExecutor())"
    )
    (rule,) = proxy.fresh(Rule("hold", "PUT .*/shards/", when=lambda i: i == 3))
    victim = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    assert rule.held.wait(240), "the third shard never came"
    victim.kill()
    assert victim.wait() == -9
    rule.go.set()
    uri = f"{config.output}/corpus"
    assert artifacts.find(uri) is None
    before = bucket_keys(uri)
    assert {f"shards/{n:05d}.parquet" for n in (0, 1)} <= before
    proxy.fresh()
    made(config)
    assert s3_world.contents(uri) == world.local
    written = [
        p.what.partition("?")[0].rpartition("/")[2]
        for p in proxy.passed
        if p.what.startswith("PUT") and "/shards/" in p.what
    ]
    assert "00000.parquet" not in written
    assert "00001.parquet" not in written


TRANSIENT = {
    "before an answer": lambda: [
        Rule("lose", "PUT .*/plan.json", when=first(1)),
        Rule("lose", "PUT .*/shards/", when=first(2)),
        Rule("drop", "^GET ", when=lambda i: i in (1, 40, 80)),
        Rule("busy", "^(GET|PUT|HEAD) ", when=lambda i: i in (10, 60, 110, 111)),
        Rule("drop", "^(PUT|POST|HEAD) ", when=lambda i: i in (5, 45)),
        Rule("delay", "^(GET|PUT|POST|HEAD) ", when=every(50), seconds=0.05),
    ],
    "in the middle of an answer": lambda: [
        Rule("short", "^GET .*/corpus/(work/|plan.json)", when=lambda i: i % 5 == 2),
        Rule("break", "^GET .*/ant1.h5ad", when=lambda i: i % 4 == 1),
        Rule("break", "^GET .*/barcodes.tsv.gz", when=first(2)),
        Rule("cut", "^GET .*/(ant2.h5ad|features.tsv.gz|work)", when=lambda i: i % 12 == 1),
        Rule("break", "^GET .*list-type", when=lambda i: i in (3, 8)),
        Rule("short", "^GET .*/(bee.h5|matrix.mtx.gz)", when=lambda i: i in (2, 6, 9)),
        Rule("stall", "^GET .*/ant2.h5ad", when=lambda i: i == 2, seconds=60.0),
    ],
}


@pytest.mark.parametrize("where", TRANSIENT, ids=[name.replace(" ", "-") for name in TRANSIENT])
def test_faults_that_pass_change_no_byte(where, world, proxy, monkeypatch):
    monkeypatch.setattr(mixgf.storage.s3, "READ_SECONDS", 4.0)
    mixgf.storage.s3.forget_connections()
    rules = proxy.fresh(*TRANSIENT[where]())
    uri = made(world.on(ROOT, f"s3://{s3_world.BUCKET}/{where.replace(' ', '-')}"))
    proxy.rules = []
    mixgf.storage.s3.forget_connections()
    assert s3_world.contents(uri) == world.local
    assert all(rule.hits for rule in rules), [(r.kind, r.match, r.seen) for r in rules if not r.hits]


@pytest.mark.parametrize("kind", ["break", "cut", "short"])
def test_an_answer_of_xml_that_breaks_off_is_asked_for_again(kind, proxy, bucket, monkeypatch):
    """An error with its code, and a listing: botocore reads these itself."""
    monkeypatch.setattr(retry, "PAUSES", (0.0, 0.0))
    root = f"s3://{s3_world.BUCKET}/xml-{kind}"
    for name in ("a", "b"):
        bucket.put_object(Bucket=s3_world.BUCKET, Key=f"xml-{kind}/{name}", Body=b"12345")
    (rule,) = proxy.fresh(Rule(kind, "^(GET|POST) ", when=every(2)))
    for _ in range(2):
        with pytest.raises(FileNotFoundError):
            files.read_bytes(f"{root}/missing")
        assert files.list_dir(root) == ["a", "b"]
        assert files.sizes([f"{root}/a", f"{root}/b", f"{root}/c"]) == [5, 5, -1]
        assert files.find(root) == {f"{root}/a": 5, f"{root}/b": 5}
    assert rule.hits >= 4
    files.remove(root)
    assert files.find(root) == {}


@pytest.mark.parametrize("kind", ["busy", "drop", "cut"])
def test_a_fault_that_stays_is_one_line_and_no_work_is_lost(kind, world, proxy, monkeypatch):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    monkeypatch.setattr(retry, "PAUSES", (0.0,))
    config = world.on(ROOT, f"s3://{s3_world.BUCKET}/stays-{kind}")
    (rule,) = proxy.fresh(Rule(kind, "GET .*/bee.h5"))
    with pytest.raises(
        StorageError, match=r"^s3://cells/data/bee.h5: (no connection|the request to http://\S+ failed)[^\n]*$"
    ):
        made(config)
    assert rule.hits <= 2 * 2
    uri = f"{config.output}/corpus"
    assert artifacts.find(uri) is None
    kept = bucket_keys(uri)
    assert {"plan.json", "work/sources/00000.json", "work/sources/00001.json"} <= kept
    if kind == "cut":
        proxy.fresh()
        assert made(config) == uri
        assert s3_world.contents(uri) == world.local


def test_truncated_objects_are_refused_one_by_one_and_the_rest_is_done(world, proxy, bucket, tmp_path):
    for name in s3_world.SOURCES:
        data = (world.folder / "data" / name).read_bytes()
        whole = name in ("ant/ant1.h5ad", "cow/features.tsv.gz", "cow/barcodes.tsv.gz")
        data = data if whole else data[: len(data) * 2 // 3]
        bucket.put_object(Bucket=s3_world.BUCKET, Key=f"torn/{name}", Body=data)
        (tmp_path / "torn" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "torn" / name).write_bytes(data)
    over_s3 = made(world.on(f"s3://{s3_world.BUCKET}/torn", f"s3://{s3_world.BUCKET}/of-torn"))
    on_disk = made(world.on(str(tmp_path / "torn"), str(tmp_path / "of-torn")))
    assert s3_world.contents(over_s3) == s3_world.contents(on_disk)
    refused = artifacts.require(over_s3, "corpus").details["refused"]
    assert [r["name"] for r in refused] == ["ant2", "bee", "cow"]
    for one in refused:
        assert re.match(rf"{one['uri']}\S*: .*(truncated|damaged)[^\n]*fetch it again$", one["error"]), one


def test_a_work_unit_reads_its_ranges_and_not_the_file(proxy, bucket, tmp_path, world):
    s3_world.write_h5ad(tmp_path / "big.h5ad", "ENSA", 120_000, 9)
    size = (tmp_path / "big.h5ad").stat().st_size
    bucket.upload_file(str(tmp_path / "big.h5ad"), s3_world.BUCKET, "data/big.h5ad")
    source = Source(uri=f"{ROOT}/big.h5ad", species="ant")
    work = f"s3://{s3_world.BUCKET}/ranges/work"
    row = world.config.species[0]
    prepare_passes.describe_source(
        work, 0, source, row=row, rules=world.config.qc, biotypes=world.config.vocab.biotypes, allowed=None
    )
    every_unit = prepare_passes.plan_row_ranges({0: (source, 120_000)}, 5_000)
    for unit in (every_unit[0], every_unit[11], every_unit[23]):
        proxy.fresh()
        prepare_passes.measure_cells(
            prepare_passes.MetricsPlan(work=work, row_range=unit, block_cells=2_000, keep_counts=False)
        )
        gets = [p for p in proxy.passed if p.what.startswith("GET") and "big.h5ad" in p.what]
        assert all(p.range for p in gets)
        assert proxy.body_bytes("big.h5ad") < 2 * size / len(every_unit) + (
            2 << 20
        )  # its counts, and HDF5's own blocks
        assert len(gets) <= 30


@pytest.fixture
def stores(bucket, world, tmp_path):
    """The same cells as .h5ad and as Zarr (formats 2 and 3) in the bucket, and their counts."""
    cells = anndata.read_h5ad(world.folder / "data/ant/ant1.h5ad")
    for form in (2, 3):
        with anndata.settings.override(zarr_write_format=form):
            cells.write_zarr(tmp_path / f"{form}.zarr")
        for file in (tmp_path / f"{form}.zarr").rglob("*"):
            if file.is_file():
                key = f"data/stores/{file.relative_to(tmp_path)}"
                bucket.upload_file(str(file), s3_world.BUCKET, key, ExtraArgs={"ACL": "public-read"})
    known = str(world.folder / "data/ant/ant1.h5ad")
    bucket.upload_file(known, s3_world.BUCKET, "data/stores/cells.h5ad", ExtraArgs={"ACL": "public-read"})
    bucket.put_bucket_acl(Bucket=s3_world.BUCKET, ACL="public-read")
    return [f"{ROOT}/stores/{name}" for name in ("cells.h5ad", "2.zarr", "3.zarr")], cells


def counts_in(uri):
    with open_reader(uri) as reader:
        blocks = [
            sparse.csr_array((b.data.copy(), b.indices.copy(), b.indptr), shape=(len(b.indptr) - 1, reader.num_columns))
            for b in reader.read(0, reader.num_rows, 9)
        ]
        return sparse.vstack(blocks).toarray(), reader.obs("cell_type", 0, reader.num_rows).tolist()


def test_a_public_bucket_is_read_without_keys(proxy, stores, monkeypatch, tmp_path):
    uris, cells = stores
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(StorageError, match=r"no keys .*; for a public bucket, FSSPEC_S3_ANON=true"):
        counts_in(uris[0])
    monkeypatch.setenv("FSSPEC_S3_ANON", "true")
    for uri in uris:
        proxy.fresh()
        x, types = counts_in(uri)
        assert np.array_equal(x, cells.X.toarray())
        assert types == cells.obs["cell_type"].tolist()
        assert sum(opening.source_files(uri).values()) > 0
        assert {p.region for p in proxy.passed} == {""}, "no request is signed"
    with pytest.raises(StorageError, match="access denied"):  # of an object that is not public
        counts_in(f"{ROOT}/bee.h5")


def test_whoever_reads_pays_where_it_is_asked_for(proxy, stores, monkeypatch):
    uris, cells = stores
    monkeypatch.setenv("FSSPEC_S3_REQUESTER_PAYS", "true")
    for uri in uris:
        proxy.fresh()
        assert np.array_equal(counts_in(uri)[0], cells.X.toarray())
        read = [p for p in proxy.passed if "list-type" not in p.what]
        assert {p.payer for p in read} == {"requester"}
        assert len(read) > 2


def test_a_zarr_store_is_read_over_a_network_that_fails(proxy, stores):
    uris, cells = stores
    for kind in ("busy", "break"):
        (rule,) = proxy.fresh(Rule(kind, r"^GET .*3\.zarr/(X|obs)/", when=every(2)))
        assert np.array_equal(counts_in(uris[2])[0], cells.X.toarray())
        assert rule.hits > 1
    proxy.fresh(Rule("drop", r"^GET .*3\.zarr/X/"))
    with pytest.raises(StorageError, match=r"3\.zarr: "):
        counts_in(uris[2])


@pytest.mark.timeout(120, func_only=True)
def test_reading_hdf5_over_s3_never_waits_for_a_thread_that_collects_garbage(world, proxy, monkeypatch):
    """h5py reads under a lock that freeing its objects needs; s3fs' thread must not be waited for meanwhile."""
    from fsspec.asyn import get_loop

    uri = f"{ROOT}/ant/ant1.h5ad"
    gc.collect()
    monkeypatch.setattr(gc, "callbacks", [])
    with h5py.File(world.folder / "data/ant/ant1.h5ad") as other, files.open_read(uri) as stream:
        gc.disable()
        try:
            for _ in range(100):
                cycle = [other["X/data"]]
                cycle.append(cycle)
            del cycle
            proxy.fresh(
                Rule(
                    "delay", "^GET .*ant1.h5ad", seconds=0.2, on_hit=lambda: get_loop().call_soon_threadsafe(gc.collect)
                )
            )
            with h5py.File(stream) as file:
                assert file["X"].attrs["shape"].tolist() == [23, s3_world.NUM_GENES]
        finally:
            gc.enable()


def test_big_objects_go_up_in_parts_and_whole_or_not_at_all(world, proxy, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PART_BYTES", 5 << 20)  # the least that S3 takes
    data = np.random.default_rng(0).bytes(11 << 20)
    (tmp_path / "big").write_bytes(data)
    where = f"s3://{s3_world.BUCKET}/parts"
    rules = proxy.fresh(
        Rule("drop", "PUT .*partNumber=2", when=first(1)),
        Rule("busy", "PUT .*partNumber=3", when=first(1)),
        Rule("lose", "POST .*uploadId", when=first(1)),  # completed, and the client does not learn it
    )
    files.upload(tmp_path / "big", f"{where}/file")
    assert all(rule.hits for rule in rules)
    proxy.fresh()
    files.write_bytes(f"{where}/bytes", data)
    assert sum("partNumber" in p.what for p in proxy.passed) == 3
    assert files.sha256(f"{where}/file") == files.sha256(f"{where}/bytes") == files.sha256(str(tmp_path / "big"))
    (rule,) = proxy.fresh(Rule("busy", "PUT .*partNumber=3"))
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    monkeypatch.setattr(retry, "PAUSES", ())
    with pytest.raises(StorageError, match=r"parts/torn: the request to http.* failed"):
        files.write_bytes(f"{where}/torn", data)
    assert rule.hits == 2
    assert files.list_dir(where) == ["bytes", "file"]


def test_a_claim_whose_answer_was_lost_is_ours(proxy):
    uri = f"s3://{s3_world.BUCKET}/claims/one"
    (rule,) = proxy.fresh(Rule("lose", "PUT .*claims/one", when=first(1)))
    assert files.create_bytes(uri, b"mine")
    assert rule.hits == 1
    assert not files.create_bytes(uri, b"yours")
    assert files.read_bytes(uri) == b"mine"


def test_sizes_of_many_files_are_listed_in_pages_and_few_are_asked_for(proxy, bucket, monkeypatch):
    with ThreadPoolExecutor(16) as threads:
        names = [f"many/{i:04d}.h5ad" for i in range(2_010)]
        put = [
            threads.submit(bucket.put_object, Bucket=s3_world.BUCKET, Key=n, Body=bytes(i % 7))
            for i, n in enumerate(names)
        ]
        assert [one.result() for one in put]
    uris = [f"s3://{s3_world.BUCKET}/{n}" for n in names]
    kinds = [
        (uris[:40], [i % 7 for i in range(40)], ["list"]),
        ([*uris, f"s3://{s3_world.BUCKET}/many/none.h5ad"], [*(i % 7 for i in range(2_010)), -1], ["HEAD", *["list"] * 4]),  # one looks for a folder of that name
        ([uris[1_700], uris[1_701]], [1_700 % 7, 1_701 % 7], ["list"]),  # from there on
        ([uris[0], uris[2_009]], [0, 2_009 % 7], ["HEAD", "list", "list"]),  # far apart
        ([uris[3]], [3], ["HEAD"]),
    ]  # fmt: skip
    for asked, sizes, requests in kinds:
        proxy.fresh()
        assert files.sizes(asked) == sizes
        said = ["list" if "list-type=2" in p.what else p.what.split()[0] for p in proxy.passed]
        assert sorted(said) == requests

    def refuse(*_):
        raise AccessError

    monkeypatch.setattr(files, "listed_sizes", refuse)
    assert files.sizes(uris[:9]) == [0, 1, 2, 3, 4, 5, 6, 0, 1]


def test_a_small_file_is_read_by_one_request(proxy):
    uri = f"s3://{s3_world.BUCKET}/small.parquet"
    tables.write_table(uri, pa.table({"x": [1, 2]}))
    proxy.fresh()
    assert tables.read_table(uri)["x"].to_pylist() == [1, 2]
    assert [p.what.split()[0] for p in proxy.passed] == ["GET"]


@pytest.mark.parametrize("name", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_the_region_is_known_by_either_name(name, proxy, monkeypatch):
    monkeypatch.delenv("AWS_DEFAULT_REGION")
    monkeypatch.setenv(name, "eu-central-1")
    with files.open_read(f"{ROOT}/bee.h5") as file:
        file.read(8)
    assert {p.region for p in proxy.passed} == {"eu-central-1"}
    assert {p.what.split()[0] for p in proxy.passed} == {"HEAD", "GET"}


REFUSALS = {
    "no such file": ({}, f"{ROOT}/none.h5ad", "", r"s3://cells/data/none.h5ad: no such file; check the path"),
    "no such bucket": ({}, "s3://nowhere/a.h5ad", "", r"s3://nowhere/a.h5ad: no such file; check the path"),
    "no match": ({}, f"{ROOT}/mole/*.h5ad", "", r"sources\[0\].uri = 's3://cells/data/mole/\*.h5ad': matches no file"),
    "no bucket to write to": ({}, f"{ROOT}/ant/ant1.h5ad", "s3://nowhere/run", r"s3://nowhere/run/\S+: cannot be written .*make the bucket first"),
    "an impossible bucket": ({}, "s3://a b/c.h5ad", "", r"s3://a b/c.h5ad: not a valid address"),
    "no keys": ({"AWS_ACCESS_KEY_ID": None, "AWS_SECRET_ACCESS_KEY": None}, f"{ROOT}/bee.h5", "", r"s3://cells/data/bee.h5: no keys .*set AWS_ACCESS_KEY_ID"),
}  # fmt: skip


@pytest.mark.parametrize("why", REFUSALS, ids=[name.replace(" ", "-") for name in REFUSALS])
def test_what_cannot_be_is_one_line_and_exit_code_2(  # noqa: PLR0917
    why, proxy, world, tmp_path, ray_local, monkeypatch, capsys
):
    settings, source, output, line = REFUSALS[why]
    monkeypatch.setenv("HOME", str(tmp_path))  # no keys of the person who runs the tests
    monkeypatch.setattr(prepare, "RayExecutor", lambda _: LocalExecutor())  # the session's workers know no endpoint
    for name, value in settings.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    assert run_cli(world, tmp_path, source, output or str(tmp_path / "out")) == 2
    assert re.fullmatch(rf"mixgf: {line}[^\n]*", last_line(capsys))


def test_an_endpoint_that_nobody_listens_on_is_one_line_and_exit_code_1(  # noqa: PLR0917
    s3_settings, world, tmp_path, ray_local, monkeypatch, capsys
):
    s3_settings(f"http://127.0.0.1:{free_port()}")
    monkeypatch.setattr(retry.time, "sleep", None)  # only botocore asks again: 4 times, within 7 s
    assert run_cli(world, tmp_path, f"{ROOT}/bee.h5", str(tmp_path / "out")) == 1
    assert re.fullmatch(
        r"mixgf: failed: StorageError: s3://cells/data/bee.h5: no connection to http://127[^\n]*check AWS_ENDPOINT_URL[^\n]*",
        last_line(capsys),
    )


def run_cli(world, tmp_path, source, output):
    config = dataclasses.replace(world.config, sources=(Source(uri=source, species="ant"),), output=output)
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    return cli.main(["prepare", "--config", str(tmp_path / "config.json")])


def last_line(capsys):
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.slow
@pytest.mark.ray
def test_ray_workers_prepare_over_s3_through_faults(world, proxy, tmp_path):
    """The command itself, in a process of its own with a Ray of its own."""
    config = world.on(ROOT, f"s3://{s3_world.BUCKET}/by-ray")
    (tmp_path / "config.json").write_text(json.dumps(to_dict(config)))
    rules = proxy.fresh(Rule("break", "^GET .*/(ant|bee|work)", when=every(9)), Rule("busy", "^PUT ", when=every(13)))
    command = [sys.executable, "-m", "mixgf", "prepare", "--config", str(tmp_path / "config.json")]
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"RAY_ADDRESS": ""})
    assert found.returncode == 0, found.stderr
    assert all(rule.hits for rule in rules)
    proxy.fresh()
    assert s3_world.contents(f"{config.output}/corpus") == world.local

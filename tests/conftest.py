"""Fixtures shared by the tests: a session-wide local Ray, and nothing that could reach a running cluster."""

import os
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

os.environ.update(
    RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1", MLFLOW_DISABLE_TELEMETRY="true"
)
# Ray workers and spawned processes import test modules as pytest names them (`tests.stages.test_x`) and helpers beside this file
_ROOT = Path(__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, (str(_ROOT), str(_ROOT / "tests"), os.environ.get("PYTHONPATH")))
)
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("MLFLOW_TRACKING_URI", None)

import pytest
from processes import die_with_us, free_port


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """One torch thread before any fixture, as every worker (train.threads = 1): float32 sums depend on the number of threads, and some libraries change it."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


@pytest.fixture(scope="session")
def ray_local():
    """One local Ray with 4 logical CPUs for the whole test session."""
    import ray

    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=0,
        include_dashboard=False,
        object_store_memory=128 << 20,
        log_to_driver=False,
        logging_level="ERROR",
        _temp_dir=f"/tmp/rt{os.getpid()}",
    )
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def tracking_uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"  # made once: a new database takes seconds


@pytest.fixture
def world(tmp_path, tracking_uri):
    """Three invented species, one file each of another size, and their one-to-one table (`tests/invented.py`)."""
    import invented

    return invented.make(tmp_path, tracking_uri)


@pytest.fixture(scope="session")
def whole_corpus(tmp_path_factory, tracking_uri):
    """URI of the corpus of the three invented species, prepared once: to compare others with, not to change."""
    import invented

    from mixgf.execution import LocalExecutor
    from mixgf.stages import prepare

    config, _ = invented.make(tmp_path_factory.mktemp("whole"), tracking_uri)
    return prepare.run(config, executor=LocalExecutor())


@pytest.fixture(scope="session")
def s3_server():
    """URL of moto's S3 server: a process of its own, real HTTP on loopback, in memory. It asks for no keys."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(die_with_us(command), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    for _ in range(300):
        try:
            urllib.request.urlopen(url)
            break
        except OSError:
            assert server.poll() is None, "moto's server ended"
            time.sleep(0.2)
    yield url
    server.terminate()
    server.wait()


@pytest.fixture(scope="session")
def small_world(tmp_path_factory):
    """Sources of every format for the tests of S3, prepared from disk to disk (`tests/s3_world.py`)."""
    import s3_world

    return s3_world.make(tmp_path_factory.mktemp("world"))


@pytest.fixture
def s3_settings(monkeypatch):
    """What a user sets for an endpoint: `s3_settings(url)`."""

    def settings(url, key="testkey", secret="testsecret"):
        for name in [n for n in os.environ if n.startswith("AWS_")]:
            if name.split("_")[1] not in ("REQUEST", "RESPONSE", "RETRY", "MAX"):
                monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")

    return settings


@pytest.fixture(scope="module")
def s3_bucket(s3_server):
    """A bucket `s3://runs` of the server, in the environment of a whole module."""
    import boto3

    keys = {"AWS_ENDPOINT_URL": s3_server, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (keys | {"AWS_DEFAULT_REGION": "us-east-1"}).items():
            patch.setenv(name, value)
        boto3.client("s3", endpoint_url=s3_server).create_bucket(Bucket="runs")
        yield "s3://runs"


@pytest.fixture(scope="session")
def make_corpus(tmp_path_factory):
    """Writes small token corpora in the documented layout: `make_corpus(lengths, species, rows, genes=...) -> uri`."""
    import numpy as np
    import pyarrow as pa

    from mixgf.genes.vocabulary import NUM_SPECIALS, Vocabulary
    from mixgf.storage import artifacts, files, tables

    def make(lengths, species, rows, *, genes=40, names=("human", "mouse"), cls=False, seed=0):
        """`genes` per species; gene i of every species is the ortholog of gene i of the others (see `orthologs.parquet`)."""
        uri = str(tmp_path_factory.mktemp("corpus"))
        lengths, species = np.asarray(lengths, dtype=np.int32), np.asarray(species, dtype=np.int8)
        table = pa.table(
            {
                "token": pa.array(np.arange(genes * len(names)) + NUM_SPECIALS, pa.int32()),
                "gene": [f"G{name}{i:05d}" for name in names for i in range(genes)],
                "symbol": [f"{name}{i}" for name in names for i in range(genes)],
                "species": [name for name in names for _ in range(genes)],
                "median": pa.array(np.ones(genes * len(names))),
                "biotype": ["protein_coding"] * (genes * len(names)),
            }
        )
        vocabulary = Vocabulary(table, species=tuple(names), sharing="separate")
        vocabulary.save(files.join(uri, "vocabulary.parquet"))
        orthologs = pa.table({name: [f"G{name}{i:05d}" for i in range(genes // 2)] for name in names})
        tables.write_table(files.join(uri, "orthologs.parquet"), orthologs)
        rng = np.random.default_rng(seed)
        sentences = [
            [2] * cls + (rng.permutation(genes)[: n - cls] + NUM_SPECIALS + genes * int(s)).tolist()
            for n, s in zip(lengths, species, strict=True)
        ]
        shards, start = [], 0
        for i, n in enumerate(rows):
            cells = range(start, start + n)
            shard = pa.table(
                {
                    "tokens": pa.array([sentences[c] for c in cells], pa.list_(pa.int32())),
                    "cell": [f"source:{c}" for c in cells],
                    "species": [names[species[c]] for c in cells],
                    "source": ["source"] * n,
                    "source_row": pa.array(list(cells), pa.int64()),
                    "length": pa.array(lengths[start : start + n]),
                    "cell_type": ["alpha" if c % 2 else "beta" for c in cells],
                }
            )
            size, sha = tables.write_table(files.join(uri, "shards", f"{i:05d}.parquet"), shard)
            shards.append({"name": f"{i:05d}.parquet", "rows": n, "bytes": size, "sha256": sha})
            start += n
        assert start == len(lengths)
        tables.write_table(files.join(uri, "index.parquet"), pa.table({"length": lengths, "species": species}))
        record = artifacts.plan("corpus", 1, {"tokens": {"cls": cls}, "seed": seed}, {})
        details = {
            "species": list(names),
            "vocabulary": vocabulary.hash,
            "shards": shards,
            "max_len": int(lengths.max()),
        }
        artifacts.finish(uri, record, counts={"kept": len(lengths)}, details=details)
        return uri

    return make

"""Fixtures shared by the tests: a session-wide local Ray, and nothing that could reach a running cluster."""

import os
import sys

os.environ.update(
    RAY_AUTH_MODE="disabled", RAY_USAGE_STATS_ENABLED="0", OMP_NUM_THREADS="1", MLFLOW_DISABLE_TELEMETRY="true"
)
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("MLFLOW_TRACKING_URI", None)

import pytest


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
def make_corpus(tmp_path_factory):
    """Writes small token corpora in the documented layout: `make_corpus(lengths, species, rows, genes=...) -> uri`."""
    import numpy as np
    import pyarrow as pa

    from mixgf import artifacts, storage
    from mixgf.vocab import NUM_SPECIALS, Vocabulary

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
        vocabulary.save(storage.join(uri, "vocabulary.parquet"))
        orthologs = pa.table({name: [f"G{name}{i:05d}" for i in range(genes // 2)] for name in names})
        storage.write_table(storage.join(uri, "orthologs.parquet"), orthologs)
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
            size, sha = storage.write_table(storage.join(uri, "shards", f"{i:05d}.parquet"), shard)
            shards.append({"name": f"{i:05d}.parquet", "rows": n, "bytes": size, "sha256": sha})
            start += n
        assert start == len(lengths)
        storage.write_table(storage.join(uri, "index.parquet"), pa.table({"length": lengths, "species": species}))
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


@pytest.fixture(scope="session")
def s3_bucket():
    """An empty bucket `s3://runs` of a moto server (real HTTP on loopback); the environment is what a user sets for any endpoint."""
    import socket
    import subprocess
    import time
    import urllib.request

    import boto3

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(url)
                break
            except OSError:
                time.sleep(0.2)
        keys = {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s"}
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (keys | {"AWS_DEFAULT_REGION": "us-east-1"}).items():
                patch.setenv(name, value)
            boto3.client("s3", endpoint_url=url).create_bucket(Bucket="runs")
            yield "s3://runs"
    finally:
        server.terminate()
        server.wait()

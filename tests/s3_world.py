"""A small real world for the S3 tests: three invented species, one source of each format, on disk and in a bucket."""

from __future__ import annotations

import dataclasses
import gzip
from pathlib import Path

import anndata
import boto3
import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import io as scipy_io
from scipy import sparse

from mixgf.config.data import Prepare, Source, SpeciesRow, Tokens, Vocab
from mixgf.config.run import Config, Tracking
from mixgf.execution import LocalExecutor
from mixgf.stages import prepare
from mixgf.storage import artifacts, files

NUM_GENES = 30
BUCKET = "cells"
SOURCES = (
    "ant/ant1.h5ad",
    "ant/ant2.h5ad",
    "bee.h5",
    "cow/matrix.mtx.gz",
    "cow/features.tsv.gz",
    "cow/barcodes.tsv.gz",
)


def _species(folder: Path, name: str, prefix: str) -> SpeciesRow:
    genes = [f"{prefix}{i:05d}" for i in range(NUM_GENES)]
    table = {"gene": genes, "symbol": [f"{name}-{i}x" for i in range(NUM_GENES)]}
    table |= {"biotype": ["protein_coding"] * NUM_GENES, "is_mito": [i == 0 for i in range(NUM_GENES)]}
    pq.write_table(pa.table(table), folder / f"{name}.parquet")
    return SpeciesRow(name=name, taxon=1, gene_prefix=prefix, genes=str(folder / f"{name}.parquet"))


def _counts(num: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.negative_binomial(2, 0.2, (num, NUM_GENES)) * (rng.random((num, NUM_GENES)) < 0.8)


def write_h5ad(path: Path, prefix: str, num: int, seed: int) -> None:
    x = sparse.csr_matrix(_counts(num, seed).astype(np.float32))
    obs = pd.DataFrame({"cell_type": pd.Categorical(["a", "b"] * num)[:num]}, index=[f"c{i}" for i in range(num)])
    names = [f"{prefix}{i:05d}" for i in range(NUM_GENES)]
    path.parent.mkdir(parents=True, exist_ok=True)
    anndata.AnnData(x, obs=obs, var=pd.DataFrame(index=names)).write_h5ad(path)


def _write_10x(path: Path, prefix: str, num: int, seed: int) -> None:
    x = sparse.csr_array(_counts(num, seed))
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix")
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(x, name)
        group["shape"] = np.asarray(x.shape[::-1])
        group["barcodes"] = np.asarray([f"c{i}" for i in range(num)], dtype="S")
        group["features/id"] = np.asarray([f"{prefix}{i:05d}" for i in range(NUM_GENES)], dtype="S")
        group["features/name"] = np.asarray([f"g{i}" for i in range(NUM_GENES)], dtype="S")
        group["features/feature_type"] = np.asarray(["Gene Expression"] * NUM_GENES, dtype="S")


def _write_mtx(folder: Path, prefix: str, num: int, seed: int) -> None:
    folder.mkdir()
    x = _counts(num, seed)
    scipy_io.mmwrite(folder / "matrix.mtx", sparse.coo_array(x.T), field="integer")
    plain = folder / "matrix.mtx"
    (folder / "matrix.mtx.gz").write_bytes(gzip.compress(plain.read_bytes(), mtime=0))
    plain.unlink()
    features = "".join(f"{prefix}{i:05d}\tg{i}\tGene Expression\n" for i in range(NUM_GENES))
    (folder / "features.tsv.gz").write_bytes(gzip.compress(features.encode(), mtime=0))
    (folder / "barcodes.tsv.gz").write_bytes(gzip.compress("".join(f"c{i}\n" for i in range(num)).encode(), mtime=0))


@dataclasses.dataclass(frozen=True)
class World:
    folder: Path
    config: Config
    """From disk; `on` and `to` change that."""
    local: dict[str, str]
    """What the corpus of the config from disk to disk holds."""

    def on(self, root: str, output: str, **changes: object) -> Config:
        """The same sources in another place, with the output there."""
        sources = tuple(
            dataclasses.replace(s, uri=s.uri.replace(str(self.folder / "data"), root)) for s in self.config.sources
        )
        return dataclasses.replace(self.config, sources=sources, output=output, **changes)


def make(folder: Path) -> World:
    """Write the files, and prepare them from disk to disk."""
    data = folder / "data"
    rows = tuple(_species(folder, n, p) for n, p in (("ant", "ENSA"), ("bee", "ENSB"), ("cow", "ENSC")))
    pq.write_table(
        pa.table({r.name: [f"{r.gene_prefix}{i:05d}" for i in range(5)] for r in rows}), folder / "pairs.parquet"
    )
    write_h5ad(data / "ant/ant1.h5ad", "ENSA", 23, 1)
    write_h5ad(data / "ant/ant2.h5ad", "ENSA", 11, 2)
    _write_10x(data / "bee.h5", "ENSB", 21, 3)
    _write_mtx(data / "cow", "ENSC", 12, 4)
    sources = (
        Source(uri=f"{data}/ant/*.h5ad", species="ant"),
        Source(uri=f"{data}/bee.h5", species="bee"),
        Source(uri=f"{data}/cow", species="cow"),
    )
    config = Config(
        output=str(folder / "run"), species=rows, sources=sources, vocab=Vocab(orthologs=(str(folder / "pairs.parquet"),)),
        tokens=Tokens(max_len=20), prepare=Prepare(shard_cells=15, block_cells=4),
        tracking=Tracking(uri=f"sqlite:///{folder}/mlflow.db"),
    )  # fmt: skip
    return World(folder, config, contents(prepare.run(config, executor=LocalExecutor())))


def client(url: str, key: str = "testkey", secret: str = "testsecret") -> object:
    """boto3, to look from outside at what mixgf does."""
    return boto3.client(
        "s3", endpoint_url=url, aws_access_key_id=key, aws_secret_access_key=secret, region_name="us-east-1"
    )


def put_sources(s3: object, world: World) -> None:
    """The bucket, with the world's files under `data/`."""
    s3.create_bucket(Bucket=BUCKET)
    for name in SOURCES:
        s3.put_object(Bucket=BUCKET, Key=f"data/{name}", Body=(world.folder / "data" / name).read_bytes())


def contents(uri: str) -> dict[str, str]:
    """SHA-256 of all that a finished corpus holds, and of its counts."""
    record = artifacts.require(uri, "corpus")
    assert set(files.list_dir(uri)) - {"cost"} == {
        "record.json", "index.parquet", "mapping.parquet", "dropped.parquet", "doublets.parquet", "hashes.parquet", "vocabulary.parquet",
        "near_duplicates.parquet", "near_hashes", "shards",
    }  # fmt: skip
    shards = files.list_dir(f"{uri}/shards")
    assert [s["name"] for s in record.details["shards"]] == shards
    assert files.list_dir(f"{uri}/near_hashes") == shards
    paths = [
        "index.parquet",
        "near_duplicates.parquet",
        *(f"near_hashes/{n}" for n in shards),
        "mapping.parquet",
        "dropped.parquet",
        "doublets.parquet",
        "hashes.parquet",
        "vocabulary.parquet",
        *(f"shards/{n}" for n in shards),
    ]
    return {f: files.sha256(f"{uri}/{f}") for f in paths} | {"counts": str(record.counts)}

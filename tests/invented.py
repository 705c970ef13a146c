"""Three invented species with small real files, for the tests of prepare."""

import dataclasses

import anndata
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse

from mixgf.config.data import Prepare, Source, SpeciesRow, Tokens, Vocab
from mixgf.config.run import Config, Tracking
from mixgf.corpus import reader
from mixgf.encoder import checkpoint
from mixgf.encoder.bert import MaskedModel
from mixgf.storage import artifacts, files, sealed

NUM_GENES = 30


def species(tmp_path, name, prefix):
    genes = [f"{prefix}{i:05d}" for i in range(NUM_GENES)]
    path = tmp_path / f"{name}.parquet"
    pq.write_table(
        pa.table({"gene": genes, "symbol": [f"{name}-{i}x" for i in range(NUM_GENES)], "biotype": ["protein_coding"] * NUM_GENES,
                  "is_mito": [i == 0 for i in range(NUM_GENES)]}), path,
    )  # fmt: skip
    return SpeciesRow(name=name, taxon=1, gene_prefix=prefix, genes=str(path))


def write_cells(path, prefix, num, seed, **obs):
    rng = np.random.default_rng(seed)
    x = rng.negative_binomial(2, 0.2, (num, NUM_GENES)) * (rng.random((num, NUM_GENES)) < 0.8)
    x[3] = 0  # an empty cell
    x[5] = x[4]  # a duplicate
    names = [f"{prefix}{i:05d}" for i in range(NUM_GENES)]
    frame = pd.DataFrame(
        {"cell_type": pd.Categorical(["a", "b"] * num)[:num], **obs}, index=[f"c{i}" for i in range(num)]
    )
    anndata.AnnData(sparse.csr_matrix(x.astype(np.float32)), obs=frame, var=pd.DataFrame(index=names)).write_h5ad(path)
    return x


def make(tmp_path, tracking_uri):
    """Three invented species, one file each of another size, and their one-to-one table."""
    rows = tuple(species(tmp_path, n, p) for n, p in (("ant", "ENSA"), ("bee", "ENSB"), ("cow", "ENSC")))
    pairs = {row.name: [f"{row.gene_prefix}{i:05d}" for i in range(5)] for row in rows}
    pq.write_table(pa.table(pairs), tmp_path / "orthologs.parquet")
    counts = {
        "ant": write_cells(tmp_path / "ant.h5ad", "ENSA", 37, 1, score=np.arange(37), donor=["d1"] * 37),
        "bee": write_cells(tmp_path / "bee.h5ad", "ENSB", 20, 2, score=np.linspace(0, 1, 20)),
        "cow": write_cells(tmp_path / "cow.h5ad", "ENSC", 11, 3, score=["x"] * 11),
    }
    config = Config(
        output=str(tmp_path / "run"), species=rows, sources=tuple(Source(uri=str(tmp_path / f"{n}.h5ad"), species=n) for n in counts),
        vocab=Vocab(orthologs=(str(tmp_path / "orthologs.parquet"),)), tokens=Tokens(max_len=20),
        prepare=Prepare(shard_cells=10, block_cells=4), tracking=Tracking(uri=tracking_uri),
    )  # fmt: skip
    return config, counts


def record_shards(uri):
    """Make the record of a corpus say what its shards hold now, after a test has written them again."""
    record = artifacts.find(uri)
    for shard in record.details["shards"]:
        shard["sha256"] = files.sha256(f"{uri}/shards/{shard['name']}")
    sealed.write_sealed(f"{uri}/record.json", dataclasses.asdict(record))


def untrained_checkpoint(run, model):
    """Publish a checkpoint with random weights where the run's own would be, for its corpus."""
    corpus, uri = reader.Corpus(f"{run.output}/corpus"), f"{run.output}/pretrain"
    record = artifacts.plan("checkpoint", checkpoint.SCHEMA, {}, {"corpus": corpus.record.fingerprint})
    artifacts.begin(uri, record)
    made = MaskedModel(model, corpus.vocabulary.size)
    checkpoint.publish_checkpoint(uri, record, made, vocabulary=corpus.vocabulary.hash, tokens=run.tokens)

"""Corpora of random sentences, drawn with a seed, for the benchmarks of training, embedding and perturbation."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from mixgf.corpus.reader import Corpus
from mixgf.genes.vocabulary import NUM_SPECIALS, Vocabulary
from mixgf.storage import artifacts, files, tables


def random_corpus(
    folder: str, *, num_cells: int, genes: int, shrink: int = 1, full: bool = False, longest: int = 2048
) -> Corpus:
    """A corpus of random sentences with the length mix of real cells: median 1,866 genes, 40 % cut at 2,048.

    Args:
        folder: where it is written.
        num_cells: of two species in turn.
        genes: of either species.
        shrink: divides all lengths, for small benchmarks.
        full: every sentence is of the greatest length.
        longest: the greatest length, before it is divided.
    """
    rng = np.random.default_rng(0)
    drawn = rng.lognormal(np.log(1866), 0.4, num_cells) if not full else np.full(num_cells, longest)
    lengths = (np.clip(drawn, 200, longest) // shrink).astype(np.int32)
    table = pa.table({
        "token": pa.array(np.arange(2 * genes) + NUM_SPECIALS, pa.int32()),
        "gene": [f"G{i:06d}" for i in range(2 * genes)], "symbol": [f"g{i}" for i in range(2 * genes)],
        "species": ["human"] * genes + ["mouse"] * genes, "median": np.ones(2 * genes),
        "biotype": ["protein_coding"] * (2 * genes),
    })  # fmt: skip
    vocabulary = Vocabulary(table, species=("human", "mouse"), sharing="separate")
    vocabulary.save(files.join(folder, "vocabulary.parquet"))
    species = (np.arange(num_cells) % 2).astype(np.int8)
    sentences = [
        rng.permutation(genes)[:n] + NUM_SPECIALS + genes * int(s) for n, s in zip(lengths, species, strict=True)
    ]
    shard = pa.table({"tokens": pa.array(sentences, pa.list_(pa.int32()))})
    tables.write_table(files.join(folder, "shards", "00000.parquet"), shard)
    tables.write_table(files.join(folder, "index.parquet"), pa.table({"length": lengths, "species": species}))
    record = artifacts.plan("corpus", 1, {"tokens": {}}, {})
    details = {
        "species": ["human", "mouse"],
        "vocabulary": vocabulary.hash,
        "shards": [{"name": "00000.parquet", "rows": num_cells}],
        "max_len": int(lengths.max()),
    }
    artifacts.finish(folder, record, details=details)
    return Corpus(folder)

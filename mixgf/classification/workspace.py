"""One classification's config, files and labelled cells, and the inputs that many models share: counts, vectors, encoders.

A `Workspace` is plain data (config, paths, table): it travels to any process. Each process opens the corpus for itself.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from scipy import sparse

from mixgf.arrays import Bools, Floats, Ints, Names
from mixgf.classification import encoders, features
from mixgf.classification.labels import Labelled
from mixgf.classification.models.protocol import Measured, Model, Problem, SentenceSet, problem_of
from mixgf.classification.paths import ArtifactPaths
from mixgf.classification.splits import Split, random_order
from mixgf.config import parse
from mixgf.config.run import Config
from mixgf.corpus import raw_counts
from mixgf.corpus.raw_counts import Counts
from mixgf.corpus.reader import Corpus
from mixgf.encoder import embed
from mixgf.encoder.bert import Encoder
from mixgf.encoder.device import pick_device
from mixgf.errors import UserError
from mixgf.genes import species
from mixgf.storage import artifacts, files, tables

BLOCK_CELLS = 2_000
"""Cells whose vectors are one file."""

_SPLIT_COUNTS: dict[str, tuple[sparse.csr_matrix, Names]] = {}
"""Counts, and their genes, of the cells that this process used last. Models of one split often run one after the other.

A module global: every Ray task unpickles a `Workspace` of its own, and all tasks of a process share this.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class Workspace:
    """What every task of a classification needs."""

    config: Config
    paths: ArtifactPaths
    table: Labelled
    """The labelled cells; splits hold row numbers into it."""

    def __getstate__(self) -> dict[str, Any]:
        """Without the open corpus, which holds a lock."""
        return {"config": self.config, "paths": self.paths, "table": self.table}

    @cached_property
    def corpus(self) -> Corpus:
        """The sentences, opened at first use."""
        return Corpus(self.paths.corpus)

    def load_encoder(self, encoder: str, device: torch.device) -> Encoder:
        """A copy of an encoder by name (`encoders.load`)."""
        return encoders.load(self.paths.checkpoint, encoder, self.config, self.corpus, device)

    def problem(self, split: Split, model: Model) -> Problem[Any]:
        """A split with the inputs that a model needs, from intermediate files."""
        # tasks that do not train an encoder have no GPU
        gpus = self.config.compute.gpus_per_worker
        device = pick_device(gpus) if model.trains_encoder else torch.device("cpu")
        train, target = (self.inputs(model, split, rows) for rows in (split.train, split.test))
        return problem_of(
            self.table, split, self.config, train, target,
            load_encoder=lambda: self.load_encoder(model.encoder or "", device), device=device,
        )  # fmt: skip

    def inputs(self, model: Model, split: Split, rows: Ints) -> Any:
        """What a model needs of some rows of the table, which train or are tested in a split."""
        cells = self.table.cells[rows]
        if not model.reads_counts and not model.reads_vectors:
            return SentenceSet(self.corpus, cells)
        counts = self.split_counts(split, rows)[0] if model.reads_counts else None
        if not model.reads_vectors:
            return counts
        assert model.encoder is not None, "vectors are of an encoder"
        vectors = self.vectors(model.encoder, cells)
        return Measured(counts=counts, vectors=vectors) if model.reads_counts else vectors

    def has_inputs(self, model: Model, sources: Iterable[str]) -> bool:
        """Whether the intermediate files are there that a model reads of cells of some sources."""
        if model.reads_counts and not all(files.exists(self.paths.counts(source)) for source in sources):
            return False
        own = model.encoder == encoders.CHECKPOINT and self.paths.embeddings
        return not model.reads_vectors or bool(own or files.list_dir(self.paths.vectors(model.encoder or "")))

    # Raw counts

    def write_counts(self, source: str, cells: Ints) -> None:
        """Write raw counts of these cells (numbers in the corpus, ascending), all of one source."""
        ordered, found = raw_counts.read_cells(self.corpus, cells, block_cells=self.config.prepare.block_cells)
        raw_counts.save_counts(self.paths.counts(source), ordered, found)

    def counts(self, rows: Ints) -> tuple[sparse.csr_matrix, Names]:
        """Raw counts (N, G) of rows of the table, in their order, and their genes (`raw_counts.shared_gene_space`)."""
        table, vocabulary = self.table, self.corpus.vocabulary
        blocks, numbers = [], []
        for source in np.unique(table.sources[rows]).tolist():
            mine = rows[table.sources[rows] == source]
            name = str(table.species[mine[0]])
            genes = vocabulary.species_genes(name).genes.astype(np.str_)
            cells, found = raw_counts.load_counts(self.paths.counts(source), len(genes))
            keep = np.isin(cells, table.cells[mine])
            numbers.append(cells[keep])
            blocks.append(Counts(matrix=found[keep], genes=genes, species=name))
        several = len({b.species for b in blocks}) > 1
        orthologs = species.orthologs(self.config.vocab.orthologs) if several else {}
        matrices, shared = raw_counts.shared_gene_space(blocks, orthologs)
        whole, have = sparse.vstack(matrices, format="csr"), np.concatenate(numbers)
        order = np.argsort(have)
        return sparse.csr_matrix(whole[order[np.searchsorted(have[order], table.cells[rows])]]), shared

    def split_counts(self, split: Split, rows: Ints) -> tuple[sparse.csr_matrix, Names]:
        """Raw counts of rows of the table over the genes that every study of a split detects, and these genes.

        Where several studies meet, a gene that one of them never detects is left out (`common_genes`).
        """
        every = np.concatenate([split.train, split.test])
        key = f"{self.paths.output} {self.paths.prediction(split, '')}"
        if key not in _SPLIT_COUNTS:
            _SPLIT_COUNTS.clear()
            counts, genes = self.counts(every)
            common = common_genes(counts, self.table.datasets[every])
            _SPLIT_COUNTS[key] = sparse.csr_matrix(counts[:, common]), genes[common]
        counts, genes = _SPLIT_COUNTS[key]
        order = np.argsort(every)
        return sparse.csr_matrix(counts[order[np.searchsorted(every[order], rows)]]), genes

    # Vectors

    def write_vectors(self, encoder: str, number: int, cells: Ints) -> None:
        """Write vectors of these cells (numbers in the corpus) as block `number`."""
        settings = self.config.embed
        vectors_ND = embed.embed_cells(
            self.load_encoder(encoder, pick_device(self.config.compute.gpus_per_worker)), self.corpus, cells, settings.pooling, settings.layer,
            self.config.train.micro_tokens,
        )  # fmt: skip
        tables.write_table(
            self.paths.vectors_block(encoder, number), pa.table({"cell": cells, "vector": as_column(vectors_ND)})
        )

    def vectors(self, encoder: str, cells: Ints) -> npt.NDArray[np.float32]:
        """Frozen vectors (N, D) of these cells (numbers in the corpus), in their order."""
        if encoder == encoders.CHECKPOINT and self.paths.embeddings:
            return self._vectors_of_artifact(cells)
        folder = self.paths.vectors(encoder)
        found: list[tuple[Ints, npt.NDArray[np.float32]]] = []
        for name in files.list_dir(folder):
            table = tables.read_table(files.join(folder, name))
            mine = np.isin(table["cell"].to_numpy(), cells)
            found.append((table["cell"].to_numpy()[mine], vector_column(table)[mine]))
        have = np.concatenate([c for c, _ in found])
        order = np.argsort(have)
        return np.concatenate([v for _, v in found])[order][np.searchsorted(have[order], cells)]

    def _vectors_of_artifact(self, cells: Ints) -> npt.NDArray[np.float32]:
        """Vectors from the shards of an embeddings artifact."""
        corpus, folder = self.corpus, self.paths.embeddings
        known = artifacts.require(folder, "embeddings").files
        names = [f"shards/{name}" for name in files.list_dir(files.join(folder, "shards"))]
        assert len(names) == len(corpus.shards), "embeddings lie beside the shards of their corpus"
        by_shard: dict[int, npt.NDArray[np.float32]] = {}
        shard_of = np.searchsorted(corpus.starts, cells, side="right") - 1
        for shard in np.unique(shard_of).tolist() or [0]:  # of no cells: the width
            uri = files.join(folder, names[shard])
            matrix = vector_column(
                tables.read_table(uri, ["vector"], sha256=known.get(names[shard], {}).get("sha256", ""))
            )
            by_shard[shard] = matrix[cells[shard_of == shard] - corpus.starts[shard]]
        out = np.empty((len(cells), next(iter(by_shard.values())).shape[1]), dtype=np.float32)
        for shard, matrix in by_shard.items():
            out[shard_of == shard] = matrix
        return out

    # Whole embeddings

    def sample(self) -> Ints:
        """The rows of the table on which whole embeddings are measured, ascending."""
        order = random_order(self.table.names, "integration", self.config.seed)
        return np.sort(order[: self.config.classify.integration_cells])

    def integration_uri(self, space: str) -> str:
        """File of the map and measures of one embedding."""
        return self.paths.integration(space, self.config.classify.integration_cells)

    def space_vectors(self, space: str, rows: Ints) -> Floats:
        """Vectors of rows of the table by an encoder, or in the space `encoders.EXPRESSION`."""
        if space != encoders.EXPRESSION:
            return self.vectors(space, self.table.cells[rows])
        return features.expression_space(self.counts(rows)[0], self.config.classify.num_hvgs, self.config.seed)


def common_genes(counts_NG: sparse.csr_matrix, datasets_N: Names) -> Bools:
    """Genes that every data set detects in at least one cell (G,); with one data set all genes.

    A gene that a data set did not measure has zeros there, which would look like a difference between its cells and the others'.
    """
    names = np.unique(datasets_N)
    if len(names) < 2:
        return np.ones(counts_NG.shape[1], dtype=bool)
    return np.all([np.asarray(counts_NG[datasets_N == name].sum(0)).ravel() > 0 for name in names], axis=0)


def as_column(vectors_ND: Floats) -> pa.FixedSizeListArray:
    """Vectors (N, D), or another matrix, as a column of a table."""
    return pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.reshape(-1)), vectors_ND.shape[1])


def vector_column(table: pa.Table, name: str = "vector") -> npt.NDArray[Any]:
    """A column of a table that `as_column` made, (N, D)."""
    column = table[name].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)


def find_embeddings(
    run: Config, corpus: artifacts.Record, checkpoint: artifacts.Record
) -> tuple[str, artifacts.Record | None]:
    """URI and record of the embeddings artifact of this corpus and checkpoint; ("", None) where there is none.

    Raises:
        UserError: `inputs.embeddings` is of another corpus, checkpoint or `embed` settings.
    """
    uri = run.inputs.embeddings or files.join(run.output, "embed")
    record = artifacts.find(uri)
    parents = {corpus.fingerprint, checkpoint.fingerprint}
    if record is not None and record.config == parse.to_dict(run.embed) and parents <= set(record.parents.values()):
        return uri, record
    if run.inputs.embeddings:
        msg = (f"inputs.embeddings = {uri}: not of this corpus, checkpoint and embed.* settings; make them with `mixgf embed`, "
               "or leave inputs.embeddings empty")  # fmt: skip
        raise UserError(msg)
    return "", None

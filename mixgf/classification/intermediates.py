"""What the pieces of a classification share: where their files are, raw counts of sources, vectors of blocks of cells.

Counts and vectors are needed only until every model is scored; predictions stay, so that models can be added later.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy import sparse

from mixgf import rng
from mixgf.arrays import Floats, Ints
from mixgf.classification import baselines, registry
from mixgf.classification.labels import Labelled
from mixgf.classification.splits import Split, keyed_order
from mixgf.config import parse
from mixgf.config.data import Source, SpeciesRow
from mixgf.config.run import Config
from mixgf.corpus import raw_counts
from mixgf.corpus.raw_counts import Counts
from mixgf.corpus.reader import Corpus
from mixgf.encoder import embed
from mixgf.encoder.device import pick_device
from mixgf.errors import UserError
from mixgf.genes import species
from mixgf.storage import artifacts, files, tables

BLOCK_CELLS = 2_000
"""Cells whose vectors are one part."""
EXPRESSION = "expression"
"""The space of 50 principal components of the variable genes, which no encoder made."""
SCRATCH = ("counts", "vectors", "classifiers")
"""Kinds of parts that are removed at the end."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArtifactPaths:
    """URIs of what is read and of the folder of parts."""

    corpus: str
    checkpoint: str
    output: str
    """The artifact's folder."""
    embeddings: str
    """Vectors of all cells by this checkpoint; empty = made here, as parts."""

    @property
    def parts(self) -> str:
        """The folder of parts."""
        return files.join(self.output, "parts")


def slug(text: str) -> str:
    """A file name that people can read; not unique."""
    return re.sub(r"[^A-Za-z0-9_.]+", "-", text).strip("-")[:60]


def prediction_part(places: ArtifactPaths, split: Split, model: str) -> str:
    """URI of the predictions of one model on one split.

    The settings that decide them are not in the name: one folder holds predictions of one set of them (`registry.reads`).
    """
    key = parse.fingerprint([split.task, split.share, split.unseen, model])[:10]
    name = slug(f"{split.kind} {split.group} {split.direction} {split.seed} {split.unseen} {model}")
    return files.join(places.parts, "predictions", f"{name}-{key}.parquet")


def classifier_part(places: ArtifactPaths, group: str, model: str) -> str:
    """Folder of a classifier that may be kept for a group."""
    return files.join(places.parts, "classifiers", f"{slug(group)}-{parse.fingerprint([group, model])[:8]}")


def named(group: str, splits: Sequence[Split]) -> str:
    """A group's folder: its name as a slug, with a key where two groups have the same slug."""
    alike = {s.group for s in splits if slug(s.group) == slug(group)}
    return slug(group) if len(alike) == 1 else f"{slug(group)}-{parse.fingerprint(group)[:8]}"


# Counts and vectors


def counts_part(places: ArtifactPaths, source: str) -> str:
    """URI of the raw counts of one source."""
    return files.join(places.parts, "counts", f"{slug(source)}-{parse.fingerprint(source)[:8]}.parquet")


def read_counts(run: Config, places: ArtifactPaths, source: str, cells: Ints) -> None:
    """Keep raw counts of these cells (global numbers, ascending), all of one source."""
    corpus = Corpus(places.corpus)
    entry = next(dict(s) for s in corpus.record.config["sources"] if s["name"] == source)
    entry.pop("size", None)
    row_of = next(
        parse.from_dict(SpeciesRow, s) for s in corpus.record.config["species"] if s["name"] == entry["species"]
    )
    rows = corpus.obs(["source_row"])["source_row"].to_numpy()[cells]
    order = np.argsort(rows, kind="stable")
    genes = corpus.vocabulary.species_genes(entry["species"])
    found = raw_counts.read_counts(
        parse.from_dict(Source, entry), row_of, genes, rows[order], block_cells=run.prepare.block_cells
    )
    raw_counts.save_counts(counts_part(places, source), cells[order], found)


def vectors_part(places: ArtifactPaths, encoder: str, number: int) -> str:
    """URI of the vectors of one block of cells by an encoder (see `registry.load`)."""
    return files.join(places.parts, "vectors", registry.called(encoder), f"{number:05d}.parquet")


def embed_block(run: Config, places: ArtifactPaths, encoder: str, number: int, cells: Ints) -> None:
    """Keep vectors of these cells."""
    corpus = Corpus(places.corpus)
    model = registry.load(places.checkpoint, encoder, run, corpus, pick_device(run.compute.gpus_per_worker))
    vectors_ND = embed.embed_cells(model, corpus, cells, run.embed.pooling, run.embed.layer, run.train.micro_tokens)
    flat = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.reshape(-1)), vectors_ND.shape[1])
    tables.write_table(vectors_part(places, encoder, number), pa.table({"cell": cells, "vector": flat}))


def vectors(places: ArtifactPaths, encoder: str, cells: Ints) -> npt.NDArray[np.float32]:
    """Frozen vectors of these cells, in their order: from the embeddings artifact, else from parts."""
    if encoder == registry.CHECKPOINT and places.embeddings:
        return _from_artifact(places, cells)
    folder = files.join(places.parts, "vectors", registry.called(encoder))
    found: list[tuple[Ints, npt.NDArray[np.float32]]] = []
    for name in files.list_dir(folder):
        table = tables.read_table(files.join(folder, name))
        mine = np.isin(table["cell"].to_numpy(), cells)
        if mine.any():
            found.append((table["cell"].to_numpy()[mine], vector_column(table)[mine]))
    have = np.concatenate([c for c, _ in found])
    order = np.argsort(have)
    return np.concatenate([v for _, v in found])[order][np.searchsorted(have[order], cells)]


def _from_artifact(places: ArtifactPaths, cells: Ints) -> npt.NDArray[np.float32]:
    corpus = Corpus(places.corpus)
    names = files.list_dir(files.join(places.embeddings, "shards"))
    assert len(names) == len(corpus.shards), "embeddings lie beside the shards of their corpus"
    parts: dict[int, npt.NDArray[np.float32]] = {}
    shard_of = np.searchsorted(corpus.starts, cells, side="right") - 1
    for shard in np.unique(shard_of).tolist():
        matrix = vector_column(tables.read_table(files.join(places.embeddings, "shards", names[shard]), ["vector"]))
        parts[shard] = matrix[cells[shard_of == shard] - corpus.starts[shard]]
    out = np.empty((len(cells), next(iter(parts.values())).shape[1]), dtype=np.float32)
    for shard, matrix in parts.items():
        out[shard_of == shard] = matrix
    return out


def vector_column(table: pa.Table) -> npt.NDArray[np.float32]:
    """The column `vector` of a table, (N, D)."""
    column = table["vector"].combine_chunks()
    return column.flatten().to_numpy().reshape(len(column), -1)


_LAST: dict[str, baselines.Problem] = {}
"""The split that this process saw last: its baselines come one after the other, and share what is worked out of counts."""


def problem(run: Config, places: ArtifactPaths, table: Labelled, split: Split) -> baselines.Problem:
    """A split as the baselines see it, from the kept raw counts."""
    key = prediction_part(places, split, "")
    if key not in _LAST:
        _LAST.clear()
        _LAST[key] = _problem(run, places, table, split)
    return _LAST[key]


def _problem(run: Config, places: ArtifactPaths, table: Labelled, split: Split) -> baselines.Problem:
    whole = counts_of(run, places, table, np.concatenate([split.train, split.test]))
    num_train = len(split.train)
    return baselines.Problem(
        train=sparse.csr_matrix(whole[:num_train]), test=sparse.csr_matrix(whole[num_train:]),
        labels=split.ids(table.labels[split.train]), num_classes=len(split.classes), train_species=table.species[split.train],
        test_species=table.species[split.test], num_hvgs=run.classify.num_hvgs, num_neighbours=run.classify.knn,
        seed=int(rng.hashed(run.seed, split.seed)) & 0x7FFFFFFF,
    )  # fmt: skip


def counts_of(run: Config, places: ArtifactPaths, table: Labelled, rows: Ints) -> sparse.csr_matrix:
    """Raw counts of rows of the table, in their order, in one gene space (`counts.shared_space`)."""
    vocabulary = Corpus(places.corpus).vocabulary
    blocks, numbers = [], []
    for source in np.unique(table.sources[rows]).tolist():
        mine = rows[table.sources[rows] == source]
        name = str(table.species[mine[0]])
        genes = vocabulary.species_genes(name).genes.astype(np.str_)
        cells, found = raw_counts.load_counts(counts_part(places, source), len(genes))
        keep = np.isin(cells, table.cells[mine])
        numbers.append(cells[keep])
        blocks.append(Counts(matrix=found[keep], genes=genes, species=name))
    orthologs = species.orthologs(run.vocab.orthologs) if len({b.species for b in blocks}) > 1 else {}
    matrices, _ = raw_counts.shared_gene_space(blocks, orthologs)
    whole, have = sparse.vstack(matrices, format="csr"), np.concatenate(numbers)
    order = np.argsort(have)
    return sparse.csr_matrix(whole[order[np.searchsorted(have[order], table.cells[rows])]])


# Whole embeddings


def spaces(run: Config, table: Labelled) -> list[str]:
    """The embeddings that are measured: every encoder that a head reads and, where baselines run, expression itself."""
    if not run.classify.integration_cells:
        return []
    kinds = sorted(set(table.species.tolist()))
    pairs = species.orthologs(run.vocab.orthologs) if len(kinds) > 1 else {}
    comparable = all((kinds[0], other) in pairs for other in kinds[1:])
    counted = comparable and any(m in baselines.BASELINES for m in run.classify.models)
    return registry.of_encoders(run.classify.models, registry.HEADS) + [EXPRESSION] * counted


def sample(run: Config, table: Labelled) -> Ints:
    """The rows of the table on which embeddings are measured, ascending."""
    order = keyed_order(table.names, "integration", run.seed)
    return np.sort(order[: run.classify.integration_cells])


def integration_part(run: Config, places: ArtifactPaths, space: str) -> str:
    """URI of what is known of one embedding as a whole."""
    name = f"{registry.called(space)}-{run.classify.integration_cells}.parquet"
    return files.join(places.parts, "integration", name)


def space_vectors(run: Config, places: ArtifactPaths, table: Labelled, space: str, rows: Ints) -> Floats:
    """Vectors of rows of the table in one space of `spaces`."""
    if space != EXPRESSION:
        return vectors(places, space, table.cells[rows])
    return baselines.expression_space(counts_of(run, places, table, rows), run.classify.num_hvgs, run.seed)


def embeddings(
    run: Config, corpus: artifacts.Record, checkpoint_: artifacts.Record
) -> tuple[str, artifacts.Record | None]:
    """The embeddings artifact of this corpus and checkpoint, where there is one; else vectors are made here."""
    uri = run.inputs.embeddings or files.join(run.output, "embed")
    record = artifacts.find(uri)
    parents = {corpus.fingerprint, checkpoint_.fingerprint}
    if record is not None and record.config == parse.to_dict(run.embed) and parents <= set(record.parents.values()):
        return uri, record
    if run.inputs.embeddings:
        msg = (f"inputs.embeddings = {uri}: not of this corpus, checkpoint and embed.* settings; make them with `mixgf embed`, "
               "or leave inputs.embeddings empty")  # fmt: skip
        raise UserError(msg)
    return "", None

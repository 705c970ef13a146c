"""Cell types for a user's cells by a kept classifier, with reasons to doubt them.

`label_cells` depends only on a classifier, a file and a range of its rows. Warnings about the whole file (coverage of the model's genes,
species without training cells, too many doubted cells) are made from all its labels, in `verdicts`.

Shapes: N cells of a block, C classes, G columns of the file, V vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse

from mixgf.arrays import Bools, Ints
from mixgf.cells.open import open_source
from mixgf.cells.reader import FILE_OPTION, Reader
from mixgf.classification import clusters, kept_classifier, ontology
from mixgf.classification.kept_classifier import DOUBTED, EMPTY, Kept
from mixgf.classification.models.protocol import CellSet, Measured
from mixgf.classification.workspace import as_column, vector_column
from mixgf.config import data, parse
from mixgf.config.data import Source, SpeciesRow
from mixgf.corpus import in_memory
from mixgf.corpus.packed import offsets_of
from mixgf.corpus.shards import regroup
from mixgf.execution import Pipeline
from mixgf.genes.vocabulary import Vocabulary
from mixgf.storage import files, tables

PREFIX = "mixgf_"
"""Prefix of the columns that are added to obs."""
OBSM = "mixgf_probabilities"
UNS = "mixgf_annotate"
"""Facts of the labels, in `uns` of an .h5ad file and in the metadata of a Parquet file."""
BLOCK_CELLS = 512
LOW_COVERAGE = 0.8
"""Share of the tokens of training sentences whose genes a file must measure; below it the file gets a warning."""
MANY = 3.0
"""Multiple of the expected share of doubted cells above which the file gets a warning."""
NAMES = "names"
"""Ids of the Cell Ontology are those of the terms with the labels' names."""
_EXTRA: dict[str, Any] = {
    "cluster": np.int32, "majority": str, "majority_share": np.float32, "ontology_id": str, "term_id": str, "term": str,
}  # fmt: skip
"""Columns of `Extras`, and their types."""
SAMPLE_CELLS = 4_000
"""Cells that a classifier is aligned to, at most, up to a block."""


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """Facts of a user's file that are needed before its cells are read."""

    source: Source
    row: SpeciesRow
    num_cells: int
    coverage: float
    """Share of the tokens of training sentences (of this species, where the model saw it) whose genes the file measures."""
    genes: int
    """Number of genes of the species' vocabulary that it measures."""


def species_rows(kept: Kept, vocabulary: Vocabulary) -> list[SpeciesRow]:
    """Config rows of the species that the model reads."""
    rows = [parse.from_dict(SpeciesRow, row) for row in kept.about["species_rows"]]
    return [row for row in rows or (data.HUMAN, data.MOUSE) if row.name in vocabulary.species]


def look(source: Source, kept: Kept, vocabulary: Vocabulary) -> File:
    """Facts of a file; prints what is doubted in it (`in_memory.tell`).

    Where no species is given, it is the one that most of the gene names belong to.

    Raises:
        UserError: the file cannot be read, or knows none of the model's genes.
    """
    with open_source(source, option=FILE_OPTION) as reader:
        file, genes = describe(reader, source, kept, vocabulary)
        in_memory.tell(reader, genes, species_rows(kept, vocabulary))
        return file


def describe(reader: Reader, source: Source, kept: Kept, vocabulary: Vocabulary) -> tuple[File, in_memory.Genes]:
    """Facts of a table of counts, and its genes in the model's vocabulary.

    Raises:
        UserError: it knows none of the model's genes.
    """
    rows = tuple(species_rows(kept, vocabulary))
    genes = in_memory.find_genes(reader, vocabulary, rows, species=source.species, column=source.genes)
    whole = float(kept.share_V[genes.of_species.tokens].sum())
    number = len(genes.measured)
    # a species without training cells: every gene counts alike
    coverage = float(kept.share_V[genes.measured].sum()) / whole if whole > 0 else number / len(genes.of_species.tokens)
    file = File(
        source=replace(source, species=genes.row.name), row=genes.row, num_cells=reader.num_rows, coverage=coverage,
        genes=number,
    )  # fmt: skip
    return file, genes


def form_for(
    reader: Reader, genes: in_memory.Genes, file: File, kept: Kept, *, axes: bool = False, block_cells: int = BLOCK_CELLS
) -> Kept:  # fmt: skip
    """The classifier for a file: aligned to a sample of its cells, and to the genes that it has (`kept_classifier.for_study`).

    Args:
        reader: Of the counts.
        genes: Genes of `describe`.
        file: Facts of `describe`.
        kept: The classifier.
        axes: Find the directions in which the cells differ most, for clusters (`Extras.majority`).
        block_cells: Rows held in memory at a time.
    """
    measured_G, pick = fit_to_file(kept, genes)
    if kept.reference is None and not axes:
        return kept.without(~measured_G)
    tokens = parse.from_dict(data.Tokens, kept.about["tokens"])
    starts = range(0, file.num_cells, block_cells)
    order = np.random.default_rng(0).permutation(len(starts))  # whole blocks, from all of the file
    found = []
    for start in sorted(starts[i] for i in order[: -(-SAMPLE_CELLS // block_cells)]):
        stop = min(start + block_cells, file.num_cells)
        blocks = in_memory.blocks(reader, genes, tokens, start, stop, rows=block_cells, with_counts=kept.reads_counts)
        for block in blocks:
            full = np.flatnonzero(block.genes_N > 0)
            found += [kept.cells(block, full, _counts(block, full, pick), genes.row.name)] * (len(full) > 0)
    if not found:
        return kept.without(~measured_G)
    cells = _together(found)
    made = kept_classifier.for_study(kept, cells, measured_G)
    if not axes:
        return made
    if cells.x.counts is not None and len(made.genes) < len(kept.genes):  # it was fitted to fewer genes
        counts = sparse.csr_matrix(cells.x.counts[:, np.isin(kept.genes, made.genes)])
        cells = CellSet(replace(cells.x, counts=counts), cells.species, cells.datasets)
    return replace(made, axes_HK=clusters.components(made.classifier.places(cells)))


def _together(several: Sequence[CellSet[Measured]]) -> CellSet[Measured]:
    """Several sets of cells of one file, one after the other."""
    one = several[0].x
    x = Measured(
        counts=None if one.counts is None else sparse.vstack([s.x.counts for s in several], format="csr"),
        vectors=None if one.vectors is None else np.concatenate([np.asarray(s.x.vectors) for s in several]),
        ranks=None if one.ranks is None else sparse.vstack([s.x.ranks for s in several], format="csr"),
    )
    species, datasets = (
        np.concatenate(names) for names in zip(*((s.species, s.datasets) for s in several), strict=True)
    )
    return CellSet(x, species, datasets)


def fit_to_file(kept: Kept, genes: in_memory.Genes) -> tuple[Bools, sparse.csr_matrix | None]:
    """Genes of the classifier that a file measures, and the matrix that takes the file's genes to them; None = it reads none."""
    if not len(kept.genes):
        return np.empty(0, dtype=bool), None
    names = np.asarray(genes.of_species.genes, dtype=np.str_)
    column_G = kept.columns(genes.row.name, names)
    measured = np.isin(genes.of_species.tokens, genes.measured)
    there_G = (column_G >= 0) & measured[np.maximum(column_G, 0)]
    entries = (np.ones(int(there_G.sum()), np.float32), (column_G[there_G], np.flatnonzero(there_G)))
    return there_G, sparse.csr_matrix(entries, shape=(len(names), len(kept.genes)))


def _counts(block: in_memory.Sentences, full: Ints, pick: sparse.csr_matrix | None) -> sparse.csr_matrix | None:
    """Counts of some cells of a block over the classifier's genes."""
    return None if pick is None or block.counts_NG is None else sparse.csr_matrix(block.counts_NG[full] @ pick)


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelPlan:
    """One part of labels: rows [start, stop) of a file."""

    model: str
    """Folder of a classifier in the form that fits the file (`write_form`)."""
    version: str
    """Hash of its content: a process loads it once for all parts."""
    file: File
    """Facts of `look`."""
    start: int
    stop: int
    to: str
    """URI of the part."""
    block_cells: int = BLOCK_CELLS
    """Rows read at a time."""


@lru_cache(maxsize=1)
def _loaded(model: str, version: str) -> tuple[Kept, Vocabulary]:
    del version
    return kept_classifier.read(model)


def read_sentences(plan: LabelPlan) -> Iterator[pa.Table]:
    """Read: cells as sentences, with their counts where the classifier reads counts.

    Columns: `tokens` (list of int32), `genes` (detected vocabulary genes), `columns` and `counts` (lists: genes of the classifier and
    their counts).
    """
    kept, vocabulary = _loaded(plan.model, plan.version)
    tokens = parse.from_dict(data.Tokens, kept.about["tokens"])
    with open_source(plan.file.source, option=FILE_OPTION) as reader:
        _, genes = describe(reader, plan.file.source, kept, vocabulary)
        _, pick = fit_to_file(kept, genes)
        blocks = in_memory.blocks(
            reader, genes, tokens, plan.start, plan.stop, rows=plan.block_cells, with_counts=kept.reads_counts
        )
        for block in blocks:
            every = np.arange(len(block.genes_N))
            counts = _counts(block, every, pick) if kept.reads_counts else None
            counts = sparse.csr_matrix((len(every), 0), dtype=np.float32) if counts is None else counts
            offsets = pa.array(counts.indptr, pa.int32())
            sentences = pa.ListArray.from_arrays(pa.array(block.offsets_N1, pa.int32()), pa.array(block.tokens_T))
            yield pa.table({
                "tokens": sentences, "genes": pa.array(block.genes_N, pa.int64()),
                "columns": pa.ListArray.from_arrays(offsets, pa.array(counts.indices, pa.int32())),
                "counts": pa.ListArray.from_arrays(offsets, pa.array(counts.data, pa.float32())),
            })  # fmt: skip


def label_sentences(sentences: Iterator[pa.Table], plan: LabelPlan) -> Iterator[pa.Table]:
    """Transform: cells to labels; columns of `label_rows`.

    The last bits of a product of matrices depend on their sizes, so rows are taken in groups of `block_cells`, however they come.
    """
    kept, _ = _loaded(plan.model, plan.version)
    cls = parse.from_dict(data.Tokens, kept.about["tokens"]).cls
    for table in regroup(sentences, plan.block_cells):
        lists = {name: table[name].combine_chunks() for name in ("tokens", "columns", "counts")}
        tokens_T, indices, counts = (one.flatten().to_numpy() for one in lists.values())
        offsets_N1, indptr = (offsets_of(lists[name].value_lengths().to_numpy()) for name in ("tokens", "columns"))
        counts_NG = sparse.csr_matrix((counts, indices, indptr), shape=(table.num_rows, len(kept.genes)))
        block = in_memory.Sentences(
            start=0, tokens_T=tokens_T, offsets_N1=offsets_N1, cls=cls, genes_N=table["genes"].to_numpy(),
        )  # fmt: skip
        yield _label_block(kept, block, counts_NG, plan.file.row.name)


def write_labels(labels: Iterator[pa.Table], plan: LabelPlan) -> None:
    """Write: the part."""
    tables.write_table(plan.to, pa.concat_tables(labels).combine_chunks())


label_cells = Pipeline(
    name="label_cells", source="Cells", read=read_sentences, steps=(label_sentences,), write=write_labels
)
"""Labels of some rows of a file as a Parquet part, with the columns of `label_rows`. Takes a `LabelPlan`."""


def write_form(model: str, file: File, to: str, *, axes: bool = False, device: str = "cpu") -> None:
    """Write the form of a classifier that fits a file (`form_for`) into a folder."""
    kept, vocabulary = kept_classifier.read(model, device)
    with open_source(file.source, option=FILE_OPTION) as reader:
        _, genes = describe(reader, file.source, kept, vocabulary)
        kept_classifier.save(to, form_for(reader, genes, file, kept, axes=axes), vocabulary)


def label_rows(
    reader: Reader, genes: in_memory.Genes, kept: Kept, start: int, stop: int, *, block_cells: int = BLOCK_CELLS
) -> Iterator[pa.Table]:
    """Labels of rows [start, stop), as tables of at most `block_cells` cells.

    Columns: `label`, `probability`, `second`, `second_probability`, `entropy` (nats), `distance` (to the type's
    centre, in units of its training cells' mean distance), `genes` (detected vocabulary genes), `doubt` (text, empty = none found),
    `p` (probability of every class), and with `Kept.axes_HK` `vector` (the cell along these).

    Args:
        reader: Reader of the counts.
        genes: Genes of `describe`.
        kept: The classifier, in the form that fits the file.
        start: First row.
        stop: Row after the last.
        block_cells: Rows held in memory at a time.
    """
    tokens = parse.from_dict(data.Tokens, kept.about["tokens"])
    _, pick = fit_to_file(kept, genes)
    for block in in_memory.blocks(reader, genes, tokens, start, stop, rows=block_cells, with_counts=kept.reads_counts):
        yield _label_block(kept, block, _counts(block, np.arange(len(block.genes_N)), pick), genes.row.name)


def _label_block(kept: Kept, block: in_memory.Sentences, counts_NG: sparse.csr_matrix | None, species: str) -> pa.Table:
    """Labels of the cells of a block; `counts_NG` are over the classifier's genes."""
    genes_N = block.genes_N
    num_cells, num_classes = len(genes_N), len(kept.classes)
    full = np.flatnonzero(genes_N > 0)
    p_NC = np.full((num_cells, num_classes), np.nan)
    distance_N = np.full(num_cells, np.nan)
    doubt = np.full(num_cells, EMPTY, dtype=object)
    vectors_NK = None if not kept.axes_HK.size else np.zeros((num_cells, kept.axes_HK.shape[1]), dtype=np.float32)
    if len(full):
        cells = kept.cells(block, full, None if counts_NG is None else counts_NG[full], species)
        p_NC[full] = kept.probabilities(cells)
        distance_N[full] = kept.distances(cells, p_NC[full].argmax(1))
        doubt[full] = kept.doubts(p_NC[full], distance_N[full], genes_N[full])
        if vectors_NK is not None:
            vectors_NK[full] = clusters.vectors(kept.classifier.places(cells), kept.axes_HK)
    order_NC = np.argsort(-np.nan_to_num(p_NC), axis=1, kind="stable")
    classes, empty = np.array(kept.classes, dtype=object), genes_N == 0
    entropy_N = -(p_NC * np.log(np.maximum(p_NC, 1e-300))).sum(1)

    def named(place: int) -> pa.Array:
        return pa.array(classes[order_NC[:, place]], pa.string(), mask=empty)

    def ranked(place: int) -> pa.Array:
        return pa.array(np.take_along_axis(p_NC, order_NC[:, [place]], axis=1)[:, 0], pa.float64())

    last = min(1, num_classes - 1)
    return pa.table({
        "label": named(0), "probability": ranked(0), "second": named(last), "second_probability": ranked(last),
        "entropy": pa.array(entropy_N), "distance": pa.array(distance_N), "genes": pa.array(genes_N.astype(np.int64)),
        "doubt": pa.array(doubt.tolist(), pa.string()), "p": as_column(p_NC.astype(np.float32)),
    } | ({} if vectors_NK is None else {"vector": as_column(vectors_NK)}))  # fmt: skip


def frame(parts: Sequence[pa.Table]) -> pd.DataFrame:
    """Labels of consecutive cells (`label_rows`) as one data frame; `p` holds an array per cell."""
    whole = pa.concat_tables(parts)
    lists = [name for name in ("p", "vector") if name in whole.column_names]
    rows = {name: list(vector_column(whole, name)) for name in lists}
    return whole.drop_columns(lists).to_pandas().assign(**rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Extras:
    """What is added to the labels of the single cells."""

    majority: bool = False
    """Labels by majority over small clusters of the file's cells (`clusters`)."""
    ontology: str = ""
    """Ids of the Cell Ontology, and terms that cover the plausible labels of doubted cells (`ontology`): `names`, or the URI of a
    table of labels and ids. Empty: none."""

    def ids(self, kept: Kept) -> dict[str, str] | None:
        """Id of each class that has one; None = they are not asked for.

        Raises:
            UserError: the table cannot be used.
        """
        if not self.ontology:
            return None
        own = ontology.read_ids(self.ontology) if self.ontology != NAMES else {}
        return ontology.ids_of(kept.classes, dict(kept.about.get("label_ids", {})) | own)

    def add(self, table: pd.DataFrame, kept: Kept, ids: dict[str, str] | None) -> pd.DataFrame:
        """The labels of all cells of a file (`frame`) with the columns that are asked for."""
        out = table.drop(columns=["vector"], errors="ignore")
        has = table["label"].notna().to_numpy()
        if self.majority:
            cluster_N = np.full(len(table), -1, dtype=np.int64)
            named = np.full(len(table), "", dtype=object)
            share_N = np.full(len(table), np.nan, dtype=np.float32)
            if has.any():
                cluster_N[has] = clusters.find(np.stack(table.loc[has, "vector"].to_list()))
                named[has], share_N[has] = clusters.majority(
                    table.loc[has, "label"].to_numpy().astype(np.str_), cluster_N[has]
                )
            out = out.assign(cluster=cluster_N, majority=named, majority_share=share_N)
        if ids is not None:
            doubted = (table["doubt"] != "").to_numpy()
            out = out.assign(**ontology.columns(np.stack(table["p"].to_list()), doubted, kept.classes, ids))
        return out


# The whole file


def summary(uri: str, kept: Kept, file: File, table: pd.DataFrame) -> dict[str, Any]:
    """Figures of a labelled file: cells, coverage of the model's genes, and counts of labels and of reasons for doubt.

    Args:
        uri: URI of the classifier.
        kept: The classifier.
        file: Facts of `look`.
        table: Labels of all its cells.
    """
    trusted = table["doubt"] == ""
    labels = table["label"].fillna("")
    return {
        "model": uri, "group": kept.about["group"], "kind": kept.about["model"], "species": file.row.name, "cells": len(table),
        "coverage": file.coverage, "genes": file.genes, "trusted": int(trusted.sum()),
        "labels": {str(k): [int(n), int((trusted & (labels == k)).sum())] for k, n in labels[labels != ""].value_counts().items()},
        "doubts": {str(k): int(n) for k, n in table["doubt"].str.split("; ").explode().value_counts().items() if k},
        "form": kept.about["form"], "form_model": kept.about.get("form_model", kept.about["model"]),
        "why": kept.about["why"], "candidates": kept.about["candidates"],
        "test": kept.about["test"], "verdicts": verdicts(kept, file, table),
    }  # fmt: skip


def facts(found: dict[str, Any]) -> dict[str, Any]:
    """The part of `summary` that is written with the labels, in `uns["mixgf_annotate"]`."""
    named = {
        name: found[name] for name in ("model", "kind", "form", "form_model", "why", "group", "species", "coverage")
    }
    return named | {"verdicts": found["verdicts"] or [""]}


def verdicts(kept: Kept, file: File, table: pd.DataFrame) -> list[str]:
    """Warnings about the labels of this file, one sentence each; empty = none."""
    out = []
    trained = list(kept.about["species"])
    if file.row.name not in trained:
        out.append(
            f"the classifier was trained on {' and '.join(trained)} cells only: labels of {file.row.name} cells are a transfer, "
            "and the classifier's scores do not apply to them"
        )
    if file.coverage < LOW_COVERAGE:
        out.append(
            f"the file measures only {file.coverage:.0%} of what the training sentences were made of (at least {LOW_COVERAGE:.0%} is usual)"
        )
    expected = float(kept.about["test"].get("doubted", 2 * DOUBTED))
    doubted = float((table["doubt"] != "").mean())
    if doubted > MANY * max(expected, 2 * DOUBTED):
        out.append(
            f"{doubted:.0%} of the cells are doubted, against {expected:.0%} of the classifier's own test cells: another tissue, protocol or state?"
        )
    few = int(kept.about["validation"]["cells"])
    if few < 40:
        out.append(f"the limits were fitted on {few} validation cells only")
    return out


# Into the user's file


def columns(table: pd.DataFrame) -> pd.DataFrame:
    """Columns to add to obs: label, probability, second best label, entropy, distance, and whether and why the label is doubted."""
    text = {name: pd.Categorical(table[name].fillna("")) for name in ("label", "second", "doubt")}
    numbers = {
        name: table[name].to_numpy(np.float32) for name in ("probability", "second_probability", "entropy", "distance")
    }
    out = {**text, **numbers, "genes": table["genes"].to_numpy(np.int32), "trusted": (table["doubt"] == "").to_numpy()}
    order = ["label", "probability", "second", "second_probability", "entropy", "distance", "genes", "trusted", "doubt"]
    for name, kind in _EXTRA.items():
        if name in table:
            out[name] = table[name].to_numpy(kind) if kind is not str else pd.Categorical(table[name])
            order.append(name)
    return pd.DataFrame({PREFIX + name: out[name] for name in order})


def is_own(uri: str) -> bool:
    """Whether a file was written by `write`: it has `UNS`, or as .csv begins with the columns that `write` gives it."""
    import h5py  # noqa: PLC0415

    if files.is_folder(uri):
        return False
    with files.open_read(uri) as file:
        try:
            if uri.endswith(".csv"):
                return file.readline(1 << 20).startswith(
                    f"cell,{PREFIX}label,{PREFIX}probability,{PREFIX}second,".encode()
                )
            if uri.endswith(".parquet"):
                return UNS.encode() in (pq.read_schema(file).metadata or {})
            with h5py.File(file, "r") as found:
                return f"uns/{UNS}" in found
        except (OSError, pa.ArrowInvalid):  # of another format
            return False


def probabilities(table: pd.DataFrame, classes: Iterable[str], names: Iterable[str]) -> pd.DataFrame:
    """Probability of every class (columns) of every cell (rows, called `names`), float32."""
    return pd.DataFrame(np.stack(table["p"].to_numpy()), index=pd.Index(names), columns=list(classes)).astype(
        np.float32
    )


def write(to: str, source: Source, table: pd.DataFrame, classes: Iterable[str], about: dict[str, Any]) -> None:
    """Write the labels into a copy of an .h5ad file, or as .parquet or .csv.

    Everything in the .h5ad file stays as it is, the other columns of obs too, and X is not read. For other formats the .h5ad
    file holds obs and probabilities only.
    """
    from mixgf.corpus import h5ad  # noqa: PLC0415 (anndata is slow to import)

    with open_source(source) as reader:
        names = [str(n) for n in reader.cell_names(0, reader.num_rows)]
    added = columns(table)
    if to.endswith((".parquet", ".csv")):
        frame = added.assign(**{c: table["p"].str[i] for i, c in enumerate(f"p: {c}" for c in classes)})
        frame.insert(0, "cell", names)
        if to.endswith(".csv"):
            files.write_bytes(to, h5ad.for_spreadsheets(frame).to_csv(index=False).encode())
        else:
            labels = pa.Table.from_pandas(frame, preserve_index=False)
            marked = {**labels.schema.metadata, UNS: json.dumps(about)}
            tables.write_table(to, labels.replace_schema_metadata(marked))
        return
    p_NC = probabilities(table, classes, names)
    h5ad.write_copy(source, to, names, obs=added, obsm={OBSM: p_NC}, uns={UNS: about})

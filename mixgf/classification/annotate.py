"""Cell types for a user's cells by a kept classifier, with reasons to doubt them.

`label_cells` depends only on a classifier, a file and a range of its rows. Warnings about the whole file (coverage of the model's genes,
species without training cells, too many doubted cells) are made from all its labels, in `verdicts`.

Shapes: N cells of a block, C classes, G columns of the file, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from mixgf.arrays import Floats, Integers
from mixgf.cells.open import format_of, open_reader
from mixgf.cells.reader import Reader
from mixgf.classification import kept_classifier
from mixgf.classification.kept_classifier import DOUBTED, EMPTY, Kept
from mixgf.config import data, parse
from mixgf.config.data import Source, SpeciesRow
from mixgf.corpus import in_memory
from mixgf.corpus.shards import regroup
from mixgf.execution import Pipeline
from mixgf.genes.vocabulary import Vocabulary
from mixgf.storage import files, tables

PREFIX = "mixgf_"
"""Prefix of the columns that are added to obs."""
OBSM = "mixgf_probabilities"
BLOCK_CELLS = 512
LOW_COVERAGE = 0.8
"""Share of the tokens of training sentences whose genes a file must measure; below it the file gets a warning."""
MANY = 3.0
"""Multiple of the expected share of doubted cells above which the file gets a warning."""


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
    """Facts of a file. Where no species is given, it is the one that most of the gene names belong to.

    Raises:
        UserError: the file cannot be read, or knows none of the model's genes.
    """
    with open_reader(source.uri, source.layer) as reader:
        return describe(reader, source, kept, vocabulary)[0]


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


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelPlan:
    """One part of labels: rows [start, stop) of a file."""

    model: str
    """URI of a classifier."""
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
    kept, vocabulary, _ = kept_classifier.load(model)
    return kept, vocabulary


def read_sentences(plan: LabelPlan) -> Iterator[pa.Table]:
    """Read: counts of cells as sentences; `tokens` (list of int32) and `genes` (detected vocabulary genes)."""
    kept, vocabulary = _loaded(plan.model, plan.version)
    tokens = parse.from_dict(data.Tokens, kept.about["tokens"])
    with open_reader(plan.file.source.uri, plan.file.source.layer) as reader:
        reader.layer_option = "--layer"
        _, genes = describe(reader, plan.file.source, kept, vocabulary)
        for block in in_memory.blocks(reader, genes, tokens, plan.start, plan.stop, rows=plan.block_cells):
            sentences = pa.ListArray.from_arrays(pa.array(block.offsets_N1, pa.int32()), pa.array(block.tokens_T))
            yield pa.table({"tokens": sentences, "genes": pa.array(block.genes_N, pa.int64())})


def embed_sentences(sentences: Iterator[pa.Table], plan: LabelPlan) -> Iterator[pa.Table]:
    """Transform: sentences to vectors; `vector` (list of float64, null for a cell without genes) and `genes`."""
    kept, _ = _loaded(plan.model, plan.version)
    for table in sentences:
        column = table["tokens"].combine_chunks()
        offsets_N1 = np.concatenate([[0], np.cumsum(column.value_lengths().to_numpy(), dtype=np.int64)])
        block = in_memory.Sentences(
            start=0, tokens_T=column.flatten().to_numpy(), offsets_N1=offsets_N1,
            cls=parse.from_dict(data.Tokens, kept.about["tokens"]).cls, genes_N=table["genes"].to_numpy(),
        )  # fmt: skip
        made = _vectors(kept, block)
        lengths_N = np.where(block.genes_N > 0, made.shape[1], 0)
        column = pa.ListArray.from_arrays(
            pa.array(np.concatenate([[0], np.cumsum(lengths_N)]), pa.int32()), pa.array(made.reshape(-1), pa.float64())
        )
        yield pa.table({"vector": column, "genes": table["genes"]})


def label_vectors(vectors: Iterator[pa.Table], plan: LabelPlan) -> Iterator[pa.Table]:
    """Transform: vectors to labels; columns of `label_rows`.

    The last bits of a product of matrices depend on their sizes, so rows are taken in groups of `block_cells`, however they come.
    """
    kept, _ = _loaded(plan.model, plan.version)
    for table in regroup(vectors, plan.block_cells):
        genes_N = table["genes"].to_numpy()
        flat = table["vector"].combine_chunks().flatten().to_numpy()
        num = int((genes_N > 0).sum())
        yield _label_vectors(kept, genes_N, flat.reshape(num, len(flat) // max(num, 1)))


def write_labels(labels: Iterator[pa.Table], plan: LabelPlan) -> None:
    """Write: the part."""
    tables.write_table(plan.to, pa.concat_tables(labels).combine_chunks())


label_cells = Pipeline(
    name="label_cells", source="Cells", read=read_sentences, steps=(embed_sentences, label_vectors), write=write_labels
)
"""Labels of some rows of a file as a Parquet part, with the columns of `label_rows`. Takes a `LabelPlan`."""


def label_rows(
    reader: Reader, genes: in_memory.Genes, kept: Kept, start: int, stop: int, *, block_cells: int = BLOCK_CELLS
) -> Iterator[pa.Table]:
    """Labels of rows [start, stop), as tables of at most `block_cells` cells.

    Columns: `label`, `probability`, `second`, `second_probability`, `entropy` (nats), `distance` (to the type's
    centre, in units of its training cells' mean distance), `genes` (detected vocabulary genes), `doubt` (text, empty = none found), `p` (probability of every class).

    Args:
        reader: Reader of the counts.
        genes: Genes of `describe`.
        kept: The classifier.
        start: First row.
        stop: Row after the last.
        block_cells: Rows held in memory at a time.
    """
    tokens = parse.from_dict(data.Tokens, kept.about["tokens"])
    for block in in_memory.blocks(reader, genes, tokens, start, stop, rows=block_cells):
        yield _label_vectors(kept, block.genes_N, _vectors(kept, block))


def _vectors(kept: Kept, block: in_memory.Sentences) -> Floats:
    """Vectors of the cells with genes."""
    full = np.flatnonzero(block.genes_N > 0)
    return kept.vectors(block, full) if len(full) else np.empty((0, kept.head_CD.shape[1]))


def _label_vectors(kept: Kept, genes_N: Integers, vectors_FD: Floats) -> pa.Table:
    """Labels of cells with `genes_N` genes; `vectors_FD` are those of the cells with genes."""
    num_cells, num_classes = len(genes_N), len(kept.classes)
    full = np.flatnonzero(genes_N > 0)
    p_NC = np.full((num_cells, num_classes), np.nan)
    distance_N = np.full(num_cells, np.nan)
    doubt = np.full(num_cells, EMPTY, dtype=object)
    if len(full):
        p_NC[full] = kept.probabilities(vectors_FD)
        distance_N[full] = kept.distances(vectors_FD, p_NC[full].argmax(1))
        doubt[full] = kept.doubts(p_NC[full], distance_N[full], genes_N[full])
    order_NC = np.argsort(-np.nan_to_num(p_NC), axis=1, kind="stable")
    classes, empty = np.array(kept.classes, dtype=object), genes_N == 0
    entropy_N = -(p_NC * np.log(np.maximum(p_NC, 1e-300))).sum(1)

    def named(place: int) -> pa.Array:
        return pa.array(classes[order_NC[:, place]], pa.string(), mask=empty)

    def ranked(place: int) -> pa.Array:
        return pa.array(np.take_along_axis(p_NC, order_NC[:, [place]], axis=1)[:, 0], pa.float64())

    last = min(1, num_classes - 1)
    flat = pa.array(p_NC.reshape(-1).astype(np.float32))
    return pa.table({
        "label": named(0), "probability": ranked(0), "second": named(last), "second_probability": ranked(last),
        "entropy": pa.array(entropy_N), "distance": pa.array(distance_N), "genes": pa.array(genes_N.astype(np.int64)),
        "doubt": pa.array(doubt.tolist(), pa.string()), "p": pa.FixedSizeListArray.from_arrays(flat, num_classes),
    })  # fmt: skip


def frame(parts: Sequence[pa.Table]) -> pd.DataFrame:
    """Labels of consecutive cells (`label_rows`) as one data frame; `p` holds an array per cell."""
    whole = pa.concat_tables(parts)
    p_NC = whole["p"].combine_chunks().flatten().to_numpy().reshape(whole.num_rows, -1)
    return whole.drop_columns(["p"]).to_pandas().assign(p=list(p_NC))


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
        "test": kept.about["test"], "verdicts": verdicts(kept, file, table),
    }  # fmt: skip


def facts(found: dict[str, Any]) -> dict[str, Any]:
    """The part of `summary` that is written with the labels, in `uns["mixgf_annotate"]`."""
    named = {name: found[name] for name in ("model", "group", "species", "coverage")}
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
    order = ("label", "probability", "second", "second_probability", "entropy", "distance", "genes", "trusted", "doubt")
    return pd.DataFrame({PREFIX + name: out[name] for name in order})


def probabilities(table: pd.DataFrame, classes: Iterable[str], names: Iterable[str]) -> pd.DataFrame:
    """Probability of every class (columns) of every cell (rows, called `names`), float32."""
    return pd.DataFrame(np.stack(table["p"].to_numpy()), index=pd.Index(names), columns=list(classes)).astype(
        np.float32
    )


def write(to: str, source: Source, table: pd.DataFrame, classes: Iterable[str], about: dict[str, Any]) -> None:
    """Write the labels into a copy of an .h5ad file, or as .parquet or .csv.

    Everything in the .h5ad file stays, and X is not read. For 10x files the .h5ad file holds obs and probabilities only.
    """
    import anndata as ad  # noqa: PLC0415 (slow to import)
    import h5py  # noqa: PLC0415

    with open_reader(source.uri, source.layer) as reader:
        names = [str(n) for n in reader.cell_names(0, reader.num_rows)]
    added = columns(table)
    if to.endswith((".parquet", ".csv")):
        frame = added.assign(**{c: table["p"].str[i] for i, c in enumerate(f"p: {c}" for c in classes)})
        frame.insert(0, "cell", names)
        if to.endswith(".csv"):
            files.write_bytes(to, frame.to_csv(index=False).encode())
        else:
            tables.write_table(to, pa.Table.from_pandas(frame, preserve_index=False))
        return
    p_NC = probabilities(table, classes, names)
    with tempfile.TemporaryDirectory(prefix="mixgf-annotate-") as folder:
        path = Path(folder) / "cells.h5ad"
        if format_of(source.uri, source.layer) == "h5ad":
            with files.local_copy(source.uri) as original:
                path.write_bytes(original.read_bytes())
            with h5py.File(path, "r") as file:
                obs = ad.io.read_elem(file["obs"])
        else:
            obs = pd.DataFrame(index=names)
            ad.AnnData(obs=obs).write_h5ad(path)
        for name in added.columns:
            obs[name] = added[name].to_numpy() if added[name].dtype != "category" else added[name].array
        p_NC.index = obs.index
        with h5py.File(path, "r+") as file:
            for group, name, value in (("/", "obs", obs), ("obsm", OBSM, p_NC), ("uns", "mixgf_annotate", about)):
                ad.io.write_elem(file.require_group(group), name, value)  # anndata 0.13 takes no path as a name
        files.upload(path, to)

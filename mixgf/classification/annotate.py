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
from scipy import sparse

from mixgf.arrays import Ints
from mixgf.cells.open import format_of, open_reader
from mixgf.cells.reader import Reader
from mixgf.classification import kept_classifier
from mixgf.classification.kept_classifier import DOUBTED, EMPTY, Kept
from mixgf.classification.models.protocol import CellSet, Measured
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
BLOCK_CELLS = 512
LOW_COVERAGE = 0.8
"""Share of the tokens of training sentences whose genes a file must measure; below it the file gets a warning."""
MANY = 3.0
"""Multiple of the expected share of doubted cells above which the file gets a warning."""
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


def form_for(
    reader: Reader, genes: in_memory.Genes, file: File, kept: Kept, *, block_cells: int = BLOCK_CELLS
) -> Kept:  # fmt: skip
    """The classifier for a file: without the genes that it lacks, and aligned to a sample of its cells (`kept_classifier.aligned`).

    Args:
        reader: Of the counts.
        genes: Genes of `describe`.
        file: Facts of `describe`.
        kept: The classifier.
        block_cells: Rows held in memory at a time.
    """
    plain, pick = fit_to_file(kept, genes)
    if not kept.means_CG.size:
        return plain
    tokens = parse.from_dict(data.Tokens, kept.about["tokens"])
    starts = range(0, file.num_cells, block_cells)
    order = np.random.default_rng(0).permutation(len(starts))  # whole blocks, from all of the file
    found = []
    for start in sorted(starts[i] for i in order[: -(-SAMPLE_CELLS // block_cells)]):
        stop = min(start + block_cells, file.num_cells)
        for block in in_memory.blocks(reader, genes, tokens, start, stop, rows=block_cells, with_counts=True):
            full = np.flatnonzero(block.genes_N > 0)
            found += [plain.cells(block, full, _counts(block, full, pick), genes.row.name)] * (len(full) > 0)
    return kept_classifier.aligned(plain, _together(found)) if found else plain


def _together(several: Sequence[CellSet[Measured]]) -> CellSet[Measured]:
    """Several sets of cells of one file, one after the other."""
    one = several[0].x
    x = Measured(
        counts=None if one.counts is None else sparse.vstack([s.x.counts for s in several], format="csr"),
        vectors=None if one.vectors is None else np.concatenate([np.asarray(s.x.vectors) for s in several]),
        ranks=None if one.ranks is None else sparse.vstack([s.x.ranks for s in several], format="csr"),
    )
    species = np.concatenate([s.species for s in several])
    return CellSet(x, species, np.full(len(species), "file"))


def fit_to_file(kept: Kept, genes: in_memory.Genes) -> tuple[Kept, sparse.csr_matrix | None]:
    """The classifier without the genes that a file lacks, and the matrix that takes the file's genes to its own; None = it reads none."""
    if not len(kept.genes):
        return kept, None
    names = np.asarray(genes.of_species.genes, dtype=np.str_)
    column_G = kept.columns(genes.row.name, names)
    measured = np.isin(genes.of_species.tokens, genes.measured)
    there_G = (column_G >= 0) & measured[np.maximum(column_G, 0)]
    entries = (np.ones(int(there_G.sum()), np.float32), (column_G[there_G], np.flatnonzero(there_G)))
    return kept.without(~there_G), sparse.csr_matrix(entries, shape=(len(names), len(kept.genes)))


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
    with open_reader(plan.file.source.uri, plan.file.source.layer) as reader:
        reader.layer_option = "--layer"
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


def write_form(model: str, file: File, to: str, *, device: str = "cpu") -> None:
    """Write the form of a classifier that fits a file (`form_for`) into a folder."""
    kept, vocabulary = kept_classifier.read(model, device)
    with open_reader(file.source.uri, file.source.layer) as reader:
        reader.layer_option = "--layer"
        _, genes = describe(reader, file.source, kept, vocabulary)
        kept_classifier.save(to, form_for(reader, genes, file, kept), vocabulary)


def label_rows(
    reader: Reader, genes: in_memory.Genes, kept: Kept, start: int, stop: int, *, block_cells: int = BLOCK_CELLS
) -> Iterator[pa.Table]:
    """Labels of rows [start, stop), as tables of at most `block_cells` cells.

    Columns: `label`, `probability`, `second`, `second_probability`, `entropy` (nats), `distance` (to the type's
    centre, in units of its training cells' mean distance), `genes` (detected vocabulary genes), `doubt` (text, empty = none found), `p` (probability of every class).

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
    if len(full):
        cells = kept.cells(block, full, None if counts_NG is None else counts_NG[full], species)
        p_NC[full] = kept.probabilities(cells)
        distance_N[full] = kept.distances(cells, p_NC[full].argmax(1))
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
        "form": kept.about["form"], "why": kept.about["why"], "candidates": kept.about["candidates"],
        "test": kept.about["test"], "verdicts": verdicts(kept, file, table),
    }  # fmt: skip


def facts(found: dict[str, Any]) -> dict[str, Any]:
    """The part of `summary` that is written with the labels, in `uns["mixgf_annotate"]`."""
    named = {name: found[name] for name in ("model", "kind", "form", "why", "group", "species", "coverage")}
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

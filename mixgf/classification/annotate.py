"""Cell types for a user's cells by a kept classifier, and when they should not be trusted.

`label` is a pure function of a classifier, a file and a range of its rows. What is said of the whole file (coverage of the
model's genes, species without training cells, too many doubted cells) is worked out from all parts in `verdicts`.

Shapes: N cells of a block, C classes, G columns of the file, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from mixgf.cells import counts
from mixgf.cells.open import format_of, open_reader
from mixgf.classification import classifier
from mixgf.classification.classifier import DOUBTED, EMPTY, Kept
from mixgf.config import data, parse
from mixgf.config.data import Source, SpeciesRow
from mixgf.corpus import rank_value
from mixgf.errors import UserError
from mixgf.genes import identify
from mixgf.genes.vocabulary import Vocabulary
from mixgf.storage import files, tables

PREFIX = "mixgf_"
"""Begins the name of every column that is added to obs."""
OBSM = "mixgf_probabilities"
BLOCK_CELLS = 512
LOW_COVERAGE = 0.8
"""Below this share of what training sentences are made of, a file measures too little of what the model reads."""
MANY = 3.0
"""Times the expected share of doubted cells from which the whole file is doubted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class File:
    """A user's file, as far as it must be known before a cell is read."""

    source: Source
    row: SpeciesRow
    num_cells: int
    coverage: float
    """Share of the tokens of training sentences (of this species, where the model saw it) whose genes the file measures."""
    genes: int
    """Genes of the species' vocabulary that it measures."""


@dataclass(frozen=True)
class _Sentences:
    """Sentences held in memory."""

    lengths_N: npt.NDArray[np.int32]
    tokens_T: npt.NDArray[np.int32]
    offsets_N1: npt.NDArray[np.int64]
    cls: bool

    def tokens(self, cells: npt.ArrayLike) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        parts = [self.tokens_T[self.offsets_N1[i] : self.offsets_N1[i + 1]] for i in np.asarray(cells, dtype=np.int64)]
        return np.concatenate(parts), np.concatenate([[0], np.cumsum([len(p) for p in parts])]).astype(np.int64)


def species_rows(kept: Kept, vocabulary: Vocabulary) -> list[SpeciesRow]:
    """The species that the model reads, as rows."""
    rows = [parse.from_dict(SpeciesRow, row) for row in kept.about["species_rows"]]
    return [row for row in rows or (data.HUMAN, data.MOUSE) if row.name in vocabulary.species]


def look(source: Source, kept: Kept, vocabulary: Vocabulary) -> File:
    """Open a file and find out its species, where none is given: the one that most of its gene names belong to.

    Raises:
        UserError: the file cannot be read, or knows none of the model's genes.
    """
    rows = species_rows(kept, vocabulary)
    asked = [row for row in rows if not source.species or row.name == source.species]
    if not asked:
        msg = f"{source.uri}: species = {source.species!r}: the model reads {', '.join(r.name for r in rows)}"
        raise UserError(msg)
    with open_reader(source.uri, source.layer) as reader:
        names, is_gene, num_cells = reader.gene_names(source.genes), reader.is_gene, reader.num_rows
    found = []
    for row in asked:
        genes = vocabulary.of(row.name)
        columns = identify.identify(
            names, identify.known_genes(row), biotypes=(), vocabulary=frozenset(genes.genes.tolist()), is_gene=is_gene
        )
        position_G = genes.positions(columns["gene"].combine_chunks())
        there = np.unique(position_G[position_G >= 0])
        # a gene counts by how it is written, so that ids of one species are not read as aliases of another
        written = sum(how in (identify.ID, identify.SYMBOL) for how in columns["how"].to_pylist())
        found.append((written, len(there), row, genes.tokens[there], genes.tokens))
    _, number, row, measured, all_tokens = max(found, key=lambda f: f[:2])
    if not number or not num_cells:
        shown = ", ".join(str(n) for n in names[:5])
        msg = f"{source.uri}: {num_cells} cells, none of {len(names)} genes is known to the model; names are like {shown}: another species, or another column of var (--genes)?"
        raise UserError(msg)
    whole = float(kept.share_V[all_tokens].sum())
    # a species without training cells: every gene counts alike
    coverage = float(kept.share_V[measured].sum()) / whole if whole > 0 else number / len(all_tokens)
    return File(source=replace(source, species=row.name), row=row, num_cells=num_cells, coverage=coverage, genes=number)


def label(
    model: str, file: File, start: int, stop: int, to: str, *, block_cells: int = BLOCK_CELLS, device: str = "cpu"
) -> None:
    """Label rows [start, stop) of a file and write them as a Parquet part.

    Columns: `label`, `probability`, `second`, `second_probability`, `entropy` (nats), `distance` (in units of what is usual
    for the type), `genes` (detected vocabulary genes), `doubt` (text, empty = none found), `p` (probability of every class).

    Args:
        model: URI of a classifier.
        file: As `look` found it.
        start: First row.
        stop: Row after the last.
        to: URI of the part.
        block_cells: Rows held in memory at a time.
        device: Where the encoder computes.
    """
    kept, vocabulary, _ = classifier.load(model, device)
    tokens = parse.from_dict(data.Tokens, kept.about["tokens"])
    genes = vocabulary.of(file.row.name)
    frames = []
    with open_reader(file.source.uri, file.source.layer) as reader:
        columns = identify.identify(
            reader.gene_names(file.source.genes), identify.known_genes(file.row), biotypes=(),
            vocabulary=frozenset(genes.genes.tolist()), is_gene=reader.is_gene,
        )  # fmt: skip
        own = columns["canonical"].to_numpy() == np.arange(columns.num_rows)
        position_G = np.where(own, genes.positions(columns["gene"].combine_chunks()), -1).astype(np.int32)
        encode = rank_value.Encoder(rank_value.Ranks.of(genes, tokens.scaling), position_G, tokens)
        for block in counts.blocks(reader, columns, start, stop, rows=block_cells):
            row_E = np.repeat(np.arange(len(block.indptr) - 1), np.diff(block.indptr))
            counted_E = (block.data > 0) & (position_G[block.indices] >= 0)
            genes_N = np.bincount(row_E[counted_E], minlength=len(block.indptr) - 1)
            frames.append(_label_block(kept, tokens, encode, block, genes_N))
    tables.write_table(to, pa.concat_tables(frames))


def _label_block(
    kept: Kept, tokens: data.Tokens, encode: rank_value.Encoder, block: counts.Block, genes_N: npt.NDArray[np.int64]
) -> pa.Table:
    num_cells, num_classes = len(genes_N), len(kept.classes)
    tokens_T, offsets_N1 = encode(block.data, block.indices, block.indptr)
    sentences = _Sentences(np.diff(offsets_N1).astype(np.int32), tokens_T, offsets_N1, tokens.cls)
    full = np.flatnonzero(genes_N > 0)
    p_NC = np.full((num_cells, num_classes), np.nan)
    distance_N = np.full(num_cells, np.nan)
    doubt = np.full(num_cells, EMPTY, dtype=object)
    if len(full):
        vectors = kept.vectors(sentences, full)
        p_NC[full] = kept.probabilities(vectors)
        distance_N[full] = kept.distances(vectors, p_NC[full].argmax(1))
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


# What is said of the whole file


def verdicts(kept: Kept, file: File, table: pd.DataFrame) -> list[str]:
    """Sentences that speak against trusting the labels of this file; empty = nothing found."""
    out = []
    trained = list(kept.about["species"])
    if file.row.name not in trained:
        out.append(
            f"the classifier was trained on {' and '.join(trained)} cells only: labels of {file.row.name} cells are a transfer, "
            "and no figure of the classifier speaks of them"
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
    """What is added to obs: label, probability, the second best, entropy, distance, and whether and why it is doubted."""
    text = {name: pd.Categorical(table[name].fillna("")) for name in ("label", "second", "doubt")}
    numbers = {
        name: table[name].to_numpy(np.float32) for name in ("probability", "second_probability", "entropy", "distance")
    }
    out = {**text, **numbers, "genes": table["genes"].to_numpy(np.int32), "trusted": (table["doubt"] == "").to_numpy()}
    order = ("label", "probability", "second", "second_probability", "entropy", "distance", "genes", "trusted", "doubt")
    return pd.DataFrame({PREFIX + name: out[name] for name in order})


def write(to: str, source: Source, table: pd.DataFrame, classes: Iterable[str], about: dict[str, Any]) -> None:
    """Write the labels: into a copy of an .h5ad (everything in it stays, X is not read), or as .parquet or .csv.

    Of 10x files, whose counts are no AnnData, the .h5ad holds obs and probabilities only.
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
    probabilities = pd.DataFrame(np.stack(table["p"].to_numpy()), index=names, columns=list(classes)).astype(np.float32)
    with tempfile.TemporaryDirectory(prefix="mixgf-annotate-") as folder:
        path = Path(folder) / "cells.h5ad"
        if format_of(source.uri) == "h5ad":
            with files.local_copy(source.uri) as original:
                path.write_bytes(original.read_bytes())
            with h5py.File(path, "r") as file:
                obs = ad.io.read_elem(file["obs"])
        else:
            obs = pd.DataFrame(index=names)
            ad.AnnData(obs=obs).write_h5ad(path)
        for name in added.columns:
            obs[name] = added[name].to_numpy() if added[name].dtype != "category" else added[name].array
        probabilities.index = obs.index
        with h5py.File(path, "r+") as file:
            for place, value in (("obs", obs), (f"obsm/{OBSM}", probabilities), ("uns/mixgf_annotate", about)):
                ad.io.write_elem(file, place, value)
        files.upload(path, to)

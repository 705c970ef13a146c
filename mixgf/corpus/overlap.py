"""Data leakage: which cells, donors and data sets of an evaluation were in the corpus that a model was trained on.

Cells are compared in three ways. First, by a hash of their counts over genes, whatever the order of columns. Imported
corpora hold no hashes; there sentences are compared, if the vocabulary is the same. Second, by their highest counts
(`cells.near_duplicates`), which also finds cells of a file from which genes were filtered. Third, by name within a data set
of the same name, which also finds cells that were aligned again. Labels are not used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from mixgf.arrays import Names
from mixgf.cells import counts, near_duplicates, qc
from mixgf.cells.features import describe_unknown, identify_genes, name_column, require_cells
from mixgf.cells.kinds import doubt_type
from mixgf.cells.open import open_source
from mixgf.cells.reader import FILE_OPTION, file_error
from mixgf.config import checks
from mixgf.config.data import QC, Source, SpeciesRow
from mixgf.console import warn
from mixgf.corpus import near_hashes
from mixgf.corpus.held_out import held_out_cells
from mixgf.corpus.reader import Corpus
from mixgf.errors import UserError
from mixgf.genes import identify
from mixgf.storage import artifacts, files, tables

COLUMNS = ("dataset", "donor")
"""Metadata that is compared, if both sides have it."""
BLOCK_CELLS = 4_096
SEEN = "seen.parquet"
"""File of a published model: the cells that it was trained on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """What an evaluation shares with a training corpus. A pair is (shared, all of the evaluation); None = unknown."""

    cells: tuple[int, int] | None
    """Cells with the same counts (or sentence), or the same highest counts."""
    by: str
    """`counts`, `sentences`, or empty where cells could not be compared."""
    names: tuple[int, int] | None
    """Cells of the same name in a data set of the same name."""
    metadata: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Shared values by kind of metadata (donors are compared within their data set)."""
    same: bool = False
    """Whether the evaluation is the training corpus itself."""
    near: int | None = None
    """Those of `cells` with the same highest counts, but other genes. None = not compared."""
    held_out: int | None = None
    """Cells that were in the pretraining corpus, but held out (`train.heldout_share`); the other counts leave these out. None = no
    cells were held out."""

    @property
    def line(self) -> str:
        """One sentence for the terminal and for reports."""
        if self.cells is None:
            said = "cells could not be compared (no hashes of counts, and another vocabulary)"
        else:
            shared, all_ = self.cells
            share = shared / all_ if all_ else 0.0
            said = f"{shared:,} of {all_:,} evaluation cells ({share:.1%}) were in the pretraining corpus, by {self.by}"
            if self.near:
                said += f" ({self.near:,} of them with other genes, by their highest counts)"
        parts = [said]
        if self.names is not None and (self.cells is None or self.names[0] > self.cells[0]):
            parts.append(f"{self.names[0]:,} by name within a data set of the same name")
        if self.held_out is not None:
            parts.append(f"{self.held_out:,} more were in the corpus, but held out from training")
        parts += [f"{n:,} of {m:,} {name}s" for name, (n, m) in self.metadata.items()]
        return "; ".join(parts) + (" (the encoder saw these very cells, without labels)" if self.same else "")

    def json(self) -> dict[str, Any]:
        """As a dictionary for JSON."""
        found = asdict(self) | {"line": self.line}
        for name in ("near", "held_out"):
            if found[name] is None:
                del found[name]
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class AuditedCells:
    """One side of the comparison: the evaluation, or the training corpus."""

    hashes: npt.NDArray[np.void] | None
    """Hash of the counts of each cell; None = not stored."""
    names: Names
    """Names of the cells, without that of the source."""
    obs: pd.DataFrame
    near: Callable[[], Iterator[np.ndarray]] | None = None
    """Signatures (`cells.near_duplicates`) of the cells in blocks, uint32 (cells, bands); None = not stored."""
    corpus: Corpus | None = None
    """The corpus, if the cells are from one."""
    held_out: npt.NDArray[np.int64] | None = None
    """Rows of a training corpus that were never trained on; None = there are none."""

    def only(self, rows: npt.NDArray[np.int64]) -> AuditedCells:
        """The cells with the given numbers."""
        hashes = None if self.hashes is None else self.hashes[rows]
        near = None if self.near is None or self.corpus is None else partial(near_hashes.blocks, self.corpus.uri, rows)
        return AuditedCells(
            hashes=hashes, names=self.names[rows], obs=self.obs.iloc[rows], near=near, corpus=self.corpus
        )


def evaluation_cells(uri: str, rows: Sequence[SpeciesRow], *, layer: str = "X", genes: str = "") -> AuditedCells:
    """Cells of an evaluation.

    Args:
        uri: A corpus folder, or `SPECIES=FILE` for a file of raw counts.
        rows: Species that the config knows.
        layer: Of the file, as `Source.layer`.
        genes: Of the file, as `Source.genes`.
    """
    species, path = checks.split_named(uri)
    if not species and artifacts.find(path) is not None:
        return corpus_cells(path)
    row = next((r for r in rows if r.name == species), None)
    if row is None:
        msg = f"{uri}: neither a finished corpus nor SPECIES=FILE with one of {', '.join(r.name for r in rows)}"
        raise UserError(msg)
    others = [r for r in rows if r is not row]
    return file_cells(Source(uri=path, species=species, layer=layer, genes=genes), row, others)


def corpus_cells(uri: str) -> AuditedCells:
    """Cells of a finished corpus."""
    found = Corpus(uri)
    obs = found.obs()
    names = np.array(
        [str(c).removeprefix(f"{s}:") for c, s in zip(obs["cell"], obs["source"], strict=True)], dtype=np.str_
    )
    hashes = None
    if files.exists(files.join(uri, "hashes.parquet")):
        table = artifacts.read_artifact_table(uri, "hashes")
        hashes = _pairs(table["a"].to_numpy(), table["b"].to_numpy())
        assert len(hashes) == len(obs), "one hash per cell"
    near = partial(near_hashes.blocks, uri, None) if near_hashes.are_there(uri) else None
    return AuditedCells(
        hashes=hashes, names=names, obs=obs.assign(cell_row=np.arange(len(obs))), near=near, corpus=found
    )


def file_cells(source: Source, row: SpeciesRow, others: Sequence[SpeciesRow] = ()) -> AuditedCells:
    """Cells of a file of raw counts, read block by block; prints what is left out, renamed or doubted in it.

    Args:
        source: The file.
        row: Its species.
        others: The other species, to recognise a wrong one.

    Raises:
        UserError: The file cannot be read, or too few of its counts are on known genes for a comparison.
    """
    with open_source(source, option=FILE_OPTION) as reader:
        require_cells(reader)
        lookup = identify.gene_lookup(row)
        strangers = map(identify.gene_lookup, others)  # read only where a reason is sought
        every = tuple(sorted(set(lookup.biotype.values())))
        columns, notes = identify_genes(reader, lookup, source.genes, biotypes=every)
        if columns["gene"].null_count == columns.num_rows:
            told = describe_unknown(reader, columns, lookup, strangers, known="", asked=bool(source.genes))
            raise file_error(source.uri, f"none of {columns.num_rows} genes is a known {row.name} gene; {told}")
        masks = qc.gene_masks(columns)
        sums_G = np.zeros(columns.num_rows, dtype=np.int64)
        found = counts.read_blocks(reader, columns, 0, reader.num_rows, rows=BLOCK_CELLS)
        key_G = masks["key_G"] * masks["counted_G"]
        parts, near = [], []
        for b in found:
            parts.append(qc.cell_metrics(b.data, b.indices, b.indptr, **masks, sums_G=sums_G))
            near.append(near_duplicates.signatures(b.data, b.indices, b.indptr, key_G))
        names = np.array([str(n) for n in reader.cell_names(0, reader.num_rows)], dtype=np.str_)
        obs = pd.DataFrame(
            {c: reader.obs(c, 0, reader.num_rows) for c in COLUMNS if c in reader.obs_columns}, index=range(len(names))
        )
        doubt = doubt_type(reader)
    metrics = qc.Metrics.merge(parts)
    report = identify.report_mapping(columns, sums_G, strangers, lambda: lookup, way=name_column(reader))
    if 1 - report.counts_lost < QC().min_mapped_fraction:
        raise file_error(source.uri, f"{report.describe_lost(row.name)}: its cells cannot be compared by their counts")
    for note in filter(
        None, [*notes, report.describe(row.name), doubt, qc.doubt_counts(metrics, report.candidate_counts)]
    ):
        warn(f"{source.uri}: {note}")
    hashes = _pairs(metrics.hash_a, metrics.hash_b)
    return AuditedCells(hashes=hashes, names=names, obs=obs, near=lambda: iter(near))


def training_cells(uri: str) -> AuditedCells:
    """Cells of a training corpus, given as in `training_corpus`; a checkpoint tells which of them were held out.

    A published model has a list of them instead of a corpus (`save_seen`).
    """
    if files.exists(files.join(uri, SEEN)):
        return _read_seen(files.join(uri, SEEN))
    found, record = corpus_cells(training_corpus(uri)), artifacts.find(uri)
    if record is None or record.kind != "checkpoint" or found.corpus is None:
        return found
    return replace(found, held_out=held_out_of(record, found.corpus))


def save_seen(cells: AuditedCells, uri: str) -> None:
    """Write training cells as hashes of counts, names, data sets and donors: what `compare_cells` needs, and no counts."""
    columns: dict[str, pa.Array] = {"name": pa.array(cells.names.tolist())}
    columns |= {
        name: pa.array(_text(cells.obs[name]).tolist()).dictionary_encode() for name in COLUMNS if name in cells.obs
    }
    if cells.hashes is not None:
        halves = cells.hashes.view(np.uint64).reshape(-1, 2)
        columns |= {"a": pa.array(halves[:, 0]), "b": pa.array(halves[:, 1])}
    rows = np.arange(len(cells.names))
    held_out = np.isin(rows, cells.held_out) if cells.held_out is not None else np.zeros(len(rows), dtype=bool)
    table = pa.table(columns | {"held_out": pa.array(held_out)})
    tables.write_table(uri, table.replace_schema_metadata({"some_held_out": str(int(cells.held_out is not None))}))


def _read_seen(uri: str) -> AuditedCells:
    table = tables.read_table(uri)
    hashes = _pairs(table["a"].to_numpy(), table["b"].to_numpy()) if "a" in table.column_names else None
    obs = table.select([name for name in COLUMNS if name in table.column_names]).to_pandas()
    some = (table.schema.metadata or {}).get(b"some_held_out") == b"1"
    return AuditedCells(
        hashes=hashes, names=np.asarray(table["name"].to_pylist(), dtype=np.str_), obs=obs,
        held_out=np.flatnonzero(table["held_out"].to_numpy()) if some else None,
    )  # fmt: skip


def held_out_of(checkpoint: artifacts.Record, corpus: Corpus) -> npt.NDArray[np.int64] | None:
    """Cells of its corpus that a checkpoint was never trained on, ascending; None where it was trained on all."""
    share = checkpoint.config.get("train", {}).get("heldout_share", 0.0)
    return held_out_cells(corpus, share).cells if share else None


def training_corpus(uri: str) -> str:
    """URI of the training corpus, given the corpus itself, a run that holds one, or a checkpoint.

    The corpus of a checkpoint must lie beside it, with the fingerprint that the checkpoint records.

    Raises:
        UserError: no such corpus.
    """
    for place in (uri, files.join(uri, "corpus")):
        record = artifacts.find(place)
        if record is not None and record.kind == "corpus":
            return place
    record = artifacts.find(uri)
    if record is not None and record.kind == "checkpoint":
        beside = files.join(uri.rstrip("/").rsplit("/", 1)[0], "corpus")
        there = artifacts.find(beside)
        if there is not None and there.fingerprint == record.parents.get("corpus"):
            return beside
        msg = f"{uri}: a checkpoint, whose corpus (fingerprint {record.parents.get('corpus', '')[:12]}) does not lie beside it; name the corpus itself"
        raise UserError(msg)
    msg = f"{uri}: neither a finished corpus nor a checkpoint beside its corpus"
    raise UserError(msg)


def compare_cells(evaluated: AuditedCells, trained: AuditedCells) -> Overlap:
    """What the evaluation shares with the training corpus, without the cells that were held out there; these are counted apart."""
    if trained.held_out is not None:
        rows = np.arange(len(trained.names))
        seen = compare_cells(evaluated, trained.only(np.setdiff1d(rows, trained.held_out)))
        unseen = compare_cells(evaluated, trained.only(trained.held_out))
        return replace(seen, held_out=unseen.cells[0] if unseen.cells is not None else 0)
    same = (
        evaluated.corpus is not None
        and trained.corpus is not None
        and evaluated.corpus.record.fingerprint == trained.corpus.record.fingerprint
    )
    cells, by, near = None, "", None
    if evaluated.hashes is not None and trained.hashes is not None:
        shared = np.isin(evaluated.hashes, trained.hashes)
        if evaluated.near is not None and trained.near is not None:
            alike = near_duplicates.find(_signatures(evaluated), trained.near())
            near = int((alike & ~shared).sum())
        cells, by = (int(shared.sum()) + (near or 0), len(shared)), "counts"
    elif (
        evaluated.corpus is not None
        and trained.corpus is not None
        and evaluated.corpus.vocabulary.hash == trained.corpus.vocabulary.hash
    ):
        have = set(_sentences(trained))
        found = _sentences(evaluated)
        cells, by = (sum(s in have for s in found), len(found)), "sentences"
    metadata: dict[str, tuple[int, int]] = {}
    names = None
    if "dataset" in evaluated.obs and "dataset" in trained.obs:
        sets = [_text(side.obs["dataset"]) for side in (evaluated, trained)]
        metadata["data set"] = _shared(*sets)
        keys = [
            np.char.add(np.char.add(d, "\x1f"), side.names) for d, side in zip(sets, (evaluated, trained), strict=True)
        ]
        known = sets[0] != ""
        names = (int(np.isin(keys[0][known], keys[1]).sum()), len(evaluated.names))
        if "donor" in evaluated.obs and "donor" in trained.obs:
            donors = [_text(side.obs["donor"]) for side in (evaluated, trained)]
            pairs = [
                np.where(d == "", "", np.char.add(np.char.add(s, "\x1f"), d)) for s, d in zip(sets, donors, strict=True)
            ]
            metadata["donor"] = _shared(*pairs)
    return Overlap(cells=cells, by=by, names=names, metadata=metadata, same=same, near=near)


def _pairs(a: npt.NDArray[np.uint64], b: npt.NDArray[np.uint64]) -> npt.NDArray[np.void]:
    """Both halves of each hash as one 16-byte value."""
    out = np.empty((len(a), 2), dtype=np.uint64)
    out[:, 0], out[:, 1] = a, b
    return out.view(np.dtype((np.void, 16))).ravel()


def _signatures(side: AuditedCells) -> np.ndarray:
    """Signatures of the cells, in their order."""
    assert side.near is not None
    found_NK = np.concatenate(list(side.near()))
    if side.corpus is None:
        return found_NK
    return found_NK[
        np.argsort(np.argsort(side.obs["cell_row"].to_numpy(), kind="stable"))
    ]  # blocks ascend in the corpus


def _sentences(side: AuditedCells) -> list[bytes]:
    assert side.corpus is not None
    cells = side.obs["cell_row"].to_numpy()
    out: list[bytes] = []
    for start in range(0, len(cells), BLOCK_CELLS):
        tokens_T, offsets = side.corpus.tokens(cells[start : start + BLOCK_CELLS])
        out += [
            hashlib.blake2b(tokens_T[a:b].tobytes(), digest_size=16).digest() for a, b in pairwise(offsets.tolist())
        ]
    return out


def _text(column: pd.Series) -> Names:
    values = column.astype(object).where(column.notna(), "").astype(str)
    return values.replace({"nan": "", "None": "", "unknown": ""}).to_numpy(dtype=np.str_)


def _shared(evaluated: Names, trained: Names) -> tuple[int, int]:
    values = np.unique(evaluated[evaluated != ""])
    return int(np.isin(values, trained).sum()), len(values)

"""How much of an evaluation was in the corpus that a model was trained on: cells, donors, data sets.

Cells are compared by the hash of their counts (over genes, not columns, so a file with other columns in another order is the
same cell); where a corpus holds no hashes (imported ones), by their sentences, if the vocabulary is the same; and by name
within a data set of the same name, which also finds cells that were counted anew. Labels are never looked at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from mixgf.arrays import Names
from mixgf.cells import counts, qc
from mixgf.cells.open import open_reader
from mixgf.config import checks
from mixgf.config.data import Source, SpeciesRow
from mixgf.corpus.reader import Corpus
from mixgf.errors import UserError
from mixgf.genes import identify
from mixgf.storage import artifacts, files, tables

COLUMNS = ("dataset", "donor")
"""Metadata that is compared, where both sides have it."""
BLOCK_CELLS = 4_096


@dataclass(frozen=True, kw_only=True, slots=True)
class Overlap:
    """What an evaluation shares with a training corpus. A pair is (shared, all of the evaluation); None = not known."""

    cells: tuple[int, int] | None
    """Cells with the same counts (or sentence)."""
    by: str
    """`counts`, `sentences`, or empty where cells could not be compared."""
    names: tuple[int, int] | None
    """Cells of the same name in a data set of the same name."""
    metadata: dict[str, tuple[int, int]] = field(default_factory=dict)
    """By column, distinct values (donors within their data set)."""
    same: bool = False
    """The evaluation is the training corpus itself."""

    @property
    def line(self) -> str:
        """One sentence for people, the same in the terminal and in every report."""
        if self.cells is None:
            said = "cells could not be compared (no hashes of counts, and another vocabulary)"
        else:
            shared, all_ = self.cells
            share = shared / all_ if all_ else 0.0
            said = f"{shared:,} of {all_:,} evaluation cells ({share:.1%}) were in the pretraining corpus, by {self.by}"
        parts = [said]
        if self.names is not None and (self.cells is None or self.names[0] > self.cells[0]):
            parts.append(f"{self.names[0]:,} by name within a data set of the same name")
        parts += [f"{n:,} of {m:,} {name}s" for name, (n, m) in self.metadata.items()]
        return "; ".join(parts) + (" (the encoder saw these very cells, without labels)" if self.same else "")

    def json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self) | {"line": self.line}


@dataclass(frozen=True, kw_only=True, eq=False)
class Cells:
    """One side of an audit."""

    hashes: npt.NDArray[np.void] | None
    """Of counts, one per cell."""
    names: Names
    """Without the name of the source."""
    obs: pd.DataFrame
    corpus: Corpus | None = None

    def only(self, rows: npt.NDArray[np.int64]) -> Cells:
        """Some of the cells, by number."""
        hashes = None if self.hashes is None else self.hashes[rows]
        return Cells(hashes=hashes, names=self.names[rows], obs=self.obs.iloc[rows], corpus=self.corpus)


def evaluation(uri: str, rows: Sequence[SpeciesRow]) -> Cells:
    """The evaluation side: a corpus, or `SPECIES=FILE` of raw counts.

    Args:
        uri: A corpus folder, or a file with its species.
        rows: Known species.
    """
    species, path = checks.split_named(uri)
    if not species and artifacts.find(path) is not None:
        return of_corpus(path)
    row = next((r for r in rows if r.name == species), None)
    if row is None:
        msg = f"{uri}: neither a finished corpus nor SPECIES=FILE with one of {', '.join(r.name for r in rows)}"
        raise UserError(msg)
    return of_file(Source(uri=path, species=species), row)


def of_corpus(uri: str) -> Cells:
    """The cells of a finished corpus."""
    found = Corpus(uri)
    obs = found.obs()
    names = np.array(
        [str(c).removeprefix(f"{s}:") for c, s in zip(obs["cell"], obs["source"], strict=True)], dtype=np.str_
    )
    hashes = None
    if files.exists(files.join(uri, "hashes.parquet")):
        table = tables.read_table(files.join(uri, "hashes.parquet"))
        hashes = _pairs(table["a"].to_numpy(), table["b"].to_numpy())
        assert len(hashes) == len(obs), "one hash per cell"
    return Cells(hashes=hashes, names=names, obs=obs.assign(cell_row=np.arange(len(obs))), corpus=found)


def of_file(source: Source, row: SpeciesRow) -> Cells:
    """The cells of a file of raw counts, in bounded memory."""
    with open_reader(source.uri, source.layer) as reader:
        columns = identify.identify_columns(
            reader.gene_names(source.genes), identify.gene_lookup(row), biotypes=(), is_gene=reader.is_gene
        )
        masks = {f"{name}_G": columns[name].to_numpy() for name in ("counted", "mito", "candidate", "key")}
        sums_G = np.zeros(columns.num_rows, dtype=np.int64)
        found = counts.read_blocks(reader, columns, 0, reader.num_rows, rows=BLOCK_CELLS)
        parts = [qc.cell_metrics(b.data, b.indices, b.indptr, **masks, sums_G=sums_G) for b in found]
        names = np.array([str(n) for n in reader.cell_names(0, reader.num_rows)], dtype=np.str_)
        obs = pd.DataFrame(
            {c: reader.obs(c, 0, reader.num_rows) for c in COLUMNS if c in reader.obs_columns}, index=range(len(names))
        )
    metrics = qc.Metrics.merge(parts)
    return Cells(hashes=_pairs(metrics.hash_a, metrics.hash_b), names=names, obs=obs)


def trained_on(uri: str) -> str:
    """The corpus behind what a user names: itself, or the one that a checkpoint was trained on.

    A checkpoint knows its corpus by fingerprint; it is looked for beside the checkpoint.

    Raises:
        UserError: no corpus there.
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


def compare(mine: Cells, theirs: Cells) -> Overlap:
    """What `mine` (the evaluation) shares with `theirs` (the training corpus)."""
    same = (
        mine.corpus is not None
        and theirs.corpus is not None
        and mine.corpus.record.fingerprint == theirs.corpus.record.fingerprint
    )
    cells, by = None, ""
    if mine.hashes is not None and theirs.hashes is not None:
        cells, by = (int(np.isin(mine.hashes, theirs.hashes).sum()), len(mine.hashes)), "counts"
    elif (
        mine.corpus is not None
        and theirs.corpus is not None
        and mine.corpus.vocabulary.hash == theirs.corpus.vocabulary.hash
    ):
        have = set(_sentences(theirs))
        found = _sentences(mine)
        cells, by = (sum(s in have for s in found), len(found)), "sentences"
    metadata: dict[str, tuple[int, int]] = {}
    names = None
    if "dataset" in mine.obs and "dataset" in theirs.obs:
        sets = [_text(side.obs["dataset"]) for side in (mine, theirs)]
        metadata["data set"] = _shared(*sets)
        keys = [np.char.add(np.char.add(d, "\x1f"), side.names) for d, side in zip(sets, (mine, theirs), strict=True)]
        known = sets[0] != ""
        names = (int(np.isin(keys[0][known], keys[1]).sum()), len(mine.names))
        if "donor" in mine.obs and "donor" in theirs.obs:
            donors = [_text(side.obs["donor"]) for side in (mine, theirs)]
            pairs = [
                np.where(d == "", "", np.char.add(np.char.add(s, "\x1f"), d)) for s, d in zip(sets, donors, strict=True)
            ]
            metadata["donor"] = _shared(*pairs)
    return Overlap(cells=cells, by=by, names=names, metadata=metadata, same=same)


def _pairs(a: npt.NDArray[np.uint64], b: npt.NDArray[np.uint64]) -> npt.NDArray[np.void]:
    """Both halves of each hash as one comparable value."""
    out = np.empty((len(a), 2), dtype=np.uint64)
    out[:, 0], out[:, 1] = a, b
    return out.view(np.dtype((np.void, 16))).ravel()


def _sentences(side: Cells) -> list[bytes]:
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


def _shared(mine: Names, theirs: Names) -> tuple[int, int]:
    values = np.unique(mine[mine != ""])
    return int(np.isin(values, theirs).sum()), len(values)

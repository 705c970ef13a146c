"""Summary of a corpus: cells by species, source and type, lengths, dropped cells, coverage of the vocabulary.

Shards are read row group by row group, so memory does not grow with the corpus. What a corpus does not record is null:
an imported corpus has no mapping report, and may have no counts.

Letters: V token ids, L lengths (0 to the longest sentence).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mixgf.config.data import SpeciesRow
from mixgf.console import Progress
from mixgf.errors import UserError
from mixgf.genes.species import gene_table
from mixgf.genes.vocabulary import Vocabulary
from mixgf.storage import artifacts, files, tables

QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)
SHARES = (0.001, 0.01, 0.1, 0.5)
"""Genes are counted that at least these shares of a species' cells detect."""
BATCH_CELLS = 2_500
_MEANS = ("n_counts", "n_genes", "mito_fraction")


@dataclass(slots=True)
class _SpeciesCounts:
    """Counts over the sentences of one species."""

    cells_V: np.ndarray
    """int64: cells whose sentence holds the token."""
    length_L: np.ndarray
    """int64: cells by length of the sentence."""
    types: Counter[str | None] = field(default_factory=Counter)


@dataclass(slots=True)
class _SourceSums:
    """Sums over one source's kept cells."""

    species: str
    cells: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    known: Counter[str] = field(default_factory=Counter)
    """Cells in which a column of `sums` is not null."""


def summarise_corpus(uri: str) -> dict[str, Any]:
    """Figures of a finished corpus, ready for JSON.

    | key | holds |
    |---|---|
    | uri, created, code, fingerprint | identity |
    | cells | read, kept, dropped by reason |
    | sources | by source: cells read, kept, dropped by reason, share of counts on known genes, means over kept cells |
    | doublets | by source: cells that Scrublet saw, called doublets, and those among kept cells; null if not looked for |
    | near_duplicates | cells that equal those of an earlier source but for a gene filter: source, same_source, cells, kept |
    | refused | sources that could not be used |
    | cell_types, unlabelled | by species; null without a column cell_type |
    | columns | share of cells with a value |
    | lengths | by species: quantiles (tokens), share at max_len, histogram with its edges (last bin: cells at max_len) |
    | vocabulary | by species: genes, detected, never detected, by share of cells; share of the gene table; `by_cells` |
    | tokens, shards, bytes | totals |

    Raises:
        UserError: `uri` is not a finished corpus, or a shard is missing or damaged.
    """
    record = _require(uri)
    details = record.details
    vocabulary = Vocabulary.load(files.join(uri, "vocabulary.parquet"))
    seen, kept, columns = _count(uri, record, vocabulary.size)
    cells = sum(k.cells for k in kept.values())
    tokens = sum(int((s.length_L * np.arange(len(s.length_L))).sum()) for s in seen.values())
    on_disk = sum(int(s.get("bytes") or 0) for s in details["shards"])
    typed = any(None not in s.types or len(s.types) > 1 for s in seen.values())
    counts = record.counts
    return {
        "uri": uri,
        "created": record.created,
        "code": record.code,
        "fingerprint": record.fingerprint,
        "cells": {"read": counts.get("read"), "kept": cells, "dropped": counts.get("dropped") or {}},
        "sources": _sources(uri, record, kept),
        "doublets": _doublets(uri),
        "near_duplicates": _near_duplicates(uri),
        "refused": [dict(r) for r in details.get("refused") or []],
        "cell_types": {n: {k: c for k, c in s.types.most_common() if k is not None} for n, s in seen.items()}
        if typed
        else None,
        "unlabelled": {name: s.types[None] for name, s in seen.items()} if typed else None,
        "columns": {name: n / max(cells, 1) for name, n in columns.items()},
        "max_len": int(details["max_len"]),
        "lengths": {name: _lengths(s.length_L, int(details["max_len"])) for name, s in seen.items()},
        "vocabulary": _coverage(record, vocabulary, seen),
        "tokens": tokens,
        "shards": len(details["shards"]),
        "bytes": on_disk,
        "bytes_per_token": on_disk / tokens if tokens else None,
        "bytes_per_cell": on_disk / cells if cells else None,
    }


def _require(uri: str) -> artifacts.Record:
    """Record of a corpus; a `UserError` that says what the URI holds instead."""
    record = artifacts.find(uri)
    if record is not None and record.kind == "corpus":
        return record
    inner = files.join(uri, "corpus")
    if artifacts.find(inner) is not None:
        msg = f"{uri}: the folder of a whole run, not a corpus; its corpus is {inner}"
        raise UserError(msg)
    if record is not None:
        msg = f"{uri}: holds a {record.kind}, not a corpus; name the corpus folder that `mixgf prepare` made"
        raise UserError(msg)
    if not files.exists(uri):
        msg = f"{uri}: no finished corpus (not there); run `mixgf prepare` first, or check the path"
        raise UserError(msg)
    if any(files.exists(files.join(place, "plan.json")) for place in (uri, inner)):
        msg = f"{uri}: no finished corpus (unfinished); give the same `mixgf prepare` again, it continues where it stopped"
        raise UserError(msg)
    what = "a folder without a record" if files.list_dir(uri) else "a file or an empty folder"
    msg = f"{uri}: no finished corpus ({what}); name the corpus folder that `mixgf prepare` made, such as runs/demo/corpus"
    raise UserError(msg)


# Counting


def _count(
    uri: str, record: artifacts.Record, num_tokens: int
) -> tuple[dict[str, _SpeciesCounts], dict[str, _SourceSums], dict[str, int]]:
    """Counts over all shards: by species, by source, and number of values by column."""
    longest = int(record.details["max_len"])
    seen = {
        name: _SpeciesCounts(np.zeros(num_tokens, np.int64), np.zeros(longest + 1, np.int64))
        for name in record.details["species"]
    }
    kept: dict[str, _SourceSums] = {}
    filled: Counter[str] = Counter()
    shards = record.details["shards"]
    done = 0
    with Progress("inspect", sum(int(s["rows"]) for s in shards), "cells") as progress:
        for shard in shards:
            for batch in _batches(files.join(uri, "shards", shard["name"]), filled):
                _add(batch, seen, kept)
                done += batch.num_rows
                progress.update(done)
    return seen, kept, dict(sorted(filled.items()))


def _batches(where: str, filled: Counter[str]) -> Iterator[pa.Table]:
    """Read the needed columns of a shard in batches; for all columns, add the number of values (from the footer) to `filled`."""
    wanted = ("tokens", "species", "source", "length", "cell_type", *_MEANS)
    if not files.exists(where):
        msg = f"{where}: a shard of the corpus is missing; restore it, or make the corpus again with `mixgf prepare`"
        raise UserError(msg)
    with tables.open_parquet(where) as file:
        for group in range(file.num_row_groups):
            meta = file.metadata.row_group(group)
            for i in range(meta.num_columns):
                column = meta.column(i)
                if "." not in column.path_in_schema:
                    nulls = column.statistics.null_count if column.statistics else 0
                    filled[column.path_in_schema] += meta.num_rows - (nulls or 0)
        have = [name for name in wanted if name in file.schema_arrow.names]
        for batch in file.iter_batches(BATCH_CELLS, columns=have, use_threads=False):
            yield pa.Table.from_batches([batch])


def _add(batch: pa.Table, seen: dict[str, _SpeciesCounts], kept: dict[str, _SourceSums]) -> None:
    lists = batch["tokens"].combine_chunks()
    lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
    length = np.diff(lists.offsets.to_numpy())
    tokens = lists.flatten().to_numpy()
    species = np.asarray(batch["species"].to_pylist(), dtype=object)
    types = batch["cell_type"].to_pylist() if "cell_type" in batch.column_names else [None] * batch.num_rows
    for name in dict.fromkeys(species.tolist()):
        mine = species == name
        into = seen[name]
        into.cells_V += np.bincount(tokens[np.repeat(mine, length)], minlength=len(into.cells_V))
        into.length_L += np.bincount(length[mine], minlength=len(into.length_L))
        into.types.update(t or None for t, m in zip(types, mine.tolist(), strict=True) if m)
    have = [name for name in _MEANS if name in batch.column_names]
    table = batch.select(["species", "source", *have])
    found = table.group_by(["species", "source"], use_threads=False).aggregate(
        [([], "count_all"), *((name, how) for name in have for how in ("sum", "count"))]
    )
    for row in found.to_pylist():
        source = kept.setdefault(row["source"], _SourceSums(row["species"]))
        source.cells += row["count_all"]
        for name in have:
            source.sums[name] = source.sums.get(name, 0.0) + (row[f"{name}_sum"] or 0)
            source.known[name] += row[f"{name}_count"]


# Figures


def _rows(uri: str, name: str) -> list[dict[str, Any]]:
    where = files.join(uri, name)
    return tables.read_table(where).to_pylist() if files.exists(where) else []


def _doublets(uri: str) -> dict[str, dict[str, int]] | None:
    if not files.exists(files.join(uri, "doublets.parquet")):
        return None
    found: dict[str, dict[str, int]] = {}
    for row in _rows(uri, "doublets.parquet"):
        mine = found.setdefault(row["source"], {"scored": 0, "doublets": 0, "kept": 0})
        for name in mine:
            mine[name] += row[name]
    return found


def _near_duplicates(uri: str) -> list[dict[str, Any]]:
    """One row per pair of sources; no rows where they were not looked for."""
    pairs: dict[tuple[str, str], dict[str, Any]] = {}
    for row in _rows(uri, "near_duplicates.parquet"):
        names = {"source": row["source"], "same_source": row["same_source"]}
        mine = pairs.setdefault((row["source"], row["same_source"]), names | {"cells": 0, "kept": 0})
        mine["cells"] += 1
        mine["kept"] += row["kept"]
    return list(pairs.values())


def _sources(uri: str, record: artifacts.Record, kept: dict[str, _SourceSums]) -> list[dict[str, Any]]:
    """One row per source, those without a kept cell included."""
    named = {s["name"]: s for s in record.details.get("sources") or []}
    mapping = {m["source"]: m for m in _rows(uri, "mapping.parquet")}
    dropped: dict[str, dict[str, int]] = {}
    for row in _rows(uri, "dropped.parquet"):
        dropped.setdefault(row["source"], {})[row["reason"]] = row["cells"]
    out = []
    for name in dict.fromkeys([*named, *kept]):
        mine, told, genes = kept.get(name), named.get(name, {}), mapping.get(name, {})
        lost = genes.get("counts_lost")
        means: dict[str, float | None] = dict.fromkeys(_MEANS)
        if mine is not None:
            means |= {k: mine.sums[k] / n for k, n in mine.known.items() if n}
        out.append({
            "source": name,
            "species": mine.species if mine is not None else told.get("species"),
            "uri": told.get("uri"),
            "read": told.get("cells_read"),
            "kept": mine.cells if mine is not None else 0,
            "dropped": dropped.get(name, {}),
            "genes_mapped": genes.get("mapped"),
            "genes_named": genes.get("columns"),
            "counts_known": None if lost is None else 1 - lost,
            "cause": genes.get("cause") or "",
            "mean_counts": means["n_counts"],
            "mean_genes": means["n_genes"],
            "mean_mito_fraction": means["mito_fraction"],
        })  # fmt: skip
    return out


def _lengths(length_L: np.ndarray, max_len: int) -> dict[str, Any]:
    """Quantiles of the length, share of cells at the limit, and a histogram of 50 bins and one for the limit."""
    total = int(length_L.sum())
    ends = np.cumsum(length_L)
    quantiles = {
        f"{q:.0%}": int(np.searchsorted(ends, max(1, int(np.ceil(q * total))))) if total else None for q in QUANTILES
    }
    edges = np.append(np.unique(np.linspace(0, max_len, min(51, max_len + 1)).astype(int)), max_len + 1)
    return {
        "cells": total,
        "mean": float((length_L * np.arange(len(length_L))).sum() / total) if total else None,
        "quantiles": quantiles,
        "at_max_len": float(length_L[max_len:].sum() / total) if total else None,
        "edges": edges.tolist(),
        "histogram": np.add.reduceat(length_L, edges[:-1]).tolist(),
    }


def _coverage(record: artifacts.Record, vocabulary: Vocabulary, seen: dict[str, _SpeciesCounts]) -> dict[str, Any]:
    """Facts of the vocabulary, and numbers of cells whose sentences hold its genes."""
    rows = {row["name"]: row for row in record.config.get("species") or []}
    biotypes = (record.config.get("vocab") or {}).get("biotypes") or ["protein_coding", "miRNA"]
    species = {}
    for name, found in seen.items():
        genes = vocabulary.species_genes(name) if name in vocabulary.species else None
        cells_G = found.cells_V[genes.tokens] if genes is not None else np.zeros(0, np.int64)
        total = int(found.length_L.sum())
        species[name] = {
            "genes": len(cells_G),
            "seen": int((cells_G > 0).sum()),
            "never": int((cells_G == 0).sum()),
            "seen_in": {f"{100 * s:g}%": int((cells_G >= max(1, np.ceil(s * total))).sum()) for s in SHARES},
            "median_cells": float(np.median(cells_G)) if len(cells_G) else None,
            "by_cells": np.sort(cells_G)[:: -max(1, len(cells_G) // 400)].tolist(),
            "of_table": _of_table(rows.get(name), biotypes, set() if genes is None else set(genes.genes.tolist())),
        }
    per_token = np.bincount(vocabulary.table["token"].to_numpy(), minlength=vocabulary.size)
    return {
        "hash": vocabulary.hash,
        "size": vocabulary.size,
        "sharing": vocabulary.sharing,
        "shared_tokens": int((per_token > 1).sum()),
        "biotypes": list(biotypes),
        "species": species,
    }


def _of_table(row: dict[str, Any] | None, biotypes: list[str], genes: set[str]) -> dict[str, Any] | None:
    """Share of the species' gene table (selected biotypes) that is in the vocabulary; None if the table cannot be read."""
    try:
        table = gene_table(SpeciesRow(**row)) if row else None
    except UserError:  # the table lies where the corpus was made
        return None
    if table is None:
        return None
    wanted = set(table.filter(pc.is_in(table["biotype"], pa.array(biotypes)))["gene"].to_pylist())
    return {"genes": len(wanted), "share": len(wanted & genes) / len(wanted) if wanted else None}

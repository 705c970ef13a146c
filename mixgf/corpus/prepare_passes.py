"""Work units of `prepare`: a row range of one source each, which reads its own rows and writes its own part file.

No Ray here: a driver, a test or a plain loop calls these functions in any order, any number of times. A part file is
written atomically and holds the same bytes whoever made it, so whatever was killed is simply made again. A source that
cannot be used raises `UserError`.

Layout of the work folder, all Parquet unless said otherwise: sources/I.json and sources/I.parquet (facts and columns
of source I), rows/I after bands-I (column-major sources turned into rows), metrics/U (cells of unit U) after sums/U (counts by column), doublets/I-S (sample S), genes/SPECIES,
sketch/U, done/N (shard N).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mixgf.cells import counts, qc, row_order
from mixgf.cells.doublets import scrublet
from mixgf.cells.open import open_reader
from mixgf.cells.reader import Reader
from mixgf.config.data import QC, Source, SpeciesRow, Tokens
from mixgf.corpus import rank_value
from mixgf.corpus.shards import (
    _COMPUTED,
    _KINDS,
    RESERVED,
    ROW_GROUP_CELLS,
    SENTENCES,
    facts_uri,
    obs_array,
    part,
    shard_name,
    write_done,
    write_shard,
)
from mixgf.errors import UserError
from mixgf.genes import identify, medians
from mixgf.genes.vocabulary import Vocabulary
from mixgf.storage import files
from mixgf.storage.tables import read_table, write_table


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """Rows [start, stop) of source number `index`."""

    number: int
    index: int
    source: Source
    start: int
    stop: int


def plan_units(sources: dict[int, tuple[Source, int]], shard_cells: int) -> list[Unit]:
    """Cut sources (index to source and number of rows) into units, in order."""
    ranges = [
        (i, source, a, min(a + shard_cells, rows))
        for i, (source, rows) in sorted(sources.items())
        for a in range(0, rows, shard_cells)
    ]
    return [Unit(number=n, index=i, source=s, start=a, stop=b) for n, (i, s, a, b) in enumerate(ranges)]


# Sources


def describe(
    work: str,
    index: int,
    source: Source,
    *,
    row: SpeciesRow,
    rules: QC,
    biotypes: tuple[str, ...],
    allowed: dict[str, list[str]] | None,
) -> None:
    """Open one source, identify its genes and obs columns, hash its bytes; write its facts.

    `allowed` names the genes of a species that alone may enter the vocabulary, where there are such (imported medians, a
    given vocabulary).
    """
    with open_reader(source.uri, source.layer) as reader:
        if reader.num_rows == 0 or reader.num_columns == 0:
            msg = f"{source.uri}: empty ({reader.num_rows} cells x {reader.num_columns} genes); give a file with counts"
            raise UserError(msg)
        names = reader.gene_names(source.genes)
        vocabulary = frozenset(allowed[source.species]) if allowed and source.species in allowed else None
        known = identify.gene_lookup(row)
        columns = identify.identify_columns(
            names, known, biotypes=biotypes, vocabulary=vocabulary, is_gene=reader.is_gene
        )
        num_known = sum(columns["candidate"].to_pylist())
        if num_known < rules.min_genes:
            shown = ", ".join(str(n) for n in names[:5])
            msg = (
                f"{source.uri}: species = {source.species!r}: only {num_known} of {len(names)} genes are known "
                f"(qc.min_genes = {rules.min_genes}); names are like {shown}: wrong species, or another column of var (sources[{index}].genes)?"
            )
            raise UserError(msg)
        obs = {new: old for new, old in _obs_names(reader, source).items() if new not in RESERVED}
        if source.sample and source.sample not in reader.obs_columns:
            raise _no_column(reader, f"sources[{index}].sample", source.sample)
        kinds = {new: _kind(reader, old) for new, old in obs.items()}
        rows = reader.num_rows
        by_column = reader.scan is not None
    facts = {"rows": rows, "columns": columns.num_rows, "obs": obs, "kinds": kinds, "by_column": by_column}
    facts |= _identity(source.uri)
    files.write_json(facts_uri(work, index), facts)
    write_table(part(work, "sources", index), columns)  # last: its presence says that the source is described


def _identity(uri: str) -> dict[str, Any]:
    paths = [files.join(uri, n) for n in files.list_dir(uri)] or [uri]
    sums = [files.sha256(f) for f in paths]
    together = hashlib.sha256("".join(sums).encode()).hexdigest()
    return {"size": sum(files.size(f) for f in paths), "sha256": sums[0] if len(sums) == 1 else together}


def _obs_names(reader: Reader, source: Source) -> dict[str, str]:
    """New name to column of obs."""
    kept = source.kept_columns(reader.obs_columns)
    for old in kept:
        if old not in reader.obs_columns:
            raise _no_column(reader, "sources.rename" if old in source.rename else "sources.obs", old)
    return {new: old for old, new in kept.items()}


def _no_column(reader: Reader, field: str, name: str) -> UserError:
    return UserError(
        f"{reader.uri}: {field} = {name!r}: no such column of obs; it has {', '.join(reader.obs_columns) or 'none'}"
    )


def _kind(reader: Reader, name: str) -> str:
    values = reader.obs(name, 0, 1)
    return "str" if values.dtype == object else "float" if values.dtype.kind == "f" else "int"


def _columns(work: str, index: int) -> pa.Table:
    return read_table(part(work, "sources", index))


def write_row_order(work: str, index: int, source: Source) -> None:
    """Write a column-major source as rows (`cells.row_order`), which the later passes read."""
    with open_reader(source.uri, source.layer) as reader:
        row_order.write_rows(reader, _row_order_folder(work, index))
        write_table(part(work, "row_order", index), pa.table({"rows": [reader.num_rows]}))  # last: all rows are there


def _row_order_folder(work: str, index: int) -> str:
    return files.join(work, f"row_order-{index:05d}")


@contextmanager
def _opened(work: str, index: int, source: Source) -> Iterator[Reader]:
    """Open a source; a column-major one is read from its rows (`write_row_order`), where they exist."""
    with open_reader(source.uri, source.layer) as reader:
        if reader.scan is not None and files.exists(part(work, "row_order", index)):
            reader.read = partial(row_order.read_rows, _row_order_folder(work, index))
        yield reader


# Pass 1: metrics


def measure(work: str, unit: Unit, block_cells: int) -> None:
    """Metrics of the unit's cells, their samples, and the sum of counts by column."""
    columns = _columns(work, unit.index)
    masks = {f"{name}_G": columns[name].to_numpy() for name in ("counted", "mito", "candidate", "key")}
    sums_G = np.zeros(columns.num_rows, dtype=np.int64)
    with _opened(work, unit.index, unit.source) as reader:
        metrics = qc.Metrics.merge(
            [
                qc.cell_metrics(b.data, b.indices, b.indptr, **masks, sums_G=sums_G)
                for b in counts.read_blocks(reader, columns, unit.start, unit.stop, rows=block_cells)
            ]
        )
        table = pa.table({name: getattr(metrics, name) for name in qc.Metrics.__slots__})
        if unit.source.sample:
            values = reader.obs(unit.source.sample, unit.start, unit.stop)
            table = table.append_column("sample", pc.fill_null(obs_array(values, "str", len(values)), ""))
    write_table(part(work, "sums", unit.number), pa.table({"sum": sums_G}))
    write_table(part(work, "metrics", unit.number), table)


def read_metrics(work: str, numbers: list[int]) -> tuple[qc.Metrics, np.ndarray | None]:
    """Metrics (and samples) of consecutive units."""
    tables = [read_table(part(work, "metrics", n)) for n in numbers]
    table = pa.concat_tables(tables)
    sample = np.asarray(table["sample"].to_pylist(), dtype=object) if "sample" in table.column_names else None
    return qc.Metrics(*(table[name].to_numpy() for name in qc.Metrics.__slots__)), sample


def doublets(
    work: str, name: str, source: Source, index: int, rows: np.ndarray, *, block_cells: int, rate: float, seed: int
) -> None:
    """Scrublet over one sample: `rows` (ascending) of a source, all held in memory."""
    columns = _columns(work, index)
    wanted = np.zeros(int(rows[-1]) + 1, dtype=bool)
    wanted[rows] = True
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    with _opened(work, index, source) as reader:
        for b in counts.read_blocks(reader, columns, int(rows[0]), int(rows[-1]) + 1, rows=block_cells):
            keep = wanted[b.start : b.start + len(b.indptr) - 1]
            entries = np.repeat(keep, np.diff(b.indptr))
            parts.append((b.data[entries], b.indices[entries], np.diff(b.indptr)[keep]))
    data, indices, lengths = (np.concatenate(p) for p in zip(*parts, strict=True))
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    score, verdict = scrublet(data, indices, indptr, columns.num_rows, rate=rate, seed=seed)
    write_table(part(work, "doublets", name), pa.table({"row": rows, "score": score, "doublet": verdict}))


# Pass 2: medians


def number_genes(work: str, species: str, indices: list[int]) -> list[str]:
    """Candidate genes of a species over its sources, in ascending order; written for the units to read."""
    found: set[str] = set()
    for index in indices:
        columns = _columns(work, index)
        found.update(columns.filter(columns["candidate"])["gene"].to_pylist())
    genes = sorted(found)
    write_table(part(work, "genes", species), pa.table({"gene": pa.array(genes, pa.string())}))
    return genes


def sketch(work: str, number: int, parts: list[tuple[Unit, np.ndarray]], block_cells: int) -> None:
    """Median sketch number `number`: kept cells (unit, bool[rows]) of one species, over the genes of `number_genes`."""
    listed = read_table(part(work, "genes", parts[0][0].source.species))["gene"].combine_chunks()
    depths = [read_metrics(work, [unit.number])[0].n_counts for unit, _ in parts]
    most = max(int(depth_N[keep_N].max()) for depth_N, (_, keep_N) in zip(depths, parts, strict=True))
    filled = medians.SketchBuilder(len(listed), most)
    for depth, (unit, keep_N) in zip(depths, parts, strict=True):
        columns = _columns(work, unit.index)
        gene_G = pc.index_in(columns["gene"].combine_chunks(), value_set=listed)
        gene_G = np.where(columns["candidate"].to_numpy(), pc.fill_null(gene_G, -1).to_numpy(), -1).astype(np.int32)
        with _opened(work, unit.index, unit.source) as reader:
            for b, rows in _blocks(reader, columns, unit, block_cells):
                filled.update(b.data, b.indices, b.indptr, depth_N=depth[rows], keep_N=keep_N[rows], gene_G=gene_G)
    write_sketch(part(work, "sketch", number), filled.finish())


def _blocks(reader: Reader, columns: pa.Table, unit: Unit, rows: int) -> Iterator[tuple[counts.Block, slice]]:
    for block in counts.read_blocks(reader, columns, unit.start, unit.stop, rows=rows):
        first = block.start - unit.start
        yield block, slice(first, first + len(block.indptr) - 1)


_SKETCH = pa.schema([pa.field(name, pa.uint32(), nullable=False) for name in ("key", "count")])


def write_sketch(uri: str, found: medians.Sketch) -> None:
    """Write a sketch part."""
    delta = {"key": "DELTA_BINARY_PACKED", "count": "DELTA_BINARY_PACKED"}
    table = pa.Table.from_arrays([pa.array(found.keys), pa.array(found.counts)], schema=_SKETCH)
    write_table(uri, table, use_dictionary=False, column_encoding=delta, compression="none", write_statistics=False)


def merge_sketch_parts(uris: list[str], to: str) -> None:
    """Merge sketch parts, one at a time, into another part."""
    write_sketch(to, medians.merge_sketches(read_sketch(uri) for uri in uris))


def read_sketch(uri: str) -> medians.Sketch:
    """Read a sketch part."""
    table = read_table(uri)
    return medians.Sketch(table["key"].to_numpy(), table["count"].to_numpy())


# Pass 3: sentences


def encode(
    work: str, unit: Unit, keep_N: np.ndarray, shard: int, *, to: str, vocabulary: str, digest: str, tokens: Tokens,
    obs: dict[str, str], block_cells: int,
) -> None:  # fmt: skip
    """Write the unit's shard of cell sentences, and then the part that says so (lengths, bytes, sha256).

    Args:
        work: URI of the work folder.
        unit: the source's rows.
        keep_N: bool, which of the unit's rows are kept; at least one is.
        shard: number of the shard.
        to: URI of the folder of shards.
        vocabulary: URI of the vocabulary's file.
        digest: its hash.
        tokens: how to encode.
        obs: kind (`str`, `float`, `int`) of every obs column of the corpus; a source that lacks one has nulls.
        block_cells: rows in memory at a time.
    """
    columns = _columns(work, unit.index)
    ranks = _ranks(vocabulary, digest, unit.source.species, tokens.scaling)
    own = columns["canonical"].to_numpy() == np.arange(columns.num_rows)  # the others were added to theirs
    position_G = ranks.genes.positions(columns["gene"].combine_chunks())
    encoder = rank_value.Encoder(ranks, np.where(own, position_G, -1).astype(np.int32), tokens)
    facts = files.read_json(facts_uri(work, unit.index))
    metrics, _ = read_metrics(work, [unit.number])
    length = np.minimum(metrics.n_genes[keep_N], tokens.max_len - int(tokens.cls)) + int(tokens.cls)
    assert length.min() > int(tokens.cls), "a kept cell without vocabulary genes"
    schema = pa.schema([SENTENCES, *_COMPUTED.items(), *((name, _KINDS[kind]) for name, kind in obs.items())])
    num, source = len(length), unit.source

    def row_groups() -> Iterator[pa.Table]:
        with _opened(work, unit.index, source) as reader:
            names = reader.cell_names(unit.start, unit.stop)[keep_N]
            columns_ = {
                "cell": pa.array([f"{source.name}:{name}" for name in names], pa.string()),
                "species": pa.array([source.species] * num, pa.string()),
                "source": pa.array([source.name] * num, pa.string()),
                "source_row": pa.array(np.flatnonzero(keep_N) + unit.start, pa.int64()),
                "length": pa.array(length, pa.int32()),
                "n_counts": pa.array(metrics.n_counts[keep_N], pa.int64()),
                "n_genes": pa.array(metrics.n_genes[keep_N], pa.int32()),
                "mito_fraction": pa.array(metrics.mito_fraction[keep_N], pa.float64()),
            }
            for name, kind in obs.items():
                have = facts["obs"].get(name)
                values = None if have is None else reader.obs(have, unit.start, unit.stop)[keep_N]
                columns_[name] = obs_array(values, kind, num)
            blocks = _blocks(reader, columns, unit, block_cells)
            for first, sentences in _sentences(encoder, blocks, keep_N, length):
                rest = [column.slice(first, len(sentences)) for column in columns_.values()]
                yield pa.Table.from_arrays([sentences, *rest], schema=schema)

    name = shard_name(shard)
    size, digest = write_shard(files.join(to, name), schema, row_groups())
    done = {"name": name, "rows": num, "bytes": size, "sha256": digest}
    write_done(work, shard, length, done)


def _sentences(
    encoder: rank_value.Encoder, blocks: Iterable[tuple[counts.Block, slice]], keep_N: np.ndarray, length_K: np.ndarray
) -> Iterator[tuple[int, pa.ListArray]]:
    """Sentences of the kept cells, of known lengths, one row group at a time: (first cell, its tokens and those that follow).

    The tokens' array is used again for the next row group.
    """
    offsets_K1 = np.concatenate([[0], np.cumsum(length_K, dtype=np.int64)])
    edges = [*range(0, len(length_K), ROW_GROUP_CELLS), len(length_K)]
    tokens_T = np.empty(int(np.diff(offsets_K1[edges]).max()), np.int32)
    group = done = 0
    for b, rows in blocks:
        left_N = np.flatnonzero(keep_N[rows])
        while len(left_N):
            first, end = edges[group], edges[group + 1]
            offsets_N1 = offsets_K1[first : end + 1] - offsets_K1[first]
            now_N, left_N = left_N[: end - done], left_N[end - done :]
            here = offsets_N1[done - first : done - first + len(now_N) + 1]
            _, offsets = encoder(b.data, b.indices, b.indptr, rows_N=now_N, out=tokens_T[here[0] :])
            assert np.array_equal(here - here[0], offsets), "lengths differ from those of pass 1"
            done += len(now_N)
            if done == end:
                tokens = pa.array(tokens_T[: offsets_N1[-1]])
                yield first, pa.ListArray.from_arrays(pa.array(offsets_N1, pa.int32()), tokens, SENTENCES.type)
                group += 1


@lru_cache(maxsize=8)
def _ranks(vocabulary: str, digest: str, species: str, scaling: str) -> rank_value.Ranks:
    """Made once per process and vocabulary; `digest` keeps apart what a file of the same name held before."""
    found = Vocabulary.load(vocabulary)
    assert found.hash == digest, vocabulary
    return rank_value.Ranks.of(found.species_genes(species), scaling)

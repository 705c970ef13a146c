"""Sources to bounded row blocks of checked counts, with every column named by its gene.

`resolve` expands what the user listed; `identify` says which gene each column of a file is (spec section 1);
`blocks` yields int32 counts with the columns of one gene summed. Every refusal is one line: file, field, value, way out.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from mixgf import species as species_rows
from mixgf import storage
from mixgf.compiled import jit
from mixgf.config import Source, SpeciesRow, UserError
from mixgf.formats import RawBlock, Reader

ID, SYMBOL, PREVIOUS, ALIAS, AMBIGUOUS, UNKNOWN, NOT_A_GENE = (
    "id", "symbol", "previous", "alias", "ambiguous", "unknown", "not a gene"
)  # fmt: skip
_MADE_UNIQUE = re.compile(r"^(.+)[-.]\d{1,2}$")


def resolve(sources: Iterable[Source]) -> tuple[Source, ...]:
    """Expand globs and give every file a name of its own; a pattern without a match is a `UserError`."""
    out: list[Source] = []
    for i, source in enumerate(sources):
        uris = storage.glob(source.uri) if re.search(r"[*?\[]", source.uri) else [source.uri]
        if not uris:
            msg = f"sources[{i}].uri = {source.uri!r}: matches no file; check the pattern"
            raise UserError(msg)
        for uri in uris:
            stem = re.sub(
                r"\.(h5ad|h5|hdf5|arrow|dataset)$", "", uri.rstrip("/").rsplit("/", 1)[-1].removeprefix("resource:")
            )
            name = source.name if source.name and len(uris) == 1 else "-".join(filter(None, (source.name, stem)))
            out.append(replace(source, uri=uri, name=name))
    if not out:
        msg = "sources = (): must name at least one file of counts (.h5ad, 10x .h5, 10x folder), with its species"
        raise UserError(msg)
    for name, times in Counter(s.name for s in out).items():
        if times > 1:
            msg = f"sources.name = {name!r}: used by {times} sources; give each a name of its own (sources[i].name)"
            raise UserError(msg)
    return tuple(out)


# Which gene is a column?


@dataclass(frozen=True, slots=True)
class KnownGenes:
    """A species' gene table, ready for look-ups; names that mean several genes map to None."""

    row: SpeciesRow
    biotype: dict[str, str]
    mito: frozenset[str]
    names: tuple[tuple[str, dict[str, str | None]], ...]
    """(how, name to gene), in order of trust."""


@lru_cache(maxsize=16)
def known_genes(row: SpeciesRow) -> KnownGenes:
    """Read a species' gene table.

    A current symbol that several ids carry means the one of the primary assembly, protein-coding before others, then
    the lowest id. A previous symbol or alias of several genes means none of them.
    """
    table = species_rows.gene_table(row)
    genes = table["gene"].to_pylist()
    biotype = dict(zip(genes, table["biotype"].to_pylist(), strict=True))
    current: dict[str, list[str]] = {}
    for gene, symbol in zip(genes, table["symbol"].to_pylist(), strict=True):
        if symbol:
            current.setdefault(symbol, []).append(gene)
    primary = frozenset(g for g, p in zip(genes, table["primary"].to_pylist(), strict=True) if p)
    main = {
        name: min(found, key=lambda g: (g not in primary, biotype[g] != "protein_coding", g))
        for name, found in current.items()
    }
    maps: list[tuple[str, dict[str, str | None]]] = [(SYMBOL, dict(main))]
    for how, column in ((PREVIOUS, "previous"), (ALIAS, "alias")):
        other: dict[str, list[str]] = {}
        for gene, names in zip(genes, table[column].to_pylist(), strict=True):
            for name in names or ():
                other.setdefault(name, []).append(gene)
        maps.append((how, {name: found[0] if len(set(found)) == 1 else None for name, found in other.items()}))
    mito = frozenset(g for g, m in zip(genes, table["is_mito"].to_pylist(), strict=True) if m)
    return KnownGenes(row, biotype, mito, tuple(maps))


@lru_cache(maxsize=64)
def _id_pattern(prefix: str) -> re.Pattern[str]:
    return re.compile(rf"^({re.escape(prefix)}\d+)(\.\d+)?(_PAR_Y)?$")


def identify(
    names: Iterable[str], known: KnownGenes, *, biotypes: tuple[str, ...], vocabulary: frozenset[str] | None = None,
    is_gene: np.ndarray | None = None,
) -> pa.Table:  # fmt: skip
    """What each column of a source is.

    Args:
        names: Ensembl ids (versions are stripped) or symbols.
        known: the source's species.
        biotypes: of genes that may enter the vocabulary.
        vocabulary: where medians or a vocabulary are given: exactly these genes may enter it, whatever their biotype.
        is_gene: False for columns of other kinds (antibodies), which are left out altogether.

    Returns:
        One row per column: name, gene (null where unknown), how, counted, mito, candidate, canonical (int32: first
        column of the same gene), key (uint64: of the gene, 0 where unknown).
    """
    names = list(names)
    pattern = _id_pattern(known.row.gene_prefix)
    rows: dict[str, list[Any]] = {n: [] for n in ("gene", "how", "counted", "mito", "candidate", "canonical", "key")}
    first: dict[str, int] = {}
    for i, name in enumerate(names):
        counted = is_gene is None or bool(is_gene[i])
        gene, how = _resolve(name, known, pattern, vocabulary or frozenset()) if counted else (None, NOT_A_GENE)
        allowed = gene is not None and (
            gene in vocabulary if vocabulary is not None else known.biotype.get(gene) in biotypes
        )
        key = int.from_bytes(hashlib.blake2b(gene.encode(), digest_size=8).digest(), "little") if gene else 0
        canonical = first.setdefault(gene, i) if gene else i
        values = (gene, how, counted, gene in known.mito, allowed, canonical, key)
        for column, value in zip(rows.values(), values, strict=True):
            column.append(value)
    types = (pa.string(), pa.string(), pa.bool_(), pa.bool_(), pa.bool_(), pa.int32(), pa.uint64())
    columns = {n: pa.array(v, type=t) for (n, v), t in zip(rows.items(), types, strict=True)}
    return pa.table({"name": pa.array(names, type=pa.string())} | columns)


def _resolve(
    name: str, known: KnownGenes, pattern: re.Pattern[str], vocabulary: frozenset[str]
) -> tuple[str | None, str]:
    match = pattern.match(name)
    bare = match.group(1) if match else name
    if bare in known.biotype or bare in vocabulary:
        return bare, ID
    for text in (name, unique.group(1) if (unique := _MADE_UNIQUE.match(name)) else None):
        for how, genes in known.names if text else ():
            if text in genes:
                gene = genes[text]
                return gene, how if gene else AMBIGUOUS
    return None, UNKNOWN


@dataclass(frozen=True, kw_only=True, slots=True)
class Mapping:
    """The gene mapping report of one source."""

    columns: int
    mapped: int
    renamed: int
    """Mapped by a previous symbol or an alias."""
    summed: int
    """Columns added to another column of the same gene."""
    unmapped: int
    counts_lost: float
    """Share of the counts that lie on unmapped columns."""
    unmapped_names: list[str]
    """The ten with the most counts."""
    cause: str
    """Why columns are likely unmapped; empty when few counts are lost."""


def report(columns: pa.Table, sums_G: np.ndarray, others: Iterable[KnownGenes]) -> Mapping:
    """Summarise `identify` with the sum of counts of each column; `others` are the other species."""
    counted = columns["counted"].to_numpy()
    unknown = np.asarray([g is None for g in columns["gene"].to_pylist()]) & counted
    how = Counter(columns["how"].to_pylist())
    canonical = columns["canonical"].to_numpy()
    total = int(sums_G[counted].sum())
    lost = int(sums_G[unknown].sum()) / total if total else float(unknown.sum() / max(1, counted.sum()))
    names = columns["name"].to_pylist()
    worst = sorted(np.flatnonzero(unknown).tolist(), key=lambda i: (-int(sums_G[i]), names[i]))
    return Mapping(
        columns=int(counted.sum()),
        mapped=int((counted & ~unknown).sum()),
        renamed=how[PREVIOUS] + how[ALIAS],
        summed=int((canonical != np.arange(len(canonical))).sum()),
        unmapped=int(unknown.sum()),
        counts_lost=lost,
        unmapped_names=[names[i] for i in worst[:10]],
        cause=_cause([names[i] for i in worst], others) if lost > 0.1 else "",
    )


def _cause(unmapped: list[str], others: Iterable[KnownGenes]) -> str:
    for other in others:
        pattern = _id_pattern(other.row.gene_prefix)
        fits = sum(_resolve(name, other, pattern, frozenset())[0] is not None for name in unmapped)
        if fits > 0.5 * len(unmapped):
            return f"they are {other.row.name} genes: wrong species?"
    if sum(bool(re.match(r"^(ENS[A-Z]*\d{6,}|[A-Z]{2,7}\d{6,})", name)) for name in unmapped) > 0.5 * len(unmapped):
        return "they are ids that the gene table does not have: another species, or retired ids?"
    if sum(name.isdigit() for name in unmapped) > 0.5 * len(unmapped):
        return "they are bare numbers: name the column of var with ids or symbols (sources[i].genes)"
    return "they are neither Ensembl ids nor known symbols: spike-ins or repeats, or another column of var has the names (sources[i].genes)"


# Checked counts


@dataclass(frozen=True, slots=True)
class Block:
    """Counts of consecutive rows: int32 CSR over the file's columns; counts above 0 name every gene at most once in a row."""

    start: int
    data: np.ndarray
    indices: np.ndarray
    indptr: np.ndarray


_FINITE, _NEGATIVE, _WHOLE, _LARGE = 1, 2, 3, 4
_WRONG = {_FINITE: "not a finite number", _NEGATIVE: "negative", _WHOLE: "not a whole number", _LARGE: "above 2**31"}


@jit
def _to_counts(data: np.ndarray, out: np.ndarray, most: Any) -> bool:
    """Copy as int32; False where a value is no count. Without branches, so that it compiles to vector instructions.

    `most` is the largest count that the type of `data` can hold.
    """
    good = True
    for i in range(data.shape[0]):
        x = data[i]
        fits = (x >= 0) & (x <= most)
        count = np.int32(x if fits else 0)
        out[i] = count
        good &= fits & (data.dtype.type(count) == x)
    return good


def _largest(dtype: np.dtype) -> Any:
    limit = np.iinfo(np.int32).max
    if dtype.kind == "b":
        return dtype.type(1)
    if dtype.kind == "f":
        return np.nextafter(dtype.type(limit + 1), dtype.type(0))
    return dtype.type(min(limit, np.iinfo(dtype).max))


def _first_wrong(data: np.ndarray) -> tuple[int, int]:
    """What is wrong with the first value that is no count, and where it is."""
    x = data.astype(np.float64)
    tests = {_FINITE: ~np.isfinite(x), _NEGATIVE: x < 0, _WHOLE: x != np.floor(x), _LARGE: x >= 2147483648.0}
    where = {what: int(np.argmax(mask)) for what, mask in tests.items() if mask.any()}
    what = min(where, key=lambda w: (where[w], w))
    return what, where[what]


@jit
def _canonical(  # noqa: PLR0917 (a compiled kernel)
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, canonical: np.ndarray, total: np.ndarray,
    out: np.ndarray, out_indices: np.ndarray, out_indptr: np.ndarray,
) -> int:  # fmt: skip
    """Sum equal columns of each row, in order of first appearance; `total` is zeros of int64[G] and ends so."""
    n = 0
    for row in range(indptr.shape[0] - 1):
        begin = n
        for p in range(indptr[row], indptr[row + 1]):
            if data[p] == 0:
                continue
            c = canonical[indices[p]]
            if total[c] == 0:
                out_indices[n] = c
                n += 1
            total[c] += data[p]
        for i in range(begin, n):
            c = out_indices[i]
            if total[c] > 2147483647:
                return -1
            out[i] = np.int32(total[c])
            total[c] = 0
        out_indptr[row + 1] = n
    return n


@jit
def _place(indices: np.ndarray, lo: int, hi: int, column: int) -> int:
    """The first place in [lo, hi) of ascending columns that is not before `column`."""
    while lo < hi:
        middle = (lo + hi) >> 1
        if indices[middle] < column:
            lo = middle + 1
        else:
            hi = middle
    return lo


@jit
def _sum_moved(  # noqa: PLR0917 (a compiled kernel)
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, moved: np.ndarray, canonical: np.ndarray,
    renamed: np.ndarray,
) -> bool:  # fmt: skip
    """`_canonical` in place, for rows of ascending columns: counts of the few `moved` columns go to their gene's first column.

    What was added elsewhere stays as a count of 0. False where a sum is too large. `moved` ascends; `canonical` is of each
    of them; `renamed` is room for as many places.
    """
    for row in range(indptr.shape[0] - 1):
        begin, end = indptr[row], indptr[row + 1]
        at, n = begin, 0
        for m in range(moved.shape[0]):
            at = _place(indices, at, end, moved[m])
            if at == end:
                break
            if indices[at] != moved[m]:
                continue
            first = _place(indices, begin, at, canonical[m])
            if (
                indices[first] != canonical[m]
            ):  # the gene's first column is not in this row: an earlier one may stand for it
                first = at
                for k in range(n):
                    if canonical[renamed[k, 1]] == canonical[m]:
                        first = renamed[k, 0]
                if first == at:
                    renamed[n] = at, m
                    n += 1
                    continue
            total = np.int64(data[first]) + data[at]
            if total > 2147483647:
                return False
            data[first], data[at] = total, 0
        for k in range(n):
            indices[renamed[k, 0]] = canonical[renamed[k, 1]]
    return True


@jit
def _ascend(columns: np.ndarray) -> bool:
    good = True
    for p in range(1, columns.shape[0]):
        good &= columns[p] > columns[p - 1]
    return good


@jit
def _is_sorted(indices: np.ndarray, indptr: np.ndarray, num_columns: int) -> int:
    """2: strictly ascending columns within rows; 1: not; 0: a column outside the matrix."""
    order = 2
    for row in range(indptr.shape[0] - 1):
        columns = indices[indptr[row] : indptr[row + 1]]
        if columns.shape[0] and not _ascend(columns):
            order = 1
            for c in columns:
                if c < 0 or c >= num_columns:
                    return 0
        elif columns.shape[0] and (columns[0] < 0 or columns[-1] >= num_columns):
            return 0
    return order


def blocks(reader: Reader, columns: pa.Table, start: int, stop: int, *, rows: int) -> Iterator[Block]:
    """Checked counts of rows [start, stop) in blocks of at most `rows` rows; wrong values are a `UserError`.

    A block's arrays are used again for the next one: copy what you keep.
    """
    canonical = columns["canonical"].to_numpy()
    moved = np.flatnonzero(canonical != np.arange(len(canonical)))
    first, renamed = canonical[moved], np.empty((len(moved), 2), np.int64)
    held = np.empty(0, dtype=np.int32)
    for raw in reader.read(start, stop, rows):
        if len(raw.data) > len(held):
            held = np.empty(len(raw.data), dtype=np.int32)
        data = held[: len(raw.data)]
        if not _to_counts(raw.data, data, _largest(raw.data.dtype)):
            raise _bad_value(reader, columns, raw, *_first_wrong(raw.data))
        order = _is_sorted(raw.indices, raw.indptr, reader.num_columns)
        if order == 0:
            msg = f"{reader.uri}: a column index outside the matrix near row {raw.start}: the file is damaged; fetch it again"
            raise UserError(msg)
        if order == 2:
            if len(moved) and not _sum_moved(data, raw.indices, raw.indptr, moved, first, renamed):
                raise _bad_value(reader, columns, raw, _LARGE, int(np.argmax(data)))
            yield Block(raw.start, data, raw.indices, raw.indptr)
            continue
        out, indices, indptr = np.empty_like(data), np.empty_like(raw.indices), np.zeros_like(raw.indptr)
        total = np.zeros(reader.num_columns, dtype=np.int64)
        n = _canonical(data, raw.indices, raw.indptr, canonical, total, out, indices, indptr)
        if n < 0:
            raise _bad_value(reader, columns, raw, _LARGE, int(np.argmax(data)))
        yield Block(raw.start, out[:n], indices[:n], indptr)


def _bad_value(reader: Reader, columns: pa.Table, raw: RawBlock, wrong: int, at: int) -> UserError:
    row = int(np.searchsorted(raw.indptr, at, side="right")) - 1
    cell = reader.cell_names(raw.start + row, raw.start + row + 1)[0]
    where = f"cell {cell} (row {raw.start + row}), gene {columns['name'][int(raw.indices[at])].as_py()}"
    msg = f"{reader.uri}: count {raw.data[at]} of {where} is {_WRONG[wrong]}; {_advice(raw, wrong)}"
    return UserError(msg)


def _advice(raw: RawBlock, wrong: int) -> str:
    with np.errstate(all="ignore"):
        for name, values in (("normalised", raw.data), ("log-normalised", np.expm1(raw.data.astype(np.float64)))):
            rows = np.repeat(np.arange(len(raw.indptr) - 1), np.diff(raw.indptr))
            sums = np.bincount(rows, weights=values, minlength=len(raw.indptr) - 1)
            sums = sums[sums > 0]
            if wrong == _WHOLE and len(sums) and np.ptp(sums) < 1e-3 * sums.mean():
                return f"the matrix is already {name} (every cell sums to {sums.mean():,.0f}): give raw counts (sources[i].layer)"
    if wrong == _NEGATIVE:
        return "the matrix looks scaled: give raw counts (sources[i].layer = 'raw' or a layer's name)"
    return "counts must be whole numbers from 0: give raw counts (sources[i].layer = 'raw' or a layer's name)"

"""Which gene each column of a count file is: by Ensembl id, current symbol, previous symbol or alias."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mixgf.config.data import SpeciesRow
from mixgf.genes import species

ID, SYMBOL, PREVIOUS, ALIAS, AMBIGUOUS, UNKNOWN, NOT_A_GENE = (
    "id", "symbol", "previous", "alias", "ambiguous", "unknown", "not a gene"
)  # fmt: skip
_MADE_UNIQUE = re.compile(r"^(.+)[-.]\d{1,2}$")
_MISSING = re.compile(r"(na|nan|none|n/a|null|nil|-|<na>|#n/a)?([-._]\d+)?", re.IGNORECASE)


def is_missing(name: str) -> bool:
    """Whether a name is a word for a missing value (NA, nan, None, null, N/A, -), also where it was made unique (NA-1).

    Such words are former symbols of genes, too: NA of XK, NaN of SCN11A.
    """
    return _MISSING.fullmatch(name.strip()) is not None


@dataclass(frozen=True, slots=True)
class GeneLookup:
    """Gene table of one species, indexed by name."""

    row: SpeciesRow
    biotype: dict[str, str]
    """Biotype of every Ensembl id of the table."""
    mito: frozenset[str]
    """Mitochondrial genes."""
    names: tuple[tuple[str, dict[str, str | None]], ...]
    """(kind, name to gene) of current symbols, previous symbols and aliases, in this order; None = the name is ambiguous."""


@lru_cache(maxsize=16)
def gene_lookup(row: SpeciesRow) -> GeneLookup:
    """Read a species' gene table and index it.

    Several ids can have one current symbol. It then stands for a gene of the primary assembly before others, for a
    protein-coding one before others, then for the lowest id. A previous symbol or alias of several genes is ambiguous.
    """
    table = species.gene_table(row)
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
    return GeneLookup(row, biotype, mito, tuple(maps))


@lru_cache(maxsize=64)
def _id_pattern(prefix: str) -> re.Pattern[str]:
    return re.compile(rf"^({re.escape(prefix)}\d+)(\.\d+)?(_PAR_Y)?$")


def identify_columns(
    names: Iterable[str], lookup: GeneLookup, *, biotypes: tuple[str, ...], vocabulary: frozenset[str] | None = None,
    is_gene: np.ndarray | None = None,
) -> pa.Table:  # fmt: skip
    """Identify the gene of each column of a source.

    Args:
        names: Ensembl ids (versions are removed) or symbols, one per column.
        lookup: genes of the source's species.
        biotypes: biotypes of genes that may enter the vocabulary.
        vocabulary: if given, exactly these genes may enter the vocabulary, whatever their biotype.
        is_gene: False for other features (antibodies), which are ignored.

    Returns:
        Table with one row per column: name; gene (Ensembl id, null = unknown); how (kind of the name); counted (a gene);
        mito; candidate (may enter the vocabulary); canonical (int32, first column of the same gene); key (uint64, hash of
        the gene, 0 = unknown).
    """
    names = list(names)
    pattern = _id_pattern(lookup.row.gene_prefix)
    rows: dict[str, list[Any]] = {n: [] for n in ("gene", "how", "counted", "mito", "candidate", "canonical", "key")}
    first: dict[str, int] = {}
    for i, name in enumerate(names):
        counted = is_gene is None or bool(is_gene[i])
        gene, how = _resolve(name, lookup, pattern, vocabulary or frozenset()) if counted else (None, NOT_A_GENE)
        allowed = gene is not None and (
            gene in vocabulary if vocabulary is not None else lookup.biotype.get(gene) in biotypes
        )
        key = int.from_bytes(hashlib.blake2b(gene.encode(), digest_size=8).digest(), "little") if gene else 0
        canonical = first.setdefault(gene, i) if gene else i
        values = (gene, how, counted, gene in lookup.mito, allowed, canonical, key)
        for column, value in zip(rows.values(), values, strict=True):
            column.append(value)
    types = (pa.string(), pa.string(), pa.bool_(), pa.bool_(), pa.bool_(), pa.int32(), pa.uint64())
    columns = {n: pa.array(v, type=t) for (n, v), t in zip(rows.items(), types, strict=True)}
    return pa.table({"name": pa.array(names, type=pa.string())} | columns)


def _resolve(
    name: str, lookup: GeneLookup, pattern: re.Pattern[str], vocabulary: frozenset[str]
) -> tuple[str | None, str]:
    if is_missing(name):
        return None, UNKNOWN
    match = pattern.match(name)
    bare = match.group(1) if match else name
    if bare in lookup.biotype or bare in vocabulary:
        return bare, ID
    for text in (name, unique.group(1) if (unique := _MADE_UNIQUE.match(name)) else None):
        for how, genes in lookup.names if text else ():
            if text in genes:
                gene = genes[text]
                return gene, how if gene else AMBIGUOUS
    return None, UNKNOWN


@dataclass(frozen=True, kw_only=True, slots=True)
class MappingReport:
    """How the columns of one source map to genes."""

    columns: int
    """Columns that are genes."""
    mapped: int
    """Columns with a known gene."""
    renamed: int
    """Mapped by a previous symbol or an alias."""
    summed: int
    """Columns added to another column of the same gene."""
    unmapped: int
    """Columns without a known gene."""
    counts_lost: float
    """Share of all counts in unmapped columns, 0 to 1."""
    unmapped_names: list[str]
    """The ten unmapped columns with the most counts."""
    cause: str
    """Likely reason why columns are unmapped; empty where at most 10 % of the counts are lost."""


def is_first(columns: pa.Table) -> np.ndarray:
    """Which columns of `identify_columns` are the first of their gene, bool (G,): the counts of the others are added to these."""
    found: np.ndarray = columns["canonical"].to_numpy() == np.arange(columns.num_rows)
    return found


def report_mapping(columns: pa.Table, sums_G: np.ndarray, others: Iterable[GeneLookup]) -> MappingReport:
    """Summarise the gene mapping of one source.

    Args:
        columns: from `identify_columns`.
        sums_G: sum of counts of each column.
        others: the other species, to recognise a wrong one.
    """
    counted = columns["counted"].to_numpy()
    unknown = columns["gene"].is_null().to_numpy() & counted
    how = {row["values"]: row["counts"] for row in pc.value_counts(columns["how"]).to_pylist()}
    total = int(sums_G[counted].sum())
    lost = int(sums_G[unknown].sum()) / total if total else float(unknown.sum() / max(1, counted.sum()))
    named = columns["name"].filter(pa.array(unknown)).to_pylist()
    worst = [name for _, name in sorted(zip((-sums_G[unknown]).tolist(), named, strict=True))]
    return MappingReport(
        columns=int(counted.sum()),
        mapped=int((counted & ~unknown).sum()),
        renamed=how.get(PREVIOUS, 0) + how.get(ALIAS, 0),
        summed=int((~is_first(columns)).sum()),
        unmapped=int(unknown.sum()),
        counts_lost=lost,
        unmapped_names=worst[:10],
        cause=_cause(worst, others) if lost > 0.1 else "",
    )


def _cause(unmapped: list[str], others: Iterable[GeneLookup]) -> str:
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

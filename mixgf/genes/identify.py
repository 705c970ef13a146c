"""Which gene is a column: Ensembl id, symbol, alias."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from mixgf.config.data import SpeciesRow
from mixgf.genes import species

ID, SYMBOL, PREVIOUS, ALIAS, AMBIGUOUS, UNKNOWN, NOT_A_GENE = (
    "id", "symbol", "previous", "alias", "ambiguous", "unknown", "not a gene"
)  # fmt: skip
_MADE_UNIQUE = re.compile(r"^(.+)[-.]\d{1,2}$")


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

"""Gene tables of species, and one-to-one orthologs between them, from Parquet files that the config names."""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise, permutations

import pyarrow as pa

from mixgf.config.data import SpeciesRow
from mixgf.errors import UserError
from mixgf.storage import files, tables

_COLUMNS = {"gene": pa.string(), "symbol": pa.string(), "biotype": pa.string(), "is_mito": pa.bool_()}
_OPTIONAL = {"primary": pa.bool_(), "previous": pa.list_(pa.string()), "alias": pa.list_(pa.string())}


@lru_cache(maxsize=16)
def gene_table(row: SpeciesRow) -> pa.Table:
    """The genes of a species, sorted by Ensembl id.

    Returns:
        Columns gene (Ensembl id without version), symbol, biotype, is_mito, primary (of the reference assembly's main
        chromosomes), previous and alias (lists of former and further symbols).

    Raises:
        UserError: the table is missing, lacks a column, or repeats a gene.
    """
    where = f"species {row.name!r}: genes = {row.genes!r}"
    if not files.exists(row.genes):
        msg = f"{where}: no such file; give a Parquet table with columns {', '.join(_COLUMNS)}"
        raise UserError(msg)
    table = tables.read_table(row.genes)
    missing = [name for name in _COLUMNS if name not in table.column_names]
    if missing:
        msg = f"{where}: no column {missing[0]!r}; needed: {', '.join(_COLUMNS)}; optional: {', '.join(_OPTIONAL)}"
        raise UserError(msg)
    for name, kind in _OPTIONAL.items():
        if name not in table.column_names:
            empty: list[object] = [True if kind == pa.bool_() else []] * table.num_rows
            table = table.append_column(name, pa.array(empty, kind))
    columns = _COLUMNS | _OPTIONAL
    table = table.select(list(columns)).cast(pa.schema(list(columns.items()))).sort_by("gene")
    genes = table["gene"].to_pylist()
    repeated = [a for a, b in pairwise(genes) if a == b]
    if repeated:
        msg = f"{where}: gene {repeated[0]!r} stands in it twice; keep one row per gene"
        raise UserError(msg)
    return table


def orthologs(uris: tuple[str, ...]) -> dict[tuple[str, str], dict[str, str]]:
    """One-to-one orthologs by ordered pair of species: gene of the first to gene of the second.

    Each table has one column per species, named after it, with Ensembl ids; an empty value means no ortholog.

    Raises:
        UserError: a table is missing, or a gene has two partners.
    """
    maps: dict[tuple[str, str], dict[str, str]] = {}
    for uri in uris:
        if not files.exists(uri):
            msg = (
                f"vocab.orthologs = {uri!r}: no such file; give a Parquet table with one column of gene ids per species"
            )
            raise UserError(msg)
        table = tables.read_table(uri)
        columns = {name: table[name].to_pylist() for name in table.column_names}
        for a, b in permutations(columns, 2):
            pairs = maps.setdefault((a, b), {})
            for gene_a, gene_b in zip(columns[a], columns[b], strict=True):
                if not gene_a or not gene_b:
                    continue
                if pairs.setdefault(gene_a, gene_b) != gene_b:
                    msg = f"{uri}: {a} gene {gene_a} has two {b} partners ({pairs[gene_a]}, {gene_b}); keep one-to-one rows only"
                    raise UserError(msg)
    return maps

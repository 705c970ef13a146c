"""Features of a count file: the names of its genes, and which of its columns are genes at all."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mixgf.cells.reader import Reader, file_error
from mixgf.genes import identify
from mixgf.genes.identify import GeneLookup, GeneNames, is_missing

KIND_COLUMNS = ("feature_types", "feature_type", "modality", "feature_biotype", "library_type", "feature_class")
"""Columns of var that may tell genes from other features, the first one first."""
INDEX = "index"
"""What the index of var is called where a column with names can be chosen; a column of that name comes first."""
_DEFAULT = ("ensembl_id", "gene_ids")
NAME_COLUMNS = (
    "gene_id", "feature_id", "id", "gene_name", "gene_names", "gene_symbol", "gene_symbols", "symbol", "feature_name", "name",
    "gene_short_name", "hgnc_symbol", "mgi_symbol", "SYMBOL", "gene", "genes", "features",
)  # fmt: skip
"""Names of further columns of var with ids or symbols, the surest first."""
_GENES = {"gene expression", "gene", "genes", "gex", "rna", "mrna", "expression", "transcriptome"}
_OTHERS = {
    "antibody capture", "antibody", "antibodies", "adt", "protein", "proteins", "prot", "hto", "hashtag", "cite",
    "multiplexing capture", "crispr guide capture", "crispr", "guide", "guides", "sgrna", "grna", "antigen capture", "custom",
    "peaks", "peak", "atac", "chromatin accessibility", "spike-in", "spike-ins", "ercc", "spatial probe", "negative control probe",
    "negative control codeword", "blank codeword", "unassigned codeword", "tile", "tiles", "motif", "motifs", "vdj", "vdj-t", "vdj-b", "tcr", "bcr",
}  # fmt: skip


def gene_columns(columns: Sequence[str]) -> list[str]:
    """Columns of var that may hold names of genes, the index as `INDEX`; the first one is read where none is asked for."""
    first = next((name for name in _DEFAULT if name in columns), INDEX)
    known = [name for name in (*_DEFAULT, *NAME_COLUMNS) if name in columns]
    return list(dict.fromkeys([first, *known, INDEX, *columns]))


def choose_gene_names(
    uri: str, index: np.ndarray, columns: Sequence[str], read: Callable[[str], np.ndarray], column: str
) -> np.ndarray:
    """Names (ids or symbols) of the genes of a `var` table; where the chosen column has none, the index stands in.

    Args:
        uri: Of the file, for messages.
        index: The index of var.
        columns: Names of its columns.
        read: Gives the values of one column.
        column: The one to read, or `INDEX`; empty = the first of `gene_columns`.
    """
    names = column or gene_columns(columns)[0]
    if names in columns:
        return fill_missing(read(names), index)
    if names == INDEX:
        return index
    have = ", ".join(columns) or "none"
    raise file_error(uri, f"genes = {names!r}: no such column of var; it has {have} ({INDEX} = the index)")


def fill_missing(names: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The names, and the other name where a name is not text or a word for a missing value (`identify.is_missing`)."""
    pairs = zip(names, others, strict=True)
    return np.asarray([a if isinstance(a, str) and not is_missing(a) else b for a, b in pairs], dtype=object)


def find_kinds(
    uri: str, columns: Sequence[str], read: Callable[[str], np.ndarray]
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Which features of a `var` table are genes (`find_genes`), and the kind of each; (None, None): the table does not say.

    Args:
        uri: Of the file, for messages.
        columns: Names of the columns of var.
        read: Gives the values of one column.

    Raises:
        UserError: none of the features is a gene.
    """
    for name in KIND_COLUMNS:
        if name in columns:
            kinds = read(name)
            if (found := find_genes(uri, kinds, f"var[{name!r}]")) is not None:
                return found, kinds
    return None, None


def kinds_by_name(
    uri: str, columns: Sequence[str], read: Callable[[str], np.ndarray], *, index: np.ndarray, names: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray | None]:  # fmt: skip
    """`find_kinds` for the features of raw, where raw's own table says nothing, by their names in var.

    Args:
        uri: Of the file, for messages.
        columns: Names of the columns of var.
        read: Gives the values of one column of var.
        index: The index of var.
        names: The index of raw's table; a name that var lacks counts as a gene.
    """
    is_gene, kinds = find_kinds(uri, columns, read)
    if is_gene is None or kinds is None:
        return None, None
    place = {name: i for i, name in enumerate(index)}
    at = [place.get(name, -1) for name in names]
    return np.asarray([i < 0 or bool(is_gene[i]) for i in at]), np.asarray(
        [None if i < 0 else kinds[i] for i in at], object
    )


def find_genes(uri: str, kinds: np.ndarray, column: str) -> np.ndarray | None:
    """Which features are genes, bool per feature, by the kinds that the file gives (Gene Expression, Antibody Capture, ...).

    A feature without a kind counts as a gene. None: the column holds something else, such as biotypes.

    Args:
        uri: Of the file, for messages.
        kinds: One per feature; str, or None.
        column: Where the kinds stand, for messages.

    Raises:
        UserError: none of the features is a gene.
    """
    words = np.asarray([k.strip().lower() if isinstance(k, str) else "" for k in kinds], dtype=object)
    found = set(words.tolist())
    if not found & (_GENES | _OTHERS):
        return None
    genes = np.isin(words, [*_GENES, ""]) if found & _GENES else ~np.isin(words, list(_OTHERS))
    if not genes.any():
        shown = ", ".join(sorted({str(k) for k in kinds}))
        raise file_error(
            uri, f"no feature is of the kind Gene Expression ({column}: {shown}); give the file with the RNA counts"
        )
    return genes


_ENOUGH = 0.5
"""Share of the genes whose names are known, below which other columns of var are looked at."""
_FEW_ROWS = 10
"""Fewest rows in which two columns name genes, for a comparison of the columns."""
_DOUBTED = 0.02
"""Share of rows in which two columns name different genes, above which it is said."""


def identify_genes(
    reader: Reader, lookup: GeneLookup, column: str = "", *, biotypes: tuple[str, ...] = (),
    vocabulary: frozenset[str] | None = None, columns: pa.Table | None = None,
) -> tuple[pa.Table, list[str]]:  # fmt: skip
    """Identify the gene of each column of a file, and what is to be said about the names.

    Where no column is asked for, and the names of the first one are not known, another column of var with known names is read.

    Args:
        reader: Of the file.
        lookup: Genes of its species.
        column: Column of var with the names, as `Source.genes`.
        biotypes: As in `identify.identify_columns`.
        vocabulary: As in `identify.identify_columns`.
        columns: The table of the column's names, where it is there already.

    Returns:
        The table of `identify.identify_columns`, and sentences for the user.

    Raises:
        UserError: no such column, genes of two species side by side, or two columns of var that name different genes.
    """

    def table(name: str) -> pa.Table:
        names = reader.gene_names(name)
        return identify.identify_columns(
            names, lookup, biotypes=biotypes, vocabulary=vocabulary, is_gene=reader.is_gene, kinds=reader.kinds
        )

    chosen, notes = table(column) if columns is None else columns, []
    read = column or next(iter(reader.gene_columns), "")
    counted = sum(chosen["counted"].to_pylist())
    known = _number_known(chosen)
    if not column and known < _ENOUGH * counted:
        others = [(name, table(name)) for name in reader.gene_columns[1:] if _has_names(reader, name)]
        name, found = max(others, key=lambda one: _number_known(one[1]), default=("", chosen))
        if _number_known(found) >= max(_ENOUGH * counted, 2 * known, 1):
            notes.append(
                f"names of genes are read from {_column(name)}, because {_column(read)} has {known:,} known ones of {counted:,} "
                f"({', '.join(chosen['name'].to_pylist()[:3])})"
            )
            chosen, read = found, name
    _refuse_two_references(reader, chosen)
    return chosen, notes + _disagreements(reader, lookup, chosen, read, asked=bool(column))


_SWAPPED = "the names of the cells are genes: cells stand in columns; turn it round (adata.T)"
_NAMES_TRIED = 1_000
NAMES_SHOWN = 5
"""Names of genes in a message about unknown ones."""


def name_column(reader: Reader) -> str:
    """What the user writes to name the column of var with the names of genes."""
    return reader.setting("genes", "COLUMN")


def require_cells(reader: Reader) -> None:
    """Check that a file holds cells and genes.

    Raises:
        UserError: it is empty.
    """
    if reader.num_rows == 0 or reader.num_columns == 0:
        raise file_error(
            reader.uri,
            f"empty ({reader.num_rows} cells x {reader.num_columns} genes); give a file with counts",
        )


def describe_unknown(
    reader: Reader, columns: pa.Table, lookup: GeneLookup, others: Iterable[GeneLookup], *, known: str, asked: bool
) -> str:  # fmt: skip
    """Names of genes of a file of which too few are known, the likely reason, and what to do, for a refusal.

    Args:
        reader: Of the file.
        columns: Of `identify.identify_columns`.
        lookup: Genes of the species.
        others: Those of the other species.
        known: The reason where all names are known.
        asked: Whether the user named the column with the names.
    """
    unknown = columns.filter(pc.and_(columns["counted"], pc.is_null(columns["gene"])))["name"].to_pylist()
    if _are_swapped(reader, lookup):
        cause = _SWAPPED
    else:
        cause = identify.likely_cause(unknown, lookup, others, way=name_column(reader)) if unknown else known
    also = [name for name in reader.gene_columns if name in NAME_COLUMNS]
    ways = f"; var has also {', '.join(also)} ({name_column(reader)})" if also and not asked else ""
    return f"names are like {', '.join(map(str, columns['name'].to_pylist()[:NAMES_SHOWN]))}: {cause}{ways}"


def _are_swapped(reader: Reader, lookup: GeneLookup) -> bool:
    """Whether the names of cells are names of genes, so that the matrix has genes in rows."""
    known = GeneNames(lookup)
    names = reader.cell_names(0, min(reader.num_rows, _NAMES_TRIED))
    return sum(known.exact(str(name)).gene is not None for name in names) > _ENOUGH * len(names)


def _number_known(columns: pa.Table) -> int:
    return columns.num_rows - columns["gene"].null_count


def _has_names(reader: Reader, column: str) -> bool:
    return any(isinstance(name, str) and not is_missing(name) for name in reader.gene_names(column)[:1_000])


def _column(name: str) -> str:
    return "the index" if name == INDEX else f"var[{name!r}]"


def _refuse_two_references(reader: Reader, columns: pa.Table) -> None:
    if "prefix" not in set(columns["spelling"].to_pylist()):
        return
    names = columns.filter(columns["counted"])["name"].to_pylist()
    found = identify.references(names)
    several = {name: number for name, number in found.items() if number > 0.05 * len(names)}
    if len(several) > 1:
        shown = ", ".join(f"{name}: {number:,}" for name, number in several.items())
        first = next(iter(several))
        raise file_error(
            reader.uri,
            f"genes of {len(several)} references ({shown}), that is cells of several species in one file; keep the cells and genes "
            f"of one: adata[cells, adata.var_names.str.startswith('{first}')]",
        )


def _disagreements(reader: Reader, lookup: GeneLookup, columns: pa.Table, read: str, *, asked: bool) -> list[str]:
    """Compare the genes with those that other columns of names give: ids may have been joined to the wrong rows."""
    names = GeneNames(lookup)
    rows = [
        i
        for i, (gene, how) in enumerate(zip(columns["gene"].to_pylist(), columns["how"].to_pylist(), strict=True))
        if gene is not None and how in (identify.ID, identify.SYMBOL)
    ]
    genes, out = columns["gene"].to_pylist(), []
    for other in reader.gene_columns:
        if other == read or other not in (INDEX, *_DEFAULT, *NAME_COLUMNS):
            continue
        theirs = reader.gene_names(other)
        both = differ = 0
        example = -1
        for i in rows:
            found = names.exact(theirs[i]) if isinstance(theirs[i], str) else None
            if found is None or found.how not in (identify.ID, identify.SYMBOL):
                continue
            both += 1
            if found.gene != genes[i] and not _one_symbol(lookup, found.gene, genes[i]):
                differ += 1
                example = i if example < 0 else example
        if both < _FEW_ROWS or differ <= _DOUBTED * both:
            continue
        what = (
            f"{_column(read)} and {_column(other)} name different genes in {differ:,} of {both:,} rows, for instance "
            f"{columns['name'][example].as_py()} ({lookup.symbols.get(genes[example], 'no symbol')}) and {theirs[example]} in row {example}"
        )
        if differ > _ENOUGH * both and not asked:
            ways = " or ".join(reader.setting("genes", name) for name in (read, other))
            raise file_error(reader.uri, f"{what}: the columns belong to other rows; say which one is right: {ways}")
        out.append(what)
    return out


def _one_symbol(lookup: GeneLookup, a: str | None, b: str) -> bool:
    """Whether two ids have one current symbol, as copies of a gene on other assemblies do."""
    return a is not None and lookup.symbols.get(a, a) == lookup.symbols.get(b, b)

"""Features of a count file: the names of its genes, and which of its columns are genes at all."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mixgf.cells.reader import file_error
from mixgf.genes.identify import is_missing

KIND_COLUMNS = ("feature_types", "feature_type", "modality")
"""Columns of var that may tell genes from other features, the first one first."""
_GENES = {"gene expression", "gene", "genes", "gex", "rna", "mrna", "expression", "transcriptome"}
_OTHERS = {
    "antibody capture", "antibody", "antibodies", "adt", "protein", "proteins", "prot", "hto", "hashtag", "cite",
    "multiplexing capture", "crispr guide capture", "crispr", "guide", "guides", "sgrna", "grna", "antigen capture", "custom",
    "peaks", "peak", "atac", "chromatin accessibility", "tile", "tiles", "motif", "motifs", "vdj", "vdj-t", "vdj-b", "tcr", "bcr",
}  # fmt: skip


def choose_gene_names(
    uri: str, index: np.ndarray, columns: Sequence[str], read: Callable[[str], np.ndarray], column: str
) -> np.ndarray:
    """Names (ids or symbols) of the genes of a `var` table; where the chosen column has none, the index stands in.

    Args:
        uri: Of the file, for messages.
        index: The index of var.
        columns: Names of its columns.
        read: Gives the values of one column.
        column: The one to read; empty = `ensembl_id` or `gene_ids` where there is such a column, else the index.
    """
    names = column or next((n for n in ("ensembl_id", "gene_ids") if n in columns), "")
    if not names:
        return index
    if names not in columns:
        have = ", ".join(columns) or "none"
        raise file_error(uri, f"genes = {names!r}: no such column of var; it has {have} (empty = the index)")
    return fill_missing(read(names), index)


def fill_missing(names: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The names, and the other name where a name is not text or a word for a missing value (`identify.is_missing`)."""
    pairs = zip(names, others, strict=True)
    return np.asarray([a if isinstance(a, str) and not is_missing(a) else b for a, b in pairs], dtype=object)


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

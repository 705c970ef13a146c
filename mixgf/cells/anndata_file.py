"""Reader of AnnData on disk (.h5ad, .zarr): CSR, CSC or dense counts in X, raw or a layer, in blocks of rows."""

from __future__ import annotations

import numpy as np

from mixgf.cells.features import choose_gene_names, find_kinds, gene_columns, kinds_by_name
from mixgf.cells.frames import (
    Group,
    column,
    column_length,
    columns_of,
    index_of,
    is_array,
    open_frame,
    read_column,
    read_strings,
)
from mixgf.cells.hdf5 import child
from mixgf.cells.matrices import matrix_reader, shape_of
from mixgf.cells.reader import OPTION, Reader, file_error, setting


def open_anndata(uri: str, root: Group, layer: str, option: str = OPTION) -> Reader:
    """Reader of AnnData in an open HDF5 file or Zarr group; `layer` is `X`, `raw` (raw/X) or the name of a layer.

    `option` is `Reader.option`, for messages.

    Raises:
        UserError: no such layer, a matrix encoding that is not supported, no RNA among the features, or a damaged file.
    """
    raw, raw_var = ("raw.X", "raw.var") if "raw.X" in root else ("raw/X", "raw/var")  # raw.X: before anndata 0.7
    where = {"X": "X", "raw": raw}.get(layer, f"layers/{layer}")
    if where not in root:
        raise file_error(uri, _no_layer(root, layer, option))
    var, obs = open_frame(root, raw_var if layer == "raw" else "var"), open_frame(root, "obs")
    matrix = child(root, where)
    num_rows, num_columns = shape_of(matrix)
    index, genes = index_of(obs), index_of(var)
    for name, node, expected in (("obs", index, num_rows), ("var", genes, num_columns)):
        if (length := column_length(node)) != expected:
            raise file_error(uri, f"{name} has {length} rows, {where} has {expected}; the file is damaged")
    read, scan = matrix_reader(uri, matrix, num_rows, num_columns)
    named = (name for name in map(str, var) if not name.startswith("_"))  # the index may have a name, too
    columns = list(dict.fromkeys([*columns_of(var), *named]))

    def of_var(name: str) -> np.ndarray:
        return read_column(column(var, name), 0, num_columns)

    is_gene, kinds = find_kinds(uri, columns_of(var), of_var)
    if kinds is None and layer == "raw" and "var" in root:
        other = open_frame(root, "var")
        num = column_length(index_of(other))
        is_gene, kinds = kinds_by_name(
            uri, columns_of(other), lambda name: read_column(column(other, name), 0, num),
            index=read_strings(index_of(other), 0, num), names=read_strings(genes, 0, num_columns),
        )  # fmt: skip
    return Reader(
        uri=uri,
        num_rows=num_rows,
        num_columns=num_columns,
        gene_names=lambda name: choose_gene_names(uri, read_strings(genes, 0, num_columns), columns, of_var, name),
        gene_columns=gene_columns(columns),
        read=read,
        value_type=(matrix if is_array(matrix) else child(matrix, "data")).dtype,
        scan=scan,
        cell_names=lambda a, b: read_strings(index, a, b),
        obs_columns=columns_of(obs),
        obs=lambda name, a, b: read_column(column(obs, name), a, b),
        is_gene=is_gene,
        kinds=kinds,
        layer=layer,
        others=lambda: {name: open_anndata(uri, root, name) for name in matrices_of(root) if name != layer},
    )


def _no_layer(root: Group, layer: str, option: str) -> str:
    """What to do where a file has no matrix of this name."""
    have = matrices_of(root)
    if not have:
        held = ", ".join(sorted(name for name in root if list(root[name]))) or "nothing"
        return f"AnnData without a matrix of cells and genes (it holds {held}): annotations alone; give the file with the counts"
    ways = " or ".join(setting(option, "layer", name) for name in have)
    return f"layer = {layer!r}: not in the file; it has {', '.join(have)}: {ways}"


def matrices_of(root: Group) -> list[str]:
    """Names of the matrices of cells and genes: `X`, `raw`, and those of the layers."""
    have = [*(["X"] if "X" in root else []), *(["raw"] if "raw/X" in root or "raw.X" in root else [])]
    return have + (list(root["layers"]) if "layers" in root else [])

"""Reader of AnnData on disk (.h5ad, .zarr): CSR, CSC or dense counts in X, raw or a layer, in blocks of rows."""

from __future__ import annotations

import numpy as np

from mixgf.cells.features import KIND_COLUMNS, choose_gene_names, find_genes
from mixgf.cells.frames import Group, column_length, columns_of, index_of, is_array, read_column, read_strings
from mixgf.cells.matrices import matrix_reader, shape_of
from mixgf.cells.reader import Reader, file_error


def open_anndata(uri: str, root: Group, layer: str) -> Reader:
    """Reader of AnnData in an open HDF5 file or Zarr group; `layer` is `X`, `raw` (raw/X) or the name of a layer.

    Raises:
        UserError: no such layer, a matrix encoding that is not supported, no RNA among the features, or a damaged file.
    """
    where = {"X": "X", "raw": "raw/X"}.get(layer, f"layers/{layer}")
    if where not in root:
        have = [*(k for k in ("X",) if k in root), *(["raw"] if "raw/X" in root else [])]
        have += list(root["layers"]) if "layers" in root else []
        raise file_error(uri, f"layer = {layer!r}: not in the file; it has {', '.join(have) or 'no counts'}")
    var, obs = root["raw/var" if layer == "raw" else "var"], root["obs"]
    if is_array(obs) or is_array(var):
        raise file_error(uri, "written by anndata before 0.7; read it with anndata and write it again")
    num_rows, num_columns = shape_of(root[where])
    index = index_of(obs)
    for name, node, expected in (("obs", index, num_rows), ("var", index_of(var), num_columns)):
        if (length := column_length(node)) != expected:
            raise file_error(uri, f"{name} has {length} rows, {where} has {expected}; the file is damaged")
    read, scan = matrix_reader(uri, root[where], num_rows, num_columns)
    return Reader(
        uri=uri,
        num_rows=num_rows,
        num_columns=num_columns,
        gene_names=lambda column: _gene_names(uri, var, column),
        read=read,
        scan=scan,
        cell_names=lambda a, b: read_strings(index, a, b),
        obs_columns=columns_of(obs),
        obs=lambda name, a, b: read_column(obs[name], a, b),
        is_gene=_which_are_genes(uri, var),
    )


def _gene_names(uri: str, var: Group, column: str) -> np.ndarray:
    index = index_of(var)
    length = column_length(index)
    named = (name for name in map(str, var) if not name.startswith("_"))  # the index may have a name, too
    columns = list(dict.fromkeys([*columns_of(var), *named]))
    return choose_gene_names(
        uri, read_strings(index, 0, length), columns, lambda n: read_column(var[n], 0, length), column
    )


def _which_are_genes(uri: str, var: Group) -> np.ndarray | None:
    columns = columns_of(var)
    for name in KIND_COLUMNS:
        if name in columns:
            found = find_genes(uri, read_column(var[name], 0, column_length(index_of(var))), f"var[{name!r}]")
            if found is not None:
                return found
    return None

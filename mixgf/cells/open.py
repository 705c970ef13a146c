"""Open a count file: `.h5ad`, 10x `.h5`, or a 10x Matrix Market folder, on local disk or object storage.

A reader gives the file's shape, the names of rows and columns, `obs` values and raw counts of a row range as CSR blocks.
It does not check counts (`cells.counts`) or identify genes (`genes.identify`).

Memory: of row-major files (CSR, dense, 10x .h5) one block of rows. Column-major files (CSC, Matrix Market) are scanned
whole for every row range, in chunks of 4 M entries; to read them more than once, write them as rows (`cells.row_major`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mixgf.cells.h5ad import open_h5ad
from mixgf.cells.hdf5 import open_hdf5
from mixgf.cells.reader import Reader
from mixgf.cells.tenx import open_mtx, open_tenx_h5
from mixgf.errors import StorageError, UserError
from mixgf.storage import files


def format_of(uri: str) -> str:
    """Format of a file by its name: `h5ad`, `10x_h5` or `mtx`; a `UserError` for anything else."""
    name = uri.rstrip("/").rsplit("/", 1)[-1]
    if name.endswith(".h5ad"):
        return "h5ad"
    if name.endswith((".h5", ".hdf5")):
        return "10x_h5"
    if name in ("matrix.mtx", "matrix.mtx.gz") or {"matrix.mtx", "matrix.mtx.gz"} & set(files.list_dir(uri)):
        return "mtx"
    msg = (
        f"{uri}: not a known format; give an .h5ad, a 10x .h5, or a folder with matrix.mtx(.gz), features and barcodes"
    )
    raise UserError(msg)


@contextmanager
def open_reader(uri: str, layer: str = "X") -> Iterator[Reader]:
    """Open one count file for reading.

    Args:
        uri: path or URI of the file or folder.
        layer: of .h5ad files: `X`, `raw`, or the name of a layer.

    Raises:
        UserError: the file is missing, truncated or damaged, or has no such layer.
    """
    if not files.exists(uri):
        msg = f"{uri}: no such file; check the path (and the endpoint and keys, on object storage)"
        raise UserError(msg)
    kind = format_of(uri)
    try:
        if kind == "mtx":
            yield open_mtx(uri, layer)
            return
        with open_hdf5(uri) as file:
            yield open_h5ad(uri, file, layer) if kind == "h5ad" else open_tenx_h5(uri, file, layer)
    except StorageError:
        raise  # the storage failed, not the file: the caller retries
    except (OSError, EOFError) as error:
        text = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        msg = f"{uri}: truncated or damaged ({text}); fetch it again"
        raise UserError(msg) from None

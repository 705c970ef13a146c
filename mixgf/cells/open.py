"""Readers of count files in bounded row blocks: `.h5ad`, 10x `.h5`, 10x Matrix Market folders; local or object storage.

A reader gives facts of the file, names of its rows and columns, `obs` values of a row range, and raw counts of a row
range as CSR blocks. Nothing here knows genes or checks counts (that is `mixgf.corpus`).

Memory: row-major files (CSR, dense, 10x .h5) hold one block of rows. Column-major files (CSC, Matrix Market) are
scanned from end to end in chunks of 4 M entries, of which those of the asked rows are kept, as often as rows are asked
for: to read them more than once, turn them into rows first (`mixgf.bands`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from mixgf.cells.h5ad import _h5ad
from mixgf.cells.hdf5 import _h5
from mixgf.cells.reader import Reader
from mixgf.cells.tenx import _mtx, _tenx
from mixgf.errors import StorageError, UserError
from mixgf.storage import files


def format_of(uri: str) -> str:
    """`h5ad`, `10x_h5` or `mtx`, from the name; a `UserError` otherwise."""
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
    """Open one source file; a file that is not there, truncated or damaged is a `UserError`."""
    if not files.exists(uri):
        msg = f"{uri}: no such file; check the path (and the endpoint and keys, on object storage)"
        raise UserError(msg)
    kind = format_of(uri)
    try:
        if kind == "mtx":
            yield _mtx(uri, layer)
            return
        with _h5(uri) as file:
            yield _h5ad(uri, file, layer) if kind == "h5ad" else _tenx(uri, file, layer)
    except StorageError:
        raise  # the network, not the file (h5py, gzip and Arrow pass it on as it is): the caller tries again
    except (OSError, EOFError) as error:
        text = str(error).strip().splitlines()[0] if str(error) else type(error).__name__
        msg = f"{uri}: truncated or damaged ({text}); fetch it again"
        raise UserError(msg) from None

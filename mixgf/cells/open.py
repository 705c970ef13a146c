"""Open counts on local disk or object storage: AnnData (.h5ad, .zarr), annbatch, TileDB-SOMA, 10x .h5, Matrix Market folders.

A reader gives the file's shape, the names of rows and columns, `obs` values and raw counts of a row range as CSR blocks.
It does not check counts (`cells.counts`) or identify genes (`genes.identify`). The format is told by the content, not by the
ending of the name.

Memory: of row-major files (CSR, dense, 10x .h5) one block of rows. Column-major files (CSC, Matrix Market) are scanned
whole for every row range, in chunks of 4 M entries; to read them more than once, write them as rows (`cells.row_major`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py

from mixgf.cells import unknown
from mixgf.cells.annbatch import dataset_names, open_annbatch
from mixgf.cells.anndata_file import open_anndata
from mixgf.cells.hdf5 import open_hdf5
from mixgf.cells.reader import OPTION, Reader, file_error
from mixgf.cells.soma import open_soma
from mixgf.cells.tenx import genome_groups, mtx_files, mtx_matrices, open_mtx, open_tenx_h5
from mixgf.cells.zarr_store import open_zarr
from mixgf.config.data import Source
from mixgf.errors import StorageError, UserError
from mixgf.storage import files

_ZARR_FILES = {"zarr.json", ".zgroup", ".zattrs", ".zmetadata"}
_SOMA_FILES = {"__tiledb_group.tdb", "__group"}
_FILE_ENDINGS = (".h5ad", ".h5", ".hdf5", ".h5mu", ".loom", ".h5seurat", ".rds", ".csv", ".tsv", ".txt", ".gz", ".zip")


def format_of(uri: str, layer: str = "X") -> str:
    """Format of a count file with that layer: `h5ad`, `10x_h5`, `mtx`, `zarr`, `annbatch`, `soma`.

    Raises:
        UserError: what `open_reader` raises.
    """
    with open_reader(uri, layer) as reader:
        return reader.format


def source_files(uri: str) -> dict[str, int]:
    """URIs and bytes of the files that a source consists of, sorted; empty where there is nothing."""
    names = _names(uri)
    folder, matrix = (uri, _matrix(names)) if names else _split(uri)
    if mtx_matrices([matrix]):
        found = [files.join(folder, name) for name in mtx_files(matrix, names or files.list_dir(folder))]
        return {file: files.size(file) for file in sorted(found) if files.exists(file)}
    if names:
        return files.find(uri)
    (size,) = files.sizes([uri])
    return {} if size < 0 else {uri: size}


def source_sizes(uris: Sequence[str]) -> list[int]:
    """Bytes of each source, of all its files together; -1 where there is nothing."""
    plain = [uri for uri in uris if not files.is_local(uri) and uri.endswith(_FILE_ENDINGS)]
    found = dict(zip(plain, files.sizes(plain), strict=True))
    rest = [uri for uri in uris if uri not in found]
    remote = next((uri for uri in rest if not files.is_local(uri)), "")
    found |= zip(rest, files.map_reads(remote, _source_size, rest), strict=True)
    return [found[uri] for uri in uris]


def _source_size(uri: str) -> int:
    found = source_files(uri)
    return sum(found.values()) if found else -1


def stamp_of(uri: str) -> str:
    """SHA-256 of names, bytes and times of change of all files of a source (in object storage, of their ETags).

    Equal where nothing was written since.
    """
    found = files.stamps(source_files(uri))
    lines = (f"{name.removeprefix(uri)} {stamp}" for name, stamp in found.items())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@contextmanager
def open_source(source: Source, *, option: str = OPTION) -> Iterator[Reader]:
    """`open_reader` of a source, with its settings.

    Args:
        source: The source.
        option: How the user gives a field of it, for messages (`Reader.option`).
    """
    with open_reader(source.uri, source.layer, option=option) as reader:
        reader.rounded = source.round
        yield reader


@contextmanager
def open_reader(uri: str, layer: str = "X", *, option: str = OPTION) -> Iterator[Reader]:
    """Open counts for reading.

    Args:
        uri: path or URI of the file or folder.
        layer: of AnnData: `X`, `raw`, or the name of a layer.
        option: How the user gives a field of the source, for messages (`Reader.option`).

    Raises:
        UserError: the file is missing, truncated, damaged or of another format, or has no such layer. Whatever a file's
            content makes a library raise is such an error, also while it is read; an error of the storage is not.
    """
    with ExitStack() as stack:
        with refusals(uri):
            reader = _open(stack, uri, layer, option)
        yield _guarded(replace(reader, option=option))


def _open(stack: ExitStack, uri: str, layer: str, option: str) -> Reader:
    if not files.exists(uri):
        raise file_error(uri, "no such file; check the path (and the endpoint and keys, on object storage)")
    names = set(_names(uri))
    folder, name = _split(uri)
    if names or uri.endswith(".zarr.zip") or (files.is_local(uri) and files.is_folder(uri)):
        return _open_folder(stack, uri, layer, names, option)
    if mtx_matrices([name]):
        return replace(open_mtx(uri, folder, name, layer), format="mtx")
    if files.is_local(uri) and not Path(files.local_path(uri)).is_file():
        raise file_error(uri, "a pipe or a device, not a file; write it to a file first")
    try:
        file = stack.enter_context(open_hdf5(uri))
    except StorageError:
        raise
    except OSError:
        if unknown.is_hdf5(uri):
            raise
        raise file_error(uri, unknown.describe_file(uri)) from None
    if {"obs", "var"} <= set(file) and "mod" not in file:
        return replace(open_anndata(uri, file, layer, option), format="h5ad")
    if isinstance(file.get("matrix"), h5py.Group) or genome_groups(file):
        return replace(open_tenx_h5(uri, file, layer, option), format="10x_h5")
    raise file_error(uri, unknown.describe_hdf5(uri, file))


def _open_folder(stack: ExitStack, uri: str, layer: str, names: set[str], option: str) -> Reader:
    if matrix := _matrix(names):
        return replace(open_mtx(uri, uri, matrix, layer), format="mtx")
    if names & _SOMA_FILES:
        return replace(stack.enter_context(open_soma(uri, layer)), format="soma")
    if not (names & _ZARR_FILES or uri.endswith(".zip")):
        raise file_error(uri, unknown.describe_folder(uri, sorted(names)))
    try:
        root = stack.enter_context(open_zarr(uri))
    except FileNotFoundError:
        raise file_error(uri, unknown.describe_no_group(uri)) from None
    if dataset_names(root):
        return replace(open_annbatch(uri, root, layer), format="annbatch")
    if not {"obs", "var"} <= set(root) or "mod" in root:
        raise file_error(uri, unknown.describe_zarr(uri, root))
    return replace(open_anndata(uri, root, layer, option), format="zarr")


def _matrix(names: Iterable[str]) -> str:
    """Name of the Matrix Market file with the entries of a folder of one sample; empty if there is none, or several."""
    found = mtx_matrices(list(names))
    plain = [name for name in ("matrix.mtx.gz", "matrix.mtx") if name in found]
    one = len({name.removesuffix(".gz") for name in found}) == 1
    return (
        plain[0] if plain else next((name for name in found if one and (name.endswith(".gz") or len(found) == 1)), "")
    )


def _split(uri: str) -> tuple[str, str]:
    """Folder and name of a file."""
    folder, _, name = uri.rstrip("/").rpartition("/")
    return folder or ("/" if uri.startswith("/") else "."), name


def _names(uri: str) -> list[str]:
    """Names in a folder; none for a file. On object storage a name with the ending of a file is not listed."""
    return [] if not files.is_local(uri) and uri.endswith(_FILE_ENDINGS) else files.list_dir(uri)


@contextmanager
def refusals(uri: str, what: str = "", *, option: str = OPTION) -> Iterator[None]:
    """Turn whatever the content of a file makes a library raise into a `UserError` of one line.

    Args:
        uri: Of the file.
        what: What is being read, for the message, with ": " at its end.
        option: How the user gives a field of the source (`Reader.option`).
    """
    keep = _KEEP_COLUMNS if what.startswith("obs") and option == OPTION else ""
    try:
        yield
    except (UserError, StorageError):
        raise  # a failure of storage is no fault of the file: the caller retries
    except UnicodeDecodeError as error:
        way = keep or "write the file again"
        raise file_error(uri, f"{what}text that is not UTF-8 ({error.object[:40]!r}); {way}") from None
    except MemoryError as error:
        raise file_error(
            uri, f"{what}does not fit into memory ({_line(error)}): damaged, or larger than this machine can read"
        ) from None
    except (OSError, EOFError) as error:
        if "unable to lock file" in str(error):
            other = isinstance(error, BlockingIOError)
            way = "another program writes to it: close it there (adata.file.close())" if other else _NO_LOCKS
            raise file_error(uri, f"{way}, and give the command again") from None
        raise file_error(uri, f"{what}truncated or damaged ({_line(error)}); fetch it again") from None
    except Exception as error:
        way = keep or "read it with anndata and write it again"
        raise file_error(uri, f"{what}cannot be read ({_line(error)}); {way}") from error


_NO_LOCKS = "its file system has no locks: export HDF5_USE_FILE_LOCKING=FALSE"
_KEEP_COLUMNS = "name the columns to keep: " + OPTION.format(field="obs", value="COLUMN,COLUMN")


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return text[0] if text else type(error).__name__


def _guarded(reader: Reader) -> Reader:
    """The reader with `refusals` around everything that it reads."""
    uri = reader.uri

    def call(what: Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any) -> Any:
            with refusals(uri, what(*args), option=reader.option):
                return function(*args)

        return guarded

    def each(function: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def guarded(*args: Any) -> Iterator[Any]:
            items = iter(function(*args))
            while True:
                with refusals(uri):
                    item = next(items, None)
                if item is None:
                    return
                yield item

        return guarded

    return replace(
        reader,
        gene_names=call(lambda _: "names of genes: ", reader.gene_names),
        cell_names=call(lambda *_: "names of cells: ", reader.cell_names),
        obs=call(lambda name, *_: f"obs column {name!r}: ", reader.obs),
        read=each(reader.read),
        scan=each(reader.scan) if reader.scan is not None else None,
    )

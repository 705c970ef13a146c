"""Reader of tokenised Hugging Face Arrow data sets (Genecorpus-30M, Mouse-Genecorpus-20M).

`save_to_disk` of the library `datasets` writes a folder with dataset_info.json and state.json, which lists data-*.arrow
in order. Each .arrow file is an Arrow IPC stream (or file) with the columns input_ids (list of integers, highest-ranked
gene first), length, and attributes of the cell. A token dictionary (`genes.token_dictionaries`) says what an id means.

Letters: N cells, T ids of all of them, K the dictionary's highest id + 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mixgf.errors import UserError
from mixgf.storage import files


def data_files(uri: str) -> list[str]:
    """URIs of the .arrow files of a data set, in order: those that state.json lists, all of a folder, or one file."""
    if not files.is_folder(uri):
        if not files.exists(uri) or not uri.endswith(".arrow"):
            state = "not an .arrow file" if files.exists(uri) else "no such file or folder"
            msg = f"{uri}: {state}; give a folder that save_to_disk wrote, a folder of .arrow files, or one of them"
            raise UserError(msg)
        return [uri]
    names = files.list_dir(uri)
    if "dataset_dict.json" in names:
        splits = files.read_json(files.join(uri, "dataset_dict.json")).get("splits", [])
        msg = f"{uri}: a set of data sets; give one of them: {', '.join(files.join(uri, s) for s in splits)}"
        raise UserError(msg)
    if "state.json" not in names:
        found = [name for name in names if name.endswith(".arrow")]
    else:
        try:
            state = files.read_json(files.join(uri, "state.json"))
            found = [str(entry["filename"]) for entry in state["_data_files"]]
            indexed = state.get("_indices_files") or state.get("_indices_data_files")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            msg = f"{uri}/state.json: not one of save_to_disk ({type(error).__name__}: {error}); fetch it again"
            raise UserError(msg) from None
        if indexed:
            msg = f"{uri}: its rows are chosen by an index file; save it after flatten_indices()"
            raise UserError(msg)
        missing = [name for name in found if name not in names]
        if missing:
            msg = f"{uri}: {missing[0]}, which state.json lists, is missing ({len(missing)} of {len(found)} files); fetch it again"
            raise UserError(msg)
    if not found:
        msg = f"{uri}: no .arrow file in it; give a folder that save_to_disk wrote"
        raise UserError(msg)
    return [files.join(uri, name) for name in found]


@dataclass(frozen=True, slots=True)
class Layout:
    """Positions of the record batches of an Arrow file, so that each can be read alone."""

    start: int
    """First byte of the schema."""
    head: int
    """Bytes of the schema and dictionaries."""
    batches: tuple[tuple[int, int], ...]
    """(first byte, bytes) of each record batch."""


_MAGIC = b"ARROW1"
_MARK = b"\xff\xff\xff\xff"


def find_batches(file: pa.NativeFile, uri: str) -> Layout:
    """Find the record batches of an Arrow IPC file or stream; a truncated file is a `UserError`."""
    size = file.size()
    file.seek(0)
    is_file = file.read(8)[:6] == _MAGIC
    start = 8 if is_file else 0
    if is_file:
        file.seek(max(0, size - 6))
        if file.read(6) != _MAGIC:
            raise _damaged(uri, "its end is missing")
    file.seek(start)
    batches: list[tuple[int, int]] = []
    head = 0
    with _arrow_errors(uri):
        reader = pa.ipc.MessageReader.open_stream(file)
        while True:
            begin = file.tell()
            try:
                message = reader.read_next_message()
            except StopIteration:
                break
            end = file.tell()
            if message.type == "record batch":
                batches.append((begin, end - begin))
            elif batches:
                raise _damaged(uri, f"a {message.type} stands behind its first cells")
            else:
                head = end - start
    end = batches[-1][0] + batches[-1][1] if batches else start + head
    file.seek(end)
    mark = file.read(8)
    if not head or (mark != _MARK + bytes(4) and mark[:4] != bytes(4)):
        raise _damaged(uri, "its end is missing")
    return Layout(start, head, tuple(batches))


def read_batch(file: pa.NativeFile, where: Layout, number: int, uri: str) -> pa.RecordBatch:
    """Read one record batch."""
    pieces = []
    for begin, size in ((where.start, where.head), where.batches[number]):
        file.seek(begin)
        pieces.append(file.read_buffer(size))
    with _arrow_errors(uri):
        batch = pa.ipc.open_stream(pa.BufferReader(b"".join(pieces))).read_next_batch()
        batch.validate(full=True)  # offsets of lists are used by compiled code
        return batch


def read_schema(file: pa.NativeFile, where: Layout, uri: str) -> pa.Schema:
    """Read the schema, with the metadata of Hugging Face."""
    file.seek(where.start)
    with _arrow_errors(uri):
        return pa.ipc.open_stream(pa.BufferReader(file.read(where.head))).schema


class _arrow_errors:
    """Context that turns Arrow's errors into a `UserError` of one line."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, pa.ArrowInvalid | pa.ArrowTypeError | pa.ArrowNotImplementedError) or (
            isinstance(error, OSError) and (files.is_local(self.uri) or "Expected to be able to read" in str(error))
        ):
            raise _damaged(self.uri, str(error).splitlines()[0] if str(error) else type(error).__name__) from None


def _damaged(uri: str, why: str) -> UserError:
    return UserError(f"{uri}: truncated or not an Arrow file ({why}); fetch it again")


def read_ids(batch: pa.RecordBatch, uri: str, row: int) -> tuple[np.ndarray, np.ndarray]:
    """`input_ids` of a batch: ids (T,) of the stored integer type, and offsets int64 (N + 1,).

    Args:
        batch: a record batch.
        uri: of the file, for messages.
        row: row in the file of the batch's first cell, for messages.
    """
    column = batch.column("input_ids")
    if column.null_count:
        at = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0])
        msg = f"{uri}: row {row + at}: input_ids is null; remove such rows from the data set"
        raise UserError(msg)
    ids = column.flatten()
    if ids.null_count:
        msg = f"{uri}: rows from {row}: null among input_ids; remove such rows from the data set"
        raise UserError(msg)
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    return ids.to_numpy(), np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)


def check_schema(schema: pa.Schema, uri: str) -> None:
    """Check that `input_ids` is a list of integers, and `length`, if present, an integer; a `UserError` otherwise."""
    if "input_ids" not in schema.names:
        msg = f"{uri}: no column input_ids; it has {', '.join(schema.names) or 'none'}: not a tokenised data set"
        raise UserError(msg)
    kind = schema.field("input_ids").type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not pa.types.is_integer(kind.value_type):
        msg = f"{uri}: input_ids is {kind}; must be a list of integers"
        raise UserError(msg)
    if "length" in schema.names and not pa.types.is_integer(schema.field("length").type):
        msg = f"{uri}: length is {schema.field('length').type}; must be integers"
        raise UserError(msg)


@dataclass(frozen=True, slots=True)
class Attribute:
    """A column of the data set that becomes a column of obs."""

    column: str
    kind: str
    """`str`, `float` or `int`."""
    labels: tuple[str, ...] = ()
    """Class names, where the column is a Hugging Face ClassLabel."""

    def read(self, batch: pa.RecordBatch) -> pa.Array:
        """Values of the column as string, float64 or int64."""
        values = batch.column(self.column)
        if self.labels:
            wanted = np.asarray([*self.labels, None], dtype=object)
            codes = values.fill_null(-1).to_numpy(zero_copy_only=False)
            inside = (codes >= 0) & (codes < len(self.labels))
            return pa.array(wanted[np.where(inside, codes, len(self.labels))], pa.string())
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        return values.cast({"str": pa.string(), "float": pa.float64(), "int": pa.int64()}[self.kind])


def find_attributes(schema: pa.Schema) -> tuple[dict[str, Attribute], list[str]]:
    """Columns that can be kept, by name, and names of those that cannot (lists, structs, times, bytes)."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    except (TypeError, LookupError, ValueError):
        features = {}
    found, left_out = {}, []
    for field in schema:
        if field.name in ("input_ids", "length"):
            continue
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        feature = features.get(field.name) if isinstance(features, dict) else None
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and pa.types.is_integer(kind):
            found[field.name] = Attribute(field.name, "str", tuple(feature.get("names") or ()))
        elif pa.types.is_integer(kind):
            found[field.name] = Attribute(field.name, "int")
        elif pa.types.is_floating(kind):
            found[field.name] = Attribute(field.name, "float")
        elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_boolean(kind):
            found[field.name] = Attribute(field.name, "str")
        else:
            left_out.append(field.name)
    return found, left_out


def read_batches(file: pa.NativeFile, where: Layout, uri: str) -> Iterator[pa.RecordBatch]:
    """Read all record batches in order."""
    for number in range(len(where.batches)):
        yield read_batch(file, where, number, uri)

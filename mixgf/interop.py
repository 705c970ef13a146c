"""Tokenised Hugging Face Arrow data sets in: their files, their cells, and their ids in our vocabulary.

Layout (Genecorpus-30M, Mouse-Genecorpus-20M; written by save_to_disk of `datasets`): a folder with state.json, which lists
data-*.arrow in order, and dataset_info.json. Each .arrow file is an Arrow IPC stream (or file) with the columns input_ids
(list of integers, best gene first), length, and attributes of the cell. Ids are those of a dictionary beside it
(`mixgf.dictionaries`).

Letters: N cells, T ids of all of them, K the dictionary's highest id + 1.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from mixgf import storage
from mixgf.compiled import jit
from mixgf.config import UserError
from mixgf.dictionaries import Dictionary
from mixgf.vocab import SpeciesGenes

# Ids into our vocabulary

UNKNOWN, FRONT, END, OUTSIDE = -1, -2, -3, -4
"""What an id is that is no vocabulary gene: not in the dictionary (or a special that no sentence may hold); a special of
the sentence's front or of its end; a gene that the vocabulary does not have."""
_PLACES = {"<cls>": FRONT, "<bos>": FRONT, "<pad>": END, "<eos>": END, "<sep>": END}
COUNTED = ("kept", "special", "unknown", "outside", "duplicate", "truncated")
"""What becomes of the ids of a sentence; every id is one of these."""


def lookup(dictionary: Dictionary, names: Mapping[str, str], genes: SpeciesGenes) -> np.ndarray:
    """int32[K]: our token, or one of the codes above, for each id of a dictionary.

    `names` are the dictionary's genes of the species (`genes_of`), `genes` the vocabulary's.
    """
    ids = [*dictionary.genes.values(), *dictionary.specials.values()]
    out = np.full(max(ids, default=-1) + 1, UNKNOWN, dtype=np.int32)
    ours = dict(zip(genes.genes.tolist(), genes.tokens.tolist(), strict=True))
    for name, at in dictionary.genes.items():
        out[at] = ours.get(names.get(name, ""), OUTSIDE)
    for name, at in dictionary.specials.items():
        out[at] = _PLACES.get(name, UNKNOWN)
    return out


@jit
def _reid(  # noqa: PLR0917 (a compiled kernel)
    ids: np.ndarray,
    offsets: np.ndarray,
    table: np.ndarray,
    longest: int,
    seen: np.ndarray,
    out: np.ndarray,
    genes: np.ndarray,
    counts: np.ndarray,
    first: np.ndarray,
) -> int:
    written = 0
    for row in range(offsets.shape[0] - 1):
        n = 0
        begin, stop = offsets[row], offsets[row + 1]
        after = (
            END  # what stands behind an id, seen from the end of the sentence: only specials of the end may follow one
        )
        last = stop
        while last > begin and after == END:
            t = int(ids[last - 1])
            after = int(table[t]) if 0 <= t < table.shape[0] else UNKNOWN
            if after == END:
                last -= 1
        counts[1] += stop - last
        for p in range(begin, last):
            t = int(ids[p])
            code = int(table[t]) if 0 <= t < table.shape[0] else UNKNOWN
            if code >= 0 and seen[code] != row + 1:
                seen[code] = row + 1
                if n < longest:
                    out[written] = code
                    written += 1
                n += 1
                continue
            if code >= 0:
                kind = 4
            elif code == FRONT and p == begin:
                kind = 1
            else:
                kind = 3 if code == OUTSIDE else 2
            counts[kind] += 1
            if first[kind] < 0:
                first[kind] = p
        genes[row] = n
        counts[0] += min(n, longest)
        counts[5] += max(n - longest, 0)
    return written


@dataclass(frozen=True, slots=True)
class Sentences:
    """Sentences in our ids, packed."""

    tokens: np.ndarray
    """int32: the first `longest` genes of each cell, one cell after the other."""
    genes_N: np.ndarray
    """int32: different vocabulary genes of each cell, before it is cut."""
    counts: dict[str, int]
    """Ids by what became of them (`COUNTED`)."""
    first: dict[str, int]
    """Position among the T ids of the first that is left out as each kind, -1 for none."""


def reid(ids_T: np.ndarray, offsets_N1: np.ndarray, table_K: np.ndarray, *, size: int, longest: int) -> Sentences:
    """Translate sentences into our ids; order is kept, and of a gene that comes again the first place.

    Args:
        ids_T: the dictionary's ids, integers of any width.
        offsets_N1: int64, where each cell begins, and T.
        table_K: from `lookup`.
        size: our vocabulary's number of ids.
        longest: genes kept of a cell.
    """
    out = np.empty(len(ids_T), dtype=np.int32)
    genes = np.empty(len(offsets_N1) - 1, dtype=np.int32)
    counts, first = np.zeros(len(COUNTED), dtype=np.int64), np.full(len(COUNTED), -1, dtype=np.int64)
    seen = np.zeros(size, dtype=np.int32)
    n = _reid(ids_T, offsets_N1, table_K, longest, seen, out, genes, counts, first)
    return Sentences(
        out[:n],
        genes,
        dict(zip(COUNTED, counts.tolist(), strict=True)),
        dict(zip(COUNTED, first.tolist(), strict=True)),
    )


# Arrow data sets


def data_files(uri: str) -> list[str]:
    """The .arrow files of a data set, in order: those that state.json lists, or all of a folder, or the one file."""
    if not storage.is_folder(uri):
        if not storage.exists(uri) or not uri.endswith(".arrow"):
            state = "not an .arrow file" if storage.exists(uri) else "no such file or folder"
            msg = f"{uri}: {state}; give a folder that save_to_disk wrote, a folder of .arrow files, or one of them"
            raise UserError(msg)
        return [uri]
    names = storage.list_dir(uri)
    if "dataset_dict.json" in names:
        splits = storage.read_json(storage.join(uri, "dataset_dict.json")).get("splits", [])
        msg = f"{uri}: a set of data sets; give one of them: {', '.join(storage.join(uri, s) for s in splits)}"
        raise UserError(msg)
    if "state.json" not in names:
        found = [name for name in names if name.endswith(".arrow")]
    else:
        try:
            state = storage.read_json(storage.join(uri, "state.json"))
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
    return [storage.join(uri, name) for name in found]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the record batches of an Arrow file lie, so that any of them is read alone."""

    start: int
    """First byte of the schema."""
    head: int
    """Bytes of the schema and dictionaries."""
    batches: tuple[tuple[int, int], ...]
    """(first byte, bytes) of each record batch."""


_MAGIC = b"ARROW1"
_MARK = b"\xff\xff\xff\xff"


def layout(file: pa.NativeFile, uri: str) -> Layout:
    """Find the messages of an Arrow IPC file or stream; one that was cut short is a `UserError`."""
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
    with _reading(uri):
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
    """One record batch."""
    pieces = []
    for begin, size in ((where.start, where.head), where.batches[number]):
        file.seek(begin)
        pieces.append(file.read_buffer(size))
    with _reading(uri):
        return pa.ipc.open_stream(pa.BufferReader(b"".join(pieces))).read_next_batch()


def read_schema(file: pa.NativeFile, where: Layout, uri: str) -> pa.Schema:
    """The columns, with Hugging Face's metadata."""
    file.seek(where.start)
    with _reading(uri):
        return pa.ipc.open_stream(pa.BufferReader(file.read(where.head))).schema


class _reading:
    """Arrow's own errors as one line of ours."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, pa.ArrowInvalid | pa.ArrowTypeError | pa.ArrowNotImplementedError) or (
            isinstance(error, OSError) and (storage.is_local(self.uri) or "Expected to be able to read" in str(error))
        ):
            raise _damaged(self.uri, str(error).splitlines()[0] if str(error) else type(error).__name__) from None


def _damaged(uri: str, why: str) -> UserError:
    return UserError(f"{uri}: truncated or not an Arrow file ({why}); fetch it again")


def sentences(batch: pa.RecordBatch, uri: str, row: int) -> tuple[np.ndarray, np.ndarray]:
    """`input_ids` of a batch: ids (T,) of the width they are stored in, and offsets int64 (N + 1,).

    `row` is that of the batch's first cell, for messages.
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
    """Require `input_ids`, a list of integers, and a whole-number `length` where there is one."""
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
    """A column that becomes a column of obs."""

    column: str
    kind: str
    """`str`, `float` or `int`."""
    labels: tuple[str, ...] = ()
    """Names of the values of a Hugging Face ClassLabel."""

    def read(self, batch: pa.RecordBatch) -> pa.Array:
        """Its values as string, float64 or int64."""
        values = batch.column(self.column)
        if self.labels:
            wanted = np.asarray([*self.labels, None], dtype=object)
            codes = values.fill_null(-1).to_numpy(zero_copy_only=False)
            inside = (codes >= 0) & (codes < len(self.labels))
            return pa.array(wanted[np.where(inside, codes, len(self.labels))], pa.string())
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        return values.cast({"str": pa.string(), "float": pa.float64(), "int": pa.int64()}[self.kind])


def attributes(schema: pa.Schema) -> tuple[dict[str, Attribute], list[str]]:
    """The columns that can be kept, by name, and the names of those that cannot (lists, structs, times, bytes)."""
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


def batches(file: pa.NativeFile, where: Layout, uri: str) -> Iterator[pa.RecordBatch]:
    """All record batches in order."""
    for number in range(len(where.batches)):
        yield read_batch(file, where, number, uri)

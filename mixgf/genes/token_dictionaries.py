"""Published token and median dictionaries of the Geneformer models: gene to token id, gene to median.

Most are pickles. They are read by an unpickler that builds only text, numbers and dictionaries, and that calls nothing
which the file names. JSON, Parquet and TSV files are read as well.
"""

from __future__ import annotations

import gzip
import io
import math
import pickle
import re
import struct
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from mixgf.config.data import SpeciesRow
from mixgf.errors import UserError
from mixgf.storage import files, tables

MAX_DICTIONARY_BYTES = 256 << 20
MAX_ID = 1 << 24
MAX_ENTRIES = 1 << 22
MAX_DEPTH = 8
"""Levels of tuples in tuples; a numpy scalar needs two."""
_KEYS = ("gene", "key", "ensembl_id")


class _Dtype:
    """A numpy scalar type as a pickle describes it; never handed to numpy as an object."""

    __slots__ = ("code",)

    def __init__(self, code: str) -> None:
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1]
        if order not in ("<", ">", "=", "|"):
            msg = f"it holds byte order {order!r}"
            raise pickle.UnpicklingError(msg)
        self.code = order + self.code.lstrip("<>=|")


_ReadOpcode: TypeAlias = Callable[[pickle.Unpickler], None]


class _Unpickler(pickle._Unpickler):  # the one in Python, whose opcodes can be bounded
    """Unpickler for text, numbers, numpy scalars and dictionaries; any other global in the file is an error.

    The allowed names are bound to methods of this class, so a file cannot call functions of numpy or Python. Tuples are bounded in
    depth: the time to hash a tuple of tuples doubles with each level.
    """

    dispatch: ClassVar[dict[int, _ReadOpcode]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._depth: dict[int, int] = {}

    def bound(self) -> None:
        """Check the tuple that was made last."""
        made = getattr(self, "stack")[-1]  # noqa: B009 (typeshed does not know it)
        depth = 1 + max((self._depth.get(id(part), 0) for part in made if isinstance(part, tuple)), default=0)
        self._depth[id(made)] = depth
        if depth > MAX_DEPTH:
            msg = f"it holds tuples in tuples, {depth} deep"
            raise pickle.UnpicklingError(msg)

    def find_class(self, module: str, name: str) -> Any:
        """Replacement for an allowed global; any other is an error that names it."""
        allowed = {
            ("numpy", "dtype"): self._dtype,
            ("numpy.core.multiarray", "scalar"): self._scalar,
            ("numpy._core.multiarray", "scalar"): self._scalar,
            ("_codecs", "encode"): self._encode,  # bytes in protocols before 3
            ("collections", "OrderedDict"): OrderedDict,
            ("collections", "defaultdict"): defaultdict,
        }
        allowed |= {(home, kind.__name__): kind for home in ("builtins", "__builtin__") for kind in (int, float)}
        allowed["__builtin__", "long"] = int  # as protocols before 3 call it
        if (module, name) not in allowed:
            msg = f"it names the global {module}.{name}"
            raise pickle.UnpicklingError(msg)
        return allowed[module, name]

    def persistent_load(self, _pid: Any) -> Any:
        """References to objects outside the file are an error."""
        msg = "it refers to something outside the file"
        raise pickle.UnpicklingError(msg)

    def _dtype(self, code: str, *_: Any) -> _Dtype:
        if not re.fullmatch(r"[<>=|]?[iuf][1248]", code):
            msg = f"it holds numpy values of type {code!r}"
            raise pickle.UnpicklingError(msg)
        return _Dtype(code)

    def _scalar(self, kind: _Dtype, data: bytes) -> int | float:
        if not isinstance(kind, _Dtype) or not isinstance(data, bytes):
            msg = "it holds a malformed numpy scalar"
            raise pickle.UnpicklingError(msg)
        dtype = np.dtype(kind.code)
        if len(data) != dtype.itemsize:
            msg = "it holds a malformed numpy scalar"
            raise pickle.UnpicklingError(msg)
        return np.frombuffer(data, dtype)[0].item()

    def _encode(self, text: str, encoding: str = "") -> bytes:
        if encoding != "latin1":
            msg = f"it encodes text as {encoding!r}"
            raise pickle.UnpicklingError(msg)
        return text.encode("latin1")


def _bounded(read: _ReadOpcode) -> _ReadOpcode:
    def bounded(self: pickle.Unpickler) -> None:
        assert isinstance(self, _Unpickler)
        read(self)
        self.bound()

    return bounded


for _code in (pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3):
    _Unpickler.dispatch[_code[0]] = _bounded(_Unpickler.dispatch[_code[0]])

PICKLE_ERRORS = (
    pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError, ImportError, OverflowError, MemoryError,
    RecursionError, struct.error,
)  # fmt: skip


def load_pickle(data: bytes, where: str) -> dict[Any, Any]:
    """Read a pickled dictionary of text and numbers.

    Args:
        data: bytes of the pickle.
        where: name of the file, for messages.

    Raises:
        UserError: the pickle holds anything else, or is not a dictionary.
    """
    try:
        found = _Unpickler(io.BytesIO(data)).load()
    except PICKLE_ERRORS as error:
        msg = (
            f"{where}: refused: {str(error) or type(error).__name__}; a pickled dictionary needs only text and numbers. "
            "Check where it comes from, or give it as JSON or TSV"
        )
        raise UserError(msg) from None
    if isinstance(found, dict) and (
        len(found) > MAX_ENTRIES or any(type(v) is int and v.bit_length() > 64 for v in found.values())
    ):
        msg = f"{where}: refused: it holds more than {MAX_ENTRIES:,} entries, or numbers of more than 64 bits; check where it comes from"
        raise UserError(msg)
    if not isinstance(found, dict):
        msg = f"{where}: holds a {type(found).__name__}; must be a dictionary of gene to number"
        raise UserError(msg)
    return found


def _read_mapping(uri: str, field: str, value: str) -> dict[str, Any] | None:
    """Gene to `value` (token or median) from a file of any format; None for a table without that column."""
    where = f"{field} = {uri!r}"
    if not files.exists(uri) or files.is_folder(uri):
        msg = f"{where}: no such file; give a pickle, JSON, Parquet or TSV file of gene and {value}"
        raise UserError(msg)
    if files.size(uri) > MAX_DICTIONARY_BYTES:
        msg = f"{where}: {files.size(uri):,} bytes; a dictionary has at most {MAX_DICTIONARY_BYTES:,}"
        raise UserError(msg)
    found: Any
    if uri.endswith((".pkl", ".pickle")):
        found = load_pickle(files.read_bytes(uri), where)
    elif uri.endswith(".json"):
        try:
            found = files.read_json(uri)
        except ValueError as error:
            msg = f"{where}: not JSON ({error}); give an object of gene to {value}"
            raise UserError(msg) from None
        if not isinstance(found, dict):
            msg = f"{where}: holds a {type(found).__name__}; must be an object of gene to {value}"
            raise UserError(msg)
    else:
        table = _table(uri, where)
        key = next((name for name in _KEYS if name in table.column_names), None)
        if key is None:
            msg = f"{where}: has columns {', '.join(table.column_names)}; must have gene (or key) and {value}"
            raise UserError(msg)
        if value not in table.column_names:
            return None
        names = table[key].to_pylist()
        found = dict(zip(names, table[value].to_pylist(), strict=True))
        if len(found) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            msg = f"{where}: {twice!r} stands in it twice; keep one row per gene"
            raise UserError(msg)
    odd = next((k for k in found if not isinstance(k, str)), None)
    if odd is not None:
        msg = f"{where}: key {odd!r} is not text; must be gene to {value} (not {value} to gene)"
        raise UserError(msg)
    return found


def _table(uri: str, where: str) -> pa.Table:
    try:
        if uri.endswith(".parquet"):
            return tables.read_table(uri)
        data = files.read_bytes(uri)
        text = gzip.decompress(data) if uri.endswith(".gz") else data
        strings = {name: pa.string() for name in _KEYS}
        return pa_csv.read_csv(
            io.BytesIO(text),
            parse_options=pa_csv.ParseOptions(delimiter="\t"),
            convert_options=pa_csv.ConvertOptions(column_types=strings, strings_can_be_null=False),
        )
    except (pa.ArrowInvalid, EOFError, gzip.BadGzipFile) as error:
        msg = f"{where}: not a readable table ({str(error).splitlines()[0]}); give a pickle (.pkl), JSON, Parquet or TSV file"
        raise UserError(msg) from None


@dataclass(frozen=True, slots=True)
class TokenDictionary:
    """A token dictionary: genes and special tokens to ids."""

    uri: str
    genes: dict[str, int]
    """Gene, as the dictionary spells it, to token id."""
    specials: dict[str, int]
    """Special token, such as `<pad>`, to token id."""


def read_token_dictionary(uri: str, field: str = "dictionary") -> TokenDictionary:
    """Read a token dictionary; `field` is the config field that names it, for messages.

    Raises:
        UserError: not a dictionary of names to distinct whole numbers from 0.
    """
    found = _read_mapping(uri, field, "token")
    where = f"{field} = {uri!r}"
    if found is None:
        msg = f"{where}: no column token; give gene (or key) and token"
        raise UserError(msg)
    owner: dict[int, str] = {}
    for name, value in found.items():
        if type(value) is not int or not 0 <= value < MAX_ID:
            msg = f"{where}: id of {name} is {value!r}; must be a whole number from 0, below {MAX_ID:,}"
            raise UserError(msg)
        if owner.setdefault(value, name) != name:
            msg = f"{where}: {owner[value]} and {name} have the same id {value}; every id must be one gene's"
            raise UserError(msg)
    special = re.compile(r"<[^<>]*>")
    genes = {k: v for k, v in found.items() if not special.fullmatch(k)}
    return TokenDictionary(uri, genes, {k: v for k, v in found.items() if k not in genes})


def read_medians(uri: str, field: str = "medians") -> dict[str, float] | None:
    """Read a median dictionary or table: gene to median above 0; entries without a median are left out.

    Returns:
        None for a table without a column median, such as a token dictionary in TSV.

    Raises:
        UserError: a median that is not a number above 0.
    """
    found = _read_mapping(uri, field, "median")
    if found is None:
        return None
    out = {}
    for name, value in found.items():
        if value is None or (isinstance(value, float) and math.isnan(value)):
            continue
        if type(value) not in (int, float) or not 0 < value < math.inf:
            msg = f"{field} = {uri!r}: median of {name} is {value!r}; must be a number above 0"
            raise UserError(msg)
        out[name] = float(value)
    return out


def genes_of_species(
    names: Iterable[str], species: str, rows: Iterable[SpeciesRow], known: Mapping[str, set[str]]
) -> dict[str, str]:
    """Names of genes of one species, to Ensembl ids without version.

    A gene belongs to the species whose gene table has it, else to the species with the longest matching id prefix.
    Retired ids of published dictionaries thus keep their species. ENSGR ids (pseudoautosomal copies on Y in old Ensembl
    releases) count as genes of their own.

    Args:
        names: genes as a dictionary spells them; names of other species are left out.
        species: name of the species.
        rows: all species.
        known: Ensembl ids of each species' gene table, by the species' name.
    """
    ordered = sorted(rows, key=lambda row: -len(row.gene_prefix))
    prefixes = [(row.name, re.compile(re.escape(row.gene_prefix) + r"R?\d+")) for row in ordered]
    out = {}
    for name in names:
        bare = name if any(name in genes for genes in known.values()) else re.sub(r"\.\d+$", "", name)
        owner = next((row.name for row in ordered if bare in known[row.name]), None)
        owner = owner or next((owner for owner, pattern in prefixes if pattern.fullmatch(bare)), None)
        if owner == species:
            out[name] = bare
    return out

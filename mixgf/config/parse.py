"""The configuration of a whole run: frozen dataclasses, dotted overrides, JSON, fingerprints.

Nothing heavy is imported here, so that `--help`, `--print-config` and validation answer at once.
A run is a `Config`; a recipe (`mixgf.config.recipes`) is a function that returns one; `--set a.b=c` replaces one field;
the recorded JSON repeats the run. Units and special values stand under each field.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from mixgf.config.run import Config
from mixgf.errors import UserError

T = TypeVar("T")

RENAMED = {
    "classify.fewer_seeds": "classify.seeds_per_model",
    "objective.gather": "objective.gather_negatives",
    "perturb.known": "perturb.reference_genes",
    "perturb.mode": "perturb.test (honest is now donor, paper is published)",
    "tune.judge": "tune.head",
}
"""Fields of earlier configs and what they are called now; an old name is refused with the new one."""


# JSON, overrides, fingerprints


def meanings() -> dict[tuple[str, str], str]:
    """Section and field of a config to what the field means: the docstring behind it in this file."""
    sections = {part.type: part.name for part in dataclasses.fields(Config)}
    found = {}
    code = "".join(p.read_text(encoding="utf-8") for p in sorted(Path(__file__).parent.glob("*.py")))
    for part in ast.parse(code).body:
        if isinstance(part, ast.ClassDef) and part.name in sections:
            for one, after in pairwise(part.body):
                if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and isinstance(after, ast.Expr):
                    found[sections[part.name], one.target.id] = " ".join(str(ast.literal_eval(after.value)).split())
    return found


def to_dict(config: Any) -> dict[str, Any]:
    """The plain JSON form of a config or of one of its sections."""
    return typing.cast("dict[str, Any]", json.loads(json.dumps(dataclasses.asdict(config))))


def from_dict(cls: type[T], data: dict[str, Any], path: str = "") -> T:
    """Build a config section from its JSON form; unknown or ill-typed fields are a `UserError`."""
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        name = _join(path, unknown[0])
        now = f"is now {RENAMED[name]}" if name in RENAMED else f"unknown field; known here: {', '.join(sorted(hints))}"
        msg = f"{name}: {now}"
        raise UserError(msg)
    try:
        return cls(**{k: _coerce(hints[k], v, _join(path, k)) for k, v in data.items()})
    except TypeError as error:  # a required field is missing; the constructor names it
        msg = f"{path or cls.__name__}: {str(error).split('() ')[-1]}"
        raise UserError(msg) from None


def override(config: Config, assignments: list[str]) -> Config:
    """Apply `a.b=c` assignments; values are JSON where they parse as JSON, else plain text."""
    data = to_dict(config)
    for assignment in assignments:
        path, eq, text = assignment.partition("=")
        if not eq:
            msg = f"--set {assignment}: must look like section.field=value"
            raise UserError(msg)
        node, cls = data, typing.cast("Any", Config)
        *parents, leaf = path.strip().split(".")
        for i, name in enumerate(parents):
            cls = typing.get_type_hints(cls).get(name) if dataclasses.is_dataclass(cls) else None
            if not dataclasses.is_dataclass(cls):
                where = ".".join(parents[: i + 1])
                msg = f"--set {assignment}: {where!r} is no section; sections: {', '.join(sections())}"
                raise UserError(msg)
            node = node[name]
        hints = typing.get_type_hints(cls)
        if leaf not in hints:
            now = RENAMED.get(path.strip())
            msg = (
                f"--set {assignment}: {path.strip()} is now {now}"
                if now
                else (f"--set {assignment}: no field {leaf!r}; known: {', '.join(sorted(hints))}")
            )
            raise UserError(msg)
        node[leaf] = _parse(hints[leaf], text)
    return from_dict(Config, data)


def sections() -> list[str]:
    """Names of the nested sections of `Config`."""
    return [k for k, t in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(t)]


def flat(data: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested plain data by dotted name."""
    rows: dict[str, Any] = {}
    for key, value in data.items():
        name = _join(path, key)
        rows |= flat(value, name) if isinstance(value, dict) else {name: value}
    return rows


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of plain data; anything without a stable form raises `TypeError`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def difference(old: Any, new: Any, path: str = "") -> list[str]:
    """Dotted fields in which two plain-JSON values differ, as `path: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines: list[str] = []
        for key in sorted(set(old) | set(new)):
            lines += difference(old.get(key), new.get(key), _join(path, key))
        return lines
    return [] if old == new else [f"{path}: {json.dumps(old)} -> {json.dumps(new)}"]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _parse(hint: Any, text: str) -> Any:
    if hint is str:
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        # a bare list of words for tuple[str, ...]; a bare word elsewhere is refused by _coerce
        return [part.strip() for part in text.split(",")] if typing.get_origin(hint) is tuple else text


def _coerce(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            msg = f"{path} = {value!r}: must be an object with fields {', '.join(typing.get_type_hints(hint))}"
            raise UserError(msg)
        return from_dict(typing.cast("type[Any]", hint), value, path)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_coerce(item, v, f"{path}[{i}]") for i, v in enumerate(values))
    assert not isinstance(hint, types.UnionType), f"{path}: config fields have one type"
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        msg = f"{path} = {value!r}: must be {'true or false' if hint is bool else hint.__name__}"
        raise UserError(msg)
    return value

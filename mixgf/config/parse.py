"""Configs as data: JSON, `--set a.b=c`, fingerprints, and the field meanings that `--help` prints.

Nothing heavy is imported here, so that `--help`, `--print-config` and validation answer at once.

`--set` has one grammar, `section.field=value`. The value is JSON where it parses as JSON. Two shorthands save quotes: a list may
be `a,b,c`, and a mapping may be `name=value,name=value`.
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

from mixgf.config.checks import SHOWN, did_you_mean, shown, split_named
from mixgf.config.data import Source
from mixgf.config.fields import Facts, facts_of, required_names
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
"""Fields of earlier configs and their present names. An old name is refused with the present one."""
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
"""Types as a person calls them."""


def meanings() -> dict[tuple[str, str], str]:
    """Section and field to what the field means: the docstring behind the field in this package, and the allowed values."""
    parts = {part.type: part.name for part in dataclasses.fields(Config)}
    classes = {name: hint for name, hint in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(hint)}
    found = {}
    code = "".join(p.read_text(encoding="utf-8") for p in sorted(Path(__file__).parent.glob("*.py")))
    for part in ast.parse(code).body:
        if isinstance(part, ast.ClassDef) and part.name in parts:
            section = parts[part.name]
            facts = facts_of(classes[section])
            for one, after in pairwise(part.body):
                if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and isinstance(after, ast.Expr):
                    name = one.target.id
                    text = " ".join(str(ast.literal_eval(after.value)).split())
                    found[section, name] = text + _limits(facts[name])
    return found


def _limits(facts: Facts) -> str:
    """The allowed values and the unit of a field, as an ending of its description."""
    known = [f"unit: {facts.unit}"] if facts.unit else []
    known += [facts.allowed] if facts.allowed and not facts.choices else []
    return f" [{'; '.join(known)}]" if known else ""


class DuplicateKeyError(ValueError):
    """A JSON object has one key twice."""


def read_json(text: str | bytes) -> Any:
    """The value of JSON text. A key that an object has twice is an error, not a choice of the last one.

    Raises:
        ValueError: The text is no JSON.
        DuplicateKeyError: An object has a key twice.
    """
    return json.loads(text, object_pairs_hook=_unique_keys)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for i, key in enumerate(keys) if key in keys[:i])
        msg = f"the key {shown(twice)} is given twice; keep one"
        raise DuplicateKeyError(msg)
    return found


def to_dict(config: Any) -> dict[str, Any]:
    """The plain JSON form of a config or of one of its sections."""
    return typing.cast("dict[str, Any]", json.loads(json.dumps(dataclasses.asdict(config))))


def from_dict(cls: type[T], data: dict[str, Any], path: str = "") -> T:
    """Build a config or a section from its JSON form.

    Raises:
        UserError: A field is unknown, missing or of the wrong type, or its value is not allowed.
    """
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        name = _join(path, unknown[0])
        now = (
            f"is now {RENAMED[name]}"
            if name in RENAMED
            else f"unknown field; {did_you_mean(unknown[0], sorted(hints), 'known:')}"
        )
        msg = f"{name}: {now}"
        raise UserError(msg)
    missing = [name for name in required_names(cls) if name not in data]
    if missing:
        msg = f"{path}.{missing[0]}: missing; an object here has the fields {', '.join(hints)}"
        raise UserError(msg)
    named = {name: dict(facts.named) for name, facts in facts_of(cls).items() if facts.named}
    values = {k: named[k].get(v, v) if k in named and isinstance(v, str) else v for k, v in data.items()}
    return cls(**{k: _coerce(hints[k], v, _join(path, k)) for k, v in values.items()})


def override(config: Config, assignments: list[str]) -> Config:
    """Apply `a.b=c` assignments to a config.

    Raises:
        UserError: An assignment names no field, or its value is not allowed there.
    """
    data = to_dict(config)
    for assignment in assignments:
        path, eq, text = assignment.partition("=")
        if not eq:
            msg = f"--set {assignment[:SHOWN]}: must look like section.field=value"
            raise UserError(msg)
        node, cls = data, typing.cast("Any", Config)
        *parents, leaf = path.strip().split(".")
        if parents[:1] == ["sources"]:
            _set_sources(data["sources"], parents[1:], leaf, text, assignment)
            continue
        for i, name in enumerate(parents):
            cls = typing.get_type_hints(cls).get(name) if dataclasses.is_dataclass(cls) else None
            if not dataclasses.is_dataclass(cls):
                where = ".".join(parents[: i + 1])
                msg = f"--set {assignment[:SHOWN]}: no section {where!r}; {did_you_mean(name, sections(), 'sections:')}"
                raise UserError(msg)
            node = node[name]
        hints = typing.get_type_hints(cls)
        if leaf not in hints:
            now = RENAMED.get(path.strip())
            known = f"no field {leaf!r}; {did_you_mean(leaf, sorted(hints), 'known:')}"
            msg = f"--set {assignment[:SHOWN]}: {f'{path.strip()} is now {now}' if now else known}"
            raise UserError(msg)
        node[leaf] = _read_value(hints[leaf], text, facts_of(cls)[leaf])
    return from_dict(Config, data)


def _set_sources(rows: list[dict[str, Any]], which: list[str], field: str, text: str, assignment: str) -> None:
    """Apply `sources.FIELD=value` to all sources, or `sources.N.FIELD=value` to number N, from 0."""
    hints = typing.get_type_hints(Source)
    numbers = [int(n) for n in which if n.isdigit() and int(n) < len(rows)]
    if field not in hints or len(numbers) < len(which) or len(which) > 1 or not rows:
        how = "sources.FIELD=value for all sources, or sources.N.FIELD=value for one"
        there = f"there are {len(rows)} sources, from 0; fields: {', '.join(hints)}"
        msg = f"--set {assignment}: must look like {how}; {there}"
        raise UserError(msg)
    for row in (rows[i] for i in numbers) if which else rows:
        row[field] = _read_value(hints[field], text, facts_of(Source)[field])


def sections() -> list[str]:
    """Names of the nested sections of `Config`."""
    return [k for k, t in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(t)]


def by_field(config: Config) -> dict[str, Any]:
    """Every field's plain value by dotted name, such as `train.lr`; a mapping is one value."""
    parts = sections()
    rows: dict[str, Any] = {}
    for name, value in to_dict(config).items():
        rows |= {f"{name}.{field}": v for field, v in value.items()} if name in parts else {name: value}
    return rows


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


def _read_value(hint: Any, text: str, facts: Facts) -> Any:
    """The text of `--set` as plain data: JSON, or one of the shorthands for lists and mappings."""
    if hint is str:
        return text
    try:
        return read_json(text)
    except DuplicateKeyError as error:
        msg = f"--set: {error}"
        raise UserError(msg) from None
    except (ValueError, RecursionError):
        parts = [part.strip() for part in text.split(",")]
    if typing.get_origin(hint) is tuple:
        return parts
    return _read_pairs(hint, text, parts, facts) if typing.get_origin(hint) is Mapping else text


def _read_pairs(hint: Any, text: str, parts: list[str], facts: Facts) -> Any:
    """The shorthand `name=value,name=value` as a mapping; text of another form as it is, which `_coerce` refuses."""
    if facts.shared_name:
        pairs = [(name or facts.shared_name, value) for name, value in map(split_named, parts)]
    else:
        pairs = [(name.strip(), value.strip()) for name, eq, value in (part.partition("=") for part in parts) if eq]
    value_hint = typing.get_args(hint)[1]
    found = {name: _read_value(value_hint, value, Facts()) for name, value in pairs if name}
    return found if len(found) == len(parts) else text


def _coerce(hint: Any, value: Any, path: str) -> Any:
    """Plain JSON data as a value of the type `hint`; a `UserError` that says what is allowed where it is none."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            fields = ", ".join(typing.get_type_hints(hint))
            msg = f"{path} = {shown(value)}: must be an object with fields {fields}"
            raise UserError(msg)
        return from_dict(typing.cast("type[Any]", hint), value, path)
    if origin is tuple:
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_coerce(arguments[0], v, f"{path}[{i}]") for i, v in enumerate(values))
    if origin is Mapping:
        if not isinstance(value, Mapping):
            msg = f"{path} = {shown(value)}: must be {_mapping_form(value, arguments[1])}"
            raise UserError(msg)
        return {str(name): _coerce(arguments[1], v, f"{path}[{name}]") for name, v in value.items()}
    allowed = [
        one for part in (arguments if origin in (types.UnionType, typing.Union) else (hint,)) for one in _options(part)
    ]
    for one in allowed:
        if value == one if isinstance(one, str) else type(value) is one:
            return value
    if float in allowed and type(value) is int and abs(value) < 1e300:
        return float(value)
    words = " or ".join(repr(one) if isinstance(one, str) else _WORDS[one] for one in allowed)
    msg = f"{path} = {shown(value)}: must be {words}"
    raise UserError(msg)


def _options(hint: Any) -> tuple[Any, ...]:
    """The types and words of one part of a union."""
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else (hint,)


def _mapping_form(value: Any, hint: Any) -> str:
    """What a mapping looks like. A value in the form of earlier versions (NAME=VALUE, NAME=A|B, a=[1] x b=[2]) is translated."""
    items = [part for item in (value if isinstance(value, list) else [value]) for part in str(item).split(" x ")]
    pairs = [item.partition("=") for item in items]
    if not all(eq for _, eq, _ in pairs):
        return "a JSON object of names and values"
    several = typing.get_origin(hint) is tuple
    now = {
        name.strip(): _read_value(hint, text.replace("|", ",") if several else text, Facts()) for name, _, text in pairs
    }
    return f"a JSON object of names and values, here {json.dumps(now)}"

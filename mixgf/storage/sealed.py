"""JSON objects with a checksum: the field `seal` is the SHA-256 of all others. Reading compares it.

An object without a seal, of an earlier version, is read without the check.
"""

from __future__ import annotations

import json
from typing import Any

from mixgf.config.parse import fingerprint, read_json
from mixgf.storage import files
from mixgf.storage.damage import damaged

_SEAL = "seal"


def sealed_bytes(value: dict[str, Any]) -> bytes:
    """The object as JSON with its seal, without secrets."""
    plain = json.loads(files.json_bytes({name: part for name, part in value.items() if name != _SEAL}))
    return files.json_bytes(plain | {_SEAL: fingerprint(plain)})


def write_sealed(uri: str, value: dict[str, Any]) -> None:
    """Write an object atomically, with its seal."""
    files.write_bytes(uri, sealed_bytes(value))


def read_sealed(uri: str) -> dict[str, Any]:
    """The object, without its seal.

    Raises:
        UserError: It is not what was written, or no JSON object.
    """
    try:
        return unsealed(files.read_bytes(uri))
    except ValueError as error:
        raise damaged(uri, str(error)) from None


def unsealed(data: bytes) -> dict[str, Any]:
    """The object of some JSON, without its seal; a `ValueError` if it is not what was written, or no JSON object."""
    value = read_json(data)
    if not isinstance(value, dict):
        msg = "not a JSON object"
        raise ValueError(msg)
    seal = value.pop(_SEAL, None)
    if seal != fingerprint(value) if seal is not None else _has_seal(value):
        msg = "it is not what was written"
        raise ValueError(msg)
    return value


def _has_seal(value: dict[str, Any]) -> bool:
    """Whether a field of another name holds the seal: its name is damaged."""
    looks = [name for name, part in value.items() if isinstance(part, str) and len(part) == 64]
    return any(value[name] == fingerprint({k: v for k, v in value.items() if k != name}) for name in looks)

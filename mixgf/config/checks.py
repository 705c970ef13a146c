"""Moved here from mixgf/config.py."""

from __future__ import annotations

from mixgf.errors import UserError


def _require(ok: bool, path: str, value: object, allowed: str) -> None:  # noqa: FBT001 (a predicate reads better first)
    if not ok:
        msg = f"{path} = {value!r}: must be {allowed}"
        raise UserError(msg)


def _one_of(path: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, path, value, "one of " + ", ".join(repr(a) for a in allowed))


def split_named(text: str) -> tuple[str, str]:
    """`name=URI` or a bare `URI` as (name or "", URI)."""
    name, eq, uri = text.partition("=")
    return (name.strip(), uri.strip()) if eq and not set(name) & set("/:\\") else ("", text.strip())

"""One-line refusals of config values, and the NAME=URI form of command-line arguments."""

from __future__ import annotations

from mixgf.errors import UserError


def require(ok: bool, path: str, value: object, allowed: str) -> None:  # noqa: FBT001 (a condition reads better first)
    """Raise a `UserError` that names the field, its value and what is allowed, unless `ok`."""
    if not ok:
        msg = f"{path} = {value!r}: must be {allowed}"
        raise UserError(msg)


def split_named(text: str) -> tuple[str, str]:
    """`name=URI` or a bare `URI` as (name or "", URI)."""
    name, eq, uri = text.partition("=")
    return (name.strip(), uri.strip()) if eq and not set(name) & set("/:\\") else ("", text.strip())

"""One-line refusals of config values, and the NAME=URI form of command-line arguments."""

from __future__ import annotations

from collections.abc import Iterable

from mixgf.errors import UserError

SHOWN = 120
"""Characters of a value that a message shows."""


def require(ok: bool, path: str, value: object, allowed: str) -> None:  # noqa: FBT001 (a condition reads better first)
    """Raise a `UserError` that names the field, its value and what is allowed, unless `ok`."""
    if not ok:
        msg = f"{path} = {shown(value)}: must be {allowed}"
        raise UserError(msg)


def shown(value: object) -> str:
    """A value as Python text, cut to `SHOWN` characters for a message of one line."""
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def split_named(text: str) -> tuple[str, str]:
    """`name=URI` or a bare `URI` as (name or "", URI)."""
    name, eq, uri = text.partition("=")
    return (name.strip(), uri.strip()) if eq and not set(name) & set("/:\\") else ("", text.strip())


def did_you_mean(name: str, known: Iterable[str], title: str = "there are") -> str:
    """The closest of the known names, where one is close, and all of them."""
    from difflib import get_close_matches  # noqa: PLC0415 (a wrong name is rare, and this takes time to import)

    names = list(known)
    close = get_close_matches(name, names, 1)
    return (f"did you mean {close[0]!r}? " if close else "") + f"{title} {', '.join(names)}"

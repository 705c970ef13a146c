"""Models by name: those that were pulled to this machine, and those that travel with the package.

A model is a folder with `model.json`, which lists its files with their sizes and SHA-256. It is written last: without it, there
is no model. Names are looked up in the folder of MIXGF_MODELS (else ~/.cache/mixgf/models), then in the package.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mixgf.errors import UserError
from mixgf.storage import files

MANIFEST = "model.json"
FORMAT = 1
"""Version of the layout of a model's folder."""
BUNDLED = "resource:models"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def home() -> str:
    """Folder of the models of this machine."""
    return os.environ.get("MIXGF_MODELS", "") or str(Path("~/.cache/mixgf/models").expanduser())


def require_name(name: str) -> str:
    """The name, if it can be one.

    Raises:
        UserError: it cannot.
    """
    if not _NAME.fullmatch(name):
        msg = f"NAME {name!r}: must be letters, digits, dots, dashes and underscores, for example pancreas"
        raise UserError(msg)
    return name


def resolve(uri: str) -> str:
    """The folder of a model, given its name; anything else, and a name that is also a file or folder here, stays as it is."""
    if not _NAME.fullmatch(uri) or files.exists(uri):
        return uri
    for place in (home(), BUNDLED):
        folder = files.join(place, uri)
        if files.exists(files.join(folder, MANIFEST)):
            return folder
    return uri


def names() -> list[str]:
    """Names of the models that can be loaded here."""
    found = [name for place in (home(), BUNDLED) for name in files.list_dir(place)]
    return sorted({name for name in found if resolve(name) != name})


def manifest(folder: str) -> dict[str, Any] | None:
    """What is known of a model; None = there is none in this folder.

    Raises:
        UserError: it is of another format, or names files outside its folder.
    """
    where = files.join(folder, MANIFEST)
    if not files.exists(where):
        return None
    found = dict(files.read_json(where))
    if found.get("format") != FORMAT:
        msg = f"{where}: a model of format {found.get('format')}, this mixgf reads {FORMAT}; use the mixgf that made it ({found.get('code')})"
        raise UserError(msg)
    for name in found["files"]:
        if name.startswith(("/", "\\")) or ".." in name.replace("\\", "/").split("/") or ":" in name:
            msg = f"{where}: names a file outside its folder ({name!r}); it is not used"
            raise UserError(msg)
    return found


def copy(source: str, to: str) -> dict[str, Any]:
    """Copy a model, with every file's size and SHA-256 checked; returns its manifest.

    Args:
        source: Folder of the model.
        to: Folder that holds no model, or an equal one.

    Raises:
        UserError: there is no model at `source`, a file is missing or not as listed, or `to` holds another model.
    """
    found = manifest(source)
    if found is None:
        msg = f"{source}: no model there (no {MANIFEST}); `mixgf push` makes one"
        raise UserError(msg)
    there = manifest(to)
    if there is not None and there["files"] != found["files"]:
        msg = f"{to}: holds another model of this name; remove it, or take another name"
        raise UserError(msg)
    for name, wanted in found["files"].items():
        target = files.join(to, name)
        if files.exists(target) and _is(target, wanted):
            continue
        origin = files.join(source, name)
        if not files.exists(origin):
            msg = f"{origin}: missing; the model is not whole, push it again"
            raise UserError(msg)
        files.copy(origin, target)
        if not _is(target, wanted):
            files.remove(target)
            msg = f"{origin}: not the bytes that {MANIFEST} lists; the copy was removed, push the model again"
            raise UserError(msg)
    files.write_json(files.join(to, MANIFEST), found)
    return found


def _is(uri: str, wanted: dict[str, Any]) -> bool:
    return files.size(uri) == wanted["bytes"] and files.sha256(uri) == wanted["sha256"]

"""One line for a file that is not what was written, with the way to make it again."""

from __future__ import annotations

from mixgf.errors import DamagedError, StorageError
from mixgf.storage import files

MAKERS = {
    "vocabulary": "mixgf prepare",
    "corpus": "mixgf prepare",
    "checkpoint": "mixgf pretrain",
    "embeddings": "mixgf embed",
    "classification": "mixgf classify",
    "classifier": "mixgf classify",
    "perturbation": "mixgf perturb",
    "comparison": "mixgf compare",
    "sweep": "mixgf tune",
    "gene_vectors": "mixgf pretrain",
    "neighbours": "mixgf pretrain",
}
"""Kind of artifact to the command that makes it."""
_ABOVE = 5
"""Folders above a file in which the artifact that it belongs to is looked for."""


def damaged(uri: str, why: str) -> DamagedError:
    """The error of a file that cannot be read, or is not what was written; the message says how to make it again."""
    return DamagedError(f"{uri}: damaged ({why}); {_way_out(uri)}")


def _way_out(uri: str) -> str:
    folder = uri
    for _ in range(_ABOVE):
        folder = folder.rpartition("/")[0]
        if not folder or folder.endswith(":/"):
            break
        kinds = {name: _kind(files.join(folder, f"{name}.json")) for name in ("record", "plan")}
        if kinds["record"]:
            maker = MAKERS.get(kinds["record"], "the command that made it")
            return f"restore it from a copy, or remove {folder} and make it again with `{maker}`"
        if kinds["plan"]:
            return "remove it, and the command that was not finished makes it again"
    return "restore it from a copy"


def _kind(uri: str) -> str:
    """Kind of the artifact of a record; empty where there is none, or it cannot be read."""
    try:
        return str(dict(files.read_json(uri)).get("kind", ""))
    except (ValueError, TypeError, FileNotFoundError, NotADirectoryError, IsADirectoryError, StorageError):
        return ""

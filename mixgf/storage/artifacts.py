"""Artifacts: output folders with a record of what they hold and what they were made from.

Files are written one by one, each atomically. `record.json` is written last: without it, an artifact counts as missing. Until
then `plan.json` says what is being made, so that only the same plan continues a killed run.

The fingerprint covers kind, schema, the config fields that decide the content, and the parents' fingerprints. If it is equal,
there is nothing to do. If it differs, an error lists the differing fields. Nothing is overwritten without being asked for.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa

import mixgf
from mixgf.config.parse import difference, fingerprint
from mixgf.console import say
from mixgf.errors import DamagedError, UserError
from mixgf.storage import layout, lease
from mixgf.storage.damage import MAKERS
from mixgf.storage.files import create_bytes, exists, join, read_bytes, remove, sha256, size
from mixgf.storage.sealed import sealed_bytes, unsealed, write_sealed
from mixgf.storage.tables import read_table, write_table

_SHARED = ("corpus", "vocabulary", "gene_vectors", "neighbours")
"""Kinds on whose parts several drivers work at a time; see `build_or_reuse`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """What an artifact holds and what it was made from."""

    kind: str
    schema: int
    """Version of the kind's file layout and config."""
    fingerprint: str
    """SHA-256 (hex) of kind, schema, config and parents."""
    config: dict[str, Any]
    """The part of the config that decides the content."""
    parents: dict[str, str]
    """Role to fingerprint of each artifact that it was made from."""
    code: str
    """Version of the code that made it, with the commit if known."""
    created: str
    """UTC time at which the plan was made."""
    counts: dict[str, Any] = field(default_factory=dict)
    files: dict[str, Any] = field(default_factory=dict)
    """Name to bytes and SHA-256."""
    details: dict[str, Any] = field(default_factory=dict)


@cache
def code_version() -> str:
    """The package's version, with the commit in a git checkout."""
    root = Path(mixgf.__file__).parent.parent
    if not (root / ".git").exists():
        return mixgf.__version__
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"{mixgf.__version__}+{found.stdout.strip()}" if found.returncode == 0 else mixgf.__version__


def plan(kind: str, schema: int, config: dict[str, Any], parents: dict[str, str]) -> Record:
    """The record of an artifact that is to be made."""
    digest = fingerprint({"kind": kind, "schema": schema, "config": config, "parents": parents})
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Record(
        kind=kind, schema=schema, fingerprint=digest, config=config, parents=parents, code=code_version(), created=now
    )


def _read(uri: str, name: str) -> Record | None:
    where = join(uri, name)
    if not exists(where):
        return None
    try:
        return Record(**unsealed(read_bytes(where)))
    except (ValueError, TypeError, IsADirectoryError) as error:
        msg = f"{where}: not a readable record ({error}); restore it, or remove {uri} to start again"
        raise UserError(msg) from None


def find(uri: str) -> Record | None:
    """The record of a finished artifact; None if there is none."""
    return _read(uri, "record.json")


def begin(uri: str, record: Record, *, replaces: Callable[[Record], bool] = lambda _: False) -> bool:
    """Claim a folder for a planned artifact. Waits while another driver works on it, except where drivers help each other.

    Args:
        uri: The folder.
        record: The plan.
        replaces: Whether the plan may replace the given record, because it contains all of it and more. The old record stays
            until the new files are written; see `reopen`.

    Returns:
        True if there is work to do (a new plan, or the same plan unfinished); False if the artifact is finished. Where there is
        work, this process holds the folder's lease until `finish`, or its end.

    Raises:
        UserError: The folder holds another artifact, finished or not, or files that mixgf did not make.
    """
    if not _claim(uri, record, replaces=replaces):
        return False
    if record.kind in _SHARED:
        return True

    def is_done() -> bool:
        there = find(uri)
        return there is not None and there.fingerprint == record.fingerprint

    if not lease.hold(uri, is_done):
        return False
    if is_done():  # just before this process got the lease
        lease.release(uri)
        return False
    return True


def _claim(uri: str, record: Record, *, replaces: Callable[[Record], bool]) -> bool:
    """`begin` without the lease: write or compare the plan."""
    plan_uri = join(uri, "plan.json")
    finished, planned = (_read(uri, name) for name in ("record.json", "plan.json"))
    if finished is not None and (finished.fingerprint == record.fingerprint or not replaces(finished)):
        _require_same(uri, finished, record)
        return False
    if planned is not None and (planned.fingerprint == record.fingerprint or not replaces(planned)):
        _require_same(uri, planned, record)
        layout.require_own(uri, record.kind)
        return True
    layout.require_own(uri, record.kind)
    if finished is not None or planned is not None:
        write_sealed(plan_uri, asdict(record))
    elif not create_bytes(plan_uri, sealed_bytes(asdict(record))):
        there = _read(uri, "plan.json")  # another run claimed the folder in the meantime
        if there is not None:
            _require_same(uri, there, record)
    return True


def reopen(uri: str) -> None:
    """Remove the record of a finished artifact that is about to be replaced; `begin` must have written the plan."""
    assert exists(join(uri, "plan.json")), f"{uri}: no plan"
    remove(join(uri, "record.json"))


def _require_same(uri: str, there: Record, record: Record) -> None:
    if there.fingerprint == record.fingerprint:
        return
    changes = _differences(there, record)
    more = f" and {len(changes) - 5} more" if len(changes) > 5 else ""
    msg = (
        f"{uri} holds another {there.kind}: {'; '.join(changes[:5])}{more}. "
        f"Choose another output (--set output=...), or remove {uri} to make it again"
    )
    raise UserError(msg)


def _differences(old: Record, new: Record) -> list[str]:
    keys = ("kind", "schema", "parents", "config")
    a, b = ({k: getattr(r, k) for k in keys} for r in (old, new))
    return [line[:120] for line in difference(a, b)]


def checksums_of(uri: str, names: Iterable[str]) -> dict[str, Any]:
    """Bytes and SHA-256 of an artifact's files, in the form that `finish` takes."""
    uris = {name: join(uri, name) for name in names}
    return {name: {"bytes": size(at), "sha256": sha256(at)} for name, at in uris.items()}


def read_artifact_table(uri: str, name: str, columns: list[str] | None = None) -> pa.Table:
    """The table NAME.parquet of a finished artifact; a `UserError` if it is not what the record says."""
    record, file = find(uri), f"{name}.parquet"
    known = record.files.get(file, {}) if record is not None else {}
    return read_table(join(uri, file), columns, sha256=known.get("sha256", ""))


def write_tables(uri: str, tables: Mapping[str, pa.Table]) -> dict[str, Any]:
    """Write tables of an artifact as NAME.parquet; returns their bytes and SHA-256, in the form that `finish` takes."""
    files = {}
    for name, table in tables.items():
        length, digest = write_table(join(uri, f"{name}.parquet"), table)
        files[f"{name}.parquet"] = {"bytes": length, "sha256": digest}
    return files


def finish(
    uri: str,
    record: Record,
    *,
    counts: dict[str, Any] | None = None,
    files: dict[str, Any] | None = None,
    details: dict[str, Any] | None = None,
) -> Record:
    """Write the record of an artifact, after all of its files."""
    done = replace(record, counts=counts or {}, files=files or {}, details=details or {})
    write_sealed(join(uri, "record.json"), asdict(done))
    remove(join(uri, "plan.json"))
    lease.release(uri)
    return done


def require(uri: str, kind: str, schema: int | None = None) -> Record:
    """The record of a finished artifact of a kind.

    Raises:
        UserError: There is none, or it is of another kind or schema. The message names the command that makes it.
    """
    record = find(uri)
    maker = MAKERS.get(kind, "the stage that makes it")
    if record is None:
        state = "unfinished" if _read(uri, "plan.json") else "not there"
        msg = f"{uri}: no finished {kind} ({state}); run `{maker}` first, or name another with --set inputs.NAME=URI"
        raise UserError(msg)
    if record.kind != kind:
        msg = f"{uri}: holds a {record.kind}, not a {kind}; name a {kind}, made by `{maker}`"
        raise UserError(msg)
    if schema is not None and record.schema != schema:
        msg = f"{uri}: {kind} of schema {record.schema}, this mixgf reads {schema}; make it again with `{maker}`"
        raise UserError(msg)
    return record


@contextlib.contextmanager
def remove_output_if_all_rejected(uri: str, kind: str) -> Iterator[None]:
    """Remove an unfinished artifact if all of its sources were rejected, so that another plan can use the folder."""
    try:
        yield
    except DamagedError:  # the other parts are good, and stay
        raise
    except UserError:
        if find(uri) is None:  # otherwise another run of the same plan has finished it
            layout.remove_own(uri, kind)
        raise


def build_or_reuse(uri: str, record: Record, make: Callable[[], Record]) -> Record:
    """Build the artifact, or reuse it if another process finished it first.

    Several processes may work on one plan: every part has the same bytes, whichever process writes it. The first that finishes
    removes the parts, so the others then fail to find them; they take its artifact instead.

    Args:
        uri: The folder.
        record: The plan.
        make: Builds the artifact and returns its record.
    """
    try:
        return make()
    except (OSError, UserError):
        there = find(uri)
        if there is None or there.fingerprint != record.fingerprint:
            raise
        say(f"{uri}: another run of the same plan has finished it")
        return there

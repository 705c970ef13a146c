"""Leases: who works on an output, so that a second driver waits instead of working beside the first.

A lease is a file `lease/NNNNNNNN.json` in the output's folder: the highest number holds. It is created on the condition that it is
not there (a link on local disk, `If-None-Match: *` on object storage), so of several drivers one gets it. The holder writes it
again every `BEAT_SECONDS`. A lease whose holder is gone is passed over by the next number: at once where the holder was a process of
this machine that has ended, else after `STALE_SECONDS` in which it did not change.
"""

from __future__ import annotations

import atexit
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

from mixgf.console import say, warn
from mixgf.errors import StorageError
from mixgf.storage import files

BEAT_SECONDS = 10.0
"""Between two signs of life of a holder."""
STALE_SECONDS = 60.0
"""Without a sign of life, after which a holder counts as gone."""
POLL_SECONDS = 2.0
"""Between two looks of a driver that waits."""


@cache
def _space() -> str:
    """Within which process numbers mean the same process: a machine since its start, and there one container.

    Several machines, or containers on one, can have one host name.
    """
    host = socket.gethostname()
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{host} {boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # no Linux
        return host


def _started(pid: int) -> float | None:
    """Start of a process of this machine, in clock ticks since the machine's; None = it is not there, or has ended.

    Where there is no /proc, 0 for every process that is there.
    """
    try:
        # after the name in parentheses, which may hold anything: state, then 18 numbers up to the start (proc(5))
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        # a process that ended stays in the table until its parent asks for it
        return None if state in {"Z", "X"} else float(numbers[18])
    except (FileNotFoundError, ProcessLookupError):
        pass
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except (PermissionError, OverflowError):
        pass
    return 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """Who holds a lease."""

    host: str
    pid: int
    started: float
    """Of the process (`_started`): a later process may have the same number."""
    since: str
    key: str
    """Different for every lease."""
    beat: int
    """Signs of life so far."""
    space: str = ""
    """See `_space`. Empty in leases of an earlier version."""

    @classmethod
    def of_this_process(cls) -> Holder:
        """A new lease of this process."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        return cls(
            host=socket.gethostname(), pid=os.getpid(), started=_started(os.getpid()) or 0.0, since=now,
            key=secrets.token_hex(8), beat=0, space=_space(),
        )  # fmt: skip

    @property
    def has_ended(self) -> bool:
        """Whether the holder was a process of this machine that is not there any more."""
        if self.space != _space():
            return False
        return _started(self.pid) != self.started

    def __str__(self) -> str:
        return f"process {self.pid} of {self.host}, since {self.since}"


class Lease:
    """A lease that this process holds; a thread gives signs of life until it is released."""

    def __init__(self, uri: str, number: int, holder: Holder) -> None:
        self.uri, self.number, self.holder = uri, number, holder
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="mixgf-lease", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        beats = 0
        while not self._ended.wait(BEAT_SECONDS):
            beats += 1
            with suppress(OSError, StorageError):  # a sign of life that is missed is no reason to stop
                if max(_numbers(self.uri), default=0) > self.number:
                    warn(
                        f"{self.uri}: another driver took this output over, as it saw no sign of life; stop one of both"
                    )
                    return
                files.write_json(_uri(self.uri, self.number), asdict(self.holder) | {"beat": beats})

    def release(self) -> None:
        """Give the output back: remove this lease, and those of holders that are gone."""
        self._ended.set()
        self._thread.join()
        for number in _numbers(self.uri):
            if number <= self.number:
                files.remove(_uri(self.uri, number))
        if files.is_local(self.uri):
            with suppress(OSError):
                files.local_path(files.join(self.uri, "lease")).rmdir()


_held: dict[str, Lease] = {}
_lock = threading.Lock()


def hold(uri: str, is_done: Callable[[], bool]) -> bool:
    """Wait until this process holds the lease of an output, or the output is finished.

    Args:
        uri: The output's folder.
        is_done: Whether another driver finished the output meanwhile.

    Returns:
        Whether this process holds it now; a process that holds it already does at once.
    """
    with _lock:
        if uri in _held:
            return True
    told, seen, since = False, "", time.monotonic()
    while True:
        number = max(_numbers(uri), default=0)
        holder = _read(_uri(uri, number)) if number else None
        key = f"{number} {holder.key} {holder.beat}" if holder else ""
        if key != seen:
            seen, since = key, time.monotonic()
        if holder is None or holder.has_ended or time.monotonic() - since > STALE_SECONDS:
            mine = Holder.of_this_process()
            if files.create_bytes(_uri(uri, number + 1), files.json_bytes(asdict(mine))):
                with _lock:
                    _held[uri] = Lease(uri, number + 1, mine)
                return True
            continue
        if is_done():
            return False
        if not told:
            say(f"{uri}: {holder} works on it; waiting for it (Ctrl-C stops waiting)")
            told = True
        time.sleep(POLL_SECONDS)


def release(uri: str) -> None:
    """Give an output back, if this process holds it."""
    with _lock:
        lease = _held.pop(uri, None)
    if lease is not None and lease.holder.pid == os.getpid():  # not in a fork of the holder
        lease.release()


def release_all() -> None:
    """Give back all outputs that this process holds."""
    for uri in list(_held):
        release(uri)


atexit.register(release_all)


def _uri(uri: str, number: int) -> str:
    return files.join(uri, "lease", f"{number:08d}.json")


def _numbers(uri: str) -> list[int]:
    names = files.list_dir(files.join(uri, "lease"))
    return [int(name.removesuffix(".json")) for name in names if name.removesuffix(".json").isdigit()]


def _read(uri: str) -> Holder | None:
    """The holder of a lease; None where it was just released, or cannot be read."""
    try:
        value: Any = files.read_json(uri)
        return Holder(**value)
    except (ValueError, TypeError, FileNotFoundError):
        return None

"""SIGTERM ends a command within seconds: a preempted machine, a cancelled job, `kill`.

The signal raises `Terminated` in the main thread. A training that listens is asked to stop first: it ends its step and writes a
checkpoint. After `GRACE_SECONDS`, or with a second signal, it is stopped as everything else.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

GRACE_SECONDS = 15.0
"""Time that a training has to end its step and write a checkpoint."""
EXIT_CODE = 128 + signal.SIGTERM


class Terminated(KeyboardInterrupt):
    """The process got SIGTERM. Not an `Exception`, so that nothing on the way handles it as an error of its own.

    Ray loses whatever else a signal raises while `ray.get` or `ray.wait` waits; from this it makes a plain `KeyboardInterrupt`.
    """


class _State:
    """The signal in this process."""

    def __init__(self) -> None:
        self.installed, self.listeners, self.requested = False, 0, threading.Event()
        self.grace: threading.Timer | None = None


_state = _State()


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """While it is open, SIGTERM raises `Terminated` in the main thread. Opened in another thread, it changes nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _handle)
    _state.installed = True
    try:
        yield
    except KeyboardInterrupt as stop:
        if requested() and not isinstance(stop, Terminated):  # it went through Ray
            raise Terminated from None
        raise
    finally:
        _state.installed = False
        _state.requested.clear()
        if _state.grace is not None:
            _state.grace.cancel()
        signal.signal(signal.SIGTERM, before)


def renew() -> None:
    """Install the handler again where it was: a library, such as Ray when it connects, may have set its own."""
    if _state.installed and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _handle)


def is_installed() -> bool:
    """Whether `installed` is open: SIGTERM is handled here."""
    return _state.installed


def requested() -> bool:
    """Whether the process got SIGTERM and is to stop soon."""
    return _state.requested.is_set()


@contextlib.contextmanager
def listening() -> Iterator[None]:
    """While it is open, the first SIGTERM only sets `requested`."""
    _state.listeners += 1
    try:
        yield
    finally:
        _state.listeners -= 1


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """While it is open, the first SIGTERM waits: `Terminated` is raised at its end, or after `GRACE_SECONDS`."""
    with listening():
        yield
    if _state.installed and requested() and not _state.listeners:
        raise Terminated


def _handle(number: int, frame: FrameType | None) -> None:
    first = not _state.requested.is_set()
    _state.requested.set()
    if first and _state.listeners:
        _state.grace = threading.Timer(GRACE_SECONDS, os.kill, (os.getpid(), signal.SIGTERM))
        _state.grace.daemon = True
        _state.grace.start()
        return
    raise Terminated

"""Delivery to the tracker: a thread that sends, so that a slow tracker does not slow the work, and one that is down does not end it.

Work puts operations (`mixgf.tracking.store`) into a queue and goes on. The thread sends them in order. An operation that cannot
be sent is tried again, and what is left at the end of a stage is kept in a file; the next stage of the same output sends it.
"""

from __future__ import annotations

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from mixgf import proxies
from mixgf.console import warn
from mixgf.redact import redact

Operation = dict[str, Any]
"""Plain JSON data: `do`, the name of a method of the store, and its arguments."""
RETRY_SECONDS = 30.0
"""Between two tries while the tracker is down."""
OPEN_SECONDS = 10.0
"""That a stage waits for a tracker before it begins its work."""
QUIET_SECONDS, STOPPED_SECONDS = 15.0, 3.0
"""That the end of a stage waits for a tracker that finishes nothing; and the end of one that failed or was stopped."""
LONGEST = 8
"""The end of a stage waits at most so many times as long for a tracker that finishes something now and then."""
UPLOAD_SECONDS = 900.0
"""The same while files are sent."""
UPLOADS = ("model", "files")
"""Operations that send files."""
TRIES = 3
"""After so many tries an operation is left out if the tracker answers everything else."""


class Rejected(Exception):
    """The tracker answers, and refuses the operation: trying again would not help."""


def finite(value: Any) -> Any:
    """Plain data without numbers that are not finite, which JSON does not have: their keys, and lists that hold them, are left out."""
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items() if not _has_infinite(one)}
    return [finite(one) for one in value if not _has_infinite(one)] if isinstance(value, list | tuple) else value


def _has_infinite(value: Any) -> bool:
    """Whether a value is a number that is not finite, or a list with such a number."""
    if isinstance(value, list | tuple):
        return any(isinstance(one, float) and not math.isfinite(one) for one in value)
    return isinstance(value, float) and not math.isfinite(value)


class Delivery:
    """The queue to one tracker and the thread that empties it.

    Args:
        where: The tracker's URI, for messages.
        apply: Does an operation; raises `Rejected`, or any other exception where it may work later.
        answers: Whether the tracker answers a small request.
    """

    def __init__(self, where: str, apply: Callable[[Operation], Any], answers: Callable[[], bool]) -> None:
        self._where, self._apply, self._answers = where, apply, answers
        self._queue: deque[Operation] = deque()
        self._results: dict[int, Any] = {}
        self._changed = threading.Condition()
        self._active: Operation | None = None
        self._beat, self._failures, self._hurry = time.monotonic(), 0, False
        self._told, self._in_vain = False, 0.0
        """`_in_vain`: longest wait in seconds that was for nothing since the tracker finished something. No shorter one follows."""
        self._left_out: set[tuple[str, str]] = set()
        self.why_down = ""
        """The error of the last try; empty while the tracker works."""
        threading.Thread(target=self._work, name="mixgf-tracker", daemon=True).start()

    def put(self, *operations: Operation) -> None:
        """Queue operations, without numbers that are not finite (`finite`); does not wait."""
        with self._changed:
            self._queue.extend(finite(operation) for operation in operations)
            self._changed.notify_all()

    def ask(self, operation: Operation, seconds: float) -> Any | None:
        """Queue an operation and wait for its result; None if there is none after `seconds`, or it failed.

        A tracker for which something waited so long in vain, and which has finished nothing since, is not waited for again.
        """
        operation = finite(operation)
        key = id(operation)
        with self._changed:
            if self.why_down:
                self._hurry = True
            self._results[key] = None
            self._queue.append(operation)
            self._changed.notify_all()
            if not 0 < seconds <= self._in_vain:
                done = self._changed.wait_for(
                    lambda: not self._queued(operation) or self._failures > 0, timeout=seconds if seconds > 0 else None
                )
                self._in_vain = self._in_vain if done else seconds
            return self._results.pop(key, None)

    def settle(self, quiet: float = QUIET_SECONDS) -> bool:
        """Wait until all is sent, or the tracker finishes nothing for `quiet` seconds; returns whether all is sent.

        A tracker that is slow is waited for `LONGEST` times `quiet` seconds in all, files not counted. As in `ask`, the same wait
        is not repeated in vain.
        """
        end = time.monotonic() + LONGEST * quiet
        with self._changed:
            self._hurry, self._failures, self._beat = True, 0, time.monotonic()
            self._changed.notify_all()
            while self._queue and not self._failures:
                uploads = quiet == QUIET_SECONDS and self._active is not None and self._active["do"] in UPLOADS
                limit = UPLOAD_SECONDS if uploads else quiet
                left = self._beat + limit - time.monotonic()
                if left <= 0 or limit <= self._in_vain:
                    self._in_vain = max(limit, self._in_vain)
                    self.why_down = self.why_down or f"no answer in {limit:g} s"
                    break
                if not uploads and (left := min(left, end - time.monotonic())) <= 0:
                    self.why_down = (
                        self.why_down or f"slow: {len(self._queue)} records left after {LONGEST * quiet:g} s"
                    )
                    break
                self._changed.wait(timeout=left)
            return not self._queue

    def take(self) -> list[Operation]:
        """Remove and return all that is not sent."""
        with self._changed:
            left = list(self._queue)
            self._queue.clear()
            self._changed.notify_all()
        return left

    def tell(self, text: str) -> None:
        """Warn about the tracker, once in the life of this process."""
        if not self._told:
            self._told = True
            why = f"cannot be used ({self.why_down})" if self.why_down else "has not answered yet"
            way = proxies.hint(self._where, "the tracker's host")
            warn(redact(f"MLflow at {self._where} {why}; {text}{way}"))

    def _queued(self, operation: Operation) -> bool:
        return any(one is operation for one in self._queue)

    def _work(self) -> None:
        tries = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: bool(self._queue))
                self._active = operation = self._queue[0]
                self._beat = time.monotonic()
            try:
                result = self._apply(operation)
            except Rejected as error:
                self._leave_out(operation, str(error))
                result = None
            except Exception as error:  # noqa: BLE001 (whatever a tracker does, the work goes on)
                why = f"{type(error).__name__}: {str(error).strip() or repr(error)}".splitlines()[0][:300]
                if not self._answers():
                    self._wait(why)
                    continue
                tries += 1
                if tries < TRIES:
                    time.sleep(1.0)
                    continue
                self._leave_out(operation, why)
                result = None
            tries = 0
            with self._changed:
                self.why_down, self._failures, self._active, self._in_vain = "", 0, None, 0.0
                self._beat = time.monotonic()
                if id(operation) in self._results:
                    self._results[id(operation)] = result
                if self._queued(operation):
                    self._queue.remove(operation)
                self._changed.notify_all()

    def _leave_out(self, operation: Operation, why: str) -> None:
        """Warn of an operation that cannot be done, once per kind and reason."""
        if (told := (str(operation["do"]), why)) not in self._left_out:
            self._left_out.add(told)
            warn(redact(f"MLflow: {operation['do']} is left out: {why}"))

    def _wait(self, why: str) -> None:
        """Note a failure and wait for the next try."""
        with self._changed:
            self.why_down, self._active = why, None
            self._failures += 1
            self._hurry = False
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._hurry, timeout=RETRY_SECONDS)

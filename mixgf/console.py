"""Messages and progress for the user, on stderr.

On a terminal, progress is one line that is redrawn. In the log of a job, it is a line every `LOG_SECONDS`.
"""

from __future__ import annotations

import logging
import sys
import time
from types import TracebackType
from typing import Self

from mixgf.redact import redact

_log = logging.getLogger("mixgf")
LOG_SECONDS = 20.0
"""Seconds between two progress lines where the output is not a terminal."""


def say(text: str) -> None:
    """Print one line."""
    _log.info(redact(text))


def warn(text: str) -> None:
    """Print one line as a warning."""
    _log.warning(redact(text))


def debug(text: str) -> None:
    """Print lines where `--debug` is given."""
    _log.debug(redact(text))


def setup(stream: object = None, *, debug: bool = False) -> None:
    """Send messages to stderr without prefix; called once, by the command line."""
    handler = logging.StreamHandler(stream or sys.stderr)  # type: ignore[arg-type]
    handler.setFormatter(logging.Formatter("%(message)s"))
    _log.handlers[:] = [handler]
    _log.setLevel(logging.DEBUG if debug else logging.INFO)
    _log.propagate = False


def setup_if_silent() -> None:
    """Send messages to stderr unless a log handler receives them; called by the Python API, for notebooks."""
    if not _log.hasHandlers():
        setup()


def in_notebook() -> bool:
    """Whether stderr is a cell of a notebook, which draws a line again after a carriage return."""
    kernel = sys.modules.get("ipykernel.iostream")
    return kernel is not None and isinstance(sys.stderr, kernel.OutStream)


def duration(seconds: float) -> str:
    """`59 s`, `3 min 20 s`, `2 h 05 min`."""
    s = round(seconds)
    if s < 60:
        return f"{s} s"
    return f"{s // 60} min {s % 60:02d} s" if s < 3600 else f"{s // 3600} h {s % 3600 // 60:02d} min"


def number(value: float) -> str:
    """A number in few characters: 12,345 or 0.123 or 4.2."""
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    return f"{value:.3g}"


class Progress:
    """Progress of one piece of work: share done, rate, time left, and a few numbers.

    Args:
        what: Title of the line.
        total: Amount of work, in `unit`.
        unit: Of `total`, for the rate.
        done: Work of earlier sessions, which the rate leaves out.
    """

    def __init__(self, what: str, total: float, unit: str = "", done: float = 0) -> None:
        self.what, self.total, self.unit = what, max(total, 1e-9), unit
        self._first = done
        self._start = self._shown = time.monotonic()
        self._bar = (sys.stderr.isatty() or in_notebook()) and _log.isEnabledFor(logging.INFO)
        self._width = 0
        self._last = done - 1.0

    def update(self, done: float, **figures: float) -> None:
        """Show that `done` of `total` is finished, with numbers such as loss=8.1."""
        now = time.monotonic()
        if now - self._shown < (0.2 if self._bar else LOG_SECONDS) and (done < self.total or done == self._last):
            return
        self._shown, self._last = now, done
        elapsed = max(now - self._start, 1e-9)
        rate = (done - self._first) / elapsed
        parts = [f"{self.what}: {min(done / self.total, 1):4.0%}"]
        if rate > 0:
            parts.append(
                f"{number(rate)} {self.unit}/s".replace(" /", "/")
                if rate >= 1
                else f"{number(rate * 60)} {self.unit}/min"
            )
            parts.append(f"{duration((self.total - done) / rate)} left" if done < self.total else duration(elapsed))
        parts += [f"{name} {number(value)}" for name, value in figures.items()]
        line = "  ".join(parts)
        if self._bar:
            sys.stderr.write("\r" + line.ljust(self._width))
            sys.stderr.flush()
            self._width = len(line)
        else:
            _log.info(line)

    def close(self) -> None:
        """End the line on a terminal."""
        if self._bar and self._width:
            sys.stderr.write("\n")
            sys.stderr.flush()
            self._width = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

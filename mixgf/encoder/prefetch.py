"""Prepare the input of the next steps in a background thread."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T_co = TypeVar("T_co", covariant=True)


class Prefetch(Generic[T_co]):
    """Iterator over `make(step)` for a range of steps, computed up to `depth` steps ahead in a background thread.

    An exception of `make` is raised in the consumer. Use as a context manager, which ends the thread. `waited` is the
    time in seconds that the consumer has waited.
    """

    def __init__(self, make: Callable[[int], T_co], start: int, stop: int, *, depth: int = 4) -> None:
        self.waited = 0.0
        self._make, self._range = make, range(start, stop)
        self._queue: queue.Queue[tuple[T_co | None, BaseException | None]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="mixgf-prefetch", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        for step in self._range:
            try:
                item: tuple[T_co | None, BaseException | None] = (self._make(step), None)
            except BaseException as error:  # noqa: BLE001 (it is raised again in the consumer's thread)
                item = (None, error)
            while not self._closed.is_set():
                try:
                    self._queue.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if self._closed.is_set() or item[1] is not None:
                return

    def __iter__(self) -> Iterator[T_co]:
        for _ in self._range:
            began = time.perf_counter()
            item, error = self._queue.get()
            self.waited += time.perf_counter() - began
            if error is not None:
                raise error
            assert item is not None
            yield item

    def __enter__(self) -> Prefetch[T_co]:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

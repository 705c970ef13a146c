import time

import pytest

from mixgf.encoder import prefetch


def test_prefetch_gives_all_steps_in_order_and_counts_the_time_waited():
    def slow(step):
        time.sleep(0.02)
        return step

    with prefetch.Prefetch(slow, 3, 8, depth=1) as ahead:
        assert list(ahead) == [3, 4, 5, 6, 7]
    assert 0.05 < ahead.waited < 5


def test_prefetch_raises_the_error_of_its_thread_and_stops_when_left():
    def fail(step):
        if step == 2:
            msg = "at 2"
            raise RuntimeError(msg)
        return step

    with prefetch.Prefetch(fail, 0, 1000, depth=2) as ahead, pytest.raises(RuntimeError, match="at 2"):
        list(ahead)
    with prefetch.Prefetch(lambda step: step, 0, 10**9, depth=2) as ahead:
        next(iter(ahead))
    assert not ahead._thread.is_alive()

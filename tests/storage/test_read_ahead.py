"""Laws of reading ahead: the right bytes in any order, close ranges by one request, each byte once, errors where they are read."""

import os
import threading
from contextlib import closing

import numpy as np
import pytest

from mixgf.errors import AccessError
from mixgf.storage.s3 import RangeFile, ReadAhead

CONTENT = np.random.default_rng(1).integers(0, 256, 3_000_000, dtype=np.uint8).tobytes()


def opened(requests, most=400_000, fail=()):
    def fetch(start, stop):
        requests.append((start, stop, threading.get_ident()))
        if any(start <= at < stop for at in fail):
            raise PermissionError("no")
        return CONTENT[start:stop]

    return RangeFile("s3://bucket/key", fetch, len(CONTENT), most)


def test_two_interleaved_streams_are_read_with_few_requests_and_no_byte_twice():
    requests: list = []
    first = [(a, a + 20_000) for a in range(0, 1_000_000, 20_000)]
    second = [(a, a + 30_000) for a in range(1_500_000, 3_000_000, 30_000)]
    ranges = [r for pair in zip(first, second, strict=True) for r in pair]
    with closing(ReadAhead(opened(requests), ranges)) as ahead:
        for group in range(0, 50, 10):  # ten of one stream, then ten of the other
            for start, stop in first[group : group + 10] + second[group : group + 10]:
                assert ahead.read(start, stop) == CONTENT[start:stop]
    assert sum(stop - start for start, stop, _ in requests) == 2_500_000
    assert len(requests) <= 8
    assert threading.get_ident() not in {thread for _, _, thread in requests}


def test_a_range_far_from_the_others_brings_nothing_between():
    requests: list = []
    with closing(ReadAhead(opened(requests), [(0, 10), (2_900_000, 2_900_010)])) as ahead:
        assert bytes(ahead.read(2_900_000, 2_900_010)) == CONTENT[2_900_000:2_900_010]
        assert bytes(ahead.read(0, 10)) == CONTENT[:10]
    assert sorted(r[:2] for r in requests) == [(0, 10), (2_900_000, 2_900_010)]


def test_requests_run_before_the_bytes_are_asked_for_but_not_all_at_once():
    requests: list = []
    ranges = [(a, a + 100_000) for a in range(0, 3_000_000, 300_000)]
    with closing(ReadAhead(opened(requests), ranges, requests=2)) as ahead:
        ahead.read(*ranges[0])
        ahead._pool.submit(os.getpid).result()  # whatever was handed in before has begun
        assert 1 <= len(requests) <= 3


def test_an_error_comes_where_its_bytes_are_read():
    ranges = [(0, 10), (1_000_000, 1_000_010)]
    with closing(ReadAhead(opened([], fail=[1_000_000]), ranges)) as ahead:
        assert bytes(ahead.read(0, 10)) == CONTENT[:10]
        with pytest.raises(AccessError):
            ahead.read(1_000_000, 1_000_010)

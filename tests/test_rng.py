import numpy as np
import pytest
import torch

from mixgf import rng


def test_uniform_numbers_are_uniform_and_differ_by_every_part_of_the_key():
    x = rng.uniform(1, 2, np.arange(100_000))
    assert x.mean() == pytest.approx(0.5, abs=0.005)
    assert np.histogram(x, 10, (0, 1))[0].std() < 400
    for other in ((2, 2), (1, 3)):
        assert abs(np.corrcoef(x, rng.uniform(*other, np.arange(100_000)))[0, 1]) < 0.02


def test_a_key_gives_the_same_number_on_every_machine_and_in_every_version():
    assert rng.hashed(0).tolist() == 0xE220A8397B1DCDAF  # first output of splitmix64 with state 0
    keys = rng.dropout_keys(1, 0, np.arange(4), 0, 0)
    assert keys.dtype == torch.int32
    packed = np.packbits(rng.dropped(keys, 3, 8, 32768).numpy(), axis=1)[:, 0].tolist()
    assert packed == GOLDEN


def test_order_and_neighbours_do_not_matter():
    cells = np.arange(50)
    assert np.array_equal(rng.hashed(5, cells)[::-1], rng.hashed(5, cells[::-1]))
    keys = rng.dropout_keys(5, cells)
    assert torch.equal(rng.dropped(keys, 1, 7, 9000)[20:23], rng.dropped(keys[20:23], 1, 7, 9000))


GOLDEN = [14, 102, 178, 207]


def test_hashes_of_places_are_the_plain_ones_of_every_token():
    lengths = np.array([3, 0, 1, 5])
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    visits, places = np.repeat([7, 8, 9, 10**12], lengths), np.concatenate([np.arange(n) for n in lengths])
    expected = rng.hashed(4, 2, visits, places)
    fast = rng.of_places(rng.hashed(4, 2, np.array([7, 8, 9, 10**12])), offsets)
    assert np.array_equal(fast, expected)
    assert np.array_equal(rng.hashed(3, after=fast), rng.hashed(4, 2, visits, places, 3))
    for fraction in (0.0, 0.5, 1.0):
        plain = rng.uniform(4, 2, visits, places, 3) < fraction
        assert np.array_equal(rng.chance(fast, 3, fraction), plain)

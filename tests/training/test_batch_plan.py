import hashlib

import numpy as np
import pytest

from mixgf import errors
from mixgf.encoder.batch import split_micro_batches
from mixgf.training import batch_plan

ROWS = [10, 1, 33, 7, 20, 2, 28]  # 101 cells, sizes that divide nothing


def make(batch_cells=8, mix=None, window_shards=3, seed=0, rows=ROWS):
    n = sum(rows)
    rng = np.random.default_rng(0)
    species = np.repeat(np.arange(len(rows)) % 2, rows).astype(np.int8)
    return batch_plan.BatchPlan(
        rng.integers(1, 60, n).astype(np.int32), species, rows,
        seed=seed, batch_cells=batch_cells, species_mix=mix, window_shards=window_shards,
    )  # fmt: skip


@pytest.mark.parametrize("batch_cells", [1, 3, 8, 101, 200])
def test_every_cell_comes_once_per_epoch_and_only_the_last_batch_is_short(batch_cells):
    p = make(batch_cells)
    batches = [p.batch(step) for step in range(p.steps_per_epoch)]
    assert sorted(np.concatenate(batches)) == list(range(101))
    assert all(len(b) == min(batch_cells, 101) for b in batches[:-1])


@pytest.mark.parametrize("world_size", range(1, 9))
def test_shares_are_disjoint_complete_and_balanced_by_tokens(world_size):
    p = make(batch_cells=16)
    for step in range(p.steps_per_epoch):
        shares = [p.share(step, rank, world_size) for rank in range(world_size)]
        batch = p.batch(step)
        together = np.empty_like(batch)
        for share in shares:
            together[share.slots_B] = share.visits_B
            assert share.batch_cells == len(batch)
        assert np.array_equal(together, batch)
        assert sum(len(s.cells_B) for s in shares) == len(batch)
        tokens = [p.lengths[s.cells_B].sum() for s in shares]
        assert max(tokens) - min(tokens) <= p.lengths[batch].max()


def test_the_order_is_a_pure_function_of_seed_and_step():
    p, q = make(), make()
    jumped = q.batch(20)
    assert np.array_equal(jumped, [p.batch(step) for step in range(21)][20])
    assert np.array_equal(q.batch(3), p.batch(3))
    assert not np.array_equal(make(seed=1).batch(3), p.batch(3))
    assert not np.array_equal(p.batch(3), p.batch(3 + p.steps_per_epoch))


def test_the_order_of_shards_and_the_order_within_a_window_each_differ_between_epochs():
    windows = make(window_shards=1)  # a window is a shard, so the order of windows is that of shards
    shards = [
        [windows.window_shards_of(epoch * windows.steps_per_epoch + step)[0] for step in range(windows.steps_per_epoch)]
        for epoch in range(3)
    ]
    assert len({tuple(one) for one in shards}) == 3
    whole = make(window_shards=len(ROWS), batch_cells=101)  # one window, one batch of the order of its cells
    orders = [whole.batch(epoch) for epoch in range(3)]
    assert len({tuple(sorted(order)) for order in orders}) == 1
    few = batch_plan.BatchPlan(  # cells of equal length, so that nothing is sorted; one shard
        np.full(101, 7, np.int32), np.zeros(101, np.int8), [101], seed=0, batch_cells=8, window_shards=1
    )
    cells = [np.concatenate([few.batch(epoch * 13 + step) for step in range(13)]) for epoch in range(3)]
    assert len({tuple(order) for order in cells}) == 3


def test_a_mix_draws_other_cells_in_every_epoch():
    p = make(mix={0: 0.25, 1: 0.75})
    drawn = [
        frozenset(
            np.concatenate([p.batch(epoch * p.steps_per_epoch + step) for step in range(p.steps_per_epoch)]).tolist()
        )
        for epoch in range(3)
    ]
    assert len(set(drawn)) == 3


def test_cells_by_length_are_dealt_there_and_back_by_hand():
    assert [batch_plan._worker_cells(8, rank, 2).tolist() for rank in range(2)] == [[0, 3, 4, 7], [1, 2, 5, 6]]
    assert [batch_plan._worker_cells(8, rank, 3).tolist() for rank in range(3)] == [[0, 5, 6], [1, 4, 7], [2, 3]]


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_dealing_there_and_back_balances_tokens_better_than_dealing_in_one_direction(world_size):
    p = make(batch_cells=16)
    ours, straight = [], []
    for step in range(p.steps_per_epoch - 1):
        tokens = [p.lengths[p.share(step, rank, world_size).cells_B].sum() for rank in range(world_size)]
        ordered = np.sort(p.lengths[p.batch(step)])[::-1]
        ours.append(max(tokens) - min(tokens))
        straight.append(ordered[::world_size].sum() - ordered[world_size - 1 :: world_size].sum())
    assert np.mean(ours) < 0.5 * np.mean(straight)


def test_a_window_reads_few_shards_and_batches_are_of_like_length():
    rows = [100] * 12
    p = make(batch_cells=10, window_shards=2, rows=rows)
    shard_of = np.repeat(np.arange(12), rows)
    spread = []
    for step in range(p.steps_per_epoch):
        batch = p.batch(step)
        assert len(np.unique(shard_of[batch])) <= 2
        assert set(shard_of[batch]) <= set(p.window_shards_of(step))
        spread.append(np.ptp(p.lengths[batch]))
    assert np.mean(spread) < 0.2 * np.ptp(p.lengths)


def test_species_are_interleaved_over_windows():
    rows = [100] * 12
    p = make(batch_cells=10, window_shards=4, rows=rows)  # shards alternate between two species
    for step in range(0, p.steps_per_epoch, 10):
        kinds = {int(p.species[p.starts[shard]]) for shard in p.window_shards_of(step)}
        assert kinds == {0, 1}


def test_species_mix_sets_the_ratio_and_repeats_cells_evenly():
    p = make(mix={0: 0.25, 1: 0.75})
    counts = np.bincount(p.species)
    visits = np.concatenate([p.batch(step) for step in range(p.steps_per_epoch)])
    assert len(visits) == len(np.unique(visits)) == 101
    cells = visits % 101
    drawn = np.bincount(p.species[cells])
    assert drawn.tolist() == [25, 76]
    assert counts.tolist() == [91, 10]  # so species 1 is visited 7 or 8 times, species 0 at most once
    times = np.bincount(cells, minlength=101)
    assert set(times[p.species == 1]) == {7, 8}
    assert set(times[p.species == 0]) == {0, 1}


def test_a_mix_that_cannot_be_kept_is_refused():
    for absent in (2, 5):
        with pytest.raises(errors.UserError, match=r"train.species_mix.*corpus has"):
            make(mix={0: 0.5, absent: 0.5})
    species = np.array([0, 2, 0, 2], dtype=np.int8)  # a species of the vocabulary without cells
    with pytest.raises(errors.UserError, match=r"train.species_mix.*corpus has"):
        batch_plan.BatchPlan(np.ones(4, np.int32), species, [4], seed=0, batch_cells=2, species_mix={0: 0.5, 1: 0.5})
    with pytest.raises(errors.UserError, match=r"'rat': must be a species of the corpus: human, mouse"):
        batch_plan.shares_by_code({"rat": 0.5}, ("human", "mouse"))
    assert batch_plan.shares_by_code({"mouse": 0.5, "human": 1}, ("human", "mouse")) == {0: 1.0, 1: 0.5}


def test_micro_batches_keep_the_budget_and_lose_nothing():
    lengths = np.array([5, 5, 1, 30, 2, 2], dtype=np.int32)
    runs = split_micro_batches(lengths, 10)
    assert [lengths[r].tolist() for r in runs] == [[5, 5], [1], [30], [2, 2]]
    assert [(r.start, r.stop) for r in split_micro_batches(lengths[:0], 10)] == [(0, 0)]


def test_packing_by_hand():
    assert batch_plan.padding_ratios(np.array([4, 4, 4, 4], dtype=np.int32), 2) == {"random": 1.0, "grouped": 1.0}
    lengths = np.array([1, 3, 1, 3, 2], dtype=np.int32)
    # grouped: (1, 1), (2, 3), (3): 2 + 6 + 3 tokens for 10 that are there
    made = batch_plan.padding_ratios(lengths, 2)
    assert made["grouped"] == pytest.approx(1.1)
    assert made["random"] >= made["grouped"]
    assert batch_plan.padding_ratios(lengths, 5)["random"] == pytest.approx(1.5)


def test_shards_are_counted_by_species_with_empty_ones_among_them():
    species = np.array([0, 2, 2, 0, 1, 2], dtype=np.int8)
    made = batch_plan.BatchPlan(np.ones(6, np.int32), species, [0, 3, 0, 0, 2, 1, 0], seed=0, batch_cells=2)
    assert made._counts_SP.tolist() == [[0, 0, 0], [1, 0, 2], [0, 0, 0], [0, 0, 0], [1, 1, 0], [0, 0, 1], [0, 0, 0]]
    assert batch_plan.BatchPlan(np.ones(0, np.int32), species[:0], [0], seed=0, batch_cells=2).steps_per_epoch == 0


def digest(arrays):
    return hashlib.sha256(b"".join(np.asarray(a).astype("<i8").tobytes() for a in arrays)).hexdigest()[:16]


def test_the_order_of_a_seed_is_that_of_earlier_versions():
    """A training that an earlier version began goes on with the cells that it has not seen."""
    lengths = np.random.default_rng(0).integers(1, 60, 1010).astype(np.int32)
    rows, species = [100, 10, 330, 70, 200, 20, 280], (np.arange(1010) // 37 % 3).astype(np.int8)
    plans = [
        batch_plan.BatchPlan(lengths, species, rows, seed=3, batch_cells=8, window_shards=2, group_batches=5, species_mix=mix)
        for mix in (None, {0: 0.2, 1: 0.5, 2: 0.3})
    ]  # fmt: skip
    plans.append(
        batch_plan.BatchPlan(lengths, species, rows, seed=3, batch_cells=2)
    )  # the sizes of windows and groups in use
    steps = [0, 1, 13, 60, 125, 126, 127, 128, 260, 400, 503, 505, 620]
    found = [digest([p.batch(k) for k in steps] + [p.window_shards_of(k) for k in steps]) for p in plans]
    groups = (np.arange(1010) // 101 % 4 + (np.arange(1010) > 990) * 3).astype(np.int32)
    of_sets = batch_plan.DataSetPlan(lengths, species, rows, groups, seed=3, batch_cells=16)
    found.append(digest([of_sets.batch(k) for k in (*steps, 1500, 4000)] + [of_sets.share(70, 1, 3).slots_B]))
    assert found == ["202617aac03feb6d", "51241e25ebb17642", "07e6a1fff5d25efb", "7ccc227b291ccc74"]


def test_padding_counts_the_longest_cell_wherever_it_stands():
    lengths = np.array([9, 1, 1, 1], dtype=np.int32)  # cell 0 is the longest: four cells as long as it, for 12 tokens
    assert batch_plan.padding_ratios(lengths, 4) == {"random": 3.0, "grouped": 3.0}


def test_batches_are_grouped_by_length_among_so_many_only(monkeypatch):
    lengths = np.random.default_rng(0).integers(1, 60, 64).astype(np.int32)
    wide = batch_plan.padding_ratios(lengths, 4)
    monkeypatch.setattr(batch_plan, "GROUP_BATCHES", 1)
    assert batch_plan.padding_ratios(lengths, 4)["grouped"] == batch_plan.padding_ratios(lengths, 4)["random"]
    assert wide["grouped"] < 1.1 < wide["random"]


def test_the_last_batch_of_an_epoch_holds_what_is_left_and_the_next_epoch_begins_anew():
    p = make(batch_cells=8)
    assert p.steps_per_epoch == 13
    assert len(p.batch(12)) == 5
    assert p.share(12, 0, 1).epoch == 0
    assert p.share(13, 0, 1).epoch == 1
    assert sorted(np.concatenate([p.batch(step) for step in range(13, 26)])) == list(range(101))


def test_a_share_of_0_leaves_a_species_out_and_shares_below_0_are_refused():
    for mix in ({0: 1.0, 1: 0.0}, {0: 1.0}):  # a species that the mix does not name has no share
        p = make(mix=mix)
        assert set(p.species[np.concatenate([p.batch(step) for step in range(p.steps_per_epoch)]) % 101]) == {0}
    for mix in ({0: 1.0, 1: -0.5}, {0: 0.0, 1: 0.0}, {0: 1.0, 2: 1.0}):
        with pytest.raises(errors.UserError, match=r"shares above 0 to species that the corpus has"):
            make(mix=mix)

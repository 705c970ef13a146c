"""The actor pool: every item once, whatever dies; the pool grows, shrinks, and loads a worker once per actor."""

import functools
import os
import time
from pathlib import Path

import pytest

from mixgf.errors import UserError
from mixgf.execution import Task

pytestmark = pytest.mark.ray


def make(folder, *, kill=(), poison=(), together=1, late=False):
    """A worker that leaves a mark when it is built and when it gets an item; some items kill it, once or always.

    Items but the first wait until so many workers `together` have one, however slowly the machine starts them. With `late`,
    all workers but the first to come need until there is a file `go` to be built.
    """
    (Path(folder) / f"built-{os.getpid()}").touch()
    if late:
        try:
            (Path(folder) / "first").touch(exist_ok=False)
        except FileExistsError:
            while not (Path(folder) / "go").exists():
                time.sleep(0.05)

    def work(item):
        (Path(folder) / f"works-{os.getpid()}").touch()
        if item in poison:
            msg = f"bad item {item}"
            raise ValueError(msg)
        mark = Path(folder) / f"killed-{item}"
        if item in kill and (kill[item] == "always" or not mark.exists()):
            mark.touch()
            os.kill(os.getpid(), 9)
        give_up = time.monotonic() + 120
        while item and len(list(Path(folder).glob("works-*"))) < together and time.monotonic() < give_up:
            time.sleep(0.05)
        return item * 10

    return work


def call(worker, item):
    return worker(item)


def tasks(items):
    return [Task(part=str(i), function=call, args=(i,)) for i in items]


def run(pool, items, **options):
    """Results and errors, by item."""
    work, seen, dead = tasks(items), {}, {}
    for receipt in pool.run(work, **options):
        (item,) = work[receipt.number].args
        if receipt.error:
            dead[item] = receipt.error
        else:
            seen.setdefault(item, []).append(receipt.result)
    return seen, dead


def expected(items):
    return {i: [i * 10] for i in items}


@pytest.fixture
def pools(ray_local):
    from mixgf.distributed import actor_pool as pool

    return pool


def test_every_item_comes_once_and_a_worker_is_built_once_per_actor(pools, tmp_path):
    with pools.ActorPool(functools.partial(make, str(tmp_path), together=2), pools.Size(max_actors=2)) as pool:
        assert run(pool, range(30)) == (expected(range(30)), {})
        assert run(pool, range(5)) == (expected(range(5)), {})  # the same actors again
        assert pool.most_actors == 2
    assert len(list(tmp_path.glob("built-*"))) == 2


def test_a_new_actor_gets_work_while_answers_keep_coming(pools, tmp_path, monkeypatch):
    """Whatever Ray picks of what is ready: here, new actors last."""
    wait = pools.ray.wait

    def newest_last(refs, *, num_returns, timeout):
        ready, _ = wait(refs, num_returns=len(refs), timeout=120)
        ready.sort(key=lambda ref: pools.ray.get(ref) is True)  # what an actor says when it is up
        return ready[:num_returns], ready[num_returns:]

    monkeypatch.setattr(pools.ray, "wait", newest_last)
    with pools.ActorPool(functools.partial(make, str(tmp_path)), pools.Size(max_actors=2)) as pool:
        assert run(pool, range(30)) == (expected(range(30)), {})
        assert pool.most_actors == 2


def test_an_actor_that_still_loads_when_the_work_is_done_is_there_for_the_next(pools, tmp_path):
    with pools.ActorPool(functools.partial(make, str(tmp_path), late=True), pools.Size(max_actors=2)) as pool:
        while len(list(tmp_path.glob("built-*"))) < 2:
            assert run(pool, range(4)) == (expected(range(4)), {})
        assert (pool.num_up, pool.num_actors) == (1, 2)
        (tmp_path / "go").touch()
        while pool.num_up < 2:
            run(pool, range(4))
    assert len(list(tmp_path.glob("built-*"))) == 2


def test_a_killed_actor_loses_nothing_and_a_poison_item_loses_only_itself(pools, tmp_path):
    worker = functools.partial(make, str(tmp_path), kill={3: "once", 11: "always"}, poison=(5,))
    with pools.ActorPool(worker, pools.Size(max_actors=2), retries=1) as pool:
        seen, dead = run(pool, range(14))
        assert 3 <= pool.num_deaths <= 5  # item 3 once, item 11 twice; each once more if another item was in hand
    assert seen == expected(i for i in range(14) if i not in (5, 11))
    assert dead.keys() == {5, 11}
    assert dead[5] == "ValueError: bad item 5"
    assert "died" in dead[11]


@pytest.mark.parametrize(("when", "deaths", "dead"), [("once", 1, set()), ("always", 2, {0})])
def test_a_death_with_two_items_in_hand_blames_neither_and_the_guilty_is_found_alone(
    pools, tmp_path, when, deaths, dead
):
    worker = functools.partial(make, str(tmp_path), kill={0: when})
    with pools.ActorPool(worker, pools.Size(max_actors=1), retries=0) as pool:
        seen, found = run(pool, range(6))
        assert pool.num_deaths == deaths
    assert found.keys() == dead
    assert seen == expected(i for i in range(6) if i not in dead)


def test_the_pool_asks_for_no_more_actors_than_items_and_gives_idle_ones_back(pools, tmp_path):
    worker = functools.partial(make, str(tmp_path), together=2)
    with pools.ActorPool(worker, pools.Size(min_actors=1, max_actors=3), idle_seconds=0.0) as pool:
        run(pool, range(1))
        assert pool.num_actors == 1
        run(pool, range(8))
        assert pool.most_actors >= 2
        run(pool, range(2))
        assert pool.num_actors <= 2


def test_actors_that_the_cluster_has_no_room_for_do_not_hold_up_the_work(pools, tmp_path):
    worker = functools.partial(make, str(tmp_path), together=2)
    with pools.ActorPool(worker, pools.Size(max_actors=50, cpus=1.5)) as pool:  # two fit
        assert run(pool, range(60)) == (expected(range(60)), {})
        assert pool.most_actors == 2


def test_a_worker_that_cannot_start_ends_the_run_with_its_reason(pools, tmp_path):
    worker = functools.partial(make, str(tmp_path / "absent"))
    with (
        pools.ActorPool(worker, pools.Size(max_actors=1), max_failed_starts=2) as pool,
        pytest.raises(UserError, match=r"2 workers in a row failed to start: .*FileNotFoundError"),
    ):
        run(pool, range(3))


def test_a_stop_gives_out_no_more_and_lets_what_is_in_hand_end(pools, tmp_path):
    with pools.ActorPool(functools.partial(make, str(tmp_path)), pools.Size(max_actors=1)) as pool:
        done, asked = [], []

        def stop(in_hand):
            asked.append(in_hand)
            return len(done) >= 3

        for receipt in pool.run(tasks(range(30)), stop=stop):
            assert receipt.error == ""
            done.append((receipt.number, receipt.result))
        assert sorted(done) == [(i, i * 10) for i in range(len(done))]
        assert 3 <= len(done) <= 5  # three, and at most two in hand
        assert max(asked) <= 2
        assert run(pool, [1], stop=lambda _: True) == ({}, {})


def test_no_items_need_no_actors(pools, tmp_path):
    with pools.ActorPool(functools.partial(make, str(tmp_path)), pools.Size(max_actors=2)) as pool:
        assert run(pool, ()) == ({}, {})
        assert pool.num_actors == 0

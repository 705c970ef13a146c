from pathlib import Path

import pytest
from executors import Through

from mixgf.distributed.metrics import Meter
from mixgf.errors import UserError
from mixgf.execution import LocalExecutor, Receipt, Task
from mixgf.stages.fan_out import SourcePasses, fan_out


@pytest.fixture
def told(monkeypatch):
    """What the meter is told of the tasks, call by call."""
    calls = []
    monkeypatch.setattr(Meter, "units", lambda self, **states: calls.append(states))
    return calls


def touch(path):
    if path.endswith("bad"):
        msg = "no"
        raise ValueError(msg)
    if path.endswith("refused"):
        msg = f"{path}: not usable"
        raise UserError(msg)
    Path(path).touch()


def tasks(folder, names):
    """A task for each name; the first has the largest weight."""
    return [
        Task(part=f"{folder}/{name}", function=touch, args=(f"{folder}/{name}",), weight=len(names) - i, source=i)
        for i, name in enumerate(names)
    ]


def run(work, **options):
    return fan_out("work", work, LocalExecutor().run, meter=Meter("classify", "run0"), **options)


def test_tasks_are_work_units_on_the_boards_and_what_is_there_is_none(tmp_path, told):
    (tmp_path / "b").touch()
    assert run(tasks(tmp_path, ["a", "b", "c"])) == (2, True)
    assert told == [{"waiting": 2}, {"waiting": 1, "done": 1}, {"waiting": 0, "done": 2}]
    assert run(tasks(tmp_path, ["a", "b", "c"])) == (0, True)
    assert len(told) == 3


def test_a_task_that_fails_is_a_failed_unit_and_its_error_comes_through(tmp_path, told):
    with pytest.raises(ValueError, match="no"):
        run(tasks(tmp_path, ["a", "bad", "c", "d"]))
    assert told[-1] == {"waiting": 2, "done": 1, "failed": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_the_longest_task_runs_first_and_equal_ones_by_name(tmp_path):
    done = []
    work = [Task(part=f"{tmp_path}/{name}", function=touch, args=(f"{tmp_path}/{name}",), weight=weight)
            for name, weight in (("c", 1), ("b", 2), ("a", 1))]  # fmt: skip
    run(work, longest_first=True, done=lambda task, _: done.append(task.part[-1]))
    assert done == ["b", "a", "c"]


def test_a_user_error_ends_the_work_unless_the_stage_takes_it(tmp_path, told):
    work = tasks(tmp_path, ["a", "refused", "c"])
    with pytest.raises(UserError, match="refused: not usable"):
        run(work)
    errors = []
    assert run(work, failed=lambda task, error: errors.append((task.source, error))) == (1, False)
    assert errors == [(1, f"{tmp_path}/refused: not usable")]
    assert told[-1] == {"waiting": 0, "done": 1, "failed": 1}


def losing(work):
    """Receipts of tasks of which the second ended its worker."""
    yield Receipt(1, error="it ended its worker", lost=True)
    yield from (receipt for receipt in LocalExecutor().run(work) if receipt.number != 1)


def test_lost_tasks_are_named_after_the_others_and_no_source_is_refused_for_them(tmp_path, told):
    executor = Through(losing)
    passes = source_passes(tmp_path, executor, strict=True)
    name = tmp_path.name
    with pytest.raises(
        UserError, match=rf"prepare: metrics: 1 of 3 tasks were lost, for instance b \(part {name}/y\): it ended"
    ):
        passes.run("metrics", tasks(tmp_path, ["x", "y", "z"]))
    assert passes.refused == {}
    assert {path.name for path in tmp_path.iterdir()} >= {"x", "z"}
    assert told[-1] == {"waiting": 0, "done": 2, "failed": 1}


def source_passes(folder, executor, *, strict=False):
    """Passes over three sources, with the work in a folder."""
    meter = Meter("prepare", "run0")
    return SourcePasses(
        stage="prepare", sources=["a", "b", "c"], strict=strict, executor=executor, meter=meter, work=str(folder)
    )


def test_a_source_that_ends_its_worker_each_time_is_left_out_and_the_others_go_on(tmp_path):
    passes = source_passes(tmp_path, Through(losing))
    passes.run("metrics", tasks(tmp_path, ["x", "y", "z"]))
    assert list(passes.refused) == [1]
    assert passes.refused[1].startswith("b: it ended its worker: damaged, or too large")
    assert {path.name for path in tmp_path.iterdir()} >= {"x", "z"}


def test_a_source_with_an_error_is_refused_until_the_refused_ones_are_settled(tmp_path):
    passes = source_passes(tmp_path, LocalExecutor())
    passes.run("metrics", tasks(tmp_path, ["a", "refused", "c"]))
    assert passes.refused == {1: f"{tmp_path}/refused: not usable"}
    passes.settled = True
    with pytest.raises(UserError, match="refused: not usable"):
        passes.run("sentences", tasks(tmp_path, ["refused"]))
    strict = source_passes(tmp_path, LocalExecutor(), strict=True)
    with pytest.raises(UserError, match="refused: not usable"):
        strict.run("metrics", tasks(tmp_path, ["refused"]))

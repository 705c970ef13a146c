"""Ray runs tasks as the local executor does: the same receipts, each task once, and errors as the task raised them."""

import os
import time
from pathlib import Path

import numpy as np
import pytest

from mixgf.config.run import Compute, Config
from mixgf.distributed.executor import RayExecutor
from mixgf.errors import StorageError, UserError
from mixgf.execution import LocalExecutor, Shared, Task

pytestmark = pytest.mark.ray


def double(folder, values, name):
    """Leave a mark, and behave as the name says."""
    (Path(folder) / f"{name}-{os.getpid()}-{time.monotonic_ns()}").touch()
    if name == "refused":
        msg = "refused: not usable"
        raise UserError(msg)
    if name == "wrong":
        msg = "wrong"
        raise KeyError(msg)
    if name == "storage" and len(list(Path(folder).glob("storage-*"))) < 3:
        msg = "the way to object storage"
        raise StorageError(msg)
    if name == "long":
        time.sleep(600)
    return float(values.sum() * 2)


@pytest.fixture
def executor(ray_local):
    return RayExecutor(Config(compute=Compute(num_workers=2)))


def tasks(folder, names):
    values = Shared(np.arange(1000))
    return [Task(part=f"{folder}/{name}", function=double, args=(str(folder), values, name)) for name in names]


def ordered(receipts):
    return sorted(receipts, key=lambda receipt: receipt.number)


def test_receipts_are_those_of_the_local_executor(executor, tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "ray").mkdir()
    names = ["a", "refused", "b", "c"]
    local = list(LocalExecutor().run(tasks(tmp_path / "here", names)))
    assert ordered(executor.run(tasks(tmp_path / "ray", names))) == local
    assert [receipt.error for receipt in local] == ["", "refused: not usable", "", ""]
    assert local[0].result == np.arange(1000).sum() * 2
    assert len(list((tmp_path / "ray").iterdir())) == 4, "each task ran once"


def test_a_shared_argument_is_sent_once(executor, tmp_path, ray_local, monkeypatch):
    sent, put = [], ray_local.put
    monkeypatch.setattr(ray_local, "put", lambda value: (sent.append(value), put(value))[1])
    assert len(list(executor.run(tasks(tmp_path, "abcdef")))) == 6
    assert len(sent) == 1


def test_an_error_of_storage_is_tried_again(executor, tmp_path):
    assert [receipt.error for receipt in executor.run(tasks(tmp_path, ["storage"]))] == [""]
    assert len(list(tmp_path.iterdir())) == 3


def test_another_error_comes_through_and_cancels_what_runs(executor, tmp_path):
    began = time.monotonic()
    with pytest.raises(KeyError, match="wrong"):
        list(executor.run(tasks(tmp_path, ["long", "wrong", "never"])))
    assert not list(tmp_path.glob("never-*"))
    (receipt,) = executor.run(tasks(tmp_path, ["after"]))  # its worker is free again
    assert receipt.error == ""
    assert time.monotonic() - began < 300


def test_no_more_tasks_are_in_flight_than_asked_for(executor, tmp_path, ray_local, monkeypatch):
    most, wait = [], ray_local.wait
    monkeypatch.setattr(ray_local, "wait", lambda refs, **named: (most.append(len(refs)), wait(refs, **named))[1])
    assert len(list(executor.run(tasks(tmp_path, "abcdefgh")))) == 8
    assert max(most) == 2

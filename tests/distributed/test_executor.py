"""Ray runs tasks as the local executor does: the same receipts, each task once, and errors as the task raised them."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from mixgf import termination
from mixgf.config.run import Compute, Config
from mixgf.distributed.executor import ALL_CPUS, RayExecutor
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


def test_sigterm_ends_the_wait_for_a_task_at_once(executor, tmp_path):
    """Ray loses what a signal raises while it waits, unless it is a `KeyboardInterrupt`; the task here takes ten minutes."""

    def run():
        with termination.installed():
            list(executor.run(tasks(tmp_path, ["long"])))

    timer = threading.Timer(2, os.kill, (os.getpid(), signal.SIGTERM))
    begin = time.monotonic()
    timer.start()
    with pytest.raises(termination.Terminated):
        run()
    assert time.monotonic() - begin < 60


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


SHARED_GPUS = [
    # CPUs, GPUs of the cluster; CPUs, GPUs of a worker; threads of a task; tasks at a time, CPUs that each reserves
    (8, 1, 1.0, 0.25, 1, 4, 1.0),
    (4, 2, 0.5, 0.5, 4, 4, 0.5),
    (2, 1, 1.0, 0.25, 1, 2, 1.0),
    (2, 0, 0.5, 0.0, 1, 4, 0.5),
    (4, 0, 1.0, 0.0, 2, 2, 2.0),
]


def occupy(folder, name, expected):
    """Stay until so many tasks run, and a while longer for more to come; notes what was reserved, and how many there were."""
    import ray

    here, most, until = Path(folder) / name, 0, time.monotonic() + 60
    here.touch()
    while time.monotonic() < until:
        now = len(list(Path(folder).iterdir()))
        if most < expected <= now:
            until = time.monotonic() + 2
        most = max(most, now)
        time.sleep(0.05)
    here.unlink()
    reserved = ray.get_runtime_context().get_assigned_resources()
    return {"most": most, "cpus": reserved.get("CPU", 0), "gpus": reserved.get("GPU", 0)}


def main(folder):
    """Small tasks on clusters with GPUs that Ray only counts; prints how many ran together, and with what."""
    import ray

    found = []
    for number, (cpus, gpus, own_cpus, own_gpus, threads, expected, _) in enumerate(SHARED_GPUS):
        place = Path(folder) / str(number)
        place.mkdir()
        ray.init(
            address="local", num_cpus=cpus, num_gpus=gpus, include_dashboard=False, object_store_memory=100 << 20,
            log_to_driver=False, logging_level="ERROR",
        )  # fmt: skip
        config = Config(compute=Compute(cpus_per_worker=own_cpus, gpus_per_worker=own_gpus))
        some = [
            Task(part=str(i), function=occupy, args=(str(place), str(i), expected), gpu=True, threads=threads)
            for i in range(2 * expected)
        ]
        ended = list(RayExecutor(config, in_flight=ALL_CPUS).run(some))
        found.append([receipt.result for receipt in ended])
        ray.shutdown()
    sys.stdout.write(json.dumps(found) + "\n")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_small_tasks_share_gpus_and_cpus_by_the_fractions_that_a_worker_reserves(tmp_path):
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for case, results in zip(SHARED_GPUS, json.loads(done.stdout.splitlines()[-1]), strict=True):
        assert max(result["most"] for result in results) == case[5], case
        assert {(result["cpus"], result["gpus"]) for result in results} == {(case[6], case[3])}, case


if __name__ == "__main__":
    main(sys.argv[1])

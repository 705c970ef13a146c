"""Where training computes, and GPUs that are not there."""

import contextlib
import json
import os
import time
from types import SimpleNamespace

import killing
import pytest
import torch
from processes import without_logging_errors

from mixgf.config.parse import to_dict
from mixgf.config.run import Compute, Config
from mixgf.distributed import session, train_group
from mixgf.distributed.actor_pool import ActorPool, Size
from mixgf.distributed.executor import RayExecutor
from mixgf.errors import UserError
from mixgf.execution import Receipt, Task
from mixgf.tracking import mlflow_runs
from mixgf.training import worker_group

CARD = torch.device("cuda:3")


class Chosen(Exception):
    pass


@pytest.fixture
def said(monkeypatch):
    """What the worker tells the driver's board."""
    texts = []
    monkeypatch.setattr(train_group, "get_device", lambda: CARD)
    monkeypatch.setattr(train_group.ray, "get", lambda reference: reference)
    return texts


def work(said, gpus):
    board = SimpleNamespace(fail=SimpleNamespace(remote=said.append))
    config = Config(compute=Compute(gpus_per_worker=gpus))
    train_group.work({"config": to_dict(config), "board": board, "run": "", "stage": "pretrain"})


@pytest.mark.parametrize(("gpus", "expected"), [(1.0, CARD), (0.0, torch.device("cpu"))])
def test_a_worker_trains_on_the_card_that_ray_gave_it_and_only_if_one_was_asked_for(said, monkeypatch, gpus, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    devices = []

    def context(device, board, run, stage):
        devices.append(device)
        raise Chosen

    monkeypatch.setattr(train_group, "RayContext", context)
    with pytest.raises(Chosen):
        work(said, gpus)
    assert devices == [expected]
    assert not said


@pytest.mark.parametrize("cuda", [True, False])
def test_a_worker_on_the_cpu_of_a_machine_with_gpus_wraps_the_model_without_them(monkeypatch, cuda):
    """`prepare_model` selects a GPU wherever one is visible, and fails for a worker on the CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    wrapped = []
    monkeypatch.setattr(worker_group.GroupContext, "wrap", lambda _, module: wrapped.append("torch"))

    def prepare(module, **_):
        wrapped.append("ray")
        raise Chosen

    monkeypatch.setattr(train_group, "prepare_model", prepare)
    context = object.__new__(train_group.RayContext)
    context.device = torch.device("cpu")
    with contextlib.suppress(Chosen):
        context.wrap(torch.nn.Linear(1, 1))
    assert wrapped == (["torch"] if cuda else ["ray"])


def test_a_worker_without_the_gpu_that_is_asked_for_tells_the_driver_and_does_not_train(said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    work(said, 1.0)
    assert len(said) == 1
    assert said[0].startswith("compute.gpus_per_worker = 1: no GPU here")


NONE_HERE = r"^compute.gpus_per_worker = 1: Ray finds 0 GPUs on this machine; set compute.gpus_per_worker=0 "


@pytest.mark.ray
def test_a_local_ray_without_gpus_ends_a_run_that_would_wait_for_one(ray_local):
    config = Config(compute=Compute(gpus_per_worker=1.0))
    task = Task(part="a", function=print, gpu=True)
    starts = (
        lambda: ActorPool(lambda: None, Size(gpus=1.0)),
        lambda: next(RayExecutor(config).run([task])),
        lambda: train_group.train(config, "", "", "", num_steps=1, tracked=mlflow_runs.Run("off", "", "")),
    )
    for start in starts:
        with pytest.raises(UserError, match=NONE_HERE):
            start()


@pytest.mark.ray
def test_tasks_that_need_no_gpu_run_and_a_cluster_may_still_grow(ray_local, monkeypatch):
    executor = RayExecutor(Config(compute=Compute(gpus_per_worker=1.0)))
    assert list(executor.run([Task(part="a", function=print)])) == [Receipt(0)]
    session.require_gpus(0)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    session.require_gpus(1.0)


@pytest.mark.ray
@pytest.mark.timeout(900)
@pytest.mark.parametrize("victim", ["ray::Board", "ray::TrainController"])
@pytest.mark.usefixtures("ray_local")
def test_a_training_outlives_the_loss_of_the_processes_that_lead_it_and_every_figure_arrives(victim, tmp_path, capfd):
    """SIGKILL to the board, which gathers the figures, or to Ray's controller of the group; a file stands for the checkpoint."""
    last, checkpoint, killed = 60, tmp_path / "checkpoint.json", []

    def job(context):
        kept = json.loads(checkpoint.read_text()) if checkpoint.exists() else []
        if kept:
            context.recover([tuple(row) for row in kept])
        for step in range(len(kept) + 1, last + 1):
            kept.append((step, 0, "loss", float(step)))
            checkpoint.write_text(json.dumps(kept))
            context.report(step, {"loss": float(step)})
            context.commit(kept[-1:])
            time.sleep(0.1)

    class Tracked:
        id = "run"
        new, missing = [], []

        def log_many(self, rows):
            self.new += rows
            if rows and not killed:
                killed.extend(killing.workers(os.getpid(), victim))
                assert killed
                killed[0].kill()

        def log_missing(self, rows):
            self.missing += rows

    config, tracked = Config(compute=Compute(num_workers=1, max_failures=3)), Tracked()
    train_group.run_group(job, config, stage="pretrain", num_steps=last, tracked=tracked)
    assert killed
    steps = [step for step, _, _ in tracked.new]
    assert len(steps) == len(set(steps))
    assert {*steps, *(step for step, _, _ in tracked.missing)} == set(range(1, last + 1))
    out, err = capfd.readouterr()
    assert "Traceback" not in without_logging_errors(out + err)

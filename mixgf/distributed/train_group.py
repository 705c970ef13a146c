"""Ray Train worker group."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import ray
import ray.train
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device, prepare_model
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mixgf import termination
from mixgf.config.parse import from_dict, to_dict
from mixgf.config.run import Config, Tracking
from mixgf.console import Progress
from mixgf.corpus.reader import Corpus
from mixgf.distributed.metrics import SHOWN, Board, Meter
from mixgf.distributed.session import require_gpus
from mixgf.encoder.device import pick_device
from mixgf.errors import UserError
from mixgf.tracking import mlflow_runs
from mixgf.training import held_out_loss
from mixgf.training.gradient_sums import ARGUMENTS
from mixgf.training.loop import fit
from mixgf.training.pretraining import ContrastWatch, Pretraining, initial_model
from mixgf.training.worker_group import Asked, Context, GroupContext, MetricRow, Seen, ignore

ASK_SECONDS = 0.5
"""Between two questions of a group to its driver whether it is to stop."""
LOOK_SECONDS = float(os.environ.get("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "5"))
"""Between two questions of a group to Ray whether nodes will be lost: as often as Ray looks itself."""


class RayContext(GroupContext):
    """A worker of a Ray Train group, whose figures go to the driver's board; the driver logs them."""

    def __init__(self, device: torch.device, board: Any, run: str, stage: str = "pretrain") -> None:
        super().__init__(device)
        self._board, self._run, self._stage = board, run, stage
        self._answer: Any = None
        self._born = ""
        self._asked_at, self._looked_at, self._preemption = -math.inf, time.monotonic(), None

    def asked(self) -> Asked:
        """To stop where the driver got SIGTERM, and now and then to look for lost nodes. Does not wait."""
        if self.rank > 0:
            return Asked()
        look = time.monotonic() > self._looked_at + LOOK_SECONDS
        if look:
            self._looked_at = time.monotonic()
        return Asked(stop=self._driver_stops(), look=look)

    def agree(self, asked: Asked) -> Asked:
        """To save, too, where Ray is about to lose nodes of the group; the workers meet to ask for that."""
        if not asked.look:
            return asked
        found = ray.train.get_preemption_info()
        save, self._preemption = found not in (None, self._preemption), found
        return Asked(save=save, stop=asked.stop)

    def _driver_stops(self) -> bool:
        """The board's latest answer; it is asked again every `ASK_SECONDS`."""
        if self._answer is None:
            if time.monotonic() < self._asked_at + ASK_SECONDS:
                return False
            self._answer, self._asked_at = self._board.is_stopping.remote(), time.monotonic()
        if not ray.wait([self._answer], timeout=0)[0]:
            return False
        answer, self._answer = self._answer, None
        with contextlib.suppress(ray.exceptions.RayActorError):
            return bool(ray.get(answer))
        return False

    def wrap(self, module: nn.Module) -> DistributedDataParallel:
        """The module in DistributedDataParallel, by Ray Train."""
        if self.device.type == "cpu" and torch.cuda.is_available():  # Ray would select a GPU, which was not asked for
            return super().wrap(module)
        wrapped = prepare_model(module, move_to_device=self.device, parallel_strategy_kwargs=ARGUMENTS)
        assert isinstance(wrapped, DistributedDataParallel)
        return wrapped

    def report(self, step: int, figures: dict[str, float]) -> None:
        """Show the driver and the boards; does not wait."""
        self._board.report.remote(step, figures)
        Meter(self._stage, self._run).figures(step, figures)

    def commit(self, rows: list[MetricRow]) -> None:
        """Give the driver what it is to log."""
        self._is_same_board(ray.get(self._board.commit.remote(rows)))

    def recover(self, rows: list[MetricRow]) -> None:
        """Give the driver what it is to log where that is missing."""
        self._is_same_board(ray.get(self._board.recover.remote(rows)))

    def _is_same_board(self, born: str) -> None:
        """Fail where the board was started again, with rows lost: the group then starts again, and gives those of its checkpoint."""
        if self._born not in ("", born):
            msg = "the process that gathers the figures of the training was lost"
            raise RuntimeError(msg)
        self._born = born


def work(params: dict[str, Any]) -> None:
    """One worker of the group."""
    config = from_dict(Config, params["config"])
    try:
        device = _device(config.compute.gpus_per_worker)
        if device.type == "cpu":
            torch.set_num_threads(config.train.threads)
        context = RayContext(device, params["board"], params["run"], params["stage"])
        params["job"](context)
    except termination.Terminated:
        return  # the driver, which asked for it, raises it
    except UserError as error:  # the same on every worker: the driver raises it, and the group does not start again
        ray.get(params["board"].fail.remote(str(error)))


def _device(gpus: float) -> torch.device:
    """The CPU, or the GPU that Ray gave this worker: workers of one node see the GPUs of all of them."""
    device = pick_device(gpus)
    return get_device() if device.type == "cuda" else device


def log_rows(tracked: mlflow_runs.Run, recovered: list[MetricRow], committed: list[MetricRow]) -> None:
    """Log what the workers gave to the board: rows of an earlier session where they are missing, and new rows."""
    tracked.log_missing(mlflow_runs.training_rows(recovered))
    tracked.log_many(mlflow_runs.training_rows(committed))


def train(
    config: Config, corpus: str, uri: str, identity: str, *, num_steps: int, tracked: mlflow_runs.Run, until: int = 0
) -> None:
    """Pretrain in a worker group to the end, or until a step, from the latest checkpoint in `uri` on.

    Raises:
        UserError: it cannot be trained, for example because a loss is not finite.
    """
    job = partial(pretrain, replace(config, tracking=Tracking()), corpus, uri, identity, until)  # only the driver logs
    run_group(job, config, stage="pretrain", num_steps=num_steps, tracked=tracked, seen=ContrastWatch(config))


def pretrain(config: Config, corpus: str, uri: str, identity: str, until: int, context: Context) -> None:  # noqa: PLR0917 (a job)
    """One worker's part of a pretraining."""
    found = Corpus(corpus, max_len=config.model.max_positions)
    task, model = Pretraining(config, found), initial_model(config, found)
    selection = held_out_loss.selection(task)
    fit(model, task, config.train, context, uri=uri, identity=identity, until=until, selection=selection)


def run_group(
    job: Callable[[Context], None], config: Config, *, stage: str, num_steps: int, tracked: mlflow_runs.Run,
    seen: Seen = ignore,
) -> None:  # fmt: skip
    """Run a job on every worker of a group to its end; a lost group starts again, with as many workers as there are.

    Args:
        job: Called with the worker's context. It goes on from what it finds in storage.
        config: `compute` has the size of the group, `train` the threads of a worker.
        stage: For progress and metrics.
        num_steps: Steps of the training.
        tracked: Receives metrics.
        seen: Receives figures in this process.

    Raises:
        UserError: The job raised it, in any worker.
        Terminated: This process got SIGTERM; a training has written a checkpoint where the time allowed.
    """
    compute = config.compute
    require_gpus(compute.gpus_per_worker)
    gpu = compute.gpus_per_worker > 0
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    # lost with the driver, not with a worker's node; started again where it is lost alone
    board = ray.remote(num_cpus=0, scheduling_strategy=here, max_restarts=-1)(Board).remote()
    params = {
        "config": to_dict(replace(config, tracking=Tracking())), "board": board, "run": tracked.id, "stage": stage,
        "job": job,
    }  # fmt: skip
    resources = {"CPU": compute.cpus_per_worker} | ({"GPU": compute.gpus_per_worker} if gpu else {})
    elastic = 0 < compute.min_workers < compute.num_workers
    scaling = ScalingConfig(
        num_workers=(compute.min_workers, compute.num_workers) if elastic else compute.num_workers,
        elastic_resize_monitor_interval_s=compute.resize_seconds, use_gpu=gpu, resources_per_worker=resources,
    )  # fmt: skip
    for name in ("ray.train", "ray.train.v2"):
        logging.getLogger(name).setLevel(logging.ERROR)
    scratch = tempfile.mkdtemp(prefix="mixgf-train-")  # Ray's own bookkeeping; ours is in the output
    trainer = TorchTrainer(
        work,
        train_loop_config=params,
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=scaling,
        run_config=RunConfig(
            name=f"mixgf-{uuid.uuid4().hex[:8]}", storage_path=scratch,
            failure_config=FailureConfig(max_failures=compute.max_failures),
        ),
    )  # fmt: skip
    try:
        with termination.listening(), _watch(board, stage, num_steps, tracked, seen):
            _fit(trainer, compute.max_failures)
        if termination.requested():
            raise termination.Terminated
        error = _asked(board.read)[2]
    finally:
        ray.kill(board)
        shutil.rmtree(scratch, ignore_errors=True)
    if error:
        raise UserError(error)


def _fit(trainer: TorchTrainer, max_failures: int) -> None:
    """Train. Where Ray's own controller of the group is lost, start it again: it ends the group, which goes on from its checkpoint."""
    failures = 0
    while True:
        try:
            trainer.fit()
        except ray.exceptions.RayActorError:
            failures += 1
            if 0 <= max_failures < failures or termination.requested():
                raise
        else:
            return


def _asked(method: Any) -> Any:
    """The answer of a method of the board, which may be starting again."""
    while True:
        with contextlib.suppress(ray.exceptions.RayActorError):
            return ray.get(method.remote())
        time.sleep(0.2)


@contextlib.contextmanager
def _watch(board: Any, stage: str, num_steps: int, tracked: mlflow_runs.Run, seen: Seen) -> Iterator[None]:
    """Show the board's figures as progress, and log them, from a thread."""
    ended = threading.Event()

    def look() -> None:
        progress: Progress | None = None
        while not ended.wait(0.5):
            if termination.requested():
                board.stop.remote()
            step, figures, _ = _asked(board.read)
            if step:
                seen(step, figures)
                progress = progress or Progress(stage, num_steps, "steps", done=step)
                progress.update(step, **{k: figures[k] for k in SHOWN if k in figures})
            log_rows(tracked, *_asked(board.take))
        log_rows(tracked, *_asked(board.take))
        if progress is not None:
            progress.close()

    thread = threading.Thread(target=look, name="mixgf-board", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()

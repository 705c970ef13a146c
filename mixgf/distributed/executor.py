"""The executor of a Ray cluster: row passes by Ray Data, other tasks as Ray tasks, pools as actor pools.

Ray is imported when a session opens, so that a stage without Ray does not load it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mixgf import execution
from mixgf.config.run import Compute, Config
from mixgf.execution import Pipeline, Receipt, Receipts, Shared, Task

if TYPE_CHECKING:
    from mixgf.distributed.actor_pool import ActorPool

ALL_CPUS = 256
"""Tasks in flight where the cluster's CPUs are the bound: more than fit, so that an autoscaler sees what is wanted."""


class RayExecutor:
    """Runs tasks on Ray.

    A task whose worker or node is lost runs again, and so does one with an `OSError`; see `mixgf.storage.retry`.

    Args:
        config: for `compute` and, where a local Ray is started, `train.threads`.
        in_flight: tasks given to Ray at a time; 0 = `compute.num_workers`.
    """

    local = False

    def __init__(self, config: Config, *, in_flight: int = 0) -> None:
        self.config, self.in_flight = config, in_flight or config.compute.num_workers

    def session(self) -> AbstractContextManager[None]:
        """A connection to Ray; inside another session, nothing."""
        from mixgf.distributed.session import session

        return session(self.config)

    def run(self, tasks: Sequence[Task]) -> Receipts:
        """Run tasks; an error that is no `UserError` is raised as the task raised it, and the other tasks are cancelled.

        Tasks of a `Pipeline` run on Ray Data (`mixgf.distributed.pipelines`).
        """
        import ray

        from mixgf.distributed.session import require_gpus

        remote, compute = ray.remote(attempt), self.config.compute
        gpus = compute.gpus_per_worker if any(task.gpu for task in tasks) else 0
        require_gpus(gpus)
        if tasks and isinstance(tasks[0].function, Pipeline):
            from mixgf.distributed.pipelines import Needs, run_pipeline

            needs = Needs(
                cpus=compute.cpus_per_worker, gpus=gpus, in_flight=self.in_flight, min_actors=max(1, compute.min_workers)
            )  # fmt: skip
            yield from run_pipeline(tasks, needs)
            return
        sent: dict[int, Any] = {}

        def argument(value: Any) -> Any:
            if not isinstance(value, Shared):
                return value
            if id(value.value) not in sent:
                sent[id(value.value)] = ray.put(value.value)
            return sent[id(value.value)]

        running: dict[Any, int] = {}
        todo = iter(enumerate(tasks))
        try:
            while True:
                while len(running) < self.in_flight and (following := next(todo, None)) is not None:
                    number, task = following
                    cpus, gpus = resources(compute, task.threads, gpu=task.gpu)
                    options = {
                        "num_cpus": cpus,
                        "num_gpus": gpus,
                        "max_retries": 3,
                        "retry_exceptions": [OSError],
                        "scheduling_strategy": "DEFAULT",  # not in the placement group of a Tune trial that runs the task
                    }
                    arguments = [argument(value) for value in task.args]
                    running[remote.options(**options).remote(number, replace(task, args=()), *arguments)] = number
                if not running:
                    return
                for ref in ray.wait(list(running), num_returns=1)[0]:
                    number = running.pop(ref)
                    yield _received(ref, number)
        finally:
            for ref in running:
                ray.cancel(ref, force=True)

    def pool(self, worker: Callable[[], Any], *, most: int = 0) -> ActorPool:
        """An elastic pool of actors; each holds one worker."""
        from mixgf.distributed.actor_pool import ActorPool, Size

        compute = self.config.compute
        most = most or compute.num_workers
        size = Size(
            min_actors=min(most, max(1, compute.min_workers)),
            max_actors=most,
            cpus=compute.cpus_per_worker,
            gpus=compute.gpus_per_worker,
        )
        return ActorPool(worker, size, retries=compute.max_failures)


def resources(compute: Compute, threads: int, *, gpu: bool) -> tuple[float, float]:
    """CPUs and GPUs that a task reserves, which may be fractions: many small tasks then share one.

    Args:
        compute: `cpus_per_worker` and `gpus_per_worker`.
        threads: Of torch; several threads on a CPU reserve at least as many CPUs.
        gpu: Whether the task computes on a GPU, if workers have one.
    """
    gpus = compute.gpus_per_worker if gpu else 0.0
    return (compute.cpus_per_worker if gpus or threads <= 1 else max(compute.cpus_per_worker, float(threads))), gpus


def attempt(number: int, task: Task, *args: Any) -> Receipt:
    """Run one task in a worker. `args` are the task's own, which Ray has fetched."""
    if task.threads:
        import torch

        torch.set_num_threads(task.threads)
    return execution.attempt(number, replace(task, args=args))


def _received(ref: Any, number: int) -> Receipt:
    import ray

    from mixgf.distributed.pipelines import LOST

    try:
        return ray.get(ref)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause or error) from None
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.OutOfMemoryError):
        return Receipt(number, error=LOST, lost=True)

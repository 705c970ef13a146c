"""Workers of a training group as threads of this process, which meet in every sum."""

import threading

import pytest
import torch

from mixgf.training.loop import TaskForward, compute_gradients
from mixgf.training.worker_group import LocalContext


def run_workers(number, work):
    """Call `work(context)` in each of `number` workers at once; what they return, by rank."""
    barrier, buffers, lock = threading.Barrier(number), {}, threading.Lock()

    class Worker(LocalContext):
        calls = 0

        def all_reduce(self, x):
            key, self.calls = self.calls, self.calls + 1
            with lock:
                buffers.setdefault(key, {})[self.rank] = x.clone()
            barrier.wait(60)
            x.copy_(sum(buffers[key][r] for r in range(number)))

    results = {}

    def run(rank):
        results[rank] = work(Worker(torch.device("cpu"), rank, number))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == number
    return [results[rank] for rank in range(number)]


def run_first_step(make, workers):
    """Losses and flat gradient of the first step, summed over workers; `make()` gives the task and the model of each."""

    def work(context):
        task, model = make()
        figures = compute_gradients(TaskForward(model, task), task.work(0, context.rank, workers), context)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
        return {k: v.item() for k, v in figures.items()}, torch.cat([g.reshape(-1) for g in grads])

    results = run_workers(workers, work)
    figures = {k: sum(found[k] for found, _ in results) for k in results[0][0]}
    return figures, sum(gradient for _, gradient in results)


def assert_same_step(a, b, tolerance):
    """Losses and gradients of two steps agree, relative to their size or to 1."""
    assert a[0].keys() == b[0].keys()
    for name, value in a[0].items():
        assert value == pytest.approx(b[0][name], rel=tolerance, abs=tolerance), name
    assert (a[1] - b[1]).abs().max() <= tolerance * max(1.0, a[1].abs().max().item())

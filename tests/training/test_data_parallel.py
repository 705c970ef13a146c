"""Gradients in DistributedDataParallel are those of one worker, at every number of workers and for every share of a batch.

Adam hides a wrong factor of all gradients, and losses hide it as well, so gradients and their norm are compared themselves. The file
is its own worker group: `PYTHONPATH=tests python tests/training/test_data_parallel.py SPEC` imports torch once and forks the workers.
"""

import json
import sys
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from forks import fork_workers, run_script

from mixgf.config import training
from mixgf.config.data import Tokens
from mixgf.config.run import Config, Inputs
from mixgf.corpus.reader import Corpus
from mixgf.execution import LocalExecutor
from mixgf.stages import pretrain_inputs

ROW = training.Model(num_layers=2, dim=32, num_heads=4, ffn_dim=48, max_positions=40, dropout=0.1)
STEPS = 3
WORKERS = (1, 2, 3)
ALL = {"simcsepp_weight": 0.1}
NEIGHBOURS = {"view": "neighbour", "pooling": "ranked", "mlm_weight": 0.0, "learn_temperature": True, "projection": 16}
CASES = {
    "one micro batch": (ALL, {}),
    "several micro batches": (ALL, {"micro_tokens": 60}),
    "one micro batch here and two there": (ALL, {"micro_tokens": 150, "batch_cells": 7}),
    "fewer cells than workers": (ALL, {"batch_cells": 2}),
    "a cell for one worker alone": ({}, {"batch_cells": 1}),
    "masked genes only": ({"contrast_weight": 0.0}, {"micro_tokens": 20}),
    "almost no masked genes": ({"contrast_weight": 0.0, "mlm_fraction": 0.02}, {"micro_tokens": 20, "batch_cells": 2}),
    "first position": ({"pooling": "first"}, {"micro_tokens": 60}),
    "contrast only": ({"mlm_weight": 0.0}, {"micro_tokens": 60}),
    "neighbours": (NEIGHBOURS, {}),
    "neighbours, several micro batches": (NEIGHBOURS, {"micro_tokens": 60}),
    "neighbours, a cell for some workers": (NEIGHBOURS, {"batch_cells": 4}),
    "neighbours and layers": (NEIGHBOURS | {"mlm_weight": 0.5}, {"micro_tokens": 150}),
    "frozen layers": ({}, {"micro_tokens": 60}),
    "adapters": ({}, {"batch_cells": 2}),
}
"""Settings of the objective and of the optimisation by case."""


@pytest.fixture(scope="module")
def gradients(make_corpus, tmp_path_factory):
    """By case, way and number of workers: the gradient of each step, (STEPS, parameters)."""
    folder = str(tmp_path_factory.mktemp("gradients"))
    corpus = make_corpus(np.random.default_rng(0).integers(5, 30, 23), np.arange(23) % 2, [9, 14])
    neighbours = pretrain_inputs.make_neighbours(Config(output=folder), Corpus(corpus), LocalExecutor())
    run_script(__file__, {"corpus": corpus, "folder": folder, "neighbours": neighbours})
    return {n: dict(np.load(f"{folder}/{n}.npz")) for n in ("alone", *WORKERS)}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("workers", WORKERS)
def test_gradients_of_a_group_are_those_of_one_worker(gradients, case, workers):
    alone, ours = gradients["alone"][case], gradients[workers][case]
    assert alone.shape == ours.shape
    for step in range(STEPS):
        size = np.linalg.norm(alone[step].astype(np.float64))
        if case != "almost no masked genes":
            assert size > 1e-3
        error = np.linalg.norm(ours[step].astype(np.float64) - alone[step])
        assert error <= 2e-6 * size, (step, error / size)
        assert np.linalg.norm(ours[step].astype(np.float64)) == pytest.approx(size, rel=1e-6)
    if workers == 1:
        assert np.array_equal(alone, ours)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("workers", WORKERS)
def test_a_group_adds_up_what_its_workers_compute(gradients, case, workers):
    """One sum of all gradients after the backward pass has the same bits for two workers; for more, the order of the sums differs."""
    once, ours = gradients[workers][f"{case}, summed once"], gradients[workers][case]
    if workers < 3:
        assert np.array_equal(once, ours)
    for step in range(STEPS):
        error = np.linalg.norm(ours[step].astype(np.float64) - once[step])
        assert error <= 5e-7 * np.linalg.norm(once[step].astype(np.float64))


@pytest.mark.parametrize("workers", [2, 3])
def test_gradients_sent_as_bfloat16_are_near_those_sent_as_float32(gradients, workers):
    exact, ours = (gradients[workers][f"several micro batches{how}"] for how in ("", ", bf16"))
    error = np.linalg.norm(ours.astype(np.float64) - exact) / np.linalg.norm(exact.astype(np.float64))
    assert 1e-5 < error < 1e-2


def test_the_trained_parameters_alone_have_gradients(gradients):
    sizes = {case: gradients["alone"][case].shape[1] for case in CASES}
    assert 0 < sizes["adapters"] < sizes["frozen layers"] < sizes["one micro batch"]


# the workers


def main(spec):
    """Fork groups of 1, 2 and 3 workers, one after the other; each first worker writes what it found."""
    import torch
    import torch.distributed as dist  # noqa: F401 (imported once, before the forks)

    torch.set_num_threads(1)
    for size in (0, *WORKERS):
        number = max(size, 1)
        assert fork_workers(number, partial(worker, spec, size), f"group of {size}") == [0] * number


def worker(spec, size, rank):
    """Gradients of all cases in a group of `size`; 0 = without a process group."""
    import torch
    import torch.distributed as dist

    from mixgf.training import worker_group

    context = worker_group.LocalContext()
    if size:
        store = f"file://{spec['folder']}/store{size}"
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size)
        context = worker_group.GroupContext(torch.device("cpu"))
    found = {}
    for case in CASES:
        found[case] = steps(spec, case, context)
        if size:
            found[f"{case}, summed once"] = steps(spec, case, context, once=True)
    if size:
        case = "several micro batches"
        found[f"{case}, bf16"] = steps(spec, case, context, reduce="bf16")
        context.barrier()
        dist.destroy_process_group()
    if rank == 0:
        np.savez(f"{spec['folder']}/{size or 'alone'}.npz", **found)


def steps(spec, case, context, *, once=False, reduce="fp32"):
    """Gradients of the first steps at the initial weights, (STEPS, parameters)."""
    import torch

    from mixgf.training import gradient_sums, loop

    model, task = model_and_task(spec, case)
    module = loop.TaskForward(model, task)
    if not once:
        module = context.parallel(module, reduce)
        gradient_sums.settle_buckets(module)
    out = []
    for step in range(STEPS):
        for p in model.parameters():
            if p.grad is not None:
                p.grad.zero_()
        loop.compute_gradients(module, task.work(step, context.rank, context.world_size), context)
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters() if p.requires_grad]
        flat = torch.cat([part.reshape(-1) for part in parts])
        if once:
            context.all_reduce(flat)
        out.append(flat.numpy().copy())
    return np.stack(out)


def model_and_task(spec, case):
    """A model with its task; the last two cases classify cells by an encoder that is trained in part."""
    import torch.nn.functional as F

    from mixgf.classification.finetune import Classifier
    from mixgf.encoder import lora
    from mixgf.encoder.batch import pack_batch
    from mixgf.encoder.bert import Encoder, MaskedModel
    from mixgf.training import loop
    from mixgf.training.pretraining import Pretraining, blank_model

    objective, train = CASES[case]
    row = replace(ROW, residual=case == "neighbours and layers")
    inputs = Inputs(neighbours=spec["neighbours"]) if objective.get("view") == "neighbour" else Inputs()
    config = Config(
        model=row, inputs=inputs, tokens=Tokens(max_len=40), objective=training.Objective(**objective),
        train=training.Train(**({"batch_cells": 10, "micro_tokens": 10_000} | train)),
    )  # fmt: skip
    corpus = Corpus(spec["corpus"])
    pretraining = Pretraining(config, corpus)
    if inputs.neighbours:
        return blank_model(config, corpus.vocabulary.size), pretraining
    if case not in ("frozen layers", "adapters"):
        return MaskedModel(ROW, corpus.vocabulary.size, seed=1), pretraining
    model = Classifier(Encoder(ROW, corpus.vocabulary.size), 2, pooling="mean", cls=False, seed=0)
    if case == "frozen layers":
        model.freeze(1)
    else:
        lora.add_adapters(model.encoder, 2, 4.0, seed=0)

    def batches(step, rank, world_size):
        share = pretraining.plan.share(step, rank, world_size)
        cells = [share.cells_B] if config.train.micro_tokens > 1000 else np.array_split(share.cells_B, 2)
        return loop.BatchWork([pack_batch([corpus.tokens(few)], few) for few in cells], share.batch_cells)

    def sums(model, batch):
        return {"loss": F.cross_entropy(model(batch), batch.cells_B.long() % 2, reduction="sum")}

    return model, loop.LossTask(3, batches, sums)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

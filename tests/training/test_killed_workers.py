"""A run whose workers are killed (SIGKILL) at random steps and in the middle of checkpoints, against the run never killed.

The file is its own victim: `PYTHONPATH=tests python tests/training/test_killed_workers.py SPEC` imports torch once and forks every worker of every attempt, so
that a death costs little. What a worker does is `train.fit`; Ray's part is in stages/test_killed_ray.py.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from forks import fork_workers, run_script

from mixgf.config import parse, training
from mixgf.config.data import Tokens
from mixgf.config.run import Config
from mixgf.storage import files, tables

LOSSES = ("loss", "mlm", "contrast", "grad_norm", "lr", "alignment", "uniformity")
LENGTHS = np.random.default_rng(0).integers(5, 30, 47)
SETTINGS = Config(
    model=training.Model(num_layers=2, dim=32, num_heads=4, ffn_dim=48, max_positions=40, dropout=0.1),
    tokens=Tokens(max_len=40),
    train=training.Train(epochs=2, batch_cells=6, lr=1e-2, warmup_steps=3, log_steps=1, checkpoint_steps=3),
)
STEPS = 16


NO_KILL = [None, None, None]


def deaths(seed, workers, number):
    """Attempts that end in random deaths: of any worker in a step, or of the first while it writes (history, weights, ...)."""
    rng = np.random.default_rng(seed)
    plan = []
    for i in range(number):
        if i % 2:
            plan.append([workers, 0, "write", int(rng.integers(1, 9))])
        else:
            plan.append([workers, int(rng.integers(workers)), "step", int(rng.integers(0, 6))])
    return [*plan, [workers, *NO_KILL]]


PLANS = {
    "undisturbed 1": [[1, *NO_KILL]],
    "undisturbed 2": [[2, *NO_KILL]],
    "undisturbed 3": [[3, *NO_KILL]],
    "killed 1": deaths(1, 1, 6),
    "killed 2": deaths(2, 2, 6),
    "killed 3": [[3, 2, "step", 4], [3, 0, "write", 5], [3, 1, "step", 4], [3, *NO_KILL]],
    "killed s3": deaths(3, 1, 6),
    "elastic": [[2, 1, "step", 4], [1, 0, "step", 4], [2, 0, "step", 4], [3, *NO_KILL]],
}
"""Attempts by scenario; each is (workers, who dies, of what, after how many)."""


@pytest.fixture(scope="module")
def corpus(make_corpus):
    return make_corpus(LENGTHS, np.arange(47) % 2, [9, 1, 20, 17])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("chaos")


@pytest.fixture(scope="module")
def runs(corpus, folder, s3_bucket):
    """All scenarios in one process, whose forks are the workers: exit codes and outputs."""
    outputs = {name: f"{s3_bucket}/chaos" if "s3" in name else f"{folder}/{name}/run" for name in PLANS}
    spec = {
        "config": parse.to_dict(SETTINGS),
        "corpus": corpus,
        "folder": str(folder),
        "plans": PLANS,
        "outputs": outputs,
    }
    return json.loads(run_script(__file__, spec)), outputs


def result(output):
    """The trace of losses by (step, name), and the hashes of the final weights and moments."""
    rows = tables.read_table(f"{output}/history.parquet").to_pylist()
    trace = {(row["step"], row["name"]): row["value"] for row in rows if row["name"] in LOSSES}
    assert len(trace) == sum(row["name"] in LOSSES for row in rows) == STEPS * len(LOSSES)  # every step, and none twice
    paths = files.read_json(f"{output}/steps/{STEPS:08d}/state.json")["files"]
    return trace, {name: file["sha256"] for name, file in paths.items()}


@pytest.mark.parametrize(
    ("name", "same_as"), [("killed 1", "1"), ("killed 2", "2"), ("killed 3", "3"), ("killed s3", "1")]
)
def test_a_run_killed_again_and_again_gives_the_bits_of_the_run_never_killed(runs, name, same_as):
    codes, outputs = runs
    for (_, victim, _, _), ends in zip(PLANS[name][:-1], codes[name][:-1], strict=True):
        assert ends[victim] == -9
    assert set(codes[name][-1]) == {0}
    assert result(outputs[name]) == result(outputs[f"undisturbed {same_as}"])
    assert files.list_dir(f"{outputs[name]}/steps") == ["00000015", "00000016"]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_parameters_of_a_checkpoint_are_named_as_in_the_model(runs, workers):
    from mixgf.encoder.bert import MaskedModel
    from mixgf.encoder.checkpoint import read_tensors

    folder = f"{runs[1][f'undisturbed {workers}']}/steps/{STEPS:08d}"
    names = {name for name, _ in MaskedModel(SETTINGS.model, 90).named_parameters()}
    assert set(read_tensors(f"{folder}/model.safetensors")) == names


def test_another_number_of_workers_goes_on_with_the_same_cells_in_the_same_batches(runs, corpus, folder):
    """Two workers, one, two, three: as an elastic group that loses and gains workers."""
    codes, outputs = runs
    assert codes["elastic"][-1] == [0, 0, 0]
    ours, expected = result(outputs["elastic"])[0], result(outputs["undisturbed 1"])[0]
    for key, value in expected.items():
        # the contrast is exp(cosine / temperature) to first order: its relative error is that of a cosine / temperature
        near = 2e-5 / training.Objective().temperature if key[1] in ("alignment", "contrast") else 2e-5
        assert ours[key] == pytest.approx(value, rel=near), key

    from mixgf.corpus.reader import Corpus
    from mixgf.training.pretraining import Pretraining

    batches, plan = Pretraining(SETTINGS, Corpus(corpus)).plan, PLANS["elastic"]
    seen = {}
    for path in (folder / "elastic").glob("seen-*"):
        attempt, step, rank = map(int, path.name.split("-")[1:])
        seen.setdefault((attempt, step), {})[rank] = json.loads(path.read_text())
    whole = {key: ranks for key, ranks in seen.items() if len(ranks) == plan[key[0]][0]}
    assert {step for _, step in whole} == set(range(STEPS))
    assert {attempt for attempt, _ in whole} == {0, 1, 2, 3}
    for (_, step), ranks in whole.items():
        assert sorted(v for visits in ranks.values() for v in visits) == sorted(batches.batch(step).tolist())
    epoch = [v for step in range(batches.steps_per_epoch) for v in batches.batch(step).tolist()]
    assert sorted(epoch) == list(range(47))


# the victim


def main(spec):
    """Run every attempt of every plan; print the exit codes of all workers (negative: the signal)."""
    import torch
    import torch.distributed as dist  # noqa: F401 (all that a worker imports is imported once, before the forks)

    from mixgf.corpus import reader  # noqa: F401
    from mixgf.training import (
        loop,
        pretraining,  # noqa: F401
    )

    torch.set_num_threads(1)
    weight = torch.nn.Linear(1, 1)
    weight(torch.ones(1)).sum().backward()
    loop.make_optimizer(weight, training.Train()).step()  # torch imports seconds of modules with its first optimizer
    codes = {name: [run(spec, name, i) for i in range(len(plan))] for name, plan in spec["plans"].items()}
    sys.stdout.write(json.dumps(codes))


def run(spec, name, attempt):
    """Fork the workers of one attempt and wait for them; the survivors of a death end with an error."""
    folder = Path(spec["folder"]) / name
    folder.mkdir(exist_ok=True)
    workers, *death = spec["plans"][name][attempt]
    return fork_workers(workers, partial(worker, spec, name, attempt, workers, death), f"{name} {attempt}")


def worker(spec, name, attempt, workers, death, rank):  # noqa: PLR0917
    """One worker of one attempt; the victim kills itself after `when` steps or writes."""
    import signal

    import torch
    import torch.distributed as dist

    from mixgf.config.parse import from_dict
    from mixgf.config.run import Config
    from mixgf.corpus.reader import Corpus
    from mixgf.encoder.bert import MaskedModel
    from mixgf.training.loop import fit
    from mixgf.training.pretraining import Pretraining
    from mixgf.training.worker_group import GroupContext

    victim, what, when = death
    settings, folder = from_dict(Config, spec["config"]), Path(spec["folder"]) / name
    dist.init_process_group("gloo", init_method=f"file://{folder}/store-{attempt}", rank=rank, world_size=workers)
    corpus = Corpus(spec["corpus"])
    task = Pretraining(settings, corpus)
    count = {"step": 0, "write": 0}
    work, metrics, write = task.work, task.metrics, files.write_bytes

    def reached(event):
        count[event] += 1
        return rank == victim and event == what and count[event] > when

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def seen_work(step, rank, world_size):
        share = task.plan.share(step, rank, world_size)
        (folder / f"seen-{attempt}-{step}-{rank}").write_text(json.dumps(share.visits_B.tolist()))
        return work(step, rank, world_size)

    def dying_metrics(sums, gathered):
        if reached("step"):
            die()
        return metrics(sums, gathered)

    def dying_write(uri, data):
        if reached("write"):
            if files.is_local(uri):  # as the file is left by a writer that dies half-way
                path = files.local_path(uri)
                path.parent.mkdir(parents=True, exist_ok=True)
                (path.parent / ".writing-dead").write_bytes(data[: len(data) // 2])
            die()
        write(uri, data)

    task.work, task.metrics, files.write_bytes = seen_work, dying_metrics, dying_write
    model = MaskedModel(settings.model, corpus.vocabulary.size, seed=1)
    fit(model, task, settings.train, GroupContext(torch.device("cpu")), uri=spec["outputs"][name], identity="chaos")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

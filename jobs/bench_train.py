"""Training of the paper's model: mixgf against the published way (published.py).

A batch has two cells with lengths of real cells. On a CPU: CPU seconds of one thread, both measured in turn in one process; memory
in processes of their own. On a GPU: wall seconds.
Run through `python jobs/bench.py train [--json] [--quick]`. Needs `transformers` (extra `test`).

MIXGF_BENCH_AGAINST=FOLDER also measures the code of another checkout in turn, each in a process of its own; for an older commit,
`git worktree add /tmp/older COMMIT && MIXGF_BENCH_AGAINST=/tmp/older python jobs/bench.py train`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import numpy as np
import published
import torch
import torch.distributed as dist
import torch.nn.functional as F
from measure import Figure, fast_bf16, forked, interleaved, peak_memory, rate
from random_corpus import random_corpus
from torch import Tensor

from mixgf.config import data, training
from mixgf.config.recipes import get
from mixgf.config.run import Config
from mixgf.corpus.reader import Corpus
from mixgf.encoder.bert import MaskedModel
from mixgf.encoder.embed import embed_cells
from mixgf.storage import files
from mixgf.training import batch_plan, gradient_sums
from mixgf.training.loop import TaskForward, compute_gradients, make_optimizer, measure_peak
from mixgf.training.pretraining import Pretraining
from mixgf.training.worker_group import GroupContext, LocalContext

Step = Callable[[], object]


def figures(*, quick: bool = False) -> Iterator[Figure]:
    """All figures of this machine: of its GPU where there is one."""
    if torch.cuda.is_available():
        yield from _on_gpu(quick=quick)
        return
    torch.set_num_threads(1)
    row = training.Model(num_layers=2, dim=64, ffn_dim=128) if quick else training.Model()
    with tempfile.TemporaryDirectory(prefix="mixgf-bench-") as folder:
        sizes: dict[str, Any] = {"genes": 1000 if quick else 25_000, "shrink": 8 if quick else 1}
        corpus = random_corpus(files.join(folder, "mix"), num_cells=2000, **sizes)
        longest = random_corpus(files.join(folder, "longest"), num_cells=8, full=True, **sizes)
        # processes are forked first, before this one has used any thread or memory
        yield from _memory(row, longest)
        yield from _workers(folder, quick=quick)
        yield from _steps(row, corpus, quick=quick)
        yield from _loader(row, corpus)
        yield from _embeddings(row, corpus, quick=quick)
        yield from _beside_other_checkout(row, folder, sizes, quick=quick)
        yield from _packing(corpus)


def _steps(row: training.Model, corpus: Corpus, *, quick: bool) -> list[Figure]:
    """One training step, whole and without each of its optimisations in turn."""
    settings = _settings(row, batch_cells=2)
    task = Pretraining(settings, corpus)
    # the batch of the longest cells that are not all cut: most of the corpus is like it
    step = min(
        range(task.steps_per_epoch), key=lambda s: abs(task.plan.lengths[task.plan.batch(s) % 2000].mean() - 1700)
    )
    work = task.work(step, 0, 1)
    works = {
        "ours": _ours(settings, corpus, step),
        "whole last layer": _ours(settings, corpus, step, whole_last_layer=True),
        "whole head": _ours(settings, corpus, step, whole_last_layer=True, whole_head=True),
        "equal dropout": published.step(settings, corpus, step, attention_dropout=0.0),
        "as shipped": published.step(settings, corpus, step, attention_dropout=0.1),
    }
    if torch.cpu._is_amx_tile_supported():
        works["bf16"] = _ours(settings, corpus, step, precision="bf16")
    times = interleaved(works, repeats=1 if quick else 3, cpu=True)
    peaks = [measure_peak(torch.device("cpu"), "fp32", seconds=0.5) for _ in range(1 if quick else 3)]

    def against(name: str, key: str, other: str, bar: str = "") -> Figure:
        return rate(name, "tokens/CPU-s", work.num_tokens, times=times, key=key, against=other, bar=bar)

    out = [
        against("train fp32 / published, equal dropout", "ours", "equal dropout", "1.7x"),
        against("train fp32 / published as shipped", "ours", "as shipped", "3.5x"),
        against("  last layer only where the losses look", "ours", "whole last layer"),
        against("  head at masked positions only", "whole last layer", "whole head"),
        against("  attention without dropout (published step)", "equal dropout", "as shipped"),
        rate("train fp32", "cells/CPU-s", work.num_cells, times=times, key="ours"),
        Figure(
            figure="train fp32, useful MFU", unit="of GEMM peak", bar="0.55",
            value=work.flops / statistics.median(times["ours"]) / statistics.median(peaks),
        ),
        Figure(figure="GEMM peak, fp32, one thread", value=statistics.median(peaks) / 1e9, unit="GFLOP/s"),
    ]  # fmt: skip
    if "bf16" in works:
        out.append(against("train bf16 / published as shipped", "bf16", "as shipped", "6x"))
    return out


def _memory(row: training.Model, corpus: Corpus) -> list[Figure]:
    """Largest memory of a step of two cells of full length, above that of a process that has made the model."""
    settings = _settings(row, batch_cells=2)

    def above_start(step: Step) -> float:
        before = peak_memory()
        step()
        return peak_memory() - before

    ours = forked([lambda: above_start(_ours(settings, corpus, 0))])[0]
    theirs = forked([lambda: above_start(published.step(settings, corpus, 0, attention_dropout=0.1))])[0]
    name = f"train memory, 2 x {corpus.lengths_N.max():,} tokens, published as shipped / ours"
    return [Figure(figure=name, value=ours, unit="GB", baseline=theirs, ratio=theirs / ours, bar="6x")]


def _workers(folder: str, *, quick: bool) -> list[Figure]:
    """Steps of groups of one and of two processes (gloo), one thread each, on the `laptop` recipe's model.

    The baseline is one sum of all gradients after the backward pass, in one buffer, as in commit a4bff4c. Both are measured in
    turn in the same processes: CPU seconds of all threads and processes, and wall seconds of the first one.
    """
    row = get("laptop").model
    corpus = random_corpus(files.join(folder, "short"), num_cells=256, genes=25_000, longest=row.max_positions)
    settings = _settings(row, batch_cells=32, pooling="mean")
    out, wall = [], {}
    for size in (1, 2):
        store = str(Path(folder) / f"store{size}")
        work: list[Step] = [
            partial(_group_steps, settings, corpus, rank, size, store, 1 if quick else 6) for rank in range(size)
        ]
        found = forked(work)
        cpu = {
            way: [sum(times) for times in zip(*(r["cpu"][way] for r in found), strict=True)] for way in ("DDP", "flat")
        }
        walls = found[0]["wall"]
        wall[size] = statistics.median(walls["DDP"])
        name = f"step of 32 cells in DDP / one sum after the backward pass, {size} process{'es' * (size > 1)}"
        for unit, times in (("CPU-s", cpu), ("s (wall)", walls)):
            out.append(
                Figure(
                    figure=name, value=statistics.median(times["DDP"]), unit=unit, baseline=statistics.median(times["flat"]),
                    ratio=statistics.median(b / a for a, b in zip(times["DDP"], times["flat"], strict=True)),
                )
            )  # fmt: skip
    shares = found[0]["overlap"]
    return [
        Figure(
            figure="data-parallel step, 2 processes / 1 (wall)", value=32 / wall[2], unit="cells/s", baseline=32 / wall[1],
            ratio=wall[1] / wall[2],
        ),
        *out,
        Figure(figure="  gradients sent before the token embedding's is ready", value=shares["bytes"], unit="of bytes"),
        Figure(
            figure="  sums after the last gradient is ready", value=shares["exposed"] / wall[2], unit="of the step (wall)"
        ),
    ]  # fmt: skip


def _group_steps(  # noqa: PLR0917 (a worker)
    settings: Config, corpus: Corpus, rank: int, size: int, store: str, repeats: int
) -> dict[str, Any]:
    """Seconds of the steps of one worker by way, and how the sums overlap with the backward pass."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    context, task = GroupContext(torch.device("cpu")), Pretraining(settings, corpus)
    sums = _TimedSums()
    models = {way: MaskedModel(settings.model, corpus.vocabulary.size) for way in ("DDP", "flat")}
    optimizers = {way: make_optimizer(model, settings.train) for way, model in models.items()}
    module: torch.nn.Module = TaskForward(models["DDP"], task)
    if size > 1:
        wrapped = context.wrap(module)
        wrapped.register_comm_hook(None, sums.hook)
        gradient_sums.settle_buckets(wrapped)
        module = wrapped
    flat = _flat_gradients(models["flat"])
    modules = {"DDP": module, "flat": TaskForward(models["flat"], task)}
    cpu: dict[str, list[float]] = {"DDP": [], "flat": []}
    wall: dict[str, list[float]] = {"DDP": [], "flat": []}
    for i in range(repeats + 1):
        for way, optimizer in optimizers.items():
            work = task.work(i, rank, size)
            context.barrier()
            began, wall_began = time.process_time(), time.perf_counter()
            if way == "flat":
                flat.zero_()
            else:
                optimizer.zero_grad(set_to_none=i == 0 and size == 1)
            sums.begin()
            compute_gradients(modules[way], work, context)
            if way == "flat":
                context.all_reduce(flat)
                torch.linalg.vector_norm(flat).item()
            else:
                torch.nn.utils.get_total_norm([p.grad for p in models[way].parameters() if p.grad is not None]).item()
            optimizer.step()
            cpu[way].append(time.process_time() - began)
            wall[way].append(time.perf_counter() - wall_began)
    context.barrier()
    dist.destroy_process_group()
    after_first = [{way: times[1:] for way, times in each.items()} for each in (cpu, wall)]
    return {"cpu": after_first[0], "wall": after_first[1], "overlap": sums.shares()}


def _flat_gradients(model: torch.nn.Module) -> Tensor:
    """One buffer of which all gradients of a model are views."""
    parameters = list(model.parameters())
    buffer = torch.zeros(sum(p.numel() for p in parameters))
    for p, part in zip(parameters, torch.split(buffer, [p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p)
    return buffer


class _TimedSums:
    """A communication hook that notes when each bucket of gradients is ready and when its sum is there."""

    def __init__(self) -> None:
        self.steps: list[list[list[float]]] = []

    def begin(self) -> None:
        """Begin a step."""
        self.steps.append([])

    def hook(self, group, bucket):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202 (torch reads annotations)
        """Sum a bucket."""
        if not self.steps:  # buckets are being settled
            return gradient_sums.sum_float32(group, bucket)
        times = [float(bucket.buffer().numel()), time.perf_counter(), 0.0]
        self.steps[-1].append(times)

        def done(future: Any) -> Any:
            times[2] = time.perf_counter()
            return future.value()

        return gradient_sums.sum_float32(group, bucket).then(done)

    def shares(self) -> dict[str, float]:
        """How the sums overlap with the backward pass.

        `bytes`: share of the bytes whose sum begins before the token embedding's gradient is ready. `exposed`: seconds of sums
        after the last gradient of a step is ready (the median over steps).
        """
        steps = [buckets for buckets in self.steps if buckets]
        if not steps:
            return {"bytes": 0.0, "exposed": 0.0}
        largest = max(steps[0])[1]  # the bucket of the token embedding
        early = sum(size for size, ready, _ in steps[0] if ready < largest)
        exposed = [max(done for _, _, done in step) - max(ready for _, ready, _ in step) for step in steps[1:] or steps]
        return {"bytes": early / sum(size for size, _, _ in steps[0]), "exposed": statistics.median(exposed)}


def _loader(row: training.Model, corpus: Corpus) -> list[Figure]:
    """Batches of 8 cells from sentences: what the published collator makes (one masked view), and all of ours.

    The published one pads, marks and masks Python lists. Ours packs, and for the paper's objective adds the second view and
    the dropout keys of every token.
    """
    settings = _settings(row, batch_cells=8)
    whole = Pretraining(settings, corpus)
    one_view = Pretraining(
        dataclasses.replace(
            settings, model=dataclasses.replace(row, dropout=0.0), objective=training.Objective(contrast_weight=0.0)
        ),
        corpus,
    )
    batches = range(50)
    works: dict[str, Step] = {
        "one view": lambda: [one_view.work(s, 0, 1) for s in batches],
        "whole": lambda: [whole.work(s, 0, 1) for s in batches],
        "published": lambda: [published.collate(corpus, whole.plan.share(s).cells_B) for s in batches],
    }
    times = interleaved(works, repeats=9, cpu=True)
    cells = 8 * len(batches)
    return [
        rate(
            "collate, one masked view / published",
            "cells/CPU-s",
            cells,
            times=times,
            key="one view",
            against="published",
            bar="30x",
        ),
        rate(
            "  two views and dropout keys / published",
            "cells/CPU-s",
            cells,
            times=times,
            key="whole",
            against="published",
        ),
    ]


def _embeddings(row: training.Model, corpus: Corpus, *, quick: bool) -> list[Figure]:
    """Vectors of cells sorted by length, mean over genes, of the second last layer (the family's habit) and of the last."""
    cells = np.argsort(corpus.lengths_N, kind="stable")[:: len(corpus.lengths_N) // (4 if quick else 8)]
    model = MaskedModel(row, corpus.vocabulary.size).eval()
    bert = published.bert(row, corpus.vocabulary.size, attention_dropout=0.0).eval()

    works: dict[str, Step] = {
        "ours, -2": lambda: embed_cells(model.encoder, corpus, cells, "mean", -2),
        "ours, -1": lambda: embed_cells(model.encoder, corpus, cells, "mean", -1),
        "published": lambda: published.embed(bert, corpus, cells),
    }
    bars = {"ours, -2": "2.3x", "bf16": "6.5x with AMX"}
    if fast_bf16():
        works["bf16"] = lambda: embed_cells(model.encoder, corpus, cells, "mean", -2, precision="bf16")
    times = interleaved(works, repeats=1 if quick else 3, cpu=True)
    names = {
        "ours, -2": "embeddings fp32, second last layer / published", "ours, -1": "embeddings fp32, last layer / published",
        "bf16": "embeddings bf16, second last layer / published",
    }  # fmt: skip
    return [
        rate(name, "cells/CPU-s", len(cells), times=times, key=key, against="published", bar=bars.get(key, ""))
        for key, name in names.items()
        if key in works
    ]


_SIDE = """
import json, sys, time
import numpy as np
import torch
import bench_train as bench
from random_corpus import random_corpus
from mixgf.config import training
from mixgf.encoder.bert import MaskedModel
from mixgf.encoder.embed import embed_cells
from mixgf.training.pretraining import Pretraining

torch.set_num_threads(1)
folder, sizes, row = sys.argv[1], *map(json.loads, sys.argv[2:])
row, corpus = training.Model(**row), random_corpus(folder, num_cells=2000, **sizes)
task = Pretraining(bench._settings(row, batch_cells=2), corpus)
step = min(range(task.steps_per_epoch), key=lambda s: abs(task.plan.lengths[task.plan.batch(s) % 2000].mean() - 1700))
batches = Pretraining(bench._settings(row, batch_cells=8), corpus)
encoder = MaskedModel(row, corpus.vocabulary.size).eval().encoder
cells = np.argsort(corpus.lengths_N, kind="stable")[:: len(corpus.lengths_N) // 8]
works = {
    "step": (task.work(step, 0, 1).num_tokens, bench._ours(bench._settings(row, batch_cells=2), corpus, step)),
    "batches": (8 * 50, lambda: [batches.work(s, 0, 1) for s in range(50)]),
    "embeddings": (len(cells), lambda: embed_cells(encoder, corpus, cells, "mean", -2)),
}
for line in sys.stdin:
    amount, work = works[line.strip()]
    began = time.process_time()
    work()
    print(json.dumps([amount, time.process_time() - began]), flush=True)
"""


def _beside_other_checkout(row: training.Model, folder: str, sizes: dict[str, Any], *, quick: bool) -> list[Figure]:
    """The same work by the code of another checkout (`MIXGF_BENCH_AGAINST`), in turn, each in a process of its own."""
    other = os.environ.get("MIXGF_BENCH_AGAINST", "")
    if not other:
        return []
    repeats = {"step": 1, "batches": 1, "embeddings": 1} if quick else {"step": 3, "batches": 9, "embeddings": 3}
    units = {"step": "tokens/CPU-s", "batches": "cells/CPU-s", "embeddings": "cells/CPU-s"}
    changed = {k: v for k, v in dataclasses.asdict(row).items() if v != getattr(training.Model(), k)}
    out = []
    with contextlib.ExitStack() as stack:
        sides = {}
        for name, tree in {"ours": str(Path(__file__).parent.parent), "theirs": other}.items():
            paths = os.pathsep.join((tree, str(Path(tree) / "jobs")))
            command = [sys.executable, "-c", _SIDE, files.join(folder, name), json.dumps(sizes), json.dumps(changed)]
            environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
            side = Popen(command, text=True, cwd=tree, env=environment, stdin=PIPE, stdout=PIPE)
            sides[name] = stack.enter_context(side)
        for work, count in repeats.items():
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
            for _ in range(count + 1):
                for name, side in sides.items():
                    assert side.stdin is not None
                    assert side.stdout is not None
                    side.stdin.write(f"{work}\n")
                    side.stdin.flush()
                    found[name].append(json.loads(side.stdout.readline()))
            rates = {name: [amount / spent for amount, spent in rows[1:]] for name, rows in found.items()}
            ours, theirs = (statistics.median(rates[name]) for name in ("ours", "theirs"))
            ratio = statistics.median(a / b for a, b in zip(rates["ours"], rates["theirs"], strict=True))
            name = f"{work} / those of the other checkout"
            out.append(Figure(figure=name, value=ours, unit=units[work], baseline=theirs, ratio=ratio))
    return out


def _packing(corpus: Corpus) -> list[Figure]:
    """Tokens that padded batches of 8 would compute, by token that is there."""
    made = batch_plan.padding_ratios(corpus.lengths_N, 8)
    return [
        Figure(figure=f"tokens of padded batches of 8, {how} / packed", value=value, unit="tokens per token")
        for how, value in made.items()
    ]


def _settings(row: training.Model, *, batch_cells: int, **objective: Any) -> Config:
    train = training.Train(batch_cells=batch_cells, micro_tokens=1 << 20)
    return Config(
        model=row,
        tokens=data.Tokens(max_len=row.max_positions),
        train=train,
        objective=training.Objective(**({"pooling": "first"} | objective)),
    )


def _ours(
    settings: Config,
    corpus: Corpus,
    step: int,
    *,
    precision: str = "fp32",
    whole_last_layer: bool = False,
    whole_head: bool = False,
) -> Step:
    """A training step of mixgf, data included; optimisations can be taken away."""
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, precision=precision))
    task, context = Pretraining(settings, corpus), LocalContext()
    task.last_layer_at_queries &= not whole_last_layer
    model = (
        _WholeHead(settings.model, corpus.vocabulary.size)
        if whole_head
        else MaskedModel(settings.model, corpus.vocabulary.size)
    )
    forward, optimizer = TaskForward(model, task), make_optimizer(model, settings.train)

    def run() -> None:
        optimizer.zero_grad()
        compute_gradients(forward, task.work(step, 0, 1), context)
        optimizer.step()

    return run


class _WholeHead(MaskedModel):
    """Scores the vocabulary at every position of both views, as the published model does."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Hidden states; they are kept for the head."""
        self.states = super().forward(*args, **kwargs)
        return self.states

    def loss(self, h_KD: Tensor, targets_K: Tensor) -> Tensor:
        """The sum of cross entropies at the first positions, from scores of all."""
        scores = self.logits(self.states)
        return F.cross_entropy(scores[: len(targets_K)], targets_K, reduction="sum")


def _on_gpu(*, quick: bool) -> list[Figure]:
    """Cells per second and MFU of one GPU at length 2,048, bf16, compiled."""
    device = torch.device("cuda")
    peak = measure_peak(device, "bf16", seconds=1.0)
    out = []
    with tempfile.TemporaryDirectory(prefix="mixgf-bench-") as folder:
        cells = 16 if quick else 128
        corpus = random_corpus(folder, num_cells=512, genes=25_000, full=True)
        for name, objective in {"MLM": {"contrast_weight": 0.0}, "MLM + SimCSE": {}}.items():
            settings = _settings(training.Model(), batch_cells=cells, **objective)
            settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, precision="bf16"))
            task, context = Pretraining(settings, corpus), LocalContext(device)
            model = MaskedModel(settings.model, corpus.vocabulary.size).to(device)
            model.compile(dynamic=True)
            forward, optimizer = TaskForward(model, task), make_optimizer(model, settings.train)
            works = [task.work(step, 0, 1) for step in range(3)]

            def steps(
                forward: Any = forward,
                context: Any = context,
                optimizer: Any = optimizer,
                works: Any = works,
            ) -> None:
                for work in works:
                    optimizer.zero_grad()
                    compute_gradients(forward, work, context)
                    optimizer.step()
                torch.cuda.synchronize()

            times = interleaved({name: steps}, repeats=1 if quick else 5, warmups=2)
            out.append(rate(f"train {name}, length 2,048, bf16", "cells/s", 3 * cells, times=times, key=name))
            flops = sum(work.flops for work in works)
            out.append(
                Figure(
                    figure=f"train {name}, MFU",
                    value=flops / statistics.median(times[name]) / peak,
                    unit="of GEMM peak",
                )
            )
    return out

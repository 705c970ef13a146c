"""One GPU: the numbers of the CPU, the same bits twice, speed and memory of training, embedding and perturbation.

    python jobs/bench.py gpu [--json] [--tiny] [--only parity,train] [--seconds 340]

`--tiny` runs every section but `compile` with small sizes, on a CPU too. `--only` names the sections that run. A section that
would begin after `--seconds` is left out. A section that fails is reported, the others run, and the exit status is 2.

Rows come as they are measured: `... --json | tee gpu.jsonl` keeps those of a run that is cut off. The machine needs torch,
numpy, numba, pandas, pyarrow, scipy, safetensors and fsspec, and no network. It does not need Ray, anndata, MLflow, polars,
s3fs or botocore.

Sections:
    environment  memory of the GPU, and its bf16 matrix product of ones and of random numbers. MFU in history.parquet is a share
                 of the product of ones, and is too low where ones are faster. MFU here is a share of the random product.
    parity       one training step on the CPU in fp32 against the same step on the GPU in fp32 and bf16.
    repeat       the same step three times: the gradients that differ in any bit.
    train        tokens/s, cells/s, MFU, memory and waits for the GPU. A token counts once however many views its cell has.
                 The second pass over a batch of several micro batches is no needed work, and not in MFU.
    embed        cells/s by precision.
    perturb      deletions/s of one cell's genes, read after the second last layer, by size of the micro batch.
    group        the loop in a process group, stopped and continued; DistributedDataParallel around the model.
    compile      `train.compile` against the same row of `train`, and its graphs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from measure import Figure, interleaved
from random_corpus import random_corpus
from torch import Tensor

from mixgf import rng
from mixgf.config import data, training
from mixgf.config.run import Config
from mixgf.console import warn
from mixgf.corpus.reader import Corpus
from mixgf.encoder.bert import Encoder, MaskedModel, forward_flops
from mixgf.encoder.embed import embed_cells
from mixgf.errors import UserError
from mixgf.perturbation.shift import ShiftScorer
from mixgf.training.loop import TaskForward, compute_gradients, fit, make_optimizer
from mixgf.training.pretraining import Pretraining
from mixgf.training.worker_group import GroupContext, LocalContext

SMALL = training.Model(num_layers=6, dim=256, num_heads=4, ffn_dim=512, max_positions=2048)
LARGE = training.Model(num_layers=12, dim=512, num_heads=8, ffn_dim=1024, max_positions=4096)
TINY = training.Model(num_layers=2, dim=32, num_heads=2, ffn_dim=48, max_positions=48)
CPU = torch.device("cpu")
COMPILE_SECONDS = 90.0
"""Time that the first call of a compiled model may take."""
MLM_ONLY = {"contrast_weight": 0.0}


@dataclasses.dataclass
class Bench:
    """What all sections share."""

    folder: str
    """For corpora and checkpoints."""
    device: torch.device
    tiny: bool
    ends: float
    """Time (`time.perf_counter`) after which no section begins."""

    def row(self, model: training.Model) -> training.Model:
        """The sizes of a model, or tiny ones."""
        return TINY if self.tiny else model

    def corpus(self, name: str, num_cells: int, row: training.Model, *, full: bool = False, shrink: int = 1) -> Corpus:
        """A corpus of random sentences up to the model's positions times `shrink`; one of the same name is used again."""
        folder = f"{self.folder}/{name}"
        if Path(folder).exists():
            return Corpus(folder)
        if self.tiny:
            return random_corpus(folder, num_cells=num_cells, genes=300, shrink=42, full=full)
        longest = row.max_positions * shrink
        return random_corpus(folder, num_cells=num_cells, genes=25_000, shrink=shrink, full=full, longest=longest)

    def wait(self) -> None:
        """Wait for the GPU."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], *, repeats: int = 3, warmups: int = 1) -> float:
        """Median wall seconds of a call, the GPU's work included."""

        def done() -> None:
            work()
            self.wait()

        self.wait()
        return statistics.median(interleaved({"work": done}, repeats=repeats, warmups=warmups)["work"])

    def forget_memory(self) -> None:
        """Measure the GPU's largest memory from here on."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def memory(self, name: str) -> Iterator[Figure]:
        """Most memory of the GPU since `forget_memory`; nothing on a CPU."""
        if self.device.type == "cuda":
            most = torch.cuda.max_memory_allocated() / 2**30
            yield Figure(figure=f"  memory, {name}", value=most, unit="GiB")

    def product(self, fill: Callable[..., Tensor]) -> float:
        """FLOP/s of a bf16 product of two square matrices."""
        n = 512 if self.tiny else 8192
        x = fill(n, n, device=self.device).to(torch.bfloat16)
        return 2 * n**3 / self.seconds(lambda: x @ x, repeats=10, warmups=3)

    @cached_property
    def peak(self) -> float:
        """FLOP/s that MFU is a share of: the bf16 product of random matrices."""
        return self.product(torch.randn)


def figures(*, quick: bool = False, only: str = "", seconds: float = 340.0) -> Iterator[Figure]:
    """All figures of the chosen sections.

    Args:
        quick: small sizes, on a CPU too.
        only: sections, separated by commas; empty = all.
        seconds: sections that would begin later are left out.

    Raises:
        UserError: there is no GPU and `quick` is not set, a section is unknown, or sections failed.
    """
    chosen = only.split(",") if only else list(SECTIONS)
    unknown = sorted(set(chosen) - set(SECTIONS))
    if unknown:
        msg = f"--only {','.join(unknown)}: unknown; sections are {', '.join(SECTIONS)}"
        raise UserError(msg)
    cuda = torch.cuda.is_available()
    if not cuda and not quick:
        msg = f"no CUDA GPU (torch {torch.__version__}); --tiny runs every section small on the CPU"
        raise UserError(msg)
    failed = []
    ends = time.perf_counter() + seconds
    with tempfile.TemporaryDirectory(prefix="mixgf-bench-") as folder:
        if not cuda:
            torch.set_num_threads(1)
        bench = Bench(folder, torch.device("cuda") if cuda else CPU, quick, ends)
        for name in [name for name in SECTIONS if name in chosen]:
            if time.perf_counter() > ends:
                warn(f"bench: {name} is left out: --seconds {seconds:g} have passed")
                continue
            try:
                yield from SECTIONS[name](bench)
            except Exception as error:  # noqa: BLE001 (the other sections still run)
                traceback.print_exc()
                failed.append(f"{name} ({type(error).__name__})")
            if cuda:
                torch.cuda.empty_cache()
    if failed:
        msg = f"sections that failed: {', '.join(failed)}"
        raise UserError(msg)


def environment(bench: Bench) -> Iterator[Figure]:
    """The machine, and what its bf16 matrix product reaches."""
    versions = f"torch {torch.__version__}, Python {sys.version.split()[0]}"
    if bench.tiny:
        versions += ", tiny sizes in place of those named"
    if bench.device.type == "cuda":
        card = torch.cuda.get_device_properties(0)
        name = f"{card.name}, {card.multi_processor_count} SMs, {versions}: memory"
        yield Figure(figure=name, value=card.total_memory / 2**30, unit="GiB")
    else:
        yield Figure(figure=f"CPU, {versions}: threads", value=torch.get_num_threads(), unit="threads")
    ones = bench.product(torch.ones)
    yield Figure(
        figure="bf16 matrix product, random / ones", value=bench.peak / 1e12, unit="TFLOP/s", baseline=ones / 1e12,
        ratio=bench.peak / ones,
    )  # fmt: skip


def parity(bench: Bench) -> Iterator[Figure]:
    """A step with dropout, on packed cells of unequal length, against the same step on the CPU in fp32."""
    keys = torch.randint(-(2**31), 2**31 - 1, (1000,), dtype=torch.int32)
    bits = torch.equal(rng.dropped(keys, 3, 256, 1311), rng.dropped(keys.to(bench.device), 3, 256, 1311).cpu())
    yield Figure(figure="dropout of the CPU and of the device, 1 = same bits", value=float(bits), unit="", bar="1")
    cases: list[tuple[str, training.Model, dict[str, Any]]] = [
        ("6 x 256, MLM + SimCSE (mean)", SMALL, {}),
        ("6 x 256, MLM + SimCSE (first)", SMALL, {"pooling": "first"}),
        ("12 x 512, MLM", LARGE, MLM_ONLY),
    ]
    for name, model, objective in cases:
        row = bench.row(model)
        row = dataclasses.replace(row, max_positions=min(1024, row.max_positions), init_sd=0.05)
        corpus = bench.corpus("parity", 8, row, shrink=2)
        truth = _one_step(_task(corpus, row, precision="fp32", batch=4, **objective), CPU)
        for precision, state_bar, cosine_bar in (("fp32", "< 1e-4", "> 0.999"), ("bf16", "< 2e-2", "> 0.98")):
            step = _one_step(_task(corpus, row, precision=precision, batch=4, **objective), bench.device)
            of_states, of_losses, (cosine, weight) = _differences(step, truth)
            what = f"{name}, {precision} / CPU fp32"
            yield Figure(figure=f"{what}: states, relative error", value=of_states, unit="", bar=state_bar)
            yield Figure(figure="  losses, largest relative error", value=of_losses, unit="")
            yield Figure(figure=f"  gradients, least cosine ({weight})", value=cosine, unit="", bar=cosine_bar)


@dataclasses.dataclass(frozen=True)
class Step:
    """What one training step gives, on the CPU."""

    losses: dict[str, float]
    gradients: dict[str, Tensor]
    states_TD: Tensor


def _one_step(task: Pretraining, device: torch.device) -> Step:
    """The first step from the initial weights."""
    model = MaskedModel(task.config.model, task.corpus.vocabulary.size, seed=1).to(device)
    work = task.work(0, 0, 1)
    losses = compute_gradients(TaskForward(model, task), work, LocalContext(device))
    gradients = {k: p.grad.cpu() for k, p in model.named_parameters() if p.grad is not None}
    with torch.no_grad():
        states_TD = task.hidden(model, work.micros[0].to(device)).float().cpu()
    return Step({k: v.item() for k, v in losses.items()}, gradients, states_TD)


def _differences(step: Step, truth: Step) -> tuple[float, float, tuple[float, str]]:
    """Relative errors of the states (by norm) and of the losses (the largest), and the least cosine of a gradient."""
    of_states = ((step.states_TD - truth.states_TD).norm() / truth.states_TD.norm()).item()
    of_losses = max(abs(step.losses[k] - v) / max(abs(v), 1e-3) for k, v in truth.losses.items())
    cosines = [
        (F.cosine_similarity(step.gradients[k].double().flatten(), g.double().flatten(), dim=0).item(), k)
        for k, g in truth.gradients.items()
        if g.norm() > 0
    ]
    return of_states, of_losses, min(cosines)


def repeat(bench: Bench) -> Iterator[Figure]:
    """Gradients of the same step that differ from those of the first time, in three times."""
    row = bench.row(SMALL)
    task = _task(bench.corpus("repeat", 16, row), row, batch=8)
    for deterministic in (False, True):
        how = "deterministic algorithms" if deterministic else "default algorithms"
        torch.use_deterministic_algorithms(deterministic)
        try:
            first, *others = (_one_step(task, bench.device).gradients for _ in range(3))
        except RuntimeError as error:
            if not deterministic:
                raise
            warn(f"bench: repeat, {how}: torch has none for an operation ({str(error).splitlines()[0]})")
            continue
        finally:
            torch.use_deterministic_algorithms(False)
        unlike = sorted({k for other in others for k in first if not torch.equal(other[k], first[k])})
        name = f"the same step three times, {how}{': ' if unlike else ''}{', '.join(unlike[:2])}"
        yield Figure(figure=name, value=float(len(unlike)), unit="gradients differ", bar="0")


def train(bench: Bench) -> Iterator[Figure]:
    """Steps of the paper's objective and of its MLM part, at full length and at the lengths of real cells."""
    cases: list[tuple[str, training.Model, int, dict[str, Any]]] = [
        ("6 x 256, 2,048 tokens, MLM", SMALL, 64, MLM_ONLY | {"micro": 1 << 18}),
        ("6 x 256, 2,048 tokens, MLM + SimCSE (mean)", SMALL, 64, {"micro": 1 << 18}),
        ("6 x 256, 2,048 tokens, MLM + SimCSE (mean), micro batches", SMALL, 64, {"micro": 1 << 16}),
        ("6 x 256, 2,048 tokens, MLM + SimCSE (first)", SMALL, 64, {"micro": 1 << 18, "pooling": "first"}),
        ("6 x 256, real lengths, MLM + SimCSE (mean)", SMALL, 64, {"micro": 1 << 18, "full": False}),
        ("12 x 512, 4,096 tokens, MLM", LARGE, 16, MLM_ONLY | {"micro": 1 << 17}),
        ("12 x 512, 4,096 tokens, MLM + SimCSE (mean)", LARGE, 16, {"micro": 1 << 17}),
    ]
    for name, model, cells, options in cases:
        try:
            yield from _training(bench, name, model, cells, **options)
        except torch.OutOfMemoryError:
            warn(f"bench: train, {name}: out of memory")
            yield from bench.memory(f"out of memory: {name}")


def compiled(bench: Bench) -> Iterator[Figure]:
    """The whole model compiled with symbolic sizes; the last section, because a first call takes a minute."""
    if bench.device.type != "cuda" or bench.tiny:
        return
    cases: list[tuple[str, dict[str, Any], str]] = [
        ("MLM", MLM_ONLY, "2,200 cells/s"),
        ("MLM + SimCSE (mean)", {}, "1,200 cells/s"),
    ]
    for name, objective, bar in cases:
        whole = f"6 x 256, 2,048 tokens, {name}, compiled"
        if time.perf_counter() > bench.ends - COMPILE_SECONDS:
            warn(f"bench: {whole} is left out: it needs {COMPILE_SECONDS:g} s")
            break
        yield from _training(bench, whole, SMALL, 64, micro=1 << 18, bar=bar, compile_model=True, **objective)
    counters = torch._dynamo.utils.counters
    if not (graphs := counters["stats"].get("unique_graphs", 0)):
        return
    yield Figure(figure="  graphs", value=float(graphs), unit="graphs")
    yield Figure(figure="  graph breaks", value=float(sum(counters["graph_break"].values())), unit="breaks", bar="0")


def _training(
    bench: Bench, name: str, model: training.Model, cells: int, *, micro: int, full: bool = True, bar: str = "",
    compile_model: bool = False, **objective: Any,
) -> Iterator[Figure]:  # fmt: skip
    """Three steps, again and again."""
    row = bench.row(model)
    if bench.tiny:
        cells, micro = 4, 200 if "micro batches" in name else micro
    corpus = bench.corpus(f"train-{row.max_positions}-{full}", 4 * cells, row, full=full)
    task, context = _task(corpus, row, batch=cells, micro=micro, **objective), LocalContext(bench.device)
    trained = MaskedModel(row, corpus.vocabulary.size).to(bench.device)
    if compile_model:
        trained.compile(dynamic=True)
    forward, optimizer = TaskForward(trained, task), make_optimizer(trained, task.config.train)
    works = [task.work(step, 0, 1) for step in range(3)]

    def steps() -> None:
        for work in works:
            optimizer.zero_grad()
            compute_gradients(forward, work, context)
            optimizer.step()

    bench.forget_memory()
    first = bench.seconds(steps, repeats=1, warmups=0)
    spent = bench.seconds(steps, warmups=0)
    tokens, num_cells, flops = (sum(getattr(work, k) for work in works) for k in ("num_tokens", "num_cells", "flops"))
    yield Figure(figure=f"train, {name}", value=num_cells / spent, unit="cells/s", bar=bar)
    yield Figure(figure="  tokens of the cells", value=tokens / spent, unit="tokens/s")
    mfu_bar = "0.40" if compile_model else ""
    yield Figure(figure="  MFU", value=flops / spent / bench.peak, unit="of bf16 product", bar=mfu_bar)
    batches = len(works[0].micros)
    yield Figure(figure=f"  step of {cells} cells, micro batches: {batches}", value=spent / 3 * 1e3, unit="ms")
    yield Figure(figure="  first three steps", value=first, unit="s")
    yield from bench.memory(name)
    if bench.device.type == "cuda" and not full:
        yield _waits(steps)


def _waits(steps: Callable[[], None]) -> Figure:
    """Waits of the CPU for the GPU in one of three steps."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            steps()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in seen if "synchron" in str(w.message)]
    lines = ", ".join(sorted({f"{Path(w.filename).name}:{w.lineno}" for w in waits}))
    return Figure(figure=f"  waits for the GPU ({lines[:60]})", value=len(waits) / 3, unit="per step")


def embed(bench: Bench) -> Iterator[Figure]:
    """Vectors of cells of real lengths, means over the last layer."""
    for model, num, precisions in ((SMALL, 2048, ("bf16", "fp32")), (LARGE, 512, ("bf16",))):
        row = bench.row(model)
        corpus = bench.corpus(f"embed-{num}", 12 if bench.tiny else num, row)
        encoder = Encoder(row, corpus.vocabulary.size).to(bench.device)
        cells = np.arange(corpus.num_cells)
        flops = forward_flops(row, np.minimum(corpus.lengths_N, row.max_positions))
        for precision in precisions:
            bench.forget_memory()
            name = f"{row.num_layers} x {row.dim}, real lengths, {precision}"

            def work(encoder: Encoder = encoder, corpus: Corpus = corpus, precision: str = precision) -> object:
                return embed_cells(encoder, corpus, cells, precision=precision)  # noqa: B023 (called at once)

            spent = bench.seconds(work, repeats=2)
            yield Figure(figure=f"embed, {name}", value=len(cells) / spent, unit="cells/s")
            yield Figure(figure="  MFU", value=flops / spent / bench.peak, unit="of bf16 product")
            yield from bench.memory(name)


def perturb(bench: Bench) -> Iterator[Figure]:
    """Deletions of the genes of one cell of full length."""
    for model in (SMALL, LARGE):
        row = bench.row(model)
        length, layers = row.max_positions, row.num_layers - 1
        encoder = Encoder(row, 50_004).to(bench.device).eval()
        for micro in (16_384, 131_072):
            engine = ShiftScorer(encoder=encoder, layers=layers, max_len=length, micro_tokens=micro, precision="bf16")
            original = engine.encode_cells(torch.randperm(50_000)[:length] + 4, torch.tensor([0, length]))
            num = 8 if bench.tiny else max(64, 4 * micro // length)
            genes_S1 = original.ids_T[torch.arange(num, device=bench.device) % length][:, None]
            cells_S = torch.zeros(num, dtype=torch.int64, device=bench.device)
            states_KD = torch.randn(3, row.dim)
            bench.forget_memory()
            spent = bench.seconds(lambda: engine.score(original, cells_S, genes_S1, "delete", states_KD))  # noqa: B023
            flops = forward_flops(row, [length - 1] * num, layers=layers)
            name = f"{row.num_layers} x {row.dim}, {length:,} tokens, micro batches of {micro:,}"
            bar = "4,500" if length == 2048 else ""
            yield Figure(figure=f"delete, {name}", value=num / spent, unit="sequences/s", bar=bar)
            yield Figure(figure="  MFU", value=flops / spent / bench.peak, unit="of bf16 product")
            yield from bench.memory(name)


def group(bench: Bench) -> Iterator[Figure]:
    """One worker of a process group: nccl on a GPU, gloo on a CPU."""
    corpus = bench.corpus("group", 64, TINY) if bench.tiny else bench.corpus("group", 64, TINY, shrink=42)
    config = _task(corpus, TINY, batch=16).config
    loop: dict[str, Any] = {"max_steps": 6, "warmup_steps": 2, "checkpoint_steps": 3, "log_steps": 1, "lr": 1e-3}
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, **loop))
    backend = "nccl" if bench.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{bench.folder}/store", rank=0, world_size=1)
    try:
        whole, continued = (_losses(bench, config, corpus, stops) for stops in ((0,), (3, 0)))
        apart = max(abs(a - b) / abs(a) for a, b in zip(whole, continued, strict=True))
        name = f"{backend}, training stopped and continued: losses, largest relative difference"
        yield Figure(figure=name, value=apart, unit="", bar="0")
        _wrapped(bench, config, corpus)
        yield Figure(figure="DistributedDataParallel accumulates and reduces, 1 = yes", value=1.0, unit="", bar="1")
    finally:
        dist.destroy_process_group()


def _losses(bench: Bench, config: Config, corpus: Corpus, stops: tuple[int, ...]) -> list[float]:
    """The losses of a training that stops at some steps and goes on from its checkpoint; 0 = the end."""
    uri = f"{bench.folder}/checkpoints-{len(stops)}"
    rows: list[tuple[int, int, str, float]] = []
    for until in stops:
        model = MaskedModel(config.model, corpus.vocabulary.size, seed=1)
        task, context = Pretraining(config, corpus), GroupContext(bench.device)
        rows = fit(model, task, config.train, context, uri=uri, identity="bench", until=until)
    return [value for _, _, name, value in rows if name == "loss"]


def _wrapped(bench: Bench, config: Config, corpus: Corpus) -> None:
    """Two backward passes of the model in DistributedDataParallel, the first without a reduction."""
    model = MaskedModel(config.model, corpus.vocabulary.size).to(bench.device)
    devices = [0] if bench.device.type == "cuda" else None
    wrapped = torch.nn.parallel.DistributedDataParallel(model, device_ids=devices, gradient_as_bucket_view=True)
    batch = Pretraining(config, corpus).work(0, 0, 1).micros[0].to(bench.device).batch
    for last in (False, True):
        with contextlib.nullcontext() if last else wrapped.no_sync():
            hidden_TD = wrapped(batch.ids_T, batch.offsets_B1, positions_T=batch.positions_T, max_len=batch.max_len)
            unused = sum((p.sum() for p in wrapped.parameters()), start=hidden_TD.new_zeros(()))
            (hidden_TD.float().sum() + 0 * unused).backward()


def _task(
    corpus: Corpus, row: training.Model, *, batch: int, micro: int = 1 << 20, precision: str = "bf16", **objective: Any
) -> Pretraining:
    """Pretraining with the given batch size (cells), micro batch size (tokens) and fields of the objective."""
    config = Config(
        model=row,
        tokens=data.Tokens(max_len=row.max_positions),
        objective=training.Objective(**objective),
        train=training.Train(batch_cells=batch, micro_tokens=micro, precision=precision),
    )
    return Pretraining(config, corpus)


SECTIONS: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "environment": environment,
    "parity": parity,
    "repeat": repeat,
    "train": train,
    "embed": embed,
    "perturb": perturb,
    "group": group,
    "compile": compiled,
}

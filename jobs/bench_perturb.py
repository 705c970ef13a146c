"""In silico perturbation of the paper's model: mixgf against the published way (published.py).

Weights are random and have the paper's sizes; time does not depend on their values. On a CPU: CPU seconds of one thread, both
measured in turn in one process; memory in processes of their own; one and two Ray actors in wall seconds. On a GPU: sentences per
wall second. The ranking by the screen is measured on a trained run: MIXGF_BENCH_RUN=runs/mine (corpus and pretrain).
Run through `python jobs/bench.py perturb [--json] [--quick]`. Needs `transformers` (extra `test`).
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import published
import torch
from bench_train import _embeddings
from measure import Figure, fast_bf16, forked, interleaved, peak_memory, rate
from random_corpus import random_corpus
from scipy import stats
from torch import Tensor

from mixgf.config import data, perturbation, run, training
from mixgf.console import warn
from mixgf.corpus.reader import Corpus
from mixgf.encoder import checkpoint
from mixgf.encoder.bert import Encoder, MaskedModel, forward_flops
from mixgf.encoder.embed import embed_cells
from mixgf.execution import Task
from mixgf.perturbation import group_design, scoring_tasks, screen
from mixgf.perturbation.shift import ShiftScorer, UnperturbedCells
from mixgf.stages import perturb_phases
from mixgf.storage import artifacts, files
from mixgf.training.loop import measure_peak

VOCABULARY = 25_426
"""Genes of the published human dictionary, specials included."""
GRID = perturbation.Perturb().screen_grid
CPU, GPU = torch.device("cpu"), torch.device("cuda")


def figures(*, quick: bool = False) -> Iterator[Figure]:
    """All figures of this machine: of its GPU where there is one."""
    if torch.cuda.is_available():
        yield from _on_gpu(quick=quick)
        return
    torch.set_num_threads(1)
    row = training.Model(num_layers=2, dim=64, ffn_dim=128) if quick else training.Model()
    lengths = (64, 128) if quick else (512, 2048)
    # processes are forked first, before this one has used any thread or memory
    yield _memory(row, lengths[1], batch=4 if quick else 8)
    with tempfile.TemporaryDirectory(prefix="mixgf-bench-") as folder:
        sizes: dict[str, Any] = {"genes": 1000 if quick else 25_000, "shrink": 8 if quick else 1}
        yield _embedding_memory(row, random_corpus(files.join(folder, "longest"), num_cells=8, full=True, **sizes))
        for length, num, batch, bars in (
            (lengths[0], 32, 32, ("3.2x", "8x")), (lengths[1], 8, 8, ("2.1x", "5.5x")),
        ):  # fmt: skip
            yield from _delete_all(row, length, num, batch=batch, repeats=1 if quick else 3, bars=bars)
            yield from _screened(row, length, num, repeats=1 if quick else 3)
        yield from _agreement(quick=quick)
        yield from _embeddings(row, random_corpus(files.join(folder, "mix"), num_cells=400, **sizes), quick=quick)
        yield from _actors(row, folder, quick=quick)


class Work:
    """Deletions of one cell of random genes, ready to be scored in either way."""

    def __init__(self, row: training.Model, length: int, num: int, *, device: torch.device = CPU) -> None:
        rng = np.random.default_rng(0)
        self.row, self.length = row, length
        self.sentence = (rng.permutation(VOCABULARY - 3)[:length] + 3).tolist()
        self.genes = self.sentence[:: length // num][:num]
        self.goal_D = torch.from_numpy(rng.normal(size=row.dim)).float()
        self.device = device

    def encoder(self) -> Encoder:
        """The paper's encoder with random weights."""
        return MaskedModel(self.row, VOCABULARY).eval().encoder.to(self.device)

    def encode_cells(self, engine: ShiftScorer) -> UnperturbedCells:
        """The unperturbed cell."""
        return engine.encode_cells(torch.tensor(self.sentence), torch.tensor([0, self.length]))

    def exact(self, engine: ShiftScorer) -> Tensor:
        """Our shifts, unperturbed cell included."""
        genes_S1 = torch.tensor(self.genes, device=self.device)[:, None]
        cells_S = torch.zeros(len(genes_S1), dtype=torch.int64, device=self.device)
        return engine.score(self.encode_cells(engine), cells_S, genes_S1, "delete", self.goal_D[None]).shift_SK[:, 0]

    def flops(self, layers: int) -> float:
        """What the deletions need, the unperturbed cell included."""
        return forward_flops(self.row, [self.length] + [self.length - 1] * len(self.genes), layers=layers)


def _delete_all(
    row: training.Model, length: int, num: int, *, batch: int, repeats: int, bars: tuple[str, str]
) -> Iterator[Figure]:
    """Deletions of one cell, the second last layer as the family reads it, and our default, the last."""
    work = Work(row, length, num)
    encoder = work.encoder()
    layers = row.num_layers - 1
    second_last, last = ShiftScorer(encoder=encoder, layers=layers), ShiftScorer(encoder=encoder)
    bert = published.bert(row, VOCABULARY, attention_dropout=0.0).eval()
    left, right = torch.ones(1024, 1024), torch.ones(1024, 1024)
    works: dict[str, Callable[[], object]] = {
        "ours": lambda: work.exact(second_last),
        "last": lambda: work.exact(last),
        "published": lambda: published.delete_all(bert, work.sentence, work.genes, work.goal_D, batch=batch),
        "peak": lambda: [left @ right for _ in range(8)],  # in CPU seconds like the rest: others may want the machine
    }
    if fast_bf16():
        half = ShiftScorer(encoder=encoder, layers=layers, precision="bf16")
        works["bf16"] = lambda: work.exact(half)
        kernels = _Kernels(row, length, num, layers)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            works[f"products {name}"] = partial(kernels.products, dtype)
        works["kernels bf16"] = kernels.of_autocast
    times = interleaved(works, repeats=repeats, cpu=True)
    peak = 8 * 2 * 1024**3 / statistics.median(times["peak"])
    figure = partial(rate, unit="sentences/CPU-s", amount=num, times=times)
    yield figure(
        f"delete, length {length:,}, fp32, second last layer / published", key="ours", against="published", bar=bars[0]
    )
    if "bf16" in works:
        yield figure(f"  bf16 / published, length {length:,}", key="bf16", against="published", bar=bars[1])
        yield figure("  matrix products alone, bf16 / fp32", key="products bf16", against="products fp32")
        yield figure("  bound: matrix products alone, bf16 / published", key="products bf16", against="published")
        yield figure(
            "  bound: these, exponentials, SiLU and layer norms / published", key="kernels bf16", against="published"
        )
    yield figure("  the last layer, our default / published (second last)", key="last", against="published")
    yield Figure(
        figure=f"  MFU, length {length:,}", unit="of GEMM peak",
        value=work.flops(layers) / statistics.median(times["ours"]) / peak,
    )  # fmt: skip
    yield Figure(figure="  GEMM peak, fp32, one thread", value=peak / 1e9, unit="GFLOP/s")


class _Kernels:
    """What no implementation of the forward pass can leave out, each by torch's own kernel, of one sentence at a time.

    Args:
        row: sizes of the encoder.
        length: tokens of a sentence.
        num: sentences.
        layers: layers that are run.
    """

    def __init__(self, row: training.Model, length: int, num: int, layers: int) -> None:
        self.num = num * layers
        self.row = row
        linear = ((row.dim, 3 * row.dim), (row.dim, row.dim), (row.dim, row.ffn_dim), (row.ffn_dim, row.dim))
        made = {
            "linear": [(torch.randn(length, a), torch.randn(a, b)) for a, b in linear],
            "heads": [(torch.randn(row.num_heads, length, row.dim // row.num_heads),) * 2],
            "weights": [(torch.rand(row.num_heads, length, length), torch.empty(0))],
        }
        self.made = {
            dtype: {name: [(a.to(dtype), b.to(dtype)) for a, b in pairs] for name, pairs in made.items()}
            for dtype in (torch.float32, torch.bfloat16)
        }

    def products(self, dtype: torch.dtype) -> None:
        """The matrix products: four of the weights, two of attention."""
        made = self.made[dtype]
        ((q, k),), ((weights, _),) = made["heads"], made["weights"]
        for _ in range(self.num):
            for left, right in made["linear"]:
                left @ right
            q @ k.transpose(1, 2)
            weights @ k

    def of_autocast(self) -> None:
        """The products in bf16; an exponential per attention weight and layer norms in fp32, SiLU in bf16, as autocast has them."""
        (wide, _), (tokens, _) = self.made[torch.bfloat16]["linear"][3], self.made[torch.float32]["linear"][0]
        ((weights, _),) = self.made[torch.float32]["weights"]
        cached, size = weights.reshape(-1)[: 1 << 15], (self.row.dim,)  # as a fused kernel would have them
        for _ in range(self.num):
            for _ in range(0, weights.numel(), len(cached)):
                torch.exp(cached)
            torch.nn.functional.silu(wide)
            torch.nn.functional.layer_norm(tokens, size)
            torch.nn.functional.layer_norm(tokens, size)
        self.products(torch.bfloat16)


def _screened(row: training.Model, length: int, num: int, *, repeats: int) -> Iterator[Figure]:
    """Estimates of all genes of one cell, against exact scores of all, as many times those of `num` genes."""
    work = Work(row, length, num)
    engine = ShiftScorer(encoder=work.encoder())
    ids, genes = torch.tensor(work.sentence), torch.tensor(work.sentence)
    absent = torch.arange(3, 3 + 4 * length)  # for overexpression: 4 genes per token, most of them not in the cell
    works: dict[str, Callable[[], object]] = {
        "exact": lambda: work.exact(engine),
        "delete": lambda: screen.estimate(engine, ids, genes, "delete", work.goal_D, grid=GRID),
        "overexpress": lambda: screen.estimate(engine, ids, absent, "overexpress", work.goal_D, grid=GRID),
    }
    times = interleaved(works, repeats=repeats, cpu=True)
    for name, asked in (("delete", len(genes)), ("overexpress", len(absent))):
        exact = statistics.median(times["exact"]) / num
        ratio = statistics.median(e / num * asked / t for e, t in zip(times["exact"], times[name], strict=True))
        yield Figure(
            figure=f"screen of {asked:,} genes, {name}, length {length:,} / exact (scaled from {num})", unit="genes/CPU-s",
            value=asked / statistics.median(times[name]), baseline=1 / exact, ratio=ratio, bar="100x" if name == "delete" else "",
        )  # fmt: skip


def _agreement(*, quick: bool) -> Iterator[Figure]:
    """With MIXGF_BENCH_RUN, the folder of a trained run: how estimates rank the genes of single cells.

    Ten cells of full length, drawn; the goal is the commonest other cell type of the cell's species.
    """
    folder = os.environ.get("MIXGF_BENCH_RUN", "")
    if not folder:
        warn("bench: how the screen agrees with exact shifts is left out; MIXGF_BENCH_RUN=FOLDER names a trained run")
        return
    corpus = Corpus(files.join(folder, "corpus"))
    encoder, _ = checkpoint.load_encoder(files.join(folder, "pretrain"))
    lead, longest = int(corpus.cls), int(corpus.lengths_N.max())
    rng = np.random.default_rng(0)
    full = np.flatnonzero(corpus.lengths_N == longest)
    types = corpus.obs()["cell_type"].astype(str).to_numpy()
    chosen = rng.choice(full, 2 if quick else 10, replace=False)
    for variant in ("remaining", "all"):
        engine = ShiftScorer(encoder=encoder.eval(), variant=variant, lead=lead, max_len=longest)
        rows: dict[str, list[list[float]]] = {name: [] for name in screen.OPERATIONS}
        for cell in chosen.tolist():
            others = corpus.species_N == corpus.species_N[cell]
            names, counts = np.unique(types[others & (types != types[cell])], return_counts=True)
            goal = rng.permutation(np.flatnonzero(others & (types == names[counts.argmax()])))[:64]
            ids_T, offsets_B1 = (torch.from_numpy(x) for x in corpus.tokens(goal))
            goal_D = engine.vectors(ids_T, offsets_B1).mean(dim=0)
            ids_L = torch.from_numpy(corpus.tokens([cell])[0]).long()
            pool = corpus.vocabulary.species_tokens(corpus.species[corpus.species_N[cell]]).astype(np.int64)
            drawn = torch.from_numpy(rng.choice(pool, longest, replace=False))
            for name in screen.OPERATIONS:
                genes = ids_L[lead:] if name == "delete" else torch.unique(torch.cat([ids_L[lead::2], drawn]))
                estimated = screen.estimate(engine, ids_L, genes, name, goal_D, grid=GRID)
                original = engine.encode_cells(ids_L, torch.tensor([0, len(ids_L)]))
                cells = torch.zeros(len(genes), dtype=torch.int64)
                exact = engine.score(original, cells, genes[:, None], name, goal_D[None]).shift_SK[:, 0]
                top = torch.topk(exact, 50).indices
                found = torch.isin(top, torch.topk(estimated, 100).indices).double().mean()
                rows[name].append([float(stats.spearmanr(estimated, exact).statistic), float(found)])
        for name, values in rows.items():
            for i, what in enumerate(("Spearman by cell", "top 50 in its top 100")):
                column = [value[i] for value in values]
                yield Figure(
                    figure=f"screen, {name}, {variant}, length {longest}: {what} (baseline: worst of {len(column)})",
                    unit="", value=statistics.median(column), baseline=min(column), bar="0.95",
                )  # fmt: skip


def _memory(row: training.Model, length: int, *, batch: int) -> Figure:
    """Largest memory of a batch of deletions, above that of a process that has made the model."""

    def ours() -> float:
        work = Work(row, length, batch)
        engine = ShiftScorer(encoder=work.encoder(), layers=row.num_layers - 1)
        before = peak_memory()
        work.exact(engine)
        return peak_memory() - before

    def theirs() -> float:
        work = Work(row, length, batch)
        bert = published.bert(row, VOCABULARY, attention_dropout=0.0).eval()
        before = peak_memory()
        published.delete_all(bert, work.sentence, work.genes, work.goal_D, batch=batch)
        return peak_memory() - before

    (our,), (their,) = forked([ours]), forked([theirs])
    name = f"memory of {batch} deletions at once, length {length:,}, published / ours"
    return Figure(figure=name, value=our, unit="GB", baseline=their, ratio=their / our)


def _embedding_memory(row: training.Model, corpus: Corpus) -> Figure:
    """Largest memory of two cells of full length at once, above that of a process that has made the model and read the cells."""
    cells = np.arange(2)
    corpus.tokens(cells)

    def ours() -> float:
        encoder = MaskedModel(row, corpus.vocabulary.size).eval().encoder
        before = peak_memory()
        embed_cells(encoder, corpus, cells, "mean", -2)
        return peak_memory() - before

    def theirs() -> float:
        bert = published.bert(row, corpus.vocabulary.size, attention_dropout=0.0).eval()
        before = peak_memory()
        published.embed(bert, corpus, cells)
        return peak_memory() - before

    (our,), (their,) = forked([ours]), forked([theirs])
    name = f"memory of 2 embeddings at once, length {corpus.lengths_N.max():,}, published / ours"
    return Figure(figure=name, value=our, unit="GB", baseline=their, ratio=their / our)


def _actors(row: training.Model, folder: str, *, quick: bool) -> Iterator[Figure]:
    """The stage's own work units on a pool of one and of two Ray actors, one thread each, model and corpus loaded before."""
    from mixgf.distributed.actor_pool import ActorPool, Size
    from mixgf.distributed.session import session

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    length = 64 if quick else 512
    corpus = random_corpus(files.join(folder, "even"), num_cells=8, genes=600, longest=length, full=True)
    weights = files.join(folder, "weights")
    record = artifacts.plan(checkpoint.KIND, 1, {}, {})
    artifacts.begin(weights, record)
    model = MaskedModel(row, corpus.vocabulary.size)
    checkpoint.publish_checkpoint(
        weights, record, model, vocabulary=corpus.vocabulary.hash, tokens=data.Tokens(max_len=length)
    )
    settings = run.Config(
        output=folder,
        compute=run.Compute(num_workers=3),  # room for both pools
        perturb=perturbation.Perturb(max_cells=0, operations=("delete",), max_genes=16, block_cells=1, block_genes=4),
    )
    plan = group_design.build_design(corpus, settings)
    units = [unit for unit in scoring_tasks.plan_tasks(plan, corpus, settings.perturb) if unit.operation != "embed"]
    states = np.ones((len(plan.states), row.dim))
    sentences = round(sum(unit.cost for unit in units) / length)
    tasks = [Task(part=unit.key, function=perturb_phases.score, args=(unit, states)) for unit in units]

    def pool(size: int) -> ActorPool:
        return ActorPool(
            partial(
                scoring_tasks.ScoringWorker,
                settings,
                corpus=corpus.uri,
                weights=weights,
                folder=files.join(folder, str(size)),
            ),
            Size(min_actors=size, max_actors=size),
        )

    with session(settings), pool(1) as one, pool(2) as two:
        for made, size in ((one, 1), (two, 2)):
            while made.num_up < size:  # until all are loaded
                list(made.run(tasks))
        works: dict[str, Callable[[], object]] = {
            "one": lambda: list(one.run(tasks)), "two": lambda: list(two.run(tasks)),
        }  # fmt: skip
        times = interleaved(works, repeats=1 if quick else 3)
    yield rate(
        "stage, 2 actors / 1 (wall, parts written)", "sentences/s", sentences, times=times, key="two", against="one"
    )


def _on_gpu(*, quick: bool) -> Iterator[Figure]:
    """Deletions per second of one GPU, bf16."""
    peak = measure_peak(GPU, "bf16", seconds=1.0)
    row = training.Model()
    for length in (512, 2048):
        work = Work(row, length, length // (16 if quick else 4), device=GPU)
        engine = ShiftScorer(encoder=work.encoder(), layers=row.num_layers - 1, micro_tokens=1 << 18, precision="bf16")
        times = interleaved({"ours": partial(work.exact, engine)}, repeats=1 if quick else 5, warmups=2)
        bar = "3,000" if length == 2048 else ""
        yield rate(f"delete, length {length:,}, bf16", "sentences/s", len(work.genes), times=times, key="ours", bar=bar)
        yield Figure(
            figure=f"  MFU, length {length:,}", unit="of GEMM peak",
            value=work.flops(row.num_layers - 1) / statistics.median(times["ours"]) / peak,
        )  # fmt: skip

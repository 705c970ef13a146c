"""Training step of the paper's model: ours against the published way, written plainly with Hugging Face BERT.

The published way (shared notes, performance section 2): cells padded to the longest, two full passes with other dropout,
scores of the whole vocabulary at every position, contrast of the first position's vectors, AdamW. Run through
`python jobs/bench.py train [--json] [--quick]`; on a CPU in CPU seconds of one thread, on a GPU in wall seconds.
Needs `transformers` (extra `test`).
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from measure import Figure, interleaved, peak_memory, rate

from mixgf import artifacts, config, storage
from mixgf.dataset import Corpus
from mixgf.model import MaskedModel
from mixgf.objectives import Pretraining, nt_xent
from mixgf.train import LocalContext, make_optimizer, measure_peak
from mixgf.vocab import NUM_SPECIALS, Vocabulary

Step = Callable[[], object]


def figures(*, quick: bool = False) -> list[Figure]:
    """All figures; ours before the published way, because peak memory only grows."""
    if torch.cuda.is_available():
        return _on_gpu(quick=quick)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="mixgf-bench-") as folder:
        row = config.Model(num_layers=2, dim=64, ffn_dim=128) if quick else config.Model()
        settings = _settings(row, batch_cells=2)
        corpus = _corpus(folder, num_cells=64, genes=1000 if quick else 25_000, shrink=8 if quick else 1)
        task = Pretraining(settings, corpus)
        cells = {s: task.work(s, 0, 1) for s in range(3)}
        tokens = sum(w.num_tokens for w in cells.values())
        before = peak_memory()
        works: dict[str, Step] = {"ours": _ours(settings, corpus, "fp32"), "ours bf16": _ours(settings, corpus, "bf16")}
        for work in works.values():
            work()
        memory = peak_memory() - before
        works["published"] = _published(settings, corpus, attention_dropout=0.1)
        works["published, equal dropout"] = _published(settings, corpus, attention_dropout=0.0)
        times = interleaved(works, repeats=1 if quick else 3, cpu=True)
        peak = measure_peak(torch.device("cpu"), "fp32", seconds=1.0)
        flops = sum(w.flops for w in cells.values())
        loader = interleaved({"loader": lambda: [task.work(s, 0, 1) for s in range(10)]}, repeats=3, cpu=True)
        return [
            rate("train fp32 / published as shipped", "tokens/CPU-s", tokens, times=times, key="ours", against="published"),
            rate(
                "train fp32 / published, equal dropout", "tokens/CPU-s", tokens, times=times, key="ours",
                against="published, equal dropout",
            ),
            rate("train bf16 / published as shipped", "tokens/CPU-s", tokens, times=times, key="ours bf16", against="published"),
            rate("loader: plan, read, mask, pack", "cells/CPU-s", 20, times=loader, key="loader"),
            Figure(figure="train fp32, useful MFU", value=flops / statistics.median(times["ours"]) / peak, unit="of GEMM peak"),
            Figure(
                figure="train memory above start, ours / published", value=memory, unit="GB",
                baseline=peak_memory() - before, ratio=(peak_memory() - before) / max(memory, 1e-9),
            ),
        ]  # fmt: skip


def _settings(row: config.Model, *, batch_cells: int, **objective: Any) -> config.Config:
    train = config.Train(batch_cells=batch_cells, micro_tokens=1 << 20)
    return config.Config(model=row, train=train, objective=config.Objective(pooling="first", **objective))


def _corpus(folder: str, *, num_cells: int, genes: int, shrink: int = 1, full: bool = False) -> Corpus:
    """A corpus of random sentences with the length mix of real cells: median 1,866 genes, 40 % cut at 2,048."""
    rng = np.random.default_rng(0)
    drawn = rng.lognormal(np.log(1866), 0.4, num_cells) if not full else np.full(num_cells, 2048)
    lengths = (np.clip(drawn, 200, 2048) // shrink).astype(np.int32)
    table = pa.table({
        "token": pa.array(np.arange(2 * genes) + NUM_SPECIALS, pa.int32()),
        "gene": [f"G{i:06d}" for i in range(2 * genes)], "symbol": [f"g{i}" for i in range(2 * genes)],
        "species": ["human"] * genes + ["mouse"] * genes, "median": np.ones(2 * genes),
        "biotype": ["protein_coding"] * (2 * genes),
    })  # fmt: skip
    vocabulary = Vocabulary(table, species=("human", "mouse"), sharing="separate")
    vocabulary.save(storage.join(folder, "vocabulary.parquet"))
    species = (np.arange(num_cells) % 2).astype(np.int8)
    sentences = [
        rng.permutation(genes)[:n] + NUM_SPECIALS + genes * int(s) for n, s in zip(lengths, species, strict=True)
    ]
    shard = pa.table({"tokens": pa.array(sentences, pa.list_(pa.int32()))})
    storage.write_table(storage.join(folder, "shards", "00000.parquet"), shard)
    storage.write_table(storage.join(folder, "index.parquet"), pa.table({"length": lengths, "species": species}))
    record = artifacts.plan("corpus", 1, {"tokens": {}}, {})
    details = {
        "species": ["human", "mouse"],
        "vocabulary": vocabulary.hash,
        "shards": [{"name": "00000.parquet", "rows": num_cells}],
    }
    artifacts.finish(folder, record, details=details)
    return Corpus(folder)


def _ours(settings: config.Config, corpus: Corpus, precision: str) -> Step:
    """Three training steps of mixgf, data included."""
    settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, precision=precision))
    task, context = Pretraining(settings, corpus), LocalContext()
    model = MaskedModel(settings.model, corpus.vocabulary.size)
    optimizer = make_optimizer(model, settings.train)

    def steps() -> None:
        for step in range(3):
            optimizer.zero_grad()
            task.backward(model, task.work(step, 0, 1), context)
            optimizer.step()

    return steps


def _published(settings: config.Config, corpus: Corpus, *, attention_dropout: float) -> Step:
    """The same three batches the published way."""
    from transformers import BertConfig, BertForMaskedLM

    m, o = settings.model, settings.objective
    sizes = BertConfig(
        vocab_size=corpus.vocabulary.size, hidden_size=m.dim, num_hidden_layers=m.num_layers, num_attention_heads=m.num_heads,
        intermediate_size=m.ffn_dim, hidden_act="silu", max_position_embeddings=m.max_positions,
        hidden_dropout_prob=m.dropout, attention_probs_dropout_prob=attention_dropout,
    )  # fmt: skip
    model = BertForMaskedLM(sizes).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.train.lr)
    task = Pretraining(settings, corpus)

    def steps() -> None:
        for step in range(3):
            share = task.plan.share(step)
            tokens, offsets = corpus.tokens(share.cells_B)
            rows = [torch.from_numpy(tokens[a:b].astype(np.int64)) for a, b in itertools.pairwise(offsets)]
            ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
            real = (ids > 0).long()
            chosen = (torch.rand(ids.shape) < o.mlm_fraction) & (ids > 0)
            labels = torch.where(chosen, ids, -100)
            inputs = torch.where(chosen & (torch.rand(ids.shape) < 0.8), 1, ids)
            optimizer.zero_grad()
            passes = [model(input_ids=inputs, attention_mask=real, output_hidden_states=True) for _ in range(2)]
            first, second = (out.hidden_states[-1][:, 0] for out in passes)
            mlm = F.cross_entropy(passes[0].logits.flatten(0, 1), labels.flatten())
            (mlm + nt_xent(first, second, o.temperature)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return steps


def _on_gpu(*, quick: bool) -> list[Figure]:
    """Cells per second and MFU of one GPU at length 2,048, bf16, compiled."""
    device = torch.device("cuda")
    peak = measure_peak(device, "bf16", seconds=1.0)
    out = []
    with tempfile.TemporaryDirectory(prefix="mixgf-bench-") as folder:
        cells = 16 if quick else 128
        corpus = _corpus(folder, num_cells=512, genes=25_000, full=True)
        for name, objective in {"MLM": {"contrast_weight": 0.0}, "MLM + SimCSE": {}}.items():
            settings = _settings(config.Model(), batch_cells=cells, **objective)
            settings = dataclasses.replace(settings, train=dataclasses.replace(settings.train, precision="bf16"))
            task, context = Pretraining(settings, corpus), LocalContext(device)
            model = MaskedModel(settings.model, corpus.vocabulary.size).to(device)
            model.compile(dynamic=True)
            optimizer = make_optimizer(model, settings.train)
            works = [task.work(step, 0, 1) for step in range(3)]

            def steps(
                task: Any = task,
                model: Any = model,
                context: Any = context,
                optimizer: Any = optimizer,
                works: Any = works,
            ) -> None:
                for work in works:
                    optimizer.zero_grad()
                    task.backward(model, work, context)
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

"""The published ways, written plainly with Hugging Face BERT: the baselines of bench_train.py and bench_perturb.py.

Training: cells padded to the longest, two full passes with other dropout, scores of the whole vocabulary at every position, contrast
of the first position's vectors, AdamW; a collator that pads Python lists.
Perturbation: one cell at a time, a padded batch of copies through the whole model, scores of the vocabulary included.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from mixgf.config import training
from mixgf.config.run import Config
from mixgf.corpus.reader import Corpus
from mixgf.training.losses import simcse_loss
from mixgf.training.pretraining import Pretraining

Step = Callable[[], object]


def bert(m: training.Model, vocab_size: int, *, attention_dropout: float) -> Any:
    """A Hugging Face BERT of these sizes."""
    from transformers import BertConfig, BertForMaskedLM

    sizes = BertConfig(
        vocab_size=vocab_size, hidden_size=m.dim, num_hidden_layers=m.num_layers, num_attention_heads=m.num_heads,
        intermediate_size=m.ffn_dim, hidden_act="silu", max_position_embeddings=m.max_positions,
        hidden_dropout_prob=m.dropout, attention_probs_dropout_prob=attention_dropout,
    )  # fmt: skip
    return BertForMaskedLM(sizes)


def padded(corpus: Corpus, cells: Any) -> tuple[Tensor, Tensor]:
    """Ids padded to the longest, and which are real."""
    tokens, offsets = corpus.tokens(cells)
    rows = [torch.from_numpy(tokens[a:b].astype(np.int64)) for a, b in itertools.pairwise(offsets)]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return ids, (ids > 0).long()


def collate(corpus: Corpus, cells: Any) -> tuple[Tensor, ...]:
    """Rows of a table to lists, padded and marked element by element, then masked: as the published collator works."""
    tokens, offsets = corpus.tokens(cells)
    rows = [pa.array(tokens[a:b]).to_pylist() for a, b in itertools.pairwise(offsets)]
    longest = max(map(len, rows))
    even = [row + [0] * (longest - len(row)) for row in rows]
    real = [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
    special = torch.tensor([[1 if token in (0, 1) else 0 for token in row] for row in even]).bool()
    ids = torch.tensor(even)
    labels = ids.clone()
    chosen = torch.bernoulli(torch.full(ids.shape, 0.15).masked_fill_(special, 0.0)).bool()
    labels[~chosen] = -100
    hidden = torch.bernoulli(torch.full(ids.shape, 0.8)).bool() & chosen
    ids[hidden] = 1
    other = torch.bernoulli(torch.full(ids.shape, 0.5)).bool() & chosen & ~hidden
    ids[other] = torch.randint(corpus.vocabulary.size, ids.shape)[other]
    return ids, torch.tensor(real), labels


def step(settings: Config, corpus: Corpus, number: int, *, attention_dropout: float) -> Step:
    """A training step on a batch of our plan."""
    o = settings.objective
    model = bert(settings.model, corpus.vocabulary.size, attention_dropout=attention_dropout).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.train.lr)
    share = Pretraining(settings, corpus).plan.share(number)

    def run() -> None:
        ids, real = padded(corpus, share.cells_B)
        chosen = (torch.rand(ids.shape) < o.mlm_fraction) & (ids > 0)
        labels = torch.where(chosen, ids, -100)
        inputs = torch.where(chosen & (torch.rand(ids.shape) < 0.8), 1, ids)
        optimizer.zero_grad()
        passes = [model(input_ids=inputs, attention_mask=real, output_hidden_states=True) for _ in range(2)]
        first, second = (out.hidden_states[-1][:, 0] for out in passes)
        mlm = F.cross_entropy(passes[0].logits.flatten(0, 1), labels.flatten())
        (mlm + simcse_loss(first, second, o.temperature)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return run


@torch.inference_mode()
def embed(model: Any, corpus: Corpus, cells: Any, *, batch: int = 2) -> list[Tensor]:
    """Vectors of cells, batch after padded batch: mean over the tokens of the second last layer, scores of the vocabulary included."""
    out = []
    for start in range(0, len(cells), batch):
        ids, real = padded(corpus, cells[start : start + batch])
        states = model(input_ids=ids, attention_mask=real, output_hidden_states=True).hidden_states[-2]
        out.append((states * real[..., None]).sum(1) / real.sum(1, keepdim=True))
    return out


@torch.inference_mode()
def delete_all(model: Any, sentence: list[int], genes: list[int], goal_D: Tensor, *, batch: int) -> Tensor:
    """Shifts towards a goal of one cell's deletions: copies of the cell without a gene, padded, batch after batch.

    The second last layer, mean over the remaining genes on both sides, as the family does.
    """
    ids = torch.tensor([sentence])
    real = torch.ones_like(ids)
    before_LD = model(input_ids=ids, attention_mask=real, output_hidden_states=True).hidden_states[-2][0]
    copies = [[token for token in sentence if token != gene] for gene in genes]
    places = [sentence.index(gene) for gene in genes]
    out = []
    for start in range(0, len(copies), batch):
        rows = [torch.tensor(copy) for copy in copies[start : start + batch]]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        real = (ids > 0).long()
        after = model(input_ids=ids, attention_mask=real, output_hidden_states=True).hidden_states[-2]
        same = [torch.cat([before_LD[:at], before_LD[at + 1 :]]) for at in places[start : start + batch]]
        before = torch.nn.utils.rnn.pad_sequence(same, batch_first=True)
        num = real.sum(1, keepdim=True)
        mean_after, mean_before = ((x * real[..., None]).sum(1) / num for x in (after, before))
        out.append(F.cosine_similarity(mean_after, goal_D[None]) - F.cosine_similarity(mean_before, goal_D[None]))
    return torch.cat(out)

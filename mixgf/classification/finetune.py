"""Cell types from the encoder: fine-tuning (paper section 4.3), and simple classifiers on frozen vectors.

`predict` answers one question: given a split and a model's name, what are the class probabilities of the test cells? It is a
pure function of artifacts; which cells it may look at for what is decided by the split (`mixgf.splits`).

Shapes: N training cells, M test cells, B cells of a batch, T packed tokens, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixgf import rng
from mixgf.arrays import Floats, Ints
from mixgf.classification import linear_start
from mixgf.classification.labels import Labelled
from mixgf.classification.species_alignment import moved, shared_tokens
from mixgf.classification.splits import Split
from mixgf.config.classification import Classify
from mixgf.config.run import Config
from mixgf.config.training import LayerChoice
from mixgf.console import warn
from mixgf.corpus.packed import Packed, keep_tokens, truncate
from mixgf.corpus.reader import Corpus
from mixgf.encoder import embed, lora
from mixgf.encoder.batch import Batch, pack_batch, split_micro_batches
from mixgf.encoder.bert import Encoder, Linear, cell_vectors, forward_flops, require_layer, vector_width
from mixgf.errors import UserError
from mixgf.genes.species import orthologs
from mixgf.genes.vocabulary import NUM_SPECIALS
from mixgf.training import loop
from mixgf.training.batch_plan import BatchPlan
from mixgf.training.context import Context, Group

_HEAD_SITE = 1 << 20
"""Place of the class head in the stream of dropout keys, beyond every layer."""


# Fine-tuning


class Classifier(nn.Module):
    """Encoder, pooled vector, dropout, one linear layer; perhaps a weight per token and class beside it.

    Args:
        encoder: Trained or not; it is changed by training.
        num_classes: C.
        pooling: `mean`, `first` or `cls`.
        cls: Sentences begin with <cls>.
        seed: Key of the head's initial weights.
        layer: Hidden layer that is pooled, as `embed.layer`.
        gene_weights: The sentence's tokens have weights, as `convex.gene_rows`; they begin at 0.
    """

    def __init__(
        self, encoder: Encoder, num_classes: int, *, pooling: str, cls: bool, seed: int, layer: LayerChoice = -1,
        gene_weights: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        require_layer(encoder.sizes, layer, "classify.layer")
        self.encoder, self.pooling, self.cls, self.layer = encoder, pooling, cls, layer
        self.head = Linear(vector_width(encoder.sizes, layer), num_classes)
        self.genes = nn.Parameter(torch.zeros(encoder.vocab_size, num_classes)) if gene_weights else None
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            self.head.weight.copy_(torch.randn(self.head.weight.shape, generator=generator) * encoder.sizes.init_sd)
            self.head.bias.zero_()

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, C); dropout only where the batch carries keys."""
        read = batch.truncate(self.encoder.sizes.max_positions)
        z_BD = cell_vectors(
            self.encoder, read.ids_T, read.offsets_B1, self.pooling, layer=self.layer, cls=self.cls,
            positions_T=read.positions_T, keys=read.keys_T, max_len=read.max_len,
        )  # fmt: skip
        p = self.encoder.sizes.dropout
        if batch.keys_T is not None and p > 0:
            chance16 = round(p * 65536)
            keys_B = batch.keys_T[batch.offsets_B1[:-1].long()]
            z_BD = z_BD.masked_fill(rng.dropped(keys_B, _HEAD_SITE, z_BD.shape[1], chance16), 0.0) / (
                1 - chance16 / 65536
            )
        y_BC: Tensor = self.head(z_BD)
        if self.genes is None:
            return y_BC
        weights_T = linear_start.rank_weight(batch.positions_T).to(self.genes.dtype)
        starts_B = batch.offsets_B1[:-1].long()
        sums_BC = F.embedding_bag(batch.ids_T, self.genes, starts_B, mode="sum", per_sample_weights=weights_T)
        squares_B = torch.segment_reduce(
            weights_T.square(), "sum", lengths=torch.diff(batch.offsets_B1).long(), unsafe=True
        )
        return y_BC + sums_BC / squares_B.clamp(min=1e-18).sqrt()[:, None]

    def linear(self) -> tuple[Floats, Floats, Floats]:
        """Weights (C, D) and bias (C,) of the linear layer, and weights of tokens (C, V), without columns where there are none."""
        genes_VC = self.head.weight.new_zeros(0, self.head.out_features) if self.genes is None else self.genes
        weight, bias, genes = (
            x.detach().cpu().numpy() for x in (self.head.weight, self.head.bias, genes_VC.T.contiguous())
        )
        return weight, bias, genes

    @torch.no_grad()
    def begin(self, start: linear_start.Start) -> None:
        """Take over a head."""
        self.head.weight.copy_(torch.from_numpy(start.head_CD))
        self.head.bias.copy_(torch.from_numpy(start.bias_C))
        if self.genes is not None:
            self.genes.copy_(torch.from_numpy(start.genes_CV.T))

    def freeze(self, layers: int | Literal["all"]) -> None:
        """Do not train the embedding and the first `layers` layers; 0 = train all, `all` = train the head only."""
        if layers == 0:
            return
        count = self.encoder.sizes.num_layers
        first = count if layers == "all" else layers
        if first > count:
            msg = f"classify.freeze_layers = {layers}: must be at most the encoder's {count} layers, or 'all'"
            raise UserError(msg)
        for part in (self.encoder.norm, *self.encoder.layers[:first]):
            part.requires_grad_(False)
        self.encoder.tokens.requires_grad = False
        self.encoder.positions.requires_grad = False


@dataclass
class Tuned:
    """What fine-tuning ended with."""

    probabilities: Floats
    """Of the test cells (M, C), by the weights of the chosen epoch."""
    epoch: int
    """The chosen epoch, counted from 1; 0 = the warm start."""
    history: list[dict[str, float]]
    """Per epoch: epoch, loss and accuracy on the validation cells, mean training loss."""
    share: float
    """Of the encoder's vector in the warm start, see `convex`; 0 = there was none."""
    warmup_steps: int
    num_steps: int
    model: Classifier
    """With the weights of the chosen epoch."""


@dataclass
class _Sentences:
    """Sentences of a corpus as the model reads them, by themselves and as packed batches."""

    corpus: Corpus
    max_len: int
    """Cut to so many tokens; 0 = as they are."""
    read: int
    """Tokens of a sentence that the encoder reads at most."""
    shared_V: npt.NDArray[np.int32] | None = None
    """The token that each token is read as, -1 = it is left out; None = as they are."""

    @property
    def lengths_N(self) -> npt.NDArray[np.int32]:
        """Tokens of each cell of the corpus, at most."""
        return self.corpus.lengths_N

    @property
    def cls(self) -> bool:
        """Whether sentences begin with <cls>."""
        return self.corpus.cls

    def tokens(self, cells: npt.ArrayLike) -> Packed:
        """Sentences of some cells; one without any shared gene stays as it is."""
        packed = self.corpus.tokens(cells)
        if self.shared_V is not None:
            tokens_T, offsets = packed
            read_T = self.shared_V[tokens_T]
            some_B = np.add.reduceat(np.append(read_T >= NUM_SPECIALS, False), offsets[:-1]) > 0
            some_T = np.repeat(some_B & (np.diff(offsets) > 0), np.diff(offsets))
            packed = keep_tokens((np.where(some_T, read_T, tokens_T), offsets), (read_T >= 0) | ~some_T)
        return truncate(*packed, self.max_len)

    def batch(self, cells: Ints, keys: tuple[int, int, Ints] | None = None) -> Batch:
        """Cells in the given order; `keys` = (seed, epoch, visits) adds dropout."""
        return pack_batch([self.tokens(cells)], cells, None if keys is None else rng.hashed(*keys))

    def lengths(self, cells: Ints) -> npt.NDArray[np.int32]:
        """Tokens that the encoder reads, at most."""
        return np.minimum(self.lengths_N[cells], min(self.max_len or self.read, self.read)).astype(np.int32)


def _sentences(encoder: Encoder, corpus: Corpus, table: Labelled, split: Split, run: Config) -> _Sentences:
    """What a fine-tuning reads: with `classify.align` another species is read as the one that trains."""
    trains, tested = (np.unique(table.species[rows]).tolist() for rows in (split.train, split.test))
    shared_V = None
    if run.classify.align and len(trains) == len(tested) == 1 and trains != tested:
        shared_V = shared_tokens(corpus.vocabulary, orthologs(run.vocab.orthologs), trains[0], tested[0])
    return _Sentences(corpus, longest(encoder, run.classify), encoder.sizes.max_positions, shared_V)


@dataclass
class _Selecting:
    """The fine-tuning task of `train.fit`; at the end of every epoch it looks at the validation cells.

    An epoch has ended when the first step of the next one is about to be made, or training has.
    """

    inner: loop.LossTask[Classifier]
    evaluate: Callable[[Classifier], dict[str, float]]
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    chosen: int = 0
    _epoch: int = 0
    _losses: list[Tensor] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        return self.inner.num_steps

    def work(self, step: int, rank: int, world_size: int) -> loop.BatchWork:
        return self.inner.work(step, rank, world_size)

    def backward(self, model: Classifier, work: loop.BatchWork, group: Group) -> dict[str, Tensor]:
        if work.epoch != self._epoch:
            self.epoch_ended(model)
            self._epoch = work.epoch
        figures = self.inner.backward(model, work, group)
        self._losses.append(figures["loss"])
        return figures

    def epoch_ended(self, model: Classifier) -> None:
        """Score the validation cells after an epoch."""
        self.score(model, self._epoch + 1, float(torch.stack(self._losses).mean()))
        self._losses.clear()

    def score(self, model: Classifier, epoch: int, train_loss: float) -> None:
        """Score the validation cells; keep the weights with the lowest loss, of equal ones the earliest."""
        figures = self.evaluate(model) | {"train_loss": train_loss}
        if not self.history or figures["loss"] < min(row["loss"] for row in self.history):
            self.best = {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}
            self.chosen = epoch
        self.history.append({"epoch": float(epoch)} | figures)


def finetune(
    encoder: Encoder, corpus: Corpus, table: Labelled, split: Split, *, run: Config, context: Context
) -> Tuned:
    """Fine-tune all weights (or the upper layers, or adapters) on the training cells and predict the test cells (paper section 4.3).

    AdamW, linear warm-up to the peak rate, cosine to zero; batches grouped by length. The epoch with the lowest loss on the
    validation cells, which are part of the training cells and not trained on, predicts. The published code selects on the
    test cells instead.

    With `classify.align` and `classify.warm_start` another species is predicted by the beginning: no validation cell says whether
    what steps on one species add is true of the other.

    Args:
        encoder: Where to start; it is changed.
        corpus: The sentences.
        table: The labelled cells.
        split: Which of them train, select and are tested. Labels of test cells are not looked at.
        run: The whole config; `classify` has the recipe, `train` precision, weight decay, clip and schedule, `vocab` orthologs.
        context: Where the loop runs.
    """
    settings, num_classes = run.classify, len(split.classes)
    seed = int(rng.hashed(run.seed, split.seed, 1)) & 0x7FFFFFFF
    model = Classifier(
        encoder, num_classes, pooling=run.embed.pooling, cls=corpus.cls, seed=seed, layer=settings.layer,
        gene_weights=settings.gene_weights,
    )  # fmt: skip
    model.freeze(settings.freeze_layers)
    if settings.lora_rank:
        lora.add_adapters(encoder, settings.lora_rank, settings.lora_alpha, seed=seed)
    sentences = _sentences(encoder, corpus, table, split, run)
    trained = np.setdiff1d(split.train, split.validation)
    cells, labels = table.cells[trained], split.ids(table.labels[trained])
    of_cell = dict(zip(cells.tolist(), labels.tolist(), strict=True))
    lengths = sentences.lengths(cells)
    plan = BatchPlan(
        lengths, np.zeros(len(cells), dtype=np.int8), [len(cells)], seed=seed, batch_cells=settings.batch_cells
    )
    epochs = max(settings.epochs, -(-settings.min_steps // plan.steps_per_epoch))
    num_steps = plan.steps_per_epoch * epochs
    optimisation = replace(
        run.train, epochs=epochs, max_steps=0, batch_cells=settings.batch_cells, lr=settings.lr,
        warmup_steps=min(settings.warmup_steps, num_steps // 4), species_mix={}, log_steps=max(1, plan.steps_per_epoch),
    )  # fmt: skip
    if optimisation.warmup_steps < settings.warmup_steps and not (
        settings.warm_start and sentences.shared_V is not None
    ):
        warn(
            f"{split.name}: {num_steps} steps, so the warm-up is {optimisation.warmup_steps} steps, not {settings.warmup_steps}"
        )
    weights_C = torch.ones(num_classes)
    if settings.class_weights:
        counts = np.bincount(labels, minlength=num_classes)
        weights_C = torch.from_numpy(len(labels) / (num_classes * np.maximum(counts, 1))).float()
    weights_C = weights_C.to(context.device)

    def batches(step: int, rank: int, world_size: int) -> loop.BatchWork:
        share = plan.share(step, rank, world_size)
        runs = split_micro_batches(lengths[share.cells_B], run.train.micro_tokens)
        made = [sentences.batch(cells[share.cells_B[r]], (seed, share.epoch, share.visits_B[r])) for r in runs]
        flops = 3 * forward_flops(encoder.sizes, lengths[share.cells_B].tolist())
        return loop.BatchWork(made, share.batch_cells, share.epoch, flops)

    def loss(model: Classifier, batch: Batch) -> dict[str, Tensor]:
        target_B = torch.tensor([of_cell[c] for c in batch.cells_B.tolist()], device=batch.ids_T.device)
        return {"loss": F.cross_entropy(model(batch).float(), target_B, weight=weights_C, reduction="none").sum()}

    def evaluate(model: Classifier) -> dict[str, float]:
        true = split.ids(table.labels[split.validation])
        p = probabilities(model, sentences, table.cells[split.validation], run.train.micro_tokens)
        of_true = p[np.arange(len(true)), true].clip(1e-12)
        return {"loss": float(-np.log(of_true).mean()), "accuracy": float((p.argmax(1) == true).mean())}

    task = _Selecting(loop.LossTask(num_steps, batches, loss, run.train.precision), evaluate)
    share = 0.0
    if settings.warm_start:
        begin = warm_start(model, sentences, cells, labels, seed=seed)
        share = begin.share
        task.score(model.to(context.device), 0, begin.loss)
    if not (settings.warm_start and sentences.shared_V is not None):
        loop.fit(model, task, optimisation, context)
        task.epoch_ended(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in task.best:
                parameter.copy_(task.best[name])
    lora.merge_adapters(encoder)
    predicted = probabilities(model, sentences, table.cells[split.test], run.train.micro_tokens)
    if sentences.shared_V is not None:
        predicted = moved(predicted, probabilities(model, sentences, cells, run.train.micro_tokens), labels)
    return Tuned(
        probabilities=predicted, epoch=task.chosen,
        history=task.history, share=share, warmup_steps=optimisation.warmup_steps, num_steps=num_steps, model=model,
    )  # fmt: skip


def warm_start(model: Classifier, sentences: _Sentences, cells: Ints, labels: Ints, *, seed: int) -> linear_start.Start:
    """Give a model the best convex head for its encoder, in place."""
    vectors_ND = embed.embed_cells(
        model.encoder, sentences, cells, model.pooling, model.layer, max_len=sentences.max_len
    )
    genes_NV = (
        None if model.genes is None else linear_start.gene_rows(*sentences.tokens(cells), model.encoder.vocab_size)
    )
    # cells of the training species cannot say how much of the encoder carries over to another one: the least
    shares = linear_start.SHARES if sentences.shared_V is None else linear_start.SHARES[-1:]
    start = linear_start.fit_best(vectors_ND, genes_NV, labels, model.head.out_features, seed=seed, shares=shares)
    model.begin(start)
    return start


@torch.inference_mode()
def probabilities(model: Classifier, sentences: _Sentences, cells: Ints, micro_tokens: int) -> Floats:
    """Class probabilities (cells, C) in the order of `cells`; on a CPU every cell is computed alone."""
    device = model.head.weight.device
    out = np.empty((len(cells), model.head.out_features))
    was_training = model.training
    model.eval()
    order = np.argsort(-sentences.lengths(cells), kind="stable")
    for run in _runs(sentences.lengths(cells)[order], micro_tokens if device.type == "cuda" else 0):
        few = order[run]
        out[few] = torch.softmax(model(sentences.batch(cells[few]).to(device)).double(), dim=1).cpu().numpy()
    model.train(was_training)
    return out


def _runs(lengths: npt.NDArray[np.int32], micro_tokens: int) -> Iterator[slice]:
    yield from (
        split_micro_batches(lengths, micro_tokens) if micro_tokens else (slice(i, i + 1) for i in range(len(lengths)))
    )


def longest(encoder: Encoder, settings: Classify) -> int:
    """Longest sentence that is read, 0 = all: `classify.max_len`, without weights of genes no more than the encoder's positions."""
    most = encoder.sizes.max_positions
    return settings.max_len if settings.gene_weights else min(settings.max_len or most, most)


def notes(tuned: Tuned) -> dict[str, Any]:
    """What is kept of a fine-tuning beside its predictions, as plain data."""
    return {
        "epoch": tuned.epoch,
        "share": tuned.share,
        "history": tuned.history,
        "warmup_steps": tuned.warmup_steps,
        "num_steps": tuned.num_steps,
    }

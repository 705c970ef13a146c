"""Cell types from the encoder: fine-tuning (paper section 4.3), and simple classifiers on frozen vectors.

`predict` answers one question: given a split and a model's name, what are the class probabilities of the test cells? It is a
pure function of artifacts; which cells it may look at for what is decided by the split (`mixgf.splits`).

Shapes: N training cells, M test cells, B cells of a batch, T packed tokens, D width, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixgf import baselines, dataset, keyed, selection, train
from mixgf.config import Classify, Config, UserError
from mixgf.dataset import Batch, Corpus
from mixgf.model import Encoder, Linear, forward_flops, pool
from mixgf.objectives import Group
from mixgf.plan import Plan, micro_batches
from mixgf.progress import warn
from mixgf.splits import UNKNOWN, Labelled, Split, names_of

Floats = npt.NDArray[np.floating]
Ints = npt.NDArray[np.int64]
Names = npt.NDArray[np.str_]

_HEAD_SITE = 1 << 20
"""Place of the class head in the stream of dropout keys, beyond every layer."""


def labelled(corpus: Corpus, settings: Classify) -> Labelled:
    """The labelled cells of a corpus.

    Raises:
        UserError: The label or group column is not there, or no cell has a label.
    """
    there = corpus.columns
    for name, wanted_column in (("label", settings.label), ("group", settings.group)):
        if wanted_column not in there:
            msg = (
                f"classify.{name} = {wanted_column!r}: the corpus has no such column; it has {', '.join(sorted(there))}"
            )
            raise UserError(msg)
    optional = (settings.donor, settings.dataset, settings.transfer)
    wanted = dict.fromkeys(
        ["cell", "species", "source", settings.label, settings.group, *(c for c in optional if c in there)]
    )
    obs = corpus.obs(list(wanted))

    def column(name: str) -> Names:
        return names_of(obs[name].tolist(), unknown=settings.unlabelled) if name in obs else np.full(len(obs), UNKNOWN)

    labels = column(settings.label)
    chosen = np.ones(len(labels), dtype=bool)
    if settings.cells:
        chosen[:] = False
        chosen[selection.select(corpus.obs(), settings.cells, "classify.cells")] = True
    rows = np.flatnonzero((labels != UNKNOWN) & chosen)
    if not len(rows):
        msg = f"classify.label = {settings.label!r}: none of {chosen.sum():,} cells has a label; name another column of obs"
        raise UserError(msg)
    return Labelled(
        cells=rows, names=obs["cell"].to_numpy().astype(np.str_)[rows], labels=labels[rows],
        species=obs["species"].to_numpy().astype(np.str_)[rows], groups=column(settings.group)[rows],
        donors=column(settings.donor)[rows], datasets=column(settings.dataset)[rows], transfer=column(settings.transfer)[rows],
        sources=obs["source"].to_numpy().astype(np.str_)[rows],
    )  # fmt: skip


# Frozen vectors


def frozen(
    head: str, train_ND: Floats, test_MD: Floats, *, table: Labelled, split: Split, settings: Classify
) -> Floats:
    """Class probabilities (M, C) by a simple classifier on frozen vectors.

    `knn` is the published "zero-shot": the nearest training cells by cosine, with their labels (geneformer_family B6.4).
    Between species, vectors are first z-scored within each species, as those of the baselines are.

    Args:
        head: One of `contenders.HEADS`.
        train_ND: Vectors of `split.train`.
        test_MD: Vectors of `split.test`.
        table: The labelled cells.
        split: Which of them train and which are tested.
        settings: `config.classify`.
    """
    labels, num_classes = split.ids(table.labels[split.train]), len(split.classes)
    species = (table.species[split.train], table.species[split.test])
    if len(np.union1d(*species)) > 1:
        train_ND, test_MD = baselines.standardise(train_ND, test_MD, *species)
    if head == "knn":
        return baselines.neighbours(train_ND, labels, test_MD, num_classes, number=settings.knn, metric="cosine")
    if head == "probe":
        train_ND, test_MD = baselines.standardise(train_ND, test_MD, *baselines.one_group(train_ND, test_MD))
        return baselines.logistic(train_ND, labels, test_MD, num_classes)
    assert head == "centroid", head
    return baselines.centroids(train_ND, labels, test_MD, num_classes)


# Fine-tuning


class Classifier(nn.Module):
    """Encoder, pooled vector, dropout, one linear layer.

    Args:
        encoder: Trained or not; it is changed by training.
        num_classes: C.
        pooling: `mean`, `first` or `cls`.
        cls: Sentences begin with <cls>.
        seed: Key of the head's initial weights.
    """

    def __init__(self, encoder: Encoder, num_classes: int, *, pooling: str, cls: bool, seed: int) -> None:
        super().__init__()
        self.encoder, self.pooling, self.cls = encoder, pooling, cls
        self.head = Linear(encoder.row.dim, num_classes)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(seed)
            self.head.weight.copy_(torch.randn(self.head.weight.shape, generator=generator) * encoder.row.init_sd)
            self.head.bias.zero_()

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, C); dropout only where the batch carries keys."""
        h_TD = self.encoder(
            batch.ids_T, batch.offsets_B1, positions_T=batch.positions_T, keys=batch.keys_T, max_len=batch.max_len
        )
        z_BD = pool(h_TD, batch.offsets_B1, self.pooling, cls=self.cls)
        p = self.encoder.row.dropout
        if batch.keys_T is not None and p > 0:
            chance16 = round(p * 65536)
            keys_B = batch.keys_T[batch.offsets_B1[:-1].long()]
            z_BD = z_BD.masked_fill(keyed.dropped(keys_B, _HEAD_SITE, z_BD.shape[1], chance16), 0.0) / (
                1 - chance16 / 65536
            )
        return self.head(z_BD)

    def freeze(self, layers: int) -> None:
        """Do not train the embedding and the first `layers` layers; 0 = train all, -1 = train the head only."""
        if layers == 0:
            return
        count = self.encoder.row.num_layers
        if not -1 <= layers <= count:
            msg = f"classify.freeze_layers = {layers}: must be between -1 and the encoder's {count} layers"
            raise UserError(msg)
        first = count if layers == -1 else layers
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
    """The chosen epoch, counted from 1."""
    history: list[dict[str, float]]
    """Per epoch: epoch, loss and accuracy on the validation cells, mean training loss."""
    warmup_steps: int
    num_steps: int
    model: Classifier
    """With the weights of the chosen epoch."""


@dataclass
class _Sentences:
    """Packed batches of some cells of a corpus."""

    corpus: Corpus
    max_len: int

    def batch(self, cells: Ints, keys: tuple[int, int, Ints] | None = None) -> Batch:
        """Cells in the given order; `keys` = (seed, epoch, visits) adds dropout."""
        few = dataset.cut(*self.corpus.tokens(cells), self.max_len)
        return dataset.pack([few], cells, None if keys is None else keyed.hashed(*keys))

    def lengths(self, cells: Ints) -> npt.NDArray[np.int32]:
        lengths = self.corpus.lengths_N[cells]
        return np.minimum(lengths, self.max_len).astype(np.int32) if self.max_len else lengths


@dataclass
class _Selecting:
    """The fine-tuning task of `train.fit`; at the end of every epoch it looks at the validation cells.

    An epoch has ended when the first step of the next one is about to be made, or training has.
    """

    inner: train.LossTask[Classifier]
    evaluate: Callable[[Classifier], dict[str, float]]
    history: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, Tensor] = field(default_factory=dict)
    chosen: int = 0
    _epoch: int = 0
    _losses: list[Tensor] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        return self.inner.num_steps

    def work(self, step: int, rank: int, world_size: int) -> train.BatchWork:
        return self.inner.work(step, rank, world_size)

    def backward(self, model: Classifier, work: train.BatchWork, group: Group) -> dict[str, Tensor]:
        if work.epoch != self._epoch:
            self.epoch_ended(model)
            self._epoch = work.epoch
        figures = self.inner.backward(model, work, group)
        self._losses.append(figures["loss"])
        return figures

    def epoch_ended(self, model: Classifier) -> None:
        """Score the validation cells; keep the weights with the lowest loss, of equal ones the earliest."""
        figures = self.evaluate(model) | {"train_loss": float(torch.stack(self._losses).mean())}
        self._losses.clear()
        if not self.history or figures["loss"] < min(row["loss"] for row in self.history):
            self.best = {k: p.detach().clone() for k, p in model.named_parameters() if p.requires_grad}
            self.chosen = self._epoch + 1
        self.history.append({"epoch": float(self._epoch + 1)} | figures)


def finetune(
    encoder: Encoder, corpus: Corpus, table: Labelled, split: Split, *, run: Config, context: train.Context
) -> Tuned:
    """Fine-tune all weights (or the upper layers) on the training cells and predict the test cells (paper section 4.3).

    AdamW, linear warm-up to the peak rate, cosine to zero; batches grouped by length. The epoch with the lowest loss on the
    validation cells, which are part of the training cells and not trained on, predicts. The published code selects on the
    test cells instead.

    Args:
        encoder: Where to start; it is changed.
        corpus: The sentences.
        table: The labelled cells.
        split: Which of them train, select and are tested. Labels of test cells are not looked at.
        run: The whole config; `classify` has the recipe, `train` precision, weight decay, clip and schedule.
        context: Where the loop runs.
    """
    settings, num_classes = run.classify, len(split.classes)
    seed = int(keyed.hashed(run.seed, split.seed, 1)) & 0x7FFFFFFF
    model = Classifier(encoder, num_classes, pooling=run.embed.pooling, cls=corpus.cls, seed=seed)
    model.freeze(settings.freeze_layers)
    sentences = _Sentences(corpus, longest(encoder, settings))
    trained = np.setdiff1d(split.train, split.validation)
    cells, labels = table.cells[trained], split.ids(table.labels[trained])
    of_cell = dict(zip(cells.tolist(), labels.tolist(), strict=True))
    lengths = sentences.lengths(cells)
    plan = Plan(lengths, np.zeros(len(cells), dtype=np.int8), [len(cells)], seed=seed, batch_cells=settings.batch_cells)
    epochs = max(settings.epochs, -(-settings.min_steps // plan.steps_per_epoch))
    num_steps = plan.steps_per_epoch * epochs
    optimisation = replace(
        run.train, epochs=epochs, max_steps=0, batch_cells=settings.batch_cells, lr=settings.lr,
        warmup_steps=min(settings.warmup_steps, num_steps // 4), species_mix=(), log_steps=max(1, plan.steps_per_epoch),
    )  # fmt: skip
    if optimisation.warmup_steps < settings.warmup_steps:
        warn(
            f"{split.name}: {num_steps} steps, so the warm-up is {optimisation.warmup_steps} steps, not {settings.warmup_steps}"
        )
    weights_C = torch.ones(num_classes)
    if settings.class_weights:
        counts = np.bincount(labels, minlength=num_classes)
        weights_C = torch.from_numpy(len(labels) / (num_classes * np.maximum(counts, 1))).float()
    weights_C = weights_C.to(context.device)

    def batches(step: int, rank: int, world_size: int) -> train.BatchWork:
        share = plan.share(step, rank, world_size)
        runs = micro_batches(lengths[share.cells_B], run.train.micro_tokens)
        made = [sentences.batch(cells[share.cells_B[r]], (seed, share.epoch, share.visits_B[r])) for r in runs]
        flops = 3 * forward_flops(encoder.row, lengths[share.cells_B].tolist())
        return train.BatchWork(made, share.batch_cells, share.epoch, flops)

    def loss(model: Classifier, batch: Batch) -> dict[str, Tensor]:
        target_B = torch.tensor([of_cell[c] for c in batch.cells_B.tolist()], device=batch.ids_T.device)
        return {"loss": F.cross_entropy(model(batch).float(), target_B, weight=weights_C, reduction="none").sum()}

    def evaluate(model: Classifier) -> dict[str, float]:
        true = split.ids(table.labels[split.validation])
        p = probabilities(model, sentences, table.cells[split.validation], run.train.micro_tokens)
        of_true = p[np.arange(len(true)), true].clip(1e-12)
        return {"loss": float(-np.log(of_true).mean()), "accuracy": float((p.argmax(1) == true).mean())}

    task = _Selecting(train.LossTask(num_steps, batches, loss, run.train.precision), evaluate)
    train.fit(model, task, optimisation, context)
    task.epoch_ended(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in task.best:
                parameter.copy_(task.best[name])
    return Tuned(
        probabilities=probabilities(model, sentences, table.cells[split.test], run.train.micro_tokens), epoch=task.chosen,
        history=task.history, warmup_steps=optimisation.warmup_steps, num_steps=num_steps, model=model,
    )  # fmt: skip


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
    yield from micro_batches(lengths, micro_tokens) if micro_tokens else (slice(i, i + 1) for i in range(len(lengths)))


def longest(encoder: Encoder, settings: Classify) -> int:
    """Longest sentence that is read: `classify.max_len`, but never more than the encoder has positions."""
    return min(settings.max_len or encoder.row.max_positions, encoder.row.max_positions)


def notes(tuned: Tuned) -> dict[str, Any]:
    """What is kept of a fine-tuning beside its predictions, as plain data."""
    return {
        "epoch": tuned.epoch,
        "history": tuned.history,
        "warmup_steps": tuned.warmup_steps,
        "num_steps": tuned.num_steps,
    }

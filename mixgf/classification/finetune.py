"""Fine-tuning: an encoder and a class head, trained on labelled cells (paper section 4.3).

Shapes: N training cells, M cells to predict, B cells of a batch, T packed tokens, D width, C classes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixgf import rng
from mixgf.arrays import Floats, Ints
from mixgf.classification import linear_start
from mixgf.classification.models.protocol import Problem, SentenceSet
from mixgf.classification.species_alignment import align_scores, is_new_study, read_as, shared_tokens_of
from mixgf.config.classification import Classify
from mixgf.config.run import Config
from mixgf.config.training import LayerChoice, Train
from mixgf.console import warn
from mixgf.corpus.packed import Packed, truncate
from mixgf.corpus.reader import Corpus
from mixgf.encoder import embed, lora
from mixgf.encoder.batch import Batch, pack_batch, split_micro_batches
from mixgf.encoder.bert import Encoder, Linear, cell_vectors, forward_flops, rank_weight, require_layer, vector_width
from mixgf.errors import UserError
from mixgf.training import loop
from mixgf.training.batch_plan import BatchPlan
from mixgf.training.selection import Selection
from mixgf.training.worker_group import Context, MetricRow

_HEAD_SITE = 1 << 20
"""Number of the class head in the stream of dropout keys, beyond every layer."""


class Classifier(nn.Module):
    """Encoder, pooled vector, dropout, one linear layer; with `gene_weights` also a weight per token and class.

    Args:
        encoder: Trained or not; training changes it.
        num_classes: C.
        pooling: `mean`, `first` or `cls`.
        cls: Sentences begin with <cls>.
        seed: Key of the head's initial weights.
        layer: Hidden layer that is pooled, as `embed.layer`.
        gene_weights: Tokens of the sentence have weights (`linear_start.gene_rows`), at first 0.
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
        weights_T = rank_weight(batch.positions_T).to(self.genes.dtype)
        starts_B = batch.offsets_B1[:-1].long()
        sums_BC = F.embedding_bag(batch.ids_T, self.genes, starts_B, mode="sum", per_sample_weights=weights_T)
        squares_B = torch.segment_reduce(
            weights_T.square(), "sum", lengths=torch.diff(batch.offsets_B1).long(), unsafe=True
        )
        return y_BC + sums_BC / squares_B.clamp(min=1e-18).sqrt()[:, None]

    def linear(self) -> tuple[Floats, Floats, Floats]:
        """Weights (C, D) and bias (C,) of the linear layer, and weights of tokens (C, V), or no columns."""
        genes_VC = self.head.weight.new_zeros(0, self.head.out_features) if self.genes is None else self.genes
        weight, bias, genes = (
            x.detach().cpu().numpy() for x in (self.head.weight, self.head.bias, genes_VC.T.contiguous())
        )
        return weight, bias, genes

    @torch.no_grad()
    def begin(self, start: linear_start.Start) -> None:
        """Set the head's weights."""
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

    def freeze_unread(self) -> None:
        """Do not train what the pooled vector does not depend on: layers above the one that is read; for `ranked` alone, all layers."""
        if self.layer != "all" and self.pooling == "ranked" and self.encoder.residual is None:
            for part in (self.encoder.norm, *self.encoder.layers):
                part.requires_grad_(False)
            self.encoder.positions.requires_grad = False
        elif self.layer != "all":
            self.encoder.layers[self.encoder.sizes.num_layers + 1 + self.layer :].requires_grad_(False)


@dataclass
class _Sentences:
    """Sentences of a corpus as the model reads them, by themselves and as packed batches."""

    corpus: Corpus
    max_len: int
    """Cut to so many tokens; 0 = not cut."""
    read: int
    """Tokens of a sentence that the encoder reads at most."""
    shared_V: npt.NDArray[np.int32] | None = None
    """The token that each token is read as, -1 = it is left out; None = all are read as they are."""

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
        packed = read_as(self.corpus.tokens(cells), self.shared_V)
        return truncate(*packed, self.max_len)

    def batch(self, cells: Ints, keys: tuple[int, int, Ints] | None = None) -> Batch:
        """Cells in the given order; `keys` = (seed, epoch, visits) adds dropout."""
        return pack_batch([self.tokens(cells)], cells, None if keys is None else rng.hashed(*keys))

    def lengths(self, cells: Ints) -> npt.NDArray[np.int32]:
        """Tokens that the encoder reads, at most."""
        return np.minimum(self.lengths_N[cells], min(self.max_len or self.read, self.read)).astype(np.int32)


def _sentences(encoder: Encoder, problem: Problem[SentenceSet], config: Config) -> _Sentences:
    """Sentences that a fine-tuning reads: with `classify.align`, another species is read as the one that trains."""
    shared_V = shared_tokens_of(problem)
    corpus = problem.train.x.corpus
    return _Sentences(corpus, longest_read(encoder, config.classify), encoder.sizes.max_positions, shared_V)


@dataclass(frozen=True, kw_only=True, eq=False)
class Tuned:
    """The result of a fine-tuning."""

    model: Classifier
    """With the weights of the chosen epoch."""
    epoch: int
    """The chosen epoch, counted from 1; 0 = the linear start."""
    history: list[dict[str, float]]
    """Per epoch: epoch, loss and accuracy on the validation cells, mean training loss."""
    share: float
    """Share of the encoder's vector in the linear start (`linear_start`); 0 = there was none."""
    warmup_steps: int
    num_steps: int
    sentences: _Sentences
    cells: Ints
    """Cells on which weights were trained (N,)."""
    labels: Ints
    """Their class ids (N,)."""
    micro_tokens: int
    """Most tokens of a forward pass on a GPU."""
    aligns: bool = False
    """Class scores of cells to predict are shifted to those of the training cells (`classify.align`)."""

    def predict(self, cells: Ints) -> Floats:
        """Class probabilities (M, C) of cells of the corpus; of a study without training cells they are shifted (`align_scores`)."""
        predicted_MC = probabilities(self.model, self.sentences, cells, self.micro_tokens)
        if not self.aligns:
            return predicted_MC
        own_NC = probabilities(self.model, self.sentences, self.cells, self.micro_tokens)
        return align_scores(predicted_MC, own_NC, self.labels)

    def notes(self) -> dict[str, Any]:
        """Plain facts that are stored beside the predictions."""
        return {
            "epoch": self.epoch,
            "share": self.share,
            "history": self.history,
            "warmup_steps": self.warmup_steps,
            "num_steps": self.num_steps,
        }


def finetune(
    encoder: Encoder, problem: Problem[SentenceSet], *, config: Config, context: Context, uri: str = "", identity: str = ""
) -> Tuned:  # fmt: skip
    """Train all weights (or the upper layers, or adapters) and a class head on the training cells (paper section 4.3).

    AdamW, linear warm-up to the peak rate, cosine to zero; batches grouped by length. Weights are those of the epoch with the
    lowest loss on the validation cells, which are not trained on. The published code selects on the test cells instead.

    With `classify.align` and `classify.warm_start`, another species is predicted by the linear start without further steps:
    validation cells are of the training species and cannot show whether steps help the other one.

    Args:
        encoder: Where to start; it is changed.
        problem: The cells.
        config: The whole config; `classify` has the recipe, `train` precision, weight decay, clip and schedule, `vocab` orthologs.
        context: This worker. In a group, every worker calls this function and gets the same model.
        uri: Folder of checkpoints; a killed training goes on from the latest one. Empty = none.
        identity: Fingerprint of the training; a checkpoint with another one is an error.
    """
    settings, seed = config.classify, problem.seed(1)
    model = Classifier(
        encoder, problem.num_classes, pooling=config.embed.pooling, cls=problem.train.x.corpus.cls, seed=seed,
        layer=settings.layer, gene_weights=settings.gene_weights,
    )  # fmt: skip
    model.freeze(settings.freeze_layers)
    if settings.lora_rank:
        lora.add_adapters(encoder, settings.lora_rank, settings.lora_alpha, seed=seed)
    model.freeze_unread()
    sentences = _sentences(encoder, problem, config)
    cells, labels = problem.learning.x.cells, problem.labels[~problem.is_validation]
    plan = BatchPlan(
        sentences.lengths(cells), np.zeros(len(cells), dtype=np.int8), [len(cells)], seed=seed,
        batch_cells=settings.batch_cells,
    )  # fmt: skip
    optimisation = _optimisation(config, plan)
    task = _loss_task(problem, sentences, plan, encoder=encoder, config=config, context=context)
    trains = not (settings.warm_start and sentences.shared_V is not None)
    if trains and optimisation.warmup_steps < settings.warmup_steps:
        warn(
            f"{problem.name}: {task.num_steps} steps, so the warm-up is {optimisation.warmup_steps} steps, not {settings.warmup_steps}"
        )

    def evaluate(model: Classifier, worker: Context) -> dict[str, float]:
        """Loss and accuracy on the validation cells; every worker predicts a part of them."""
        true, mine = problem.labels[problem.is_validation], slice(worker.rank, None, worker.world_size)
        p = probabilities(model, sentences, problem.validation.x.cells[mine], config.train.micro_tokens)
        found = np.zeros((2, len(true)))
        found[:, mine] = p[np.arange(len(p)), true[mine]], p.argmax(1) == true[mine]
        of_true, right = sum_over_workers(found, worker)
        return {"val_loss": float(-np.log(of_true.clip(1e-12)).mean()), "val_accuracy": float(right.mean())}

    start = start_linear(model, sentences, cells, labels, seed=seed) if settings.warm_start else None
    selection = Selection(evaluate, metric="val_loss", every=plan.steps_per_epoch, at_start=start is not None)
    if trains:
        rows = loop.fit(model, task, optimisation, context, uri=uri, identity=identity, selection=selection)
        selection.restore(model, uri)
    else:
        rows = [(0, 0, name, value) for name, value in evaluate(model.to(context.device), context).items()]
    lora.merge_adapters(encoder)
    return Tuned(
        model=model, epoch=selection.best_step // plan.steps_per_epoch,
        history=_epochs_of(rows, plan.steps_per_epoch, start), share=0.0 if start is None else start.share,
        warmup_steps=optimisation.warmup_steps, num_steps=task.num_steps, sentences=sentences, cells=cells, labels=labels,
        micro_tokens=config.train.micro_tokens, aligns=is_new_study(problem),
    )  # fmt: skip


def sum_over_workers(values: Floats, worker: Context) -> Floats:
    """Sum of an array over the workers; exact where all workers but one have zeros."""
    summed = torch.from_numpy(values).to(worker.device)
    worker.all_reduce(summed)
    return summed.cpu().numpy()


def _epochs_of(rows: list[MetricRow], steps: int, start: linear_start.Start | None) -> list[dict[str, float]]:
    """Loss and accuracy on the validation cells and mean training loss by epoch; epoch 0 is the linear start."""
    values = {(step, name): value for step, _, name, value in rows}
    out = []
    for step in sorted(step for step, name in values if name == "val_loss"):
        losses = [values[before, "loss"] for before in range(step - steps + 1, step + 1)] if step else []
        trained = float(torch.tensor(losses).mean()) if start is None or step else start.loss
        figures = {"loss": values[step, "val_loss"], "accuracy": values[step, "val_accuracy"]}
        out.append({"epoch": float(step // steps)} | figures | {"train_loss": trained})
    return out


def _loss_task(
    problem: Problem[SentenceSet], sentences: _Sentences, plan: BatchPlan, *, encoder: Encoder, config: Config, context: Context
) -> loop.LossTask[Classifier]:  # fmt: skip
    """Batches of the training cells in the order of `plan`, and their cross entropy."""
    settings, seed, num_classes = config.classify, problem.seed(1), problem.num_classes
    cells, labels = problem.learning.x.cells, problem.labels[~problem.is_validation]
    class_of = dict(zip(cells.tolist(), labels.tolist(), strict=True))
    lengths = sentences.lengths(cells)
    weights_C = torch.ones(num_classes)
    if settings.class_weights:
        counts = np.bincount(labels, minlength=num_classes)
        weights_C = torch.from_numpy(len(labels) / (num_classes * np.maximum(counts, 1))).float()
    weights_C = weights_C.to(context.device)

    def batches(step: int, rank: int, world_size: int) -> loop.BatchWork:
        share = plan.share(step, rank, world_size)
        runs = split_micro_batches(lengths[share.cells_B], config.train.micro_tokens)
        made = [sentences.batch(cells[share.cells_B[r]], (seed, share.epoch, share.visits_B[r])) for r in runs]
        flops = 3 * forward_flops(encoder.sizes, lengths[share.cells_B].tolist())
        return loop.BatchWork(made, share.batch_cells, share.epoch, flops)

    def loss(model: Classifier, batch: Batch) -> dict[str, Tensor]:
        target_B = torch.tensor([class_of[c] for c in batch.cells_B.tolist()], device=batch.ids_T.device)
        return {"loss": F.cross_entropy(model(batch).float(), target_B, weight=weights_C, reduction="none").sum()}

    return loop.LossTask(count_steps(settings, len(cells)), batches, loss, config.train.precision)


def count_steps(settings: Classify, num_cells: int) -> int:
    """Steps of a fine-tuning on so many cells: `classify.epochs`, or more to reach `classify.min_steps`."""
    steps_per_epoch = -(-num_cells // settings.batch_cells)
    return steps_per_epoch * max(settings.epochs, -(-settings.min_steps // steps_per_epoch))


def _optimisation(config: Config, plan: BatchPlan) -> Train:
    """Settings of the training loop; the warm-up is at most a quarter of the steps."""
    settings, num_steps = config.classify, count_steps(config.classify, plan.num_cells)
    return replace(
        config.train, epochs=num_steps // plan.steps_per_epoch, max_steps=0, batch_cells=settings.batch_cells,
        lr=settings.lr, warmup_steps=min(settings.warmup_steps, num_steps // 4), species_mix={},
        log_steps=1,
    )  # fmt: skip


def start_linear(
    model: Classifier, sentences: _Sentences, cells: Ints, labels: Ints, *, seed: int
) -> linear_start.Start:
    """Fit the class head to the untouched encoder by logistic regression (`linear_start`) and put it into the model."""
    vectors_ND = embed.embed_cells(
        model.encoder, sentences, cells, model.pooling, model.layer, max_len=sentences.max_len
    )
    genes_NV = (
        None if model.genes is None else linear_start.gene_rows(*sentences.tokens(cells), model.encoder.vocab_size)
    )
    # training cells cannot show how much of the encoder's vector helps for another species: the smallest share is taken
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


def longest_read(encoder: Encoder, settings: Classify) -> int:
    """Longest sentence that is read, in tokens; 0 = all.

    `classify.max_len`, and without weights of genes no more than the encoder has positions.
    """
    most = encoder.sizes.max_positions
    return settings.max_len if settings.gene_weights else min(settings.max_len or most, most)

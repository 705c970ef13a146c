"""Pretraining on a corpus (paper section 3.3): masked genes and contrast of two views (eq. 1 to 3 in `training.losses`).

`Pretraining` makes packed micro batches of a worker's share of a global batch, and computes losses and gradients. The
contrast needs all cells of the global batch, so gradients are cached (GradCache): first the cell vectors of all micro
batches are computed and gathered, then the loss and its gradient by vector, then each micro batch again with that
gradient. Dropout depends on keys alone, so both passes of a micro batch are equal. A single micro batch needs one pass.

Shapes: T packed tokens, B cells, C cells of the global batch, K masked positions, D width, W views.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mixgf import rng
from mixgf.config.run import Config
from mixgf.config.training import Objective
from mixgf.console import warn
from mixgf.corpus.held_out import HeldOut, held_out_cells
from mixgf.corpus.packed import Packed, token_positions
from mixgf.corpus.reader import Corpus
from mixgf.encoder import checkpoint
from mixgf.encoder.batch import Batch, pack_batch, split_micro_batches
from mixgf.encoder.bert import Encoder, MaskedModel, forward_flops, head_flops, pool_tokens, ranked_vectors
from mixgf.errors import UserError
from mixgf.genes import species
from mixgf.genes.vocabulary import NUM_SPECIALS
from mixgf.training import gene_vectors
from mixgf.training.batch_plan import I64, BatchPlan, DataSetPlan, WorkerShare, padding_ratios, shares_by_code
from mixgf.training.losses import (
    alignment,
    dimension_loss,
    masked_gene_loss,
    simcse_loss,
    total_loss,
    uniformity,
)
from mixgf.training.neighbours import Neighbours
from mixgf.training.views import (
    ReplacementGenes,
    Translator,
    gene_sides,
    genes_of_side,
    mask_genes,
    merge_query_positions,
    subsample_genes,
)
from mixgf.training.worker_group import Group, autocast


class ContrastModel(MaskedModel):
    """Encoder and masked-gene head with what only the contrastive loss needs: a projection head, and a learned temperature.

    Neither is part of a checkpoint.
    """

    def __init__(self, config: Config, vocab_size: int) -> None:
        super().__init__(config.model, vocab_size, seed=config.seed)
        o, dim = config.objective, config.model.dim
        generator = torch.Generator().manual_seed(config.seed + 2)
        self.log_temperature = nn.Parameter(torch.tensor(math.log(o.temperature))) if o.learn_temperature else None
        self.projection: nn.ParameterList | None = None
        if o.projection:
            shapes = ((o.projection, dim), (dim, o.projection))
            self.projection = nn.ParameterList(
                torch.randn(shape, generator=generator) / math.sqrt(shape[1]) for shape in shapes
            )

    def published(self) -> dict[str, Tensor]:
        """The parameters that a checkpoint holds, by name."""
        own = ("log_temperature", "projection.")
        return {name: p for name, p in super().published().items() if not name.startswith(own)}

    def project(self, z_BD: Tensor) -> Tensor:
        """Vectors that the contrastive loss compares, (B, D): two linear maps with a ReLU between, or the cell vectors."""
        if self.projection is None:
            return z_BD
        return F.linear(F.relu(F.linear(z_BD, self.projection[0])), self.projection[1])


def reads_neighbours(objective: Objective) -> bool:
    """Whether the training contrasts cells with their neighbours."""
    return objective.view == "neighbour" and (objective.contrast_weight > 0 or objective.simcsepp_weight > 0)


def predicts_genes(objective: Objective) -> bool:
    """Whether genes are masked and predicted: not where neighbours are contrasted and `objective.mlm_weight` is 0."""
    return objective.mlm_weight != 0 or not reads_neighbours(objective)


def blank_model(config: Config, vocab_size: int) -> MaskedModel:
    """The model that is trained, with random weights; only what the losses depend on requires gradients."""
    o = config.objective
    several = o.learn_temperature or o.projection > 0
    model = ContrastModel(config, vocab_size) if several else MaskedModel(config.model, vocab_size, seed=config.seed)
    if not predicts_genes(o):
        encoder = model.encoder
        idle: list[nn.Module | nn.Parameter] = [model.dense, model.norm, model.bias]
        if o.pooling == "ranked" and encoder.residual is None:
            idle += [encoder.norm, encoder.layers, encoder.positions]
        for part in idle:
            part.requires_grad_(False)
    if _residual_is_idle(config):
        assert model.encoder.residual is not None
        model.encoder.residual.requires_grad_(False)
    return model


def _residual_is_idle(config: Config) -> bool:
    """Whether the encoder has a residual (`model.residual`) that no loss depends on."""
    o = config.objective
    contrast = o.contrast_weight > 0 or o.simcsepp_weight > 0 or o.ortholog_weight > 0
    return config.model.residual and not (contrast and o.pooling == "ranked")


def start_tokens(config: Config, corpus: Corpus) -> Tensor | None:
    """Token vectors before training (V, D) by `model.start`; None = random ones. Special tokens stay random."""
    if config.model.start == "random" or config.inputs.start:
        return None
    pairs = species.orthologs(config.vocab.orthologs)
    found, _ = gene_vectors.start_tokens(
        config.inputs.gene_vectors, corpus.vocabulary, dim=config.model.dim, orthologs=pairs
    )
    tokens_VD = Encoder(config.model, corpus.vocabulary.size, seed=config.seed).tokens.detach().clone()
    tokens_VD[NUM_SPECIALS:] = torch.from_numpy(found[NUM_SPECIALS:])
    return tokens_VD


def initial_model(config: Config, corpus: Corpus) -> MaskedModel:
    """Model before the first step: weights by `model.start`, or those of the checkpoint `inputs.start`."""
    model = blank_model(config, corpus.vocabulary.size)
    tokens_VD = start_tokens(config, corpus)
    if tokens_VD is not None:
        with torch.no_grad():
            model.encoder.tokens.copy_(tokens_VD)
    if config.inputs.start:
        found, _ = checkpoint.load_model(config.inputs.start)
        missing, _ = model.load_state_dict(found.state_dict(), strict=False)
        assert not set(missing) & set(found.published()), missing
    return model


def _require_no_mix(config: Config) -> None:
    if config.train.species_mix:
        mix = dict(config.train.species_mix)
        msg = f"train.species_mix = {mix}: not with objective.view = 'neighbour', whose batches are of one data set; leave it empty"
        raise UserError(msg)


def _require_cells(config: Config, corpus: Corpus, trained: I64, held_out: HeldOut) -> None:
    """Raise a `UserError` unless there are cells to train on and cells that are held out."""
    if len(trained) == 0 or len(held_out.cells) == 0:
        msg = (
            f"train.heldout_share = {config.train.heldout_share:g}: leaves {len(trained):,} cells to train on and "
            f"{len(held_out.cells):,} held out of {corpus.num_cells:,}; choose another share, or 0"
        )
        raise UserError(msg)


class ContrastWatch:
    """Warns once when the contrast has nothing left to teach: its loss is less than `SPENT` of that of random vectors."""

    SPENT = 0.01

    def __init__(self, config: Config) -> None:
        self.chance = math.log(max(2, 2 * config.train.batch_cells - 1))
        self._view, self._warned = config.objective.view, False

    def __call__(self, step: int, figures: Mapping[str, float]) -> None:
        """Look at the figures of a logged step."""
        value = figures.get("contrast", math.inf)
        if self._warned or value >= self.SPENT * self.chance:
            return
        self._warned = True
        warn(
            f"pretrain: the contrast loss is {value:.2g} at step {step:,}, under {self.SPENT:.0%} of that of random vectors "
            f"({self.chance:.2g}). The views of a cell (objective.view={self._view}) are already nearest to each other, so the contrast "
            "hardly changes the encoder any more"
        )


TEMPERATURES = (0.01, 1.0)
"""Bounds of a learned temperature."""
_SUBSET = 0x50415254
"""Random key of the draw of `train.cells_share`."""


def subset_cells(num_cells: int, share: float) -> I64:
    """Cell numbers of a random share of the corpus, ascending, at least one; a larger share contains every smaller one."""
    draws_N = rng.uniform(np.arange(num_cells), after=_SUBSET)
    return np.sort(np.argsort(draws_N, kind="stable")[: max(1, round(share * num_cells))])


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Input of one forward pass: all views of some cells, packed view after view."""

    batch: Batch
    num_views: int
    masked_K: Tensor
    """Places that are scored, all in the first view: in the pack, or among the queries where there are some."""
    targets_K: Tensor
    slots_B: Tensor
    """Places of the cells in the global batch."""
    paired_B: Tensor
    """bool: which cells have an ortholog translation."""
    queries: tuple[Tensor, Tensor] | None = None
    """Tokens whose states the losses need, as in `Encoder.forward`; None = all."""
    firsts: Tensor | None = None
    """Index of each sentence's first token among the queries."""

    def to(self, device: torch.device) -> MicroBatch:
        """Micro batch on a device."""
        if device.type == "cpu":
            return self

        def move(x: Tensor) -> Tensor:
            return x.pin_memory().to(device, non_blocking=True)

        return MicroBatch(
            self.batch.to(device), self.num_views, move(self.masked_K), move(self.targets_K), move(self.slots_B),
            move(self.paired_B), None if self.queries is None else (move(self.queries[0]), move(self.queries[1])),
            None if self.firsts is None else move(self.firsts),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class PretrainingWork:
    """A worker's share of a global batch, as micro batches."""

    micros: list[MicroBatch]
    batch_cells: int
    epoch: int
    num_cells: int
    num_tokens: int
    """Tokens of the cells, counted once, not per view."""
    num_masked: int
    flops: float
    """FLOP of one forward and backward pass over all views."""


@dataclass(frozen=True, slots=True)
class Gathered:
    """What the losses of a micro batch need of the other cells of the global batch."""

    num_masked: Tensor
    """Masked positions of the global batch, at least 1."""
    grad_WCD: Tensor | None = None
    """Gradient of the losses on cell vectors by vector; None without such losses."""
    figures: dict[str, Tensor] = field(default_factory=dict)
    """This worker's part of the losses on cell vectors; `terms` is their weighted sum."""
    grad_log_temperature: Tensor | None = None
    """Gradient by the log temperature, per cell whose loss this worker computes; None where it is not trained."""


class Pretraining:
    """The paper's objective over a corpus, as a task of `loop.fit`.

    Args:
        config: the run's.
        corpus: the token corpus.
    """

    def __init__(self, config: Config, corpus: Corpus) -> None:
        self.config, self.corpus = config, corpus
        self.objective: Objective = config.objective
        mix = shares_by_code(config.train.species_mix, corpus.species)
        self.cells_N: I64 | None = None
        """The cells that are trained on; None = all."""
        self.held_out: HeldOut | None = None
        """The cells that are never trained on; None = there are none."""
        lengths_N, species_N, shard_rows = corpus.lengths_N, corpus.species_N, corpus.shard_rows
        if config.train.cells_share < 1:
            self.cells_N = subset_cells(corpus.num_cells, config.train.cells_share)
        if config.train.heldout_share > 0:
            self.held_out = held_out_cells(corpus, config.train.heldout_share)
            cells_N = np.arange(corpus.num_cells) if self.cells_N is None else self.cells_N
            self.cells_N = np.setdiff1d(cells_N, self.held_out.cells, assume_unique=True)
            _require_cells(config, corpus, self.cells_N, self.held_out)
        if self.cells_N is not None:
            lengths_N, species_N = lengths_N[self.cells_N], species_N[self.cells_N]
            shard_rows = np.diff(np.searchsorted(self.cells_N, corpus.starts))
        self.neighbours: Neighbours | None = None
        self.plan: BatchPlan | DataSetPlan
        size = config.train.batch_cells
        if reads_neighbours(config.objective):
            _require_no_mix(config)  # before neighbours are made, too
        if reads_neighbours(config.objective) and config.inputs.neighbours:
            allowed_C = None if self.cells_N is None else np.isin(np.arange(corpus.num_cells), self.cells_N)
            self.neighbours = Neighbours(config.inputs.neighbours, corpus, allowed_C)
            groups_N = self.neighbours.groups_C if self.cells_N is None else self.neighbours.groups_C[self.cells_N]
            self.plan = DataSetPlan(lengths_N, species_N, shard_rows, groups_N, seed=config.seed, batch_cells=size)
        else:
            self.plan = BatchPlan(lengths_N, species_N, shard_rows, seed=config.seed, batch_cells=size, species_mix=mix)
        self.num_steps = self.plan.steps_per_epoch * config.train.epochs
        if config.train.max_steps:
            self.num_steps = min(self.num_steps, config.train.max_steps)
        self.steps_per_epoch = self.plan.steps_per_epoch
        self.replacements = ReplacementGenes.by_species(
            [corpus.vocabulary.species_tokens(name) for name in corpus.species]
        )
        o = config.objective
        self.views = ["input"]
        if o.contrast_weight > 0 or o.simcsepp_weight > 0:
            self.views.append(o.view)
        if o.ortholog_weight > 0 and "ortholog" not in self.views:
            self.views.append("ortholog")
        self.masks = predicts_genes(o)
        """Whether genes are masked and predicted."""
        self.last_layer_at_queries = len(self.views) == 1 or o.pooling in ("first", "cls")
        """Whether the losses need only masked and first tokens: not if cell vectors are means over all tokens."""
        self.reads_layers = self.masks or o.pooling != "ranked" or config.model.residual
        """Whether the losses need hidden states, and not token vectors alone."""
        self.translate: Translator | None = None
        if "ortholog" in self.views:
            self.translate = Translator(corpus.vocabulary, species.orthologs(config.vocab.orthologs))

    def is_short(self, step: int) -> bool:
        """Whether a batch has less than half of the usual cells: losses on cell vectors depend on their number."""
        usual = min(self.plan.batch_cells, self.plan.num_cells)
        rest = self.plan.num_cells - (self.steps_per_epoch - 1) * self.plan.batch_cells
        return (step + 1) % self.steps_per_epoch == 0 and 2 * rest < usual

    def facts(self) -> dict[str, float]:
        """Estimates before training, from a sample of the cells.

        `gflop_per_cell` (forward and backward, all views), `tokens_per_cell`, and `padding_random` and `padding_grouped`
        (see `padding_ratios`).
        """
        lengths = self.corpus.lengths_N[:: max(1, self.corpus.num_cells // 10_000)]
        sizes, o, mean = self.config.model, self.objective, float(lengths.mean())
        flops = 3 * head_flops(sizes, self.corpus.vocabulary.size, mean * o.mlm_fraction) if self.masks else 0.0
        flops += 0.0 if self.reads_layers else 6 * mean * sizes.dim
        for view in self.views if self.reads_layers else ():
            needed = lengths * o.mlm_fraction + 1 if view == "input" else np.ones_like(lengths)
            queries = needed if self.last_layer_at_queries else None
            flops += 3 * forward_flops(sizes, lengths, queries=queries) / len(lengths)
        padded = padding_ratios(lengths, self.config.train.batch_cells)
        return {"gflop_per_cell": flops / 1e9, "tokens_per_cell": mean} | {f"padding_{k}": v for k, v in padded.items()}

    def unseen_ids(self, ids: I64) -> I64:
        """The given ids that occur in no sentence of the training; reads sentences of their species until all are found."""
        if not len(ids):
            return ids
        corpus = self.corpus
        codes = [
            i for i, name in enumerate(corpus.species) if np.isin(ids, corpus.vocabulary.species_tokens(name)).any()
        ]
        whole = self.num_steps >= self.steps_per_epoch and isinstance(self.plan, BatchPlan)
        whole = whole and not self.config.train.species_mix
        visits = [] if whole else [self.plan.batch(step) % self.plan.num_cells for step in range(self.num_steps)]
        cells_N = np.arange(self.plan.num_cells) if whole else np.unique(np.concatenate(visits))
        cells_N = cells_N if self.cells_N is None else self.cells_N[cells_N]
        cells_N = cells_N[np.isin(corpus.species_N[cells_N], codes)]
        for start in range(0, len(cells_N), 1024):
            if not len(ids):
                break
            ids = np.setdiff1d(ids, corpus.tokens(cells_N[start : start + 1024])[0])
        return ids

    def work(self, step: int, rank: int, world_size: int) -> PretrainingWork:
        """Micro batches of one worker's share of a step."""
        share = self.plan.share(step, rank, world_size)
        if self.cells_N is not None:
            share = replace(share, cells_B=self.cells_N[share.cells_B])
        sentences = self.corpus.tokens(share.cells_B)
        lengths = self.corpus.lengths_N[share.cells_B]
        micros, flops, masked = [], 0.0, 0
        sizes, key = self.config.model, (self.config.seed, share.epoch)
        others = self._neighbours_of(share, key)
        for part in split_micro_batches(lengths * len(self.views), self.config.train.micro_tokens):
            micro, view_lengths, queries = self._micro_batch(share, sentences, part, self.views, key, others)
            micros.append(micro)
            masked += len(micro.targets_K)
            if self.reads_layers:
                flops += 3 * forward_flops(sizes, view_lengths, queries=queries)
            else:
                flops += 6.0 * float(view_lengths.sum()) * sizes.dim
        flops += 3 * head_flops(sizes, self.corpus.vocabulary.size, masked)
        cells, tokens = len(share.cells_B), int(sentences[1][-1])
        return PretrainingWork(micros, share.batch_cells, share.epoch, cells, tokens, masked, flops)

    def evaluation_batches(self, cells_B: I64, views: list[str], key: tuple[int, int]) -> list[MicroBatch]:
        """Micro batches of some cells outside of training; a single view has no dropout.

        Args:
            cells_B: Cells of the corpus; their slots are 0 to B - 1.
            views: The first views of a training step.
            key: Random key of masks, views and dropout.
        """
        share = WorkerShare(0, 0, cells_B, cells_B, np.arange(len(cells_B)), len(cells_B))
        sentences, lengths = self.corpus.tokens(cells_B), self.corpus.lengths_N[cells_B]
        parts = split_micro_batches(lengths * len(views), self.config.train.micro_tokens)
        others = self._neighbours_of(share, key) if len(views) > 1 else None
        micros = [self._micro_batch(share, sentences, part, views, key, others)[0] for part in parts]
        if len(views) > 1:
            return micros
        return [replace(micro, batch=replace(micro.batch, keys_T=None)) for micro in micros]

    def _neighbours_of(self, share: WorkerShare, key: tuple[int, int]) -> Packed | None:
        """Sentences of a neighbour of each cell; None where neighbours are not contrasted."""
        if self.neighbours is None:
            return None
        drawn_B = self.neighbours.draw(share.cells_B, rng.hashed(share.visits_B, after=rng.of_numbers(*key)))
        return self.corpus.tokens(drawn_B)

    def _micro_batch(  # noqa: PLR0917 (a step's cells, views and keys)
        self,
        share: WorkerShare,
        sentences: Packed,
        part: slice,
        views: list[str],
        key: tuple[int, int],
        others: Packed | None = None,
    ) -> tuple[MicroBatch, I64, I64 | None]:
        few = _cells_of(sentences, part)
        visits, cells = share.visits_B[part], share.cells_B[part]
        codes = self.corpus.species_N[cells]
        fraction = self.objective.mlm_fraction
        positions: list[I64] | None = None
        if others is not None:
            side_V = gene_sides(self.corpus.vocabulary.size, (*key, share.step))
            few, own = genes_of_side(few, side_V)
            theirs, other = genes_of_side(_cells_of(others, part), ~side_V)
            positions = [own, other]
        inputs, at, targets = few[0], np.empty(0, np.int64), np.empty(0, np.int64)
        if self.masks:
            inputs, at, targets = mask_genes(few, visits, codes, self.replacements, fraction=fraction, key=(*key, 0))
        packs: list[Packed] = []
        paired = np.zeros(len(cells), dtype=np.bool_)
        for number, name in enumerate(views):
            if name in ("input", "dropout"):
                packs.append((inputs, few[1]))
            elif name == "mask":
                packs.append(
                    (
                        mask_genes(few, visits, codes, self.replacements, fraction=fraction, key=(*key, number))[0],
                        few[1],
                    )
                )
            elif name == "neighbour":
                assert others is not None, "neighbours are made before a training (inputs.neighbours)"
                packs.append(theirs)
            elif name == "subsample":
                packs.append(
                    subsample_genes((inputs, few[1]), visits, self.objective.subsample_fraction, (*key, number))
                )
            else:
                assert self.translate is not None
                translated, paired = self.translate(few, visits, codes, (*key, number))
                packs.append(translated)
                if positions is not None:
                    positions.append(token_positions(translated[1]))
        num_views, keys = len(views), None
        if self.config.model.dropout > 0 or self.config.model.attention_dropout > 0:
            keys = rng.hashed(visits, after=rng.of_numbers(*key))
        batch = pack_batch(packs, cells, keys, positions=positions)
        all_offsets = batch.offsets_B1.numpy()
        lengths = all_offsets[1:] - all_offsets[:-1]
        queries: tuple[Tensor, Tensor] | None = None
        firsts, counts, masked = None, None, at
        if self.last_layer_at_queries:
            begins = all_offsets[:-1] if num_views > 1 else all_offsets[:0]
            places, masked, begun, bounds = merge_query_positions(at, begins, all_offsets)
            firsts, counts = torch.from_numpy(begun), bounds[1:] - bounds[:-1]
            queries = (torch.from_numpy(places), torch.from_numpy(bounds))
        micro = MicroBatch(
            batch, num_views, torch.from_numpy(masked), torch.from_numpy(targets), torch.from_numpy(share.slots_B[part]),
            torch.from_numpy(paired), queries, firsts,
        )  # fmt: skip
        return micro, lengths, counts

    @staticmethod
    def micro_batches(work: PretrainingWork, device: torch.device) -> list[MicroBatch]:
        """Micro batches of a share, on the device."""
        return [micro.to(device) for micro in work.micros]

    @staticmethod
    def is_empty(micro: MicroBatch) -> bool:
        """Whether the losses need no token of the micro batch: no cells, or no masked genes where only these matter."""
        return micro.batch.num_cells == 0 or (micro.queries is not None and len(micro.queries[0]) == 0)

    def forward(self, model: MaskedModel, micro: MicroBatch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Sum of -log P(true gene) over the masked positions; cell vectors (W, B, D) if there is a contrast; log temperature if it is trained."""
        h = self.hidden(model, micro) if self.reads_layers else None
        masked_genes = torch.zeros((), device=micro.slots_B.device)
        if self.masks:
            assert h is not None
            with autocast(h.device, self.config.train.precision):
                masked_genes = model.loss(h[micro.masked_K], micro.targets_K)
        log_temperature = model.log_temperature if isinstance(model, ContrastModel) else None
        return masked_genes, self.vectors(model, h, micro) if len(self.views) > 1 else None, log_temperature

    def gather(
        self, model: MaskedModel, work: PretrainingWork, micros: list[MicroBatch], group: Group,
        outputs: tuple[Tensor, Tensor | None, Tensor | None] | None,
    ) -> Gathered:  # fmt: skip
        """Count the masked genes of the global batch; compute the losses on its cell vectors and their gradients.

        `outputs` are those of `forward` where there is a single micro batch. Else the cell vectors are computed here, without
        gradients (the first pass of GradCache).
        """
        masked = torch.tensor([float(work.num_masked)], device=group.device)
        group.all_reduce(masked)
        masked.clamp_(min=1.0)
        if len(self.views) == 1:
            return Gathered(masked[0])
        if outputs is not None:
            assert outputs[1] is not None
            vectors = [outputs[1].detach()]
        else:
            with torch.no_grad():
                vectors = [
                    self.vectors(model, self.hidden(model, micro) if self.reads_layers else None, micro)
                    for micro in micros
                ]
        log_temperature = model.log_temperature if isinstance(model, ContrastModel) else None
        return self._contrast(vectors, micros, work.batch_cells, group, log_temperature, masked[0])

    def loss(
        self,
        outputs: tuple[Tensor, Tensor | None, Tensor | None],
        micro: MicroBatch,
        work: PretrainingWork,
        gathered: Gathered,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """A scalar whose gradient is the micro batch's part of the gradient of the losses, and its masked-gene loss."""
        mlm = masked_gene_loss(outputs[0], gathered.num_masked)
        surrogate = self.objective.mlm_weight * mlm
        if outputs[2] is not None and gathered.grad_log_temperature is not None:
            surrogate = surrogate + outputs[2] * gathered.grad_log_temperature * len(micro.slots_B)
        if gathered.grad_WCD is not None:
            assert outputs[1] is not None
            surrogate = surrogate + (outputs[1] * gathered.grad_WCD[:, micro.slots_B]).sum()
        return surrogate, {"mlm": mlm.detach()} if self.masks else {}

    def metrics(self, sums: dict[str, Tensor], gathered: Gathered) -> dict[str, Tensor]:
        """All losses of this worker; their sums over the workers are the global ones."""
        figures = dict(gathered.figures)
        masked_gene = sums.get("mlm", torch.zeros((), device=gathered.num_masked.device))
        on_vectors = figures.pop("terms", torch.zeros_like(masked_gene))
        if not self.masks:
            return {"loss": on_vectors, **figures}
        loss = total_loss(masked_gene, on_vectors, masked_gene_weight=self.objective.mlm_weight)
        return {"loss": loss, "mlm": masked_gene, **figures}

    def hidden(self, model: MaskedModel, micro: MicroBatch) -> Tensor:
        """Hidden states of all tokens (T, D), or of the queries of the micro batch."""
        b = micro.batch
        if b.num_cells == 0:  # a worker of a batch with fewer cells than workers
            return model.encoder.tokens.new_zeros((0, model.encoder.sizes.dim))
        with autocast(b.ids_T.device, self.config.train.precision):
            return model(
                b.ids_T, b.offsets_B1, positions_T=b.positions_T, keys=b.keys_T, max_len=b.max_len, queries=micro.queries
            )  # fmt: skip

    def vectors(self, model: MaskedModel, h_TD: Tensor | None, micro: MicroBatch) -> Tensor:
        """What the contrast compares of each view, float32 (W, B, D): cell vectors, or their projections.

        `h_TD` are the hidden states; None where the losses read token vectors alone.
        """
        b, encoder = micro.batch, model.encoder
        if b.num_cells == 0:
            return encoder.tokens.new_zeros((micro.num_views, 0, encoder.sizes.dim), dtype=torch.float32)
        if self.objective.pooling == "ranked":
            residual_TD = None if encoder.residual is None else h_TD
            z = ranked_vectors(encoder, b.ids_T, b.offsets_B1, b.positions_T, residual_TD, cls=self.corpus.cls)
        elif micro.firsts is not None:
            assert h_TD is not None
            z = h_TD.index_select(0, micro.firsts).float()
        else:
            assert h_TD is not None
            z = pool_tokens(h_TD, b.offsets_B1, self.objective.pooling, cls=self.corpus.cls).float()
        if isinstance(model, ContrastModel):
            z = model.project(z)
        return z.view(micro.num_views, -1, z.shape[1])

    def _contrast(  # noqa: PLR0917 (what `gather` knows)
        self,
        vectors: list[Tensor],
        micros: list[MicroBatch],
        batch_cells: int,
        group: Group,
        log_temperature: Tensor | None,
        num_masked: Tensor,
    ) -> Gathered:
        """Losses on cell vectors: their gradient by vector (W, C, D) and by temperature, and their values.

        With `gather_negatives` every worker computes the loss of the whole global batch from the gathered vectors. Its
        gradient for its own cells is then complete, and the order of cells does not depend on the number of workers.
        """
        o, dim = self.objective, vectors[0].shape[2]
        z_WCD = torch.zeros(len(self.views), batch_cells, dim, device=group.device)
        paired_C = torch.zeros(batch_cells, device=group.device)
        mine = torch.cat([micro.slots_B for micro in micros])
        z_WCD[:, mine] = torch.cat(vectors, dim=1)
        paired_C[mine] = torch.cat([micro.paired_B for micro in micros]).float()
        share = 1.0 if group.rank == 0 else 0.0  # of the metrics: every worker has the same values
        if o.gather_negatives:
            group.all_reduce(z_WCD)
            group.all_reduce(paired_C)
            rows, scale = torch.arange(batch_cells, device=group.device), 1.0
        else:
            rows, scale = mine, len(mine) / batch_cells
            share = scale
        leaf = z_WCD.requires_grad_()
        a, has_cells = leaf[0, rows], len(leaf[0, rows]) > 0
        log_t = None if log_temperature is None else log_temperature.detach().clone().requires_grad_()
        temperature = o.temperature if log_t is None else log_t.exp().clamp(*TEMPERATURES)
        zero = torch.zeros((), device=group.device)
        total, figures = zero, {}
        if o.contrast_weight > 0:
            one, b = self.centred(a, leaf[1, rows])
            figures["contrast"] = simcse_loss(one, b, temperature) if has_cells else zero
            total = total + o.contrast_weight * figures["contrast"]
            figures["alignment"] = alignment(one, b) if has_cells else zero
            figures["uniformity"] = uniformity(one)
        if o.simcsepp_weight > 0:
            figures["simcsepp"] = dimension_loss(a, leaf[1, rows], o.simcsepp_temperature)
            total = total + o.simcsepp_weight * figures["simcsepp"]
        if o.ortholog_weight > 0:
            pairs = paired_C[rows] > 0
            other = leaf[self.views.index("ortholog"), rows]
            figures["ortholog"] = simcse_loss(a[pairs], other[pairs], o.temperature) if pairs.any() else zero
            total = total + o.ortholog_weight * figures["ortholog"]
        grad, grad_t = torch.zeros_like(z_WCD), None
        if log_t is not None:
            figures["temperature"] = torch.as_tensor(temperature)
            grad_t = torch.zeros_like(log_t)
        if total.requires_grad:
            leaves = [leaf] if log_t is None else [leaf, log_t]
            grad, *more = torch.autograd.grad(total * scale, leaves, allow_unused=True, materialize_grads=True)
            grad_t = more[0] / max(1, len(rows)) if more else None
        figures["terms"] = total
        shown = {name: value.detach() * share for name, value in figures.items()}
        return Gathered(num_masked, grad, shown, grad_t)

    def centred(self, a_BD: Tensor, b_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Both views without their means over the batch, if neighbours are contrasted; else as they are."""
        if self.neighbours is None or len(a_BD) == 0:
            return a_BD, b_BD
        return a_BD - a_BD.mean(0), b_BD - b_BD.mean(0)


def _cells_of(sentences: Packed, part: slice) -> Packed:
    """Some consecutive cells of packed sentences."""
    tokens, offsets = sentences
    span = offsets[part.start : part.stop + 1]
    return tokens[span[0] : span[-1]], span - span[0]

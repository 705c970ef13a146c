"""What pretraining minimises: masked genes, contrast of two views of a cell, orthologs (paper eq. 1 to 3, spec section 6).

`Pretraining` turns a share of a global batch into packed micro batches and computes losses and gradients. The contrast is
gradient-cached: cell vectors of the whole global batch are gathered first, the loss and its gradient by vector follow,
then every micro batch is run with that gradient. Dropout is keyed, so the second run of a micro batch equals the first.

Shapes: T packed tokens, B cells, C cells of the global batch, K masked positions, D width, W views.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mixgf import rng
from mixgf.config.run import Config
from mixgf.config.training import Objective
from mixgf.corpus.packed import Packed
from mixgf.corpus.reader import Corpus
from mixgf.encoder import checkpoint
from mixgf.encoder.batch import Batch, pack_batch, split_micro_batches
from mixgf.encoder.bert import MaskedModel, forward_flops, head_flops, pool_tokens
from mixgf.genes import species
from mixgf.training.batch_plan import I64, Plan, Share, packing, shares_by_code
from mixgf.training.context import Group, autocast
from mixgf.training.losses import alignment, dimension_contrast, nt_xent, uniformity
from mixgf.training.views import Pools, Translator, looked_at, mask, subsample_genes


def first_model(config: Config, corpus: Corpus) -> MaskedModel:
    """The model before its first step: random weights, or those of `inputs.start`."""
    model = MaskedModel(config.model, corpus.vocabulary.size, seed=config.seed)
    if config.inputs.start:
        found, _ = checkpoint.load_model(config.inputs.start)
        model.load_state_dict(found.state_dict())
    return model


_PART = 0x50415254
"""Key of the draw of `train.cells_share`, apart from all other draws."""


# the pretraining task


def part_of(num_cells: int, share: float) -> I64:
    """Cell numbers of a keyed share of the corpus, ascending, at least one; every smaller share is part of every larger one."""
    draws_N = rng.uniform(np.arange(num_cells), after=_PART)
    return np.sort(np.argsort(draws_N, kind="stable")[: max(1, round(share * num_cells))])


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward pass of one worker: all views of some cells, packed view after view."""

    batch: Batch
    num_views: int
    masked_K: Tensor
    """Places that are scored, all in the first view: in the pack, or among the queries where there are some."""
    targets_K: Tensor
    slots_B: Tensor
    """Places of the cells in the global batch."""
    paired_B: Tensor
    """Which cells have an ortholog translation."""
    queries: tuple[Tensor, Tensor] | None = None
    """The tokens that the losses look at, as `Encoder.forward` takes them; None = all."""
    firsts: Tensor | None = None
    """Place of every sentence's first token among the queries."""

    def to(self, device: torch.device) -> MicroBatch:
        """The same on a device."""
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
class Work:
    """A worker's share of a global batch, ready to run."""

    micros: list[MicroBatch]
    batch_cells: int
    epoch: int
    num_cells: int
    num_tokens: int
    """Tokens of the cells, each counted once however many views it has."""
    num_masked: int
    flops: float
    """Needed floating point operations, forward and backward."""


class Pretraining:
    """The paper's objective over a corpus, as a task of `train.fit`.

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
        lengths_N, species_N, shard_rows = corpus.lengths_N, corpus.species_N, corpus.shard_rows
        if config.train.cells_share < 1:
            self.cells_N = part_of(corpus.num_cells, config.train.cells_share)
            lengths_N, species_N = lengths_N[self.cells_N], species_N[self.cells_N]
            shard_rows = np.diff(np.searchsorted(self.cells_N, corpus.starts))
        self.plan = Plan(
            lengths_N, species_N, shard_rows, seed=config.seed, batch_cells=config.train.batch_cells, species_mix=mix,
        )  # fmt: skip
        self.num_steps = self.plan.steps_per_epoch * config.train.epochs
        if config.train.max_steps:
            self.num_steps = min(self.num_steps, config.train.max_steps)
        self.steps_per_epoch = self.plan.steps_per_epoch
        self.pools = Pools.of([corpus.vocabulary.species_tokens(name) for name in corpus.species])
        o = config.objective
        self.views = ["input"]
        if o.contrast_weight > 0 or o.simcsepp_weight > 0:
            self.views.append(o.view)
        if o.ortholog_weight > 0 and "ortholog" not in self.views:
            self.views.append("ortholog")
        self.last_layer_at_queries = len(self.views) == 1 or o.pooling in ("first", "cls")
        """Masked tokens and first tokens are all that the losses look at, unless cells are means over all tokens."""
        self.translate: Translator | None = None
        if "ortholog" in self.views:
            self.translate = Translator(corpus.vocabulary, species.orthologs(config.vocab.orthologs))

    def facts(self) -> dict[str, float]:
        """What is known before the start, from a sample of the cells.

        `gflop_per_cell` (needed, forward and backward, all views), `tokens_per_cell`, and what padding would compute beside:
        tokens by token that is there, for batches in random order and grouped by length. Packed batches compute 1.
        """
        lengths = self.corpus.lengths_N[:: max(1, self.corpus.num_cells // 10_000)]
        row, o, mean = self.config.model, self.objective, float(lengths.mean())
        flops = 3 * head_flops(row, self.corpus.vocabulary.size, mean * o.mlm_fraction)
        for view in self.views:
            asked = lengths * o.mlm_fraction + 1 if view == "input" else np.ones_like(lengths)
            queries = asked if self.last_layer_at_queries else None
            flops += 3 * forward_flops(row, lengths, queries=queries) / len(lengths)
        padded = packing(lengths, self.config.train.batch_cells)
        return {"gflop_per_cell": flops / 1e9, "tokens_per_cell": mean} | {f"padding_{k}": v for k, v in padded.items()}

    def never_seen(self, ids: I64) -> I64:
        """Of the given ids those that no sentence of the training holds; reads the cells of their species until all are found."""
        if not len(ids):
            return ids
        corpus = self.corpus
        codes = [
            i for i, name in enumerate(corpus.species) if np.isin(ids, corpus.vocabulary.species_tokens(name)).any()
        ]
        whole = self.num_steps >= self.steps_per_epoch and not self.config.train.species_mix
        visits = [] if whole else [self.plan.batch(step) % self.plan.num_cells for step in range(self.num_steps)]
        cells_N = np.arange(self.plan.num_cells) if whole else np.unique(np.concatenate(visits))
        cells_N = cells_N if self.cells_N is None else self.cells_N[cells_N]
        cells_N = cells_N[np.isin(corpus.species_N[cells_N], codes)]
        for start in range(0, len(cells_N), 1024):
            if not len(ids):
                break
            ids = np.setdiff1d(ids, corpus.tokens(cells_N[start : start + 1024])[0])
        return ids

    def work(self, step: int, rank: int, world_size: int) -> Work:
        """One worker's share of a step, collated."""
        share = self.plan.share(step, rank, world_size)
        if self.cells_N is not None:
            share = replace(share, cells_B=self.cells_N[share.cells_B])
        sentences = self.corpus.tokens(share.cells_B)
        lengths = self.corpus.lengths_N[share.cells_B]
        micros, flops, masked = [], 0.0, 0
        row = self.config.model
        for part in split_micro_batches(lengths * len(self.views), self.config.train.micro_tokens):
            micro, view_lengths, queries = self._micro(share, sentences, part)
            micros.append(micro)
            masked += len(micro.targets_K)
            flops += 3 * forward_flops(row, view_lengths, queries=queries)
        flops += 3 * head_flops(row, self.corpus.vocabulary.size, masked)
        cells, tokens = len(share.cells_B), int(sentences[1][-1])
        return Work(micros, share.batch_cells, share.epoch, cells, tokens, masked, flops)

    def _micro(self, share: Share, sentences: Packed, part: slice) -> tuple[MicroBatch, I64, I64 | None]:
        tokens, offsets = sentences
        span = offsets[part.start : part.stop + 1]
        few: Packed = (tokens[span[0] : span[-1]], span - span[0])
        visits, cells = share.visits_B[part], share.cells_B[part]
        codes = self.corpus.species_N[cells]
        key, fraction = (self.config.seed, share.epoch), self.objective.mlm_fraction
        inputs, at, targets = mask(few, visits, codes, self.pools, fraction=fraction, key=(*key, 0))
        packs: list[Packed] = []
        paired = np.zeros(len(cells), dtype=np.bool_)
        for number, name in enumerate(self.views):
            if name in ("input", "dropout"):
                packs.append((inputs, few[1]))
            elif name == "mask":
                packs.append((mask(few, visits, codes, self.pools, fraction=fraction, key=(*key, number))[0], few[1]))
            elif name == "subsample":
                packs.append(
                    subsample_genes((inputs, few[1]), visits, self.objective.subsample_fraction, (*key, number))
                )
            else:
                assert self.translate is not None
                translated, paired = self.translate(few, visits, codes, (*key, number))
                packs.append(translated)
        num_views, keys = len(self.views), None
        if self.config.model.dropout > 0 or self.config.model.attention_dropout > 0:
            keys = rng.hashed(visits, after=rng.of_numbers(*key))
        batch = pack_batch(packs, cells, keys)
        all_offsets = batch.offsets_B1.numpy()
        lengths = all_offsets[1:] - all_offsets[:-1]
        asked: tuple[Tensor, Tensor] | None = None
        firsts, counts, masked = None, None, at
        if self.last_layer_at_queries:
            begins = all_offsets[:-1] if num_views > 1 else all_offsets[:0]
            places, masked, begun, bounds = looked_at(at, begins, all_offsets)
            firsts, counts = torch.from_numpy(begun), bounds[1:] - bounds[:-1]
            asked = (torch.from_numpy(places), torch.from_numpy(bounds))
        micro = MicroBatch(
            batch, num_views, torch.from_numpy(masked), torch.from_numpy(targets), torch.from_numpy(share.slots_B[part]),
            torch.from_numpy(paired), asked, firsts,
        )  # fmt: skip
        return micro, lengths, counts

    def backward(self, model: MaskedModel, work: Work, group: Group) -> dict[str, Tensor]:
        """Add this share's gradients to the model's; returns figures whose sums over the workers are the global ones."""
        o, device = self.objective, group.device
        masked = torch.tensor([float(work.num_masked)], device=device)
        group.all_reduce(masked)
        masked.clamp_(min=1.0)
        micros = [micro.to(device) for micro in work.micros]
        contrast = len(self.views) > 1
        hidden = [self._hidden(model, micros[0])] if len(micros) == 1 else None
        grad_WCD: Tensor | None = None
        figures: dict[str, Tensor] = {}
        if contrast:
            vectors = []
            for i, micro in enumerate(micros):
                if hidden is not None:
                    h = hidden[i].detach()
                else:
                    with torch.no_grad():
                        h = self._hidden(model, micro)
                vectors.append(self._vectors(h, micro))
            grad_WCD, figures = self._contrast(vectors, micros, work.batch_cells, group)
        total = torch.zeros((), device=device)
        for i, micro in enumerate(micros):
            if micro.batch.num_cells == 0:
                continue
            h = hidden[i] if hidden is not None else self._hidden(model, micro)
            with autocast(device, self.config.train.precision):
                mlm = model.loss(h[micro.masked_K], micro.targets_K) / masked[0]
            total = total + mlm.detach()
            surrogate = o.mlm_weight * mlm
            if grad_WCD is not None:
                surrogate = surrogate + (self._vectors(h, micro) * grad_WCD[:, micro.slots_B]).sum()
            surrogate.backward()  # type: ignore[no-untyped-call]
        loss = o.mlm_weight * total + figures.pop("terms", torch.zeros((), device=device))
        return {"loss": loss, "mlm": total, **figures}

    def _hidden(self, model: MaskedModel, micro: MicroBatch) -> Tensor:
        b = micro.batch
        if b.num_cells == 0:  # a worker of a batch with fewer cells than workers
            return model.encoder.tokens.new_zeros((0, model.encoder.sizes.dim))
        with autocast(b.ids_T.device, self.config.train.precision):
            return model(
                b.ids_T, b.offsets_B1, positions_T=b.positions_T, keys=b.keys_T, max_len=b.max_len, queries=micro.queries
            )  # fmt: skip

    def _vectors(self, h_TD: Tensor, micro: MicroBatch) -> Tensor:
        """Cell vectors by view, float32 (W, B, D)."""
        if micro.batch.num_cells == 0:
            return h_TD.new_zeros((micro.num_views, 0, h_TD.shape[1]), dtype=torch.float32)
        if micro.firsts is not None:
            z = h_TD.index_select(0, micro.firsts).float()
        else:
            z = pool_tokens(h_TD, micro.batch.offsets_B1, self.objective.pooling, cls=self.corpus.cls).float()
        return z.view(micro.num_views, -1, z.shape[1])

    def _contrast(
        self, vectors: list[Tensor], micros: list[MicroBatch], batch_cells: int, group: Group
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Gradient by cell vector (W, C, D) of all terms on vectors, and their figures.

        Every worker computes the loss of the whole global batch from the gathered vectors, so its gradient for its own
        cells is complete, and the order of cells does not depend on the number of workers.
        """
        o, dim = self.objective, vectors[0].shape[2]
        z_WCD = torch.zeros(len(self.views), batch_cells, dim, device=group.device)
        paired_C = torch.zeros(batch_cells, device=group.device)
        mine = torch.cat([micro.slots_B for micro in micros])
        z_WCD[:, mine] = torch.cat(vectors, dim=1)
        paired_C[mine] = torch.cat([micro.paired_B for micro in micros]).float()
        share = 1.0 if group.rank == 0 else 0.0  # of the figures: every worker has all of them
        if o.gather_negatives:
            group.all_reduce(z_WCD)
            group.all_reduce(paired_C)
            rows, scale = torch.arange(batch_cells, device=group.device), 1.0
        else:
            rows, scale = mine, len(mine) / batch_cells
            share = scale
        leaf = z_WCD.requires_grad_()
        a, has_cells = leaf[0, rows], len(leaf[0, rows]) > 0
        zero = torch.zeros((), device=group.device)
        total, figures = zero, {}
        if o.contrast_weight > 0:
            b = leaf[1, rows]
            figures["contrast"] = nt_xent(a, b, o.temperature) if has_cells else zero
            total = total + o.contrast_weight * figures["contrast"]
            figures["alignment"] = alignment(a, b) if has_cells else zero
            figures["uniformity"] = uniformity(a)
        if o.simcsepp_weight > 0:
            figures["simcsepp"] = dimension_contrast(a, leaf[1, rows], o.simcsepp_temperature)
            total = total + o.simcsepp_weight * figures["simcsepp"]
        if o.ortholog_weight > 0:
            pairs = paired_C[rows] > 0
            other = leaf[self.views.index("ortholog"), rows]
            figures["ortholog"] = nt_xent(a[pairs], other[pairs], o.temperature) if pairs.any() else zero
            total = total + o.ortholog_weight * figures["ortholog"]
        grad = torch.zeros_like(z_WCD)
        if total.requires_grad:
            (grad,) = torch.autograd.grad(total * scale, leaf)
        figures["terms"] = total
        return grad, {name: value.detach() * share for name, value in figures.items()}

"""Which cells form which global batch: a pure function of the corpus' index, the seed and the step.

The order does not depend on the number of workers, and to resume only the step is needed. Every cell comes once per
epoch, or species come in a set ratio. Cells are drawn from windows of a few shards, so that whole shards are read from
storage; within a window batches are grouped by length. Workers get shares of a batch with about equal numbers of tokens.

A visit is a cell and its repetition in the epoch, `cell + repetition * num_cells`; it is the key of all random draws.

Shapes: N cells of the corpus, S shards, P species, B cells of a global batch.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mixgf import rng
from mixgf.errors import UserError

I64 = npt.NDArray[np.int64]

WINDOW_SHARDS = 6
GROUP_BATCHES = 50
"""Number of batches whose cells are sorted by length together."""
_DATA_SET = 0x44534554


@dataclass(frozen=True, slots=True)
class WorkerShare:
    """One worker's cells of one global batch."""

    step: int
    epoch: int
    visits_B: I64
    cells_B: I64
    slots_B: I64
    """Places of these cells in the global batch; the shares of all workers fill every place once."""
    batch_cells: int
    """Number of cells of the global batch."""


class BatchPlan:
    """Order of all cells and batches over all epochs.

    Args:
        lengths: tokens per cell, (N,).
        species: species code per cell, (N,).
        shard_rows: cells per shard, in corpus order.
        seed: of the order.
        batch_cells: cells of a global batch; the last batch of an epoch may be smaller.
        species_mix: share of an epoch by species code; empty = every cell once. An epoch always has N visits.
        window_shards: number of shards whose cells are mixed.
        group_batches: number of batches whose cells are sorted by length together.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.int32],
        species: npt.NDArray[np.int8],
        shard_rows: I64 | list[int],
        *,
        seed: int,
        batch_cells: int,
        species_mix: dict[int, float] | None = None,
        window_shards: int = WINDOW_SHARDS,
        group_batches: int = GROUP_BATCHES,
    ) -> None:
        self.lengths, self.species = lengths, species
        self.seed, self.batch_cells, self.window_shards = seed, batch_cells, window_shards
        self.group_batches = group_batches
        self.num_cells = len(lengths)
        self.starts = np.concatenate([[0], np.cumsum(np.asarray(shard_rows, dtype=np.int64))])
        assert self.starts[-1] == self.num_cells, (int(self.starts[-1]), self.num_cells)
        num_shards, num_species = len(self.starts) - 1, int(species.max(initial=0)) + 1
        self._counts_SP = np.zeros((num_shards, num_species), dtype=np.int64)
        for shard, (start, stop) in enumerate(
            itertools.pairwise(self.starts.tolist())
        ):  # no array of all cells is made
            self._counts_SP[shard] = np.bincount(species[start:stop], minlength=num_species)
        self._whole_P, self._extra_SP = self._quotas(species_mix or {})
        self._epoch = -1
        self._window: tuple[int, int, I64] | None = None
        self._passes: list[tuple[int, int]] = []
        self._bounds: I64 = np.zeros(1, dtype=np.int64)

    def _quotas(self, mix: dict[int, float]) -> tuple[I64, I64]:
        """By species, how often every cell is visited; by shard and species, how many cells are visited once more."""
        totals_P = self._counts_SP.sum(0)
        if not mix:
            return np.ones_like(totals_P), np.zeros_like(self._counts_SP)
        share_P = np.array([mix.get(p, 0.0) for p in range(len(totals_P))])
        missing = [p for p in mix if p >= len(totals_P) or totals_P[p] == 0]
        if missing or share_P.sum() <= 0 or share_P.min() < 0:
            msg = f"train.species_mix = {mix}: must give shares above 0 to species that the corpus has"
            raise UserError(msg)
        edges = np.round(np.cumsum(share_P / share_P.sum()) * self.num_cells).astype(np.int64)
        draws_P = np.diff(np.concatenate([[0], edges]))
        safe_P = np.maximum(totals_P, 1)
        whole_P, extra_P = draws_P // safe_P, draws_P % safe_P
        before_SP = np.concatenate([np.zeros((1, len(totals_P)), np.int64), np.cumsum(self._counts_SP, 0)])
        return whole_P, np.diff(before_SP * extra_P // safe_P, axis=0)

    @property
    def steps_per_epoch(self) -> int:
        """Number of batches of one epoch."""
        return -(-self.num_cells // self.batch_cells)

    def batch(self, step: int) -> I64:
        """Visits of the global batch of a step, (B,)."""
        epoch, index = divmod(step, self.steps_per_epoch)
        self._order_epoch(epoch)
        start, stop = index * self.batch_cells, min((index + 1) * self.batch_cells, self.num_cells)
        parts = []
        while start < stop:
            w = int(np.searchsorted(self._bounds, start, side="right")) - 1
            first, last = int(self._bounds[w]), int(self._bounds[w + 1])
            parts.append(self._visits(epoch, w)[start - first : stop - first])
            start = min(stop, last)
        return np.concatenate(parts)

    def share(self, step: int, rank: int = 0, world_size: int = 1) -> WorkerShare:
        """One worker's share of a global batch, balanced by tokens: cells by length, assigned to workers in serpentine order."""
        return _share(self, step, rank, world_size)

    def _order_epoch(self, epoch: int) -> None:
        """Order the passes (shard, repetition) of an epoch, species interleaved, and cut them into windows."""
        if epoch == self._epoch:
            return
        generator = np.random.default_rng([self.seed, epoch, 0])
        passes, sizes, kinds = [], [], []
        for shard, counts_P in enumerate(self._counts_SP):
            for repetition in range(int(self._whole_P.max()) + 1):
                visits_P = np.where(repetition < self._whole_P, counts_P, 0)
                visits_P = visits_P + np.where(repetition == self._whole_P, self._extra_SP[shard], 0)
                if visits_P.sum():
                    passes.append((shard, repetition))
                    sizes.append(int(visits_P.sum()))
                    kinds.append(int(visits_P.argmax()))
        kind, place = np.array(kinds, dtype=np.int64), np.empty(len(passes))
        for k in np.unique(kind):
            of_kind = generator.permutation(np.flatnonzero(kind == k))
            place[of_kind] = (np.arange(len(of_kind)) + generator.random(len(of_kind))) / len(of_kind)
        order = np.argsort(place, kind="stable")
        self._passes = [passes[i] for i in order]
        ends = np.cumsum(np.array(sizes, dtype=np.int64)[order])
        last = np.minimum(
            np.arange(self.window_shards, len(passes) + self.window_shards, self.window_shards), len(passes)
        )
        self._bounds = np.concatenate([[0], ends[last - 1]])
        self._epoch, self._window = epoch, None

    def window_shards_of(self, step: int) -> list[int]:
        """Shards from which the batch of a step is drawn, in the order of use."""
        epoch, index = divmod(step, self.steps_per_epoch)
        self._order_epoch(epoch)
        w = int(np.searchsorted(self._bounds, index * self.batch_cells, side="right")) - 1
        return list(dict.fromkeys(shard for shard, _ in self._passes_of(w)))

    def _passes_of(self, w: int) -> list[tuple[int, int]]:
        return self._passes[w * self.window_shards : (w + 1) * self.window_shards]

    def _visits(self, epoch: int, w: int) -> I64:
        """Visits of window `w` in order: the rest of the batch that the window before began, whole batches, a new rest."""
        if self._window is not None and self._window[:2] == (epoch, w):
            return self._window[2]
        generator = np.random.default_rng([self.seed, epoch, 1, w])
        visits = generator.permutation(
            np.concatenate([self._pass_visits(epoch, *one_pass) for one_pass in self._passes_of(w)])
        )
        b = self.batch_cells
        head = min(int(-self._bounds[w]) % b, len(visits))
        num_batches = (len(visits) - head) // b
        body = visits[head : head + num_batches * b]
        for start in range(0, len(body), self.group_batches * b):
            group = body[start : start + self.group_batches * b]
            body[start : start + len(group)] = group[np.argsort(self.lengths[group % self.num_cells], kind="stable")]
        body = body.reshape(num_batches, b)[generator.permutation(num_batches)].reshape(-1)
        ordered = np.concatenate([visits[:head], body, visits[head + num_batches * b :]])
        self._window = (epoch, w, ordered)
        return ordered

    def _pass_visits(self, epoch: int, shard: int, repetition: int) -> I64:
        """Visits of one shard in one repetition, in the order of the corpus."""
        cells = np.arange(self.starts[shard], self.starts[shard + 1])
        codes = self.species[cells]
        keep = repetition < self._whole_P[codes]
        for p in np.flatnonzero((self._whole_P == repetition) & (self._extra_SP[shard] > 0)):
            of_kind = np.flatnonzero(codes == p)
            generator = np.random.default_rng([self.seed, epoch, 2, shard, int(p)])
            keep[generator.choice(of_kind, int(self._extra_SP[shard][p]), replace=False)] = True
        return (cells[keep] + repetition * self.num_cells).astype(np.int64)


class DataSetPlan:
    """Batches of one data set each. A step draws a data set with a chance that grows with the root of its number of cells.

    The steps of a data set go through its cells epoch by epoch, as in `BatchPlan`, in batches of nearly equal size: a data set with
    fewer cells than a batch is one batch. An epoch of the whole plan is as many steps as batches of all cells.

    Args:
        lengths: tokens per cell, (N,).
        species: species code per cell, (N,).
        shard_rows: cells per shard, in corpus order.
        groups: data set of each cell, (N,).
        seed: of the order.
        batch_cells: most cells of a batch.
    """

    def __init__(
        self,
        lengths: npt.NDArray[np.int32],
        species: npt.NDArray[np.int8],
        shard_rows: I64 | list[int],
        groups: npt.NDArray[np.int32],
        *,
        seed: int,
        batch_cells: int,
    ) -> None:
        self.lengths, self.num_cells, self.seed, self.batch_cells = lengths, len(lengths), seed, batch_cells
        starts = np.concatenate([[0], np.cumsum(np.asarray(shard_rows, dtype=np.int64))])
        self._cells = [np.flatnonzero(groups == g) for g in np.unique(groups)]
        self._plans = []
        for g, cells in enumerate(self._cells):
            rows, batches = np.diff(np.searchsorted(cells, starts)), -(-len(cells) // batch_cells)
            one = BatchPlan(
                lengths[cells], species[cells], rows[rows > 0], seed=int(rng.hashed(seed, g) >> np.uint64(33)),
                batch_cells=-(-len(cells) // batches), group_batches=1,
            )  # fmt: skip
            self._plans.append(one)
        roots = np.sqrt([len(cells) for cells in self._cells])
        self._edges = np.cumsum(roots / roots.sum())[:-1]
        self._drawn: I64 = np.empty(0, dtype=np.int64)

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps of one epoch."""
        return -(-self.num_cells // self.batch_cells)

    def data_set(self, step: int) -> tuple[int, int]:
        """Number of the data set of a step, and how many earlier steps had the same."""
        if step >= len(self._drawn):
            draws = rng.uniform(np.arange(max(1024, 2 * (step + 1))), after=rng.hashed(self.seed, _DATA_SET))
            self._drawn = np.searchsorted(self._edges, draws, side="right")
        chosen = int(self._drawn[step])
        return chosen, int((self._drawn[:step] == chosen).sum())

    def batch(self, step: int) -> I64:
        """Visits of the global batch of a step, (B,)."""
        chosen, before = self.data_set(step)
        plan = self._plans[chosen]
        repetition = before // plan.steps_per_epoch  # all of an epoch of the data set have one
        return self._cells[chosen][plan.batch(before) % plan.num_cells] + repetition * self.num_cells

    def share(self, step: int, rank: int = 0, world_size: int = 1) -> WorkerShare:
        """One worker's share of a global batch, as of `BatchPlan.share`."""
        return _share(self, step, rank, world_size)


def _share(plan: BatchPlan | DataSetPlan, step: int, rank: int, world_size: int) -> WorkerShare:
    visits = plan.batch(step)
    order = np.argsort(-plan.lengths[visits % plan.num_cells], kind="stable")
    slots = order[_worker_cells(len(visits), rank, world_size)]
    mine = visits[slots]
    return WorkerShare(step, step // plan.steps_per_epoch, mine, mine % plan.num_cells, slots, len(visits))


@functools.cache
def _worker_cells(num_cells: int, rank: int, world_size: int) -> I64:
    """Numbers of a worker's cells, among cells in descending order of length."""
    round_, place = np.divmod(np.arange(num_cells), world_size)
    return np.flatnonzero(np.where(round_ % 2 == 0, place, world_size - 1 - place) == rank)


def padding_ratios(lengths: npt.NDArray[np.int32], batch_cells: int, *, seed: int = 0) -> dict[str, float]:
    """Tokens computed per real token if batches were padded: with cells in `random` order, and `grouped` by length.

    Packed batches, as used here, compute 1. Groups are of `GROUP_BATCHES` batches, as in the plan.
    """
    order = np.random.default_rng(seed).permutation(len(lengths))

    def padded(cells: I64) -> float:
        cut = np.append(cells, np.full(-len(cells) % batch_cells, -1))
        rows = np.where(cut >= 0, lengths[cut], 0).reshape(-1, batch_cells)
        return float((rows.max(1).astype(np.int64) * (cut >= 0).reshape(rows.shape).sum(1)).sum() / lengths.sum())

    size = GROUP_BATCHES * batch_cells
    groups = [order[start : start + size] for start in range(0, len(order), size)]
    grouped = np.concatenate([group[np.argsort(lengths[group], kind="stable")] for group in groups])
    return {"random": padded(order), "grouped": padded(grouped)}


def shares_by_code(mix: Mapping[str, float], species: tuple[str, ...]) -> dict[int, float]:
    """Shares of the species by their codes, which are positions in `species`, from shares by name (`train.species_mix`)."""
    unknown = [name for name in mix if name not in species]
    if unknown:
        msg = f"train.species_mix: {unknown[0]!r}: must be a species of the corpus: {', '.join(species)}"
        raise UserError(msg)
    return {species.index(name): share for name, share in mix.items()}

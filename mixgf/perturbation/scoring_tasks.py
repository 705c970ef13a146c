"""Perturbation as tasks: `plan_tasks` cuts a design into tasks, and a `ScoringWorker` does one and writes its part file.

Tasks do not depend on the number of workers. The design comes from `group_design`; `gene_table` makes the table of genes
from all part files.

Letters: N perturbed cells, B cells of a task, K targets, M genes of a target, S states, R responding genes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from scipy import sparse

from mixgf.arrays import Float64s, Ints
from mixgf.config.perturbation import Perturb
from mixgf.config.run import Config
from mixgf.corpus.reader import Corpus
from mixgf.encoder import checkpoint
from mixgf.encoder.bert import Encoder, forward_flops
from mixgf.encoder.device import pick_device
from mixgf.errors import UserError
from mixgf.perturbation import expression, gene_responses, operations, screen
from mixgf.perturbation.expression import Expression, StateCounts
from mixgf.perturbation.group_design import Design, targets_by_species
from mixgf.perturbation.sampling import sample_cells
from mixgf.perturbation.shift import ShiftScorer, UnperturbedCells
from mixgf.storage import files, tables

PROBE_SECONDS, PROBE_GENES = 2.0, 16
STATE_CELLS = 256
"""Cells of a task of state embeddings."""
TWIN = "twin-"
"""Begin of the keys of tasks of the untrained twin (`controls`)."""
SAMPLE = "sample-"
"""Begin of the keys of exact scores in the cells of a screen."""
RESPONSES = "responses"
"""Folder, beside the part files, of the responses of other genes (`perturb.response`); files are named after tasks."""


def _no_numbers() -> Ints:
    return np.empty(0, dtype=np.int64)


def _no_mask() -> NDArray[np.bool_]:
    return np.empty((0, 0), dtype=bool)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoringTask:
    """One task: a block of targets in a block of cells.

    `operation` is one of `operations.OPERATIONS`; `screen-` and one of these for estimates; `embed` for state
    embeddings; `counts` for raw counts; or `probe`, which measures the speed.
    """

    key: str
    operation: str
    cells_B: Ints
    cost: float
    """Expected tokens to encode."""
    targets_K: Ints = field(default_factory=_no_numbers)
    """Numbers of the targets; empty for `embed`, `counts` and `probe`."""
    genes_KM: Ints = field(default_factory=lambda: np.empty((0, 1), dtype=np.int64))
    allowed_KB: NDArray[np.bool_] = field(default_factory=_no_mask)
    """Whether the target's species is the cell's."""
    states_SB: NDArray[np.bool_] = field(default_factory=_no_mask)
    """For `embed` and `counts`: which cells belong to which state; for `counts`, start and goal alone."""
    donor_B: Ints
    responding_R: Ints = field(default_factory=_no_numbers)
    """Tokens whose responses are recorded; they are written to the folder `RESPONSES`, before the task's part file."""
    twin: bool = False
    """Whether the untrained twin of the encoder does the task; keys then begin with `TWIN`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskResult:
    """What a worker returns for a task."""

    cost: float
    """Cost of the task; for `probe` the FLOP/s."""
    sentences: int
    """Perturbed sentences that were encoded."""


def plan_tasks(plan: Design, corpus: Corpus, settings: Perturb) -> list[ScoringTask]:
    """All tasks without a screen, in a fixed order: state embeddings, then by operation, cell block and gene block.

    Gene blocks of the same cells follow each other, so that a worker reuses the embeddings of the unperturbed cells.
    """
    blocks = cut_gene_blocks(np.arange(len(plan.targets)), settings.block_genes)
    genes = [
        task for operation in settings.operations for task in gene_tasks(plan, corpus, settings, operation, blocks)
    ]
    return state_tasks(plan, corpus) + genes


def cut_gene_blocks(targets_K: Ints, size: int) -> list[Ints]:
    """Targets in the given order, cut into blocks."""
    return [targets_K[block] for block in _blocks(len(targets_K), size)]


def gene_block_number(task: ScoringTask) -> int:
    """Number of the gene block of one of `gene_tasks`."""
    return int(task.key.rpartition("-g")[2])


def twin_tasks(tasks: list[ScoringTask]) -> list[ScoringTask]:
    """The same tasks for the untrained twin; it records no responses."""
    return [replace(task, key=TWIN + task.key, twin=True, responding_R=_no_numbers()) for task in tasks]


def sample_tasks(tasks: list[ScoringTask]) -> list[ScoringTask]:
    """The same tasks under keys of their own, for the cells of a screen; they record no responses."""
    return [replace(task, key=SAMPLE + task.key, responding_R=_no_numbers()) for task in tasks]


def state_tasks(plan: Design, corpus: Corpus) -> list[ScoringTask]:
    """Tasks that embed all cells of the states and of the halves."""
    work = []
    cells = np.unique(np.concatenate([state.cells for state in plan.embedded]))
    for i, block in enumerate(_blocks(len(cells), STATE_CELLS)):
        part = cells[block]
        work.append(
            ScoringTask(
                key=f"states-{i:05d}",
                operation="embed",
                cells_B=part,
                cost=float(corpus.lengths_N[part].sum()),
                states_SB=np.stack([np.isin(part, state.cells) for state in plan.embedded]),
                donor_B=plan.donor_of[part],
            )
        )
    return work


def count_tasks(plan: Design, corpus: Corpus, seed: int) -> list[ScoringTask]:
    """Tasks that read raw counts of cells of start and goal, one per source; none without a goal.

    A task whose source cannot be read writes a part without cells.
    """
    if plan.goal is None:
        return []
    source_N = corpus.obs(["source"])["source"].astype(str).to_numpy() if "source" in corpus.columns else None
    sides = [
        sample_cells(state.cells, plan.donor_of, expression.MAX_CELLS, seed) for state in plan.states[: plan.goal + 1]
    ]
    cells = np.unique(np.concatenate(sides))
    names = np.zeros(len(cells), dtype=np.int64) if source_N is None else source_N[cells]
    work = []
    for i, name in enumerate(np.unique(names)):
        part = cells[names == name]
        work.append(
            ScoringTask(
                key=f"counts-{i:05d}",
                operation="counts",
                cells_B=part,
                cost=0.0,
                states_SB=np.stack([np.isin(part, side) for side in sides]),
                donor_B=plan.donor_of[part],
            )
        )
    return work


def read_expression(plan: Design, corpus: Corpus, tasks: list[ScoringTask], folder: str) -> Expression | None:
    """The genes' own differences between start and goal, from the parts of `count_tasks`; None without a goal.

    Unless every part holds cells, they come from the sentences.
    """
    from mixgf.corpus import raw_counts  # noqa: PLC0415 (its readers of files are not needed to score)

    if plan.goal is None:
        return None
    found: dict[str, list[list[tuple[Ints, sparse.csr_matrix]]]] = {}
    for task in tasks:
        name = corpus.species[int(corpus.species_N[task.cells_B[0]])]
        num_genes = len(corpus.vocabulary.species_genes(name).genes)
        cells, counts = raw_counts.load_counts(files.join(folder, f"{task.key}.parquet"), num_genes)
        if not len(cells):
            return expression.of_ranks(corpus, plan.states[0].cells, plan.states[plan.goal].cells)
        sides = found.setdefault(name, [[] for _ in task.states_SB])
        for side, member_B in zip(sides, task.states_SB, strict=True):
            mine = np.flatnonzero(np.isin(cells, task.cells_B[member_B]))
            if len(mine):
                side.append((cells[mine], sparse.csr_matrix(counts[mine])))
    states: dict[str, tuple[StateCounts, StateCounts]] = {}
    for name, sides in found.items():
        if all(sides):
            start, goal = (
                StateCounts(
                    counts_NG=sparse.csr_matrix(sparse.vstack([counts for _, counts in side], format="csr")),
                    donor_N=plan.donor_of[np.concatenate([cells for cells, _ in side])],
                )
                for side in sides
            )
            states[name] = (start, goal)
    return expression.of_counts(corpus, states)


def gene_tasks(
    plan: Design, corpus: Corpus, settings: Perturb, operation: str, blocks: list[Ints], *, best_first: bool = False
) -> list[ScoringTask]:
    """Tasks of all gene blocks in all cell blocks, ordered by cell block, or with `best_first` by gene block.

    Keys end with the numbers of both blocks.
    """
    owned_KS = targets_by_species(plan, corpus)
    coverage_K = np.array([target.coverage for target in plan.targets])
    screened = operation.startswith("screen-")
    everywhere = operation.endswith("overexpress") and settings.insert_absent
    work: list[tuple[tuple[int, int], ScoringTask]] = []
    for c, cell_block in enumerate(_blocks(len(plan.cells_N), settings.block_cells)):
        part = plan.cells_N[cell_block]
        lengths_B = corpus.lengths_N[part].astype(np.float64)
        for g, numbers in enumerate(blocks):
            allowed = owned_KS[numbers][:, corpus.species_N[part]]
            tokens_K = (allowed @ lengths_B) * (1.0 if everywhere else coverage_K[numbers])
            cost = lengths_B.sum() * (settings.screen_grid + 5) if screened else tokens_K.sum()
            task = ScoringTask(
                key=f"{operation}-c{c:05d}-g{g:05d}",
                operation=operation,
                cells_B=part,
                cost=float(cost),
                targets_K=numbers,
                genes_KM=plan.genes_KM[numbers],
                allowed_KB=allowed,
                donor_B=plan.donor_of[part],
                responding_R=plan.responding_R[: None if not screened else 0],
            )
            work.append(((g, c) if best_first else (c, g), task))
    return [task for _, task in sorted(work, key=lambda pair: pair[0])]


def probe_task(plan: Design) -> ScoringTask:
    """Task that measures the speed: deletions in a cell of median length for `PROBE_SECONDS`."""
    cell = plan.cells_N[len(plan.cells_N) // 2 :][:1]
    return ScoringTask(
        key="probe",
        operation="probe",
        cells_B=cell,
        cost=0.0,
        donor_B=plan.donor_of[cell],
    )


def _blocks(num: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, num)) for start in range(0, num, size)]


class ScoringWorker:
    """Does tasks; keeps the encoder, the corpus and the last unperturbed cells in memory.

    Args:
        config: of the run.
        corpus: URI of the corpus, or an open one, cut to the number of positions of the encoder.
        weights: URI of the checkpoint, or an encoder on the device to use.
        twin: the untrained twin of `weights`; None = it is made of the checkpoint's record at its first task.
        folder: URI of the folder for part files, `<key>.parquet`.
    """

    def __init__(
        self, config: Config, *, corpus: str | Corpus, weights: str | Encoder, folder: str, twin: Encoder | None = None
    ) -> None:
        torch.set_num_threads(config.train.threads)
        self.settings, self.folder, self._block_cells = config.perturb, folder, config.prepare.block_cells
        if isinstance(weights, str):
            encoder, record = checkpoint.load_encoder(weights, pick_device(config.compute.gpus_per_worker))
        else:
            encoder, record = weights, None
        self._weights = weights if isinstance(weights, str) else ""
        self.corpus = Corpus(corpus, max_len=encoder.sizes.max_positions) if isinstance(corpus, str) else corpus
        if record is not None:
            checkpoint.require_sentences(record, self.corpus)
        self._twin = None if twin is None else twin.eval()
        self.scorer = ShiftScorer(
            encoder=encoder.eval(),
            variant=self.settings.variant,
            layers=encoder.sizes.num_layers + 1 + self.settings.layer,
            lead=int(self.corpus.cls),
            max_len=min(int(self.corpus.record.details["max_len"]), encoder.sizes.max_positions),
            rank_share=self.settings.rank_share,
            micro_tokens=self.settings.micro_tokens,
            precision=config.train.precision,
        )
        self._cells: tuple[bytes, UnperturbedCells] | None = None

    def _scorer(self, task: ScoringTask) -> ShiftScorer:
        """The scorer of the encoder that does the task."""
        if not task.twin:
            return self.scorer
        if self._twin is None:
            assert self._weights, "a twin comes with an encoder that has no record"
            self._twin = checkpoint.load_start(self._weights, device=self.scorer.device)[0]
        return replace(self.scorer, encoder=self._twin)

    def __call__(self, item: tuple[ScoringTask, Float64s | None]) -> TaskResult:
        """Do one task and write its part file. The item is the task and, once known, the state embeddings, float64 (S, D)."""
        task, states = item
        if task.operation == "probe":
            return self.probe(task)
        if task.operation == "counts":
            self.read_counts(task)
            return TaskResult(cost=0.0, sentences=0)
        if task.operation == "embed":
            table = self.embed(task)
        elif task.operation.startswith("screen-"):
            table = self.estimate(task, states)
        else:
            table = self.score(task, states)
        uri = files.join(self.folder, f"{task.key}.parquet")
        tables.write_table(uri, table, use_byte_stream_split=[n for n in table.column_names if table[n].type == "float"],
                            use_dictionary=False)  # fmt: skip
        return TaskResult(cost=task.cost, sentences=table.num_rows if task.operation in operations.OPERATIONS else 0)

    def probe(self, task: ScoringTask) -> TaskResult:
        """Measure the FLOP/s of exact scoring, after one warm-up round."""
        ids_T, offsets_B1 = self.corpus.tokens(task.cells_B)
        original = self.scorer.encode_cells(torch.from_numpy(ids_T), torch.from_numpy(offsets_B1))
        length, device = len(ids_T), self.scorer.device
        genes_S1 = original.ids_T[self.scorer.lead :][:PROBE_GENES, None]
        cells_S = torch.zeros(len(genes_S1), dtype=torch.int64, device=device)
        states = torch.ones(1, self.scorer.encoder.sizes.dim)
        num, start = -1, 0.0
        while num < 1 or time.perf_counter() - start < PROBE_SECONDS:
            self.scorer.score(original, cells_S, genes_S1, "delete", states)
            num += 1
            start = start if num else time.perf_counter()
        lengths = [length - 1] * len(genes_S1)
        flops = forward_flops(self.scorer.encoder.sizes, lengths, layers=self.scorer.layers)
        return TaskResult(cost=num * flops / (time.perf_counter() - start), sentences=0)

    def read_counts(self, task: ScoringTask) -> None:
        """Write raw counts of the task's cells; of none where they cannot be read."""
        from mixgf.corpus import raw_counts  # noqa: PLC0415 (its readers of files are not needed to score)

        try:
            cells, counts = raw_counts.read_cells(self.corpus, task.cells_B, block_cells=self._block_cells)
        except UserError:
            cells, counts = np.empty(0, dtype=np.int64), sparse.csr_matrix((0, 0), dtype=np.int32)
        raw_counts.save_counts(files.join(self.folder, f"{task.key}.parquet"), cells, counts)

    def estimate(self, task: ScoringTask, states: Float64s | None) -> pa.Table:
        """Estimated shifts towards the goal of the pairs that `score` would score: columns target, cell, estimate.

        Targets of several genes have no estimate.
        """
        assert states is not None, "states come before estimates"
        operation = task.operation.removeprefix("screen-")
        everywhere = operation == "overexpress" and self.settings.insert_absent
        single_K = (task.genes_KM != operations.NO_GENE).sum(axis=1) == 1
        goal_D = torch.from_numpy(states[1])
        rows: list[tuple[Ints, Ints, Float64s]] = []
        for b, cell in enumerate(task.cells_B.tolist()):
            ids_L = self.corpus.tokens([cell])[0]
            genes_K = task.genes_KM[:, 0]
            chosen = np.flatnonzero(single_K & task.allowed_KB[:, b] & (everywhere | np.isin(genes_K, ids_L)))
            if len(chosen):
                found = screen.estimate(
                    self.scorer, torch.from_numpy(ids_L), torch.from_numpy(genes_K[chosen]), operation, goal_D,
                    grid=self.settings.screen_grid,
                )  # fmt: skip
                rows.append((task.targets_K[chosen], np.full(len(chosen), cell), found.cpu().numpy()))
        columns = [np.concatenate([row[i] for row in rows]) if rows else np.empty(0) for i in range(3)]
        types = (pa.int32(), pa.int64(), pa.float32())
        names = ("target", "cell", "estimate")
        return pa.table(
            {n: pa.array(v.astype(t.to_pandas_dtype()), t) for n, v, t in zip(names, columns, types, strict=True)}
        )

    def embed(self, task: ScoringTask) -> pa.Table:
        """Sums of embeddings by state and donor: columns state, donor, num_cells, sum."""
        ids_T, offsets_B1 = self.corpus.tokens(task.cells_B)
        vectors = self._scorer(task).vectors(torch.from_numpy(ids_T), torch.from_numpy(offsets_B1)).cpu().numpy()
        rows: dict[str, list[Any]] = {"state": [], "donor": [], "num_cells": [], "sum": []}
        for state, member_B in enumerate(task.states_SB):
            for donor in np.unique(task.donor_B[member_B]).tolist():
                chosen = member_B & (task.donor_B == donor)
                rows["state"].append(state)
                rows["donor"].append(donor)
                rows["num_cells"].append(int(chosen.sum()))
                rows["sum"].append(vectors[chosen].sum(axis=0).tolist())
        types = (pa.int32(), pa.int32(), pa.int64(), pa.list_(pa.float64()))
        return pa.table({name: pa.array(v, t) for (name, v), t in zip(rows.items(), types, strict=True)})

    def score(self, task: ScoringTask, states: Float64s | None) -> pa.Table:
        """Shifts of the task's (cell, target) pairs, ordered by cell, then target.

        Pairs are those in which the cell has every gene of the target. For `overexpress` with `perturb.insert_absent`
        they are all cells of the target's species.

        Columns: target, cell, rank of the target's first gene (0 = top, -1 = absent), response (1 - cos(before, after)),
        shift_<i> towards state i.
        """
        assert states is not None, "states come before shifts"
        scorer, original = self._scorer(task), self._unperturbed(task)
        device = scorer.device
        genes_KM = torch.from_numpy(task.genes_KM).to(device)
        flat = operations.gene_ranks(
            original.ids_T, original.offsets_B1, genes_KM.clamp(min=0).reshape(-1), lead=scorer.lead
        ).reshape(len(task.cells_B), *task.genes_KM.shape)
        held_BK = ((flat >= 0) | (genes_KM < 0)).all(dim=2).cpu().numpy()
        everywhere = task.operation == "overexpress" and self.settings.insert_absent
        cell_P, target_P = np.nonzero(task.allowed_KB.T & (held_BK | everywhere))
        cells, targets = torch.from_numpy(cell_P).to(device), torch.from_numpy(target_P).to(device)
        responses = None
        if len(task.responding_R):
            responses = gene_responses.ResponseAccumulator(
                original, cells, targets, num_targets=len(genes_KM), tokens_R=task.responding_R
            )
        shifts = scorer.score(
            original, cells, genes_KM[targets], task.operation, torch.from_numpy(states), observer=responses
        )
        if responses is not None:
            uri = files.join(self.folder, RESPONSES, f"{task.key}.parquet")
            tables.write_table(uri, responses.sums().part(task.targets_K))
        columns = {
            "target": pa.array(task.targets_K[target_P], pa.int32()),
            "cell": pa.array(task.cells_B[cell_P], pa.int64()),
            "rank": pa.array(flat[:, :, 0].cpu().numpy()[cell_P, target_P], pa.int32()),
            "response": pa.array(shifts.response_S.numpy(), pa.float32()),
        }
        for i in range(len(states)):
            columns[f"shift_{i}"] = pa.array(shifts.shift_SK[:, i].numpy(), pa.float32())
        return pa.table(columns)

    def _unperturbed(self, task: ScoringTask) -> UnperturbedCells:
        """Unperturbed cells of a block, computed once for consecutive tasks of one encoder."""
        key = bytes([task.twin]) + task.cells_B.tobytes()
        if self._cells is None or self._cells[0] != key:
            ids_T, offsets_B1 = self.corpus.tokens(task.cells_B)
            self._cells = (key, self._scorer(task).encode_cells(torch.from_numpy(ids_T), torch.from_numpy(offsets_B1)))
        return self._cells[1]

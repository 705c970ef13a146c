"""A perturbation's work, phase after phase: state embeddings, a screen, its sample, then the genes that are left to score.

Each phase computes the parts that are missing and no others, on the workers of a pool. A budget may end it early.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mixgf.arrays import Float64s, Ints
from mixgf.config.run import Config
from mixgf.console import say
from mixgf.corpus.reader import Corpus
from mixgf.distributed.metrics import Meter
from mixgf.errors import UserError
from mixgf.execution import Task, WorkerPool
from mixgf.perturbation import controls, gene_table, group_design, scoring_tasks, screen_selection
from mixgf.perturbation.group_design import Design
from mixgf.perturbation.scoring_tasks import ScoringTask, ScoringWorker, TaskResult
from mixgf.stages.fan_out import fan_out
from mixgf.stats import donors
from mixgf.storage import files, tables
from mixgf.tracking import cost
from mixgf.tracking.mlflow_runs import Run

SAVE_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """The result of all phases."""

    scored: Ints
    """Targets with exact shifts under every operation, ascending."""
    skipped: Ints
    """Left out because the screen ranks them low."""
    beyond: Ints
    """Left out because the budget was spent."""
    drawn: Ints
    """Drawn without regard to their estimates, for the others to be compared with; empty without a screen."""
    parts: list[str]
    """Keys of the parts that hold the shifts, by operation, in order."""
    twin_parts: list[str]
    """Those of the untrained twin; empty without controls."""
    states: pa.Table
    estimate_OK: Float64s | None
    agreement: dict[str, Any]
    """By operation, what the sample says of the screen."""
    figures: dict[str, float]
    warnings: list[str]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chosen:
    """Which targets are scored exactly, and in which order."""

    order: Ints
    """All targets, those of `blocks` in their order."""
    blocks: list[Ints]
    number: int
    """Targets to score, from the first of `order` on."""
    drawn: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    """As in `Outcome`."""
    estimate_OK: Float64s | None = None
    agreement: dict[str, screen_selection.Agreement] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()


@dataclass(kw_only=True, slots=True)
class Phases:
    """One run's work, phase after phase; each computes the parts that are missing."""

    config: Config
    plan: Design
    corpus: Corpus
    folder: str
    spend: cost.Spend
    tracked: Run | None = None
    """Gets the progress."""
    session: str = ""
    saved: float = 0.0
    sentences: float = 0.0
    """Scored in this session."""
    _twin_means: Float64s | None = None
    """State embeddings of the untrained twin."""

    def complete(self, pool: WorkerPool, meter: Meter) -> Outcome:
        """Work until everything is there, or the budget is spent."""
        plan, num = self.plan, len(self.plan.targets)
        self.session = self.session or f"{time.time_ns():020d}"
        figures: dict[str, float] = {}

        def work(what: str, units: list[ScoringTask], states: Float64s | None) -> bool:
            number, whole = self._compute(f"perturb: {what}", units, states, pool, meter)
            figures[f"{what}_parts_computed"] = figures.get(f"{what}_parts_computed", 0.0) + number
            return whole

        work("counts", scoring_tasks.count_tasks(plan, self.corpus, self.config.seed), None)
        first = scoring_tasks.state_tasks(plan, self.corpus)
        twins = scoring_tasks.twin_tasks(first) if self.config.perturb.controls else []
        self._needed(work("states", first + twins, None), "the state embeddings")
        means, states = self._state_means(first)
        self._twin_means = self._state_means(twins)[0] if twins else None
        blocks = scoring_tasks.cut_gene_blocks(np.arange(num), self.config.perturb.block_genes)
        chosen = _Chosen(order=np.arange(num), blocks=blocks, number=num)
        if self.config.perturb.screen:
            chosen = self._screened(work, means)
        starts = np.cumsum([0, *map(len, chosen.blocks)])
        held = [block for block, start in zip(chosen.blocks, starts, strict=False) if start < chosen.number]
        units = self._gene_units(held, with_twin=self.config.perturb.controls)
        work("genes", units, means)
        there = set(files.list_dir(self.folder))
        still_open = {scoring_tasks.gene_block_number(unit) for unit in units if f"{unit.key}.parquet" not in there}
        scored = [block for g, block in enumerate(held) if g not in still_open]
        ended = [unit for unit in units if scoring_tasks.gene_block_number(unit) not in still_open]
        self._needed(bool(scored), "the first block of genes")
        self._save()
        beyond = np.sort(np.concatenate([*(held[g] for g in sorted(still_open)), np.empty(0, np.int64)]))
        warnings = list(chosen.warnings)
        if len(beyond):
            warnings.append(f"not complete: the budget was spent before {len(beyond)} of {len(beyond) + sum(map(len, scored))} genes were scored (see "
                            f"not_scored.parquet); ranks, nulls and false discovery rates are among the others. The same command with a "
                            f"larger budget, or none, computes the rest")  # fmt: skip
        return Outcome(
            scored=np.sort(np.concatenate(scored)),
            skipped=np.sort(chosen.order[sum(map(len, held)) :]),
            beyond=beyond,
            drawn=chosen.drawn,
            parts=sorted(unit.key for unit in ended if not unit.twin),
            twin_parts=sorted(unit.key for unit in ended if unit.twin),
            states=states,
            estimate_OK=chosen.estimate_OK,
            agreement={name: asdict(seen) for name, seen in chosen.agreement.items()},
            figures=figures | {"worker_hours": self.spend.total / cost.HOUR},
            warnings=warnings,
        )

    def _state_means(self, units: list[ScoringTask]) -> tuple[Float64s, pa.Table]:
        """Embeddings of the states and false goals, and the table of the states."""
        plan = self.plan
        means, table = gene_table.state_means([part(self.folder, unit.key) for unit in units], len(plan.embedded))
        sizes = np.array([len(state.cells) for state in plan.embedded], dtype=np.int64)
        kept = table.filter(pc.less(table["state"], len(plan.states)))
        return controls.place_false_goals(means, [state.name for state in plan.embedded], sizes), kept

    def _screened(self, work: Callable[[str, list[ScoringTask], Float64s], bool], means: Float64s) -> _Chosen:
        """The genes to score exactly by a screen: all, if its estimates agree too little with exact shifts of a sample."""
        settings, num = self.config.perturb, len(self.plan.targets)
        estimate_OK = self._screen(functools.partial(work, "screen"), means)
        found = screen_selection.choose_shortlist(
            estimate_OK, group_design.matching_features(self.corpus, self.plan), top=settings.screen, sample=settings.screen_sample,
            nulls=settings.num_nulls, direction=settings.direction,
            rng=np.random.default_rng([self.config.seed, 93]),
        )  # fmt: skip
        parts = (found.sample, found.top, found.matched, found.rest)
        blocks = [block for part in parts for block in scoring_tasks.cut_gene_blocks(part, settings.block_genes)]
        of_sample = self._gene_units(
            blocks[: -(-len(found.sample) // settings.block_genes)], self.plan.on_screened_cells()
        )
        sampled = scoring_tasks.sample_tasks(of_sample) if len(self.plan.screened_N) else of_sample
        self._needed(work("genes", sampled, means), "the screen's sample")
        agreed = self._agreement(sampled, found.sample, estimate_OK)
        for name, seen in agreed.items():
            say(f"perturb: screen of {name}: rank correlation {seen.spearman:.3f} with exact shifts of {seen.num_genes} genes "
                f"drawn at random, {seen.recall:.0%} of their top found")  # fmt: skip
        poor = [name for name, seen in agreed.items() if not seen.reaches(settings.screen_agreement)]
        if poor:
            number = num
            warning = (f"the screen of {' and '.join(poor)} agrees too little with exact shifts "
                       f"(perturb.screen_agreement = {settings.screen_agreement}): all genes are scored exactly")  # fmt: skip
        else:
            number = len(found.sample) + len(found.top) + len(found.matched)
            warning = (f"{number} of {num} genes are scored exactly: the best by a screen, and {len(found.drawn)} drawn at "
                       f"random, with which all are compared; false discovery rates count all {num} genes")  # fmt: skip
        return _Chosen(
            order=np.concatenate(parts), blocks=blocks, number=number, drawn=found.drawn, estimate_OK=estimate_OK,
            agreement=agreed, warnings=(warning,),
        )  # fmt: skip

    def _gene_units(
        self, blocks: list[Ints], plan: Design | None = None, *, with_twin: bool = False
    ) -> list[ScoringTask]:
        """Units of exact scores; where there is an order of genes or a bound, the first genes come first.

        Args:
            blocks: of targets.
            plan: design whose cells are perturbed; None = the run's.
            with_twin: the untrained twin's units follow those of the encoder, so that a block ends with both.
        """
        settings, plan = self.config.perturb, plan or self.plan
        ordered = bool(settings.screen or self.spend.limit)
        units = [
            unit
            for operation in settings.operations
            for unit in scoring_tasks.gene_tasks(plan, self.corpus, settings, operation, blocks, best_first=ordered)
        ]
        if with_twin:
            units += scoring_tasks.twin_tasks(units)
        return sorted(units, key=scoring_tasks.gene_block_number) if ordered else units

    def _screen(self, work: Callable[[list[ScoringTask], Float64s], bool], means: Float64s) -> Float64s:
        """Mean estimates by operation and target."""
        every = [np.arange(len(self.plan.targets))]
        by_operation = {
            name: scoring_tasks.gene_tasks(
                self.plan.on_screened_cells(), self.corpus, self.config.perturb, f"screen-{name}", every
            )
            for name in self.config.perturb.operations
        }
        self._needed(work([unit for units in by_operation.values() for unit in units], means), "the screen")
        rows = []
        for units in by_operation.values():
            table = pa.concat_tables([part(self.folder, unit.key) for unit in units])
            values, targets = table["estimate"].to_numpy().astype(np.float64), table["target"].to_numpy()
            rows.append(donors.means_by_group(values, targets.astype(np.int64), len(self.plan.targets)))
        return np.stack(rows)

    def _agreement(
        self, units: list[ScoringTask], sample: Ints, estimate_OK: Float64s
    ) -> dict[str, screen_selection.Agreement]:
        """Estimates against exact shifts of the sample, by operation."""
        goal = self.plan.goal
        found = {}
        for o, operation in enumerate(self.config.perturb.operations):
            table = pa.concat_tables([part(self.folder, unit.key) for unit in units if unit.operation == operation])
            shifts, targets = table[f"shift_{goal}"].to_numpy().astype(np.float64), table["target"].to_numpy()
            exact_K = donors.means_by_group(shifts, targets.astype(np.int64), len(self.plan.targets))
            found[operation] = screen_selection.estimate_agreement(estimate_OK[o, sample], exact_K[sample])
        return found

    def _needed(self, there: bool, what: str) -> None:  # noqa: FBT001 (a predicate)
        if not there:
            self._save()
            spent = f"{self.spend.total / cost.HOUR:.3g} worker-hours were spent before {what} came to an end"
            msg = f"{self.folder}: parts of {what} are gone that this run has made; give the same command again"
            if self.spend.limit:
                msg = f"perturb.budget_hours: {spent}; what was done is kept: run again with a larger budget"
            raise UserError(msg)

    def _save(self) -> None:
        self.spend.update()
        self.saved = time.monotonic()
        cost.save(self.folder, self.session, {"worker": self.spend.session})

    def _figures(self, pool: WorkerPool) -> dict[str, float]:
        """Figures of the progress for MLflow."""
        return {
            "actors_up": float(pool.num_up),
            "sentences": self.sentences,
            "worker_hours": self.spend.total / cost.HOUR,
        }

    def _compute(
        self, what: str, units: list[ScoringTask], states: Float64s | None, pool: WorkerPool, meter: Meter
    ) -> tuple[float, bool]:
        """Compute the missing parts; returns their number, and whether all parts are there now."""
        tasks = [
            Task(
                part=files.join(self.folder, f"{unit.key}.parquet"),
                function=score,
                args=(unit, states if not unit.twin else self._twin_means),
                weight=unit.cost,
            )
            for unit in units
        ]
        errors: dict[str, str] = {}

        def count(_: Task, result: TaskResult) -> None:
            self.spend.update(finished=1)
            if time.monotonic() - self.saved > SAVE_SECONDS:
                self._save()
            self.sentences += result.sentences
            meter.add("sentences_scored", result.sentences)
            meter.set("actors", pool.num_actors, state="wanted")
            meter.set("actors", pool.num_up, state="up")

        finished, whole = fan_out(
            what, tasks, functools.partial(pool.run, stop=self.spend.enough if self.spend.limit else None),
            meter=meter, tracked=self.tracked, figures=lambda: self._figures(pool), unit="tokens", done=count, failed=lambda task, error: errors.update({task.args[0].key: error}),
        )  # fmt: skip
        if errors:
            key, reason = min(errors.items())
            msg = (
                f"{what}: {len(errors)} of {len(tasks)} parts failed every time; {key}: {reason}. The others are kept: run again "
                f"to retry only these"
            )
            raise UserError(msg)
        return float(finished), whole


def score(scorer: ScoringWorker, unit: ScoringTask, states: Float64s | None) -> TaskResult:
    """Score one unit on a worker."""
    return scorer((unit, states))


def part(folder: str, key: str) -> pa.Table:
    return tables.read_table(files.join(folder, f"{key}.parquet"))

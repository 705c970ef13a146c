"""A perturbation's work, phase after phase: state embeddings, a screen, its sample, then the genes that are left to score.

Each phase computes the parts that are missing and no others; whoever does the work is a `Runner`: a pool of actors, or a loop
in this process. A budget may end it early.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mixgf.arrays import Float64s, Ints
from mixgf.config.run import Config
from mixgf.console import Progress, say
from mixgf.corpus.reader import Corpus
from mixgf.distributed.metrics import Meter
from mixgf.errors import UserError
from mixgf.perturbation import gene_table, group_design, screen_selection, work_units
from mixgf.perturbation.group_design import Design
from mixgf.perturbation.work_units import Done, Unit
from mixgf.stats import donors
from mixgf.storage import files, tables
from mixgf.tracking import cost

Runner = Callable[..., dict[str, str]]
"""Works through items (key to item), calls back with every result, returns key to reason of those that failed.

With a budget it is given a third argument: asked, with the number of items in hand, whether they are to be the last.
"""
SAVE_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a phases came to."""

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
    states: pa.Table
    estimate_OK: Float64s | None
    agreement: dict[str, Any]
    """By operation, what the sample says of the screen."""
    figures: dict[str, float]
    warnings: list[str]


@dataclass(kw_only=True, slots=True)
class Phases:
    """One run's work, phase after phase; each computes the parts that are missing."""

    config: Config
    plan: Design
    corpus: Corpus
    folder: str
    spend: cost.Spend
    session: str = ""
    saved: float = 0.0

    def complete(self, runner: Runner, meter: Meter) -> Outcome:
        """Work until everything is there, or the budget is spent."""
        plan, corpus, settings = self.plan, self.corpus, self.config.perturb
        self.session = self.session or f"{time.time_ns():020d}"
        figures: dict[str, float] = {}

        def work(what: str, units: list[Unit], states: Float64s | None) -> bool:
            number, whole = self._missing(f"perturb: {what}", units, states, runner, meter)
            figures[f"{what}_parts_computed"] = figures.get(f"{what}_parts_computed", 0.0) + number
            return whole

        first = work_units.state_units(plan, corpus)
        self._needed(work("states", first, None), "the state embeddings")
        means, table = gene_table.state_means([part(self.folder, unit.key) for unit in first], len(plan.states))
        order, chosen = np.arange(len(plan.targets)), len(plan.targets)
        blocks = work_units.gene_blocks(order, settings.block_genes)
        estimate_OK, agreed, warnings, drawn = None, {}, [], np.empty(0, np.int64)
        if settings.screen:
            estimate_OK = self._screen(functools.partial(work, "screen"), means)
            rng = np.random.default_rng([self.config.seed, 93])
            found = screen_selection.shortlist(
                estimate_OK, group_design.features(corpus, plan), top=settings.screen, sample=settings.screen_sample,
                nulls=settings.num_nulls, direction=settings.direction, rng=rng,
            )  # fmt: skip
            blocks = [
                block
                for part in (found.sample, found.top, found.company, found.rest)
                for block in work_units.gene_blocks(part, settings.block_genes)
            ]
            drawn = found.drawn
            sampled = self._gene_units(blocks[: -(-len(found.sample) // settings.block_genes)])
            self._needed(work("genes", sampled, means), "the screen's sample")
            agreed = self._agreement(sampled, found.sample, estimate_OK)
            poor = [name for name, seen in agreed.items() if not seen.reaches(settings.screen_agreement)]
            for name, seen in agreed.items():
                say(f"perturb: screen of {name}: rank correlation {seen.spearman:.3f} with exact shifts of {seen.num_genes} genes "
                    f"drawn at random, {seen.recall:.0%} of their top found")  # fmt: skip
            if poor:
                warnings.append(f"the screen of {' and '.join(poor)} agrees too little with exact shifts "
                                f"(perturb.screen_agreement = {settings.screen_agreement}): all genes are scored exactly")  # fmt: skip
            else:
                chosen = len(found.sample) + len(found.top) + len(found.company)
                warnings.append(f"{chosen} of {len(plan.targets)} genes are scored exactly: the best by a screen, and {len(drawn)} drawn at "
                                f"random, with which all are compared; false discovery rates count all {len(plan.targets)} genes")  # fmt: skip
            order = np.concatenate([found.sample, found.top, found.company, found.rest])
        held, num = [], 0
        for block in blocks:
            if num < chosen:
                held.append(block)
            num += len(block)
        units = self._gene_units(held)
        work("genes", units, means)
        there = set(files.list_dir(self.folder))
        open_blocks = {work_units.gene_block(unit) for unit in units if f"{unit.key}.parquet" not in there}
        scored = [block for g, block in enumerate(held) if g not in open_blocks]
        self._needed(bool(scored), "the first block of genes")
        beyond = [block for g, block in enumerate(held) if g in open_blocks]
        self._save()
        left = np.sort(np.concatenate([*beyond, np.empty(0, np.int64)]))
        if len(left):
            warnings.append(f"not complete: the budget was spent before {len(left)} of {len(left) + sum(map(len, scored))} genes were scored (see "
                            f"not_scored.parquet); ranks, nulls and false discovery rates are among the others. The same command with a "
                            f"larger budget, or none, computes the rest")  # fmt: skip
        return Outcome(
            scored=np.sort(np.concatenate(scored)),
            skipped=np.sort(order[sum(map(len, held)) :]),
            beyond=left,
            drawn=drawn,
            parts=sorted(unit.key for unit in units if work_units.gene_block(unit) not in open_blocks),
            states=table,
            estimate_OK=estimate_OK,
            agreement={name: asdict(seen) for name, seen in agreed.items()},
            figures=figures | {"worker_hours": self.spend.total / cost.HOUR},
            warnings=warnings,
        )

    def _gene_units(self, blocks: list[Ints]) -> list[Unit]:
        """Units of exact scores; where there is an order of genes or a bound, the first genes come first."""
        settings = self.config.perturb
        ordered = bool(settings.screen or self.spend.limit)
        units = [
            unit
            for operation in settings.operations
            for unit in work_units.gene_units(self.plan, self.corpus, settings, operation, blocks, best_first=ordered)
        ]
        return sorted(units, key=work_units.gene_block) if ordered else units

    def _screen(self, work: Callable[[list[Unit], Float64s], bool], means: Float64s) -> Float64s:
        """Mean estimates by operation and target."""
        every = [np.arange(len(self.plan.targets))]
        by_operation = {
            name: work_units.gene_units(self.plan, self.corpus, self.config.perturb, f"screen-{name}", every)
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
        self, units: list[Unit], sample: Ints, estimate_OK: Float64s
    ) -> dict[str, screen_selection.Agreement]:
        """Estimates against exact shifts of the sample, by operation."""
        goal = self.plan.goal
        found = {}
        for o, operation in enumerate(self.config.perturb.operations):
            table = pa.concat_tables([part(self.folder, unit.key) for unit in units if unit.operation == operation])
            shifts, targets = table[f"shift_{goal}"].to_numpy().astype(np.float64), table["target"].to_numpy()
            exact_K = donors.means_by_group(shifts, targets.astype(np.int64), len(self.plan.targets))
            found[operation] = screen_selection.agreement(estimate_OK[o, sample], exact_K[sample])
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

    def _missing(
        self, what: str, work: list[Unit], states: Float64s | None, runner: Runner, meter: Meter
    ) -> tuple[float, bool]:
        """Compute the missing parts; returns their number, and whether all parts are there now."""
        there = set(files.list_dir(self.folder))
        missing = {unit.key: (unit, states) for unit in work if f"{unit.key}.parquet" not in there}
        total = sum(unit.cost for unit in work)
        done = total - sum(unit.cost for unit, _ in missing.values())
        if 0 < len(missing) < len(work):
            say(f"{what}: {len(work) - len(missing)} of {len(work)} parts are there already")
        dead: dict[str, str] = {}
        finished = 0
        if missing:
            with Progress(what, total, "tokens", done=done) as progress:

                def finish(_: str, result: Done) -> None:
                    nonlocal done, finished
                    done, finished = done + result.cost, finished + 1
                    self.spend.update(finished=1)
                    if time.monotonic() - self.saved > SAVE_SECONDS:
                        self._save()
                    progress.update(done)
                    meter.add("sentences_scored", result.sentences)
                    meter.units(waiting=len(missing) - finished, done=finished)

                dead = runner(missing, finish, *([self.spend.enough] if self.spend.limit else []))
        if dead:
            meter.units(waiting=len(missing) - finished - len(dead), done=finished, failed=len(dead))
            key, reason = min(dead.items())
            msg = (
                f"{what}: {len(dead)} of {len(work)} parts failed every time; {key}: {reason}. The others are kept: run again "
                f"to retry only these"
            )
            raise UserError(msg)
        return float(finished), finished == len(missing)


def loop(make: Callable[[], Callable[[Any], Any]]) -> Runner:
    """One worker in this process: what any pool must agree with."""
    workers: list[Callable[[Any], Any]] = []

    def runner(
        items: Mapping[str, Any], done: Callable[[str, Any], None], *stop: Callable[[int], bool]
    ) -> dict[str, str]:
        if not workers:
            workers.append(make())
        for key, item in items.items():
            if any(ends(0) for ends in stop):
                break
            done(key, workers[0](item))
        return {}

    return runner


def part(folder: str, key: str) -> pa.Table:
    return tables.read_table(files.join(folder, f"{key}.parquet"))

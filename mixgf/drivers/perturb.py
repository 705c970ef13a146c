"""Perturbation over an elastic actor pool. Parts in storage are the ledger: what is there is never computed again.

The way: state embeddings; with a screen, estimates of all genes, then exact scores of a random sample that says whether the
estimates can be trusted; then the genes that are left to score, best first where there is an order. A budget may end it
early: what was scored by then is published, with a list of the rest, and a larger budget goes on from there.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from mixgf import artifacts, checkpoint, cost, effects, forecast, known, perturb, shortlist, stats, storage, tracking
from mixgf.config import Config, UserError, to_dict
from mixgf.dataset import Corpus
from mixgf.drivers.metrics import Meter, watch
from mixgf.drivers.pool import Pool, Size
from mixgf.drivers.session import session
from mixgf.perturb import Design, Done, Floats, Ints, Scorer, Unit
from mixgf.progress import Progress, say, warn

KIND, SCHEMA = "perturbation", 2
_NO_RESULT = {"micro_tokens", "known", "published", "budget_hours", "budget_cost", "price", "worker_flops"}
"""Settings that change no result and so stay out of the fingerprint."""

Runner = Callable[..., dict[str, str]]
"""Works through items (key to item), calls back with every result, returns key to reason of those that failed.

With a budget it is given a third argument: asked, with the number of items in hand, whether they are to be the last.
"""
SAVE_SECONDS = 5.0


def run(config: Config, *, local: bool = False) -> str:
    """Perturb, test and publish; returns the artifact's URI.

    Args:
        config: the run's config.
        local: work in this process, without Ray.
    """
    uri = storage.join(config.output, "perturb")
    source = config.inputs.corpus or storage.join(config.output, "corpus")
    weights = config.inputs.checkpoint or storage.join(config.output, "pretrain")
    corpus, trained = Corpus(source), artifacts.require(weights, checkpoint.KIND)
    checkpoint.require_vocabulary(trained, corpus.vocabulary.hash, "the corpus")
    settings = {k: v for k, v in to_dict(config.perturb).items() if k not in _NO_RESULT}
    parents = {"corpus": corpus.record.fingerprint, "checkpoint": trained.fingerprint}
    record = artifacts.plan(
        KIND, SCHEMA, {"perturb": settings, "seed": config.seed, "precision": config.train.precision}, parents
    )
    there = artifacts.find(uri)
    if there is not None and there.fingerprint == record.fingerprint:
        left, limit = there.counts.get("not_scored", 0), _limit(config)
        if not left or (limit and limit <= there.details["budget"]["limit_hours"] * cost.HOUR):
            say(
                f"perturb: already there, {uri}"
                + (f"; {left} genes were beyond the budget, give a larger one" if left else "")
            )
            _say_known(uri, config)
            return uri
        storage.remove(storage.join(uri, "record.json"))  # unfinished again
    known.read(config)  # a list that cannot be read is said before the work, not after it
    plan = perturb.design(corpus, config)  # before the folder is claimed: a wrong expression leaves nothing behind
    artifacts.begin(uri, record)
    for text in plan.warnings:
        warn(f"perturb: {text}")
    folder = storage.join(uri, "parts", record.fingerprint[:16])
    make = functools.partial(Scorer, config, corpus=source, weights=weights, folder=folder)
    with tracking.stage(config, "perturb", settings, record.fingerprint) as tracked:
        spend = cost.Spend(_limit(config), before=sum(cost.load(folder).values()))
        campaign = Campaign(config=config, plan=plan, corpus=corpus, folder=folder, spend=spend)
        if local:
            outcome = campaign.complete(_loop(make), Meter("perturb", tracked.id))
        else:
            size = Size(
                min_actors=max(1, config.compute.min_workers),
                max_actors=config.compute.num_workers,
                cpus=config.compute.cpus_per_worker,
                gpus=config.compute.gpus_per_worker,
            )
            with (
                session(config),
                watch(config, "perturb", tracked, uri) as watched,
                Pool(make, size, retries=config.compute.max_failures) as pool,
            ):
                spend.num_workers = lambda: pool.num_actors
                outcome = campaign.complete(_metered(pool, watched.meter), watched.meter)
                watched.made(genes=len(outcome.scored), cells=len(plan.cells_N))
        _publish(uri, record, campaign, outcome)
        tracked.log({**outcome.figures, "genes": float(len(outcome.scored)), "cells": float(len(plan.cells_N))})
    for text in outcome.warnings:
        warn(f"perturb: {text}")
    say(f"perturb: {len(outcome.scored):,} genes in {len(plan.cells_N):,} cells, {uri}/genes.parquet")
    _say_known(uri, config)
    return uri


def _say_known(uri: str, config: Config) -> None:
    """Print what is known of the genes beside what was found, where the config asks for it."""
    if config.perturb.known or config.perturb.published:
        for line in known.text(storage.read_table(storage.join(uri, "genes.parquet")).to_pandas(), config).splitlines():
            say(line)


def _metered(pool: Pool, meter: Meter) -> Runner:
    """The pool's `run`, which tells the boards how many actors there are."""

    def runner(
        items: Mapping[str, Any], done: Callable[[str, Any], None], *stop: Callable[[int], bool]
    ) -> dict[str, str]:
        def counted(key: str, result: Any) -> None:
            meter.set("actors", pool.num_actors, state="wanted")
            meter.set("actors", pool.num_up, state="up")
            done(key, result)

        return pool.run(items, counted, *stop)

    return runner


def _limit(config: Config) -> float:
    """Worker-seconds that may be spent; 0 = no bound."""
    settings = config.perturb
    hours = [settings.budget_hours] if settings.budget_hours else []
    hours += [settings.budget_cost / settings.price] if settings.budget_cost else []
    return min(hours, default=0.0) * cost.HOUR


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a campaign came to."""

    scored: Ints
    """Targets with exact shifts under every operation, ascending."""
    skipped: Ints
    """Left out because the screen ranks them low."""
    beyond: Ints
    """Left out because the budget was spent."""
    parts: list[str]
    """Keys of the parts that hold the shifts, by operation, in order."""
    states: pa.Table
    estimate_OK: Floats | None
    agreement: dict[str, Any]
    """By operation, what the sample says of the screen."""
    figures: dict[str, float]
    warnings: list[str]


@dataclass(kw_only=True, slots=True)
class Campaign:
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

        def work(what: str, units: list[Unit], states: Floats | None) -> bool:
            number, whole = self._missing(f"perturb: {what}", units, states, runner, meter)
            figures[f"{what}_parts_computed"] = figures.get(f"{what}_parts_computed", 0.0) + number
            return whole

        first = perturb.state_units(plan, corpus)
        self._needed(work("states", first, None), "the state embeddings")
        means, table = effects.state_means([_part(self.folder, unit.key) for unit in first], len(plan.states))
        order, chosen = np.arange(len(plan.targets)), len(plan.targets)
        blocks = perturb.gene_blocks(order, settings.block_genes)
        estimate_OK, agreed, warnings = None, {}, []
        if settings.screen:
            estimate_OK = self._screen(functools.partial(work, "screen"), means)
            rng = np.random.default_rng([self.config.seed, 93])
            found = shortlist.shortlist(estimate_OK, top=settings.screen, sample=settings.screen_sample, rng=rng)
            blocks = [
                block
                for part in (found.sample, found.top, found.rest)
                for block in perturb.gene_blocks(part, settings.block_genes)
            ]
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
                chosen = len(found.sample) + len(found.top)
                warnings.append(f"{chosen} of {len(plan.targets)} genes are scored exactly: the best by a screen, and "
                                f"{len(found.sample)} drawn at random; ranks, nulls and false discovery rates are among these")  # fmt: skip
            order = np.concatenate([found.sample, found.top, found.rest])
        held, num = [], 0
        for block in blocks:
            if num < chosen:
                held.append(block)
            num += len(block)
        units = self._gene_units(held)
        work("genes", units, means)
        there = set(storage.list_dir(self.folder))
        open_blocks = {perturb.gene_block(unit) for unit in units if f"{unit.key}.parquet" not in there}
        scored = [block for g, block in enumerate(held) if g not in open_blocks]
        self._needed(bool(scored), "the first block of genes")
        beyond = [block for g, block in enumerate(held) if g in open_blocks]
        self._save()
        left = np.sort(np.concatenate([*beyond, np.empty(0, np.int64)]))
        if len(left):
            warnings.append(f"the budget was spent before {len(left)} genes were scored (see not_scored.parquet)")
        return Outcome(
            scored=np.sort(np.concatenate(scored)),
            skipped=np.sort(order[sum(map(len, held)) :]),
            beyond=left,
            parts=sorted(unit.key for unit in units if perturb.gene_block(unit) not in open_blocks),
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
            for unit in perturb.gene_units(self.plan, self.corpus, settings, operation, blocks, best_first=ordered)
        ]
        return sorted(units, key=perturb.gene_block) if ordered else units

    def _screen(self, work: Callable[[list[Unit], Floats], bool], means: Floats) -> Floats:
        """Mean estimates by operation and target."""
        every = [np.arange(len(self.plan.targets))]
        by_operation = {
            name: perturb.gene_units(self.plan, self.corpus, self.config.perturb, f"screen-{name}", every)
            for name in self.config.perturb.operations
        }
        self._needed(work([unit for units in by_operation.values() for unit in units], means), "the screen")
        rows = []
        for units in by_operation.values():
            table = pa.concat_tables([_part(self.folder, unit.key) for unit in units])
            values, targets = table["estimate"].to_numpy().astype(np.float64), table["target"].to_numpy()
            rows.append(stats.mean_by(values, targets.astype(np.int64), len(self.plan.targets)))
        return np.stack(rows)

    def _agreement(self, units: list[Unit], sample: Ints, estimate_OK: Floats) -> dict[str, shortlist.Agreement]:
        """Estimates against exact shifts of the sample, by operation."""
        goal = self.plan.goal
        found = {}
        for o, operation in enumerate(self.config.perturb.operations):
            table = pa.concat_tables([_part(self.folder, unit.key) for unit in units if unit.operation == operation])
            shifts, targets = table[f"shift_{goal}"].to_numpy().astype(np.float64), table["target"].to_numpy()
            exact_K = stats.mean_by(shifts, targets.astype(np.int64), len(self.plan.targets))
            found[operation] = shortlist.agreement(estimate_OK[o, sample], exact_K[sample])
        return found

    def _needed(self, there: bool, what: str) -> None:  # noqa: FBT001 (a predicate)
        if not there:
            self._save()
            msg = (
                f"perturb.budget_hours: {self.spend.total / cost.HOUR:.3g} worker-hours were spent before {what} "
                f"came to an end; what was done is kept: run again with a larger budget"
            )
            raise UserError(msg)

    def _save(self) -> None:
        self.spend.update()
        self.saved = time.monotonic()
        cost.save(self.folder, self.session, {"worker": self.spend.session})

    def _missing(
        self, what: str, work: list[Unit], states: Floats | None, runner: Runner, meter: Meter
    ) -> tuple[float, bool]:
        """Compute the missing parts; returns their number, and whether all parts are there now."""
        there = set(storage.list_dir(self.folder))
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
            key, reason = min(dead.items())
            msg = (
                f"{what}: {len(dead)} of {len(work)} parts failed every time; {key}: {reason}. The others are kept: run again "
                f"to retry only these"
            )
            raise UserError(msg)
        return float(finished), finished == len(missing)


def _loop(make: Callable[[], Callable[[Any], Any]]) -> Runner:
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


def _part(folder: str, key: str) -> pa.Table:
    return storage.read_table(storage.join(folder, f"{key}.parquet"))


def _publish(uri: str, record: artifacts.Record, campaign: Campaign, outcome: Outcome) -> None:
    """Test, write the tables, finish the record."""
    config, corpus, plan, folder = campaign.config, campaign.corpus, campaign.plan, campaign.folder
    states, settings = outcome.states, campaign.config.perturb
    whole, all_scored = plan, len(outcome.scored) == len(plan.targets)
    pairs = {}
    for operation in settings.operations:
        parts = pa.concat_tables([_part(folder, key) for key in outcome.parts if key.startswith(f"{operation}-")])
        pairs[operation] = effects.Pairs.from_table(parts, len(plan.states))
    if not all_scored:
        plan = replace(plan, targets=tuple(whole.targets[k] for k in outcome.scored.tolist()))
        pairs = {
            operation: replace(found, target_P=np.searchsorted(outcome.scored, found.target_P))
            for operation, found in pairs.items()
        }
    expressed = {
        state.name: effects.expression(corpus, state.cells) for state in plan.states if state.name in ("start", "goal")
    }
    genes = effects.gene_table(plan, pairs, expressed, config)
    nulls = effects.calibration(plan, pairs, config)
    names = [plan.states[i].name for i in states["state"].to_pylist()]
    donors = ["" if d < 0 else plan.donors[d] for d in states["donor"].to_pylist()]
    vectors = states.set_column(0, "state", pa.array(names)).set_column(1, "donor", pa.array(donors))
    files = {}
    tables = [("genes.parquet", genes), ("states.parquet", vectors), ("calibration.parquet", nulls)]
    if not all_scored or outcome.estimate_OK is not None:
        tables.append(("not_scored.parquet", _not_scored(whole, outcome, settings.operations)))
    for name, table in tables:
        size, digest = storage.write_table(storage.join(uri, name), table)
        files[name] = {"bytes": size, "sha256": digest}
    counts = {
        "cells": len(plan.cells_N),
        "genes": len(plan.targets),
        "not_scored": len(outcome.beyond),
        "screened_out": len(outcome.skipped),
        "sentences": sum(len(p.target_P) for p in pairs.values()),
        "states": {state.name: len(state.cells) for state in plan.states},
        "parts": len(set(storage.list_dir(folder)) - {"cost"}),
    }
    details = {
        "vocabulary": corpus.vocabulary.hash,
        "variant": config.perturb.variant,
        "warnings": [*plan.warnings, *outcome.warnings],
        "screen": outcome.agreement,
        "budget": {"limit_hours": campaign.spend.limit / cost.HOUR, "worker_hours": campaign.spend.total / cost.HOUR},
        "states": {state.name: state.expression for state in plan.states},
        "parts": folder.removeprefix(uri).strip("/"),
        "differential_expression": "rank scores, 1 - rank / length, Welch's t over all cells of goal against start",
    }
    artifacts.finish(uri, record, counts=counts, files=files, details=details)


def _not_scored(plan: Design, outcome: Outcome, operations: tuple[str, ...]) -> pa.Table:
    """Every target by operation: its estimate, and whether it was scored exactly, screened out or beyond the budget."""
    num = len(plan.targets)
    fate = np.full(num, "scored", dtype=object)
    fate[outcome.skipped] = "screened out"
    fate[outcome.beyond] = "beyond the budget"
    tables = []
    for o, operation in enumerate(operations):
        estimate_K = np.full(num, math.nan) if outcome.estimate_OK is None else outcome.estimate_OK[o]
        columns: dict[str, Any] = {
            "gene": [target.gene for target in plan.targets],
            "symbol": [target.symbol for target in plan.targets],
            "species": [target.species for target in plan.targets],
            "operation": [operation] * num,
            "estimate": estimate_K,
            "fate": fate.tolist(),
        }
        tables.append(pa.table(columns).take(np.argsort(-np.nan_to_num(estimate_K, nan=-np.inf), kind="stable")))
    return pa.concat_tables(tables)


def dry_run(config: Config, *, local: bool = False) -> str:
    """What a run will take, as text; nothing is written.

    Args:
        config: the run's config.
        local: measure in this process, without Ray.
    """
    source = config.inputs.corpus or storage.join(config.output, "corpus")
    weights = config.inputs.checkpoint or storage.join(config.output, "pretrain")
    corpus, (encoder, trained) = Corpus(source), checkpoint.load_encoder(weights)
    checkpoint.require_vocabulary(trained, corpus.vocabulary.hash, "the corpus")
    plan = perturb.design(corpus, config)
    max_len = min(int(corpus.record.details["max_len"]), encoder.row.max_positions)
    parts = forecast.forecast(plan, corpus, config.perturb, encoder.row, max_len)
    rate, how = config.perturb.worker_flops, "as perturb.worker_flops says"
    if not rate:
        make = functools.partial(Scorer, config, corpus=source, weights=weights, folder="")
        found: list[float] = []
        items = {"probe": (perturb.probe_unit(plan), None)}

        def take(_: str, result: Done) -> None:
            found.append(result.cost)

        if local:
            _loop(make)(items, take)
        else:
            size = Size(max_actors=1, cpus=config.compute.cpus_per_worker, gpus=config.compute.gpus_per_worker)
            with session(config), Pool(make, size) as pool:
                dead = pool.run(items, take)
            if dead:
                msg = f"perturb: the probe failed: {dead['probe']}"
                raise UserError(msg)
        rate, how = found[0], "measured on one worker just now"
    return forecast.text(
        parts, plan, rate=rate, how=how, num_workers=config.compute.num_workers, price=config.perturb.price
    )

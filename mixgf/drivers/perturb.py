"""Perturbation over an elastic actor pool. Parts in storage are the ledger: what is there is never computed again."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from mixgf import artifacts, checkpoint, effects, known, perturb, storage, tracking
from mixgf.config import Config, UserError, to_dict
from mixgf.dataset import Corpus
from mixgf.drivers.metrics import Meter, watch
from mixgf.drivers.pool import Pool, Size
from mixgf.drivers.session import session
from mixgf.perturb import Design, Scorer, Unit
from mixgf.progress import Progress, say, warn

KIND, SCHEMA = "perturbation", 2
_NO_RESULT = {"micro_tokens", "known", "published"}
"""Settings that change no result and so stay out of the fingerprint."""

Runner = Callable[[Mapping[str, Any], Callable[[str, Any], None]], dict[str, str]]
"""Works through items (key to item), calls back with every result, returns key to reason of those that failed."""


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
        say(f"perturb: already there, {uri}")
        _say_known(uri, config)
        return uri
    known.read(config)  # a list that cannot be read is said before the work, not after it
    plan = perturb.design(corpus, config)  # before the folder is claimed: a wrong expression leaves nothing behind
    artifacts.begin(uri, record)
    for text in plan.warnings:
        warn(f"perturb: {text}")
    folder = storage.join(uri, "parts", record.fingerprint[:16])
    work = perturb.units(plan, corpus, config.perturb)
    make = functools.partial(Scorer, config, corpus=source, weights=weights, folder=folder)
    with tracking.stage(config, "perturb", settings, record.fingerprint) as tracked:
        if local:
            figures, table = _complete(work, plan, folder, _loop(make), Meter("perturb", tracked.id))
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
                figures, table = _complete(work, plan, folder, _metered(pool, watched.meter), watched.meter)
                watched.made(genes=len(plan.targets), cells=len(plan.cells_N))
        _publish(uri, record, config=config, corpus=corpus, plan=plan, states=table, folder=folder, work=work)
        tracked.log({**figures, "genes": float(len(plan.targets)), "cells": float(len(plan.cells_N))})
    say(f"perturb: {len(plan.targets):,} genes in {len(plan.cells_N):,} cells, {uri}/genes.parquet")
    _say_known(uri, config)
    return uri


def _say_known(uri: str, config: Config) -> None:
    """Print what is known of the genes beside what was found, where the config asks for it."""
    if config.perturb.known or config.perturb.published:
        for line in known.text(storage.read_table(storage.join(uri, "genes.parquet")).to_pandas(), config).splitlines():
            say(line)


def _metered(pool: Pool, meter: Meter) -> Runner:
    """The pool's `run`, which tells the boards how many actors there are."""

    def runner(items: Mapping[str, Any], done: Callable[[str, Any], None]) -> dict[str, str]:
        def counted(key: str, result: Any) -> None:
            meter.set("actors", pool.num_actors, state="wanted")
            meter.set("actors", pool.num_up, state="up")
            done(key, result)

        return pool.run(items, counted)

    return runner


def _complete(
    work: list[Unit], plan: Design, folder: str, runner: Runner, meter: Meter
) -> tuple[dict[str, float], pa.Table]:
    """Compute the missing parts: state embeddings first, then the shifts towards them."""
    first = [unit for unit in work if unit.operation == "embed"]
    figures = _run_missing("perturb: states", first, folder, None, runner, meter=meter)
    means, table = effects.state_means([_part(folder, unit) for unit in first], len(plan.states))
    rest = [unit for unit in work if unit.operation != "embed"]
    return figures | _run_missing("perturb: genes", rest, folder, means, runner, meter=meter), table


def _run_missing(
    what: str, work: list[Unit], folder: str, states: np.ndarray | None, runner: Runner, *, meter: Meter
) -> dict[str, float]:
    there = set(storage.list_dir(folder))
    missing = {unit.key: (unit, states) for unit in work if f"{unit.key}.parquet" not in there}
    total = sum(unit.cost for unit in work)
    done = total - sum(unit.cost for unit, _ in missing.values())
    if 0 < len(missing) < len(work):
        say(f"{what}: {len(work) - len(missing)} of {len(work)} parts are there already")
    dead: dict[str, str] = {}
    finished = 0
    if missing:
        with Progress(what, total, "tokens", done=done) as progress:

            def finish(_: str, cost: float) -> None:
                nonlocal done, finished
                done, finished = done + cost, finished + 1
                progress.update(done)
                meter.units(waiting=len(missing) - finished, done=finished)

            dead = runner(missing, finish)
    if dead:
        key, reason = min(dead.items())
        msg = (
            f"{what}: {len(dead)} of {len(work)} parts failed every time; {key}: {reason}. The others are kept: run again "
            f"to retry only these"
        )
        raise UserError(msg)
    return {f"{what.split(': ')[1]}_parts_computed": float(len(missing))}


def _loop(make: Callable[[], Callable[[Any], Any]]) -> Runner:
    """One worker in this process: what any pool must agree with."""
    workers: list[Callable[[Any], Any]] = []

    def runner(items: Mapping[str, Any], done: Callable[[str, Any], None]) -> dict[str, str]:
        if not workers:
            workers.append(make())
        for key, item in items.items():
            done(key, workers[0](item))
        return {}

    return runner


def _part(folder: str, unit: Unit) -> pa.Table:
    return storage.read_table(storage.join(folder, f"{unit.key}.parquet"))


def _publish(
    uri: str,
    record: artifacts.Record,
    *,
    config: Config,
    corpus: Corpus,
    plan: Design,
    states: pa.Table,
    folder: str,
    work: list[Unit],
) -> None:
    """Test, write the tables, finish the record."""
    pairs = {}
    for operation in config.perturb.operations:
        parts = pa.concat_tables([_part(folder, unit) for unit in work if unit.operation == operation])
        pairs[operation] = effects.Pairs.from_table(parts, len(plan.states))
    expressed = {
        state.name: effects.expression(corpus, state.cells) for state in plan.states if state.name in ("start", "goal")
    }
    genes = effects.gene_table(plan, pairs, expressed, config)
    nulls = effects.calibration(plan, pairs, config)
    names = [plan.states[i].name for i in states["state"].to_pylist()]
    donors = ["" if d < 0 else plan.donors[d] for d in states["donor"].to_pylist()]
    vectors = states.set_column(0, "state", pa.array(names)).set_column(1, "donor", pa.array(donors))
    files = {}
    for name, table in (("genes.parquet", genes), ("states.parquet", vectors), ("calibration.parquet", nulls)):
        size, digest = storage.write_table(storage.join(uri, name), table)
        files[name] = {"bytes": size, "sha256": digest}
    counts = {
        "cells": len(plan.cells_N),
        "genes": len(plan.targets),
        "sentences": sum(len(p.target_P) for p in pairs.values()),
        "states": {state.name: len(state.cells) for state in plan.states},
        "parts": len(work),
    }
    details = {
        "vocabulary": corpus.vocabulary.hash,
        "variant": config.perturb.variant,
        "warnings": list(plan.warnings),
        "states": {state.name: state.expression for state in plan.states},
        "parts": folder.removeprefix(uri).strip("/"),
        "differential_expression": "rank scores, 1 - rank / length, Welch's t over all cells of goal against start",
    }
    artifacts.finish(uri, record, counts=counts, files=files, details=details)

"""Perturbation on an elastic pool of workers. A part that is in storage is not computed again.

The way: state embeddings; with a screen, estimates of all genes, then exact scores of a random sample that says whether the
estimates can be trusted; then the genes that are left to score, best first where there is an order. A budget may end it
early: what was scored by then is published, with a list of the rest, and a larger budget goes on from there. Such a table is
an artifact of another kind with a fingerprint of its own, so no later stage takes it for a finished perturbation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from mixgf.config.fields import content_of
from mixgf.config.parse import fingerprint
from mixgf.config.run import Config
from mixgf.console import say, warn
from mixgf.corpus.reader import Corpus
from mixgf.distributed.executor import RayExecutor
from mixgf.distributed.metrics import Meter, watch
from mixgf.encoder import checkpoint
from mixgf.encoder.bert import Encoder
from mixgf.errors import UserError
from mixgf.execution import Executor, LocalExecutor, Task
from mixgf.perturbation import (
    cost_estimate,
    gene_responses,
    gene_table,
    group_design,
    hits,
    readability,
    reference_genes,
    scoring_tasks,
)
from mixgf.perturbation.group_design import Design
from mixgf.perturbation.scoring_tasks import ScoringWorker
from mixgf.stages.perturb_phases import Outcome, Phases, part, score
from mixgf.storage import artifacts, files
from mixgf.tracking import cost, mlflow_runs

KIND, PARTIAL, SCHEMA = "perturbation", "partial perturbation", 6


def run(config: Config, *, executor: Executor | None = None) -> str:
    """Perturb, test and publish; returns the artifact's URI. `executor` runs the tasks; None = Ray."""
    executor = executor or RayExecutor(config)
    uri = files.join(config.output, "perturb")
    source = config.inputs.corpus or files.join(config.output, "corpus")
    weights = config.inputs.checkpoint or files.join(config.output, "pretrain")
    trained = artifacts.require(weights, checkpoint.KIND)
    corpus = Corpus(source, max_len=int(trained.details["model"]["max_positions"]))
    checkpoint.require_sentences(trained, corpus)
    if int(trained.details["model"]["num_layers"]) == 0:
        msg = f"inputs.checkpoint = {weights!r}: an encoder without layers gives genes no context; name one with layers"
        raise UserError(msg)
    settings = content_of(config.perturb)
    parents = {"corpus": corpus.record.fingerprint, "checkpoint": trained.fingerprint}
    record = artifacts.plan(
        KIND, SCHEMA, {"perturb": settings, "seed": config.seed, "precision": config.train.precision}, parents
    )
    there = artifacts.find(uri)
    if there is not None and record.fingerprint in (there.fingerprint, there.details.get("completed_by")):
        left, limit = there.counts.get("not_scored", 0), _limit(config)
        if not left or (limit and limit <= there.details["budget"]["limit_hours"] * cost.HOUR):
            say(
                f"perturb: already there, {uri}"
                + (f"; {left} genes were beyond the budget, give a larger one" if left else "")
            )
            _say_known(uri, config)
            return uri
    reference_genes.read_reference_genes(config)  # a list that cannot be read is said before the work, not after it
    plan = group_design.build_design(
        corpus, config
    )  # before the folder is claimed: a wrong expression leaves nothing behind
    # what a smaller budget scored stays until more of it is
    if not artifacts.begin(uri, record, replaces=lambda older: older.details.get("completed_by") == record.fingerprint):
        return uri
    folder = files.join(uri, "parts", record.fingerprint[:16])
    make = functools.partial(ScoringWorker, config, corpus=source, weights=weights, folder=folder)
    with mlflow_runs.stage(config, "perturb", settings, record.fingerprint) as tracked:
        spend = cost.Spend(_limit(config), before=sum(cost.load(folder).values()))
        phases = Phases(config=config, plan=plan, corpus=corpus, folder=folder, spend=spend, tracked=tracked)
        tracked.corpus(corpus.uri, "perturbation")
        with executor.session(), watch(config, "perturb", tracked, uri) as watched, executor.pool(make) as pool:
            spend.num_workers = lambda: pool.num_up  # an actor that waits for a node costs nothing
            outcome = phases.complete(pool, watched.meter)
            watched.made(genes=len(outcome.scored), cells=len(plan.cells_N))
        made = _publish(uri, record, phases, outcome)
        genes = made.by_name["genes"].to_pandas()
        tracked.log(outcome.figures | hits.count_hits(genes))
        tracked.summary({"genes": float(len(outcome.scored)), "cells": float(len(plan.cells_N))})
        tracked.table("genes", made.by_name["genes"])
    for text in made.warnings:
        warn(f"perturb: {text}")
    of = f" of {len(outcome.scored) + len(outcome.beyond):,}" if len(outcome.beyond) else ""
    say(f"perturb: {len(outcome.scored):,}{of} genes in {len(plan.cells_N):,} cells, {uri}/genes.parquet")
    for line in hits.control_lines(genes):
        say(f"perturb: {line}")
    _say_known(uri, config)
    return uri


def in_memory(
    config: Config, corpus: Corpus, encoder: Encoder, folder: str, *, start: Callable[[], Encoder]
) -> tuple[dict[str, pa.Table], list[str]]:
    """Perturb the cells of an open corpus in this process.

    Args:
        config: its sections perturb, classify (for the label), train and the seed count.
        corpus: the sentences.
        encoder: trained, on the device that computes.
        folder: an empty local folder for the parts.
        start: gives the encoder before training, if it is asked for (`perturb.controls`).

    Returns:
        The tables that `run` publishes, by name, and the warnings.
    """
    reference_genes.read_reference_genes(config)
    plan = group_design.build_design(corpus, config)
    phases = Phases(config=config, plan=plan, corpus=corpus, folder=folder, spend=cost.Spend(_limit(config)))
    twin = start() if config.perturb.controls else None
    make = functools.partial(ScoringWorker, config, corpus=corpus, weights=encoder, folder=folder, twin=twin)
    with LocalExecutor().pool(make) as pool:
        outcome = phases.complete(pool, Meter("perturb", ""))
    made = tables_of(phases, outcome)
    return made.by_name, made.warnings


def _say_known(uri: str, config: Config) -> None:
    """Print what is known of the genes beside what was found, where the config asks for it."""
    if config.perturb.reference_genes or config.perturb.published:
        for line in reference_genes.comparison_text(
            artifacts.read_artifact_table(uri, "genes").to_pandas(), config
        ).splitlines():
            say(line)


def _limit(config: Config) -> float:
    """Worker-seconds that may be spent; 0 = no bound."""
    settings = config.perturb
    hours = [settings.budget_hours] if settings.budget_hours else []
    hours += [settings.budget_cost / settings.price] if settings.budget_cost else []
    return min(hours, default=0.0) * cost.HOUR


@dataclass(frozen=True, kw_only=True, slots=True)
class Tables:
    """The tested tables of the genes that were scored."""

    plan: Design
    """Design of these genes."""
    pairs: dict[str, gene_table.Pairs]
    """Their shifts by operation."""
    by_name: dict[str, pa.Table]
    """`genes`, `states`, `calibration`, and those that the settings ask for."""
    warnings: list[str]
    origin: str
    """What differential expression was made of; empty without a goal."""


def tables_of(phases: Phases, outcome: Outcome) -> Tables:
    """Make the tested tables of the genes that were scored."""
    config, corpus, plan, folder = phases.config, phases.corpus, phases.plan, phases.folder
    states, settings = outcome.states, phases.config.perturb
    whole, all_scored = plan, len(outcome.scored) == len(plan.targets)

    def read(keys: list[str], prefix: str) -> dict[str, gene_table.Pairs]:
        tables = {
            operation: pa.concat_tables([part(folder, key) for key in keys if key.startswith(f"{prefix}{operation}-")])
            for operation in settings.operations
        }
        return {name: gene_table.Pairs.from_table(table, len(plan.embedded)) for name, table in tables.items()}

    pairs = read(outcome.parts, "")
    twin = read(outcome.twin_parts, scoring_tasks.TWIN) if outcome.twin_parts else None
    if not all_scored:
        drawn = set(outcome.drawn.tolist())
        marked = tuple(replace(t, drawn=t.drawn or k in drawn) for k, t in enumerate(whole.targets))
        marked_plan = replace(whole, targets=marked)
        twin = gene_table.keep_targets(marked_plan, twin, outcome.scored)[1] if twin is not None else None
        plan, pairs = gene_table.keep_targets(marked_plan, pairs, outcome.scored)
    units = scoring_tasks.count_tasks(plan, corpus, config.seed)
    expressed = scoring_tasks.read_expression(plan, corpus, units, folder)
    readable = readability.measure(corpus, plan)
    chosen_from = len(whole.targets) if settings.screen and not all_scored else 0
    matrix = {"responses": _responses(phases, outcome)} if whole.responding else {}
    genes = gene_table.build_gene_table(
        plan, pairs, expressed, config, num_tests=chosen_from, twin=twin, readable=readable
    )
    nulls = gene_table.calibrate_tests(plan, pairs, config)
    names = [plan.states[i].name for i in states["state"].to_pylist()]
    donors = ["" if d < 0 else plan.donors[d] for d in states["donor"].to_pylist()]
    vectors = states.set_column(0, "state", pa.array(names)).set_column(1, "donor", pa.array(donors))
    tables = {"genes": genes, "states": vectors, "calibration": nulls} | matrix
    if not all_scored or outcome.estimate_OK is not None:
        tables["not_scored"] = _not_scored(whole, outcome, settings.operations)
    max_len = int(corpus.lengths_N[plan.cells_N].max())
    warnings = [*whole.warnings, *outcome.warnings, *readability.warnings(plan, readable, max_len)]
    if expressed is not None and expressed.covariance_SV is None:
        warnings.append(
            "the sources' raw counts cannot be read: differential expression is of ranks, and there is no covariance control"
        )
    if cut := readability.cut_warning(corpus, plan, settings.operations):
        warnings.append(cut)
    origin = expressed.origin if expressed is not None else ""
    return Tables(plan=plan, pairs=pairs, by_name=tables, warnings=warnings, origin=origin)


def _publish(uri: str, record: artifacts.Record, phases: Phases, outcome: Outcome) -> Tables:
    """Test, write the tables, finish the record."""
    config, corpus, folder = phases.config, phases.corpus, phases.folder
    made = tables_of(phases, outcome)
    plan, pairs, tables = made.plan, made.pairs, made.by_name
    matrix = [tables["responses"]] if "responses" in tables else []
    if artifacts.find(uri) is not None:
        artifacts.reopen(uri)
    checksums = artifacts.write_tables(uri, tables)
    counts = {
        "cells": len(plan.cells_N),
        "genes": len(plan.targets),
        "not_scored": len(outcome.beyond),
        "screened_out": len(outcome.skipped),
        "sentences": sum(len(p.target_P) for p in pairs.values()),
        "states": {state.name: len(state.cells) for state in plan.states},
        "parts": len(set(files.list_dir(folder)) - {"cost", scoring_tasks.RESPONSES}),
        "responses": sum(table.num_rows for table in matrix),
    }
    details = {
        "vocabulary": corpus.vocabulary.hash,
        "variant": config.perturb.variant,
        "warnings": made.warnings,
        "screen": outcome.agreement,
        "budget": {"limit_hours": phases.spend.limit / cost.HOUR, "worker_hours": phases.spend.total / cost.HOUR},
        "states": {state.name: state.expression for state in plan.states},
        "parts": folder.removeprefix(uri).strip("/"),
        "differential_expression": made.origin,
    }
    if len(outcome.beyond):
        scored = fingerprint({"targets": outcome.scored.tolist()})
        details["completed_by"] = record.fingerprint
        record = artifacts.plan(PARTIAL, SCHEMA, record.config | {"scored": scored}, record.parents)
    artifacts.finish(uri, record, counts=counts, files=checksums, details=details)
    return made


def _responses(phases: Phases, outcome: Outcome) -> pa.Table:
    """The matrix of perturbed by responding genes, of the operations' parts."""
    folder = files.join(phases.folder, scoring_tasks.RESPONSES)
    keys = {
        operation: [key for key in outcome.parts if key.startswith(f"{operation}-")]
        for operation in phases.config.perturb.operations
    }
    return gene_responses.response_table(
        {name: [part(folder, key) for key in keys[name]] for name in keys}, phases.plan
    )


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


def dry_run(config: Config, *, executor: Executor | None = None) -> str:
    """What a run will take, as text; nothing is written. `executor` measures the speed of one worker; None = Ray."""
    source = config.inputs.corpus or files.join(config.output, "corpus")
    weights = config.inputs.checkpoint or files.join(config.output, "pretrain")
    encoder, trained = checkpoint.load_encoder(weights)
    corpus = Corpus(source, max_len=encoder.sizes.max_positions)
    checkpoint.require_sentences(trained, corpus)
    plan = group_design.build_design(corpus, config)
    max_len = min(int(corpus.record.details["max_len"]), encoder.sizes.max_positions)
    parts = cost_estimate.estimate_work(plan, corpus, config.perturb, encoder.sizes, max_len)
    rate, how = config.perturb.worker_flops, "as perturb.worker_flops says"
    if not rate:
        executor = executor or RayExecutor(config)
        probe = Task(part="", function=score, args=(scoring_tasks.probe_task(plan), None))
        make = functools.partial(ScoringWorker, config, corpus=source, weights=weights, folder="")
        with executor.session(), executor.pool(make, most=1) as pool:
            (receipt,) = pool.run([probe])
        if receipt.error:
            msg = f"perturb: the probe failed: {receipt.error}"
            raise UserError(msg)
        rate, how = receipt.result.cost, "measured on one worker just now"
    return cost_estimate.estimate_text(
        parts, plan, rate=rate, how=how, num_workers=config.compute.num_workers, price=config.perturb.price
    )

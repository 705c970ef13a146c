"""`compare`: what the joint model is for, as tables of one artifact.

Parts of the comparison are entries of `PARTS`: the tasks that each needs first, and then its tables. Classifications
between species are made first, by the stage that makes them, unless they are there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pyarrow as pa

from mixgf.classification.workspace import BLOCK_CELLS, Workspace
from mixgf.comparison import (
    conserved_response,
    gene_networks,
    shift_selection,
    shift_tables,
    space_tables,
    transfer_tables,
)
from mixgf.comparison.encoder_sets import ComparisonContext, EncoderSet, encoder_sets
from mixgf.config.fields import content_of
from mixgf.config.parse import to_dict
from mixgf.config.run import Config
from mixgf.console import say
from mixgf.corpus.reader import Corpus
from mixgf.distributed.executor import ALL_CPUS, RayExecutor
from mixgf.distributed.metrics import Meter, watch
from mixgf.encoder import checkpoint
from mixgf.errors import UserError
from mixgf.execution import Executor, Shared, Task
from mixgf.stages import classify
from mixgf.stages.fan_out import fan_out
from mixgf.storage import artifacts, files, layout
from mixgf.storage.artifacts import Record
from mixgf.tracking import mlflow_runs

KIND, SCHEMA = "comparison", 2


def _no_tasks(_: ComparisonContext) -> list[Task]:
    return []


@dataclass(frozen=True, kw_only=True)
class Part:
    """One question of the comparison."""

    tables: Callable[[ComparisonContext], dict[str, pd.DataFrame]]
    """Its tables by name; each becomes NAME.parquet, and `compare_NAME` in `page.Run.tables`."""
    tasks: Callable[[ComparisonContext], list[Task]] = _no_tasks
    """What is computed first, in parallel; weights are seconds of one core."""


def run(config: Config, *, executor: Executor | None = None) -> str:
    """Answer every part; returns the artifact's URI. `executor` runs the tasks; None = Ray."""
    uri = files.join(config.output, "compare")
    config = replace(config, tracking=replace(config.tracking, uri=mlflow_runs.uri(config)))
    context = ComparisonContext(config=config, uri=uri, encoder_sets=encoder_sets(config, uri))
    _require(context)
    executor = executor or RayExecutor(config, in_flight=ALL_CPUS)
    with executor.session():
        return _run(context, executor)


def _run(context: ComparisonContext, executor: Executor) -> str:
    config, uri = context.config, context.uri
    mlflow_runs.claim(config)
    for encoder_set in context.encoder_sets:
        if encoder_set.classification == files.join(encoder_set.config.output, "classify"):
            classify.run(encoder_set.config, executor=executor)
    record = _plan(context)
    if not artifacts.begin(uri, record):
        say(f"compare: {uri} is already there")
        return uri
    with (
        mlflow_runs.stage(config, "compare", to_dict(config.compare), record.fingerprint) as tracked,
        watch(config, "compare", tracked, uri) as watched,
    ):
        for corpus in dict.fromkeys(encoder_set.paths.corpus for encoder_set in context.encoder_sets):
            tracked.corpus(corpus, "comparison")
        found = _tables(context, executor, watched.meter)
        checksums = artifacts.write_tables(
            uri, {n: pa.Table.from_pandas(f, preserve_index=False) for n, f in found.items()}
        )
        for name, frame in found.items():
            if len(frame):
                tracked.table(name, pa.Table.from_pandas(frame.head(mlflow_runs.SHOWN_ROWS), preserve_index=False))
        for encoder_set in context.encoder_sets:
            layout.remove_own(encoder_set.paths.output, "classification", scratch=True)
        encoders = [w.space_name(e) for w in context.encoder_sets for e in w.encoders]
        classifications = {w.space_name(""): w.classification for w in context.encoder_sets}
        artifacts.finish(
            uri, record, counts={name: len(frame) for name, frame in found.items()}, files=checksums,
            details={"encoders": encoders, "classifications": classifications},
        )  # fmt: skip
    say(f"compare: {uri}: {', '.join(f'{name} ({len(frame):,})' for name, frame in found.items())}")
    return uri


def _require(context: ComparisonContext) -> None:
    """Refuse what cannot be compared, before anything is made."""
    given = context.config.inputs.classification
    if given:
        there = artifacts.require(given, "classification")
        mine = artifacts.require(context.encoder_sets[0].paths.corpus, "corpus").fingerprint
        wrong = "of another corpus" if there.parents["corpus"] != mine else ""
        wrong = wrong or ("without splits between species" if "species" not in there.config["asked"]["splits"] else "")
        wrong = wrong or ("without measured spaces" if "integration" not in there.config["models"] else "")
        if wrong:
            msg = f"inputs.classification = {given}: {wrong}; make one with classify.splits=species, classify.integration_cells=3000, or leave it empty"
            raise UserError(msg)
    for encoder_set in context.encoder_sets:
        corpus = Corpus(encoder_set.paths.corpus)
        trained = artifacts.require(encoder_set.paths.checkpoint, checkpoint.KIND, checkpoint.SCHEMA)
        checkpoint.require_sentences(trained, corpus, f"compare: {encoder_set.paths.checkpoint}")
        if len(corpus.species) < 2:
            msg = f"compare: {corpus.uri} holds {corpus.species[0]} only; prepare a corpus of two species"
            raise UserError(msg)
        encoder_set.shifts  # noqa: B018 (refuses wrong ones)
    conserved_response.load_perturbations(context.config)


def _plan(context: ComparisonContext) -> Record:
    config, parents = context.config, dict[str, str]()
    for name, uri in config.compare.responses.items():
        parents[f"perturbation of {name}"] = artifacts.require(uri, "perturbation").fingerprint
    for encoder_set in context.encoder_sets:
        end = f" of {encoder_set.name}" if encoder_set.name else ""
        for role, uri, kind in (
            ("corpus", encoder_set.paths.corpus, "corpus"), ("checkpoint", encoder_set.paths.checkpoint, checkpoint.KIND),
            ("classification", encoder_set.classification, "classification"),
        ):  # fmt: skip
            parents[role + end] = artifacts.require(uri, kind).fingerprint
    decides = {
        "compare": content_of(config.compare) | {"encoders": len(context.encoder_sets)},
        "embed": to_dict(config.embed),
        "seed": config.seed,
    }
    return artifacts.plan(KIND, SCHEMA, decides, parents)


def _tables(context: ComparisonContext, executor: Executor, meter: Meter) -> dict[str, pd.DataFrame]:
    """Tables of all parts, after their tasks."""
    tasks = [task for part in PARTS.values() for task in part.tasks(context)]
    fan_out("compare", tasks, executor.run, meter=meter, longest_first=True)
    found: dict[str, pd.DataFrame] = {}
    for part in PARTS.values():
        made = part.tables(context)
        assert not set(made) & set(found), "every table has one part"
        found |= made
    return found


def _matching_tasks(context: ComparisonContext) -> list[Task]:
    """Vectors by every encoder, and counts of every source, of the cells of all shifts."""
    made: list[Task] = []
    for encoder_set in context.encoder_sets if context.config.compare.shifts else ():
        made += _of_encoder_set(context, encoder_set)
    return made


def _of_encoder_set(context: ComparisonContext, encoder_set: EncoderSet) -> list[Task]:
    cells, made = shift_selection.cells_of(encoder_set.shifts), []
    workspace, paths = encoder_set.workspace(cells), encoder_set.paths
    shared = Shared(workspace)
    for encoder in encoder_set.encoders:
        for number, start in enumerate(range(0, len(cells), BLOCK_CELLS)):
            mine = cells[start : start + BLOCK_CELLS]
            made.append(
                Task(
                    part=paths.vectors_block(encoder, number), function=Workspace.write_vectors,
                    args=(shared, encoder, number, mine), weight=len(mine) / 50, threads=context.config.train.threads,
                    gpu=True,
                )
            )  # fmt: skip
    if not encoder_set.name and context.config.compare.controls:
        sources = workspace.table.sources
        for source in np.unique(sources).tolist():
            mine = cells[sources == source]
            made.append(
                Task(
                    part=paths.counts(source), function=Workspace.write_counts, args=(shared, source, mine),
                    weight=len(mine) / 1000, threads=1,
                )
            )  # fmt: skip
    return made


PARTS: dict[str, Part] = {
    "transfer": Part(tables=transfer_tables.transfer),
    "spaces": Part(tables=space_tables.spaces),
    "matching": Part(tables=shift_tables.match_shifts, tasks=_matching_tasks),
    "conserved": Part(tables=lambda s: conserved_response.tables(s.config)),
    "networks": Part(
        tables=lambda s: gene_networks.networks(s.config, {n: p for w in s.encoder_sets for n, p in w.trained.items()})
    ),
}
"""Further parts are further entries."""

"""`prepare`: sources to cell sentences, in three passes of tasks.

1. metrics of every cell; then the rules of QC, duplicates and caps decide what is kept;
2. the median sketch over kept cells, merged into the vocabulary (skipped where medians or a vocabulary are given);
3. sentences, one shard per task.

Every task reads its own rows and writes its own part under `corpus/work`. A part that is there is not made again, so a
run killed at any moment continues. Only file names, masks and configs are sent to workers. All three passes are pipelines
(`mixgf.execution.Pipeline`), which Ray Data runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from mixgf.cells import doublets, qc
from mixgf.cells.open import source_sizes, stamp_of
from mixgf.cells.sources import expand_sources
from mixgf.config.data import Source, SpeciesRow
from mixgf.config.fields import content_of, sections_of
from mixgf.config.run import Config
from mixgf.console import say, warn
from mixgf.corpus import extend, near_hashes, prepare_passes, prepare_plan, shards, source_genes
from mixgf.distributed.executor import RayExecutor
from mixgf.distributed.metrics import Meter, watch
from mixgf.errors import UserError
from mixgf.execution import Executor, Task
from mixgf.genes import identify, medians, species
from mixgf.genes.vocabulary import Vocabulary, build_vocabulary, publish_vocabulary, read_median_table
from mixgf.stages.fan_out import SourcePasses
from mixgf.storage import artifacts, files, layout
from mixgf.storage.artifacts import build_or_reuse, remove_output_if_all_rejected
from mixgf.tracking import mlflow_runs

SCHEMA = 1
MOST_LINES = 20
"""Sources of which `prepare` prints how their names map to genes."""
MERGE_FAN_IN = 32
"""Sketch parts merged by one task."""
SKETCH_UNITS = 4
"""Units that share a sketch in a large corpus: sketches of more cells are hardly larger."""


def run(config: Config, *, executor: Executor | None = None) -> str:
    """Make the corpus and its vocabulary; returns the corpus' URI. `executor` runs the tasks; None = Ray."""
    config = _with_scrublet(config)
    executor = executor or RayExecutor(config)
    sources = expand_sources(config.sources)
    uri = files.join(config.output, "corpus")
    older = extend.find_base_corpus(config, sources)
    vocabulary, record = _plans(config, sources, older)
    if not _begin(uri, record):
        _require_unchanged(config, sources, uri, executor)
        layout.remove_own(uri, "corpus", scratch=True)
        return uri
    params = {name: record.config[name] for name in sections_of(Config, "prepare")}
    with (
        remove_output_if_all_rejected(uri, "corpus"),
        mlflow_runs.stage(config, "prepare", params, record.fingerprint) as tracked,
        executor.session(),
        watch(config, "prepare", tracked, uri) as watched,
    ):
        tracked.sources(record.config["sources"])
        work = _Prepare(config, uri, sources, older, executor, watched.meter)
        done = build_or_reuse(uri, record, lambda: work.make(vocabulary, record))
        watched.made(cells=done.counts["read"])
        tracked.corpus(uri, "output")
        tracked.summary({f"cells/{k}": float(v) for k, v in done.counts.items() if not isinstance(v, dict)})
    layout.remove_own(uri, "corpus", scratch=True)
    return uri


def _with_scrublet(config: Config) -> Config:
    """The config, without flags of doublets where Scrublet is not installed."""
    if config.qc.doublets == "drop":
        doublets.require_scrublet()
    if config.qc.doublets == "off" or doublets.scrublet_is_installed():
        return config
    say(
        "doublets are not looked for: Scrublet is not installed; pip install 'mixgf[doublets]' adds it, --set qc.doublets=off spares this line"
    )
    return replace(config, qc=replace(config.qc, doublets="off"))


def _require_unchanged(config: Config, sources: Sequence[Source], uri: str, executor: Executor) -> None:
    """Raise a `UserError` if a source of a finished corpus has other cells since.

    Sources that were written to since are read again, and compared with what the record says of their cells.
    """
    done = artifacts.find(uri)
    known = {(s["name"], s["uri"]): s for s in (done.details["sources"] if done is not None else ()) if "stamp" in s}
    asked = [s for s in sources if (s.name, s.uri) in known and files.exists(s.uri)]
    stamps = files.map_reads(asked[0].uri if asked else "", lambda s: stamp_of(s.uri), asked)
    written = [s for s, now in zip(asked, stamps, strict=True) if now != known[s.name, s.uri]["stamp"]]
    if not written:
        return
    layout.remove_own(uri, "corpus", scratch=True)  # parts of another comparison
    config = replace(config, prepare=replace(config.prepare, strict=True, keep_counts=False))
    with executor.session():
        work = _Prepare(config, uri, tuple(written), None, executor, Meter("prepare", ""))
        for i, now in work.measure_again().items():
            before = known[written[i].name, written[i].uri]
            if any(now[key] != before[key] for key in now):
                raise prepare_passes.changed_error(written[i].uri)


def _begin(uri: str, record: artifacts.Record) -> bool:
    """`artifacts.begin`, with the way out for who only wants to add sources."""
    try:
        return artifacts.begin(uri, record)
    except UserError as error:
        there = artifacts.find(uri)
        names = [{s["name"] for s in r.config["sources"]} for r in (there, record) if r is not None]
        if len(names) < 2 or not names[0] < names[1]:
            raise
        how = f"--set prepare.extend={uri} --set vocab.reuse={uri.rsplit('/', 1)[0]}/vocabulary"
        msg = f"{error}. To add sources without reading the others again: give the new ones alone, with another --output and {how}"
        raise UserError(msg) from None


def _plans(
    config: Config, sources: Sequence[Source], older: extend.BaseCorpus | None
) -> tuple[artifacts.Record | None, artifacts.Record]:
    """Plans of the vocabulary (None where one is reused as it is) and of the corpus."""
    data = extend.recorded_settings(config)
    sizes = source_sizes([s.uri for s in sources])  # so that another file under an old name is noticed
    sized = [content_of(s) | {"size": size} for s, size in zip(sources, sizes, strict=True)]
    content = {name: data[name] for name in ("species", "qc", "vocab", "seed")} | {"sources": sized}
    vocabulary, reused = None, {}
    if config.vocab.reuse:
        reused = {"extends": artifacts.require(config.vocab.reuse, "vocabulary").fingerprint}
    if not reused or not {s.species for s in sources} <= set(Vocabulary.load(config.vocab.reuse).species):
        vocabulary = artifacts.plan("vocabulary", SCHEMA, content, reused)
    parent = vocabulary.fingerprint if vocabulary is not None else reused["extends"]
    whole = content | {"tokens": data["tokens"], "prepare": content_of(config.prepare)}
    parents = {"vocabulary": parent} | ({"extends": older.record.fingerprint} if older else {})
    return vocabulary, artifacts.plan("corpus", SCHEMA, whole, parents)


@dataclass
class _Prepare:
    config: Config
    uri: str
    sources: tuple[Source, ...]
    older: extend.BaseCorpus | None
    executor: Executor
    meter: Meter

    def __post_init__(self) -> None:
        self.work = files.join(self.uri, "work")
        self.rows = {row.name: row for row in self.config.species}
        self.passes = SourcePasses(
            stage="prepare", sources=[s.uri for s in self.sources], strict=self.config.prepare.strict, executor=self.executor,
            meter=self.meter, work=self.work,
        )  # fmt: skip
        self.facts: dict[int, dict[str, Any]] = {}
        self.sampled: dict[str, dict[str, Any]] = {}
        """Facts of medians that come from a sample, by species."""
        self.shards = files.join(self.uri, "shards")
        self.near = files.join(self.uri, near_hashes.FOLDER) if self.config.qc.near_duplicates != "off" else ""
        self.first = self.older.num_shards if self.older else 0
        """Number of the first shard of the sources read here."""

    def make(self, vocabulary: artifacts.Record | None, record: artifacts.Record) -> artifacts.Record:
        allowed, given = self._given()
        self._describe(allowed)
        self._write_row_order()
        all_units = self._units()
        self._measure(all_units)
        reports = self._reports(all_units)
        self.passes.settled = True
        all_units = [u for u in all_units if u.index not in self.passes.refused]
        cells = self._filter_cells(all_units, reports)
        for i, of in cells.items():
            if of.doubt:
                warn(f"{self.sources[i].name}: {of.doubt}")
        counts = prepare_plan.count_cells(cells)
        for reason, number in counts.items():
            if reason != "kept":
                self.meter.add("cells_dropped", number, reason=reason)
        self.meter.add("cells_kept", counts["kept"])
        keeps = {u.number: cells[u.index].reason_N[u.start : u.stop] == qc.KEPT for u in all_units}
        kept_units = [u for u in all_units if keeps[u.number].any()]
        if not kept_units:
            msg = f"qc: none of {sum(counts.values()):,} cells passes ({prepare_plan.describe_dropped(counts)}); relax qc.*"
            raise UserError(msg)
        made = self._vocabulary(vocabulary, kept_units, keeps, given)
        made.save(files.join(self.uri, "vocabulary.parquet"))
        self._copy_shards()
        self._encode(made.hash, kept_units, keeps, cells)
        return self._publish(record, made, kept_units, cells, reports)

    def measure_again(self) -> dict[int, dict[str, str]]:
        """Hashes of names, obs and counts of every source, as the record of a corpus has them; nothing else is made."""
        self._describe(None)
        self._write_row_order()
        units = self._units()
        self._measure(units)
        return {
            i: {
                "cells_sha256": self.facts[i]["cells_sha256"],
                "counts_sha256": prepare_passes.read_metrics(self.work, [u.number for u in mine])[0].identity,
            }
            for i, mine in prepare_plan.by_source(units).items()
        }

    # passes

    def _units(self) -> list[prepare_passes.RowRange]:
        return prepare_passes.plan_row_ranges(
            {i: (self.sources[i], f["rows"]) for i, f in self.facts.items()}, self.config.prepare.shard_cells
        )

    def _given(self) -> tuple[dict[str, list[str]] | None, dict[str, dict[str, float]] | None]:
        """Genes of a species that alone may enter the vocabulary, and imported medians, where the config gives them."""
        if self.config.vocab.reuse:
            given = Vocabulary.load(self.config.vocab.reuse)
            return {name: list(given.species_genes(name).genes) for name in given.species}, None
        if self.config.vocab.medians:
            known = {name: set(species.gene_table(row)["gene"].to_pylist()) for name, row in self.rows.items()}
            found = read_median_table(self.config.vocab.medians, self.config.species, known)
            return {name: list(genes) for name, genes in found.items()}, found
        return None, None

    def _describe(self, allowed: dict[str, list[str]] | None) -> None:
        options: dict[str, Any] = {"rules": self.config.qc, "biotypes": self.config.vocab.biotypes, "allowed": allowed}
        tasks = [
            Task(
                part=shards.part_uri(self.work, "sources", i), also=(shards.facts_uri(self.work, i),), source=i,
                function=prepare_passes.describe_source,
                args=(self.work, i, source), kwargs={"row": self.rows[source.species], "others": self._others(source), **options},
            )
            for i, source in enumerate(self.sources)
        ]  # fmt: skip
        number = self.passes.run("sources", tasks, "files", step=0)
        there = [i for i in range(len(self.sources)) if i not in self.passes.refused]
        self.facts = shards.read_facts(self.work, there, again=number > 0)

    def _others(self, source: Source) -> tuple[SpeciesRow, ...]:
        return tuple(row for name, row in self.rows.items() if name != source.species)

    def _leave_out(self) -> None:
        self.facts = {i: f for i, f in self.facts.items() if i not in self.passes.refused}

    def _write_row_order(self) -> None:
        tasks = [
            Task(
                part=shards.part_uri(self.work, "row_order", i), source=i, weight=facts["rows"],
                function=prepare_passes.write_row_order, args=(self.work, i, self.sources[i]),
            )
            for i, facts in sorted(self.facts.items())
            if facts["by_column"]
        ]  # fmt: skip
        self.passes.run("rows", tasks, step=1)  # row ranges are numbered without what is left out
        self._leave_out()

    def _measure(self, all_units: list[prepare_passes.RowRange]) -> None:
        rows = self.config.prepare.block_cells
        tasks = [
            Task(
                part=shards.part_uri(self.work, "metrics", u.number), also=(shards.part_uri(self.work, "sums", u.number),),
                source=u.index, weight=u.stop - u.start,
                function=prepare_passes.measure_cells,
                args=(
                    prepare_passes.MetricsPlan(
                        work=self.work, row_range=u, block_cells=rows,
                        # a column-major source has a copy already: its rows
                        keep_counts=self.config.prepare.keep_counts and not self.facts[u.index]["by_column"],
                        near_duplicates=self.config.qc.near_duplicates != "off",
                    ),
                ),
            )
            for u in all_units
        ]  # fmt: skip
        self.passes.run("metrics", tasks, counter="cells_read", step=2)
        self._leave_out()

    def _reports(self, all_units: list[prepare_passes.RowRange]) -> dict[int, identify.MappingReport]:
        """Gene mapping of every source; refuses those of which too few counts are known."""
        numbers = {i: [u.number for u in units] for i, units in prepare_plan.by_source(all_units).items()}
        groups = source_genes.group_sources(self.facts)
        tasks = [
            Task(
                part=shards.part_uri(self.work, "gene_reports", k), weight=len(mine), function=source_genes.report_group,
                args=(
                    self.work, k, {i: numbers[i] for i in mine}, {i: self.sources[i].species for i in mine},
                    tuple(self.rows.values()),
                ),
            )
            for k, mine in groups.items()
        ]  # fmt: skip
        self.passes.run("genes of the sources", tasks, "files")
        out = dict(source_genes.read_reports(self.work, groups))
        for i, found in out.items():
            if 1 - found.counts_lost < self.config.qc.min_mapped_fraction:
                limit = f" (qc.min_mapped_fraction = {self.config.qc.min_mapped_fraction})"
                why = found.describe_lost(self.sources[i].species, limit)
                self.passes.refuse(i, f"{self.sources[i].uri}: {why}")
        self._leave_out()
        self._say_mapping(out)
        return out

    def _say_mapping(self, reports: Mapping[int, identify.MappingReport]) -> None:
        """One line for each source of which something is left out, renamed or doubted."""
        lines = {}
        for i, facts in self.facts.items():
            told = reports[i].describe(self.sources[i].species)
            if text := "; ".join([*facts["notes"], *([told] if told else [])]):
                lines[i] = f"{self.sources[i].name}: {text}"
        for i, line in list(lines.items())[:MOST_LINES]:
            (warn if self.facts[i]["notes"] or reports[i].cause else say)(line)
        if len(lines) > MOST_LINES:
            say(
                f"{len(lines) - MOST_LINES:,} more sources with names that are left out or renamed: mapping.parquet of the corpus"
            )

    def _filter_cells(
        self, all_units: list[prepare_passes.RowRange], reports: Mapping[int, identify.MappingReport]
    ) -> dict[int, prepare_plan.SourceCells]:
        """All cells, by source."""
        rules = self.config.qc
        groups = {
            k: [u for mine in of for u in mine]
            for k, of in enumerate(prepare_passes.group_ranges(all_units))
            if len(of) > 1
        }
        tasks = [
            Task(
                part=shards.part_uri(self.work, "group_metrics", k), weight=sum(u.stop - u.start for u in mine),
                function=prepare_passes.group_metrics, args=(self.work, k, [u.number for u in mine]),
            )
            for k, mine in groups.items()
        ]  # fmt: skip
        self.passes.run("metrics of the sources", tasks)
        return prepare_plan.filter_cells(
            self.work, all_units, rules, sources=self.sources, seed=self.config.seed,
            held=self.older.hashes() if self.older and rules.drop_duplicates else None,
            find_doublets=self._find_doublets, find_copies=lambda kept: self._find_copies(all_units, kept),
            candidate_counts={i: report.candidate_counts for i, report in reports.items()},
        )  # fmt: skip

    def _find_doublets(self, cells: Mapping[int, prepare_plan.SourceCells]) -> None:
        options = {
            "block_cells": self.config.prepare.block_cells, "rate": self.config.qc.doublet_rate, "seed": self.config.seed,
        }  # fmt: skip
        planned = [
            (i, name, calls)
            for i, of in cells.items()
            if of.doublets is not None
            for (name, _, _), calls in zip(of.doublets.parts, of.doublets.calls, strict=True)
        ]
        tasks = [
            Task(
                part=shards.part_uri(self.work, "doublets", name), source=i, weight=sum(len(rows) for rows in calls),
                function=prepare_passes.find_doublets, args=(self.work, name, self.sources[i], i, calls), kwargs=options,
            )
            for i, name, calls in planned
        ]  # fmt: skip
        self.passes.run("doublets", tasks)
        prepare_plan.note_doublets(self.work, cells)

    def _find_copies(
        self, all_units: list[prepare_passes.RowRange], kept: Mapping[int, np.ndarray]
    ) -> dict[int, near_hashes.Copies]:
        numbers = [u.number for mine in prepare_plan.by_source(all_units).values() for u in mine]
        older, num_older = (self.older.uri, self.older.record.counts["kept"]) if self.older else ("", 0)
        tasks = [
            Task(
                part=shards.part_uri(self.work, "near_pairs", k), weight=len(numbers), function=near_hashes.pair_cells,
                args=(self.work, k, numbers, older),
            )
            for k in range(near_hashes.NUM_GROUPS)
        ]  # fmt: skip
        self.passes.run("near duplicates", tasks, "parts")
        return near_hashes.read_copies(self.work, kept, num_older)

    def _vocabulary(
        self,
        record: artifacts.Record | None,
        kept: list[prepare_passes.RowRange],
        keeps: dict[int, np.ndarray],
        given: dict[str, dict[str, float]] | None,
    ) -> Vocabulary:
        if record is None:
            return Vocabulary.load(self.config.vocab.reuse)
        uri = files.join(self.config.output, "vocabulary")
        if not artifacts.begin(uri, record):
            return Vocabulary.load(uri)
        older = Vocabulary.load(self.config.vocab.reuse) if self.config.vocab.reuse else None
        if given is None:
            given = self._medians(kept, keeps, () if older is None else older.species)
        tables = {name: species.gene_table(self.rows[name]) for name in given}
        with_genes = {name: genes for name, genes in given.items() if genes}
        pairs = species.orthologs(self.config.vocab.orthologs)
        sharing = self.config.vocab.sharing if older is None else older.sharing
        made = build_vocabulary(with_genes, tables, sharing=sharing, orthologs=pairs, base=older)
        publish_vocabulary(uri, record, made, sampled=self.sampled)
        return made

    def _medians(
        self, kept: list[prepare_passes.RowRange], keeps: dict[int, np.ndarray], known: tuple[str, ...]
    ) -> dict[str, dict[str, float]]:
        """Medians by species, in the config's order, from a tree of sketch merges; not of the `known` species.

        From a sample of the cells, all candidate genes get one: those without a cell that of one count in a cell of median depth.
        """
        present = [name for name in self.rows if name not in known and any(u.source.species == name for u in kept)]
        genes = {name: self._candidate_genes(name) for name in present}
        rows = self.config.prepare.block_cells
        tasks: list[Task] = []
        sketches: dict[str, list[str]] = {name: [] for name in present}
        numbers: dict[str, tuple[int, int]] = {}
        for name in present:
            mine = [u for u in kept if u.source.species == name]
            number, wanted = sum(int(keeps[u.number].sum()) for u in mine), keeps
            if 0 < self.config.vocab.median_cells < number:
                wanted = prepare_plan.sample_cells(mine, keeps, self.config.vocab.median_cells, self.config.seed)
                mine = [u for u in mine if wanted[u.number].any()]
                numbers[name] = sum(int(wanted[u.number].sum()) for u in mine), number
            each = max(1, min(SKETCH_UNITS, len(mine) // 64))
            for k in range(0, len(mine), each):
                group = [(u, wanted[u.number]) for u in mine[k : k + each]]
                plan = prepare_passes.SketchPlan(
                    work=self.work, number=len(tasks), parts=group, block_cells=rows, sampled=name in numbers
                )
                sketches[name].append(prepare_passes.sketch_uri(self.work, "sketch", plan.number))
                tasks.append(
                    Task(
                        part=sketches[name][-1], source=group[0][0].index, weight=sum(u.stop - u.start for u, _ in group),
                        function=prepare_passes.sketch_medians, args=(plan,),
                    )
                )  # fmt: skip
        self.passes.run("medians", tasks)
        out = {}
        for name in present:
            total = medians.merge_sketches(prepare_passes.read_sketch(p) for p in self._merged(name, sketches[name]))
            found = medians.median_by_gene(total)
            if name in numbers:
                self.sampled[name] = prepare_plan.describe_sample(total, genes[name], *numbers[name])
                self._say_sample(name)
                found = {g: found.get(g, found[len(genes[name])]) for g in range(len(genes[name]))}
            out[name] = {genes[name][g]: median for g, median in found.items()}
        return out

    def _say_sample(self, name: str) -> None:
        of = self.sampled[name]
        half, most = of["standard_errors"] or ["", ""]
        error = (
            f"standard error {half:.2%} of the median for half and {most:.2%} for 95 % of {of['genes_with_error']:,} genes; "
            if half
            else ""
        )
        say(
            f"medians of {name} genes: from {of['cells']:,} of {of['of']:,} cells; {error}"
            f"{of['genes_without_cells']:,} of {of['genes']:,} genes are in none of them"
        )

    def _candidate_genes(self, name: str) -> list[str]:
        """Genes of a species that may enter the vocabulary, over its sources."""
        groups = source_genes.group_sources(i for i in self.facts if self.sources[i].species == name)
        tasks = [
            Task(
                part=shards.part_uri(self.work, f"genes-{name}", k), weight=len(mine), function=source_genes.collect_genes,
                args=(self.work, name, k, mine),
            )
            for k, mine in groups.items()
        ]  # fmt: skip
        self.passes.run(f"{name} genes", tasks, "files")
        return source_genes.merge_genes(self.work, name, list(groups))

    def _merged(self, name: str, parts: list[str]) -> list[str]:
        """Merge sketch parts in a tree until one task can read them all."""
        level = 0
        while len(parts) > MERGE_FAN_IN:
            groups = [parts[k : k + MERGE_FAN_IN] for k in range(0, len(parts), MERGE_FAN_IN)]
            parts = [prepare_passes.sketch_uri(self.work, f"merge-{name}-{level}", k) for k in range(len(groups))]
            tasks = [
                Task(part=to, weight=len(group), function=prepare_passes.merge_sketch_parts, args=(group, to))
                for group, to in zip(groups, parts, strict=True)
            ]
            self.passes.run("merge", tasks, "parts")
            level += 1
        return parts

    def _copy_shards(self) -> None:
        """Take over the shards of the older corpus."""
        if self.older is not None:
            tasks = [
                Task(
                    part=shards.part_uri(self.work, "done", n), weight=entry["rows"], function=extend.copy_shard,
                    args=(self.work, n, self.older.uri),
                    kwargs={"entry": entry, "length_N": lengths, "to": self.shards, "near": self.near},
                )
                for n, (entry, lengths) in enumerate(self.older.shards())
            ]  # fmt: skip
            self.passes.run("cells taken over", tasks)

    def _encode(
        self, digest: str, kept: list[prepare_passes.RowRange], keeps: dict[int, np.ndarray],
        cells: dict[int, prepare_plan.SourceCells],
    ) -> None:  # fmt: skip
        options: dict[str, Any] = {
            "work": self.work, "to": self.shards, "vocabulary": files.join(self.uri, "vocabulary.parquet"), "digest": digest,
            "tokens": self.config.tokens, "obs": self._obs(), "block_cells": self.config.prepare.block_cells, "near": self.near,
        }  # fmt: skip
        plans = [
            prepare_passes.ShardPlan(
                row_range=u,
                keep_N=keeps[u.number],
                shard=n,
                doublets=prepare_plan.doublet_parts(u, cells[u.index]),
                **options,
            )
            for n, u in enumerate(kept, self.first)
        ]
        tasks = [
            Task(
                part=shards.part_uri(self.work, "done", plan.shard), also=(files.join(self.shards, shards.shard_name(plan.shard)),),
                source=plan.row_range.index,
                weight=plan.row_range.stop - plan.row_range.start, function=prepare_passes.encode_shard, args=(plan,),
            )
            for plan in plans
        ]  # fmt: skip
        self.passes.run("sentences", tasks, counter="cells_encoded")
        self.meter.add("shards_written", len(tasks))

    def _obs(self) -> dict[str, str]:
        """Kind of every obs column over all sources: numbers only where every source that has it has numbers."""
        kinds: dict[str, set[str]] = {}
        for i in sorted(self.facts):
            for name, kind in self.facts[i]["kinds"].items():
                kinds.setdefault(name, set()).add(kind)
        return shards.merge_kinds(kinds)

    # the end

    def _publish(
        self, record: artifacts.Record, made: Vocabulary, kept: list[prepare_passes.RowRange],
        cells: dict[int, prepare_plan.SourceCells], reports: dict[int, identify.MappingReport],
    ) -> artifacts.Record:  # fmt: skip
        done = shards.read_shard_infos(self.work, self.first + len(kept))
        tables = {"index": shards.build_index(done[self.first :], [u.source.species for u in kept], made.species)}
        counts = prepare_plan.count_cells(cells)
        read = sum(counts.values())
        dropped = {name: number for name, number in counts.items() if name != "kept"}
        assert tables["index"].num_rows == counts["kept"]
        assert read == sum(f["rows"] for f in self.facts.values())
        tables |= {
            "mapping": prepare_plan.mapping_table(self.sources, cells, reports),
            "dropped": prepare_plan.dropped_table(self.sources, cells),
        }
        if self.config.qc.doublets != "off":
            tables["doublets"] = prepare_plan.doublets_table(self.sources, cells)
        if self.config.qc.drop_duplicates:
            tables["hashes"] = prepare_plan.hashes_table(cells)
        near = 0
        if self.config.qc.near_duplicates != "off":
            tables["near_duplicates"] = prepare_plan.near_duplicates_table(
                self.sources, cells, self.older.places if self.older else None
            )
            near = sum(tables["near_duplicates"]["kept"].to_pylist())
        sources = [{"name": s.name, "uri": s.uri, "species": s.species, "cells_read": len(cells[i].reason_N), "cells_kept": cells[i].counts["kept"],
                    "size": self.facts[i]["size"], "counts_sha256": cells[i].identity} | {k: v for k, v in self.facts[i].items() if k in {"stamp", "cells_sha256"}} for i, s in enumerate(self.sources) if i in self.facts]  # fmt: skip
        if self.older is not None:
            tables = {
                name: pa.Table.from_pylist(self.older.table(name).to_pylist() + table.to_pylist())
                if name in ("mapping", "dropped")  # lists of names have their type from all of them
                else pa.concat_tables([self.older.table(name), table])
                for name, table in tables.items()
            }
            sources = self.older.record.details["sources"] + sources
            read += self.older.record.counts["read"]
            dropped = {name: n + self.older.record.counts["dropped"].get(name, 0) for name, n in dropped.items()}
        details = {
            "species": list(made.species), "vocabulary": made.hash, "max_len": self.config.tokens.max_len, "cls": self.config.tokens.cls,
            "shards": [entry for _, entry in done],
            "sources": sources,
            "refused": [{"name": self.sources[i].name, "uri": self.sources[i].uri, "error": why} for i, why in sorted(self.passes.refused.items())],
        }  # fmt: skip
        flagged = sum(tables["doublets"]["kept"].to_pylist()) if "doublets" in tables else 0
        say(
            f"corpus: {read:,} cells read, {tables['index'].num_rows:,} kept ({prepare_plan.describe_dropped(counts) or 'none dropped'}), {len(done)} shards"
            + (f"; {flagged:,} kept cells are flagged as doublets" if flagged else "")
            + (
                f"; {near:,} kept cells equal earlier ones but for a gene filter (qc.near_duplicates=drop drops them)"
                if near
                else ""
            )
        )
        totals = {"read": read, "kept": tables["index"].num_rows, "dropped": dropped}
        return shards.publish_corpus(self.uri, record, tables=tables, counts=totals, details=details)

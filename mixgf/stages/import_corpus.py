"""`import`: tokenised Arrow data sets to the corpus that `prepare` makes, in two passes of tasks.

The vocabulary comes first, from the dictionaries and medians, or is given. Then
1. every Arrow file is read once: hash, batches, what its ids are (one task per file);
2. sentences in our ids, one shard per task (a row range of one file).

As in `prepare`, a part that is there is not made again, so a run killed at any moment continues.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mixgf.cells.sources import expand_sources
from mixgf.config.data import Source
from mixgf.config.fields import sections_of
from mixgf.config.parse import to_dict
from mixgf.config.run import Config
from mixgf.console import say, warn
from mixgf.corpus import arrow_dataset, import_passes, remap_ids, shards
from mixgf.distributed.executor import RayExecutor
from mixgf.distributed.metrics import Meter, watch
from mixgf.errors import UserError
from mixgf.execution import Executor, Task
from mixgf.genes import identify
from mixgf.genes.vocabulary import Vocabulary, publish_vocabulary
from mixgf.stages.fan_out import SourcePasses
from mixgf.storage import artifacts, files, layout
from mixgf.storage.artifacts import build_or_reuse, remove_output_if_all_rejected
from mixgf.storage.tables import write_table
from mixgf.tracking import mlflow_runs

MANY_LOST = 0.05
"""Share of ids outside the vocabulary from which a source deserves a warning."""


def run(config: Config, *, executor: Executor | None = None) -> str:
    """Make a corpus of tokenised data sets; returns its URI. `executor` runs the tasks; None = Ray."""
    executor = executor or RayExecutor(config)
    sources = _sources(config)
    uri = files.join(config.output, "corpus")
    given = import_passes.ImportInputs(config, sources)
    vocabulary, record = given.plans()
    if not artifacts.begin(uri, record):
        layout.remove_own(uri, "corpus", scratch=True)
        return uri
    params = {name: to_dict(getattr(config, name)) for name in sections_of(Config, "import")}
    with (
        remove_output_if_all_rejected(uri, "corpus"),
        mlflow_runs.stage(config, "import", params, record.fingerprint) as tracked,
        executor.session(),
        watch(config, "import", tracked, uri) as watched,
    ):
        tracked.sources(record.config["sources"])
        work = _Import(given, uri, executor, watched.meter)
        done = build_or_reuse(uri, record, lambda: work.make(vocabulary, record))
        watched.made(cells=done.counts["read"])
        tracked.corpus(uri, "output")
        tracked.summary({f"cells/{k}": float(v) for k, v in done.counts.items() if not isinstance(v, dict)})
    layout.remove_own(uri, "corpus", scratch=True)
    return uri


def _sources(config: Config) -> tuple[Source, ...]:
    if not config.sources:
        msg = "sources = (): must name at least one tokenised Arrow data set with its species, for example human=genecorpus.dataset"
        raise UserError(msg)
    for i, source in enumerate(config.sources):
        for name, unset in (("layer", "X"), ("genes", ""), ("sample", "")):
            if getattr(source, name) != unset:
                msg = f"sources[{i}].{name} = {getattr(source, name)!r}: means nothing for tokenised data; leave it out"
                raise UserError(msg)
    if config.tokens.scaling != "divide":
        msg = f"tokens.scaling = {config.tokens.scaling!r}: imported sentences are ranked already, by dividing; must be 'divide'"
        raise UserError(msg)
    return expand_sources(config.sources)


@dataclass
class _Import:
    given: import_passes.ImportInputs
    uri: str
    executor: Executor
    meter: Meter

    def __post_init__(self) -> None:
        self.config, self.sources = self.given.config, self.given.sources
        self.work = files.join(self.uri, "work")
        self.passes = SourcePasses(
            stage="import", sources=[s.uri for s in self.sources], strict=self.config.prepare.strict, executor=self.executor,
            meter=self.meter, work=self.work,
        )  # fmt: skip
        self.facts: dict[int, list[dict[str, Any]]] = {}
        self.genes: dict[int, list[np.ndarray]] = {}

    def make(self, vocabulary: artifacts.Record | None, record: artifacts.Record) -> artifacts.Record:
        made = self._vocabulary(vocabulary)
        made.save(files.join(self.uri, "vocabulary.parquet"))
        self.rules = import_passes.ImportRules(
            imports=self.config.imports, min_genes=self.config.qc.min_genes, tokens=self.config.tokens, size=made.size
        )
        self._check(made)
        kept = self._units()
        if not kept:
            read = sum(len(g) for parts in self.genes.values() for g in parts)
            msg = f"qc.min_genes = {self.config.qc.min_genes}: none of {read:,} cells has so many vocabulary genes; the wrong dictionary?"
            raise UserError(msg)
        self._write(kept)
        return self._publish(record, made, kept)

    def _vocabulary(self, record: artifacts.Record | None) -> Vocabulary:
        if record is None:
            assert self.given.reused is not None
            return self.given.reused
        uri = files.join(self.config.output, "vocabulary")
        if not artifacts.begin(uri, record):
            return Vocabulary.load(uri)
        made = self.given.build()
        publish_vocabulary(uri, record, made)
        return made

    # passes

    def _check(self, made: Vocabulary) -> None:
        """Read every file; refuses sources that cannot be used."""
        tasks = []
        lengths: dict[int, int] = {}
        for i, source in enumerate(self.sources):
            try:
                found = arrow_dataset.data_files(source.uri)
            except UserError as error:
                self.passes.refuse(i, str(error))
                continue
            dictionary = self.given.dictionaries[self.given.dictionary_uris[i]]
            table = remap_ids.token_of_id(dictionary, self.given.genes[i], made.species_genes(source.species))
            write_table(shards.part_uri(self.work, "lookup", i), pa.table({"token": table}))
            lengths[i] = len(found)
            for f, uri in enumerate(found):
                tasks.append(
                    Task(
                        part=shards.part_uri(self.work, "files", import_passes.file_part(i, f)), source=i,
                        weight=files.size(uri), function=import_passes.check_file, args=(self.work, i, f, source, uri),
                        kwargs={"dictionary": dictionary.uri, "rules": self.rules},
                    )
                )  # fmt: skip
        self.passes.run("files", tasks, "bytes", step=0)
        for i, number in lengths.items():
            if i in self.passes.refused:
                continue
            parts = [import_passes.read_checked(self.work, i, f) for f in range(number)]
            self.genes[i], self.facts[i] = [p[0] for p in parts], [p[1] for p in parts]
            self._warn(i)

    def _warn(self, index: int) -> None:
        total = self._counts(index)
        ids = sum(total[name] for name in (*remap_ids.COUNTED, "in_dropped_cells"))
        name = self.sources[index].name
        if total["outside"] + total["unknown"] > MANY_LOST * ids:
            share = (total["outside"] + total["unknown"]) / ids
            warn(
                f"{name}: {share:.1%} of its ids are no genes of the {self.sources[index].species} vocabulary and are left out"
            )
        if left_out := sorted({column for f in self.facts[index] for column in f["left_out"]}):
            warn(f"{name}: columns left out (lists, bytes, or names that mixgf uses): {', '.join(left_out)}")
        parts = ", ".join(f"{n:,} {kind.replace('_', ' ')}" for kind, n in total.items() if n)
        say(f"{name}: {sum(f['rows'] for f in self.facts[index]):,} cells, {ids:,} ids: {parts}")

    def _counts(self, index: int) -> dict[str, int]:
        """Ids by what became of them, over the files of a source."""
        counts = [f["counts"] for f in self.facts[index]]
        return {name: sum(f[name] for f in counts) for name in counts[0]}

    def _keep(self, unit: import_passes.RowRange) -> np.ndarray:
        return self.genes[unit.index][unit.file][unit.start : unit.stop] >= self.config.qc.min_genes

    def _units(self) -> list[import_passes.RowRange]:
        """Row ranges with kept cells, in order."""
        out = []
        step = self.config.prepare.shard_cells
        for i, lengths in sorted(self.genes.items()):
            first = 0
            for f, genes in enumerate(lengths):
                for start in range(0, len(genes), step):
                    stop = min(start + step, len(genes))
                    out.append(
                        import_passes.RowRange(
                            index=i, file=f, source=self.sources[i], start=start, stop=stop, first=first
                        )
                    )
                first += len(genes)
        return [u for u in out if self._keep(u).any()]

    def _write(self, kept: Sequence[import_passes.RowRange]) -> None:
        kinds: dict[str, set[str]] = {}
        for facts in self.facts.values():
            for name, attribute in (item for f in facts for item in f["obs"].items()):
                kinds.setdefault(name, set()).add(attribute["kind"])
        options: dict[str, Any] = {
            "to": files.join(self.uri, "shards"), "rules": self.rules, "obs": shards.merge_kinds(kinds),
        }  # fmt: skip
        tasks = [
            Task(
                part=shards.part_uri(self.work, "done", n), also=(files.join(self.uri, "shards", shards.shard_name(n)),),
                source=u.index, weight=u.stop - u.start,
                function=import_passes.translate_shard, args=(self.work, u, n), kwargs=options,
            )
            for n, u in enumerate(kept)
        ]  # fmt: skip
        self.passes.run("sentences", tasks, counter="cells_encoded")
        self.meter.add("shards_written", len(tasks))

    # the end

    def _publish(
        self, record: artifacts.Record, made: Vocabulary, kept: Sequence[import_passes.RowRange]
    ) -> artifacts.Record:
        done = shards.read_shard_infos(self.work, len(kept))
        index = shards.build_index(done, [u.source.species for u in kept], made.species)
        rows: list[dict[str, Any]] = []
        sources: list[dict[str, Any]] = []
        for i, source in enumerate(self.sources):
            if i not in self.facts:
                continue
            genes = np.concatenate(self.genes[i])
            cells = {"cells_read": len(genes), "cells_kept": int((genes >= self.config.qc.min_genes).sum())}
            dictionary = self.given.dictionaries[self.given.dictionary_uris[i]]
            ours = set(made.species_genes(source.species).genes.tolist())
            mapped = sum(gene in ours for gene in self.given.genes[i].values())
            counts = self._counts(i)
            rows.append(
                {"source": source.name, "species": source.species} | cells
                | {"dictionary": dictionary.uri, "dictionary_genes": len(dictionary.genes), "genes_in_vocabulary": mapped}
                | {f"ids_{name}": counts[name] for name in (*remap_ids.COUNTED, "in_dropped_cells")}
                | {"cells_wrong_length": counts["wrong_length"]}
            )  # fmt: skip
            parts = [{k: f[k] for k in ("uri", "size", "sha256", "rows")} for f in self.facts[i]]
            sources.append(
                {"name": source.name, "uri": source.uri, "species": source.species, **cells,
                 "size": sum(f["size"] for f in parts), "sha256": parts[0]["sha256"] if len(parts) == 1 else None, "files": parts}
            )  # fmt: skip
        read, num_kept = sum(r["cells_read"] for r in rows), index.num_rows
        dropped = {"few_genes": read - sum(r["cells_kept"] for r in rows)}
        assert num_kept + sum(dropped.values()) == read, (num_kept, dropped, read)
        assert index["length"].to_numpy().sum() == sum(r["ids_kept"] for r in rows) + num_kept * self.config.tokens.cls
        losses = [
            {"source": r["source"], "reason": "few_genes", "cells": r["cells_read"] - r["cells_kept"]} for r in rows
        ]
        none = pa.schema([(name, pa.null()) for name in ("source", "species", "cells_read", "cells_kept", *_MAPPING)])
        tables = {
            "index": index, "dropped": pa.Table.from_pylist(losses), "imported": pa.Table.from_pylist(rows),
            "mapping": none.empty_table(),
        }  # fmt: skip
        details = {
            "species": list(made.species), "vocabulary": made.hash, "max_len": self.config.tokens.max_len, "cls": self.config.tokens.cls,
            "shards": [entry for _, entry in done], "sources": sources, "imported": rows,
            "refused": [{"name": self.sources[i].name, "uri": self.sources[i].uri, "error": why} for i, why in sorted(self.passes.refused.items())],
        }  # fmt: skip
        self.meter.add("cells_read", read)
        self.meter.add("cells_kept", num_kept)
        self.meter.add("cells_dropped", dropped["few_genes"], reason="few_genes")
        say(
            f"corpus: {read:,} cells imported, {num_kept:,} kept ({dropped['few_genes']:,} few_genes), {len(done)} shards"
        )
        totals = {"read": read, "kept": num_kept, "dropped": dropped}
        return shards.publish_corpus(self.uri, record, tables=tables, counts=totals, details=details)


_MAPPING = tuple(identify.MappingReport.__slots__)
"""Columns of a prepared corpus' mapping.parquet; an imported corpus has no rows in it: the counts' genes are not known."""

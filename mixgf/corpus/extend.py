"""What a corpus takes over from another one, so that added sources alone are read.

Sentences depend on the vocabulary, so it must be the same; what is kept of a source depends on the rules, so they must be
the same too. Then the shards of the older corpus stand in the new one as they are, under the same names, and cells of the
new sources that they already hold are dropped as duplicates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mixgf.cells import qc
from mixgf.config.data import Source
from mixgf.config.parse import difference, to_dict
from mixgf.config.run import Config
from mixgf.corpus.shards import write_done
from mixgf.errors import UserError
from mixgf.genes.vocabulary import Vocabulary
from mixgf.storage import artifacts, files, tables


@dataclass(frozen=True)
class Older:
    """The finished corpus that is extended."""

    uri: str
    record: artifacts.Record

    @property
    def num_shards(self) -> int:
        """Shards taken over; those of new sources are numbered from here."""
        return len(self.record.details["shards"])

    def table(self, name: str) -> pa.Table:
        """Its index, mapping, dropped or hashes table."""
        return tables.read_table(files.join(self.uri, f"{name}.parquet"))

    def shards(self) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """Manifest entry and lengths of every shard."""
        start, lengths = 0, self.table("index")["length"].to_numpy()
        for entry in self.record.details["shards"]:
            yield entry, lengths[start : start + entry["rows"]]
            start += entry["rows"]

    def hashes(self) -> qc.Metrics:
        """Metrics that hold nothing but the hashes of the kept cells (hashes.parquet: uint64 a and b, in cell order)."""
        table = self.table("hashes")
        none = np.zeros(table.num_rows, np.int64)
        return qc.Metrics(none, none.astype(np.int32), none, table["a"].to_numpy(), table["b"].to_numpy())


def find(config: Config, sources: Sequence[Source]) -> Older | None:
    """The corpus that `prepare.extend` names, None where it names none; a `UserError` where it cannot be extended so."""
    uri = config.prepare.extend
    if not uri:
        return None
    record = artifacts.require(uri, "corpus")
    what = f"prepare.extend = {uri!r}"
    if not config.vocab.reuse:
        msg = (
            f"{what}: the vocabulary is not fixed: new cells change its medians, and with them every sentence of the older "
            "cells too. Keep the older vocabulary with --set vocab.reuse=URI, or prepare all sources together in another output"
        )
        raise UserError(msg)
    if Vocabulary.load(config.vocab.reuse).hash != record.details["vocabulary"]:
        msg = f"{what}: made with another vocabulary than vocab.reuse = {config.vocab.reuse!r}; give the one beside that corpus"
        raise UserError(msg)
    data = to_dict(config)
    known = {row["name"] for row in record.config["species"]}
    data["species"] = [row for row in data["species"] if row["name"] in known]  # others may come in addition
    for name in ("species", "qc", "tokens", "seed"):
        changes = difference(record.config.get(name), data[name], name)
        if changes:
            msg = f"{what}: made with other settings: {'; '.join(changes[:3])}. Use those, or prepare all sources together in another output"
            raise UserError(msg)
    have = {source["name"] for source in record.details["sources"]}
    for source in sources:
        if source.name in have:
            msg = f"{what}: holds a source named {source.name!r} already; give only the sources to be added, each with a name of its own (sources[i].name)"
            raise UserError(msg)
    if config.qc.drop_duplicates and not files.exists(files.join(uri, "hashes.parquet")):
        msg = f"{what}: has no hashes.parquet, so cells that it already holds would not be found; --set qc.drop_duplicates=false does without"
        raise UserError(msg)
    return Older(uri, record)


def take(work: str, number: int, older: str, *, entry: dict[str, Any], length_N: np.ndarray, to: str) -> None:
    """Copy one shard of the corpus `older` to the folder `to`, and write the part that says so."""
    uri = files.join(to, entry["name"])
    files.copy(files.join(older, "shards", entry["name"]), uri)
    if files.size(uri) != entry["bytes"]:
        msg = f"{older}: shard {entry['name']} has {files.size(uri)} bytes, its record says {entry['bytes']}: damaged; restore it"
        raise UserError(msg)
    write_done(work, number, length_N, entry)

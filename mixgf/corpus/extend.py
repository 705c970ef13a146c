"""Extend a finished corpus by new sources: only these are read, and the shards of the old corpus are copied.

The vocabulary and all settings of quality control and encoding must be those of the old corpus. Its shards keep their
names. Cells of new sources that the old corpus already holds are dropped as duplicates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mixgf.arrays import Ints
from mixgf.cells import qc
from mixgf.config.data import Source
from mixgf.config.fields import content_of
from mixgf.config.parse import difference, to_dict
from mixgf.config.run import Config
from mixgf.corpus import near_hashes
from mixgf.corpus.reader import Corpus
from mixgf.corpus.shards import write_shard_info
from mixgf.errors import UserError
from mixgf.genes.vocabulary import Vocabulary
from mixgf.storage import artifacts, files


def recorded_settings(config: Config) -> dict[str, Any]:
    """Settings as a corpus' record holds them, as earlier versions did: `qc.doublets=off` is false, and `qc.near_duplicates=off` is left out."""
    data = to_dict(config) | {"vocab": content_of(config.vocab)}
    if config.qc.near_duplicates == "off":
        del data["qc"]["near_duplicates"]
    if config.qc.doublets == "off":
        data["qc"]["doublets"] = False
    return data


@dataclass(frozen=True)
class BaseCorpus:
    """The finished corpus that is extended."""

    uri: str
    record: artifacts.Record

    @property
    def num_shards(self) -> int:
        """Number of shards to copy; shards of new sources are numbered from here."""
        return len(self.record.details["shards"])

    def table(self, name: str) -> pa.Table:
        """One of the corpus' tables: `index`, `mapping`, `dropped` or `hashes`."""
        return artifacts.read_artifact_table(self.uri, name)

    def shards(self) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """Manifest entry and lengths of every shard."""
        start, lengths = 0, self.table("index")["length"].to_numpy()
        for entry in self.record.details["shards"]:
            yield entry, lengths[start : start + entry["rows"]]
            start += entry["rows"]

    def places(self, cells: Ints) -> tuple[list[str], list[int]]:
        """Source and row in it of some cells of the corpus."""
        found = Corpus.open(self.uri).obs_of(cells, ["source", "source_row"])
        return found["source"].tolist(), found["source_row"].tolist()

    def hashes(self) -> qc.Hashes:
        """Hashes of the kept cells (hashes.parquet: uint64 a and b, in cell order)."""
        table = self.table("hashes")
        return qc.Hashes(table["a"].to_numpy(), table["b"].to_numpy())


def find_base_corpus(config: Config, sources: Sequence[Source]) -> BaseCorpus | None:
    """The corpus that `prepare.extend` names; None if it is empty.

    Raises:
        UserError: the corpus was made with another vocabulary or other settings, or has a source of the same name.
    """
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
    data = recorded_settings(config)
    known = {row["name"] for row in record.config["species"]}
    data["species"] = [row for row in data["species"] if row["name"] in known]  # new species are allowed
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
    return BaseCorpus(uri, record)


def copy_shard(
    work: str, number: int, older: str, *, entry: dict[str, Any], length_N: np.ndarray, to: str, near: str
) -> None:
    """Copy one shard of the corpus `older` to the folder `to`, then write its information to the work folder.

    Signatures of its cells go to the folder `near`, unless that is empty.
    """
    if near:
        files.copy(files.join(older, near_hashes.FOLDER, entry["name"]), files.join(near, entry["name"]))
    uri = files.join(to, entry["name"])
    files.copy(files.join(older, "shards", entry["name"]), uri)
    if files.size(uri) != entry["bytes"]:
        msg = f"{older}: shard {entry['name']} has {files.size(uri)} bytes, its record says {entry['bytes']}: damaged; restore it"
        raise UserError(msg)
    write_shard_info(work, number, length_N, entry)

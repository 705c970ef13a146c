"""Genes of the sources of `prepare`: how columns map to genes, and which genes may enter the vocabulary.

One task takes a group of sources. So the process that runs the stage reads one small part per group, not the gene columns of
every source.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mixgf.cells.reader import OPTION, setting
from mixgf.config.data import SpeciesRow
from mixgf.corpus.shards import part_uri
from mixgf.genes import identify
from mixgf.storage import files
from mixgf.storage.tables import read_table, write_table

GROUP_SOURCES = 64
"""Sources of a task."""
_REPORT = pa.schema(
    [
        ("source", pa.int64()), ("columns", pa.int64()), ("mapped", pa.int64()), ("renamed", pa.int64()), ("summed", pa.int64()),
        ("unmapped", pa.int64()), ("counts_lost", pa.float64()), ("unmapped_names", pa.list_(pa.string())), ("cause", pa.string()),
        ("left_out", pa.int64()), ("left_out_kinds", pa.list_(pa.string())),
        ("respelled", pa.int64()), ("respelled_names", pa.list_(pa.string())),
        ("candidate_counts", pa.int64()),
    ]
)  # fmt: skip


def group_sources(indices: Iterable[int]) -> dict[int, list[int]]:
    """Numbers of sources in groups. The group of a source depends on its number alone."""
    groups: dict[int, list[int]] = {}
    for i in sorted(indices):
        groups.setdefault(i // GROUP_SOURCES, []).append(i)
    return groups


def report_group(
    work: str, group: int, numbers: Mapping[int, Sequence[int]], species: Mapping[int, str], rows: Sequence[SpeciesRow]
) -> None:
    """Write the gene mapping of a group of sources.

    Args:
        work: URI of the work folder.
        group: number of the group.
        numbers: source to the numbers of its row ranges, whose sums of counts are there.
        species: source to its species.
        rows: all species.
    """
    found = []
    for i, ranges in numbers.items():
        sums_G = np.sum([read_table(part_uri(work, "sums", n))["sum"].to_numpy() for n in ranges], axis=0)
        columns = read_table(
            part_uri(work, "sources", i),
            ["name", "kind", "gene", "how", "spelling", "counted", "candidate", "canonical"],
        )
        own = partial(identify.gene_lookup, next(row for row in rows if row.name == species[i]))
        others = (identify.gene_lookup(row) for row in rows if row.name != species[i])
        way = setting(OPTION, "genes", "COLUMN")
        found.append({"source": i} | asdict(identify.report_mapping(columns, sums_G, others, own, way=way)))
    write_table(part_uri(work, "gene_reports", group), pa.Table.from_pylist(found, _REPORT))


def read_reports(work: str, groups: Iterable[int]) -> Iterator[tuple[int, identify.MappingReport]]:
    """Source and its gene mapping, from the parts of `report_group`, in order."""
    for part in files.map_reads(work, lambda group: read_table(part_uri(work, "gene_reports", group)), groups):
        for row in part.to_pylist():
            yield row.pop("source"), identify.MappingReport(**row)


def collect_genes(work: str, species: str, group: int, indices: Sequence[int]) -> None:
    """Write the candidate genes of a group of sources of one species, ascending."""
    parts = [read_table(part_uri(work, "sources", i), ["gene", "candidate"]) for i in indices]
    _write_genes(part_uri(work, f"genes-{species}", group), (p["gene"].filter(p["candidate"]) for p in parts))


def merge_genes(work: str, species: str, groups: Sequence[int]) -> list[str]:
    """Candidate genes of a species over all groups, ascending; also written as a part file, which the sketches read."""
    parts = files.map_reads(work, lambda group: read_table(part_uri(work, f"genes-{species}", group))["gene"], groups)
    return _write_genes(part_uri(work, "genes", species), parts)


def _write_genes(uri: str, parts: Iterable[pa.ChunkedArray]) -> list[str]:
    found: set[str] = set()
    for part in parts:
        found.update(pc.unique(part).to_pylist())
    genes = sorted(found)
    write_table(uri, pa.table({"gene": pa.array(genes, pa.string())}))
    return genes

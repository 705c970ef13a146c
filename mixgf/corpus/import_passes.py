"""The two passes of `import`: check every Arrow file of tokenised data sets, then write its sentences as shards.

A task checks one file (`check_file`) or makes a shard of one row range (`translate_shard`). It writes its part file atomically, and
the bytes do not depend on the worker, so a task can be repeated. A source that cannot be used raises `UserError`.

Part files in the work folder: lookup/I (token of each id of the dictionary of source I), files/I-F (file F of source I:
number of genes of each cell, and facts as JSON), done/N (information on shard N).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from mixgf.config.data import Imports, Source, Tokens
from mixgf.config.fields import content_of, facts_of
from mixgf.config.parse import to_dict
from mixgf.config.run import Config
from mixgf.corpus import arrow_dataset, remap_ids, shards
from mixgf.corpus.arrow_dataset import Attribute, Layout
from mixgf.errors import UserError
from mixgf.execution import Pipeline
from mixgf.genes import species, token_dictionaries, vocabulary
from mixgf.genes.vocabulary import CLS
from mixgf.storage import artifacts, files
from mixgf.storage.tables import read_table, write_table

SCHEMA = 1
ALL = facts_of(Imports)["dictionaries"].shared_name
"""Name of the dictionary, or of the medians, that holds for all sources."""


@dataclass
class ImportInputs:
    """Token dictionaries and medians of all sources, read and checked; from them the vocabulary and the fingerprints.

    Raises:
        UserError: a source has no dictionary, a species has no medians, or two tables disagree.
    """

    config: Config
    sources: tuple[Source, ...]

    def __post_init__(self) -> None:
        rules = self.config.imports
        self.rows = {row.name: row for row in self.config.species}
        names = [name for name in self.rows if any(s.species == name for s in self.sources)]
        by_name = _named(rules, "dictionaries", {s.name for s in self.sources} | set(self.rows))
        self.dictionary_uris: list[str] = []
        for i, source in enumerate(self.sources):
            uri = by_name.get(source.name) or by_name.get(source.species) or by_name.get(ALL)
            if uri is None:
                msg = (
                    f"imports.dictionaries = {dict(rules.dictionaries)}: none for sources[{i}] ({source.name!r}, {source.species}); "
                    f"add {source.species}=URI of the token dictionary that its ids belong to"
                )
                raise UserError(msg)
            self.dictionary_uris.append(uri)
        self.dictionaries = {
            uri: token_dictionaries.read_token_dictionary(uri, "imports.dictionaries")
            for uri in dict.fromkeys(self.dictionary_uris)
        }
        self.known = {name: set(species.gene_table(row)["gene"].to_pylist()) for name, row in self.rows.items()}
        self.genes = [self._genes(i) for i in range(len(self.sources))]
        self.reused = vocabulary.Vocabulary.load(self.config.vocab.reuse) if self.config.vocab.reuse else None
        self.median_uris = {} if self.reused else _named(rules, "medians", set(self.rows))
        self.medians = {} if self.reused else {name: self._medians(name) for name in names}
        if self.reused is not None:
            for name in names:
                self.reused.species_genes(name)

    def _genes(self, index: int) -> dict[str, str]:
        """Genes of a source's species in its dictionary (as spelled there), to Ensembl ids."""
        source, dictionary = self.sources[index], self.dictionaries[self.dictionary_uris[index]]
        found = token_dictionaries.genes_of_species(dictionary.genes, source.species, self.rows.values(), self.known)
        if not found:
            shown = ", ".join(list(dictionary.genes)[:3]) or "nothing"
            msg = (
                f"imports.dictionaries = {dictionary.uri!r}: none of its {len(dictionary.genes):,} genes is one of {source.species} "
                f"(source {source.name!r}); they are like {shown}; must be Ensembl ids {self.rows[source.species].gene_prefix}…"
            )
            raise UserError(msg)
        return found

    def _medians(self, name: str) -> dict[str, float]:
        """Medians of a species, for the genes of its dictionaries."""
        mine = [i for i, s in enumerate(self.sources) if s.species == name]
        wanted = {gene for i in mine for gene in self.genes[i].values()}
        uri = self.median_uris.get(name) or self.median_uris.get(ALL)
        # a pickle or JSON file is either a dictionary or medians; a table can be both
        tables = [u for u in (self.dictionary_uris[i] for i in mine) if not u.endswith((".pkl", ".pickle", ".json"))]
        found = self._read_medians(name, [uri] if uri else tables, "imports.medians", need=bool(uri))
        if not found and self.config.vocab.medians:
            found = self._read_medians(name, [self.config.vocab.medians], "vocab.medians", need=True)
        out = {gene: median for gene, median in found.items() if gene in wanted}
        if not out:
            msg = (
                f"imports.medians = {dict(self.config.imports.medians)}: no median of any {name} gene of the dictionary; a vocabulary "
                f"needs them to encode further cells: add {name}=URI of its median table, or name a vocabulary with vocab.reuse"
            )
            raise UserError(msg)
        return out

    def _read_medians(self, name: str, uris: list[str], field: str, *, need: bool) -> dict[str, float]:
        """Medians of a species from several tables, which must agree."""
        found: dict[str, float] = {}
        for uri in dict.fromkeys(uris):
            table = token_dictionaries.read_medians(uri, field)
            if table is None and need:
                msg = f"{field} = {uri!r}: no column median; give gene (or key) and median"
                raise UserError(msg)
            for given, gene in token_dictionaries.genes_of_species(
                table or (), name, self.rows.values(), self.known
            ).items():
                median = (table or {})[given]
                if found.setdefault(gene, median) != median:
                    msg = f"imports.medians: {name} gene {gene} has medians {found[gene]} and {median}; give one table: {name}=URI"
                    raise UserError(msg)
        return found

    def plans(self) -> tuple[artifacts.Record | None, artifacts.Record]:
        """Planned records of the vocabulary (None if one is reused) and of the corpus."""
        data = to_dict(self.config)
        uris = [*self.dictionary_uris, *self.median_uris.values()]
        uris += [self.config.vocab.medians] if self.config.vocab.medians and self.reused is None else []
        tables = {uri: files.sha256(uri) for uri in dict.fromkeys(uris) if files.exists(uri)}
        content = {
            "species": data["species"], "vocab": content_of(self.config.vocab), "imports": data["imports"] | {"sha256": tables}
        }  # fmt: skip
        vocabulary = None
        if self.reused is not None:
            parent = artifacts.require(self.config.vocab.reuse, "vocabulary").fingerprint
        else:
            which = [[s.name, s.species] for s in self.sources]
            vocabulary = artifacts.plan("vocabulary", SCHEMA, content | {"imported": which}, {})
            parent = vocabulary.fingerprint
        whole = content | {
            "sources": [content_of(s) | {"size": _size(s.uri)} for s in self.sources], "tokens": data["tokens"],
            "qc": {"min_genes": self.config.qc.min_genes}, "prepare": content_of(self.config.prepare),
        }  # fmt: skip
        return vocabulary, artifacts.plan("corpus", SCHEMA, whole, {"vocabulary": parent})

    def build(self) -> vocabulary.Vocabulary:
        """Build the vocabulary of all dictionary genes with a median."""
        tables = {name: species.gene_table(self.rows[name]) for name in self.medians}
        pairs = species.orthologs(self.config.vocab.orthologs)
        return vocabulary.build_vocabulary(self.medians, tables, sharing=self.config.vocab.sharing, orthologs=pairs)


def _named(rules: Imports, field: str, known: set[str]) -> dict[str, str]:
    out: dict[str, str] = dict(getattr(rules, field))
    unknown = sorted(set(out) - known - {ALL})
    if unknown:
        msg = f"imports.{field} = {unknown[0]}={out[unknown[0]]}: no such source or species; must be one of {', '.join(sorted(known))}"
        raise UserError(msg)
    return out


def _size(uri: str) -> int:
    """Bytes of a data set's Arrow files; -1 if they cannot be listed (a later check reports why)."""
    try:
        return sum(files.size(file) for file in arrow_dataset.data_files(uri))
    except UserError:
        return -1


@dataclass(frozen=True, kw_only=True, slots=True)
class ImportRules:
    """What is checked and kept; the same for all sources."""

    imports: Imports
    min_genes: int
    """Fewest vocabulary genes of a kept cell."""
    tokens: Tokens
    size: int
    """Number of token ids of the vocabulary."""

    @property
    def longest(self) -> int:
        """Most genes of a sentence."""
        return self.tokens.max_len - int(self.tokens.cls)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowRange:
    """Rows [start, stop) of file number `file` of source number `index`; its first row is row `first` of the source."""

    index: int
    file: int
    source: Source
    start: int
    stop: int
    first: int


def file_part(index: int, file: int) -> str:
    """Name of the part file of a checked Arrow file."""
    return f"{index:05d}-{file:05d}"


def check_file(
    work: str, index: int, number: int, source: Source, uri: str, *, dictionary: str, rules: ImportRules
) -> None:
    """Read one Arrow file whole: hash it, find its record batches, check its ids, and write what was found as a part file.

    Args:
        work: URI of the work folder.
        index: number of the source.
        number: number of the file within the source.
        source: the source.
        uri: the Arrow file.
        dictionary: URI of the source's token dictionary, for messages.
        rules: what is checked.
    """
    table = read_table(shards.part_uri(work, "lookup", index))["token"].to_numpy()
    counts = dict.fromkeys((*remap_ids.COUNTED, "in_dropped_cells", "wrong_length"), 0)
    genes: list[np.ndarray] = [np.empty(0, np.int32)]
    rows: list[int] = []
    with files.local_copy(uri) as path, files.open_arrow(str(path)) as file:
        where = arrow_dataset.find_batches(file, uri)
        schema = arrow_dataset.read_schema(file, where, uri)
        arrow_dataset.check_schema(schema, uri)
        obs, left_out = _obs(schema, source, index, uri)
        for batch in arrow_dataset.read_batches(file, where, uri):
            row = sum(rows)
            ids, offsets = arrow_dataset.read_ids(batch, uri, row)
            found = remap_ids.remap_ids(ids, offsets, table, size=rules.size, longest=rules.longest)
            _check_ids(
                found,
                ids,
                offsets,
                uri=uri,
                row=row,
                dictionary=dictionary,
                species_name=source.species,
                rules=rules.imports,
            )
            counts["wrong_length"] += _count_wrong_lengths(batch, offsets, uri, row, rules.imports)
            kept = np.minimum(found.genes_N, rules.longest)
            lost = int(kept[found.genes_N < rules.min_genes].sum())
            for name, value in found.counts.items():
                counts[name] += value
            counts["kept"] -= lost
            counts["in_dropped_cells"] += lost
            genes.append(found.genes_N)
            rows.append(batch.num_rows)
        facts = {
            "uri": uri, "size": path.stat().st_size, "sha256": files.sha256(str(path)), "rows": sum(rows), "layout": asdict(where),
            "batch_rows": rows, "obs": {name: asdict(attribute) for name, attribute in obs.items()}, "left_out": left_out,
            "counts": counts,
        }  # fmt: skip
    part = pa.table({"genes": pa.array(np.concatenate(genes), pa.int32())})
    write_table(
        shards.part_uri(work, "files", file_part(index, number)),
        part.replace_schema_metadata({"facts": json.dumps(facts, sort_keys=True)}),
    )


def read_checked(work: str, index: int, number: int) -> tuple[np.ndarray, dict[str, Any]]:
    """Number of vocabulary genes of each cell of a checked file (int32), and its facts."""
    table = read_table(shards.part_uri(work, "files", file_part(index, number)))
    return table["genes"].to_numpy(), json.loads(table.schema.metadata[b"facts"])


def _obs(schema: pa.Schema, source: Source, index: int, uri: str) -> tuple[dict[str, Attribute], list[str]]:
    """Columns to keep as obs, by their new names, and the names of columns that are left out."""
    found, left_out = arrow_dataset.find_attributes(schema)
    if source.obs or source.rename:
        chosen = {}
        for old, new in source.kept_columns(found).items():
            if old not in found:
                msg = f"{uri}: sources[{index}].obs = {old!r}: no such column; it has {', '.join(found) or 'none'}"
                raise UserError(msg)
            chosen[new] = found[old]
        return {new: a for new, a in chosen.items() if new not in shards.RESERVED}, []
    left_out += [name for name in found if name in shards.RESERVED]
    return {name: a for name, a in found.items() if name not in shards.RESERVED}, left_out


def _check_ids(
    found: remap_ids.Sentences, ids: np.ndarray, offsets: np.ndarray, *, uri: str, row: int, dictionary: str, species_name: str, rules: Imports
) -> None:  # fmt: skip
    kinds = {
        "unknown": ("unknown_ids", f"is not in the dictionary {dictionary}, or a special token out of place (another dictionary?)"),
        "outside": ("outside", f"is a gene that the {species_name} vocabulary does not have (another species? no median?)"),
        "duplicate": ("duplicates", "is a gene that the sentence already has (a damaged data set?)"),
    }  # fmt: skip
    for kind, (field, why) in kinds.items():
        at = found.first[kind]
        if at >= 0 and getattr(rules, field) == "refuse":
            cell = row + int(np.searchsorted(offsets, at, side="right")) - 1
            msg = f"{uri}: row {cell}: id {ids[at]} {why}; or leave such ids out and count them: imports.{field} = 'count'"
            raise UserError(msg)


def _count_wrong_lengths(batch: pa.RecordBatch, offsets: np.ndarray, uri: str, row: int, rules: Imports) -> int:
    """Number of cells whose column `length` differs from the number of ids."""
    if "length" not in batch.schema.names:
        return 0
    said = batch.column("length").fill_null(-1).to_numpy(zero_copy_only=False)
    wrong = np.flatnonzero(said != np.diff(offsets))
    if len(wrong) and rules.lengths == "refuse":
        at = int(wrong[0])
        msg = (
            f"{uri}: row {row + at}: length says {said[at]}, input_ids has {offsets[at + 1] - offsets[at]} ids; "
            "fetch the data set again, or believe the ids and count such cells: imports.lengths = 'count'"
        )
        raise UserError(msg)
    return len(wrong)


def read_rows(
    work: str, row_range: RowRange, shard: int, *, to: str, rules: ImportRules, obs: dict[str, str]
) -> Iterator[pa.Table]:
    """Pass 2, read: the kept rows of a row range, a table per record batch.

    Args:
        work: URI of the work folder.
        row_range: the rows; at least one is kept.
        shard: number of the shard.
        to: URI of the folder of shards.
        rules: as in `check_file`.
        obs: kind (`str`, `float`, `int`) of every obs column of the corpus; null where a file lacks one.

    Yields:
        Tables with `source_row`, `length` (tokens of the sentence), `ids` (of the dictionary) and the columns of obs.
    """
    del shard, to
    genes_N, facts = read_checked(work, row_range.index, row_range.file)
    where = Layout(**facts["layout"] | {"batches": tuple(tuple(b) for b in facts["layout"]["batches"])})
    attributes = {name: Attribute(**a | {"labels": tuple(a["labels"])}) for name, a in facts["obs"].items()}
    starts = np.concatenate([[0], np.cumsum(facts["batch_rows"])])
    first, last = np.searchsorted(starts, [row_range.start, row_range.stop - 1], side="right") - 1
    with files.open_arrow(facts["uri"]) as file:
        for number in range(int(first), int(last) + 1):
            begin, end = max(row_range.start, int(starts[number])), min(row_range.stop, int(starts[number + 1]))
            genes_B = genes_N[begin:end]
            keep_B = genes_B >= rules.min_genes
            batch = arrow_dataset.read_batch(file, where, number, facts["uri"])
            batch = batch.slice(begin - int(starts[number]), end - begin).filter(pa.array(keep_B))
            ids, offsets = arrow_dataset.read_ids(batch, facts["uri"], begin)
            length_B = np.minimum(genes_B[keep_B], rules.longest) + int(rules.tokens.cls)
            yield pa.table(
                {
                    "source_row": pa.array(np.flatnonzero(keep_B) + begin + row_range.first, pa.int64()),
                    "length": pa.array(length_B, pa.int32()),
                    "ids": pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(ids)),
                }
                | {
                    f"obs {name}": attributes[name].read(batch).cast(shards.OBS_TYPES[kind])
                    if name in attributes
                    else pa.nulls(batch.num_rows, shards.OBS_TYPES[kind])
                    for name, kind in obs.items()
                }
            )


def translate_rows(
    tables: Iterator[pa.Table], work: str, row_range: RowRange, shard: int, *, to: str, rules: ImportRules, obs: dict[str, str]
) -> Iterator[pa.Table]:  # fmt: skip
    """Pass 2, transform: ids of the dictionary to tokens of the vocabulary; columns are those of the shard."""
    del shard, to
    token_K = read_table(shards.part_uri(work, "lookup", row_range.index))["token"].to_numpy()
    source = row_range.source
    for table in tables:
        ids = table["ids"].combine_chunks()
        ids = ids.chunk(0) if isinstance(ids, pa.ChunkedArray) else ids
        offsets_N1 = ids.offsets.to_numpy()
        ids_T = ids.values.to_numpy()[offsets_N1[0] : offsets_N1[-1]]
        found = remap_ids.remap_ids(ids_T, offsets_N1 - offsets_N1[0], token_K, size=rules.size, longest=rules.longest)
        tokens_T, length_N = found.tokens, table["length"].to_numpy()
        offsets_N1 = np.concatenate([[0], np.cumsum(length_N, dtype=np.int64)])
        if rules.tokens.cls:
            tokens_T = np.insert(tokens_T, offsets_N1[:-1] - np.arange(table.num_rows), np.int32(CLS))
        assert offsets_N1[-1] == len(tokens_T), (row_range, offsets_N1[-1], len(tokens_T))
        columns = {
            "cell": pa.array([f"{source.name}:{row}" for row in table["source_row"].to_pylist()], pa.string()),
            "species": pa.array([source.species] * table.num_rows, pa.string()),
            "source": pa.array([source.name] * table.num_rows, pa.string()),
            "source_row": table["source_row"],
            "length": table["length"],
        }
        sentences = pa.ListArray.from_arrays(
            pa.array(offsets_N1, pa.int32()), pa.array(tokens_T, pa.int32()), shards.SENTENCES.type
        )
        columns |= {
            name: pa.nulls(table.num_rows, kind)
            for name, kind in shards.COMPUTED_COLUMNS.items()
            if name not in columns
        }
        yield pa.Table.from_arrays(
            [sentences, *columns.values(), *(table[f"obs {name}"] for name in obs)], schema=shards.sentence_schema(obs)
        )


def write_sentences(
    tables: Iterator[pa.Table], work: str, row_range: RowRange, shard: int, *, to: str, rules: ImportRules, obs: dict[str, str]
) -> None:  # fmt: skip
    """Pass 2, write: the shard, then its information to the work folder."""
    del row_range, rules
    shards.write_sentences(tables, shards.sentence_schema(obs), to=to, work=work, shard=shard)


translate_shard = Pipeline(
    name="translate_shard", source="Sentences", read=read_rows, steps=(translate_rows,), write=write_sentences
)
"""Pass 2: the kept rows of a row range as a shard of sentences. Takes the arguments of `read_rows`."""

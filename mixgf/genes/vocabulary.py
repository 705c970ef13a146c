"""The joint vocabulary: one table of genes by species with token ids and medians, and its hash.

Special tokens are `<pad>` 0, `<mask>` 1, `<cls>` 2; genes follow from id 3, by species in the config's order, then by
Ensembl id (spec section 3). A gene is in the vocabulary if its biotype is asked for and it has a median, that is, if at
least one kept cell has it, or if the imported table names it.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from mixgf.config.data import SpeciesRow
from mixgf.errors import UserError
from mixgf.storage import files
from mixgf.storage.tables import read_table, write_table

PAD, MASK, CLS = 0, 1, 2
NUM_SPECIALS = 3
SPECIALS = ("<pad>", "<mask>", "<cls>")


SCHEMA = pa.schema(
    [
        ("token", pa.int32()),
        ("gene", pa.string()),
        ("symbol", pa.string()),
        ("species", pa.string()),
        ("median", pa.float64()),
        ("biotype", pa.string()),
    ]
)


@dataclass(frozen=True, slots=True)
class SpeciesGenes:
    """The vocabulary genes of one species, sorted by token: G genes."""

    genes: np.ndarray
    tokens: np.ndarray
    """int32[G], strictly ascending."""
    medians: np.ndarray
    """float64[G], above 0."""

    def positions(self, genes: pa.Array) -> np.ndarray:
        """int32: where each Ensembl id (string or null) stands in this table, -1 where it does not."""
        found = pc.index_in(genes, value_set=pa.array(self.genes, pa.string()))
        return cast("np.ndarray", pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int32))


class Vocabulary:
    """The joint vocabulary; immutable.

    `table` has one row per (species, gene): token int32, gene, symbol, species, median float64, biotype. With
    `sharing = "ortholog"` rows of two species may hold the same token.
    """

    def __init__(self, table: pa.Table, *, species: tuple[str, ...], sharing: str) -> None:
        assert table.schema.equals(SCHEMA), table.schema
        self.table = table
        self.species = species
        self.sharing = sharing

    @cached_property
    def size(self) -> int:
        """Number of token ids, specials included (V)."""
        return int(pc.max(self.table["token"]).as_py() or NUM_SPECIALS - 1) + 1

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of what decides a sentence: tokens, genes, species, medians."""
        digest = hashlib.sha256(f"{self.sharing} {' '.join(self.species)}\n".encode())
        columns = (self.table[name].to_pylist() for name in ("token", "gene", "species", "median"))
        for token, gene, species, median in zip(*columns, strict=True):
            digest.update(f"{token}\t{gene}\t{species}\t{float(median).hex()}\n".encode())
        return digest.hexdigest()

    @cached_property
    def _by_species(self) -> dict[str, SpeciesGenes]:
        out = {}
        for name in self.species:
            part = self.table.filter(pc.equal(self.table["species"], name)).sort_by("token")
            genes = np.asarray(part["gene"].to_pylist(), dtype=object)
            out[name] = SpeciesGenes(genes, part["token"].to_numpy(), part["median"].to_numpy())
        return out

    def of(self, species: str) -> SpeciesGenes:
        """The genes of one species; a `UserError` for a species that the vocabulary does not know."""
        if species not in self._by_species:
            msg = f"species = {species!r}: not in the vocabulary, which has {', '.join(self.species)}; prepare the corpus with it"
            raise UserError(msg)
        return self._by_species[species]

    def species_tokens(self, species: str) -> np.ndarray:
        """int32: the ids from which masked-gene replacements of that species are drawn."""
        return self.of(species).tokens

    def ortholog_map(
        self, source: str, target: str, orthologs: Mapping[tuple[str, str], Mapping[str, str]]
    ) -> np.ndarray:
        """int32[V]: the `target` token of each `source` token's one-to-one ortholog, -1 where there is none."""
        pairs = orthologs.get((source, target), {})
        tokens = dict(zip(self.of(target).genes, self.of(target).tokens.tolist(), strict=True))
        out = np.full(self.size, -1, dtype=np.int32)
        mine = self.of(source)
        for gene, token in zip(mine.genes, mine.tokens, strict=True):
            out[token] = tokens.get(pairs.get(gene, ""), -1)
        return out

    def older(self, hash_: str) -> Vocabulary | None:
        """The vocabulary of this hash that this one was grown from, or is: its first species; None where there is none."""
        for num in range(len(self.species), 0, -1):
            names = self.species[:num]
            table = self.table.filter(pc.is_in(self.table["species"], pa.array(names)))
            found = Vocabulary(table.combine_chunks(), species=names, sharing=self.sharing)
            if found.hash == hash_:
                return found
        return None

    def models(self, old: Vocabulary, orthologs: Mapping[tuple[str, str], Mapping[str, str]]) -> np.ndarray:
        """int64[V]: of every id the id of `old` (see `older`) whose vector it starts with, -1 where that is a random one.

        Old ids have their own. A new gene has that of its one-to-one ortholog, in the species with the most of these first.
        """
        out = np.full(self.size, -1, dtype=np.int64)
        out[: old.size] = np.arange(old.size)
        for i, name in enumerate(self.species[len(old.species) :], len(old.species)):
            maps = [self.ortholog_map(name, earlier, orthologs) for earlier in self.species[:i]]
            for partner_V in sorted(maps, key=lambda partner_V: -int((partner_V >= 0).sum())):  # stable
                at = np.flatnonzero((out < 0) & (partner_V >= 0))
                out[at] = out[partner_V[at]]
        return out

    def _per_token(self, column: str) -> list[str]:
        out = [*SPECIALS, *([""] * (self.size - NUM_SPECIALS))]
        for token, value in zip(self.table["token"].to_pylist(), self.table[column].to_pylist(), strict=True):
            out[token] = out[token] or value  # a shared token is named after its first species
        return out

    def symbols(self) -> list[str]:
        """Symbol per token id."""
        return self._per_token("symbol")

    def genes(self) -> list[str]:
        """Ensembl id per token id."""
        return self._per_token("gene")

    def find(self, gene_or_symbol: str, species: str) -> int:
        """Token of an Ensembl id or symbol of one species; a `UserError` if the vocabulary has no such gene."""
        self.of(species)
        part = self.table.filter(pc.equal(self.table["species"], species))
        for column in ("gene", "symbol"):
            found = part.filter(pc.equal(part[column], gene_or_symbol))
            if found.num_rows:
                return int(found["token"][0].as_py())
        near = [s for s in part["symbol"].to_pylist() if s.lower() == gene_or_symbol.lower()]
        hint = f"; did you mean {near[0]}?" if near else "; give an Ensembl id or a current symbol of a detected gene"
        msg = f"gene = {gene_or_symbol!r}: not in the {species} vocabulary{hint}"
        raise UserError(msg)

    def save(self, uri: str) -> tuple[int, str]:
        """Write one Parquet file; returns (bytes, sha256)."""
        meta = {"mixgf": json.dumps({"species": self.species, "sharing": self.sharing, "hash": self.hash})}
        return write_table(uri, self.table.replace_schema_metadata(meta))

    @classmethod
    def load(cls, uri: str) -> Vocabulary:
        """Read a vocabulary file, or the file in a vocabulary artifact's folder."""
        uri = uri if uri.endswith(".parquet") else files.join(uri, "vocabulary.parquet")
        if not files.exists(uri):
            msg = f"{uri}: no such vocabulary; `mixgf prepare` makes one"
            raise UserError(msg)
        table = read_table(uri)
        meta = json.loads((table.schema.metadata or {}).get(b"mixgf", b"{}"))
        if "hash" not in meta:
            msg = f"{uri}: not a vocabulary of mixgf; give the vocabulary.parquet that `mixgf prepare` wrote"
            raise UserError(msg)
        found = cls(table.replace_schema_metadata(None), species=tuple(meta["species"]), sharing=meta["sharing"])
        if found.hash != meta["hash"]:
            msg = f"{uri}: its content does not fit its hash {meta['hash'][:12]}: damaged or edited; make it again"
            raise UserError(msg)
        return found


def build(
    medians: Mapping[str, Mapping[str, float]],
    tables: Mapping[str, pa.Table],
    *,
    sharing: str,
    orthologs: Mapping[tuple[str, str], Mapping[str, str]],
    older: Vocabulary | None = None,
) -> Vocabulary:
    """Make the vocabulary.

    Args:
        medians: by species, in the order in which ids are given out: Ensembl id to median.
        tables: by species, its gene table (for symbols and biotypes; genes that it lacks have empty ones).
        sharing: `separate`, or `ortholog`: a gene whose one-to-one ortholog in an earlier species has an id takes that id.
        orthologs: (species_a, species_b) to pairs of genes.
        older: a vocabulary of other species and the same sharing, which stays as it is; these come behind it.
    """
    rows: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    given: dict[tuple[str, str], int] = {}
    free, names = NUM_SPECIALS, list(medians)
    if older is not None:
        assert older.sharing == sharing, (older.sharing, sharing)
        assert not set(older.species) & set(names), (older.species, names)
        rows = older.table.to_pydict()
        given = dict(zip(zip(rows["species"], rows["gene"], strict=True), rows["token"], strict=True))
        free, names = older.size, [*older.species, *names]
    for i, species in enumerate(names):
        if species not in medians:
            continue
        table = tables[species]
        facts = dict(
            zip(
                table["gene"].to_pylist(),
                zip(table["symbol"].to_pylist(), table["biotype"].to_pylist(), strict=True),
                strict=True,
            )
        )
        used: set[int] = set()  # with three species two genes could both claim one id; the second gets its own
        for gene in sorted(medians[species]):
            token = -1
            for earlier in names[:i] if sharing == "ortholog" else ():
                partner = orthologs.get((species, earlier), {}).get(gene)
                token = given.get((earlier, partner), -1) if partner is not None else -1
                if token >= 0:
                    break
            if token < 0 or token in used:
                token, free = free, free + 1
            used.add(token)
            given[species, gene] = token
            symbol, biotype = facts.get(gene, ("", ""))
            median = float(medians[species][gene])
            assert median > 0, (species, gene, median)
            for name, value in zip(
                SCHEMA.names, (token, gene, symbol or gene, species, median, biotype or ""), strict=True
            ):
                rows[name].append(value)
    return Vocabulary(pa.table(rows, schema=SCHEMA), species=tuple(names), sharing=sharing)


def read_medians(uri: str, species: Iterable[SpeciesRow], known: Mapping[str, set[str]]) -> dict[str, dict[str, float]]:
    """Import a median table (Parquet, TSV or TSV.gz with columns gene (or key) and median), split by species.

    A gene belongs to the species whose gene table names it, else to the one with the longest fitting id prefix; rows
    without a median (special tokens of published tables) are passed over, genes of no species here as well.
    """
    if not files.exists(uri):
        msg = f"vocab.medians = {uri!r}: no such file; give a Parquet or TSV table with columns gene and median"
        raise UserError(msg)
    if uri.endswith(".parquet"):
        table = read_table(uri)
    else:
        data = files.read_bytes(uri)
        text = gzip.decompress(data) if uri.endswith(".gz") else data
        table = pa_csv.read_csv(io.BytesIO(text), parse_options=pa_csv.ParseOptions(delimiter="\t"))
    key = next((name for name in ("gene", "key", "ensembl_id") if name in table.column_names), None)
    if key is None or "median" not in table.column_names:
        msg = f"vocab.medians = {uri!r}: has columns {', '.join(table.column_names)}; must have gene and median"
        raise UserError(msg)
    rows = sorted(species, key=lambda row: -len(row.gene_prefix))
    out: dict[str, dict[str, float]] = {row.name: {} for row in species}
    for gene, median in zip(table[key].to_pylist(), table["median"].to_pylist(), strict=True):
        if median is None:
            continue
        if not 0 < float(median) < np.inf:
            msg = f"vocab.medians = {uri!r}: median of {gene} is {median}; must be above 0"
            raise UserError(msg)
        owner = next((row.name for row in rows if gene in known[row.name]), None)
        owner = owner or next((row.name for row in rows if _has_prefix(gene, row.gene_prefix)), None)
        if owner is not None:
            out[owner][gene] = float(median)
    if not any(out.values()):
        msg = f"vocab.medians = {uri!r}: no gene of {', '.join(out)}; its genes must be Ensembl ids without version"
        raise UserError(msg)
    return out


def _has_prefix(gene: str, prefix: str) -> bool:
    return gene.startswith(prefix) and gene[len(prefix) :].isdigit()

"""The joint vocabulary of all species: a table of genes with token ids and medians, and its hash.

Special tokens are `<pad>` 0, `<mask>` 1 and `<cls>` 2. Genes follow from id 3 on, by species in the order of the config,
then by Ensembl id. A gene is in the vocabulary if its biotype is selected and it has a median: at least one kept cell
detects it, or an imported table of medians names it.
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
from mixgf.console import say
from mixgf.errors import UserError
from mixgf.genes.identify import AMBIGUOUS, GeneLookup, GeneNames, gene_lookup
from mixgf.storage import artifacts, files
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
        """int32: position in this table of each Ensembl id (string or null), -1 = not in it."""
        found = pc.index_in(genes, value_set=pa.array(self.genes, pa.string()))
        return cast("np.ndarray", pc.fill_null(found, -1).to_numpy(zero_copy_only=False).astype(np.int32))


class Vocabulary:
    """The joint vocabulary; immutable.

    `table` has one row per (species, gene): token int32, gene, symbol, species, median float64, biotype. With
    `sharing = "ortholog"`, one-to-one orthologs of two species have the same token.
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
        """SHA-256 (hex) of everything that determines a sentence: tokens, genes, species, medians."""
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

    def species_genes(self, species: str) -> SpeciesGenes:
        """Genes of one species; a `UserError` for a species that is not in the vocabulary."""
        if species not in self._by_species:
            msg = f"species = {species!r}: not in the vocabulary, which has {', '.join(self.species)}; prepare the corpus with it"
            raise UserError(msg)
        return self._by_species[species]

    def species_tokens(self, species: str) -> np.ndarray:
        """int32: token ids of the species' genes, from which random replacements of masked genes are drawn."""
        return self.species_genes(species).tokens

    def ortholog_map(
        self, source: str, target: str, orthologs: Mapping[tuple[str, str], Mapping[str, str]]
    ) -> np.ndarray:
        """int32[V]: for each token of species `source`, the token of its ortholog in species `target`; -1 = none."""
        pairs = orthologs.get((source, target), {})
        tokens = dict(zip(self.species_genes(target).genes, self.species_genes(target).tokens.tolist(), strict=True))
        out = np.full(self.size, -1, dtype=np.int32)
        mine = self.species_genes(source)
        for gene, token in zip(mine.genes, mine.tokens, strict=True):
            out[token] = tokens.get(pairs.get(gene, ""), -1)
        return out

    def ancestor(self, hash_: str) -> Vocabulary | None:
        """The vocabulary with this hash that was extended to this one (or is this one); None if there is none.

        A vocabulary is extended by further species, so an ancestor holds the first species of this one.
        """
        for num in range(len(self.species), 0, -1):
            names = self.species[:num]
            table = self.table.filter(pc.is_in(self.table["species"], pa.array(names)))
            found = Vocabulary(table.combine_chunks(), species=names, sharing=self.sharing)
            if found.hash == hash_:
                return found
        return None

    def warm_start_ids(self, old: Vocabulary, orthologs: Mapping[tuple[str, str], Mapping[str, str]]) -> np.ndarray:
        """For each id, the id of `old` whose embedding it starts from, int64[V]; -1 = a random embedding.

        Ids of `old` keep their own embedding. A new gene starts from its one-to-one ortholog; where several species have
        one, from that of the species with the most orthologs.

        Args:
            old: from `ancestor`.
            orthologs: (species_a, species_b) to pairs of genes, `genes.species.orthologs`.
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

    def find(self, gene_or_symbol: str, species: str, row: SpeciesRow | None = None) -> int:
        """Token id of a gene within one species, by Ensembl id or symbol.

        Args:
            gene_or_symbol: of the gene. With `row`, in every spelling that `prepare` reads: ids with versions, former symbols,
                aliases (`identify.GeneNames`).
            species: the species.
            row: its row of the config; None = ids and symbols of the vocabulary alone.

        Raises:
            UserError: an unknown gene, or one without a token; the message says why.
        """
        self.species_genes(species)
        part = self.table.filter(pc.equal(self.table["species"], species))
        name = gene_or_symbol.strip()
        for column in ("gene", "symbol"):
            found = part.filter(pc.equal(part[column], name))
            if found.num_rows:
                return int(found["token"][0].as_py())
        near = [s for s in part["symbol"].to_pylist() if s.lower() == name.lower()]
        hint = f"did you mean {near[0]}?" if near else "give an Ensembl id or a current symbol of a detected gene"
        if row is not None:
            lookup = gene_lookup(row)
            gene, how, _ = GeneNames(lookup, vocabulary=frozenset(part["gene"].to_pylist())).find(name)
            held = part.filter(pc.equal(part["gene"], gene)) if gene is not None else part.slice(0, 0)
            if held.num_rows:
                return int(held["token"][0].as_py())
            if gene is not None:
                hint = _why_no_token(lookup, gene, set(part["biotype"].to_pylist()))
            elif how == AMBIGUOUS:
                hint = "several genes have that name; give an Ensembl id"
        msg = f"gene = {gene_or_symbol!r}: not in the {species} vocabulary; {hint}"
        raise UserError(msg)

    def save(self, uri: str) -> tuple[int, str]:
        """Write the vocabulary as one Parquet file; returns its size in bytes and its SHA-256."""
        meta = {"mixgf": json.dumps({"species": self.species, "sharing": self.sharing, "hash": self.hash})}
        return write_table(uri, self.table.replace_schema_metadata(meta))

    @classmethod
    def load(cls, uri: str) -> Vocabulary:
        """Read a vocabulary from its file, or from the folder that holds vocabulary.parquet.

        Raises:
            UserError: no such file, not a vocabulary, or its content does not match its hash.
        """
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


def publish_vocabulary(
    uri: str, record: artifacts.Record, vocabulary: Vocabulary, *, sampled: Mapping[str, Any] | None = None
) -> None:
    """Write a vocabulary and finish its artifact, already begun at `uri` by the plan `record`.

    `sampled` are the facts of medians that come from a sample of the cells, by species; None = of none.
    """
    size, digest = vocabulary.save(files.join(uri, "vocabulary.parquet"))
    genes = {name: len(vocabulary.species_genes(name).tokens) for name in vocabulary.species}
    artifacts.finish(
        uri, record, counts={"tokens": vocabulary.size, "genes": genes},
        files={"vocabulary.parquet": {"bytes": size, "sha256": digest}},
        details={"hash": vocabulary.hash, "sharing": vocabulary.sharing} | ({"sampled_medians": sampled} if sampled else {}),
    )  # fmt: skip
    say(f"vocabulary: {vocabulary.size:,} tokens ({', '.join(f'{n:,} {name} genes' for name, n in genes.items())})")


def build_vocabulary(
    medians: Mapping[str, Mapping[str, float]],
    tables: Mapping[str, pa.Table],
    *,
    sharing: str,
    orthologs: Mapping[tuple[str, str], Mapping[str, str]],
    base: Vocabulary | None = None,
) -> Vocabulary:
    """Assign token ids to the genes of all species.

    Args:
        medians: Ensembl id to median, by species; ids are assigned in this order of species.
        tables: gene table of each species, for symbols and biotypes.
        sharing: `separate`: every gene has its own id. `ortholog`: a gene takes the id of its one-to-one ortholog in an
            earlier species, if there is one.
        orthologs: (species_a, species_b) to pairs of genes.
        base: a vocabulary of other species with the same sharing; its ids stay, the new ones follow.
    """
    rows: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    given: dict[tuple[str, str], int] = {}
    free, names = NUM_SPECIALS, list(medians)
    if base is not None:
        assert base.sharing == sharing, (base.sharing, sharing)
        assert not set(base.species) & set(names), (base.species, names)
        rows = base.table.to_pydict()
        given = dict(zip(zip(rows["species"], rows["gene"], strict=True), rows["token"], strict=True))
        free, names = base.size, [*base.species, *names]
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
        used: set[int] = set()  # with three species, two genes may have orthologs with one id; the second gets a new id
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


def _why_no_token(lookup: GeneLookup, gene: str, biotypes: set[str]) -> str:
    """Why a gene of the species' table is not in a vocabulary with genes of these biotypes."""
    kind, symbol = lookup.biotype.get(gene, ""), lookup.symbols.get(gene, gene)
    if kind in biotypes:
        return f"{symbol} ({gene}) is a gene, and no kept cell detects it"
    return f"{symbol} ({gene}, {kind or 'retired'}) is a gene, and has no token: the vocabulary was made with vocab.biotypes = {', '.join(sorted(biotypes))}"


def read_median_table(
    uri: str, species: Iterable[SpeciesRow], known: Mapping[str, set[str]]
) -> dict[str, dict[str, float]]:
    """Medians by species from one table (Parquet, TSV or TSV.gz with columns gene or key, and median).

    A gene belongs to the species whose gene table has it, else to the species with the longest matching id prefix. Rows
    without a median (special tokens) and genes of other species are left out.

    Args:
        uri: the table.
        species: species to return.
        known: Ensembl ids of each species' gene table, by the species' name.

    Raises:
        UserError: the table is missing, lacks a column, has a median that is not above 0, or no gene of the species.
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

"""Which gene each column of a count file is: by Ensembl id, current symbol, previous symbol or alias.

A name that is none of these is read in another spelling where only one gene can be meant (`SPELLINGS`): the prefix of a
reference (`GRCh38_CD4`), the dots that R puts for dashes (`MT.CO1`), an id joined with a symbol. Else it stays unknown,
and `likely_cause` says why.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mixgf.config.data import SpeciesRow
from mixgf.genes import species

ID, SYMBOL, PREVIOUS, ALIAS, AMBIGUOUS, UNKNOWN, NOT_A_GENE = (
    "id", "symbol", "previous", "alias", "ambiguous", "unknown", "not a gene"
)  # fmt: skip
SPELLINGS = {
    "prefix": "without the name of the reference",
    "word": "without the word before the name",
    "joined": "by the id within the name",
    "separators": "with dashes for dots",
    "unique": "without the ending of a repeated name",
    "quotes": "without quotes",
    "case": "with the capital letters of the ids",
    "digit": "without R's X before a digit",
}
"""Spellings in which a name is read that is no gene as it stands, and what was done."""
_MADE_UNIQUE = re.compile(r"^(.+)[-._]\d{1,2}$")
_MISSING = re.compile(r"(na|nan|none|n/a|null|nil|-|<na>|#n/a)?([-._]\d+)?", re.IGNORECASE)
_NUMBER = re.compile(r"\d+(\.\d+)?")
_REFERENCE_NAME = r"(?:refdata[A-Za-z0-9\-]*?-)?(?:GRC[a-z]{1,2}\d+|hg\d{2}|mm\d{1,2}|rn\d{1,2}|T2T[-A-Za-z0-9]*|CHM13|mRatBN\d+|Rnor|human|mouse|rat)(?:[.\-][A-Za-z0-9.\-]*)?(?:_pre-?m?rna)?"
_REFERENCE = re.compile(rf"^({_REFERENCE_NAME})[_\-.]{{1,3}}(?=[A-Za-z0-9])", re.IGNORECASE)
_SPECIES = ("human", "mouse", "rat")
"""Species that a name begins with where cells of several were counted together."""
_WORD = re.compile(r"^(gene|rna|gex)[-_:.]", re.IGNORECASE)
"""What GFF files of NCBI and Ensembl, and Seurat, write before a name (`gene-CD4`, `gene:ENSG00000010610`, `rna_CD4`)."""
_REFERENCE_AFTER = re.compile(rf"[_\-.]{{1,3}}({_REFERENCE_NAME})$", re.IGNORECASE)
_DATE = re.compile(
    r"(\d{1,2}[-. /](mar|mrz|sept?|dec|dez|apr|oct|okt|feb|nov)|(mar|sept?|dec|apr|oct|feb|nov)-\d{1,2})([-/]\d{2,4})?"
    r"|\d{4}-\d{2}-\d{2}( 00:00:00)?|\d{1,2}/\d{1,2}(/\d{2,4})?|\d(\.\d+)?E\+\d+",
    re.IGNORECASE,
)
_TRANSCRIPT = re.compile(r"(ENS[A-Z]{0,4}T\d{6,}|[NX][MR]_\d+)(\.\d+)?([_|].*)?")
_PROTEIN = re.compile(r"(ENS[A-Z]{0,4}P\d{6,}|[NX]P_\d+)(\.\d+)?")
_USA = re.compile(r"[^-]+-[UA]")
"""Unspliced and ambiguous counts beside the spliced ones of a gene, as alevin-fry names them in USA mode."""
_DATABASE = re.compile(r"(HGNC|MGI|RGD|Entrez|NCBI|GeneID)[:_]\d+", re.IGNORECASE)
_REGION = re.compile(r"(chr)?[A-Za-z0-9.]+[:_-]\d+[-_]\d+")
_GENE_ID = re.compile(r"^(ENS[A-Z]*\d{6,}|[A-Z]{2,7}\d{6,})")


def is_missing(name: str) -> bool:
    """Whether a name is a word for a missing value (NA, nan, None, null, N/A, -), also where it was made unique (NA-1).

    Such words are former symbols of genes, too: NA of XK, NaN of SCN11A.
    """
    return _MISSING.fullmatch(name.strip()) is not None


@dataclass(frozen=True, slots=True)
class GeneLookup:
    """Gene table of one species, indexed by name."""

    row: SpeciesRow
    biotype: dict[str, str]
    """Biotype of every Ensembl id of the table."""
    mito: frozenset[str]
    """Mitochondrial genes."""
    names: tuple[tuple[str, dict[str, str | None]], ...]
    """(kind, name to gene) of current symbols, previous symbols and aliases, in this order; None = the name is ambiguous."""
    by_letters: dict[str, str | None]
    """Current symbol with a dash for every other character (`_letters`), to gene; None = of several genes."""
    symbols: dict[str, str]
    """Current symbol of every Ensembl id that has one."""


@lru_cache(maxsize=16)
def gene_lookup(row: SpeciesRow) -> GeneLookup:
    """Read a species' gene table and index it.

    Several ids can have one current symbol. It then stands for a gene of the primary assembly before others, for a
    protein-coding one before others, then for the lowest id. A previous symbol or alias of several genes is ambiguous.
    """
    table = species.gene_table(row)
    genes = table["gene"].to_pylist()
    biotype = dict(zip(genes, table["biotype"].to_pylist(), strict=True))
    current: dict[str, list[str]] = {}
    for gene, symbol in zip(genes, table["symbol"].to_pylist(), strict=True):
        if symbol:
            current.setdefault(symbol, []).append(gene)
    primary = frozenset(g for g, p in zip(genes, table["primary"].to_pylist(), strict=True) if p)
    main = {
        name: min(found, key=lambda g: (g not in primary, biotype[g] != "protein_coding", g))
        for name, found in current.items()
    }
    maps: list[tuple[str, dict[str, str | None]]] = [(SYMBOL, dict(main))]
    for how, column in ((PREVIOUS, "previous"), (ALIAS, "alias")):
        other: dict[str, list[str]] = {}
        for gene, names in zip(genes, table[column].to_pylist(), strict=True):
            for name in names or ():
                other.setdefault(name, []).append(gene)
        maps.append((how, {name: found[0] if len(set(found)) == 1 else None for name, found in other.items()}))
    mito = frozenset(g for g, m in zip(genes, table["is_mito"].to_pylist(), strict=True) if m)
    by_letters: dict[str, str | None] = {}
    for name, gene in main.items():
        letters = _letters(name)
        by_letters[letters] = gene if by_letters.get(letters, gene) == gene else None
    symbols = {gene: symbol for gene, symbol in zip(genes, table["symbol"].to_pylist(), strict=True) if symbol}
    return GeneLookup(row, biotype, mito, tuple(maps), by_letters, symbols)


def forget_lookups() -> None:
    """Free the gene tables and lookups of this process, some 40 MB per species. They are read again where they are needed."""
    gene_lookup.cache_clear()
    species.gene_table.cache_clear()


def _letters(name: str) -> str:
    """A name with a dash for every character that is no letter or digit."""
    return re.sub(r"[^A-Za-z0-9]", "-", name)


@lru_cache(maxsize=64)
def _id_pattern(prefix: str) -> re.Pattern[str]:
    return re.compile(rf"^({re.escape(prefix)}\d+)(\.\d+(_\d+)?)?(_PAR_Y)?$")  # ENSG00000223972.5_2: GENCODE on GRCh37


@lru_cache(maxsize=64)
def _id_within(prefix: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![A-Za-z0-9])({re.escape(prefix)}\d+)(\.\d+)?(?![A-Za-z0-9])")


def references(names: Iterable[str]) -> dict[str, int]:
    """Names of references (GRCh38, mm10) before the names of genes, and their number, the commonest first."""
    found = Counter(match.group(1) for name in names if (match := _REFERENCE.match(name)))
    return dict(found.most_common())


class Found(NamedTuple):
    """The gene of a name."""

    gene: str | None
    """Ensembl id; None = none, or several."""
    how: str
    """Kind of the name: `ID`, `SYMBOL`, `PREVIOUS`, `ALIAS`, `AMBIGUOUS` or `UNKNOWN`."""
    spelling: str = ""
    """How the name was read, a key of `SPELLINGS`; empty = as it stands."""


class GeneNames:
    """Names of one file (or one name of a user) to genes of one species.

    Args:
        lookup: genes of the species.
        names: all names of the file. They tell whether dots stand for dashes, and whether an ending made a name unique.
        vocabulary: ids that are genes, beside those of the gene table.
    """

    def __init__(
        self, lookup: GeneLookup, names: Iterable[str] = (), *, vocabulary: frozenset[str] = frozenset()
    ) -> None:
        self._lookup, self._vocabulary, self._names = lookup, vocabulary, names
        self._pattern, self._within = _id_pattern(lookup.row.gene_prefix), _id_within(lookup.row.gene_prefix)
        self._held: frozenset[str] | None = None
        self._dots: bool | None = None
        self._beside: Counter[str] | None = None

    def find(self, name: str) -> Found:
        """The gene of a name."""
        found = self.exact(name)
        if "." in name and found.how not in (ID, SYMBOL):
            other = self._lookup.by_letters.get(_letters(name))
            # NKX6.1: an alias of NKX6-2, or NKX6-1 as R writes it; SNORD115.1: the second SNORD115, or SNORD115-1
            rival = found.gene if found.how != UNKNOWN else self.exact(_first_name(name)).gene
            if other is not None and (rival or found.how == AMBIGUOUS) and rival != other:
                return Found(other, SYMBOL, "separators") if self._dots_for_dashes() else Found(None, AMBIGUOUS)
        if found.how != UNKNOWN or is_missing(name):
            return found
        return next((Found(*other[:2], how) for other, how in self._spelled(name) if other.gene), found)

    def exact(self, name: str) -> Found:
        """The gene of a name as it stands; of an id, without its version."""
        match = self._pattern.match(name)
        bare = match.group(1) if match else name
        if bare in self._lookup.biotype or bare in self._vocabulary:
            return Found(bare, ID)
        if is_missing(name) or _NUMBER.fullmatch(name):
            return Found(None, UNKNOWN)
        for how, genes in self._lookup.names:
            if name in genes:
                gene = genes[name]
                return Found(gene, how if gene else AMBIGUOUS)
        return Found(None, UNKNOWN)

    def _spelled(self, name: str) -> Iterator[tuple[Found, str]]:
        """Genes of a name in other spellings, the surest one first."""
        plain = name.strip().strip("\"'").strip()
        if plain != name and plain:
            yield self.exact(plain), "quotes"
        bare = _without_reference(plain, self._lookup.row.name)
        if bare != plain:
            yield self.exact(bare), "prefix"
        if word := _WORD.match(bare):
            yield self.exact(bare[word.end() :]), "word"
        upper = self._pattern.match(bare.upper())
        if upper and upper.group(1) in self._lookup.biotype:
            yield Found(upper.group(1), ID), "case"
        yield self._by_joined_id(bare), "joined"
        yield Found(self._lookup.by_letters.get(_letters(bare)), SYMBOL), "separators"
        if first := _first_name(bare):
            found = self.find(first)
            if found.how in (ID, SYMBOL) or first in self._all():
                yield found, "unique"
        if re.match(r"X\d", bare):
            yield Found(self._lookup.by_letters.get(_letters(bare[1:])), SYMBOL), "digit"

    def _by_joined_id(self, name: str) -> Found:
        """The gene of an id within a name whose rest is its symbol, or is another one in every name of the file."""
        found = self._within.findall(name)
        if len(found) != 1 or not (found[0][0] in self._lookup.biotype or found[0][0] in self._vocabulary):
            return Found(None, UNKNOWN)
        gene = found[0][0]
        rest = _rest(self._within.sub("", name))
        if self.exact(rest).gene == gene or 0 < self._rests().get(rest, 0) <= _REPEATS:
            return Found(gene, ID)
        return Found(None, UNKNOWN)

    def _all(self) -> frozenset[str]:
        if self._held is None:
            self._held = frozenset(self._names)
        return self._held

    def _dots_for_dashes(self) -> bool:
        """Whether the file has dots where symbols have dashes: three names at least, and no name with a dash."""
        if self._dots is None:
            self._dots = not any("-" in name for name in self._all()) and (
                sum("." in n and self.exact(n).how == UNKNOWN and n.replace(".", "-") in self._lookup.names[0][1] for n in self._all()) > 2
            )  # fmt: skip
        return self._dots

    def _rests(self) -> Counter[str]:
        """What names hold beside an id, and how often; empty if it does not differ from name to name (`-U` of unspliced counts)."""
        if self._beside is None:
            held = Counter(_rest(self._within.sub("", n)) for n in self._all() if len(self._within.findall(n)) == 1)
            del held[""]
            self._beside = held if len(held) > max(2, 0.5 * held.total()) else Counter()
        return self._beside


def _without_reference(name: str, species_name: str) -> str:
    """A name without the reference before or after it; the name of another species stays (`mouse_CD4` of a human file)."""
    for pattern in (_REFERENCE, _REFERENCE_AFTER):
        match = pattern.search(name)
        if match and match.group(1).lower() not in set(_SPECIES) - {species_name}:
            name = name[: match.start()] + name[match.end() :]
    return name


def _first_name(name: str) -> str:
    """The name before it was made unique (`CD4-1`: `CD4`); empty if it does not look like that."""
    match = _MADE_UNIQUE.match(name)
    return match.group(1) if match else ""


def _rest(name: str) -> str:
    return name.strip("_|:;,/-. ()")


def identify_columns(
    names: Iterable[str], lookup: GeneLookup, *, biotypes: tuple[str, ...], vocabulary: frozenset[str] | None = None,
    is_gene: np.ndarray | None = None, kinds: np.ndarray | None = None,
) -> pa.Table:  # fmt: skip
    """Identify the gene of each column of a source.

    Args:
        names: Ensembl ids (versions are removed) or symbols, one per column.
        lookup: genes of the source's species.
        biotypes: biotypes of genes that may enter the vocabulary.
        vocabulary: if given, exactly these genes may enter the vocabulary, whatever their biotype.
        is_gene: False for other features (antibodies), which are ignored.
        kinds: kind of each feature, as the file gives it; for `report_mapping`.

    Returns:
        Table with one row per column: name; gene (Ensembl id, null = unknown); how (kind of the name); spelling (how it
        was read, `SPELLINGS`); kind (of a feature that is no gene, else null); counted (a gene); mito; candidate (may
        enter the vocabulary); canonical (int32, first column of the same gene); key (uint64, hash of the gene, 0 = unknown).
    """
    names = list(names)
    known = GeneNames(lookup, names, vocabulary=vocabulary or frozenset())
    rows: dict[str, list[Any]] = {
        n: [] for n in ("gene", "how", "spelling", "counted", "mito", "candidate", "canonical", "key")
    }
    first: dict[str, int] = {}
    for i, name in enumerate(names):
        counted = is_gene is None or bool(is_gene[i])
        gene, how, spelling = known.find(name) if counted else (None, NOT_A_GENE, "")
        allowed = gene is not None and (
            gene in vocabulary if vocabulary is not None else lookup.biotype.get(gene) in biotypes
        )
        key = int.from_bytes(hashlib.blake2b(gene.encode(), digest_size=8).digest(), "little") if gene else 0
        canonical = first.setdefault(gene, i) if gene else i
        values = (gene, how, spelling, counted, gene in lookup.mito, allowed, canonical, key)
        for column, value in zip(rows.values(), values, strict=True):
            column.append(value)
    types = (pa.string(), pa.string(), pa.string(), pa.bool_(), pa.bool_(), pa.bool_(), pa.int32(), pa.uint64())
    columns = {n: pa.array(v, type=t) for (n, v), t in zip(rows.items(), types, strict=True)}
    other = [None if kinds is None or counted else str(kinds[i]) for i, counted in enumerate(rows["counted"])]
    return pa.table({"name": pa.array(names, pa.string()), "kind": pa.array(other, pa.string())} | columns)


@dataclass(frozen=True, kw_only=True, slots=True)
class MappingReport:
    """How the columns of one source map to genes."""

    columns: int
    """Columns that are genes."""
    mapped: int
    """Columns with a known gene."""
    renamed: int
    """Mapped by a previous symbol or an alias."""
    summed: int
    """Columns added to another column of the same gene."""
    unmapped: int
    """Columns without a known gene."""
    counts_lost: float
    """Share of the counts of genes in unmapped columns, 0 to 1."""
    unmapped_names: list[str]
    """The ten unmapped columns with the most counts."""
    cause: str
    """Likely reason why columns are unmapped; empty where at most 10 % of the counts are lost."""
    left_out: int
    """Columns of other features, such as antibodies."""
    left_out_kinds: list[str]
    """Number and examples of each kind of these: `6 Antibody Capture (CD4, CD45, CD8)`."""
    respelled: int
    """Mapped in another spelling (`SPELLINGS`)."""
    respelled_names: list[str]
    """An example of each spelling: `with dashes for dots (MT.CO1 = MT-CO1)`."""
    candidate_counts: int
    """Counts on genes that may enter the vocabulary."""

    def describe(self, species: str) -> str:
        """What is left out, renamed or summed, as one line; empty where every column is the gene that it says."""
        parts = []
        if self.left_out:
            kinds = "; ".join(self.left_out_kinds)
            parts.append(f"{self.left_out:,} features are no genes and are left out: {kinds}")
        if self.respelled:
            parts.append(f"{self.respelled:,} names are read in another spelling: {'; '.join(self.respelled_names)}")
        if self.renamed:
            parts.append(f"{self.renamed:,} are former symbols or aliases")
        if self.summed:
            parts.append(f"{self.summed:,} columns are added to another column of their gene")
        if self.unmapped:
            shown = ", ".join(name or "no name" for name in self.unmapped_names[:5])
            cause = f"; {self.cause}" if self.cause else ""
            parts.append(
                f"{self.unmapped:,} are no known {species} gene, with {self.counts_lost:.1%} of the counts ({shown}, ...){cause}"
            )
        return f"{self.mapped:,} of {self.columns:,} columns are known genes; " + "; ".join(parts) if parts else ""

    def describe_lost(self, species: str, limit: str = "") -> str:
        """Why a source of which too few counts are on known genes is refused; `limit` says how few are."""
        names = ", ".join(self.unmapped_names[:5])
        return f"only {1 - self.counts_lost:.1%} of the counts are on known {species} genes{limit}; commonest unknown: {names}; {self.cause}"


def is_first(columns: pa.Table) -> np.ndarray:
    """Which columns of `identify_columns` are the first of their gene, bool (G,): the counts of the others are added to these."""
    found: np.ndarray = columns["canonical"].to_numpy() == np.arange(columns.num_rows)
    return found


def report_mapping(
    columns: pa.Table,
    sums_G: np.ndarray,
    others: Iterable[GeneLookup],
    lookup: Callable[[], GeneLookup] | None = None,
    *,
    way: str = "",
) -> MappingReport:
    """Summarise the gene mapping of one source.

    Args:
        columns: from `identify_columns`.
        sums_G: sum of counts of each column that is a gene.
        others: the other species, to recognise a wrong one.
        lookup: gives the species of the source, to recognise its names in other letters, and to give examples. It is not
            called where all names are known as they stand.
        way: as in `likely_cause`.
    """
    counted = columns["counted"].to_numpy()
    unknown = columns["gene"].is_null().to_numpy() & counted
    how = {row["values"]: row["counts"] for row in pc.value_counts(columns["how"]).to_pylist()}
    total = int(sums_G[counted].sum())
    lost = int(sums_G[unknown].sum()) / total if total else float(unknown.sum() / max(1, counted.sum()))
    named = columns["name"].filter(pa.array(unknown)).to_pylist()
    worst = [name for _, name in sorted(zip((-sums_G[unknown]).tolist(), named, strict=True))]
    spelled = columns.filter(pc.not_equal(columns["spelling"], "")).select(["name", "gene", "spelling"]).to_pylist()
    examples = {row["spelling"]: row for row in reversed(spelled)}
    symbols = lookup().symbols if lookup is not None and examples else {}
    return MappingReport(
        columns=int(counted.sum()),
        mapped=int((counted & ~unknown).sum()),
        renamed=how.get(PREVIOUS, 0) + how.get(ALIAS, 0),
        summed=int((~is_first(columns)).sum()),
        unmapped=int(unknown.sum()),
        counts_lost=lost,
        unmapped_names=worst[:10],
        cause=likely_cause(worst, None if lookup is None else lookup(), others, way=way)
        if lost > 0.1
        else _dates(worst),
        left_out=int((~counted).sum()),
        left_out_kinds=_kinds(columns),
        respelled=len(spelled),
        respelled_names=[
            f"{SPELLINGS[kind]} ({row['name']} = {symbols.get(row['gene'], row['gene'])})"
            for kind, row in sorted(examples.items())
        ],
        candidate_counts=int(sums_G[columns["candidate"].to_numpy()].sum()),
    )


def _kinds(columns: pa.Table) -> list[str]:
    names: dict[str, list[str]] = {}
    for row in columns.filter(pc.invert(columns["counted"])).select(["name", "kind"]).to_pylist():
        names.setdefault(row["kind"] or "of another kind", []).append(row["name"])
    return [
        f"{len(held):,} {kind} ({', '.join(held[:3])}{', ...' if len(held) > 3 else ''})"
        for kind, held in sorted(names.items())
    ]


_REPEATS = 3
"""Names of a file that may hold the same text beside different ids."""
_MOST = 0.5
"""Share of the unknown names that a cause must explain."""


def species_of(names: Sequence[str], lookups: Iterable[GeneLookup]) -> str:
    """The first of several species that has more than half of the names, in its own spelling; empty = none."""
    for lookup in lookups:
        known = GeneNames(lookup)
        if sum(known.exact(name).gene is not None for name in names) > _MOST * len(names):
            return lookup.row.name
    return ""


def likely_cause(
    unknown: Sequence[str], lookup: GeneLookup | None, others: Iterable[GeneLookup], *, way: str = ""
) -> str:
    """The likely reason why names are unknown, and what to do.

    Args:
        unknown: the names.
        lookup: the species that they were taken for; None = not known.
        others: the other species.
        way: what the user writes to name another column of var.
    """
    named = f" ({way})" if way else ""
    enough = _MOST * len(unknown)
    lower = {} if lookup is None else {name.lower(): name for name in lookup.names[0][1]}
    letters = [(name, lower[name.lower()]) for name in unknown if name.lower() in lower]
    case = f"only the case of their letters differs from the species' symbols ({letters[0][0]}: {letters[0][1]})" if letters else ""  # fmt: skip
    if species := species_of(unknown, others):
        either = f", or {case}: spell them as the species does" if len(letters) > enough else ""
        return f"they are {species} genes: wrong species?{either}"
    if len(letters) > enough:
        return (
            f"{case}: spell them as the species does (adata.var_names = adata.var_names.str.upper()), or wrong species?"
        )
    if sum((found := references(unknown)).values()) > enough:
        return f"they begin with the name of a reference ({', '.join(list(found)[:3])}): of another species?"
    patterns = (
        (_USA, "they are the unspliced (-U) and ambiguous (-A) counts of alevin-fry: add the ambiguous ones to the spliced ones (pyroe.load_fry(FOLDER, output_format='scRNA') does)"),
        (_TRANSCRIPT, "they are ids of transcripts: give a matrix of genes, in which the transcripts of a gene are added"),
        (_PROTEIN, "they are ids of proteins: give a matrix of genes"),
        (_GENE_ID, "they are ids that the gene table does not have: another species, or retired ids?"),
        (_NUMBER, f"they are bare numbers (rows, or ids of NCBI Gene): name the column of var with Ensembl ids or symbols{named}"),
        (_REGION, "they are regions of a genome: peaks of ATAC-seq? Give the file with the RNA counts"),
        (_DATABASE, f"they are ids of another database: name the column of var with Ensembl ids or symbols{named}"),
        (_DATE, f"they are dates: {_SPREADSHEET}"),
    )  # fmt: skip
    for pattern, cause in patterns:
        if (
            sum(
                pattern.fullmatch(name) is not None or (pattern is _GENE_ID and pattern.match(name) is not None)
                for name in unknown
            )
            > enough
        ):
            return cause
    for what, ends in (("begin with", _common_starts(unknown)), ("end with", _common_ends(unknown))):
        text, number = ends
        if text and number > enough:
            return f"{number:,} of them {what} {text!r}: take that away"
    return f"they are neither Ensembl ids nor known symbols: spike-ins or repeats, or another column of var has the names{named}"


def _dates(unknown: Sequence[str]) -> str:
    """What is said of dates among unknown names, however few; empty where there is none."""
    found = [name for name in unknown if _DATE.fullmatch(name)]
    shown = ", ".join(found[:3])
    return f"{len(found):,} of them are dates or exponents ({shown}): {_SPREADSHEET}" if found else ""


_SPREADSHEET = "a spreadsheet changed symbols such as MARCH1 and SEPT2; take the names from the original file"


def _common_starts(names: Sequence[str]) -> tuple[str, int]:
    return _commonest(re.match(r"[A-Za-z0-9.\-]{2,}?[_:|]+(?=.)", name) for name in names)


def _common_ends(names: Sequence[str]) -> tuple[str, int]:
    return _commonest(re.search(r"[_:|]+[A-Za-z0-9.\-]+$", name) for name in names)


def _commonest(matches: Iterable[re.Match[str] | None]) -> tuple[str, int]:
    found = Counter(match.group(0) for match in matches if match)
    return found.most_common(1)[0] if found else ("", 0)

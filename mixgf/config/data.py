"""Moved here from mixgf/config.py."""

from __future__ import annotations

from dataclasses import dataclass

from mixgf.config.checks import _one_of, _require, split_named


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeciesRow:
    """A species is a row of data, never an `if` (spec section 1)."""

    name: str
    """As in sources (human=FILE) and the corpus' column species."""
    taxon: int
    """NCBI taxonomy id."""
    gene_prefix: str
    """Prefix of its Ensembl gene ids, for example ENSG."""
    genes: str
    """URI of its gene table (Parquet: gene, symbol, biotype, is_mito, previous, alias); `resource:` is inside the package."""


HUMAN = SpeciesRow(name="human", taxon=9606, gene_prefix="ENSG", genes="resource:genes_human.parquet")
MOUSE = SpeciesRow(name="mouse", taxon=10090, gene_prefix="ENSMUSG", genes="resource:genes_mouse.parquet")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One file (or glob) of raw counts; for `import`, one tokenised Arrow data set."""

    uri: str
    """`.h5ad`, 10x `.h5` or a 10x Matrix Market folder; a path, glob or s3:// URI; `resource:` is inside the package.
    For `import`: a folder that Hugging Face's save_to_disk wrote, a folder of `.arrow` files, or one such file."""
    species: str
    """Name of one row of `species`."""
    name: str = ""
    """Name in the corpus; empty = the file name without its ending. Must be unique."""
    layer: str = "X"
    """`X`, `raw` (that is, raw.X) or the name of a layer."""
    genes: str = ""
    """Column of `var` with Ensembl ids or symbols; empty = the index of `var`, or `ensembl_id` where that column exists."""
    sample: str = ""
    """Column of `obs` naming the sample (for doublets and caps); empty = the whole source is one sample."""
    obs: tuple[str, ...] = ()
    """Columns of `obs` to keep, as `name` or `new_name=name`; empty = all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QC:
    """Quality control of one source (spec section 2). Every dropped cell is counted by reason."""

    method: str = "sd"
    """`sd`: within num_sd standard deviations of the source's mean; `mad`: within num_mads MADs on the log scale; `none`."""
    num_sd: float = 3.0
    """Of method sd."""
    num_mads: float = 5.0
    """Of method mad."""
    min_genes: int = 7
    """Fewest detected vocabulary genes of a kept cell."""
    max_mito_fraction: float = 1.0
    """Hard cap on the mitochondrial share of counts, beside the rule above."""
    doublets: bool = False
    """Remove doublets by Scrublet (scanpy's), per sample. Needs `pip install 'mixgf[doublets]'`."""
    doublet_rate: float = 0.06
    """Expected share of doublets, given to Scrublet."""
    drop_duplicates: bool = True
    """Drop cells whose count vector was already seen, in this or another source."""
    max_cells_per_sample: int = 0
    """0 = no cap; else the first that many kept cells of each sample in a keyed random order."""
    min_mapped_fraction: float = 0.5
    """A source with a smaller share of its counts on known genes is refused."""

    def __post_init__(self) -> None:
        _one_of("qc.method", self.method, ("sd", "mad", "none"))
        _require(self.min_genes >= 1, "qc.min_genes", self.min_genes, "at least 1")
        _require(self.num_sd > 0, "qc.num_sd", self.num_sd, "above 0 (qc.method = 'none' drops nothing by depth)")
        _require(self.num_mads > 0, "qc.num_mads", self.num_mads, "above 0 (qc.method = 'none' drops nothing by depth)")
        for name in ("max_mito_fraction", "min_mapped_fraction"):
            _require(0 <= getattr(self, name) <= 1, f"qc.{name}", getattr(self, name), "a share between 0 and 1")
        _require(
            self.max_cells_per_sample >= 0, "qc.max_cells_per_sample", self.max_cells_per_sample, "at least 0 (no cap)"
        )
        _require(0 < self.doublet_rate < 0.5, "qc.doublet_rate", self.doublet_rate, "between 0 and 0.5")


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocab:
    """The joint vocabulary (spec sections 1 and 3)."""

    biotypes: tuple[str, ...] = ("protein_coding", "miRNA")
    """Genes of these biotypes get an id."""
    sharing: str = "separate"
    """`separate` (the paper): every species has ids of its own; `ortholog`: one-to-one orthologs share one id."""
    medians: str = ""
    """URI of a table (Parquet or TSV: gene, median) to import; empty = computed from the kept cells."""
    reuse: str = ""
    """URI of an existing vocabulary whose genes, ids and medians stay as they are; sources of a species that it lacks add that
    species' genes behind them. Empty = build one."""
    orthologs: tuple[str, ...] = ("resource:orthologs.parquet",)
    """One-to-one tables (Parquet); each column is a species' name and holds its gene ids."""

    def __post_init__(self) -> None:
        _one_of("vocab.sharing", self.sharing, ("separate", "ortholog"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Rank value encoding (spec section 3)."""

    max_len: int = 2048
    """Longest sentence in tokens, `<cls>` included."""
    scaling: str = "divide"
    """`divide` (all published code) or `multiply` (the paper's wording) by the gene's median."""
    cls: bool = False
    """Put `<cls>` before the genes."""

    def __post_init__(self) -> None:
        _one_of("tokens.scaling", self.scaling, ("divide", "multiply"))
        _require(2 <= self.max_len <= 65536, "tokens.max_len", self.max_len, "between 2 and 65536")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepare:
    """How the corpus is cut into work and files. Changes speed and file names, never a sentence."""

    shard_cells: int = 10_000
    """Source rows per work unit and Parquet shard."""
    block_cells: int = 128
    """Source rows held in memory at a time."""
    strict: bool = False
    """Stop at the first refused source, instead of listing it at the end."""
    extend: str = ""
    """URI of a finished corpus whose cells are taken over as they are: `sources` then names only the ones to be added. Needs
    its vocabulary (vocab.reuse), its qc and tokens."""

    def __post_init__(self) -> None:
        _require(
            self.shard_cells >= self.block_cells >= 1, "prepare.shard_cells", self.shard_cells, "at least block_cells"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Imports:
    """`import`: tokenised Arrow data sets with token dictionaries of their own (Genecorpus-30M, Mouse-Genecorpus-20M).

    Of the other sections it reads `sources`, `vocab`, `tokens`, `prepare` and `qc.min_genes`. What is counted stands in
    the corpus' `imported.parquet`.
    """

    dictionaries: tuple[str, ...] = ()
    """Token dictionary of each source, as `species=URI`, `source_name=URI`, or one `URI` for all: gene to id, a published
    pickle (read by a restricted reader), JSON, Parquet, or TSV with columns gene (or key) and token."""
    medians: tuple[str, ...] = ()
    """Medians of each species, as `species=URI` or one `URI` for all: the same formats, column median. Empty = the median
    column of the dictionary's table, else `vocab.medians`. Not needed with `vocab.reuse`."""
    unknown_ids: str = "refuse"
    """An id that the dictionary does not have, a <mask>, or a special token between genes: `refuse` the source, or `count`
    it and leave it out."""
    outside: str = "count"
    """A gene of the dictionary that the species' vocabulary does not have: `refuse` or `count` (left out)."""
    duplicates: str = "refuse"
    """A gene that the sentence already has: `refuse` or `count` (the first one stays)."""
    lengths: str = "refuse"
    """A `length` column that is not the number of ids: `refuse` or `count` (the ids are right)."""

    def __post_init__(self) -> None:
        for name in ("unknown_ids", "outside", "duplicates", "lengths"):
            _one_of(f"imports.{name}", getattr(self, name), ("refuse", "count"))
        for name in ("dictionaries", "medians"):
            keys = [split_named(text)[0] for text in getattr(self, name)]
            _require(len(set(keys)) == len(keys), f"imports.{name}", getattr(self, name), "one URI per name")

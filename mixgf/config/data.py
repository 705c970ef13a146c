"""Settings of the input data: species, sources, quality control, vocabulary, tokens, and import of tokenised data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mixgf.config.checks import require, shown
from mixgf.config.fields import check, option, required


@dataclass(frozen=True, kw_only=True, slots=True)
class SpeciesRow:
    """One species. A further species is a further row in the config; no code changes."""

    name: str
    """Name in sources (human=FILE) and in the corpus' column species."""
    taxon: int = required(least=1)
    """NCBI taxonomy id."""
    gene_prefix: str
    """Prefix of its Ensembl gene ids, for example ENSG."""
    genes: str = required(path=True)
    """URI of its gene table (Parquet: gene, symbol, biotype, is_mito, previous, alias). `resource:` names a bundled file."""

    def __post_init__(self) -> None:
        check(self, "species[]")
        require(
            self.name.strip(" .") != "" and "/" not in self.name and "\\" not in self.name, "species[].name", self.name,
            "a name without slashes, for example human",
        )  # fmt: skip


HUMAN = SpeciesRow(name="human", taxon=9606, gene_prefix="ENSG", genes="resource:genes_human.parquet")
MOUSE = SpeciesRow(name="mouse", taxon=10090, gene_prefix="ENSMUSG", genes="resource:genes_mouse.parquet")


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One file (or glob) of raw counts; for `mixgf import`, one tokenised Arrow data set."""

    uri: str = required(path=True)
    """`.h5ad`, `.zarr`, 10x `.h5`, a Matrix Market folder, or its matrix file: a path, a glob, or an s3:// URI. `resource:` names a
    bundled file.
    For `mixgf import`: a folder that Hugging Face's save_to_disk wrote, a folder of `.arrow` files, or one such file."""
    species: str
    """Name of one row of `species`."""
    name: str = ""
    """Name in the corpus, unique. Empty: the file name without its ending."""
    layer: str = "X"
    """Where the counts are: `X`, `raw` (that is, raw.X) or the name of a layer. In a 10x file of several genomes: one of them."""
    genes: str = ""
    """Column of `var` with Ensembl ids or symbols; `index` = the index of `var`. Empty: `ensembl_id` or `gene_ids` where that
    column exists, else the index; where the names there are not known, a column with known ones."""
    sample: str = ""
    """Column of `obs` with the sample, for doublets and caps. Empty: the whole source is one sample."""
    round: bool = option(False, omit_default=True)
    """Round the values to whole numbers: for counts after a correction of ambient RNA. Normalised values are rejected all the same."""
    obs: tuple[str, ...] = ()
    """Columns of `obs` to keep, by their names in the file. Empty: all."""
    rename: Mapping[str, str] = option({}, omit_default=True)
    """Columns of `obs` to rename, old name to new, for example {"donor_id": "donor"}. They are kept without being in `obs`."""

    def __post_init__(self) -> None:
        check(self, f"sources[{shown(self.name or self.uri)}]")
        for name in self.obs:
            new, eq, old = name.partition("=")
            require(
                not eq,
                f"sources[{self.name or self.uri}].obs",
                name,
                f"a column's name; to rename it: rename = {old}={new}",
            )

    def kept_columns(self, columns: Iterable[str]) -> dict[str, str]:
        """Kept columns of `obs` to their new names, given all columns of the file."""
        kept = dict.fromkeys((*(self.obs or columns), *self.rename))
        return {name: self.rename.get(name, name) for name in kept}


@dataclass(frozen=True, kw_only=True, slots=True)
class QC:
    """Quality control of each source. Every dropped cell is counted by reason."""

    method: str = option("sd", choices=("sd", "mad", "none"))
    """`sd`: keep cells within num_sd standard deviations of the source's mean. `mad`: within num_mads median absolute
    deviations on the log scale. `none`: no such rule."""
    num_sd: float = option(3.0, above=0)
    """Standard deviations of the method sd."""
    num_mads: float = option(5.0, above=0)
    """Median absolute deviations of the method mad."""
    min_genes: int = option(7, least=1, unit="genes")
    """Fewest detected vocabulary genes of a kept cell."""
    max_mito_fraction: float = option(1.0, least=0, most=1)
    """Largest mitochondrial share of a cell's counts, beside the rule of `method`."""
    doublets: str = option("flag", choices=("flag", "drop", "off"))
    """Doublets by Scrublet (as in scanpy), sample by sample: `flag` them in the columns `doublet_score` and
    `predicted_doublet`, `drop` them, or `off`. Needs `pip install 'mixgf[doublets]'`; without it, `flag` is `off`."""
    doublet_rate: float = option(0.06, above=0, below=0.5)
    """Expected share of doublets, given to Scrublet."""
    drop_duplicates: bool = option(True)
    """Drop cells whose counts equal those of an earlier cell, in this or another source."""
    near_duplicates: str = option("flag", choices=("flag", "drop", "off"))
    """Cells that an earlier cell equals but for a gene filter: `flag` lists them in `near_duplicates.parquet`, `drop` drops them
    too, `off` spares the work. A cell needs 32 detected genes to be compared."""
    max_cells_per_sample: int = option(0, least=0, unit="cells")
    """Most kept cells of each sample, drawn at random. 0: no limit."""
    min_mapped_fraction: float = option(0.5, least=0, most=1)
    """A source is rejected if a smaller share of its counts is on known genes."""

    def __post_init__(self) -> None:
        check(self, "qc")


MIN_MEDIAN_CELLS = 100
"""Fewest cells of a sample for medians."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocab:
    """The gene vocabulary of all species together."""

    biotypes: tuple[str, ...] = option(("protein_coding", "miRNA"))
    """Genes of these biotypes get a token id."""
    sharing: str = option("separate", choices=("separate", "ortholog"))
    """`separate` (the paper): every species has token ids of its own. `ortholog`: one-to-one orthologs share one id."""
    medians: str = option("", path=True)
    """URI of a table of gene medians to use (Parquet or TSV: gene, median). Empty: computed from the kept cells."""
    median_cells: int = option(0, omit_default=True, least=0, unit="cells")
    """Compute the medians of each species from a random sample of about so many of its kept cells. For corpora above a few million
    cells: the standard error is printed and recorded. 0: from all cells."""
    reuse: str = option("", path=True)
    """URI of an existing vocabulary, whose genes, ids and medians stay as they are. Genes of a species that it lacks are added
    after them. Empty: build one."""
    orthologs: tuple[str, ...] = option(("resource:orthologs.parquet",), path=True)
    """Tables of one-to-one orthologs (Parquet). Each column is named after a species and holds its gene ids."""

    def __post_init__(self) -> None:
        check(self, "vocab")
        few = f"0 or at least {MIN_MEDIAN_CELLS}"
        require(
            self.median_cells == 0 or self.median_cells >= MIN_MEDIAN_CELLS,
            "vocab.median_cells",
            self.median_cells,
            few,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Rank value encoding of cells as sentences (paper section 3.2)."""

    max_len: int = option(2048, least=2, most=65536, unit="tokens")
    """Longest sentence, `<cls>` included."""
    scaling: str = option("divide", choices=("divide", "multiply"))
    """Counts are scaled by the gene's median before ranking: `divide` (all published code) or `multiply` (the paper's text)."""
    cls: bool = option(False)
    """Put `<cls>` before the genes."""

    def __post_init__(self) -> None:
        check(self, "tokens")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prepare:
    """How the corpus is divided into tasks and files. No sentence depends on it."""

    shard_cells: int = option(10_000, least=1, unit="cells")
    """Cells of a source per task and Parquet shard."""
    block_cells: int = option(128, result=False, least=1, unit="cells")
    """Cells held in memory at a time."""
    keep_counts: bool = option(True, result=False)
    """Keep a packed copy of the counts beside the corpus until it is finished, about 2 bytes per count above 0. Then sources are
    read once. `false` needs no such space, and reads sources three times."""
    strict: bool = option(False, result=False)
    """Stop at the first rejected source, instead of listing the rejected ones at the end."""
    extend: str = option("", result=False, path=True)
    """URI of a finished corpus whose cells are taken over; `sources` then names only the new ones. Needs that corpus'
    vocabulary (vocab.reuse) and the same qc and tokens."""

    def __post_init__(self) -> None:
        check(self, "prepare")
        require(
            self.shard_cells >= self.block_cells,
            "prepare.shard_cells",
            self.shard_cells,
            f"at least prepare.block_cells ({self.block_cells})",
        )


COUNT_OR_REFUSE = ("refuse", "count")


@dataclass(frozen=True, kw_only=True, slots=True)
class Imports:
    """`mixgf import`: tokenised Arrow data sets with token dictionaries of their own (Genecorpus-30M, Mouse-Genecorpus-20M).

    Of the other sections it reads `sources`, `vocab`, `tokens`, `prepare` and `qc.min_genes`. What `count` counts is listed in
    the corpus' `imported.parquet`.
    """

    dictionaries: Mapping[str, str] = option({}, path=True, shared_name="all")
    """Species or source name to URI of its token dictionary; one URI alone, or `all`, is for all sources. Gene to id, as a
    published pickle (read by a restricted reader), JSON, Parquet, or TSV with columns gene (or key) and token."""
    medians: Mapping[str, str] = option({}, path=True, shared_name="all")
    """Species to URI of its gene medians; one URI alone, or `all`, is for all species. The same formats, column median. Empty:
    the median column of the dictionary, else `vocab.medians`. Not needed with `vocab.reuse`."""
    unknown_ids: str = option("refuse", choices=COUNT_OR_REFUSE)
    """An id that the dictionary lacks, a <mask>, or a special token between genes: `refuse` the source, or `count` it and
    leave it out."""
    outside: str = option("count", choices=COUNT_OR_REFUSE)
    """A gene of the dictionary that the species' vocabulary lacks: `refuse` the source, or `count` it and leave it out."""
    duplicates: str = option("refuse", choices=COUNT_OR_REFUSE)
    """A gene that the sentence already has: `refuse` the source, or `count` it and keep the first one."""
    lengths: str = option("refuse", choices=COUNT_OR_REFUSE)
    """A `length` column that differs from the number of ids: `refuse` the source, or `count` it and use the ids."""

    def __post_init__(self) -> None:
        check(self, "imports")

"""The configuration of a whole run: frozen dataclasses, dotted overrides, JSON, fingerprints.

Nothing heavy is imported here, so that `--help`, `--print-config` and validation answer at once.
A run is a `Config`; a recipe (`mixgf.recipes`) is a function that returns one; `--set a.b=c` replaces one field;
the recorded JSON repeats the run. Units and special values stand under each field.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """Something the user gave cannot be used. One line: field, value, what is allowed, way out."""


class StorageError(OSError):
    """Object storage, or the way to it, did not do what was asked, after patience. Nothing is wrong with what is stored."""


class AccessError(StorageError):
    """Object storage refuses: keys, rights, bucket. For the user to mend; no source is to blame, and no work is lost."""


def _require(ok: bool, path: str, value: object, allowed: str) -> None:  # noqa: FBT001 (a predicate reads better first)
    if not ok:
        msg = f"{path} = {value!r}: must be {allowed}"
        raise UserError(msg)


def _one_of(path: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, path, value, "one of " + ", ".join(repr(a) for a in allowed))


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
    """Remove doublets by Scrublet (scanpy's), per sample."""
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


def split_named(text: str) -> tuple[str, str]:
    """`name=URI` or a bare `URI` as (name or "", URI)."""
    name, eq, uri = text.partition("=")
    return (name.strip(), uri.strip()) if eq and not set(name) & set("/:\\") else ("", text.strip())


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """The BERT encoder of paper section 3.3 (spec section 5)."""

    num_layers: int = 6
    """Transformer blocks."""
    dim: int = 256
    """Width of the hidden states and of a cell's vector."""
    num_heads: int = 4
    """Attention heads; they share `dim`."""
    ffn_dim: int = 512
    """Width inside a feed-forward block."""
    max_positions: int = 2048
    """Tokens of a sentence that the encoder reads, from its beginning."""
    activation: str = "silu"
    """`silu` (the paper), `relu` or `gelu` (published relatives)."""
    dropout: float = 0.1
    """After the embedding, attention and feed-forward blocks."""
    attention_dropout: float = 0.0
    """On attention weights. The paper is silent; fused kernels want 0. Above 0 a slower exact path is used."""
    norm_eps: float = 1e-12
    """Added to the variance in layer norms."""
    init_sd: float = 0.02
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        _one_of("model.activation", self.activation, ("silu", "relu", "gelu"))
        _require(
            self.dim % self.num_heads == 0, "model.dim", self.dim, f"divisible by model.num_heads ({self.num_heads})"
        )
        for name in ("dropout", "attention_dropout"):
            _require(0 <= getattr(self, name) < 1, f"model.{name}", getattr(self, name), "in [0, 1)")


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What pretraining minimises (paper eq. 1 to 3, spec section 6)."""

    mlm_weight: float = 1.0
    """Of the masked-gene loss."""
    mlm_fraction: float = 0.15
    """Share of gene positions that are masked, of which 80 % become <mask>, 10 % a random gene of the species, 10 % stay."""
    contrast_weight: float = 1.0
    """0 = no contrastive term and a single view."""
    view: str = "dropout"
    """How the second view differs: `dropout` (the paper: same masked input, other dropout), `mask`, `subsample`, `ortholog`."""
    subsample_fraction: float = 0.8
    """Share of genes kept by the `subsample` view."""
    temperature: float = 0.05
    """Of the contrast (tau of eq. 3)."""
    pooling: str = "mean"
    """The cell vector of the contrast: `mean` over genes, `first` position (published code), `cls` (needs tokens.cls)."""
    gather: bool = True
    """Take negatives from all workers, with gradients."""
    simcsepp_weight: float = 0.0
    """Dimension-wise SimCSE++ term; the published value is 0.1, temperature 5."""
    simcsepp_temperature: float = 5.0
    """Of the SimCSE++ term."""
    ortholog_weight: float = 0.0
    """A cell and its gene-by-gene translation to the other species as a positive pair."""

    def __post_init__(self) -> None:
        _one_of("objective.view", self.view, ("dropout", "mask", "subsample", "ortholog"))
        _one_of("objective.pooling", self.pooling, ("mean", "first", "cls"))
        _require(0 < self.mlm_fraction < 1, "objective.mlm_fraction", self.mlm_fraction, "between 0 and 1")
        _require(self.temperature > 0, "objective.temperature", self.temperature, "above 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Train:
    """Optimisation (spec section 7). `batch_cells` is global: it does not depend on the number of workers."""

    epochs: int = 10
    """Times that every cell is seen."""
    max_steps: int = 0
    """0 = all epochs; else stop after that many optimizer steps (the schedule ends there too)."""
    cells_share: float = 1.0
    """Share of the corpus' cells that are trained on, drawn with a key; a smaller share is part of every larger one."""
    batch_cells: int = 64
    """Cells in one global batch, over all workers (the paper: 8 GPUs x 8)."""
    micro_tokens: int = 16_384
    """Most tokens in one forward pass of one worker; a bigger share of the batch is accumulated."""
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    schedule: str = "cosine"
    """`cosine` or `linear` to zero after the warm-up, or `constant`."""
    warmup_steps: int = 10_000
    """Steps in which the learning rate rises from 0 to its peak."""
    weight_decay: float = 0.001
    """Of AdamW, on matrices only."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 = no clipping."""
    precision: str = "fp32"
    """`fp32`, or `bf16` (autocast; weights stay float32)."""
    compile: bool = False
    """torch.compile the encoder (pays on GPUs)."""
    threads: int = 1
    """Torch threads per CPU worker."""
    checkpoint_steps: int = 1000
    """Steps between checkpoints; the last step is always kept."""
    keep_checkpoints: int = 2
    """Latest checkpoints that stay in storage."""
    log_steps: int = 10
    """Steps between two logged figures."""
    species_mix: tuple[str, ...] = ()
    """Shares by species and epoch as `name=share`, for example human=0.5, mouse=0.5; empty = every cell once."""

    def __post_init__(self) -> None:
        _one_of("train.schedule", self.schedule, ("cosine", "linear", "constant"))
        _one_of("train.precision", self.precision, ("fp32", "bf16"))
        for name in (
            "epochs",
            "batch_cells",
            "micro_tokens",
            "checkpoint_steps",
            "keep_checkpoints",
            "log_steps",
            "threads",
        ):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "at least 1")
        _require(self.lr > 0, "train.lr", self.lr, "above 0")
        _require(0 < self.cells_share <= 1, "train.cells_share", self.cells_share, "above 0, at most 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Embed:
    """Cells to vectors."""

    pooling: str = "mean"
    """`mean` over genes, `first` position, or `cls`."""
    layer: int = -1
    """Which hidden layer: -1 = the last, -2 = the one before it (the family's habit); 0 = all side by side, the embedding first."""

    def __post_init__(self) -> None:
        _one_of("embed.pooling", self.pooling, ("mean", "first", "cls"))
        _require(
            self.layer <= 0, "embed.layer", self.layer, "negative, counted from the last layer, or 0 for all of them"
        )


SPLITS = ("random", "donor", "dataset", "species")
"""How labelled cells are divided (spec section 8)."""
HEADS = ("knn", "probe", "centroid")
"""Classifiers on frozen vectors."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Classify:
    """Cell-type classification and zero-shot scores (paper section 4.3, spec section 8)."""

    label: str = "cell_type"
    """Column of `obs` with the labels."""
    cells: str = ""
    """Cells that take part, as an expression over `obs`, for example organ == 'pancreas'; empty = all."""
    merge: tuple[str, ...] = ()
    """Labels that count as one, as NAME=LABEL|LABEL, for example T cell=CD4 T cell|CD8 T cell, where data sets were labelled at
    different depths."""
    max_cells: int = 0
    """Most labelled cells of a group, drawn with a key in proportion to the types; 0 = all."""
    unlabelled: tuple[str, ...] = ("", "unknown", "nan", "None")
    """Values of the label that mean: no label."""
    group: str = "source"
    """Column that splits the cells into independent tasks (the paper: per organ)."""
    donor: str = "donor"
    """Column of donors, for held-out-donor splits and intervals; cells of a missing column are one donor."""
    dataset: str = "source"
    """Column of data sets, for held-out-dataset splits."""
    transfer: str = "organ"
    """Column within which species, and data sets of a species, are compared; cells of a missing column are one group."""
    min_class_fraction: float = 0.005
    """Types rarer than this share of the group's cells are dropped (the paper)."""
    test_fraction: float = 0.2
    """Share of the cells that are tested (the paper: 80:20); on donor splits, in whole donors."""
    validation_fraction: float = 0.1
    """Share of the training cells on which epochs are selected. Test cells are never looked at."""
    splits: tuple[str, ...] = ("random", "species")
    """`random` cells (the paper), held-out `donor`, held-out `dataset`, other `species`."""
    seeds: int = 1
    """Splits of each kind, each drawn anew."""
    fewer_seeds: tuple[str, ...] = ()
    """Models, the dear ones, that have fewer seeds than `seeds`, as MODEL=NUMBER, for example finetune=1,scvi=2."""
    encoders: tuple[str, ...] = ()
    """Further encoders on the corpus' vocabulary, as NAME=URI of a checkpoint: trained by masked genes only, on one species, ..."""
    models: tuple[str, ...] = (
        "finetune",
        "knn",
        "probe",
        "knn@untrained",
        "probe@untrained",
        "majority",
        "hvg_logreg",
        "pca_knn",
        "pseudobulk",
        "rank_pca",
    )
    """What is scored, each on identical splits: `finetune`, `knn`, `probe`, `centroid` on the run's checkpoint, the same on
    another encoder (`probe@untrained`: random weights; `probe@NAME`: one of `encoders`), or a baseline (`mixgf.baselines`)."""
    label_shares: tuple[float, ...] = ()
    """Shares of the training labels of the random split for the label-efficiency curve, for example 0.01,0.05,0.1."""
    unseen_types: int = 0
    """Types of each group that are left out of training in turn, to see whether a model gives them a low probability."""
    curve_models: tuple[str, ...] = ()
    """Models of the curve and of the left out types, from `models`; empty = all that are not fine-tuned."""
    integration_cells: int = 0
    """Cells on which each frozen embedding is scored for species and batches left in it, drawn with a key; 0 = not scored."""
    knn: int = 5
    """Neighbours that vote in `knn` and `pca_knn`."""
    num_hvgs: int = 2000
    """Variable genes of the baselines that choose genes."""
    epochs: int = 10
    """Of fine-tuning."""
    min_steps: int = 0
    """Epochs are added until training has at least this many steps, so that a small set is not left untrained; 0 = as `epochs` says."""
    lr: float = 5e-5
    """Peak learning rate of fine-tuning."""
    batch_cells: int = 8
    """Cells of a batch of fine-tuning."""
    warmup_steps: int = 500
    """Of fine-tuning; at most a quarter of its steps."""
    freeze_layers: int = 0
    """Encoder layers (and the embedding) that are not trained; -1 = all."""
    class_weights: bool = False
    """Weigh the loss by inverse class frequency."""
    layer: int = -1
    """Hidden layer that a fine-tuned head sees: -1 = the last, ...; 0 = all side by side, the embedding first."""
    gene_weights: bool = False
    """A fine-tuned head also has a weight per class and gene of the sentence: a linear model beside the encoder."""
    warm_start: bool = False
    """Fine-tuning begins with the head that a logistic regression finds for the untouched encoder. That beginning is epoch 0: if no
    epoch has a lower loss on the validation cells, it predicts."""
    align: bool = False
    """Between species a fine-tuned model reads only genes with a one-to-one ortholog, all by the training species' ids, and the
    tested species' class scores are shifted to where the training cells' lie (labels unseen)."""
    lora_rank: int = 0
    """Fine-tune by low-rank adapters of every layer's matrices (LoRA) instead of all weights; 0 = all weights."""
    lora_alpha: float = 16.0
    """Adapters count alpha / rank times."""
    max_len: int = 0
    """Cut sentences to this many tokens; 0 = as in the corpus. The encoder reads `model.max_positions` of them at most, weights of
    genes (`gene_weights`) all."""
    keep: bool = True
    """Keep the best classifier of each group (by validation loss, seed 0 of the first split within groups) for `mixgf annotate`."""

    def __post_init__(self) -> None:
        for split in self.splits:
            _one_of("classify.splits", split, SPLITS)
        _require(self.seeds >= 1, "classify.seeds", self.seeds, "at least 1")
        for name in ("max_cells", "unseen_types", "integration_cells"):
            _require(getattr(self, name) >= 0, f"classify.{name}", getattr(self, name), "at least 0")
        for share in self.label_shares:
            _require(0 < share <= 1, "classify.label_shares", share, "above 0, and at most 1")
        for model in self.curve_models:
            _one_of("classify.curve_models", model, self.models)
        _require(0 < self.test_fraction < 1, "classify.test_fraction", self.test_fraction, "between 0 and 1")
        _require(
            self.layer <= 0, "classify.layer", self.layer, "negative, counted from the last layer, or 0 for all of them"
        )
        _require(self.lora_rank >= 0, "classify.lora_rank", self.lora_rank, "at least 0")
        _require(self.lora_alpha > 0, "classify.lora_alpha", self.lora_alpha, "above 0")
        _require(not (self.lora_rank and self.freeze_layers), "classify.lora_rank", self.lora_rank,
                 "0 with classify.freeze_layers: adapters leave every layer's own weights alone anyway")  # fmt: skip


GENE_TABLES = (".tsv", ".csv", ".txt", ".parquet", ".tsv.gz", ".csv.gz", ".txt.gz")
"""Endings by which an entry of perturb.known is a table, not a gene."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Perturb:
    """In silico perturbation (paper section 4.2, spec section 9)."""

    start: str = ""
    """Cells that are perturbed, as an expression over `obs`, for example cell_type == 'alpha' and species == 'human'."""
    goal: str = ""
    """Cells that define the goal state; empty = no goal, the shift is 1 - cos(original, perturbed)."""
    alternatives: tuple[str, ...] = ()
    """Expressions of further states whose shifts are reported too, each and on average."""
    unrelated: int = 6
    """With a goal and no `alternatives`: so many states that have nothing to do with the question stand in for them, so that
    an effect that goes everywhere is seen. They are the values of classify.label with the most cells (at least 20) and no
    cell of start or goal, in the start cells' own files where these have two such values. 0 = none."""
    operations: tuple[str, ...] = ("delete", "overexpress")
    """`delete`, `overexpress`, `inhibit`, `activate`."""
    rank_share: float = 0.25
    """How far inhibit and activate move a gene, as a share of the sentence."""
    genes: tuple[str, ...] = ()
    """Ensembl ids or symbols; `+` joins genes that are perturbed together; empty = all detected genes."""
    null_genes: int = -1
    """Genes that others are compared with. Beside named `genes`: scored for that only, matched to them in rank and coverage;
    without some 100 of them a named gene has nothing to be unusual among. After a `screen`: like the chosen genes in rank and
    coverage, drawn among all genes whatever their estimates, as the chosen ones are all extreme. -1 = 100 after a screen, else 0."""
    anchor: str = ""
    """A gene that is perturbed together with each of the others (pairs), and once alone; empty = none."""
    min_coverage: float = 0.05
    """Genes in the sentences of fewer start cells are not tested."""
    max_genes: int = 0
    """0 = all; else only the genes with the highest coverage."""
    max_cells: int = 200
    """Start cells that are perturbed, drawn with a key, balanced over donors; 0 = all. States always use all cells."""
    variant: str = "remaining"
    """Embedding compared: mean over the `remaining` genes (V1, the paper), over `all` positions (V2), or `cls`."""
    layer: int = -1
    """Hidden layer that is compared: -1 = the last, -2 = the one before it."""
    donor: str = "donor"
    """Column of `obs` over whose values effects must repeat."""
    insert_absent: bool = True
    """Overexpress a gene in cells whose sentence lacks it, too; false = only where it is detected (published, cheaper)."""
    response: int = 0
    """Columns of a matrix of what each perturbation does to every other gene's contextual embedding (1 - cos): the genes in
    most of the perturbed cells, say 200 (`responses.parquet`, some ten bytes a pair of genes); 0 = no matrix."""
    block_genes: int = 64
    """Genes per work unit."""
    block_cells: int = 16
    """Cells per work unit."""
    micro_tokens: int = 16_384
    """Most tokens in one forward pass. Changes speed and memory, no result."""
    num_permutations: int = 10_000
    """Sign flips of donors at most; fewer where there are not so many."""
    mode: str = "honest"
    """`honest`, or `paper`: the published rank-sum test against the pooled shifts, the gene itself included."""
    known: tuple[str, ...] = ()
    """Genes known to drive the change, to be found again: Ensembl ids, symbols, or tables (.tsv, .csv, .txt, .parquet) with a
    column gene or symbol, and perhaps `hit` (a screen: true or false). Only read: another list needs no new perturbation."""
    published: str = ""
    """Print the paper's Table 4 beside the run: `dkd`, `adpkd` or `alzheimer`; empty = none. Only read, too."""
    screen: int = 0
    """Genes per operation that are scored exactly, after a cheap estimate of all of them; 0 = all genes are. Needs a goal."""
    direction: str = "both"
    """What a screen looks for: genes that move cells `towards` the goal, `away` from it, or `both` (half of `screen` each)."""
    screen_grid: int = 8
    """Ranks per cell at which the estimate is exact. More is better and slower."""
    screen_sample: int = 64
    """Genes drawn at random that are scored exactly as well: on them the estimate is checked."""
    screen_agreement: float = 0.8
    """Least rank correlation of estimated and exact shifts of these genes; below it, all genes are scored exactly."""
    budget_hours: float = 0.0
    """Worker-hours (of compute.cpus_per_worker and gpus_per_worker) to spend, all submissions together; 0 = no bound.
    Genes that are not reached are listed; the same command with more continues."""
    budget_cost: float = 0.0
    """The same as money, at perturb.price; 0 = no bound."""
    price: float = 0.0
    """Of one worker-hour, in your currency; 0 = not known."""
    worker_flops: float = 0.0
    """FLOP/s of a worker, for --dry-run; 0 = a probe of some seconds measures it."""

    def __post_init__(self) -> None:
        for operation in self.operations:
            _one_of("perturb.operations", operation, ("delete", "overexpress", "inhibit", "activate"))
        _one_of("perturb.variant", self.variant, ("remaining", "all", "cls"))
        _one_of("perturb.mode", self.mode, ("honest", "paper"))
        _one_of("perturb.published", self.published, ("", "dkd", "adpkd", "alzheimer"))
        _one_of("perturb.direction", self.direction, ("both", "towards", "away"))
        _require(
            self.null_genes >= -1, "perturb.null_genes", self.null_genes, "at least 0, or -1 = as many as are needed"
        )
        _require(self.response >= 0, "perturb.response", self.response, "at least 0")
        _require(self.unrelated >= 0, "perturb.unrelated", self.unrelated, "at least 0")
        _require(self.layer < 0, "perturb.layer", self.layer, "negative, counted from the last layer")
        for name in ("screen", "budget_hours", "budget_cost", "price", "worker_flops"):
            _require(getattr(self, name) >= 0, f"perturb.{name}", getattr(self, name), "at least 0")
        for name, least in (("screen_grid", 2), ("screen_sample", 10)):
            _require(getattr(self, name) >= least, f"perturb.{name}", getattr(self, name), f"at least {least}")
        if self.screen:
            _require(bool(self.goal.strip()), "perturb.screen", self.screen,
                     "0 without perturb.goal: a response without direction has no cheap estimate")  # fmt: skip
            _require(
                not self.anchor, "perturb.screen", self.screen, "0 with perturb.anchor: pairs have no cheap estimate"
            )
            for operation in self.operations:
                _require(operation in {"delete", "overexpress"}, "perturb.screen", self.screen,
                         f"0 with {operation}: only delete and overexpress have a cheap estimate")  # fmt: skip
        if self.budget_cost:
            _require(
                self.price > 0,
                "perturb.budget_cost",
                self.budget_cost,
                "0 without perturb.price, the price of a worker-hour",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Compare:
    """Across species: one space, transfer, model matching (paper section 3.4, spec section 10)."""

    encoders: tuple[str, ...] = ()
    """Further encoders: NAME=CHECKPOINT on the run's corpus, or NAME=CHECKPOINT@CORPUS where the vocabulary is another one
    (vocab.sharing = ortholog): a corpus of the same cells with that vocabulary."""
    models: tuple[str, ...] = ("knn", "probe")
    """Heads that carry labels to the other species: on the run's encoder, on an untrained one and on each of `encoders`."""
    controls: tuple[str, ...] = ("majority", "hvg_logreg", "pca_knn", "pseudobulk", "rank_pca")
    """Baselines on one-to-one orthologs that do the same."""
    cells: int = 3000
    """Labelled cells on which spaces are drawn and measured."""
    shifts: tuple[str, ...] = ()
    """Model matching: NAME=BEFORE -> AFTER with two expressions over `obs` that choose cells of one species; NAME#TAG says that
    shifts of that tag are expected to be alike. `=>` compares the sets as they are, not within types (one type against another);
    `-> half` sets two random halves of the first against each other, a control. Give several as a JSON list."""
    within: tuple[str, ...] = ("cell_type",)
    """Columns within whose values shifts are taken and labels permuted: a change of composition is no shift. Empty = none."""
    by_type: bool = False
    """Also match each shift type by type (types by classify.label)."""
    shift_cells: int = 400
    """Most cells of either condition of a shift, drawn with a key; 0 = all."""
    min_cells: int = 10
    """Fewest cells of either condition of a shift."""
    responses: tuple[str, ...] = ()
    """Two finished perturbations, SPECIES=URI each, whose one-to-one orthologs are set side by side; empty = none."""
    neighbours: int = 20
    """Nearest genes that make a gene's neighbourhood; 0 = gene networks are not compared."""
    num_permutations: int = 1000
    """Permutations behind p-values of matching, draws behind those of responses."""

    def __post_init__(self) -> None:
        for model in self.models:
            _one_of("compare.models", model, HEADS)
        _require(bool(self.models), "compare.models", self.models, "at least one head")
        names = [split_named(text)[0] for text in self.responses]
        _require(not names or (len(names) == 2 == len(set(names) - {""})), "compare.responses", self.responses,
                 "SPECIES=URI of two perturbations of different species")  # fmt: skip
        for name, least in (
            ("cells", 100),
            ("shift_cells", 0),
            ("min_cells", 2),
            ("num_permutations", 19),
            ("neighbours", 0),
        ):
            _require(getattr(self, name) >= least, f"compare.{name}", getattr(self, name), f"at least {least}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tune:
    """A sweep: arms (this config with some fields changed) times seeds, each a pretraining that is judged as it goes."""

    space: tuple[str, ...] = ()
    """What is varied, one entry per factor: a dotted field, `=`, a JSON list of values. ` x ` between factors crosses them. The
    arms are this config as it is (the base) and, entry by entry, every combination of the entry's values."""
    search: str = "grid"
    """`grid`: all arms; `random`: the base and `num_arms` of them, drawn with a key."""
    num_arms: int = 12
    """Arms that `random` draws beside the base."""
    seeds: int = 3
    """Trainings of an arm, with config.seed, config.seed + 1, ..."""
    rungs: tuple[float, ...] = (0.3, 1.0)
    """Shares of the training after which an arm is judged; the last is 1."""
    stop: str = "halving"
    """`halving`: after a rung only the better arms (by mean over seeds) go on, the base always; the same sweep always stops the
    same arms. `asha`: Ray Tune's ASHA on single trainings, which waits for nobody; what it stops depends on who comes first.
    `none`: all arms are trained to the end."""
    keep: float = 0.5
    """Share of the arms that go on after a rung."""
    judge: str = "knn"
    """Head whose macro F1 decides (zero-shot): `knn`, `probe` or `centroid`; all three are kept."""
    splits: tuple[str, ...] = ("donor", "species")
    """On which splits, each with the same weight: `random`, `donor`, `dataset`, `species`."""
    cells: int = 3000
    """Labelled cells that the arms are judged on, drawn with a key, as many of each group as can be; 0 = all."""
    finetune: bool = True
    """Fine-tune every finished training on random splits too, by `classify`: the second score."""
    concurrent: int = 2
    """Trainings at a time, of compute.num_workers workers each."""
    register: str = ""
    """Name in MLflow's model registry under which the best arm is registered; empty = not registered."""

    def __post_init__(self) -> None:
        _one_of("tune.search", self.search, ("grid", "random"))
        _one_of("tune.stop", self.stop, ("halving", "asha", "none"))
        _one_of("tune.judge", self.judge, HEADS)
        for split in self.splits:
            _one_of("tune.splits", split, SPLITS)
        _require(bool(self.splits), "tune.splits", self.splits, "at least one split")
        for name in ("num_arms", "seeds", "concurrent"):
            _require(getattr(self, name) >= 1, f"tune.{name}", getattr(self, name), "at least 1")
        _require(self.cells >= 0, "tune.cells", self.cells, "at least 0 (all)")
        _require(0 < self.keep <= 1, "tune.keep", self.keep, "above 0, at most 1")
        rising = all(a < b for a, b in zip(self.rungs, self.rungs[1:], strict=False))
        _require(
            bool(self.rungs) and rising and self.rungs[0] > 0 and self.rungs[-1] == 1, "tune.rungs", self.rungs,
            "rising shares of the training, the last 1",
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Compute:
    """Workers of the distributed stages. Where they run is Ray's business (RAY_ADDRESS)."""

    num_workers: int = 2
    """Workers of a training; elsewhere, tasks or actors at a time."""
    min_workers: int = 0
    """Training goes on with as few workers as this when a node is lost; 0 = num_workers (not elastic)."""
    resize_seconds: float = 60.0
    """With `min_workers`: how often to look whether more workers can train now. A change of size starts the group again
    from its latest checkpoint."""
    cpus_per_worker: float = 1.0
    """CPUs that a worker asks Ray for."""
    gpus_per_worker: float = 0.0
    """GPUs that a worker asks Ray for."""
    max_failures: int = 3
    """Times that a lost training worker group is started again."""

    def __post_init__(self) -> None:
        _require(self.num_workers >= 1, "compute.num_workers", self.num_workers, "at least 1")
        _require(
            0 <= self.min_workers <= self.num_workers,
            "compute.min_workers",
            self.min_workers,
            "between 0 and num_workers",
        )
        _require(self.resize_seconds >= 1, "compute.resize_seconds", self.resize_seconds, "at least 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Inputs:
    """Artifacts made by other runs; empty = the artifact of that stage under `output`."""

    corpus: str = ""
    """Of prepare or import."""
    checkpoint: str = ""
    """Of pretrain or import-weights."""
    embeddings: str = ""
    """Of embed."""
    classification: str = ""
    """Of classify."""
    perturbation: str = ""
    """Of perturb."""
    start: str = ""
    """A checkpoint on the corpus' vocabulary whose weights `pretrain` starts from (schedule and moments begin anew); empty =
    random weights."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tracking:
    """MLflow."""

    uri: str = ""
    """Tracking server or database; empty = MLFLOW_TRACKING_URI, else SQLite under `output` (or under . for s3://)."""
    experiment: str = "mixgf"
    """Name of the experiment in MLflow."""
    prices: str = ""
    """URI of a JSON object, node type to price per node-hour, for the cost ledger; empty = MIXGF_PRICES, else no prices."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One run of mixgf, whole."""

    recipe: str = "default"
    output: str = "runs/default"
    """URI of the folder that receives every artifact of the run, local or s3://."""
    seed: int = 0
    species: tuple[SpeciesRow, ...] = (HUMAN, MOUSE)
    sources: tuple[Source, ...] = ()
    qc: QC = field(default_factory=QC)
    vocab: Vocab = field(default_factory=Vocab)
    tokens: Tokens = field(default_factory=Tokens)
    prepare: Prepare = field(default_factory=Prepare)
    imports: Imports = field(default_factory=Imports)
    model: Model = field(default_factory=Model)
    objective: Objective = field(default_factory=Objective)
    train: Train = field(default_factory=Train)
    embed: Embed = field(default_factory=Embed)
    classify: Classify = field(default_factory=Classify)
    perturb: Perturb = field(default_factory=Perturb)
    compare: Compare = field(default_factory=Compare)
    tune: Tune = field(default_factory=Tune)
    compute: Compute = field(default_factory=Compute)
    inputs: Inputs = field(default_factory=Inputs)
    tracking: Tracking = field(default_factory=Tracking)

    def __post_init__(self) -> None:
        names = tuple(row.name for row in self.species)
        _require(len(set(names)) == len(names), "species", names, "rows with different names")
        for i, source in enumerate(self.sources):
            _one_of(f"sources[{i}].species", source.species, names)
        _require(self.output.strip() != "", "output", self.output, "a folder or an s3:// URI")
        for path, pooling in (
            ("objective.pooling", self.objective.pooling),
            ("embed.pooling", self.embed.pooling),
            ("perturb.variant", self.perturb.variant),
        ):
            _require(pooling != "cls" or self.tokens.cls, path, pooling, "used with tokens.cls = true")


# JSON, overrides, fingerprints


def meanings() -> dict[tuple[str, str], str]:
    """Section and field of a config to what the field means: the docstring behind it in this file."""
    sections = {part.type: part.name for part in dataclasses.fields(Config)}
    found = {}
    for part in ast.parse(Path(__file__).read_text(encoding="utf-8")).body:
        if isinstance(part, ast.ClassDef) and part.name in sections:
            for one, after in pairwise(part.body):
                if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and isinstance(after, ast.Expr):
                    found[sections[part.name], one.target.id] = " ".join(str(ast.literal_eval(after.value)).split())
    return found


def to_dict(config: Any) -> dict[str, Any]:
    """The plain JSON form of a config or of one of its sections."""
    return typing.cast("dict[str, Any]", json.loads(json.dumps(dataclasses.asdict(config))))


def from_dict(cls: type[T], data: dict[str, Any], path: str = "") -> T:
    """Build a config section from its JSON form; unknown or ill-typed fields are a `UserError`."""
    hints = typing.get_type_hints(cls)
    unknown = sorted(set(data) - set(hints))
    if unknown:
        msg = f"{_join(path, unknown[0])}: unknown field; known here: {', '.join(sorted(hints))}"
        raise UserError(msg)
    try:
        return cls(**{k: _coerce(hints[k], v, _join(path, k)) for k, v in data.items()})
    except TypeError as error:  # a required field is missing; the constructor names it
        msg = f"{path or cls.__name__}: {str(error).split('() ')[-1]}"
        raise UserError(msg) from None


def override(config: Config, assignments: list[str]) -> Config:
    """Apply `a.b=c` assignments; values are JSON where they parse as JSON, else plain text."""
    data = to_dict(config)
    for assignment in assignments:
        path, eq, text = assignment.partition("=")
        if not eq:
            msg = f"--set {assignment}: must look like section.field=value"
            raise UserError(msg)
        node, cls = data, typing.cast("Any", Config)
        *parents, leaf = path.strip().split(".")
        for i, name in enumerate(parents):
            cls = typing.get_type_hints(cls).get(name) if dataclasses.is_dataclass(cls) else None
            if not dataclasses.is_dataclass(cls):
                where = ".".join(parents[: i + 1])
                msg = f"--set {assignment}: {where!r} is no section; sections: {', '.join(sections())}"
                raise UserError(msg)
            node = node[name]
        hints = typing.get_type_hints(cls)
        if leaf not in hints:
            msg = f"--set {assignment}: no field {leaf!r}; known: {', '.join(sorted(hints))}"
            raise UserError(msg)
        node[leaf] = _parse(hints[leaf], text)
    return from_dict(Config, data)


def sections() -> list[str]:
    """Names of the nested sections of `Config`."""
    return [k for k, t in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(t)]


def flat(data: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested plain data by dotted name."""
    rows: dict[str, Any] = {}
    for key, value in data.items():
        name = _join(path, key)
        rows |= flat(value, name) if isinstance(value, dict) else {name: value}
    return rows


def fingerprint(value: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of plain data; anything without a stable form raises `TypeError`."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def difference(old: Any, new: Any, path: str = "") -> list[str]:
    """Dotted fields in which two plain-JSON values differ, as `path: old -> new`."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines: list[str] = []
        for key in sorted(set(old) | set(new)):
            lines += difference(old.get(key), new.get(key), _join(path, key))
        return lines
    return [] if old == new else [f"{path}: {json.dumps(old)} -> {json.dumps(new)}"]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _parse(hint: Any, text: str) -> Any:
    if hint is str:
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        # a bare list of words for tuple[str, ...]; a bare word elsewhere is refused by _coerce
        return [part.strip() for part in text.split(",")] if typing.get_origin(hint) is tuple else text


def _coerce(hint: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            msg = f"{path} = {value!r}: must be an object with fields {', '.join(typing.get_type_hints(hint))}"
            raise UserError(msg)
        return from_dict(typing.cast("type[Any]", hint), value, path)
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        values = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_coerce(item, v, f"{path}[{i}]") for i, v in enumerate(values))
    assert not isinstance(hint, types.UnionType), f"{path}: config fields have one type"
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not hint:
        msg = f"{path} = {value!r}: must be {'true or false' if hint is bool else hint.__name__}"
        raise UserError(msg)
    return value

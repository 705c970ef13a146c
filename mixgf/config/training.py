"""Settings of the encoder, its pretraining objective, the optimisation, and cell embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mixgf.config.checks import require
from mixgf.config.fields import check, option
from mixgf.errors import UserError

POOLINGS = ("mean", "first", "cls", "ranked")
LayerChoice = int | Literal["all"]
"""A hidden layer, counted from the last (-1), or `all` of them side by side, the embedding first."""
LAYERS = (("second_last", -2),)
"""Names of hidden layers in configs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """The BERT encoder (paper section 3.3). Fields of the role `training` do not change the weights' shapes."""

    num_layers: int = option(6, least=0, most=1000)
    """Transformer blocks."""
    dim: int = option(256, least=1, most=65536)
    """Width of the hidden states and of a cell's vector."""
    num_heads: int = option(4, least=1, most=1024)
    """Attention heads, which share `dim`."""
    ffn_dim: int = option(512, least=1, most=1_048_576)
    """Width inside a feed-forward block."""
    max_positions: int = option(2048, least=2, most=65536, unit="tokens")
    """Tokens of a sentence that the encoder reads, from its beginning."""
    activation: str = option("silu", choices=("silu", "relu", "gelu"))
    """Activation: `silu` as in the paper, `relu` and `gelu` as in published relatives."""
    dropout: float = option(0.1, role="training", least=0, below=1)
    """Dropout after the embedding, attention and feed-forward blocks."""
    attention_dropout: float = option(0.0, role="training", least=0, below=1)
    """Dropout on attention weights. The paper gives none. Above 0, a slower exact attention is used."""
    norm_eps: float = option(1e-12, above=0, below=1)
    """Added to the variance in layer norms."""
    init_sd: float = option(0.02, role="training", above=0, most=10)
    """Standard deviation of the initial weights."""
    start: str = option("random", role="training", omit_default=True, choices=("random", "svd", "table"))
    """Token vectors before training: `random` (the paper); `svd`: of the genes' singular vectors in the corpus' sentences,
    turned onto each other between species; `table`: of `inputs.gene_vectors`."""
    residual: bool = option(False, omit_default=True)
    """Give the pooling `ranked` a linear map of the mean hidden state, zero at first. Without it, `ranked` reads token vectors
    alone."""

    def __post_init__(self) -> None:
        check(self, "model")
        require(
            self.dim % self.num_heads == 0, "model.dim", self.dim, f"divisible by model.num_heads ({self.num_heads})"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What pretraining minimises (paper eq. 1 to 3). Fields of the role `contrast` matter only with a contrastive term."""

    mlm_weight: float = option(1.0, least=0)
    """Weight of the masked-gene loss."""
    mlm_fraction: float = option(0.15, above=0, below=1)
    """Share of gene positions that are predicted. Of these, 80 % become <mask>, 10 % a random gene of the species, and 10 %
    stay as they are."""
    contrast_weight: float = option(1.0, least=0)
    """Weight of the contrastive loss. 0: no contrastive loss and a single view."""
    view: str = option("dropout", role="contrast", choices=("dropout", "mask", "subsample", "ortholog", "neighbour"))
    """How the second view of a cell differs. `dropout` (the paper): same masked input, other dropout. `mask`: other masks.
    `subsample`: fewer genes. `ortholog`: genes translated to the other species. `neighbour`: a cell like it; a random half of
    the genes is read of the cell, the other half of its neighbour. Batches are then of one data set and species, and vectors
    are centred over the batch."""
    neighbours: int = option(10, role="contrast", omit_default=True, least=1, unit="cells")
    """Nearest cells from which the view `neighbour` draws; at most one in 40 cells of the data set."""
    subsample_fraction: float = option(0.8, role="contrast", above=0, most=1)
    """Share of genes that the `subsample` view keeps."""
    temperature: float = option(0.05, role="contrast", above=0)
    """Temperature of the contrastive loss (tau of paper eq. 3)."""
    learn_temperature: bool = option(False, role="contrast", omit_default=True)
    """Train the temperature too, from `temperature` on."""
    projection: int = option(0, role="contrast", omit_default=True, least=0)
    """Width of a hidden layer between the cell vector and the contrastive loss (projection head), which is dropped after the
    training. 0: none."""
    pooling: str = option("mean", role="contrast", choices=POOLINGS)
    """The cell vector of the contrastive loss: `mean` over genes, the `first` position (published code), `cls` (needs
    tokens.cls), or `ranked`: mean of the token vectors weighted by rank, and a residual of the layers (`model.residual`)."""
    gather_negatives: bool = option(True, role="contrast")
    """Use the cells of all workers as negatives, with gradients."""
    simcsepp_weight: float = option(0.0, least=0)
    """Weight of the dimension-wise SimCSE++ loss. The published value is 0.1, with temperature 5."""
    simcsepp_temperature: float = option(5.0, above=0)
    """Temperature of the SimCSE++ loss."""
    ortholog_weight: float = option(0.0, least=0)
    """Weight of a contrastive loss between a cell and its gene-by-gene translation to the other species."""

    def __post_init__(self) -> None:
        check(self, "objective")
        weights = (self.mlm_weight, self.contrast_weight, self.simcsepp_weight, self.ortholog_weight)
        require(any(weights), "objective.mlm_weight", self.mlm_weight, "above 0 where every other weight is 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class Train:
    """Optimisation. `batch_cells` is the global batch size: it does not depend on the number of workers.

    Fields of the role `finetune` also hold for the fine-tuning of `mixgf classify`.
    """

    epochs: int = option(10, least=1)
    """Passes over all cells."""
    max_steps: int = option(0, least=0, unit="steps")
    """Stop after this many optimizer steps; the learning rate's schedule ends there too. 0: all epochs."""
    cells_share: float = option(1.0, omit_default=True, above=0, most=1)
    """Share of the corpus' cells that are trained on, drawn at random. A smaller share is part of every larger one."""
    heldout_share: float = option(0.0, omit_default=True, least=0, below=1)
    """Share of the corpus' cells that are never trained on, in whole donors or data sets where there are any. The losses on
    them are logged. 0: none."""
    heldout_steps: int = option(500, omit_default=True, least=1, unit="steps")
    """Steps between two evaluations of held-out cells. There is one at the end, too."""
    patience: int = option(0, omit_default=True, least=0, unit="evaluations")
    """Stop when so many evaluations in a row did not lower the held-out loss. 0: do not stop early."""
    publish: str = option("last", omit_default=True, choices=("last", "best"))
    """Weights that the training ends with: the `last`, or the `best`, those with the lowest held-out loss."""
    batch_cells: int = option(64, least=1, unit="cells")
    """Global batch size over all workers (paper: 8 GPUs x 8)."""
    micro_tokens: int = option(16_384, result=False, least=1, unit="tokens")
    """Most tokens in one forward pass of one worker. A larger share of the batch is accumulated over several passes."""
    lr: float = option(1e-4, above=0)
    """Peak learning rate of AdamW."""
    schedule: str = option("cosine", role="finetune", choices=("cosine", "linear", "constant"))
    """Learning rate after the warm-up: `cosine` or `linear` to zero, or `constant`."""
    warmup_steps: int = option(10_000, least=0, unit="steps")
    """Steps in which the learning rate rises from 0 to its peak."""
    weight_decay: float = option(0.001, role="finetune", least=0)
    """Weight decay of AdamW, on matrices only."""
    clip: float = option(1.0, role="finetune", least=0)
    """Largest norm of the gradient. 0: no clipping."""
    precision: str = option("fp32", role="finetune", choices=("fp32", "bf16"))
    """`fp32`, or `bf16` (autocast; the weights stay float32)."""
    reduce: str = option("fp32", omit_default=True, choices=("fp32", "bf16"))
    """Type in which workers send gradients to each other. `bf16` halves the bytes and rounds gradients to 8 significant bits."""
    compile: bool = option(False, result=False)
    """Use torch.compile on the encoder. Faster on GPUs."""
    threads: int = option(1, result=False, least=1)
    """Torch threads per CPU worker."""
    checkpoint_steps: int = option(1000, result=False, least=1, unit="steps")
    """Steps between checkpoints. The last step always has one."""
    keep_checkpoints: int = option(2, result=False, least=1)
    """Latest checkpoints that stay in storage."""
    log_steps: int = option(10, result=False, least=1, unit="steps")
    """Steps between two logged losses."""
    species_mix: Mapping[str, float] = option({}, above=0)
    """Species to its share of the cells of an epoch, for example human=0.5,mouse=0.5. Empty: every cell once."""

    def __post_init__(self) -> None:
        check(self, "train")
        for name, needs in (("patience", self.patience > 0), ("publish", self.publish == "best")):
            if needs and self.heldout_share == 0:
                msg = f"train.{name} = {getattr(self, name)!r}: needs held-out cells; set train.heldout_share, for example to 0.02"
                raise UserError(msg)


@dataclass(frozen=True, kw_only=True, slots=True)
class Embed:
    """How the hidden states of a cell become its vector."""

    pooling: str = option("mean", choices=POOLINGS)
    """`mean` over genes, the `first` position, `cls`, or `ranked` (as `objective.pooling`)."""
    layer: LayerChoice = option(-1, below=0, named=LAYERS, word="'all'")
    """Hidden layer: -1 the last, -2 or `second_last` the one before it (which the Geneformer family calls -1); `all` of them side by
    side."""

    def __post_init__(self) -> None:
        check(self, "embed")

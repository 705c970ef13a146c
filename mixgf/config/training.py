"""Moved here from mixgf/config.py."""

from __future__ import annotations

from dataclasses import dataclass

from mixgf.config.checks import _one_of, _require


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
    gather_negatives: bool = True
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

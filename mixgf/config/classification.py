"""Moved here from mixgf/config.py."""

from __future__ import annotations

from dataclasses import dataclass

from mixgf.config.checks import _one_of, _require

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
    seeds_per_model: tuple[str, ...] = ()
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
    another encoder (`probe@untrained`: random weights; `probe@NAME`: one of `encoders`), or a baseline (`mixgf.classification.baselines`)."""
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

"""Settings of `mixgf classify`: the labelled cells, the splits, the models and fine-tuning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mixgf.config.checks import require
from mixgf.config.expressions import MAX_LENGTH, check_expression
from mixgf.config.fields import check, option
from mixgf.config.training import LayerChoice

SPLITS = ("random", "donor", "dataset", "species")
"""How labelled cells are divided into training and test cells."""
RENAMED_MODELS = {"tuned": "finetune_linear_start"}
"""Models of earlier configs and their present names."""
HEADS = ("knn", "probe", "centroid")
"""Classifiers on the vectors of an encoder that is not trained further."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Classify:
    """Cell-type classification and zero-shot scores (paper section 4.3).

    | role | what the field decides |
    |---|---|
    | `cells` | which cells train and which are tested |
    | `asked` | what is scored on them |
    | `models` | which models, with how many seeds |
    | `heads` | settings of the heads on frozen vectors and of the baselines |
    | `finetune` | settings of fine-tuning |
    """

    label: str = option("cell_type", role="cells")
    """Column of `obs` with the labels."""
    label_id: str = option("", role="cells", omit_default=True)
    """Column of `obs` with the Cell Ontology id of each label, for example cell_type_ontology_term_id. The kept classifier carries
    them for `mixgf annotate --ontology`. Empty: none."""
    cells: str = option("", role="cells", longest=MAX_LENGTH, lines=True)
    """Cells that take part, as an expression over `obs`, for example organ == 'pancreas'. Empty: all cells."""
    merge: Mapping[str, tuple[str, ...]] = option({}, role="cells", omit_default=True)
    """New label to the labels that it replaces, for example {"T cell": ["CD4 T cell", "CD8 T cell"]}."""
    max_cells: int = option(0, role="cells", least=0)
    """Most labelled cells of a group, drawn in proportion to the types. 0: all cells."""
    unlabelled: tuple[str, ...] = option(("", "unknown", "nan", "None"), role="cells")
    """Values of the label column that mean "no label"."""
    group: str = option("source", role="cells")
    """Column that divides the cells into independent tasks. In the paper: organs."""
    donor: str = option("donor", role="cells")
    """Column of donors, for held-out-donor splits and for intervals. Without this column all cells count as one donor."""
    dataset: str = option("source", role="cells")
    """Column of data sets, for held-out-dataset splits."""
    transfer: str = option("organ", role="cells")
    """Column within which species are compared, and data sets of one species. Without this column all cells are one group."""
    min_class_fraction: float = option(0.005, role="cells", least=0, below=1)
    """Types rarer than this share of the group's cells are dropped, as in the paper."""
    test_fraction: float = option(0.2, role="cells", above=0, below=1)
    """Share of the cells that are tested (paper: 80:20). Donor splits hold out whole donors."""
    validation_fraction: float = option(0.1, role="cells", least=0, below=1)
    """Share of the training cells on which the epoch is selected. Test cells are never used for this."""
    splits: tuple[str, ...] = option(("random", "species"), role="asked", choices=SPLITS)
    """Kinds of splits: `random` cells (the paper), held-out `donor`, held-out `dataset`, the other `species`."""
    seeds: int = option(1, role="models", least=1)
    """Random splits of each kind."""
    seeds_per_model: Mapping[str, int] = option({}, role="models", least=1)
    """Models that are scored on fewer seeds than `seeds`, for example finetune=1,scvi=2."""
    encoders: Mapping[str, str] = option({}, role="models", path=True)
    """Further encoders with the vocabulary of the corpus: name to URI of a checkpoint, for example mlm=runs/mlm/pretrain."""
    models: tuple[str, ...] = option(
        (
            "finetune",
            "knn",
            "probe",
            "encoder_pca",
            "knn@untrained",
            "probe@untrained",
            "encoder_pca@untrained",
            "majority",
            "hvg_logreg",
            "pca_knn",
            "pseudobulk",
            "genes_vote",
            "genes_logreg",
            "genes_centroid",
            "genes_ranks",
            "joint_pca",
            "pca_logreg",
            "rank_pca",
        ),
        role="models",
    )
    """What is scored, each on the same splits. `finetune`, `knn`, `probe`, `centroid` and `encoder_pca` use the run's checkpoint.
    `probe@untrained` uses random weights, `probe@NAME` one of `encoders`. The other names are baselines."""
    label_shares: tuple[float, ...] = option((), role="asked", above=0, most=1)
    """Shares of the training labels of the random split, for the label-efficiency curve, for example 0.01,0.05,0.1."""
    unseen_types: int = option(0, role="asked", least=0)
    """Types of each group that are left out of training in turn, to measure whether a model gives their cells a low
    probability. 0: none."""
    curve_models: tuple[str, ...] = option((), role="models")
    """Models of `models` that `label_shares` and `unseen_types` are measured for. Empty: all that are not fine-tuned."""
    integration_cells: int = option(0, role="models", least=0)
    """Cells, drawn at random, on which each embedding is scored for the species and batches still visible in it.
    0: not scored."""
    knn: int = option(5, role="heads", least=1)
    """Neighbours that vote in `knn`, `pca_knn` and `joint_pca`."""
    num_hvgs: int = option(2000, role="heads", least=1)
    """Highly variable genes of the baselines that select genes."""
    align: bool = option(True, role="heads")
    """Cells of a data set or species without training cells are read relative to their own mean, for every model: the unlabelled
    cells to predict are seen. Models on sentences read one-to-one orthologs, and their class scores are shifted to the mean of the
    training cells. False: relative to the training cells."""
    epochs: int = option(10, role="finetune", least=1)
    """Epochs of fine-tuning."""
    min_steps: int = option(0, role="finetune", least=0, unit="steps")
    """Fewest steps of fine-tuning: epochs are added for small data sets until they are reached. 0: `epochs` decides."""
    lr: float = option(5e-5, role="finetune", above=0)
    """Peak learning rate of fine-tuning."""
    batch_cells: int = option(8, role="finetune", least=1, unit="cells")
    """Batch size of fine-tuning."""
    warmup_steps: int = option(500, role="finetune", least=0, unit="steps")
    """Warm-up of the learning rate in fine-tuning, at most a quarter of all steps."""
    freeze_layers: int | Literal["all"] = option(0, role="finetune", least=0, word="'all'")
    """Encoder layers, from the embedding on, that fine-tuning does not change: a number, or `all`."""
    class_weights: bool = option(False, role="finetune")
    """Weight the loss by inverse class frequency."""
    layer: LayerChoice = option(-1, role="finetune", below=0, word="'all'")
    """Hidden layer that a fine-tuned head reads: -1 the last, -2 the one before it; `all` of them side by side."""
    gene_weights: bool = option(False, role="finetune")
    """The fine-tuned head also has a weight per class and gene: a linear model beside the encoder."""
    warm_start: bool = option(False, role="finetune")
    """Start fine-tuning from the head that logistic regression finds on the unchanged encoder. This start counts as epoch 0
    and is kept if no epoch has a lower validation loss."""
    lora_rank: int = option(0, role="finetune", least=0)
    """Fine-tune low-rank adapters (LoRA) of this rank instead of all weights. 0: all weights."""
    lora_alpha: float = option(16.0, role="finetune", above=0)
    """LoRA adapters are scaled by alpha / rank."""
    max_len: int = option(0, role="finetune", least=0, unit="tokens")
    """Longest sentence that is read. 0: as in the corpus. The encoder reads at most `model.max_positions` tokens; the weights
    of `gene_weights` read all."""
    keep: bool = option(True, role="asked")
    """Keep the best classifier of each group for `mixgf annotate`, chosen by macro F1 on training cells that are left out in turn.
    Seed 0 of the first split that stays within groups."""

    def __post_init__(self) -> None:
        check(self, "classify")
        check_expression(self.cells, "classify.cells")
        for field in ("models", "curve_models", "seeds_per_model"):
            for model in getattr(self, field):
                head, at, encoder = model.partition("@")
                now = RENAMED_MODELS.get(head, head) + at + encoder
                require(model == now, f"classify.{field}", model, f"{now!r}, its present name")
        for model in self.curve_models:
            require(
                model in self.models,
                "classify.curve_models",
                model,
                f"one of classify.models ({', '.join(self.models)})",
            )
        require(
            not (self.lora_rank and self.freeze_layers),
            "classify.lora_rank",
            self.lora_rank,
            "0 with classify.freeze_layers: adapters leave every layer's own weights as they are",
        )

"""Recipes: named configs. A recipe is a function that returns a `Config`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from mixgf.config.checks import did_you_mean
from mixgf.config.classification import SPLITS, Classify
from mixgf.config.data import QC, Source, Tokens, Vocab
from mixgf.config.perturbation import Perturb
from mixgf.config.run import Compute, Config
from mixgf.config.training import Embed, Model, Objective, Train
from mixgf.config.tuning import Tune
from mixgf.errors import UserError


def default() -> Config:
    """The paper's model with settings for a few GPUs. Needs sources."""
    return Config()


def demo() -> Config:
    """All stages on the bundled pancreas cells (Baron et al. 2016), in a few minutes on two CPU cores.

    One-to-one orthologs share one token id: 3,000 cells are too few to align the separate ids of the paper.
    """
    return Config(
        recipe="demo",
        output="runs/demo",
        sources=(
            Source(uri="resource:pancreas_human_baron.h5ad", species="human", name="baron_human"),
            Source(uri="resource:pancreas_mouse_baron.h5ad", species="mouse", name="baron_mouse"),
        ),
        vocab=Vocab(sharing="ortholog"),
        tokens=Tokens(max_len=192),
        model=Model(num_layers=2, dim=96, num_heads=4, ffn_dim=192, max_positions=192),
        objective=Objective(),
        train=Train(
            epochs=2, batch_cells=32, lr=3e-3, warmup_steps=20, checkpoint_steps=100, micro_tokens=8192, log_steps=5
        ),
        classify=Classify(
            epochs=4,
            batch_cells=16,
            lr=2e-3,
            warmup_steps=30,
            models=(
                *("finetune", "finetune_linear_start", "finetune_linear_start@untrained"),
                *("encoder_pca", "encoder_pca@untrained", "probe", "probe@untrained", "knn", "majority", "hvg_logreg"),
                *("pca_knn", "pseudobulk", "genes_vote", "genes_logreg", "genes_centroid", "genes_ranks", "joint_pca"),
                "pca_logreg",
            ),
        ),
        perturb=Perturb(
            start="cell_type == 'alpha cell' and species == 'human'",
            goal="cell_type == 'beta cell' and species == 'human'",
            alternatives=(
                "cell_type == 'ductal cell' and species == 'human'",
                "cell_type == 'delta cell' and species == 'human'",
            ),
            max_cells=100,
            max_genes=150,
            min_coverage=0.1,
        ),
        compute=Compute(num_workers=2),
    )


def paper() -> Config:
    """The model and training of paper section 3.3.

    6 layers, 4 heads, width 256, SiLU, 2,048 tokens, MLM + SimCSE, learning rate 1e-4 (cosine), 8 cells per GPU, 10 epochs. The
    paper does not give pooling and attention dropout. Pooling is the first position, as in the published code. There is no
    dropout on attention weights, which fused kernels do not support (`paper_published_script` has it). Doublets are not looked
    for: the published corpora come without them.
    """
    return Config(
        recipe="paper",
        output="runs/paper",
        qc=QC(doublets="off"),
        objective=Objective(pooling="first"),
        train=Train(batch_cells=64, precision="bf16", compile=True, checkpoint_steps=2000),
        compute=Compute(num_workers=8, gpus_per_worker=1.0, cpus_per_worker=4.0),
    )


def paper_mlm_only() -> Config:
    """The paper's ablation without the contrastive loss (paper Tables 1 and 3, w/o CL)."""
    base = paper()
    return replace(
        base,
        recipe="paper_mlm_only",
        output="runs/paper_mlm_only",
        objective=replace(base.objective, contrast_weight=0.0),
    )


def paper_published_script() -> Config:
    """The settings of the published training script where they differ from the paper.

    Learning rate 1e-3, attention dropout 0.1, negatives of one worker.
    """
    base = paper()
    return replace(
        base,
        recipe="paper_published_script",
        output="runs/paper_published_script",
        model=replace(base.model, attention_dropout=0.1),
        objective=replace(base.objective, gather_negatives=False),
        train=replace(base.train, lr=1e-3),
    )


def human_only() -> Config:
    """The paper's model on human cells only, without the contrastive loss, as Geneformer. Needs human sources."""
    return replace(paper_mlm_only(), recipe="human_only", output="runs/human_only")


def mouse_only() -> Config:
    """The paper's model on mouse cells only, without the contrastive loss, as Mouse-Geneformer. Needs mouse sources."""
    return replace(paper_mlm_only(), recipe="mouse_only", output="runs/mouse_only")


def _experiment(name: str, species: str, goal: str, operation: str) -> Config:
    """One of the paper's perturbation experiments (section 4.5), with the published test and column names of CELLxGENE.

    As in the published code: genes detected in a cell only, second to last layer, mean over the remaining genes. The paper does
    not give the number of cells; 1,000 is that of the published notebook.
    """
    return replace(
        paper(),
        recipe=f"paper_{name}",
        output=f"runs/paper_{name}",
        perturb=Perturb(
            start=f"disease == 'normal' and species == {species!r}",
            goal=f"disease == {goal!r} and species == {species!r}",
            donor="donor_id",
            operations=(operation,),
            variant="remaining",
            layer=-2,
            insert_absent=False,
            min_coverage=0.01,
            max_cells=1000,
            test="published",
            published=name,
        ),
    )


def paper_dkd() -> Config:
    """Healthy mouse kidney towards diabetic kidney disease, overexpression. Needs the cells and `inputs.checkpoint`."""
    return _experiment("dkd", "mouse", "diabetic kidney disease", "overexpress")


def paper_adpkd() -> Config:
    """Healthy mouse kidney towards polycystic kidney disease, deletion. Needs the cells and `inputs.checkpoint`."""
    return _experiment("adpkd", "mouse", "autosomal dominant polycystic kidney disease", "delete")


def paper_alzheimer() -> Config:
    """Healthy human cortex towards Alzheimer's disease, overexpression. Needs the cells and `inputs.checkpoint`."""
    return _experiment("alzheimer", "human", "Alzheimer disease", "overexpress")


def gpu_smoke() -> Config:
    """The demo's cells and the paper's model on one GPU, to check that a machine works."""
    base = demo()
    return replace(
        base,
        recipe="gpu_smoke",
        output="runs/gpu_smoke",
        vocab=Vocab(),
        model=Model(),
        tokens=Tokens(),
        train=replace(base.train, precision="bf16", micro_tokens=131_072, lr=1e-4),
        compute=Compute(num_workers=1, gpus_per_worker=1.0),
    )


def laptop() -> Config:
    """A small model that two CPU cores train on 20,000 cells within an hour. Needs sources.

    The encoder reads the first 256 tokens of a sentence. Sentences in the corpus have up to 2,048, which the gene weights of
    classifiers read (`classify.gene_weights`).
    """
    base = demo()
    return replace(
        base,
        recipe="laptop",
        output="runs/laptop",
        sources=(),
        tokens=Tokens(),
        model=Model(num_layers=4, dim=128, num_heads=4, ffn_dim=256, max_positions=256),
        vocab=Vocab(),
        train=replace(base.train, epochs=2, batch_cells=32, lr=1e-3, warmup_steps=100),
        perturb=Perturb(max_cells=100),  # without the demo's start and goal
    )


def neighbours() -> Config:
    """Cell vectors without layers: vectors of genes from the corpus, trained on neighbouring cells. Needs sources.

    20,000 cells take some minutes of one core. Orthologs share one token id. Without layers no gene has a context, so the
    encoder is for vectors of cells and labels, not for `perturb` or fine-tuning.
    """
    base = laptop()
    return replace(
        base,
        recipe="neighbours",
        output="runs/neighbours",
        vocab=Vocab(sharing="ortholog"),
        model=Model(num_layers=0, dim=128, num_heads=4, ffn_dim=256, max_positions=2048, start="svd"),
        objective=Objective(mlm_weight=0.0, view="neighbour", pooling="ranked", temperature=0.1),
        train=replace(
            base.train,
            epochs=50,
            batch_cells=256,
            warmup_steps=20,
            micro_tokens=2_000_000,
            checkpoint_steps=500,
            log_steps=20,
        ),
        embed=Embed(pooling="ranked"),
        classify=Classify(
            models=(
                *(
                    "encoder_pca",
                    "encoder_pca@untrained",
                    "probe",
                    "probe@untrained",
                    "knn",
                    "knn@untrained",
                    "centroid",
                ),
                *("majority", "hvg_logreg", "pca_knn", "pseudobulk", "genes_vote", "genes_logreg", "genes_centroid"),
                *("genes_ranks", "joint_pca", "pca_logreg"),
            ),
        ),
    )


def cl_ablation() -> Config:
    """A sweep over the contrastive loss: on or off, view, pooling, temperature, weight, and related settings.

    The base is the paper's objective on a small model; two CPU cores need less than two hours. For the paper's own model, change
    model, batch size and workers with --config. `objective.gather_negatives` matters only with several workers.
    """
    base = laptop()
    return replace(
        base,
        recipe="cl_ablation",
        output="runs/cl_ablation",
        model=Model(num_layers=2, dim=96, num_heads=4, ffn_dim=192, max_positions=128),
        train=replace(
            base.train, max_steps=200, warmup_steps=20, lr=2e-3, checkpoint_steps=200, micro_tokens=8192, log_steps=20
        ),
        classify=Classify(epochs=1, min_steps=60, batch_cells=16, lr=1e-3, warmup_steps=10, keep=False),
        tune=Tune(
            keep=0.34,
            space=(
                {
                    "objective.view": ("dropout", "mask", "subsample", "ortholog"),
                    "objective.pooling": ("mean", "first"),
                },
                {"objective.contrast_weight": (0.0, 0.1)},
                {"objective.temperature": (0.02, 0.2)},
                {"objective.simcsepp_weight": (0.1,)},
                {"objective.ortholog_weight": (0.1,)},
                {"vocab.sharing": ("ortholog",)},
                {"tokens.scaling": ("multiply",)},
                {"tokens.cls": (True,)},
                {"train.species_mix": ({"human": 0.5, "mouse": 0.5},)},
                {"train.batch_cells": (128,)},
            ),
        ),
        compute=Compute(num_workers=1),
    )


def data_ladder() -> Config:
    """A sweep over the amount of data: shares of the corpus with the same number of steps, and numbers of steps on all of it."""
    base = cl_ablation()
    return replace(
        base,
        recipe="data_ladder",
        output="runs/data_ladder",
        train=replace(base.train, heldout_share=0.02),
        tune=replace(
            base.tune,
            space=({"train.cells_share": (0.01, 0.03, 0.1, 0.3)}, {"train.max_steps": (25, 50, 100, 400)}),
            rungs=(1.0,),
            stop="none",
        ),
    )


def table() -> Config:
    """The paper's Tables 1 to 3, with further splits and baselines, on the labelled cells of a corpus (`mixgf classify`).

    All splits, five seeds, all heads and all installed baselines, on at most 2,000 cells of a data set. Fine-tuned models,
    scDeepSort and scVI have one seed, because they take most of the time. Encoders that are added later with
    classify.encoders reuse the finished scores.
    """
    return Config(
        recipe="table",
        output="runs/table",
        classify=Classify(
            max_cells=2000,
            splits=SPLITS,
            seeds=5,
            seeds_per_model={
                "finetune": 1,
                "finetune_linear_start": 1,
                "finetune_linear_start@untrained": 1,
                "scdeepsort": 1,
                "scvi": 1,
            },
            models=(
                *("finetune", "finetune_linear_start", "finetune_linear_start@untrained", "encoder_pca"),
                *("encoder_pca@untrained", "knn", "probe", "centroid", "knn@untrained", "probe@untrained"),
                *("majority", "hvg_logreg", "pca_knn", "pseudobulk", "genes_vote", "genes_logreg", "genes_centroid"),
                *("genes_ranks", "joint_pca", "joint_pca_centroid", "pca_logreg", "rank_pca"),
                *("celltypist", "celltypist_vote", "scdeepsort", "scvi"),
            ),
            label_shares=(0.01, 0.05, 0.1),
            unseen_types=3,
            curve_models=(
                *("encoder_pca", "encoder_pca@untrained", "probe", "knn", "centroid", "probe@untrained", "hvg_logreg"),
                *("pca_knn", "genes_vote", "genes_logreg", "genes_centroid", "joint_pca_centroid", "pca_logreg"),
            ),
            integration_cells=4000,
        ),
    )


RECIPES: dict[str, Callable[[], Config]] = {
    f.__name__: f
    for f in (
        default,
        demo,
        laptop,
        neighbours,
        cl_ablation,
        data_ladder,
        gpu_smoke,
        paper,
        paper_mlm_only,
        paper_published_script,
        human_only,
        mouse_only,
        table,
        paper_dkd,
        paper_adpkd,
        paper_alzheimer,
    )
}


def get(name: str) -> Config:
    """The config of a recipe by name."""
    if name not in RECIPES:
        msg = f"--recipe {name}: no such recipe; {did_you_mean(name, RECIPES)}"
        raise UserError(msg)
    return RECIPES[name]()

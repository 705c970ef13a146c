"""Baselines of other projects, where they are installed (`pip install 'mixgf[baselines]'`): scVI.

Table 2 of the paper names scDeepSort and scVAE. scVI (Lopez et al. 2018) is a variational autoencoder of counts of the same
kind as scVAE and takes its place. Nothing here takes the place of scDeepSort's graph network: its package is not kept up with
current Python and torch; the logistic regression on variable genes is the stronger of the simple rivals. CellTypist 1.7.1 is a
logistic regression too; it does not train with scikit-learn 1.8 or later, which lacks an option that it passes, so it is not here.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from importlib.util import find_spec

import numpy as np
from scipy import sparse

from mixgf.arrays import Floats
from mixgf.classification import baselines
from mixgf.classification.baselines import Problem

PACKAGES = {"scvi": "scvi"}
"""Model to the module that it needs."""
SCVI_EPOCHS, SCVI_LATENT = 100, 30


def missing(model: str) -> str:
    """Why a model cannot run here; empty when it can."""
    package = PACKAGES.get(model)
    if package is None or find_spec(package) is not None:
        return ""
    return f"{model} is not installed (pip install 'mixgf[baselines]')"


def scvi(problem: Problem) -> Floats:
    """Logistic regression on the latent space of scVI, which is trained on the variable genes' counts (C = classes: (M, C)).

    It sees training cells only; between species also the test cells' counts, with the species as its batch, never a label.
    """
    logged = baselines.log_normalise(problem.train)
    genes = baselines.variable_genes(logged, problem.num_hvgs)
    train, test = (sparse.csr_matrix(counts[:, genes], dtype=np.float32) for counts in (problem.train, problem.test))
    latent = _scvi_latent(train, test, problem)
    scaled = baselines.standardise(*latent, *baselines.one_group(*latent))
    return baselines.logistic(scaled[0], problem.labels, scaled[1], problem.num_classes)


def _scvi_latent(train: sparse.csr_matrix, test: sparse.csr_matrix, problem: Problem) -> tuple[Floats, Floats]:
    import anndata as ad  # noqa: PLC0415 (slow to import)
    import scvi as package  # noqa: PLC0415 (optional)

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    package.settings.seed = problem.seed
    both = ad.AnnData(sparse.vstack([train, test], format="csr"))
    both.obs["species"] = np.concatenate([problem.train_species, problem.test_species])
    # cells without a count in these genes have no library size: one count in the first gene stands for none
    empty = np.flatnonzero(np.asarray(both.X.sum(1)).ravel() == 0)
    if len(empty):
        both.X = both.X + sparse.csr_matrix(
            (np.ones(len(empty), np.float32), (empty, np.zeros(len(empty), int))), shape=both.shape
        )
    seen = both if problem.across else both[: train.shape[0]].copy()
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        package.model.SCVI.setup_anndata(seen, batch_key="species" if problem.across else None)
        model = package.model.SCVI(seen, n_latent=SCVI_LATENT)
        model.train(
            max_epochs=SCVI_EPOCHS, accelerator="cpu", enable_progress_bar=False, logger=False, enable_checkpointing=False,
            batch_size=128, datasplitter_kwargs={"drop_last": seen.n_obs % 128 == 1},
        )  # fmt: skip
        z_ND = model.get_latent_representation(both)
    return z_ND[: train.shape[0]], z_ND[train.shape[0] :]


RIVALS: dict[str, baselines.Baseline] = {"scvi": scvi}
baselines.BASELINES.update(RIVALS)

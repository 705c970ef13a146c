"""scVI, a baseline of another project; it runs where it is installed (`pip install 'mixgf[baselines]'`).

Table 2 of the paper names scDeepSort and scVAE. scVI (Lopez et al. 2018) is a variational autoencoder of counts, of the same kind
as scVAE, and takes its place. `scdeepsort` and `celltypist` are models of their own.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator

import numpy as np
from scipy import sparse

from mixgf.arrays import Floats
from mixgf.classification import features, simple_classifiers
from mixgf.classification.models.protocol import CellSet, CountMatrix, CountsModel, Fitted, Problem

EPOCHS, LATENT = 100, 30


class Scvi(CountsModel):
    """Logistic regression on the latent space of scVI, which is trained on the counts of the variable genes.

    It is trained on training cells only. Between species it also reads the counts of the cells to predict, with the species as
    batch, and never a label.
    """

    head, label, seconds, package, can_keep = "scvi", "scVI", 60.0, "scvi", False

    def fit(self, problem: Problem[CountMatrix]) -> Fitted[CountMatrix]:
        logged = features.log_normalise(problem.train.x)
        genes = features.variable_genes(logged, problem.config.classify.num_hvgs)
        latent = _train(problem, lambda cells: sparse.csr_matrix(cells.x[:, genes], dtype=np.float32))
        train_ND = latent(problem.train)
        scale = features.Scale.fit(train_ND)
        head = simple_classifiers.logistic_regression(scale(train_ND), problem.labels, problem.num_classes)
        return Fitted(predict=lambda cells: head(scale(latent(cells))))


def _train(
    problem: Problem[CountMatrix], chosen: Callable[[CellSet[CountMatrix]], CountMatrix]
) -> Callable[[CellSet[CountMatrix]], Floats]:
    """Train scVI on chosen genes; returns the function from cells to latent vectors (M, D)."""
    import anndata as ad  # noqa: PLC0415 (slow to import)
    import scvi as package  # noqa: PLC0415 (optional)

    def annotated(*sets: CellSet[CountMatrix]) -> ad.AnnData:
        cells = ad.AnnData(sparse.vstack([chosen(one) for one in sets], format="csr"))
        cells.obs["species"] = np.concatenate([one.species for one in sets])
        # cells without a count in these genes have no library size: one count in the first gene stands for none
        empty = np.flatnonzero(np.asarray(cells.X.sum(1)).ravel() == 0)
        if len(empty):
            ones = (np.ones(len(empty), np.float32), (empty, np.zeros(len(empty), int)))
            cells.X = cells.X + sparse.csr_matrix(ones, shape=cells.shape)
        return cells

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    package.settings.seed = problem.seed()
    seen = annotated(problem.train, problem.target) if problem.across else annotated(problem.train)
    with _silent():
        package.model.SCVI.setup_anndata(seen, batch_key="species" if problem.across else None)
        model = package.model.SCVI(seen, n_latent=LATENT)
        model.train(
            max_epochs=EPOCHS, accelerator="cpu", enable_progress_bar=False, logger=False, enable_checkpointing=False,
            batch_size=128, datasplitter_kwargs={"drop_last": seen.n_obs % 128 == 1},
        )  # fmt: skip

    def latent(cells: CellSet[CountMatrix]) -> Floats:
        with _silent():
            return model.get_latent_representation(annotated(cells))

    return latent


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Keep progress and warnings of scVI off the terminal."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        warnings.simplefilter("ignore")
        yield

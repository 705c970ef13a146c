"""Doublets of one sample by Scrublet (Wolock et al. 2019), as scanpy implements it."""

from __future__ import annotations

import numpy as np

from mixgf.errors import require_package

MIN_SCRUBLET = (50, 10)
"""Fewest cells and fewest highly variable genes of a sample; in smaller samples no doublets are called."""


def require_scrublet() -> None:
    """Check that scanpy and scikit-image are installed.

    Raises:
        UserError: one of them is not installed.
    """
    for module in ("scanpy", "skimage"):
        require_package(module, "qc.doublets=true", "mixgf[doublets]")


def scrublet(
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, num_columns: int, *, rate: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Doublet score (float64[N]) and call (bool[N]) of one sample's cells, by scanpy's Scrublet.

    No doublets are called in three cases: the sample has fewer usable cells or variable genes than `MIN_SCRUBLET` (scores
    are then 0); Scrublet finds no threshold; or its estimate of the doublet rate is half or more. The estimate is the
    share of cells above the threshold over the share of simulated doublets above it. Where cells are few or much alike,
    the threshold falls into noise and would remove many good cells.

    Args:
        data: counts of the CSR matrix, cells x columns.
        indices: columns.
        indptr: row pointers.
        num_columns: columns of the matrix.
        rate: expected doublet rate, 0 to 1.
        seed: of the simulated doublets.
    """
    import anndata  # noqa: PLC0415 (heavy, and only where doublets are asked for)
    import scanpy
    from scipy import sparse  # noqa: PLC0415

    n = len(indptr) - 1
    nothing = np.zeros(n), np.zeros(n, dtype=bool)
    if n < MIN_SCRUBLET[0]:
        return nothing
    counts = sparse.csr_matrix((data.astype(np.float32), indices, indptr), shape=(n, num_columns))
    cells = anndata.AnnData(counts)
    scanpy.pp.filter_genes(cells, min_cells=3)
    probe = cells.copy()  # repeats Scrublet's choice of cells and genes: it fails with fewer genes than components
    scanpy.pp.filter_cells(probe, min_genes=3)
    if probe.n_obs < MIN_SCRUBLET[0]:
        return nothing
    scanpy.pp.normalize_total(probe)
    scanpy.pp.log1p(probe)
    scanpy.pp.highly_variable_genes(probe)
    num_variable = int(probe.var["highly_variable"].sum())
    if num_variable < MIN_SCRUBLET[1]:
        return nothing
    # exact neighbours at any size: from 2,731 cells on scanpy uses pynndescent, whose result Scrublet cannot use
    scanpy.pp.scrublet(
        cells, expected_doublet_rate=rate, random_state=seed, verbose=False, use_approx_neighbors=False,
        n_prin_comps=min(30, num_variable - 1, probe.n_obs - 1),
    )  # fmt: skip
    score = np.nan_to_num(cells.obs["doublet_score"].to_numpy(dtype=np.float64))  # filtered cells have no score
    result = cells.uns["scrublet"]
    if result.get("threshold") is None:
        return score, nothing[1]
    called = score > result["threshold"]
    detectable = float((result["doublet_scores_sim"] > result["threshold"]).mean())
    return score, called if called.mean() < 0.5 * detectable else nothing[1]

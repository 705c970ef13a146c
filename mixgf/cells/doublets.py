"""Moved here from mixgf/qc.py."""

from __future__ import annotations

import numpy as np

MIN_SCRUBLET = (50, 10)
"""Fewest cells and fewest variable genes of a sample in which doublets are looked for."""


def scrublet(
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, num_columns: int, *, rate: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Doublet score (float64[N]) and verdict (bool[N]) of one sample's cells by scanpy's Scrublet.

    No doublets are called in samples with fewer than `MIN_SCRUBLET` usable cells or variable genes (their scores are 0),
    where Scrublet finds no threshold, and where its threshold says that half of all cells or more are doublets. That
    estimate is Scrublet's own: the share of cells above the threshold over the share of simulated doublets above it.
    Where cells are alike, or few, the threshold falls into noise and would take good cells by the dozen.
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
    probe = (
        cells.copy()
    )  # Scrublet's choice of cells and genes, made beforehand: it fails on fewer genes than components
    scanpy.pp.filter_cells(probe, min_genes=3)
    if probe.n_obs < MIN_SCRUBLET[0]:
        return nothing
    scanpy.pp.normalize_total(probe)
    scanpy.pp.log1p(probe)
    scanpy.pp.highly_variable_genes(probe)
    num_variable = int(probe.var["highly_variable"].sum())
    if num_variable < MIN_SCRUBLET[1]:
        return nothing
    # exact neighbours at any size: from 2,731 cells on scanpy would ask pynndescent, whose answer it cannot read
    scanpy.pp.scrublet(
        cells, expected_doublet_rate=rate, random_state=seed, verbose=False, use_approx_neighbors=False,
        n_prin_comps=min(30, num_variable - 1, probe.n_obs - 1),
    )  # fmt: skip
    score = np.nan_to_num(cells.obs["doublet_score"].to_numpy(dtype=np.float64))  # cells left out have no score
    found = cells.uns["scrublet"]
    if found.get("threshold") is None:
        return score, nothing[1]
    verdict = score > found["threshold"]
    detectable = float((found["doublet_scores_sim"] > found["threshold"]).mean())
    return score, verdict if verdict.mean() < 0.5 * detectable else nothing[1]

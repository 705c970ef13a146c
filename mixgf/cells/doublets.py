"""Doublets of one sample by Scrublet (Wolock et al. 2019), as scanpy implements it.

Scrublet holds the variable genes of all real and simulated cells as a dense matrix, so its memory grows with the cells of a
call: about 2 GB for 5,000 (`jobs/bench.py doublets`). `plan_calls` bounds the calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mixgf.errors import UserError, require_package
from mixgf.jit import start_threads

if TYPE_CHECKING:
    from scipy import sparse

MIN_SCRUBLET = (50, 10)
"""Fewest cells and fewest highly variable genes of a sample; in smaller samples no doublets are called."""
CALL_CELLS = 5_000
"""Most cells of one call of Scrublet."""
READ_CELLS = 10_000
"""Most cells whose counts are held at a time."""


def plan_calls(samples: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
    """Calls of Scrublet on the samples of one source, in groups that are read together.

    A call is one sample, with two bounds. A sample of more than `READ_CELLS` cells is cut into stretches of consecutive
    cells, about equal. A stretch of more than `CALL_CELLS` cells is dealt out to several calls, cell by cell, so that each
    call sees the same mixture. Samples with fewer cells than `MIN_SCRUBLET` are left out.

    Args:
        samples: rows of each sample's cells, ascending.

    Returns:
        Groups of calls, in order of their first row; a call is an array of rows.
    """
    stretches = [
        stretch
        for rows in samples
        if len(rows) >= MIN_SCRUBLET[0]
        for stretch in np.array_split(rows, -(-len(rows) // READ_CELLS))
    ]
    groups: list[list[np.ndarray]] = []
    room = 0
    for stretch in sorted(stretches, key=lambda rows: int(rows[0])):
        num = -(-len(stretch) // CALL_CELLS)
        calls = [stretch[k::num] for k in range(num)]
        if len(stretch) <= room:
            groups[-1] += calls
            room -= len(stretch)
        else:
            groups.append(calls)
            room = READ_CELLS - len(stretch)
    return groups


def scrublet_is_installed() -> bool:
    """Whether scanpy and scikit-image are installed."""
    try:
        require_scrublet()
    except UserError:
        return False
    return True


def require_scrublet() -> None:
    """Check that scanpy and scikit-image are installed.

    Raises:
        UserError: one of them is not installed.
    """
    for module in ("scanpy", "skimage"):
        require_package(module, "qc.doublets=drop", "mixgf[doublets]")


def scrublet(
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, num_columns: int, *, rate: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Doublet score (float64[N]) and call (bool[N]) of one sample's cells, by scanpy's Scrublet.

    No doublets are called in three cases: the sample has fewer usable cells or variable genes than `MIN_SCRUBLET` (scores
    are then 0); Scrublet finds no threshold; or its estimate of the doublet rate is half or more. The estimate is the
    share of cells above the threshold over the share of simulated doublets above it. Where cells are few or much alike,
    the threshold falls into noise and would remove many good cells. One thread is used, so that the result does not depend
    on their number.

    Args:
        data: counts of the CSR matrix, cells x columns.
        indices: columns.
        indptr: row pointers.
        num_columns: columns of the matrix.
        rate: expected doublet rate, 0 to 1.
        seed: of the simulated doublets.
    """
    import numba  # noqa: PLC0415 (heavy, and only where doublets are looked for)
    from scipy import sparse  # noqa: PLC0415
    from threadpoolctl import threadpool_limits  # noqa: PLC0415

    n = len(indptr) - 1
    counts = sparse.csr_matrix((data.astype(np.float32), indices, indptr), shape=(n, num_columns))
    start_threads()
    threads = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        with threadpool_limits(1):
            return _scrublet(counts, rate=rate, seed=seed)
    finally:
        numba.set_num_threads(threads)


def _scrublet(counts: sparse.csr_matrix, *, rate: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    import anndata  # noqa: PLC0415
    import scanpy

    n = counts.shape[0]
    nothing = np.zeros(n), np.zeros(n, dtype=bool)
    if n < MIN_SCRUBLET[0]:
        return nothing
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
        n_prin_comps=min(30, num_variable - 1),
    )  # fmt: skip
    score = np.nan_to_num(cells.obs["doublet_score"].to_numpy(dtype=np.float64))  # filtered cells have no score
    result = cells.uns["scrublet"]
    if result.get("threshold") is None:
        return score, nothing[1]
    called = score > result["threshold"]
    detectable = float((result["doublet_scores_sim"] > result["threshold"]).mean())
    return score, called if called.mean() < 0.5 * detectable else nothing[1]

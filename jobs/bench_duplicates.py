"""Cells that are found again after a gene filter, and false matches: `bench.py duplicates`.

Every file is read as `mixgf audit` reads it, whole and after `filter_genes(min_cells)`. Found: share of the cells of the filtered file
that are found in the whole file. Baseline: the same by a hash of all counts. False: cells of the second half of the filtered
file that are found in the first half of the whole one, as a share; and cells of all files that are found in another file.

Then the cost: signatures of bundled cells, and the search for pairs in one band of invented signatures.

Inputs: cells in MIXGF_SHARED/data/h5ad/.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import anndata
import numpy as np
from bench_doublets import folder
from measure import Figure, peak_memory, seconds
from scipy import sparse

from mixgf.cells import near_duplicates as near
from mixgf.config.data import HUMAN, MOUSE, Source
from mixgf.corpus import overlap
from mixgf.storage import files

MIN_CELLS = (3, 10)


def read(path: Path, species: str) -> overlap.AuditedCells:
    """Cells of a file, as `mixgf audit` reads them."""
    return overlap.file_cells(Source(uri=str(path), species=species), {"human": HUMAN, "mouse": MOUSE}[species])


def signatures(cells: overlap.AuditedCells) -> np.ndarray:
    """Signatures of the cells of a file (N, bands)."""
    assert cells.near is not None
    return np.concatenate(list(cells.near()))


def rates(path: Path, whole_NK: np.ndarray, whole: overlap.AuditedCells) -> Iterator[tuple[str, float, float | None]]:
    """Name, share found and share found by a hash of all counts, for each filter."""
    data = anndata.read_h5ad(path)
    detected = np.asarray((data.X > 0).sum(0)).ravel()
    half = len(whole_NK) // 2
    for number in MIN_CELLS:
        with tempfile.TemporaryDirectory() as there:
            data[:, detected >= number].write_h5ad(f"{there}/filtered.h5ad")
            filtered = read(Path(f"{there}/filtered.h5ad"), path.stem.split("_")[1])
        found_NK = signatures(filtered)
        assert whole.hashes is not None
        assert filtered.hashes is not None
        exact_N = np.isin(filtered.hashes, whole.hashes)
        found_N = near.find(found_NK, [whole_NK]) | exact_N
        yield f"found after filter_genes(min_cells={number})", float(found_N.mean()), float(exact_N.mean())
        others = near.find(found_NK[half:], [whole_NK[:half]])
        yield f"false after filter_genes(min_cells={number})", float(others.mean()), None


def _cost(*, quick: bool) -> Iterator[Figure]:
    cells = sparse.csr_matrix(anndata.read_h5ad(files.local_path("resource:pancreas_human_baron.h5ad")).X)
    key_G = np.random.default_rng(0).integers(1, 1 << 63, cells.shape[1]).astype(np.uint64)
    arguments = (cells.data.astype(np.int32), cells.indices, cells.indptr.astype(np.int64), key_G)
    near.signatures(*arguments)
    cpu = seconds(lambda: near.signatures(*arguments), cpu=True)
    yield Figure(figure="signature of a cell of human pancreas", value=1e6 * cpu / cells.shape[0], unit="CPU µs")
    num = 1_000_000 if quick else 50_000_000
    value_N = np.random.default_rng(1).integers(1, 1 << 32, num, dtype=np.uint32)
    before = peak_memory()
    cpu = seconds(lambda: near.pair_equal(value_N), cpu=True)
    yield Figure(figure=f"pairs of {num:,} cells in one of {near.BANDS} bands", value=cpu, unit="CPU s")
    yield Figure(figure="memory of that search, beside its 4 bytes per cell", value=peak_memory() - before, unit="GB")


def figures(*, quick: bool = False) -> Iterator[Figure]:
    """All figures."""
    paths = sorted(folder().glob("*.h5ad"))[: 2 if quick else None]
    whole = {path: read(path, path.stem.split("_")[1]) for path in paths}
    found = {path: signatures(cells) for path, cells in whole.items()}
    for path, cells in whole.items():
        name = f"{path.stem} ({len(found[path]):,} cells)"
        for what, value, exact in rates(path, found[path], cells):
            bar = ">= .95" if exact is not None else "<= .001"
            yield Figure(figure=f"{name}: {what}", value=value, unit="share", baseline=exact, bar=bar)
    everything = sum(len(one) for one in found.values())
    wrong = sum(
        int(near.find(mine, [other for there, other in found.items() if there != path]).sum())
        for path, mine in found.items()
    )
    yield Figure(
        figure=f"false between files, of {everything:,} cells", value=wrong / everything, unit="share", bar="<= .001"
    )
    yield from _cost(quick=quick)

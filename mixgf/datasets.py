"""Bundled real cells for examples and tests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mixgf.errors import UserError
from mixgf.storage import files

if TYPE_CHECKING:
    from anndata import AnnData

SPECIES = ("human", "mouse")


def pancreas(species: str = "human", *, backed: str | None = None) -> AnnData:
    """Raw counts of pancreas cells of Baron et al. (2016), with cell types and donors in obs.

    Args:
        species: `human` or `mouse`.
        backed: `r` leaves the counts in the file, as of `anndata.read_h5ad`; None = in memory.

    Raises:
        UserError: another species.

    Examples:
        >>> import mixgf as mg
        >>> adata = mg.datasets.pancreas()
        >>> adata.obs["cell_type"].value_counts().index[0]
        'beta cell'
    """
    import anndata  # noqa: PLC0415 (slow to import)

    return anndata.read_h5ad(pancreas_path(species), backed=backed)


def pancreas_path(species: str = "human") -> str:
    """Path of the same cells as an .h5ad file.

    Examples:
        >>> import mixgf as mg
        >>> mg.datasets.pancreas_path("mouse").rpartition("/")[2]
        'pancreas_mouse_baron.h5ad'
    """
    if species not in SPECIES:
        msg = f"species = {species!r}: must be {' or '.join(SPECIES)}"
        raise UserError(msg)
    return str(files.local_path(f"resource:pancreas_{species}_baron.h5ad"))

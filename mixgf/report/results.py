"""The results of a run as the report reads them: records and tables of the stages that are finished."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from mixgf.config.run import Config
from mixgf.storage.artifacts import Record

COMPARISON_PREFIX = "compare_"
"""Before the names of the tables of `mixgf compare` in `RunResults.tables`."""


@dataclass(frozen=True, kw_only=True)
class RunResults:
    """Records and tables of a run. A stage that is not done has no record and no table."""

    config: Config
    uris: dict[str, str]
    """Stage to the URI of its artifact."""
    records: dict[str, Record] = field(default_factory=dict)
    """Stage to the record of its finished artifact."""
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)
    """Name to table. `cells` counts cells (source, species, type, donor, cells). The others have the layout of the artifact's file;
    `load.TABLES` lists them. Names of comparison tables start with `compare_`."""
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    """Species to the number of cells by sentence length, (max length + 1,)."""
    vectors_ND: np.ndarray | None = None
    """Embeddings of a sample of the cells that depends on the seed only."""
    obs: pd.DataFrame | None = None
    """Columns species and type of the same cells."""
    num_embedded: int = 0
    """Cells in the embedding artifact."""

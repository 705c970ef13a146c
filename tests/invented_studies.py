"""Two invented studies of the same types on platforms that measure genes unequally."""

import numpy as np
from scipy import sparse

from mixgf.classification.models.protocol import CellSet, Problem
from mixgf.config.classification import Classify
from mixgf.config.run import Config

GENES, TYPES = 300, 3
_RNG = np.random.default_rng(0)
PROFILES = _RNG.gamma(0.4, 1.0, (TYPES, GENES)) + 0.05
PLATFORM = np.exp(_RNG.normal(0, 1.2, GENES))
"""What the second study multiplies each gene's expression by."""


def cells(
    sizes: tuple[int, ...], factor: np.ndarray | float = 1.0, seed: int = 1
) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Invented counts and labels: `sizes` cells of each type, each gene multiplied by `factor`."""
    labels = np.repeat(np.arange(TYPES), sizes)
    rates = PROFILES[labels] * factor
    rates *= 3_000 / rates.sum(1, keepdims=True)
    return sparse.csr_matrix(np.random.default_rng(seed).poisson(rates).astype(np.float32)), labels


def problem(target: sparse.csr_matrix, *, align: bool = True, study: str = "new") -> Problem[sparse.csr_matrix]:
    """80 training cells of each type in the study `old`, and cells of another study to predict."""
    train, labels = cells((80, 80, 80))

    def cellset(x: sparse.csr_matrix, name: str) -> CellSet[sparse.csr_matrix]:
        return CellSet(x, np.full(x.shape[0], "human"), np.full(x.shape[0], name))

    return Problem(
        config=Config(classify=Classify(num_hvgs=GENES, align=align)), train=cellset(train, "old"), labels=labels, num_classes=TYPES,
        is_validation=np.zeros(len(labels), dtype=bool), target=cellset(target, study),
    )  # fmt: skip

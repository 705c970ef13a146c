"""The paper's classification results as data: Tables 1 to 3 (section 4.4), accuracy in per cent.

One seed, a random split of the cells, no intervals. The paper gives two values in two cases: large intestine by
Mouse-Geneformer is 94.3 in Table 1 and 93.1 in Table 2; kidney is 95.6 in the tables and 95.8 in the abstract.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Row:
    """One tissue: single-species model, Mix-Geneformer with and without the contrastive loss."""

    tissue: str
    num_types: int
    fine_tuned: tuple[float, float, float]
    zero_shot: tuple[float, float, float]


COLUMNS = ("{}-Geneformer", "Mix-Geneformer", "Mix-Geneformer without contrast")
"""Columns of `fine_tuned` and of `zero_shot`; the name of the species goes into the first."""

TABLES: dict[str, tuple[str, tuple[Row, ...]]] = {
    "mouse": ("Table 1", (
        Row("brain", 15, (96.9, 97.3, 96.7), (86.8, 85.4, 88.5)),
        Row("heart", 11, (97.8, 97.7, 97.2), (89.1, 88.1, 88.8)),
        Row("kidney", 18, (94.9, 95.6, 94.4), (87.3, 85.6, 88.2)),
        Row("large intestine", 7, (94.3, 94.7, 93.1), (66.3, 64.6, 67.2)),
        Row("limb muscle", 9, (99.5, 99.6, 99.4), (96.3, 94.7, 97.2)),
        Row("mammary gland", 7, (99.0, 99.1, 99.1), (97.1, 96.2, 97.3)),
        Row("spleen", 10, (98.7, 98.7, 98.3), (94.2, 91.2, 95.8)),
        Row("thymus", 6, (97.0, 97.5, 97.2), (84.4, 76.9, 89.3)),
        Row("tongue", 3, (94.9, 94.8, 93.6), (83.2, 81.6, 84.4)),
    )),
    "human": ("Table 3", (
        Row("spleen", 6, (98.9, 98.3, 97.9), (78.5, 78.8, 78.5)),
        Row("brain", 6, (96.8, 95.9, 96.0), (87.2, 87.0, 87.2)),
        Row("immune", 10, (94.4, 93.6, 91.1), (42.3, 38.4, 39.6)),
        Row("kidney", 15, (92.8, 92.2, 89.7), (45.5, 38.4, 37.3)),
        Row("large intestine", 16, (92.7, 91.5, 89.7), (43.7, 40.1, 40.5)),
        Row("liver", 12, (91.1, 88.0, 87.9), (47.7, 44.3, 45.2)),
        Row("lung", 16, (93.4, 92.6, 91.5), (50.1, 39.7, 40.4)),
        Row("pancreas", 15, (93.0, 92.2, 90.0), (52.3, 42.5, 52.3)),
        Row("placenta", 3, (97.9, 97.4, 96.1), (75.2, 80.7, 75.2)),
    )),
}  # fmt: skip
"""Species to the table's name and rows."""

CONVENTIONAL: dict[str, tuple[float, float, float, float]] = {
    "brain": (96.9, 97.3, 58.5, 76.2), "heart": (97.8, 97.7, 79.6, 79.4), "kidney": (94.9, 95.6, 57.6, 56.2),
    "large intestine": (93.1, 94.7, 58.5, 59.0), "limb muscle": (99.5, 99.6, 90.8, 79.6), "mammary gland": (99.0, 99.1, 48.0, 79.5),
    "spleen": (98.7, 98.7, 81.0, 76.5), "thymus": (97.0, 97.5, 55.0, 75.0), "tongue": (94.9, 94.8, 76.8, 80.4),
}  # fmt: skip
"""Table 2, mouse tissues: Mouse-Geneformer, Mix-Geneformer, scDeepSort, scVAE."""


def tissue(name: str) -> str:
    """Name of a tissue as in the tables of this module."""
    return name.strip().lower().replace("_", " ")

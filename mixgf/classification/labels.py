"""The labelled cells of a corpus: labels, donors, data sets and groups, one row per cell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from mixgf.arrays import Cells, Names
from mixgf.config.classification import Classify
from mixgf.console import warn
from mixgf.corpus import obs_query
from mixgf.corpus.reader import Corpus
from mixgf.errors import UserError


def labelled(corpus: Corpus, settings: Classify) -> Labelled:
    """The labelled cells of a corpus.

    Raises:
        UserError: The label or group column is not there, or no cell has a label.
    """
    there = corpus.columns
    needed = (("label", settings.label), ("group", settings.group), ("label_id", settings.label_id or settings.label))
    for name, wanted_column in needed:
        if wanted_column not in there:
            msg = (
                f"classify.{name} = {wanted_column!r}: the corpus has no such column; it has {', '.join(sorted(there))}"
            )
            raise UserError(msg)
    optional = (settings.donor, settings.dataset, settings.transfer)
    wanted = dict.fromkeys(
        ["cell", "species", "source", settings.label, settings.group, *(c for c in optional if c in there)]
    )
    obs = corpus.obs(list(wanted))

    def column(name: str) -> Names:
        return names_of(obs[name].tolist(), unknown=settings.unlabelled) if name in obs else np.full(len(obs), UNKNOWN)

    labels = merged(column(settings.label), settings.merge)
    chosen = np.ones(len(labels), dtype=bool)
    if settings.cells:
        chosen[:] = False
        chosen[obs_query.select_cells(corpus.obs(), settings.cells, "classify.cells")] = True
    rows = np.flatnonzero((labels != UNKNOWN) & chosen)
    doubted = [name for name in np.unique(labels[rows]).tolist() if name.strip().casefold() in _NO_TYPES]
    if doubted:
        shown = ", ".join(f"{name!r} ({int((labels[rows] == name).sum()):,} cells)" for name in doubted)
        warn(
            f"classify.label = {settings.label!r}: {shown} are taken for types; if they mean 'no label', add them to classify.unlabelled"
        )
    if not len(rows):
        msg = f"classify.label = {settings.label!r}: none of {chosen.sum():,} cells has a label; name another column of obs"
        raise UserError(msg)
    return Labelled(
        cells=rows, names=obs["cell"].to_numpy().astype(np.str_)[rows], labels=labels[rows],
        species=obs["species"].to_numpy().astype(np.str_)[rows], groups=column(settings.group)[rows],
        donors=column(settings.donor)[rows], datasets=column(settings.dataset)[rows], transfer=column(settings.transfer)[rows],
        sources=obs["source"].to_numpy().astype(np.str_)[rows],
    )  # fmt: skip


def ids_of_labels(corpus: Corpus, settings: Classify, cells: Cells, labels_N: Names) -> dict[str, str]:
    """The most frequent id of the cells of each label (`classify.label_id`); labels without any are left out.

    Args:
        corpus: The corpus.
        settings: Of the classification.
        cells: Numbers of cells in the corpus (N,).
        labels_N: Their labels.
    """
    if not settings.label_id:
        return {}
    column = corpus.obs([settings.label_id])[settings.label_id]
    ids_N = names_of(column.tolist(), unknown=settings.unlabelled)[cells]
    found = {}
    for label in np.unique(labels_N).tolist():
        ids, counts = np.unique(ids_N[(labels_N == label) & (ids_N != UNKNOWN)], return_counts=True)
        if len(ids):
            found[label] = str(ids[counts.argmax()])
    return found


def merged(labels_N: Names, merge: Mapping[str, Sequence[str]]) -> Names:
    """Labels under their new names.

    Args:
        labels_N: The labels of all cells.
        merge: New label to the labels that it replaces.

    Raises:
        UserError: An entry names a label that no cell has, or one that another entry has.
    """
    to: dict[str, str] = {}
    known = set(np.unique(labels_N).tolist()) - {UNKNOWN}
    for name, labels in merge.items():
        bad = [label for label in labels if label not in known or label in to]
        if bad or not name:
            msg = f"classify.merge: {name!r}: must replace labels of cells, each once, not {bad[:1]}; there are {', '.join(sorted(known))}"
            raise UserError(msg)
        to |= dict.fromkeys(labels, name)
    return np.array([to.get(label, label) for label in labels_N.tolist()], dtype=np.str_) if to else labels_N


_NO_TYPES = {
    "na", "n/a", "none", "null", "nan", "unknown", "unassigned", "unclassified", "unlabeled", "unlabelled", "unidentified", "undefined",
    "undetermined", "not assigned", "ambiguous", "doublet", "doublets", "low quality", "low_quality", "-", "?", "other",
}  # fmt: skip
"""Labels that often mean no cell type."""
UNKNOWN = ""
"""A label, donor, data set or organ that is not known."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Labelled:
    """The labelled cells of a corpus, one row each, in any order."""

    cells: Cells
    """Their global numbers in the corpus."""
    names: Names
    """Unique names. Random draws depend on them, not on the numbers."""
    labels: Names
    species: Names
    groups: Names
    """Independent tasks of the random and the held-out-donor split."""
    donors: Names
    datasets: Names
    transfer: Names
    """Groups within which species are compared."""
    sources: Names
    """Source (data set) of each cell."""

    def __post_init__(self) -> None:
        sizes = {len(column) for column in (self.cells, self.names, self.labels, self.species, self.groups,
                                            self.donors, self.datasets, self.transfer, self.sources)}  # fmt: skip
        assert len(sizes) == 1, "columns of one length"
        assert len(np.unique(self.names)) == len(self.names), "names are unique"

    def __len__(self) -> int:
        return len(self.cells)

    def only(self, rows: Cells) -> Labelled:
        """Some rows, in the given order."""
        return Labelled(**{one.name: getattr(self, one.name)[rows] for one in fields(self)})


def names_of(values: Sequence[object], *, unknown: Sequence[str]) -> Names:
    """A column as text; missing values and the values of `unknown`, in any letters (Unknown, UNKNOWN), become `UNKNOWN`."""
    gone = {value.casefold() for value in unknown}
    text = ["" if value is None or value != value else str(value) for value in values]  # noqa: PLR0124 (NaN is not itself)
    return np.asarray([UNKNOWN if value.strip().casefold() in gone else value for value in text], dtype=np.str_)

"""The cells of a sweep in three parts: arms are chosen on two of them, and the third is scored once at the end.

`tune.splits` first holds out test cells, each kind in its own way (table). The other cells are the development cells. Ordinary
splits of these (`classification.splits`) train heads and score them, and these scores stop and choose arms. At the end the
heads are trained on development cells and scored on the test cells, for the best arm and the base only.

| kind | test cells | needs |
|---|---|---|
| `dataset` | one whole data set of each species and transfer group | three data sets there |
| `donor` | whole donors of each group, `classify.test_fraction` of its cells | three donors there |
| `species` | of each species of a transfer group: the data sets and donors above, else whole data sets, else whole donors, else cells drawn at random | two species |
| `random` | cells drawn at random from each group | two cells of two types |

A cell that tests one kind is a development cell of no kind, so no label of a test cell takes part in a choice.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from mixgf.arrays import Bools, Cells, Names
from mixgf.classification import splits
from mixgf.classification.labels import UNKNOWN, Labelled
from mixgf.classification.splits import Split
from mixgf.config.classification import Classify

_KEY = "sweep test"
"""Part of the key of every random draw of test cells."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tasks:
    """Cells, and splits of them. Rows of the splits are rows of `table`."""

    table: Labelled
    splits: Sequence[Split]

    def of(self, kinds: Iterable[str]) -> list[Split]:
        """The splits of some kinds."""
        return [split for split in self.splits if split.kind in set(kinds)]

    @property
    def kinds(self) -> set[str]:
        """The kinds that could be made."""
        return {split.kind for split in self.splits}


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldOut:
    """The three parts of the cells that score a sweep."""

    select: Tasks
    """Train and select: splits of the development cells. `Split.test` has the cells that choose."""
    test: Tasks
    """Train on development cells, and score the test cells. `Split.test` has the test cells."""


def divide(table: Labelled, settings: Classify, kinds: Sequence[str], *, seed: int) -> HeldOut:
    """Divide labelled cells into development and test cells, and make the splits of both.

    A group that is too small for three parts has no test cells, and so no split of this kind in `test`.

    Args:
        table: The labelled cells.
        settings: `config.classify`.
        kinds: Kinds of splits, of `config.classification.SPLITS`.
        seed: `config.seed`; every draw depends on it.

    Raises:
        UserError: Not one split can be made of the development cells.
    """
    is_test: dict[str, Bools] = {}
    for kind, find in (("dataset", _datasets), ("donor", _donors), ("species", _species), ("random", _random)):
        if kind in kinds:
            before = np.logical_or.reduce([np.zeros(len(table), dtype=bool), *is_test.values()])
            is_test[kind] = np.zeros(len(table), dtype=bool)
            is_test[kind][_joined(find(table, settings, before, seed))] = True
    if "species" in is_test:  # whole data sets and donors that are held out already test the transfer, too
        whole = [is_test[kind] for kind in ("dataset", "donor", "species") if kind in is_test]
        is_test["species"] = np.logical_or.reduce(whole)
    everything = np.logical_or.reduce(list(is_test.values()))
    development = table.only(np.flatnonzero(~everything))
    settings = replace(settings, splits=tuple(kinds), seeds=1, label_shares=(), unseen_types=0)
    made = splits.make(development, settings, seed=seed)
    tested = [
        split for kind in kinds for split in _final(table, settings, ~everything, is_test[kind], kind=kind, seed=seed)
    ]
    return HeldOut(select=Tasks(table=development, splits=made), test=Tasks(table=table, splits=tested))


def _joined(parts: Iterable[Cells]) -> Cells:
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])


def _whole(units: Names, rows: Cells, fraction: float, most: int, *key: object) -> Cells:
    """Rows of whole units, drawn at random until they have `fraction` of the rows; at most `most` units."""
    names, sizes = np.unique(units[rows], return_counts=True)
    order = splits.random_order(names, _KEY, *key)
    count = int(np.searchsorted(np.cumsum(sizes[order]), fraction * len(rows))) + 1
    return rows[np.isin(units[rows], names[order[: max(0, min(count, most))]])]


def _known(column: Names, rows: Cells) -> tuple[Cells, int]:
    """The rows with a known value, and the number of different values."""
    known = rows[column[rows] != UNKNOWN]
    return known, len(np.unique(column[known]))


def _datasets(table: Labelled, settings: Classify, before: Bools, seed: int) -> Iterator[Cells]:
    """One whole data set of each species and transfer group with three of them."""
    for species, own in splits.rows_by_value(table.species):
        for group, rows in splits.rows_by_value(table.transfer, own):
            known, number = _known(table.datasets, rows)
            if number >= 3:
                yield _whole(table.datasets, known, 0.0, 1, "dataset", seed, species, group)


def _donors(table: Labelled, settings: Classify, before: Bools, seed: int) -> Iterator[Cells]:
    """Whole donors of each group with three of them; at least two donors stay."""
    for group, rows in splits.rows_by_value(table.groups, np.flatnonzero(~before)):
        known, number = _known(table.donors, rows)
        if number >= 3:
            yield _whole(table.donors, known, settings.test_fraction, number - 2, "donor", seed, group)


def _species(table: Labelled, settings: Classify, before: Bools, seed: int) -> Iterator[Cells]:
    """Cells of each species that has none held out yet, in transfer groups of several species."""
    for group, rows in splits.rows_by_value(table.transfer):
        sides = list(splits.rows_by_value(table.species, rows))
        for species, own in sides if len(sides) > 1 else ():
            if before[own].any():
                continue
            for units in (table.datasets, table.donors):
                known, number = _known(units, own)
                if number >= 2:
                    yield _whole(units, known, settings.test_fraction, number - 1, "species", seed, group, species)
                    break
            else:
                yield _cells(table, own, settings, "species", seed, group, species)


def _random(table: Labelled, settings: Classify, before: Bools, seed: int) -> Iterator[Cells]:
    """Cells of each group at random, of every type with two cells there."""
    for group, rows in splits.rows_by_value(table.groups, np.flatnonzero(~before)):
        yield _cells(table, rows, settings, "random", seed, group)


def _cells(table: Labelled, rows: Cells, settings: Classify, *key: object) -> Cells:
    return splits.stratified(rows, table.labels, table.names, settings.test_fraction, _KEY, *key, least=1)


def _final(
    table: Labelled, settings: Classify, is_development: Bools, is_test: Bools, *, kind: str, seed: int
) -> Iterator[Split]:
    """The splits of one kind that train on development cells and test the test cells of this kind."""
    development, test = np.flatnonzero(is_development), np.flatnonzero(is_test)
    for group, direction, train, tested in _pairs(table, development, test, kind):
        kept, dropped = splits.without_rare_types(train, table.labels, settings.min_class_fraction, least=2)
        for split in splits.on_shared_types(
            table, settings, (seed, 0), kept, tested, group=group, kind=kind, direction=direction, dropped=dropped
        ):
            donors = np.unique(table.donors[split.test]) if kind == "donor" else ()
            yield replace(split, donors=tuple(map(str, donors)))


def _pairs(table: Labelled, development: Cells, test: Cells, kind: str) -> Iterator[tuple[str, str, Cells, Cells]]:
    """Group, direction, training cells and test cells of each task of a kind."""
    if kind in ("random", "donor"):
        for group, rows in splits.rows_by_value(table.groups):
            yield group, "", np.intersect1d(rows, development), np.intersect1d(rows, test)
        return
    for group, rows in splits.rows_by_value(table.transfer):
        own_test = np.intersect1d(rows, test)
        for source, train in splits.rows_by_value(table.species, np.intersect1d(rows, development)):
            if kind == "dataset":
                for name, tested in splits.rows_by_value(table.datasets, own_test[table.species[own_test] == source]):
                    yield f"{group} {source}".strip(), name, train, tested
            else:
                for target, tested in splits.rows_by_value(table.species, own_test):
                    if target != source:
                        yield group, f"{source}>{target}", train, tested

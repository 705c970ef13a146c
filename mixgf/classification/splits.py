"""Splits: which labelled cells train, validate and test a classifier.

A split depends on the cells' names and labels and on a seed. It does not depend on the order of the cells or on the number of
workers. Test cells are used for the final score only. The cells on which epochs are selected (validation) are part of the training
cells; the published code selects on the test cells instead.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from mixgf.arrays import Cells, Names
from mixgf.classification.labels import UNKNOWN, Labelled
from mixgf.config.classification import Classify
from mixgf.errors import UserError


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """One division of labelled cells. Arrays are row numbers of a `Labelled`, ascending."""

    group: str
    kind: str
    """`random`, `donor`, `dataset` or `species`."""
    direction: str
    """The tested data set, or `human>mouse` (trained on > tested on); empty for other kinds."""
    seed: int
    classes: tuple[str, ...]
    """The types, sorted; a class id is an index into this tuple."""
    train: Cells
    """All training cells, the validation part included."""
    validation: Cells
    test: Cells
    dropped: dict[str, int] = field(default_factory=dict)
    """Cells that are not used, by reason."""
    donors: tuple[str, ...] = ()
    """The tested donors, where donors are held out."""
    share: float = 1.0
    """Share of the training labels that is used (label efficiency)."""
    unseen: str = ""
    """A type with test cells and no training cells (rejection of unknown types); it is not in `classes`."""

    @property
    def name(self) -> str:
        """One line that names the split, unique within a run."""
        held_out = f", {self.direction}" if self.direction else ""
        few = f", {self.share:.0%} of the labels" if self.share < 1 else ""
        without = f", without {self.unseen}" if self.unseen else ""
        return f"{self.group}: {self.kind}{held_out}, seed {self.seed}{few}{without}"

    @property
    def whole(self) -> bool:
        """Whether it has all training labels and all types, as the splits of the main tables do."""
        return self.share == 1 and not self.unseen

    @property
    def task(self) -> dict[str, str | int]:
        """Columns that identify it in the tables."""
        return {"group": self.group, "split": self.kind, "direction": self.direction, "seed": self.seed}

    def ids(self, labels: Names) -> npt.NDArray[np.int64]:
        """Class ids of labels that are all among `classes`."""
        found = np.searchsorted(np.asarray(self.classes), labels)
        assert bool(np.all(np.asarray(self.classes)[found] == labels)), "every label is a class of the split"
        return found.astype(np.int64)


def random_order(names: Names, *key: object) -> npt.NDArray[np.int64]:
    """A random order of `names` (indices into it) that depends on the set of names and the key only."""
    prefix = "\x1f".join(str(part) for part in key) + "\x1e"
    state = hashlib.blake2b(prefix.encode(), digest_size=8)
    draws = np.empty(len(names), dtype=np.uint64)
    for i, name in enumerate(names.tolist()):
        draw = state.copy()
        draw.update(name.encode())
        draws[i] = int.from_bytes(draw.digest(), "little")
    return np.lexsort((names, draws)).astype(np.int64)


def stratified(rows: Cells, labels: Names, names: Names, fraction: float, *key: object, least: int) -> Cells:
    """Draw `fraction` of each label's rows (rounded to nearest), at least `least` and never all of them.

    Args:
        rows: Row numbers to draw from.
        labels: Label of every row of the table that `rows` points into.
        names: Name of every such row.
        fraction: Share to draw.
        *key: Key of the draw.
        least: Fewest rows drawn from a label that has more than one row.

    Returns:
        The drawn row numbers, ascending.
    """
    drawn = []
    for label in np.unique(labels[rows]):
        mine = rows[labels[rows] == label]
        count = min(max(int(np.floor(fraction * len(mine) + 0.5)), least), len(mine) - 1)
        drawn.append(mine[random_order(names[mine], *key, label)[:count]])
    return np.sort(np.concatenate(drawn)) if drawn else np.empty(0, dtype=np.int64)


def capped(table: Labelled, settings: Classify, *, seed: int) -> Labelled:
    """At most `classify.max_cells` labelled cells of each group, drawn at random in proportion to the types."""
    if not settings.max_cells:
        return table
    kept = [
        rows if len(rows) <= settings.max_cells
        else stratified(rows, table.labels, table.names, settings.max_cells / len(rows), "cap", seed, group, least=2)
        for group, rows in rows_by_value(table.groups)
    ]  # fmt: skip
    return table.only(np.sort(np.concatenate(kept)))


def make(table: Labelled, settings: Classify, *, seed: int) -> list[Split]:
    """All splits of a run, in a fixed order: by kind, group, direction, seed; then those with fewer labels or types.

    A kind that cannot divide a group (one donor, one species, fewer than two types) gives no split for it.

    Args:
        table: The labelled cells.
        settings: `config.classify`.
        seed: `config.seed`; every draw depends on it.

    Raises:
        UserError: When not one split can be made.
    """
    kinds = {"random": _random, "donor": _donor, "dataset": _dataset, "species": _species}
    splits = [split for kind in settings.splits for split in kinds[kind](table, settings, seed)]
    if not splits:
        msg = (f"classify.splits = {', '.join(settings.splits)}: none can be made of {len(table)} labelled cells of "
               f"{len(np.unique(table.labels))} types; two types with two cells each in one value of "
               f"{settings.group!r} are needed; see classify.label, classify.group, classify.min_class_fraction")  # fmt: skip
        raise UserError(msg)
    random = [split for split in splits if split.kind == "random"]
    fewer = [
        _fewer(table, settings, split, share, seed) for split in random for share in settings.label_shares if share < 1
    ]
    return (
        splits + fewer + [one for split in random if split.seed == 0 for one in _without(table, settings, split, seed)]
    )


def _fewer(table: Labelled, settings: Classify, split: Split, share: float, seed: int) -> Split:
    """The same test cells with a share of the training cells: at least one of each type; a smaller share is part of a larger one."""
    train = []
    for label in split.classes:
        mine = split.train[table.labels[split.train] == label]
        order = random_order(table.names[mine], "labels", seed, split.seed, label)
        train.append(mine[order[: max(1, int(np.floor(share * len(mine) + 0.5)))]])
    rows = np.sort(np.concatenate(train))
    return replace(split, train=rows, validation=_validation(table, settings, rows, (seed, split.seed)), share=share)


def _without(table: Labelled, settings: Classify, split: Split, seed: int) -> Iterator[Split]:
    """The same test cells with one type left out of training, for several types in turn; at least two types stay."""
    kinds = np.asarray(split.classes)
    for kind in (
        kinds[random_order(kinds, "unseen", seed, split.group)][: settings.unseen_types] if len(kinds) > 2 else ()
    ):
        train, validation = (rows[table.labels[rows] != kind] for rows in (split.train, split.validation))
        classes = tuple(name for name in split.classes if name != kind)
        if len(validation) == 0:
            validation = _validation(table, settings, train, (seed, split.seed))
        yield replace(split, train=train, validation=validation, classes=classes, unseen=str(kind))


def _random(table: Labelled, settings: Classify, seed: int) -> Iterator[Split]:
    for group, rows in rows_by_value(table.groups):
        kept, dropped = without_rare_types(rows, table.labels, settings.min_class_fraction, least=2)
        for k in range(settings.seeds):
            test = stratified(kept, table.labels, table.names, settings.test_fraction, "test", seed, k, least=1)
            yield from on_shared_types(
                table, settings, (seed, k), np.setdiff1d(kept, test), test, group=group, kind="random", dropped=dropped
            )


def _donor(table: Labelled, settings: Classify, seed: int) -> Iterator[Split]:
    for group, rows in rows_by_value(table.groups):
        known = rows[table.donors[rows] != UNKNOWN]
        kept, dropped = without_rare_types(known, table.labels, settings.min_class_fraction, least=2)
        dropped = {**dropped, **_count("donor unknown", len(rows) - len(known))}
        donors, sizes = np.unique(table.donors[kept], return_counts=True)
        if len(donors) < 2:
            continue
        order, tested = random_order(donors, "donors", seed, group), set[tuple[str, ...]]()
        for k in range(
            settings.seeds
        ):  # the next seed starts at the next donor: as many seeds as donors test each once
            turn = np.roll(order, -k)
            num_test = int(np.searchsorted(np.cumsum(sizes[turn]), settings.test_fraction * len(kept))) + 1
            held_out = np.sort(donors[turn[: min(num_test, len(donors) - 1)]])
            if tuple(held_out) in tested:  # more seeds than donors: a split again would count the same cells twice
                continue
            tested.add(tuple(held_out))
            is_test = np.isin(table.donors[kept], held_out)
            made = on_shared_types(
                table, settings, (seed, k), kept[~is_test], kept[is_test], group=group, kind="donor", dropped=dropped
            )
            for split in made:
                yield replace(split, donors=tuple(held_out.tolist()))


def _dataset(table: Labelled, settings: Classify, seed: int) -> Iterator[Split]:
    """Each data set is tested once; the other data sets of its species and transfer group train."""
    for species, own in rows_by_value(table.species):
        for group, rows in rows_by_value(table.transfer, own):
            known = rows[table.datasets[rows] != UNKNOWN]
            for name, test in rows_by_value(table.datasets, known):
                rest, dropped = without_rare_types(
                    np.setdiff1d(known, test), table.labels, settings.min_class_fraction, least=2
                )
                for k in range(settings.seeds):
                    yield from on_shared_types(table, settings, (seed, k), rest, test, group=f"{group} {species}".strip(),
                                      kind="dataset", direction=name, dropped=dropped)  # fmt: skip


def _species(table: Labelled, settings: Classify, seed: int) -> Iterator[Split]:
    for group, rows in rows_by_value(table.transfer):
        sides = list(rows_by_value(table.species, rows))
        for source, train in sides:
            kept, dropped = without_rare_types(train, table.labels, settings.min_class_fraction, least=2)
            for target, test in sides:
                if source == target:
                    continue
                for k in range(settings.seeds):
                    yield from on_shared_types(table, settings, (seed, k), kept, test, group=group, kind="species",
                                      direction=f"{source}>{target}", dropped=dropped)  # fmt: skip


def on_shared_types(
    table: Labelled, settings: Classify, key: tuple[int, int], train: Cells, test: Cells, *, group: str, kind: str,
    direction: str = "", dropped: dict[str, int],
) -> Iterator[Split]:  # fmt: skip
    """The split on the types that both sides have; none where fewer than two types are left."""
    shared = np.intersect1d(table.labels[train], table.labels[test])
    if len(shared) < 2:
        return
    in_train, in_test = np.isin(table.labels[train], shared), np.isin(table.labels[test], shared)
    train, test = np.sort(train[in_train]), np.sort(test[in_test])
    validation = _validation(table, settings, train, key)
    dropped = {
        **dropped,
        **_count("type not tested", int((~in_train).sum())),
        **_count("type not in training", int((~in_test).sum())),
    }
    yield Split(group=group or "all", kind=kind, direction=direction, seed=key[1], classes=tuple(shared.tolist()), train=train,
                validation=validation, test=test, dropped=dropped)  # fmt: skip


def _validation(table: Labelled, settings: Classify, train: Cells, key: tuple[int, int]) -> Cells:
    """The training cells on which epochs are selected; empty only where no type has two training cells."""
    fraction, labels, names = settings.validation_fraction, table.labels, table.names
    drawn = stratified(train, labels, names, fraction, "validation", *key, least=0)
    # few cells of every type: one cell, of a type that keeps others
    return drawn if len(drawn) else stratified(train, labels, names, fraction, "validation", *key, least=1)[:1]


def rows_by_value(column: Names, rows: Cells | None = None) -> Iterator[tuple[str, Cells]]:
    """Each value of a column, ascending, with its rows; `rows` = only these."""
    rows = np.arange(len(column), dtype=np.int64) if rows is None else rows
    for value in np.unique(column[rows]):
        yield str(value), rows[column[rows] == value]


def without_rare_types(rows: Cells, labels: Names, fraction: float, *, least: int) -> tuple[Cells, dict[str, int]]:
    """Rows of types with at least `fraction` of the rows and `least` cells; dropped cells counted by type."""
    types, counts = np.unique(labels[rows], return_counts=True)
    rare = (counts < fraction * len(rows)) | (counts < least)
    dropped = {f"rare type: {name}": int(n) for name, n in zip(types[rare], counts[rare], strict=True)}
    return rows[np.isin(labels[rows], types[~rare])], dropped


def _count(reason: str, number: int) -> dict[str, int]:
    return {reason: number} if number else {}

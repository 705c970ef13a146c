"""The three parts of a sweep's cells: what chooses arms and what is tested have no cell, donor or data set in common."""

from dataclasses import replace

import numpy as np
import pytest

from mixgf.classification.labels import Labelled
from mixgf.config.classification import SPLITS, Classify
from mixgf.errors import UserError
from mixgf.tuning import held_out


def labelled(donors=4, datasets=3, cells=40, species=("human", "mouse")):
    """`cells` cells of every donor; each data set of each species has `donors` donors and four types."""
    rows = [
        (name, f"{name}-set{d}", f"{name}-set{d}-donor{k}", "abcd"[i % 4])
        for name in species for d in range(datasets) for k in range(donors) for i in range(cells)
    ]  # fmt: skip
    kind, dataset, donor, label = (np.array(column) for column in zip(*rows, strict=True))
    names = np.array([f"cell{i}" for i in range(len(rows))])
    return Labelled(
        cells=np.arange(len(rows)), names=names, labels=label, species=kind, groups=dataset, donors=donor, datasets=dataset,
        transfer=np.full(len(rows), "blood"), sources=dataset,
    )  # fmt: skip


def used(tasks, parts=("train", "validation", "test")):
    """Names of all cells in some parts of all splits."""
    return {
        name for split in tasks.splits for part in parts for name in tasks.table.names[getattr(split, part)].tolist()
    }


@pytest.mark.parametrize("kinds", [("random",), ("donor",), ("dataset",), ("species",), ("donor", "species"), SPLITS])
@pytest.mark.parametrize("seed", range(3))
def test_no_cell_of_a_choice_is_tested_and_no_tested_cell_trains(kinds, seed):
    held = held_out.divide(labelled(), Classify(), kinds, seed=seed)
    assert held.select.kinds == held.test.kinds == set(kinds)
    tested = used(held.test, ("test",))
    assert tested
    assert not tested & used(held.select)
    assert not tested & used(held.test, ("train", "validation"))
    development = set(held.select.table.names.tolist())
    assert used(held.test, ("train",)) <= development
    assert tested | development == set(held.test.table.names.tolist())


@pytest.mark.parametrize("kind", ["donor", "dataset", "species"])
def test_donors_and_data_sets_are_held_out_whole(kind):
    held = held_out.divide(labelled(), Classify(), (kind,), seed=0)
    units = held.test.table.donors if kind == "donor" else held.test.table.datasets
    development = held.select.table.donors if kind == "donor" else held.select.table.datasets
    for split in held.test.splits:
        assert not set(units[split.test]) & set(development)
        assert not set(units[split.test]) & set(units[split.train])
    for split in held.select.splits:
        assert not set(development[split.test]) & set(development[split.train])


def test_a_group_with_two_donors_or_data_sets_has_no_third_part():
    settings = Classify()
    few = held_out.divide(labelled(donors=2, datasets=2), settings, ("donor", "dataset", "species"), seed=0)
    assert few.test.kinds == {"species"}
    assert few.select.kinds == {"donor", "species"}
    one = held_out.divide(labelled(donors=1, datasets=1), settings, ("species",), seed=0)
    assert one.test.kinds == one.select.kinds == {"species"}
    share = len(used(one.test, ("test",))) / len(one.test.table)
    assert share == pytest.approx(settings.test_fraction, abs=0.05)
    with pytest.raises(UserError, match="none can be made"):
        held_out.divide(labelled(donors=1, datasets=1), settings, ("donor",), seed=0)


def test_transfer_is_tested_on_the_data_sets_and_donors_that_are_held_out_anyway():
    held = held_out.divide(labelled(), Classify(), SPLITS, seed=0)
    table, whole = held.test.table, set()
    for split in held.test.of(["donor", "dataset"]):
        whole |= set(table.donors[split.test])
    assert {donor for split in held.test.of(["species"]) for donor in table.donors[split.test]} == whole


def test_the_parts_depend_on_names_and_seed_and_not_on_the_order_of_cells():
    table = labelled()
    turned = table.only(np.random.default_rng(0).permutation(len(table)))
    a, b = (used(held_out.divide(t, Classify(), SPLITS, seed=1).test, ("test",)) for t in (table, turned))
    assert a == b
    assert a != used(held_out.divide(table, Classify(), SPLITS, seed=2).test, ("test",))


def test_rare_types_and_types_of_one_side_are_left_out_and_counted():
    table = labelled(species=("human",), datasets=1)
    labels = table.labels.copy()
    labels[:1] = "rare"
    held = held_out.divide(replace(table, labels=labels), Classify(), ("donor",), seed=0)
    (split,) = held.test.splits
    assert split.classes == ("a", "b", "c", "d")
    assert len(split.donors) == 1
    assert sum(split.dropped.values()) == 1

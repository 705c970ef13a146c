"""Laws of splits: disjoint, complete, a function of names, and honest about donors and species."""

import hashlib
import json
from dataclasses import replace

import numpy as np
import pytest

from mixgf.classification import splits
from mixgf.classification.labels import UNKNOWN, Labelled, names_of
from mixgf.classification.splits import Split, make, random_order, stratified
from mixgf.config.classification import Classify
from mixgf.errors import UserError


def table(seed: int = 0, cells: int = 331) -> Labelled:
    """Two species, two organs, three sources, five donors with different types; sizes that divide by nothing."""
    rng = np.random.default_rng(seed)
    source = rng.integers(0, 3, cells)
    species = np.where(source == 2, "mouse", "human")
    donors = np.array([f"s{s}d{d}" for s, d in zip(source, rng.integers(0, 5, cells), strict=True)])
    labels = np.array(["beta", "alpha", "delta", "acinar"])[rng.choice(4, cells, p=[0.5, 0.3, 0.15, 0.05])]
    labels[np.flatnonzero(species == "mouse")[:3]] = "only mouse"
    labels[7] = "seen once"
    return Labelled(
        cells=np.arange(1000, 1000 + cells), names=np.array([f"cell{i}" for i in range(cells)]), labels=labels,
        species=species, groups=np.array([f"source{s}" for s in source]), donors=donors,
        datasets=np.array([f"source{s}" for s in source]), transfer=np.full(cells, "pancreas"), sources=np.array([f"source{s}" for s in source]),
    )  # fmt: skip


def shuffled(data: Labelled, order: np.ndarray) -> Labelled:
    return Labelled(**{name: getattr(data, name)[order] for name in data.__dataclass_fields__})


ALL = Classify(splits=("random", "donor", "dataset", "species"), seeds=3)


def parts(data: Labelled, split: Split) -> dict[str, list[str]]:
    return {part: sorted(data.names[getattr(split, part)].tolist()) for part in ("train", "validation", "test")}


@pytest.mark.parametrize("kind", ["random", "donor", "dataset", "species"])
def test_training_and_test_are_disjoint_and_validation_lies_inside_training(kind: str) -> None:
    data = table()
    found = make(data, replace(ALL, splits=(kind,)), seed=0)
    assert found
    for split in found:
        train, test, validation = set(split.train), set(split.test), set(split.validation)
        assert len(train) == len(split.train)
        assert not train & test
        assert validation < train
        assert validation
        types = set(split.classes)
        assert list(split.classes) == sorted(types)
        trained = set(data.labels[np.setdiff1d(split.train, split.validation)])
        assert trained == set(data.labels[split.test]) == types


def test_the_random_split_uses_every_cell_of_a_group_but_the_rare_types() -> None:
    data = table()
    for split in make(data, replace(ALL, splits=("random",)), seed=0):
        cells = int((data.groups == split.group).sum())
        assert len(split.train) + len(split.test) + sum(split.dropped.values()) == cells


def test_the_random_split_takes_a_fifth_of_every_type() -> None:
    data = table()
    for split in make(data, replace(ALL, splits=("random",)), seed=0):
        for name in split.classes:
            of_type = int(((data.labels == name) & (data.groups == split.group)).sum())
            tested = int((data.labels[split.test] == name).sum())
            assert abs(tested - 0.2 * of_type) <= max(0.5, 1 - 0.2 * of_type)


def test_types_below_the_fraction_are_dropped_and_counted() -> None:
    labels = np.array(["a"] * 198 + ["b"] * 199 + ["c"] * 2 + ["d"])  # of 400, 0.5 % are two cells
    data = replace(table(cells=400), labels=labels, groups=np.full(400, "g"))
    (split,) = make(data, replace(ALL, splits=("random",), seeds=1), seed=0)
    assert split.classes == ("a", "b", "c")
    assert split.dropped == {"rare type: d": 1}


def test_no_donor_is_on_both_sides_and_every_donor_is_tested_once_by_as_many_seeds() -> None:
    data = table()
    for group in np.unique(data.groups):
        found = [
            s
            for s in make(data, replace(ALL, splits=("donor",), seeds=5, test_fraction=0.01), seed=0)
            if s.group == group
        ]
        tested = []
        for split in found:
            assert not set(data.donors[split.train]) & set(data.donors[split.test])
            assert set(split.donors) == set(data.donors[split.test])
            tested += split.donors
        assert sorted(tested) == sorted(set(data.donors[data.groups == group]))


def test_more_seeds_than_donors_test_no_set_of_donors_twice() -> None:
    """A repeated split would count its cells twice in a mean over seeds and in an interval."""
    few, many = (make(table(), replace(ALL, splits=("donor",), seeds=seeds), seed=0) for seeds in (5, 40))
    for found in (few, many):
        sets = [(split.group, split.donors) for split in found]
        assert len(sets) == len(set(sets))
    assert {(s.group, s.donors) for s in many} >= {(s.group, s.donors) for s in few}
    assert len(many) < 3 * 40


def test_cells_of_an_unknown_donor_take_no_part_in_the_donor_split() -> None:
    data = table()
    donors = data.donors.copy()
    donors[::3] = UNKNOWN
    data = replace(data, donors=donors)
    for split in make(data, replace(ALL, splits=("donor",)), seed=0):
        assert UNKNOWN not in data.donors[np.concatenate([split.train, split.test])]
        assert split.dropped["donor unknown"] == int(((data.groups == split.group) & (donors == "")).sum())


def test_other_species_trains_on_one_and_tests_on_the_other_both_ways_on_shared_types() -> None:
    data = table()
    found = make(data, replace(ALL, splits=("species",), seeds=1), seed=0)
    assert [s.direction for s in found] == ["human>mouse", "mouse>human"]
    for split in found:
        source, target = split.direction.split(">")
        assert set(data.species[split.train]) == {source}
        assert set(data.species[split.test]) == {target}
        assert "only mouse" not in split.classes
    assert found[0].dropped["type not in training"] == 3
    assert found[1].dropped["type not tested"] == 3


def test_a_held_out_data_set_is_tested_by_models_of_the_other_data_sets_of_its_species() -> None:
    data = table()
    found = make(data, replace(ALL, splits=("dataset",), seeds=1), seed=0)
    assert [s.direction for s in found] == ["source0", "source1"]  # source2 is the only one of mouse
    for split in found:
        assert set(data.datasets[split.test]) == {split.direction}
        assert set(data.datasets[split.train]) == {"source0", "source1"} - {split.direction}


def test_the_same_key_gives_the_same_split_and_another_gives_another() -> None:
    data = table()
    one, same, other = (make(data, ALL, seed=seed) for seed in (0, 0, 1))
    assert [parts(data, s) for s in one] == [parts(data, s) for s in same]
    assert [parts(data, s) for s in one] != [parts(data, s) for s in other]
    by_seed = [parts(data, s)["test"] for s in one if s.kind == "random" and s.group == "source0"]
    assert len({tuple(test) for test in by_seed}) == 3


def test_splits_and_class_ids_do_not_depend_on_the_order_of_rows() -> None:
    data = table()
    order = np.random.default_rng(9).permutation(len(data))
    moved = shuffled(data, order)
    for a, b in zip(make(data, ALL, seed=0), make(moved, ALL, seed=0), strict=True):
        assert (a.name, a.classes, a.dropped) == (b.name, b.classes, b.dropped)
        assert parts(data, a) == parts(moved, b)
        ids = dict(zip(data.names[a.train], a.ids(data.labels[a.train]), strict=True))
        assert ids == dict(zip(moved.names[b.train], b.ids(moved.labels[b.train]), strict=True))


def test_labels_of_test_cells_do_not_move_training_or_validation_cells_between_species() -> None:
    data = table()
    labels = data.labels.copy()
    mouse = np.flatnonzero(data.species == "mouse")
    labels[mouse] = labels[np.random.default_rng(1).permutation(mouse)]
    for a, b in zip(make(data, ALL, seed=0), make(replace(data, labels=labels), ALL, seed=0), strict=True):
        if a.direction == "human>mouse":
            assert [parts(data, a)[part] for part in ("train", "validation")] == [
                parts(data, b)[part] for part in ("train", "validation")
            ]


def test_stratified_draws_at_least_the_least_and_never_all() -> None:
    labels = np.array(["one", "two", "two", "ten"] + ["ten"] * 9)
    names = np.array([f"n{i}" for i in range(13)])
    rows = np.arange(13)
    drawn = stratified(rows, labels, names, 0.9, "key", least=1)
    assert [int((labels[drawn] == name).sum()) for name in ("one", "two", "ten")] == [0, 1, 9]
    assert len(stratified(rows, labels, names, 0.04, "key", least=0)) == 0
    assert len(stratified(rows[:0], labels, names, 0.5, "key", least=1)) == 0


def test_a_random_order_is_a_permutation_that_does_not_follow_the_names() -> None:
    names = np.array([f"n{i:03}" for i in range(500)])
    order = random_order(names, "a", 1)
    assert sorted(order.tolist()) == list(range(500))
    assert abs(np.corrcoef(order, np.arange(500))[0, 1]) < 0.15
    assert order.tolist() != random_order(names, "a", 2).tolist()
    assert random_order(names, "a", 12).tolist() != random_order(names, "a1", 2).tolist()


def test_nothing_to_split_is_one_clear_line() -> None:
    data = replace(table(), labels=np.full(331, "all the same"))
    with pytest.raises(UserError, match=r"classify.splits = random, donor, dataset, species: none can be made of 331"):
        make(data, ALL, seed=0)


def test_missing_and_unknown_values_are_one_value() -> None:
    assert names_of(["a", None, float("nan"), "nan", "unknown", 3], unknown=("unknown", "nan")).tolist() == [
        "a",
        "",
        "",
        "",
        "",
        "3",
    ]


def test_a_cap_keeps_every_type_in_its_proportion_whatever_the_order() -> None:
    data = table(cells=2000)
    few = splits.capped(data, Classify(max_cells=101), seed=0)
    for group in np.unique(data.groups):
        before, after = (one.labels[one.groups == group] for one in (data, few))
        assert abs(len(after) - 101) <= len(np.unique(before))
        kinds, counts = np.unique(before, return_counts=True)
        for kind, count in zip(kinds[counts > 1], counts[counts > 1], strict=True):
            assert abs((after == kind).sum() - max(2, 101 / len(before) * count)) <= 1
    again = splits.capped(
        shuffled(data, np.random.default_rng(3).permutation(len(data))), Classify(max_cells=101), seed=0
    )
    assert sorted(again.names) == sorted(few.names)
    assert splits.capped(data, Classify(), seed=0) is data


def test_fewer_labels_are_nested_stratified_and_tested_on_the_same_cells() -> None:
    data = table(cells=1500)
    found = make(data, replace(ALL, splits=("random", "donor"), label_shares=(0.01, 0.1, 0.5, 1.0)), seed=0)
    whole = {(s.group, s.seed): s for s in found if s.whole and s.kind == "random"}
    fewer = [s for s in found if s.share < 1]
    assert len(fewer) == 3 * len(whole)
    for split in fewer:
        full = whole[split.group, split.seed]
        assert split.test.tolist() == full.test.tolist()
        assert split.classes == full.classes
        assert set(split.validation) < set(split.train) < set(full.train)
        for kind in split.classes:
            have, had = ((data.labels[s.train] == kind).sum() for s in (split, full))
            assert have == max(1, np.floor(split.share * had + 0.5))
    for group, seed in whole:
        mine = sorted((s for s in fewer if (s.group, s.seed) == (group, seed)), key=lambda s: s.share)
        assert set(mine[0].train) < set(mine[1].train) < set(mine[2].train)


def test_a_type_left_out_has_test_cells_and_no_training_cell() -> None:
    data = table()
    found = make(data, replace(ALL, splits=("random",), unseen_types=2), seed=0)
    open_ = [s for s in found if s.unseen]
    assert {s.group for s in open_} == set(data.groups)
    assert all(len({s.unseen for s in open_ if s.group == group}) == 2 for group in data.groups)
    for split in open_:
        full = next(s for s in found if s.whole and s.group == split.group and s.seed == 0)
        assert split.test.tolist() == full.test.tolist()
        assert split.unseen in set(data.labels[split.test])
        assert {split.unseen, *split.classes} == set(full.classes)
        assert set(data.labels[split.train]) == set(split.classes)
        assert set(split.validation) < set(split.train)
    assert len({s.name for s in found}) == len(found)


def test_the_splits_of_a_seed_are_those_of_earlier_versions() -> None:
    """A classification that an earlier version began is extended by models on the same cells."""
    data = table(cells=1500)
    donors = data.donors.copy()
    donors[::17] = UNKNOWN
    data = splits.capped(replace(data, donors=donors), Classify(max_cells=430), seed=5)
    settings = replace(ALL, label_shares=(0.02, 0.3), unseen_types=2, min_class_fraction=0.02)
    made = make(data, settings, seed=5)
    text = json.dumps([
        [s.name, s.task, s.classes, s.dropped, s.donors, [data.names[rows].tolist() for rows in (s.train, s.validation, s.test)]]
        for s in made
    ])  # fmt: skip
    assert (len(made), hashlib.sha256(text.encode()).hexdigest()[:16]) == (54, "4670933ea682f7a4")


def test_a_split_says_in_one_line_what_it_holds_out() -> None:
    one = make(table(), replace(ALL, splits=("species",), seeds=1), seed=0)[0]
    assert one.name == "pancreas: species, human>mouse, seed 0"
    assert replace(one, share=0.05, direction="").name == "pancreas: species, seed 0, 5% of the labels"
    assert replace(one, unseen="beta").name == "pancreas: species, human>mouse, seed 0, without beta"
    assert [replace(one, **some).whole for some in ({}, {"share": 0.5}, {"unseen": "beta"})] == [True, False, False]
    assert one.task == {"group": "pancreas", "split": "species", "direction": "human>mouse", "seed": 0}


def test_a_type_is_rare_below_the_fraction_or_the_least_number_and_not_at_them() -> None:
    labels = np.repeat(["a", "b", "c"], [90, 8, 2])
    rows = np.arange(100)
    assert splits.without_rare_types(rows, labels, 0.08, least=2)[1] == {"rare type: c": 2}
    assert splits.without_rare_types(rows, labels, 0.02, least=2)[1] == {}
    assert splits.without_rare_types(rows, labels, 0.02, least=3)[1] == {"rare type: c": 2}
    kept, _ = splits.without_rare_types(rows[::2], labels, 0.05, least=1)  # shares are of the given rows
    assert kept.tolist() == rows[:98:2].tolist()


def test_donors_are_held_out_until_the_share_is_reached_and_one_stays() -> None:
    """Donors of 30, 20 and 50 cells: 30 % are one donor of 30 or 50, or 20 and one more. 90 % are two donors."""
    size = {"x": 30, "y": 20, "z": 50}
    donors = np.repeat(list(size), list(size.values()))
    data = replace(table(cells=100), labels=np.tile(["a", "b"], 50), groups=np.full(100, "g"), donors=donors)
    for fraction in (0.1, 0.3, 0.9):
        found = make(data, replace(ALL, splits=("donor",), seeds=3, test_fraction=fraction), seed=0)
        assert len(found) == 3
        for split in found:
            cells = [size[d] for d in split.donors]
            assert len(split.donors) == 2 or sum(cells) >= fraction * 100
            assert sum(cells) - max(cells) < fraction * 100


@pytest.mark.parametrize("kind", ["random", "donor", "dataset", "species"])
def test_a_type_with_two_cells_to_train_on_takes_part_and_one_with_a_single_cell_does_not(kind: str) -> None:
    """Two sides of 20 cells; type b has two of them on each side, type c one. (Random cells are of one group: c has two.)"""
    labels = np.array((["a"] * 17 + ["b"] * 2 + ["c"]) * 2)
    side = np.repeat(["x", "y"], 20)
    one = np.full(40, "one")
    data = replace(
        table(cells=40), labels=labels, groups=one, transfer=one, species=side if kind == "species" else one,
        donors=side if kind == "donor" else one, datasets=side if kind == "dataset" else one,
    )  # fmt: skip
    found = make(data, Classify(splits=(kind,), min_class_fraction=0.0), seed=0)
    assert found
    assert {split.classes for split in found} == {("a", "b", "c") if kind in {"random", "donor"} else ("a", "b")}


def test_validation_cells_are_drawn_anew_where_all_of_them_are_of_the_type_that_is_left_out() -> None:
    labels = np.array(["a"] * 21 + ["b"] * 5 + ["c"] * 5)  # a tenth of the training cells of b and of c is no cell
    data = replace(table(cells=31), labels=labels, groups=np.full(31, "g"))
    found = make(data, Classify(splits=("random",), unseen_types=3), seed=0)
    whole = next(split for split in found if split.whole)
    assert set(data.labels[whole.validation]) == {"a"}
    (without,) = [split for split in found if split.unseen == "a"]
    assert len(without.validation) == 1
    assert set(without.validation) < set(without.train)
    (other,) = [split for split in found if split.unseen == "b"]
    assert other.validation.tolist() == whole.validation.tolist()

"""The arms of a sweep and what goes on after a rung: pure functions of a config and of scores."""

from dataclasses import replace

import pytest

from mixgf.config import recipes
from mixgf.config.run import Config
from mixgf.config.tuning import Tune
from mixgf.errors import UserError
from mixgf.tuning import search_space

BASE = Config(tune=Tune(space=({"train.lr": (0.1,)},)))


def arms(*space, **settings):
    return search_space.arms(Config(tune=Tune(space=space, **settings)))


def test_the_base_comes_first_and_entries_are_crossed_within_and_added_between():
    found = arms(
        {"objective.view": ("mask", "subsample"), "objective.pooling": ("mean", "first")}, {"train.lr": (0.001, 0.002)}
    )
    assert [arm.name for arm in found] == [
        "base", "view=mask", "pooling=first, view=mask", "view=subsample", "pooling=first, view=subsample", "lr=0.001", "lr=0.002",
    ]  # fmt: skip
    assert dict(found[2].changes) == {"objective.view": "mask", "objective.pooling": "first"}
    assert found[2].config.objective.view == "mask"
    assert found[2].config.objective.pooling == "first"
    assert len({arm.key for arm in found}) == len(found)


def test_without_a_contrast_what_only_the_contrast_looks_at_makes_no_arm_of_its_own():
    space = {
        "objective.contrast_weight": (0.0, 1.0),
        "objective.view": ("dropout", "mask"),
        "objective.temperature": (0.05, 0.5),
    }
    names = [arm.name for arm in arms(space)]
    assert names == ["base", "contrast_weight=0.0", "temperature=0.5", "view=mask", "temperature=0.5, view=mask"]


def test_a_contrast_by_ortholog_weight_alone_still_has_a_temperature():
    names = [
        arm.name
        for arm in arms(
            {"objective.contrast_weight": (0.0,), "objective.ortholog_weight": (0.1,), "objective.temperature": (0.5,)}
        )
    ]
    assert names == ["base", "contrast_weight=0.0, ortholog_weight=0.1, temperature=0.5"]


def test_a_random_search_draws_the_same_arms_from_the_product_whatever_the_order_of_entries():
    a = arms({"train.lr": (0.1, 0.2, 0.3)}, {"train.clip": (0.5, 2.0)}, search="random", num_arms=3)
    b = arms({"train.clip": (2.0, 0.5)}, {"train.lr": (0.3, 0.1, 0.2)}, search="random", num_arms=3)
    assert len(a) == 4
    assert a[0].name == "base"
    assert {arm.key for arm in a} == {arm.key for arm in b}
    assert all(len(arm.changes) == 2 for arm in a[1:])


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ((), "tune.space: empty"),
        (({},), "must give each field a list of values"),
        (({"train.lr": ()},), "must give each field a list of values"),
        (({"train.speed": (1,)},), "tune.space: --set train.speed=1: no field 'speed'"),
        (({"train.lr": ("fast",)},), "tune.space: train.lr = 'fast': must be a number"),
        (({"objective.view": ("mirror",)},), "tune.space: objective.view = 'mirror': must be one of"),
        (({"compute.num_workers": (4,)},), "tune.space: compute.num_workers: an arm cannot change it"),
    ],
)
def test_a_wrong_space_is_refused_in_one_line(space, said):
    with pytest.raises(UserError) as error:
        arms(*space)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_rungs_are_steps_that_rise_to_the_end():
    config = replace(BASE, tune=Tune(rungs=(0.001, 0.002, 0.5, 1.0)))
    assert search_space.rungs(config, 100) == [1, 50, 100]
    with pytest.raises(UserError, match="rising shares"):
        Tune(rungs=(0.5, 0.2, 1.0))
    with pytest.raises(UserError, match="the last 1"):
        Tune(rungs=(0.5,))


def test_the_better_share_and_the_base_go_on_and_a_failed_arm_does_not():
    scores = {"base": [0.1, 0.1], "a": [0.5, 0.3], "b": [0.9], "c": [0.3, 0.4], "d": [0.2, 0.2]}
    assert search_space.survivors(scores, 0.4, 2) == ["base", "a", "c"]
    assert search_space.survivors(scores, 1.0, 2) == ["base", "a", "c", "d"]
    assert search_space.survivors({"base": [0.1], "a": [0.5, 0.3]}, 0.5, 2) == ["a"]


@pytest.mark.parametrize("name", ["cl_ablation", "data_ladder"])
def test_the_recipes_have_the_arms_that_their_texts_promise(name):
    found = search_space.arms(recipes.get(name))
    changed = {field for arm in found for field, _ in arm.changes}
    wanted = {
        "cl_ablation": {"objective.view", "objective.pooling", "objective.contrast_weight", "objective.temperature",
                        "objective.simcsepp_weight", "objective.ortholog_weight", "vocab.sharing", "tokens.scaling", "tokens.cls",
                        "train.species_mix", "train.batch_cells"},
        "data_ladder": {"train.cells_share", "train.max_steps"},
    }  # fmt: skip
    assert changed == wanted[name]
    assert len(found) == {"cl_ablation": 19, "data_ladder": 9}[name]

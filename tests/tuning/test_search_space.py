"""The arms of a sweep and what goes on after a rung: pure functions of a config and of scores."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

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


def test_a_random_search_draws_from_domains_within_their_ends_and_evenly():
    space = {
        "objective.temperature": ("loguniform(0.02, 0.5)",), "model.dropout": ("uniform(0, 0.2)",),
        "model.num_layers": ("randint(2, 5)",), "objective.pooling": ("choice(mean, first)",), "objective.view": ("dropout", "mask"),
    }  # fmt: skip
    found = arms(space, search="random", num_arms=300)[1:]
    assert len({arm.key for arm in found}) == 300
    temperature = np.array([arm.config.objective.temperature for arm in found])
    dropout = np.array([arm.config.model.dropout for arm in found])
    layers = [arm.config.model.num_layers for arm in found]
    assert stats.kstest(np.log(temperature / 0.02) / np.log(25), "uniform").pvalue > 1e-3
    assert stats.kstest(dropout / 0.2, "uniform").pvalue > 1e-3
    assert stats.chisquare(np.bincount(layers)[2:]).pvalue > 1e-3
    assert set(layers) == {2, 3, 4}
    assert {arm.config.objective.pooling for arm in found} == {"mean", "first"}
    assert all(float(f"{value:.4g}") == value for value in temperature), "names of arms stay short"
    again = arms(space, search="random", num_arms=20)[1:]
    assert [arm.key for arm in again] == [arm.key for arm in found[:20]]


def test_a_random_search_of_a_small_space_has_all_of_it_and_a_larger_one_begins_with_the_same_arms():
    space = {"train.lr": (0.1, 0.2, 0.3), "train.clip": (0.5, 2.0)}
    few, more = (arms(space, search="random", num_arms=n) for n in (3, 50))
    assert len(more) == 1 + 6
    assert [arm.key for arm in few] == [arm.key for arm in more[:4]]


@pytest.mark.parametrize("name", ["cl_ablation", "data_ladder"])
def test_an_arm_comes_back_from_its_hyperparameters(name):
    config = recipes.get(name)
    space = search_space.factors(config)
    for arm in search_space.arms(config):
        point = search_space.point(arm, list(space))
        assert all(isinstance(value, str | int | float) for value in point.values())
        assert search_space.from_point(config, point).key == arm.key


def test_optuna_knows_the_base_only_and_makes_no_corpora():
    assert [arm.name for arm in arms({"train.lr": ("loguniform(1e-4, 1e-2)",)}, search="optuna", stop="asha")] == [
        "base"
    ]
    with pytest.raises(UserError, match=r"tokens.scaling: needs a corpus for each value"):
        arms({"tokens.scaling": ("multiply",)}, search="optuna", stop="none")
    with pytest.raises(UserError, match=r"tune.stop = 'halving': must be asha, median or none"):
        Tune(search="optuna")


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("loguniform(0, 1)", "with low above 0"),
        ("uniform(0.2, 0.1)", "must be a list, uniform(low, high)"),
        ("uniform(0.1)", "must be a list"),
        ("normal(0, 1)", "must be a list"),
        ("randint(0.5, 2)", "must be a list"),
        ("choice()", "must be a list"),
        ("uniform(0.1, 1.5)", "model.dropout = 1.5: must be"),
    ],
)
def test_a_wrong_domain_is_refused_before_anything_is_drawn(value, said):
    with pytest.raises(UserError) as error:
        arms({"model.dropout": (value,)}, search="random")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_grid_has_no_domain_and_a_search_names_a_field_once():
    with pytest.raises(UserError, match=r"uniform\(0.0, 0.2\): a grid search needs a list"):
        arms({"model.dropout": ("uniform(0.0, 0.2)",)})
    with pytest.raises(UserError, match=r"train.lr: is in two objects"):
        arms({"train.lr": (0.1,)}, {"train.lr": (0.2,)}, search="random")
    assert [arm.name for arm in arms({"train.lr": (0.1,)}, {"train.lr": (0.2,)})] == ["base", "lr=0.1", "lr=0.2"]


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
        (({"train.patience": (4,)},), "tune.space: train.patience: has no effect in a sweep"),
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

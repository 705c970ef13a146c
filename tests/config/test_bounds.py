"""Every setting of every recipe: what is no value for it is refused in one short line, before anything is created."""

import dataclasses
import json
import typing
from collections.abc import Mapping

import pytest

from mixgf import cli
from mixgf.config import fields, parse, recipes
from mixgf.config.comparison import ShiftSpec
from mixgf.config.data import Source, SpeciesRow
from mixgf.config.run import Config
from mixgf.errors import UserError

NUMBERS = (-1, 0, 1.5, float("nan"), float("inf"), -float("inf"), 2**70, -(2**70), 10**400, 1e300)
TEXTS = ("x" * 60_000, "a\nb", "a\0b")
SECTIONS = {name: hint for name, hint in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(hint)}
ROWS = {"": Config, "species[]": SpeciesRow, "sources[]": Source, "compare.shifts[]": ShiftSpec}


def kinds(hint):
    """The plain types that a field holds, in lists and mappings, too."""
    if typing.get_origin(hint) is Mapping:
        return kinds(typing.get_args(hint)[1])
    inside = typing.get_args(hint)
    return {kind for part in inside for kind in kinds(part)} if inside else {hint}


def settings(wanted):
    for section, cls in (SECTIONS | ROWS).items():
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if wanted & kinds(hints[field.name]):
                yield section, field.name, hints[field.name], fields.facts_of(cls)[field.name]


def changed(recipe, section, name, hint, value):
    """The recipe's config with one bad value, through its JSON form; the value is an item where a list or a mapping is meant."""
    data = parse.to_dict(recipe)
    place = {
        "": data, "species[]": data["species"][0], "compare.shifts[]": {"name": "s", "before": "a == 1", "after": None},
        "sources[]": {"uri": "a.h5ad", "species": "human"},
    }.get(section, data.get(section))  # fmt: skip
    origin = typing.get_origin(hint)
    place[name] = [value] if origin is tuple else {"human": value} if origin is Mapping else value
    return parse.from_dict((SECTIONS | ROWS)[section], place, section)


def line(error):
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 800, text
    return text


def test_every_number_has_a_sign_in_its_metadata():
    for section, name, _, facts in settings({int, float}):
        assert facts.least is not None or facts.above is not None or facts.below is not None, f"{section}.{name}"


@pytest.mark.parametrize("recipe", recipes.RECIPES)
@pytest.mark.parametrize("value", NUMBERS, ids=lambda value: repr(value)[:12])
def test_a_number_beyond_the_bounds_is_refused_and_one_within_them_is_kept(recipe, value):
    config = recipes.get(recipe)
    for section, name, hint, facts in settings({int, float}):
        whole = float not in kinds(hint)
        largest = fields.MOST_WHOLE if whole else fields.MOST_NUMBER
        limits = ((facts.most is not None and facts.most >= largest) and facts.most) or largest
        allowed = (
            value == value  # noqa: PLR0124 (NaN is not itself)
            and abs(value) <= limits
            and not (whole and isinstance(value, float))
            and (facts.least is None or value >= facts.least)
            and (facts.above is None or value > facts.above)
            and (facts.most is None or value <= facts.most)
            and (facts.below is None or value < facts.below)
        )
        if not allowed:
            with pytest.raises(UserError, match=rf"^{section.split('[')[0].split('.')[0]}.*{name}") as error:
                changed(config, section, name, hint, value)
            line(error)
            continue
        try:
            changed(config, section, name, hint, value)
        except UserError as error:  # by a rule between settings, such as a width that heads divide
            # it may name the other setting of the rule
            assert str(error).startswith(section.split("[")[0].split(".")[0]), f"{section}.{name} = {value}: {error}"  # noqa: PT017


@pytest.mark.parametrize("value", TEXTS, ids=["long", "two lines", "null"])
def test_text_that_no_setting_can_mean_is_refused(value):
    for section, name, hint, facts in settings({str}):
        if facts.lines and "\0" not in value:
            continue  # an expression may be long and have several lines; `test_obs_query` tests those
        with pytest.raises(UserError) as error:
            changed(recipes.get("laptop"), section, name, hint, value)
        assert name in line(error)


def test_numbers_of_another_type_are_refused_by_the_python_api_too():
    for bad in (1.5, float("nan"), -1, 2**70):
        with pytest.raises(UserError, match=r"^classify\.seeds"):
            dataclasses.replace(recipes.get("laptop").classify, seeds=bad)
    with pytest.raises(UserError, match=r"^objective\.mlm_weight = 0.0: must be above 0 where every other weight is 0"):
        dataclasses.replace(recipes.get("laptop").objective, mlm_weight=0.0, contrast_weight=0.0)


@pytest.mark.parametrize(
    "text",
    ['{"seed": 1, "seed": 2}', '{"train": {"lr": 0.1, "lr": 0.2}}', '{"sources": [{"uri": "a", "uri": "b"}]}'],
)
def test_a_key_given_twice_is_refused(text, tmp_path, capsys):
    with pytest.raises(parse.DuplicateKeyError, match=r"the key '(seed|lr|uri)' is given twice"):
        parse.read_json(text)
    (tmp_path / "c.json").write_text(text)
    assert cli.main(["pretrain", "--config", str(tmp_path / "c.json"), "--print-config"]) == 2
    assert "is given twice" in capsys.readouterr().err
    with pytest.raises(UserError, match="is given twice"):
        parse.override(Config(), ['train.species_mix={"human": 0.5, "human": 0.4}'])


@pytest.mark.parametrize(
    "value", ["[" * 60_000, "9" * 60_000, "1" + "0" * 400, "1e999", "-Infinity", "NaN", "{" * 60_000, '"' * 60_001]
)
def test_what_cannot_be_read_as_json_is_refused_in_one_line(value):
    for setting in ("train.lr", "model.num_layers", "train.species_mix", "seed"):
        with pytest.raises(UserError) as error:
            parse.override(Config(), [f"{setting}={value}"])
        line(error)


def test_nothing_is_created_by_a_command_with_a_wrong_number(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in ("prepare", "pretrain", "embed", "classify", "finetune", "perturb", "compare", "tune", "report"):
        for setting in ("train.clip=-1", "objective.mlm_weight=NaN", "model.num_layers=-1", "train.warmup_steps=-5"):
            assert cli.main([command, "--output", "runs/x", "--set", setting]) == 2
            assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_every_recipe_is_its_own_json_form():
    for name in recipes.RECIPES:
        config = recipes.get(name)
        assert parse.from_dict(Config, parse.read_json(json.dumps(parse.to_dict(config)))) == config

"""The arms of a sweep: the configs of a search space, and those that go on after a rung. Pure functions.

`tune.space` is a list of objects. An object gives one or more fields their values. It is a space of hyperparameters, as Ray
Tune's `param_space`:

| value of a field | what it is |
|---|---|
| `[0.02, 0.2]` | a grid: each value |
| `"uniform(0, 0.2)"`, `"loguniform(0.02, 0.5)"` | a domain of numbers: any number from the first to the second |
| `"randint(2, 9)"` | a domain of whole numbers: from the first to below the second |
| `"choice(mean, first)"` | a domain: one of these |

A grid search takes every combination of the lists of an object, and the objects one after the other. A random search and
Optuna take all fields of all objects together, and a list as a domain. Numbers of a domain have four significant digits.

Arms that differ only in a field without effect (such as the temperature of a contrast of weight 0) are one arm.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mixgf.config.fields import names
from mixgf.config.parse import by_field, fingerprint, override, to_dict
from mixgf.config.run import Config
from mixgf.errors import UserError

_RANDOM = 0x54554E45
"""Key of the random draw of arms (`tune.search = random`)."""
_MOST_DRAWS = 50
"""Draws for each arm that is wanted, before a random search ends with fewer arms: a small space has no more of them."""
_DIGITS = 4
"""Significant digits of the numbers that are drawn."""
_NUMBERS = ("uniform", "loguniform", "randint")
"""Domains with two ends."""
BASE = "base"
"""Name of the arm with the config as it is. The other arms are compared with it."""
OWN = names(Config, swept=False)
"""Parts of the config that an arm may not change."""
WITHOUT_EFFECT = ("train.patience", "train.publish", "train.heldout_steps")
"""Fields that change nothing in a sweep, where every training goes to its rungs and the weights there are scored."""


@dataclass(frozen=True, slots=True)
class Factor:
    """One field and the values it takes."""

    field: str
    values: tuple[Any, ...]
    """Of a grid or a choice; the two ends of the other domains."""
    domain: str = ""
    """`uniform`, `loguniform`, `randint` or `choice`; empty = a grid."""

    @property
    def text(self) -> str:
        """A domain as it stands in `tune.space`."""
        return f"{self.domain}({', '.join(_text(value) for value in self.values)})"

    @property
    def plain(self) -> tuple[str, list[Any]]:
        """Name and arguments of the domain in Ray Tune; a grid is a choice."""
        return self.domain or "choice", [scalar(value) for value in self.values]

    def at(self, u: float) -> Any:
        """The value at a share `u` of the domain, 0 to below 1; a grid is a choice, in an order that its writing does not decide."""
        if self.domain not in _NUMBERS:
            return sorted(self.values, key=json.dumps)[int(u * len(self.values))]
        low, high = self.values
        if self.domain == "randint":
            return int(low + u * (high - low))
        return rounded(low * (high / low) ** u if self.domain == "loguniform" else low + u * (high - low))


def rounded(value: Any) -> Any:
    """A number with four significant digits, so that names of arms can be read; other values as they are."""
    return float(f"{value:.{_DIGITS}g}") if isinstance(value, float) else value


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One config of a sweep."""

    name: str
    """Changes to the base, as text; `base` for the base."""
    changes: tuple[tuple[str, Any], ...]
    """Dotted field and value."""
    config: Config
    """The config with the changes. Seed, output and inputs are those of the base."""
    key: str
    """Fingerprint of the parts that an arm may change."""


def entries(space: Sequence[Mapping[str, Sequence[Any]]]) -> list[list[Factor]]:
    """Read `tune.space`: one list of factors per object.

    Raises:
        UserError: An object or a list of values is empty, a domain is not one, or an arm may not change the field.
    """
    found = []
    for entry in space:
        empty = [field for field, values in entry.items() if not values]
        if not entry or empty:
            msg = (f'tune.space: {dict(entry)}: must give each field a list of values, '
                   'for example {"objective.view": ["dropout", "mask"]}')  # fmt: skip
            raise UserError(msg)
        for field in entry:
            if field.split(".")[0] in OWN:
                msg = f"tune.space: {field}: an arm cannot change it; vary a field of model, objective, train, vocab, tokens, qc, embed or classify"
                raise UserError(msg)
            if field in WITHOUT_EFFECT:
                msg = f"tune.space: {field}: has no effect in a sweep, which scores the weights at tune.rungs; vary another field"
                raise UserError(msg)
        found.append([_factor(field, tuple(values)) for field, values in entry.items()])
    return found


def _factor(field: str, values: tuple[Any, ...]) -> Factor:
    """A field with its list, or with the domain that a single text gives."""
    found = (
        re.fullmatch(r"(\w+)\((.*)\)", values[0].strip()) if len(values) == 1 and isinstance(values[0], str) else None
    )
    if found is None:
        return Factor(field, values)
    kind, inside = found.groups()
    try:
        arguments = json.loads(f"[{inside}]")
    except json.JSONDecodeError:
        arguments = [_plain(part.strip()) for part in inside.split(",")]
    factor = Factor(field, tuple(arguments), kind)
    if kind == "choice" and arguments:
        return factor
    wanted = int if kind == "randint" else (int, float)
    numbers = [v for v in arguments if isinstance(v, wanted) and not isinstance(v, bool)]
    ends = kind in _NUMBERS and len(numbers) == len(arguments) == 2 and numbers[0] < numbers[1]
    if ends and (kind != "loguniform" or numbers[0] > 0):
        return factor
    msg = (f"tune.space: {field} = {values[0]!r}: must be a list, uniform(low, high), loguniform(low, high) with low above 0, "
           "randint(low, high) of whole numbers, or choice(a, b, ...)")  # fmt: skip
    raise UserError(msg)


def _plain(text: str) -> Any:
    """JSON, or text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def factors(config: Config) -> dict[str, Factor]:
    """All fields that a sweep varies, and their values; a field of several objects has the values of all of them.

    Raises:
        UserError: `tune.space` is empty or wrong, a value is not allowed where it stands, or the kind of search cannot use it.
    """
    if not config.tune.space:
        msg = "tune.space: empty, so there is nothing to compare; give factors, or --recipe cl_ablation or data_ladder"
        raise UserError(msg)
    found: dict[str, Factor] = {}
    for factor in itertools.chain.from_iterable(entries(config.tune.space)):
        before = found.get(factor.field)
        if before is not None and (before.domain or factor.domain or config.tune.search != "grid"):
            msg = f"tune.space: {factor.field}: is in two objects; only lists of a grid search may be"
            raise UserError(msg)
        if factor.domain and config.tune.search == "grid":
            msg = (f"tune.space: {factor.field} = {factor.text}: a grid search needs a list of values; "
                   "or set tune.search=random or tune.search=optuna")  # fmt: skip
            raise UserError(msg)
        if config.tune.search == "optuna" and factor.field.split(".")[0] in names(Config, role="corpus"):
            msg = (f"tune.space: {factor.field}: needs a corpus for each value, which tune.search = 'optuna' does not make; "
                   "use tune.search=random")  # fmt: skip
            raise UserError(msg)
        ends = (factor.values[0], factor.values[1] - 1) if factor.domain == "randint" else factor.values
        for value in ends if factor.domain in _NUMBERS else ():
            make(config, {factor.field: value})
        values = (
            factor.values if before is None else tuple(dict.fromkeys(map(json.dumps, (*before.values, *factor.values))))
        )
        found[factor.field] = factor if before is None else replace(factor, values=tuple(map(json.loads, values)))
    return found


def arms(config: Config) -> list[Arm]:
    """The arms of a sweep that are known before it begins, each once, the base first. Optuna chooses its arms later.

    Raises:
        UserError: As `factors`.
    """
    space = factors(config)
    base = make(config, {})
    wanted = {"grid": _grid(config), "random": _random(config, list(space.values())), "optuna": iter(())}
    found = {base.key: base}
    most = config.tune.num_arms + 1 if config.tune.search == "random" else None
    for arm in wanted[config.tune.search]:
        found.setdefault(arm.key, arm)
        if len(found) == most:
            break
    return list(found.values())


def _grid(config: Config) -> Iterator[Arm]:
    for space in entries(config.tune.space):
        for values in itertools.product(*(factor.values for factor in space)):
            yield make(config, {factor.field: value for factor, value in zip(space, values, strict=True)})


def _random(config: Config, space: Sequence[Factor]) -> Iterator[Arm]:
    """Arms drawn at random. A draw depends on the seed, its number and the field, so the order of fields does not matter."""
    keys = {factor.field: int(fingerprint(factor.field)[:8], 16) for factor in space}
    seen = set()
    for number in range(_MOST_DRAWS * config.tune.num_arms):
        draws = {f.field: np.random.default_rng([config.seed, _RANDOM, number, keys[f.field]]).random() for f in space}
        drawn = {factor.field: factor.at(draws[factor.field]) for factor in space}
        if (text := json.dumps(drawn, sort_keys=True)) not in seen:
            seen.add(text)
            yield make(config, drawn)


def point(arm: Arm, fields: Sequence[str]) -> dict[str, Any]:
    """An arm as hyperparameters: the value of every varied field, other than numbers and words as JSON text."""
    values = by_field(arm.config)
    return {field: scalar(values[field]) for field in fields}


def scalar(value: Any) -> Any:
    """A value as Ray Tune and Optuna take it: numbers and words as they are, others as JSON text."""
    return value if isinstance(value, str | int | float) or value is None else json.dumps(value, sort_keys=True)


def from_point(config: Config, chosen: Mapping[str, Any]) -> Arm:
    """The arm of some hyperparameters (see `point`)."""
    return make(config, {field: rounded(value) for field, value in chosen.items()})


def make(config: Config, changes: Mapping[str, Any]) -> Arm:
    """The arm with the given changes (dotted field to value).

    Raises:
        UserError: A field or value is not allowed.
    """
    try:
        changed = override(config, [f"{field}={_text(value)}" for field, value in changes.items()])
    except UserError as error:
        msg = f"tune.space: {error}"
        raise UserError(msg) from None
    changed = _canonical(changed, config)
    old, new = by_field(config), by_field(changed)
    differing = tuple((field, new[field]) for field in sorted(new) if new[field] != old[field])
    name = ", ".join(f"{field.rsplit('.', 1)[1]}={_text(value)}" for field, value in differing) or BASE
    part = {name: value for name, value in to_dict(changed).items() if name not in OWN}
    return Arm(name=name, changes=differing, config=changed, key=fingerprint(part))


def _canonical(changed: Config, base: Config) -> Config:
    """Without a contrast, set the fields that only the contrast uses to those of the base."""
    o = changed.objective
    if o.contrast_weight > 0 or o.simcsepp_weight > 0 or o.ortholog_weight > 0:
        return changed
    kept = {name: getattr(base.objective, name) for name in names(base.objective, role="contrast")}
    return replace(changed, objective=replace(o, **kept))


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def rungs(config: Config, num_steps: int) -> list[int]:
    """Steps after which a training of `num_steps` steps is evaluated, ascending; the last is `num_steps`."""
    return sorted({max(1, round(share * num_steps)) for share in config.tune.rungs})


def survivors(scores: Mapping[str, Sequence[float]], keep: float, seeds: int) -> list[str]:
    """Arms that go on after a rung: the base, and the best arms by mean score over seeds.

    Args:
        scores: Arm key to its scores at the rung, one per seed that reached it; the base first.
        keep: Share of all arms that go on, rounded up.
        seeds: Number of trainings of an arm. An arm with fewer scores has failed and does not go on.

    Returns:
        Keys in the order of `scores`. Among equal arms the earlier is preferred.
    """
    base, *_ = scores
    whole = [key for key, values in scores.items() if len(values) == seeds]
    best = sorted(whole, key=lambda key: -float(np.mean(scores[key])))
    chosen = set(best[: int(np.ceil(keep * len(scores)))]) | ({base} & set(whole))
    return [key for key in scores if key in chosen]

"""The arms of a sweep: the configs of a search space, and those that go on after a rung. Pure functions.

An entry of `tune.space` is one factor, or several factors that are crossed. Arms that differ only in a field without effect
(such as the temperature of a contrast of weight 0) are one arm.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mixgf import rng
from mixgf.config.fields import names
from mixgf.config.parse import by_field, fingerprint, override, to_dict
from mixgf.config.run import Config
from mixgf.errors import UserError

_RANDOM = 0x54554E45
"""Key of the random draw of arms (`tune.search = random`)."""
BASE = "base"
"""Name of the arm with the config as it is. The other arms are compared with it."""
OWN = names(Config, swept=False)
"""Parts of the config that an arm may not change."""


@dataclass(frozen=True, slots=True)
class Factor:
    """One field and the values it takes."""

    field: str
    values: tuple[Any, ...]


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
    """Read `tune.space`: one list of factors per entry.

    Raises:
        UserError: An entry or a list of values is empty, or an arm may not change the field.
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
        found.append([Factor(field, tuple(values)) for field, values in entry.items()])
    return found


def arms(config: Config) -> list[Arm]:
    """The arms of a sweep, each once, the base first.

    Raises:
        UserError: `tune.space` is empty or wrong, or a value is not allowed where it stands.
    """
    if not config.tune.space:
        msg = "tune.space: empty, so there is nothing to compare; give factors, or --recipe cl_ablation or data_ladder"
        raise UserError(msg)
    spaces = entries(config.tune.space)
    if config.tune.search == "random":
        spaces = [[factor for space in spaces for factor in space]]
    found = {base.key: base for base in [make(config, {})]}
    for space in spaces:
        for values in itertools.product(*(factor.values for factor in space)):
            arm = make(config, {factor.field: value for factor, value in zip(space, values, strict=True)})
            found.setdefault(arm.key, arm)
    base, *others = found.values()
    if config.tune.search == "random" and len(others) > config.tune.num_arms:
        order = np.argsort([float(rng.uniform(int(arm.key[:15], 16), config.seed, after=_RANDOM)) for arm in others])
        others = [others[i] for i in np.sort(order[: config.tune.num_arms])]
    return [base, *others]


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

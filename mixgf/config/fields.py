"""Facts about config fields, declared once on the field and read by every stage.

A field of a config section is declared as `name: type = option(default, ...)`. The facts stand in the field's dataclass
metadata (`Facts`). The readers here answer the questions that the stages ask:

| question | reader |
|---|---|
| Is the value allowed? | `check` |
| Which fields decide the content of an artifact? | `content_of` |
| Which fields have a certain role? | `names` |
| Which values are paths on this machine? | `with_absolute_paths` |

`least`, `above`, `most`, `below` and `choices` hold for each item of a list and each value of a mapping. Every number has a lower
or an upper limit of its own. Beside these, numbers are finite, whole numbers lie within `MOST_WHOLE` and others within
`MOST_NUMBER`, and text has no line breaks and at most `longest` characters.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from mixgf.config.checks import require

T = TypeVar("T")
_KEY = "mixgf"
MOST_WHOLE = 2**31 - 1
"""Largest whole number of a field without `most` or `below`; below 0, the smallest."""
MOST_NUMBER = 1e12
"""The same for other numbers."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What is known of a field beside its type, default and docstring."""

    path: bool = False
    """The value is a path or URI, or several of them."""
    path_endings: tuple[str, ...] = ()
    """A value with one of these endings is a path or URI; another value is not."""
    result: bool = True
    """The field can change the content of the artifact. Where false, it only changes speed, cost or what is printed."""
    omit_default: bool = False
    """The default stays out of the recorded content. For fields that were added later: older artifacts stay valid."""
    role: str = ""
    """The part of a section that the field belongs to. Each section that uses roles lists them."""
    stages: tuple[str, ...] = ()
    """For a section: the commands that read it."""
    swept: bool = True
    """For a section: `tune.space` may vary its fields."""
    unit: str = ""
    """Unit of the number, for `--help`."""
    shared_name: str = ""
    """For a mapping: the name that a single value without a name gets. It then holds for all names."""
    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    named: tuple[tuple[str, int], ...] = ()
    """Names of values, such as a published convention; a config holds the value."""
    longest: int = 4096
    """Most characters of a text."""
    lines: bool = False
    """A text may have line breaks."""
    word: str = ""
    """Allowed beside the numbers, for messages: `'all'` or `null`. The field's type says so too."""

    @property
    def limits_size(self) -> bool:
        """Whether the field has an upper limit of its own."""
        return self.most is not None or (self.below is not None and self.below > 0)

    @property
    def allowed(self) -> str:
        """The allowed values in words; empty where the type says all."""
        if self.choices:
            return "one of " + ", ".join(repr(choice) for choice in self.choices)
        bounds = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        words = " and ".join(f"{word} {limit:.12g}" for word, limit in bounds.items() if limit is not None)
        others = [*(repr(name) for name, _ in self.named), *([self.word] if self.word else [])]
        return " or ".join([words, *others]) if words else words


def option(default: T, **facts: Any) -> T:
    """A config field with a default and `Facts`; a mapping or a section as default is copied for every config."""
    return cast(
        "T",
        _field(facts, default_factory=lambda: dict(default))
        if isinstance(default, dict)
        else _field(facts, default=default),
    )


def section(make: Callable[[], T], **facts: Any) -> T:
    """A field that holds a nested section, made by `make`."""
    return cast("T", _field(facts, default_factory=make))


def required(**facts: Any) -> Any:
    """A config field without a default."""
    return _field(facts)


def _field(facts: dict[str, Any], **default: Any) -> Any:
    return dataclasses.field(**default, metadata={_KEY: Facts(**facts)})


def facts_of(cls: Any) -> dict[str, Facts]:
    """The facts of every field of a section, given as class or instance."""
    return {field.name: field.metadata.get(_KEY, Facts()) for field in dataclasses.fields(cls)}


def names(cls: Any, **wanted: Any) -> tuple[str, ...]:
    """The fields with all of the wanted facts, for example `names(Classify, role="cells")`."""
    return tuple(
        name
        for name, facts in facts_of(cls).items()
        if all(getattr(facts, fact) == value for fact, value in wanted.items())
    )


def required_names(cls: Any) -> tuple[str, ...]:
    """The fields without a default."""
    missing = dataclasses.MISSING
    return tuple(f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing)


def sections_of(cls: Any, stage: str) -> tuple[str, ...]:
    """The sections of a config that a stage reads."""
    return tuple(name for name, facts in facts_of(cls).items() if stage in facts.stages)


def content_of(part: Any, **wanted: Any) -> dict[str, Any]:
    """The fields of a section that decide an artifact's content, as plain JSON data.

    An empty mapping is recorded as an empty list, as earlier versions did, so that their fingerprints stay valid.

    Args:
        part: The section.
        wanted: Further facts that a field must have, for example `role="cells"`.
    """
    chosen = names(part, result=True, **wanted)
    data = {name: value for name, value in json.loads(json.dumps(dataclasses.asdict(part))).items() if name in chosen}
    later = names(part, omit_default=True)
    defaults = {field.name: _default(field) for field in dataclasses.fields(part) if field.name in later}
    kept = {name: value for name, value in data.items() if name not in later or getattr(part, name) != defaults[name]}
    return {name: [] if value == {} else value for name, value in kept.items()}


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def check(part: Any, path: str) -> None:
    """Check a section's values against the bounds and choices of its fields.

    Raises:
        UserError: A value is not allowed.
    """
    for field in dataclasses.fields(part):
        facts: Facts = field.metadata.get(_KEY, Facts())
        where = f"{path}.{field.name}" if path else field.name
        fractions, found = "float" in str(field.type), getattr(part, field.name)
        for name in found if isinstance(found, Mapping) else ():
            require(not (allowed := _refusal(name, Facts(), fractions=False)), f"{where}: name", name, allowed)
        for value in _single_values(found):
            allowed = _refusal(value, facts, fractions=fractions)
            require(not allowed, where, value, allowed)


def _single_values(value: Any) -> Iterator[Any]:
    """The value, the items of a list, or the values of a mapping and their items; nothing for None."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _single_values(item)
    elif isinstance(value, tuple):
        yield from value
    elif value is not None:
        yield value


def _refusal(value: Any, facts: Facts, *, fractions: bool) -> str:
    """What a value must be, where it is not; `fractions` says whether a number may have some."""
    if facts.choices:
        return "" if value in facts.choices else facts.allowed
    if isinstance(value, str):  # a text, or a word beside the numbers, such as "all": the field's type allows it
        return _text_refusal(value, facts)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    if not fractions and not isinstance(value, int):
        return "a whole number" + f", {facts.allowed}" * bool(facts.allowed)
    largest = MOST_NUMBER if fractions else MOST_WHOLE
    if _within(value, facts) and (facts.limits_size or abs(value) <= largest):  # NaN is within no limits
        return ""
    return (
        facts.allowed if abs(value) <= largest else f"{facts.allowed or 'a finite number'}, and within {largest:,.0f}"
    )


def _text_refusal(text: str, facts: Facts) -> str:
    if len(text) > facts.longest:
        return f"text of at most {facts.longest:,} characters, not {len(text):,}"
    return "" if facts.lines or not {"\0", "\n", "\r"} & set(text) else "text without line breaks"


def _within(value: float, facts: Facts) -> bool:
    if value != value or abs(value) == float("inf"):  # noqa: PLR0124 (NaN is not itself)
        return False
    return (
        (facts.least is None or value >= facts.least)
        and (facts.above is None or value > facts.above)
        and (facts.most is None or value <= facts.most)
        and (facts.below is None or value < facts.below)
    )


def absolute(uri: str) -> str:
    """A local path as absolute path; other URIs, `resource:` and the empty string stay as they are."""
    local = uri and "://" not in uri and not uri.startswith("resource:")
    return str(Path(uri).expanduser().absolute()) if local else uri


def with_absolute_paths(part: T) -> T:
    """The same config or section with absolute local paths, because workers have working folders of their own."""
    changes = {name: _absolute(getattr(part, name), facts) for name, facts in facts_of(part).items()}
    return cast("T", dataclasses.replace(cast("Any", part), **changes))


def _absolute(value: Any, facts: Facts) -> Any:
    if dataclasses.is_dataclass(value):
        return with_absolute_paths(value)
    if isinstance(value, tuple):
        return tuple(_absolute(item, facts) for item in value)
    if isinstance(value, Mapping):
        return {name: _absolute(item, facts) for name, item in value.items()}
    if isinstance(value, str) and (facts.path or value.lower().endswith(facts.path_endings or ("\0",))):
        return absolute(value)
    return value

"""Numbers with a range as types of fields, and the check of settings against them.

``--help`` shows the range as the type of a field. `check_settings` refuses what is outside, for
settings from the command line and for those made in Python with the same message.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Callable
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, NamedTuple

from train.config.base import require


class Range(NamedTuple):
    """The numbers that a field accepts.

    `kind` is int or float, `expected` says the range in words that follow "must be", and `holds` says
    whether a number lies in it; infinite numbers have been refused before.
    """

    kind: type
    expected: str
    holds: Callable[[Any], bool]


RANGES: dict[Any, Range] = {
    int: Range(int, "an integer", lambda value: True),
    float: Range(float, "a finite number", math.isfinite),
}
"""The range behind every type of a field that holds a number."""


def _restricted(
    shown: str, expected: str, holds: Callable[[Any], bool], kind: type[int] | type[float] = float
) -> type:
    """Makes a type of fields that ``--help`` shows by kind and `shown`; fields hold plain numbers."""
    restricted = type(f"{kind.__name__} {shown}", (kind,), {})
    RANGES[restricted] = Range(kind, expected, holds)
    return restricted


if TYPE_CHECKING:
    PositiveInt = int
    NonNegativeInt = int
    TwoOrMore = int
    TenOrMore = int
    Seed = int
    PositiveFloat = float
    NonNegativeFloat = float
    AboveOne = float
    ClosedUnitInterval = float
    OpenUnitInterval = float
    Share = float
    BelowOne = float
    BelowHalf = float
else:
    PositiveInt = _restricted("> 0", "positive", lambda n: n > 0, int)
    NonNegativeInt = _restricted(">= 0", "0 or larger", lambda n: n >= 0, int)
    TwoOrMore = _restricted(">= 2", "2 or larger", lambda n: n >= 2, int)
    TenOrMore = _restricted(">= 10", "10 or larger", lambda n: n >= 10, int)
    Seed = _restricted("in [0, 2**32)", "in [0, 2**32)", lambda n: 0 <= n < 2**32, int)
    PositiveFloat = _restricted("> 0", "positive", lambda x: x > 0)
    NonNegativeFloat = _restricted(">= 0", "0 or larger", lambda x: x >= 0)
    AboveOne = _restricted("> 1", "above 1", lambda x: x > 1)
    ClosedUnitInterval = _restricted("in [0, 1]", "in [0, 1]", lambda x: 0 <= x <= 1)
    OpenUnitInterval = _restricted("in (0, 1)", "between 0 and 1", lambda x: 0 < x < 1)
    Share = _restricted("in (0, 1]", "in (0, 1]", lambda x: 0 < x <= 1)
    BelowOne = _restricted("in [0, 1)", "in [0, 1)", lambda x: 0 <= x < 1)
    BelowHalf = _restricted("in [0, 0.5)", "in [0, 0.5)", lambda x: 0 <= x < 0.5)


def check_settings(settings: Any, name: str = "") -> None:
    """Checks every number of a dataclass and of those in it, then what its fields say together.

    A dataclass whose fields depend on each other has a method ``check_together(name)`` for that.
    `name` is the field that holds the settings, empty for those of a command. Raises `UserError`, which
    names the first field that cannot be used.

    Example:
        >>> check_settings(TextOptions(path="a.txt", stride=0), "texts.wiki")
        Traceback (most recent call last):
        train.config.base.UserError: texts.wiki.stride must be positive, got 0.
    """
    for field, hint in _hints(type(settings)).items():
        _check_field(getattr(settings, field), hint, f"{name}.{field}" if name else field)
    if hasattr(settings, "check_together"):
        settings.check_together(name)


@functools.cache
def _hints(settings: type) -> dict[str, Any]:
    hints = typing.get_type_hints(settings)
    return {field.name: hints[field.name] for field in dataclasses.fields(settings)}


def _check_field(value: Any, hint: Any, name: str) -> None:
    """Checks a value, or every value of a dictionary or list, against the type of its field."""
    union = typing.get_origin(hint) in (typing.Union, UnionType)
    kinds = typing.get_args(hint) if union else (hint,)
    inner = {typing.get_origin(kind): typing.get_args(kind) for kind in kinds}
    if dataclasses.is_dataclass(value):
        check_settings(value, name)
    elif isinstance(value, dict) and dict in inner:
        for key, item in value.items():
            place = f"{name}.{key}" if dataclasses.is_dataclass(item) else f"{name}[{key!r}]"
            _check_field(item, inner[dict][1], place)
    elif isinstance(value, list | tuple) and list in inner:
        for index, item in enumerate(value):
            _check_field(item, inner[list][0], f"{name}[{index}]")
    elif not ((value is None and NoneType in kinds) or value in inner.get(typing.Literal, ())):
        for kind in kinds:
            if kind in RANGES:
                _check_number(value, RANGES[kind], name)


def _check_number(value: Any, allowed: Range, name: str) -> None:
    number, called = (Integral, "an integer") if allowed.kind is int else (Real, "a number")
    require(isinstance(value, number) and not isinstance(value, bool), name, value, called)
    require(not math.isinf(value), name, value, "finite")
    require(allowed.holds(value), name, value, allowed.expected)

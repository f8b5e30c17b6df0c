"""Parsers whose flags and files fill the fields of dataclasses."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from jsonargparse import ArgumentParser
from jsonargparse.typing import register_type

from train.config.ranges import RANGES


def configured(name: str, config_type: type, arguments: Sequence[str]) -> Any:
    """Reads settings from files and flags; exits with status 2 and a message where they do not fit."""
    _register_ranges()
    parser = make_parser(name, "[--config FILE] [--FIELD VALUE ...]")
    parser.add_argument("--config", action="config", help="YAML file with the fields below.")
    parser.add_class_arguments(config_type, fail_untyped=True)
    parsed = parser.parse_args(list(arguments))
    del parsed["config"]
    return config_type(**parser.instantiate(parsed).as_dict())


def make_parser(name: str, usage: str) -> ArgumentParser:
    """Makes the parser of a command, still without arguments."""
    prog = f"python -m train {name}"
    return ArgumentParser(prog=prog, usage=f"{prog} {usage}")


@functools.cache
def _register_ranges() -> None:
    """Lets parsers fill fields of restricted types with plain numbers.

    They accept any number: `check_settings` has the better message for one that is out of range.
    """
    for restricted, (kind, _, _) in RANGES.items():
        if restricted is not kind:
            register_type(
                restricted,
                serializer=kind,
                deserializer=functools.partial(_number, kind),
                type_check=functools.partial(_is_number, kind),
            )


def _is_number(kind: type, value: Any, _: type) -> bool:
    return type(value) is kind


def _number(kind: type, value: Any) -> Any:
    if isinstance(value, str) or type(value) is int:
        return kind(value)
    raise ValueError(f"{value!r} is no {kind.__name__}")

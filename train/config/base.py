"""What all settings share: the error that users see, and a flat view of nested fields."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

DType = Literal["float32", "bfloat16", "float16"]


class UserError(ValueError):
    """Something the user gave cannot be used; the message says what was found and what to do.

    The command line prints the message alone, without a traceback, and exits with status 2.
    """


def flatten(config: Any) -> dict[str, Any]:
    """Returns a configuration as ``{"trainer.steps": 10, …}``, in the order of its fields."""
    flat: dict[str, Any] = {}
    # `asdict` also makes dicts, which JSON can hold, of groups of fields that the user names.
    for name, plain in dataclasses.asdict(config).items():
        value = getattr(config, name)
        if dataclasses.is_dataclass(value):
            flat |= {f"{name}.{key}": inner for key, inner in flatten(value).items()}
        else:
            flat[name] = plain
    return flat


def require(condition: bool, name: str, value: Any, expected: str) -> None:
    """Raises `UserError` naming the field, what was found and what is expected."""
    if not condition:
        raise UserError(f"{name} must be {expected}, got {value!r}.")

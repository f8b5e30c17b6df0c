"""Which parameters are trained, and how the others are kept apart from them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from flax.traverse_util import flatten_dict, unflatten_dict

from train.config import ModelOptions, UserError
from train.models.lora import is_adapter
from train.types import Params

Path = tuple[str, ...]
Trained = Callable[[Path], bool]


def choose(options: ModelOptions, paths: Sequence[Path]) -> Trained:
    """A test of a parameter's path: whether the settings say that the parameter is trained.

    Raises `UserError` if a pattern is broken or finds nothing, nothing is left to train, or the
    fields exclude each other.
    """
    given = [name for name in ("lora", "freeze", "trainable") if getattr(options, name)]
    if len(given) > 1:
        raise UserError(f"model.{given[0]} and model.{given[1]} are both set; give one of them.")
    if options.lora is not None:
        return is_adapter
    if options.trainable is not None:
        chosen = _matching(options.trainable, "model.trainable", paths)
    else:
        chosen = set(paths) - _matching(options.freeze, "model.freeze", paths)
    if not chosen:
        raise UserError(f"model.{(given or ['trainable'])[0]} leaves no parameter to train.")
    return lambda path: path in chosen


def _matching(patterns: Sequence[str], name: str, paths: Sequence[Path]) -> set[Path]:
    """The paths in which one of the patterns is found."""
    found = set()
    for pattern in patterns:
        try:
            matching = {path for path in paths if re.search(pattern, ".".join(path))}
        except re.error as error:
            raise UserError(f"{name}: {pattern!r} is no regular expression ({error}).") from error
        if not matching:
            known = ", ".join(".".join(path) for path in paths)
            raise UserError(f"{name}: {pattern!r} is found in no parameter. There are {known}.")
        found |= matching
    return found


def leaf_paths(tree: Params) -> list[Path]:
    """Paths of the leaves of a nested dict, in its order."""
    return list(flatten_dict(tree))


def split(tree: Params, trained: Trained) -> tuple[Params, Params]:
    """Splits a nested dict into what is trained and the rest, without empty dicts.

    Example:
        >>> split({"a": {"x": 1, "y": 2}}, lambda path: path[-1] == "x")
        ({'a': {'x': 1}}, {'a': {'y': 2}})
    """
    flat = flatten_dict(tree)
    ours = {path: leaf for path, leaf in flat.items() if trained(path)}
    others = {path: leaf for path, leaf in flat.items() if not trained(path)}
    return unflatten_dict(ours), unflatten_dict(others)


def join(first: Params, second: Params) -> Params:
    """Puts two nested dicts together; inverse of `split` up to the order of keys."""
    return unflatten_dict({**flatten_dict(first), **flatten_dict(second)})

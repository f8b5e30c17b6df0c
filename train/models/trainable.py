"""Which parameters are trained, and how the others are kept out of the optimizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from train.config import ModelOptions, UserError
from train.models.lora import is_adapter
from train.objectives.accumulate import Batch, Parted

Path = tuple[str, ...]
Trained = Callable[[Path], bool]


def choose(options: ModelOptions, paths: Sequence[Path]) -> Trained:
    """The parameters that the settings say are trained.

    Args:
        options: `lora`, `freeze` and `trainable` are read.
        paths: of all parameters.

    Returns:
        A test of a parameter's path.

    Raises:
        UserError: a pattern is broken or finds nothing, nothing is left to train, or the fields
            exclude each other.
    """
    given = [name for name in ("lora", "freeze", "trainable") if getattr(options, name)]
    if len(given) > 1:
        raise UserError(f"model.{given[0]} and model.{given[1]} are both set; give one of them.")
    if options.lora is not None:
        return is_adapter
    if options.trainable is not None:
        found = _found(options.trainable, "model.trainable", paths)
        chosen = found
    else:
        found = _found(options.freeze, "model.freeze", paths)
        chosen = set(paths) - found
    if not chosen:
        raise UserError(f"model.{(given or ['trainable'])[0]} leaves no parameter to train.")
    return lambda path: path in chosen


def _found(patterns: Sequence[str], name: str, paths: Sequence[Path]) -> set[Path]:
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


def leaf_paths(tree: dict[str, Any], prefix: Path = ()) -> list[Path]:
    """Paths of the leaves of a nested dict, in its order."""
    paths: list[Path] = []
    for name, node in tree.items():
        path = (*prefix, name)
        paths += leaf_paths(node, path) if isinstance(node, dict) else [path]
    return paths


def split(tree: dict[str, Any], trained: Trained, prefix: Path = ()) -> tuple[Any, Any]:
    """Splits a nested dict into what is trained and the rest, without empty dicts.

    Example:
        >>> split({"a": {"x": 1, "y": 2}}, lambda path: path[-1] == "x")
        ({'a': {'x': 1}}, {'a': {'y': 2}})
    """
    ours: dict[str, Any] = {}
    others: dict[str, Any] = {}
    for name, node in tree.items():
        path = (*prefix, name)
        if isinstance(node, dict):
            for side, part in zip((ours, others), split(node, trained, path), strict=True):
                if part:
                    side[name] = part
        else:
            (ours if trained(path) else others)[name] = node
    return ours, others


def join(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Puts two nested dicts together; inverse of `split` up to the order of keys."""
    joined = dict(first)
    for name, node in second.items():
        joined[name] = join(joined[name], node) if name in joined else node
    return joined


def with_frozen(loss_fn: Any, frozen: dict[str, Any]) -> Any:
    """A loss of the trained parameters alone.

    Args:
        loss_fn: of all parameters, see `train.objectives.accumulate.Parted`.
        frozen: the others.
    """
    parted = loss_fn if isinstance(loss_fn, Parted) else Parted(loss_fn)
    whole, normalizers = parted.loss_fn, parted.normalizers

    def of_trained(params: Any, batch: Batch) -> Any:
        return whole(join(params, frozen), batch)

    def normalizers_of(params: Any, batch: Batch) -> Any:
        assert normalizers is not None
        return normalizers(join(params, frozen), batch)

    return Parted(
        of_trained,
        masses=parted.masses,
        sums=parted.sums,
        normalizers=None if normalizers is None else normalizers_of,
        derived=parted.derived,
    )

"""Whether the settings of an optimizer fit each other: what it needs is set, and nothing in vain."""

from __future__ import annotations

import dataclasses
from typing import get_args

import omerge_jax as om
from train.config import (
    AdamWOptions,
    Consensus,
    OptimizerName,
    OptimizerOptions,
    Sparsifier,
    UserError,
    check_settings,
)
from train.optimizers.build import make_optimizer, parameters

_COMMON = {item.name for item in dataclasses.fields(AdamWOptions)} | {"name"}
_REQUIRED = ("alpha", "density", "sparsifier", "consensus")
_UNREAD = {"adamw": (), "lion": ("eps",), "sgd": ("b1", "b2", "eps", "moment_dtype")}


def check_optimizer(options: AdamWOptions) -> None:
    """Checks the ranges of the settings, that none is missing and that none is set in vain.

    Raises `UserError`, which names the field, what was found and what the optimizer accepts.
    """
    check_settings(options, "optimizer")
    if not isinstance(options, OptimizerOptions):
        return
    for field in [item.name for item in dataclasses.fields(options) if item.name not in _COMMON]:
        _check_use(options, field)
    for field in _UNREAD[options.inner_name]:
        value = getattr(options, field)
        if value is not None:
            raise UserError(
                f"optimizer.{field} is set to {value!r}, but {options.inner_name} has no use for it. "
                "Unset it."
            )
    if options.storage == "recompute" and options.delta_dtype is not None:
        raise UserError(
            f"optimizer.delta_dtype is {options.delta_dtype}, but with storage recompute no delta is "
            "held. Unset it, or choose another optimizer.storage."
        )
    try:
        make_optimizer(options, 1e-3, steps=2**31)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"optimizer {options.name}: {error}") from error


def _check_use(options: OptimizerOptions, field: str) -> None:
    """Checks that a field is set where it is needed, and only where it is read."""
    value, shown = getattr(options, field), options.name
    choice, users = "optimizer.name", [n for n in get_args(OptimizerName) if field in _read_by(n)]
    if options.name == "online_merge":
        shown = f"online_merge of {options.sparsifier} and {options.consensus}"
        choice = "sparsifier or consensus"
        users = [s for s in get_args(Sparsifier) if field in parameters(getattr(om, s))]
    read = field in _read_by(options.name, options.sparsifier, options.consensus)
    if value is None and read and field in _REQUIRED:
        raise UserError(f"optimizer.{field} is not set; {shown} needs it.")
    if value is not None and not read:
        raise UserError(
            f"optimizer.{field} is set to {value!r}, but {shown} has no use for it (only "
            f"{', '.join(users) or 'consensus sign'}). Unset it, or choose another {choice}."
        )


def _read_by(
    name: OptimizerName, sparsifier: Sparsifier | None = None, consensus: Consensus | None = None
) -> set[str]:
    """Lists fields that an optimizer reads: parameters of its functions in `omerge_jax`, and ours.

    Where online_merge has no sparsifier or consensus, the fields of all of them count.
    """
    read = {"rounding", "seed"}
    if not name.endswith("_adamw"):
        read.add("moment_dtype")
    if name in ("adamw", "lion"):
        return read
    read |= parameters(getattr(om, name))
    if not name.endswith("_adamw"):
        read.add("inner")
    if "alpha" in read:
        read.add("delta_dtype")
    if name == "online_merge":
        parts = [sparsifier] if sparsifier else get_args(Sparsifier)
        parts = [*parts, *([consensus] if consensus else get_args(Consensus))]
        read |= {one for part in parts for one in parameters(getattr(om, part))}
    return read

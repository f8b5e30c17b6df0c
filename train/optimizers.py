"""Optimizers and learning-rate schedules by name, from the settings of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import omerge_jax as om
from train.config import (
    AdamWOptions,
    OptimizerName,
    OptimizerOptions,
    ScheduleOptions,
    UserError,
    require,
)

_MERGE = ("density", "every_k", "rescale", "seed", "diagnostics")
_DELTA = ("alpha", "delta_dtype", "storage", "rounding")
_DARE = (*_DELTA, *_MERGE, "clip", "delta_mask")
_TIES = (*_DELTA, *_MERGE, "election", "threshold")

FIELDS: dict[OptimizerName, tuple[str, ...]] = {
    "adamw": (),
    "on_dare": _DARE,
    "on_dare_adamw": _DARE,
    "on_ties": _TIES,
    "on_ties_adamw": _TIES,
    "child_tuning": (*_MERGE, "clip"),
}
"""Fields beyond those of AdamW that each optimizer has a use for."""

_ALL_FIELDS = tuple(dict.fromkeys((*_DARE, *_TIES)))
_REQUIRED = ("alpha", "density")


def takes_delta(options: OptimizerOptions) -> bool:
    """Whether the optimizer has a use for the reference delta, and with it for a base model."""
    return "alpha" in FIELDS[options.name]


def needs_delta(options: OptimizerOptions) -> bool:
    """Whether it cannot work without one: at alpha 0 nothing of the reference is added."""
    return takes_delta(options) and options.alpha != 0


def rounds_updates(options: AdamWOptions) -> bool:
    """Whether updates arrive in parameters that cannot hold them, at least on average."""
    if not isinstance(options, OptimizerOptions) or not needs_delta(options):
        return False
    return options.rounding != "nearest"


def check_optimizer(options: AdamWOptions) -> None:
    """Checks the ranges of the merge settings and that none is set in vain.

    Raises:
        UserError: names the field, what was found and what the optimizer accepts.
    """
    if not isinstance(options, OptimizerOptions):
        return
    name, accepted = options.name, FIELDS[options.name]
    for field in _ALL_FIELDS:
        value = getattr(options, field)
        if value is not None and field not in accepted:
            users = ", ".join(other for other in FIELDS if field in FIELDS[other])
            raise UserError(
                f"optimizer.{field} is set to {value!r}, but {name} has no use for it (only "
                f"{users}). Unset it, or choose another optimizer.name."
            )
        if value is None and field in accepted and field in _REQUIRED:
            raise UserError(f"optimizer.{field} is not set; {name} needs it.")
    if options.alpha is not None:
        require(0 <= options.alpha <= 1, "optimizer.alpha", options.alpha, "in [0, 1]")
    if options.density is not None:
        require(0 < options.density <= 1, "optimizer.density", options.density, "in (0, 1]")
    if options.every_k is not None:
        require(options.every_k >= 1, "optimizer.every_k", options.every_k, "1 or larger")
    if options.clip is not None:
        require(options.clip >= 0, "optimizer.clip", options.clip, "0 or larger")
    try:
        _transformation(options, 1e-3, 0)
    except (ValueError, TypeError) as error:
        raise UserError(f"optimizer {name}: {error}") from error


def make_schedule(options: ScheduleOptions, peak: float, steps: int) -> optax.Schedule:
    """Learning rate as a function of the number of updates done.

    Args:
        options: Shape and warm-up.
        peak: Largest rate.
        steps: Updates of the whole run; linear and cosine schedules end there.

    Raises:
        UserError: the warm-up is longer than the run.

    Example:
        >>> schedule = make_schedule(ScheduleOptions(type="linear", warmup_steps=2), 1.0, 6)
        >>> [float(schedule(step)) for step in range(7)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    warmup = options.warmup_steps
    require(warmup < steps, "schedule.warmup_steps", warmup, f"smaller than the {steps} steps")
    match options.type:
        case "constant":
            shape = optax.constant_schedule(peak)
        case "linear":
            shape = optax.linear_schedule(peak, options.final_scale * peak, steps - warmup)
        case "cosine":
            shape = optax.cosine_decay_schedule(peak, steps - warmup, options.final_scale)
    if warmup == 0:
        return shape
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), shape], [warmup])


def learning_rates(schedule: optax.Schedule, steps: int) -> np.ndarray:
    """The rate of every update, float32 ``[steps]``; known beforehand, so logging it is free."""
    return np.asarray(jax.vmap(lambda step: jnp.asarray(schedule(step)))(jnp.arange(steps)))


def make_optimizer(
    options: AdamWOptions,
    schedule: optax.ScalarOrSchedule,
    *,
    layer_axes: int | Callable[[tuple[str, ...]], int] = 0,
) -> optax.GradientTransformation:
    """Clipping, then the optimizer.

    Args:
        options: Settings that `check_optimizer` accepts.
        schedule: Learning rate.
        layer_axes: Leading axes of a leaf that are separate tensors, as `omerge_jax` takes it.

    Returns:
        The transformation. With a merging optimizer its state still needs the delta
        (`omerge_jax.with_delta`).
    """
    inner = _transformation(options, schedule, layer_axes)
    if not options.max_grad_norm:
        return inner
    return optax.chain(optax.clip_by_global_norm(options.max_grad_norm), inner)


def _transformation(
    options: AdamWOptions, schedule: optax.ScalarOrSchedule, layer_axes: Any
) -> optax.GradientTransformation:
    adam: dict[str, Any] = _given(options, ("b1", "b2", "eps"))
    adam["weight_decay"] = options.weight_decay
    if not isinstance(options, OptimizerOptions) or options.name == "adamw":
        return optax.adamw(schedule, **adam)
    merge = _given(options, FIELDS[options.name]) | {"layer_axes": layer_axes}
    merge.pop("delta_dtype", None)  # for whoever makes the delta
    if merge.get("clip") == 0:
        merge["clip"] = None
    match options.name:
        case "on_dare":
            return om.fused_chain(optax.adamw(schedule, **adam), om.on_dare(**merge))
        case "on_ties":
            return om.fused_chain(optax.adamw(schedule, **adam), om.on_ties(**merge))
        case "child_tuning":
            return om.fused_chain(optax.adamw(schedule, **adam), om.child_tuning(**merge))
        case "on_dare_adamw":
            return om.on_dare_adamw(schedule, **adam, **merge)
        case "on_ties_adamw":
            return om.on_ties_adamw(schedule, **adam, **merge)


def _given(options: AdamWOptions, names: tuple[str, ...]) -> dict[str, Any]:
    """Only the fields that are set: the others keep the optimizer's own defaults."""
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}

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
    AlphaOptions,
    OptimizerName,
    OptimizerOptions,
    ScheduleOptions,
    UserError,
    require,
)
from train.optimizers.moments import with_moments_in

_PLAIN = ("rounding", "seed", "moment_dtype")
_MERGE = ("density", "every_k", "rescale", "seed", "diagnostics", "rounding")
_INNER = ("inner", "moment_dtype")
_DELTA = ("alpha", "delta_dtype", "storage")
_DARE = (*_DELTA, *_MERGE, "clip", "delta_mask")
_TIES = (*_DELTA, *_MERGE, "election", "threshold")
_GENERAL = (*_DELTA, *_MERGE, *_INNER, "sparsifier", "consensus", "delta_mask")

FIELDS: dict[OptimizerName, tuple[str, ...]] = {
    "adamw": _PLAIN,
    "lion": _PLAIN,
    "on_dare": (*_DARE, *_INNER),
    "on_dare_adamw": _DARE,
    "on_ties": (*_TIES, *_INNER),
    "on_ties_adamw": _TIES,
    "child_tuning": (*_MERGE, *_INNER, "clip"),
    "keep_largest": (*_MERGE, *_INNER, "threshold"),
    "online_merge": (*_GENERAL, "clip", "threshold", "epsilon", "gamma", "election"),
}
"""Fields beyond those of AdamW that each optimizer has a use for."""

SPARSIFIERS: dict[str, tuple[str, ...]] = {
    "random": ("density", "rescale", "clip", "seed"),
    "magnitude": ("density", "rescale", "threshold", "seed"),
    "magnitude_ranked": ("density", "rescale", "epsilon", "seed"),
    "band": ("density", "rescale", "gamma", "seed"),
    "identity": (),
}
"""Fields that each sparsifier of online_merge has a use for."""

_ALL_FIELDS = tuple(dict.fromkeys(field for fields in FIELDS.values() for field in fields))
_REQUIRED = ("alpha", "density", "sparsifier", "consensus")
_MERGED_BY_LIBRARY = (
    "every_k",
    "rescale",
    "delta_mask",
    "clip",
    "election",
    "threshold",
    "storage",
)


def takes_delta(options: OptimizerOptions) -> bool:
    """Whether the optimizer has a use for the reference delta, and with it for a base model."""
    return "alpha" in FIELDS[options.name]


def needs_delta(options: AdamWOptions) -> bool:
    """Whether it cannot work without one: at alpha 0 nothing of the reference is added."""
    return isinstance(options, OptimizerOptions) and takes_delta(options) and options.alpha != 0


def holds_delta(options: AdamWOptions) -> bool:
    """Whether its state holds a delta, which has to be set before the first step."""
    return needs_delta(options) and not recomputes_delta(options)


def delta_on_host(options: AdamWOptions) -> bool:
    """Whether the delta lies in the host's memory."""
    return holds_delta(options) and getattr(options, "storage", None) == "pinned_host"


def recomputes_delta(options: AdamWOptions) -> bool:
    """Whether every update has to be given the parameters of the reference and of the base."""
    if not isinstance(options, OptimizerOptions):
        return False
    return needs_delta(options) and options.storage == "recompute"


def rounds_updates(options: AdamWOptions) -> bool:
    """Whether updates arrive in parameters that cannot hold them, at least on average."""
    if not isinstance(options, OptimizerOptions):
        return False
    if needs_delta(options):
        return options.rounding != "nearest"
    return options.rounding in ("stochastic", "compensated")


def check_optimizer(options: AdamWOptions) -> None:
    """Checks the ranges of the merge settings and that none is set in vain.

    Raises:
        UserError: names the field, what was found and what the optimizer accepts.
    """
    if not isinstance(options, OptimizerOptions):
        return
    name, accepted = options.name, fields_of(options)
    for field in _ALL_FIELDS:
        value = getattr(options, field)
        if value is not None and field not in accepted:
            raise UserError(
                f"optimizer.{field} is set to {value!r}, but {_shown(options)} has no use for it (only "
                f"{', '.join(_users(field, options))}). Unset it, or choose another {_choice(options)}."
            )
        if value is None and field in accepted and field in _REQUIRED:
            raise UserError(f"optimizer.{field} is not set; {_shown(options)} needs it.")
    _check_alpha(options.alpha)
    _check_inner(options)
    if options.storage == "recompute" and options.delta_dtype is not None:
        raise UserError(
            f"optimizer.delta_dtype is {options.delta_dtype}, but with storage recompute no delta is "
            "held. Unset it, or choose another optimizer.storage."
        )
    if options.density is not None:
        require(0 < options.density <= 1, "optimizer.density", options.density, "in (0, 1]")
    if options.every_k is not None:
        require(options.every_k >= 1, "optimizer.every_k", options.every_k, "1 or larger")
    if options.clip is not None:
        require(options.clip >= 0, "optimizer.clip", options.clip, "0 or larger")
    try:
        _transformation(options, 1e-3, 0, 2**31)
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(f"optimizer {name}: {error}") from error


def fields_of(options: OptimizerOptions) -> tuple[str, ...]:
    """The fields beyond those of AdamW that the chosen optimizer, as it is put together, reads."""
    fields = FIELDS[options.name]
    if options.name != "online_merge" or options.sparsifier is None:
        return fields
    # The seed also fixes the rounding; election belongs to the other part of a merge.
    kept = {*_GENERAL, *SPARSIFIERS[options.sparsifier]}
    kept -= {"density", "rescale"} - set(SPARSIFIERS[options.sparsifier])
    if options.consensus == "sign":
        kept |= {"election"}
    return tuple(field for field in fields if field in kept)


def _shown(options: OptimizerOptions) -> str:
    if options.name != "online_merge":
        return options.name
    return f"online_merge of {options.sparsifier} and {options.consensus}"


def _choice(options: OptimizerOptions) -> str:
    return "sparsifier or consensus" if options.name == "online_merge" else "optimizer.name"


def _users(field: str, options: OptimizerOptions) -> list[str]:
    if options.name == "online_merge" and field in FIELDS["online_merge"]:
        return [n for n, fields in SPARSIFIERS.items() if field in fields] or ["consensus sign"]
    return [other for other in FIELDS if field in FIELDS[other]]


def _check_alpha(alpha: float | AlphaOptions | None) -> None:
    if not isinstance(alpha, AlphaOptions):
        require(alpha is None or 0 <= alpha <= 1, "optimizer.alpha", alpha, "in [0, 1]")
        return
    if (alpha.value is None) == (alpha.relative is None):
        raise UserError("Give exactly one of optimizer.alpha.value and optimizer.alpha.relative.")
    for field in ("value", "relative"):
        peak = getattr(alpha, field)
        require(peak is None or 0 < peak <= 1, f"optimizer.alpha.{field}", peak, "in (0, 1]")
    if alpha.scope is not None and alpha.relative is None:
        raise UserError(
            f"optimizer.alpha.scope is set to {alpha.scope!r}, but only alpha.relative has a use for "
            "it. Unset it."
        )
    gate = alpha.gate
    require(gate is None or 0 < gate <= 1, "optimizer.alpha.gate", gate, "in (0, 1]")
    check_schedule(alpha.schedule, "optimizer.alpha.schedule")


def _check_inner(options: OptimizerOptions) -> None:
    inner = inner_name(options)
    unread = {"lion": ("eps",), "sgd": ("b1", "b2", "eps", "moment_dtype")}.get(inner, ())
    for field in unread:
        value = getattr(options, field)
        if value is not None:
            raise UserError(
                f"optimizer.{field} is set to {value!r}, but {inner} has no use for it. Unset it."
            )


def inner_name(options: AdamWOptions) -> str:
    """The optimizer whose updates are merged, or applied as they are."""
    if not isinstance(options, OptimizerOptions):
        return "adamw"
    return "lion" if options.name == "lion" else options.inner or "adamw"


def check_schedule(options: ScheduleOptions, name: str) -> None:
    """Checks the ranges of a schedule that can be checked without the number of steps.

    Raises:
        UserError: names the field.
    """
    require(options.warmup_steps >= 0, f"{name}.warmup_steps", options.warmup_steps, "0 or larger")
    scale = options.final_scale
    require(0 <= scale <= 1, f"{name}.final_scale", scale, "in [0, 1]")
    if options.type == "constant" and scale:
        raise UserError(
            f"{name}.final_scale is {scale}, but a constant schedule has no use for it; unset it, or "
            f"choose another {name}.type."
        )


def make_schedule(
    options: ScheduleOptions, peak: float, steps: int, name: str = "schedule"
) -> optax.Schedule:
    """Learning rate, or another number, as a function of the number of updates done.

    Args:
        options: Shape and warm-up.
        peak: Largest rate.
        steps: Updates of the whole run; linear and cosine schedules end there.
        name: Field of the settings, for messages.

    Raises:
        UserError: the warm-up is longer than the run.

    Example:
        >>> schedule = make_schedule(ScheduleOptions(type="linear", warmup_steps=2), 1.0, 6)
        >>> [float(schedule(step)) for step in range(7)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]
    """
    warmup = options.warmup_steps
    require(warmup < steps, f"{name}.warmup_steps", warmup, f"smaller than the {steps} steps")
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
    steps: int | None = None,
) -> optax.GradientTransformation:
    """Clipping, then the optimizer.

    Args:
        options: Settings that `check_optimizer` accepts.
        schedule: Learning rate.
        layer_axes: Leading axes of a leaf that are separate tensors, as `omerge_jax` takes it.
        steps: Updates of the whole run, for schedules of alpha; needed where there is one.

    Returns:
        The transformation. With a merging optimizer its state still needs the delta
        (`omerge_jax.with_delta`), or with storage recompute its updates both models.

    Raises:
        UserError: the warm-up of alpha is longer than the run.
    """
    inner = _transformation(options, schedule, layer_axes, steps)
    if not options.max_grad_norm:
        return inner
    return optax.chain(optax.clip_by_global_norm(options.max_grad_norm), inner)


def _transformation(
    options: AdamWOptions, schedule: optax.ScalarOrSchedule, layer_axes: Any, steps: int | None
) -> optax.GradientTransformation:
    inner = _inner(options, schedule)
    if not isinstance(options, OptimizerOptions):
        return inner
    merged = _merged(options, schedule, inner, layer_axes, steps)
    if needs_delta(options) or not rounds_updates(options):
        return merged  # a merge with a delta rounds by itself
    assert options.rounding in ("stochastic", "compensated")
    return optax.chain(merged, om.rounded(options.rounding, seed=options.seed or 0))


def _inner(options: AdamWOptions, schedule: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    decay = options.weight_decay
    match inner_name(options):
        case "lion":
            tx = optax.lion(schedule, **_given(options, ("b1", "b2")), weight_decay=decay)
        case "sgd":
            tx = optax.chain(optax.add_decayed_weights(decay), optax.sgd(schedule))
        case _:
            given = _given(options, ("b1", "b2", "eps"))
            tx = optax.adamw(schedule, **given, weight_decay=decay)
    dtype = options.moment_dtype if isinstance(options, OptimizerOptions) else None
    return tx if dtype is None else with_moments_in(tx, dtype)


def _merged(
    options: OptimizerOptions,
    schedule: optax.ScalarOrSchedule,
    inner: optax.GradientTransformation,
    layer_axes: Any,
    steps: int | None,
) -> optax.GradientTransformation:
    own = ("density", *_MERGED_BY_LIBRARY, "seed", "diagnostics", "rounding")
    accepted = fields_of(options)
    merge = _given(options, tuple(name for name in own if name in accepted))
    merge["layer_axes"] = layer_axes
    if merge.get("clip") == 0:
        merge["clip"] = None
    if "alpha" in accepted:
        merge["alpha"] = _alpha(options.alpha, steps)
    adam = _given(options, ("b1", "b2", "eps")) | {"weight_decay": options.weight_decay}
    match options.name:
        case "adamw" | "lion":
            return inner
        case "on_dare":
            return om.fused_chain(inner, om.on_dare(**merge))
        case "on_ties":
            return om.fused_chain(inner, om.on_ties(**merge))
        case "child_tuning" | "keep_largest":
            merge.pop("rounding", None)  # by `om.rounded`: without a delta the library does not
            return om.fused_chain(inner, getattr(om, options.name)(**merge))
        case "on_dare_adamw":
            return om.on_dare_adamw(schedule, **adam, **merge)
        case "on_ties_adamw":
            return om.on_ties_adamw(schedule, **adam, **merge)
        case "online_merge":
            return om.fused_chain(inner, _online_merge(options, merge))


def _online_merge(options: OptimizerOptions, merge: dict[str, Any]) -> Any:
    assert options.sparsifier is not None
    keys = SPARSIFIERS[options.sparsifier]
    given = _given(options, keys)
    if "clip" in merge:
        given["clip"] = merge["clip"]
    if options.sparsifier == "magnitude_ranked":
        given["axis"] = _inputs_axis
    consensus = (
        om.linear() if options.consensus == "linear" else om.sign(options.election or "unweighted")
    )
    shared = ("alpha", "every_k", "delta_mask", "storage", "rounding", "seed", "layer_axes")
    kept = {name: merge[name] for name in (*shared, "diagnostics") if name in merge}
    return om.online_merge(getattr(om, options.sparsifier)(**given), consensus, **kept)


def _inputs_axis(path: tuple[str, ...]) -> int:
    """The axis along which the inputs of one output run, counted within one tensor."""
    return -1 if path[-1] in ("embed_tokens", "weight", "bias") else -2


def _alpha(alpha: float | AlphaOptions | None, steps: int | None) -> Any:
    if not isinstance(alpha, AlphaOptions):
        return alpha
    peak = alpha.relative if alpha.value is None else alpha.value
    assert peak is not None
    number: Any = peak
    if alpha.schedule != ScheduleOptions(type="constant"):
        if steps is None:
            raise ValueError("a schedule of alpha needs the number of steps.")
        number = make_schedule(alpha.schedule, peak, steps, "optimizer.alpha.schedule")
    if alpha.relative is None:
        return number
    return om.relative(number, scope=alpha.scope or "global")


def _given(options: AdamWOptions, names: tuple[str, ...]) -> dict[str, Any]:
    """Only the fields that are set: the others keep the optimizer's own defaults."""
    values = {name: getattr(options, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}

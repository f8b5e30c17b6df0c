"""Optimizers by name, from the settings of a run."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import optax

import omerge_jax as om
from train.config import AdamWOptions, OptimizerOptions
from train.optimizers.alpha import make_alpha


def make_optimizer(
    options: AdamWOptions,
    schedule: optax.ScalarOrSchedule,
    *,
    layer_axes: int | Callable[[tuple[str, ...]], int] = 0,
    steps: int | None = None,
) -> optax.GradientTransformation:
    """Makes clipping, then the optimizer with the learning rate `schedule`.

    `check_optimizer` accepts the options. `layer_axes` are the leading axes of a leaf whose entries are
    separate tensors. `steps`, the updates of the whole run, is needed where alpha has a schedule. The
    state of a merging optimizer still needs the delta (`omerge_jax.with_delta`); with storage recompute
    its updates need both models. Raises `UserError` where alpha's warm-up is longer than the run.
    """
    # Fields that are not set keep the defaults of the functions that they are passed to.
    fields = {item.name: getattr(options, item.name) for item in dataclasses.fields(options)}
    values = {name: value for name, value in fields.items() if value is not None}
    values |= {"learning_rate": schedule, "layer_axes": layer_axes, "axis": _inputs_axis}
    tx = _inner(options, values)
    if isinstance(options, OptimizerOptions):
        if options.alpha is not None:
            values["alpha"] = make_alpha(options.alpha, steps)
        if options.clip == 0:
            values["clip"] = None
        tx = _merging(options, tx, values)
    if options.max_grad_norm:
        return optax.chain(optax.clip_by_global_norm(options.max_grad_norm), tx)
    return tx


def parameters(function: Callable[..., Any]) -> frozenset[str]:
    """Returns the names of the parameters of a function."""
    return frozenset(inspect.signature(function).parameters)


def _call(function: Callable[..., Any], values: Mapping[str, Any]) -> Any:
    """Calls a function with those of the values that it has parameters for."""
    names = parameters(function)
    return function(**{name: value for name, value in values.items() if name in names})


def _inner(options: AdamWOptions, values: Mapping[str, Any]) -> optax.GradientTransformation:
    """Makes the optimizer whose updates are merged, or applied as they are."""
    match options.inner_name:
        case "adamw":
            tx = _call(optax.adamw, values)
        case "lion":
            tx = _call(optax.lion, values)
        case "sgd":
            decay = optax.add_decayed_weights(options.weight_decay)
            tx = optax.chain(decay, optax.sgd(values["learning_rate"]))
    dtype = values.get("moment_dtype")
    return tx if dtype is None else _with_moments_in(tx, dtype)


def _with_moments_in(tx: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """Lets an optimizer see gradients and parameters in a dtype, which its moments then have.

    Its updates have it too. In bfloat16 a second moment whose decay is 0.999 stands still: what decays
    in a step is below half of its last digit.
    """

    def init(params: Any) -> Any:
        return tx.init(optax.tree.cast(params, dtype))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return tx.update(optax.tree.cast(updates, dtype), state, optax.tree.cast(params, dtype))

    return optax.GradientTransformation(init, update)


def _merging(
    options: OptimizerOptions, inner: optax.GradientTransformation, values: Mapping[str, Any]
) -> optax.GradientTransformation:
    """Makes the optimizer of a name, which rounds its updates as the settings say."""
    match options.name:
        case "adamw" | "lion":
            tx = inner
        case "on_dare_adamw" | "on_ties_adamw":
            tx = _call(getattr(om, options.name), values)
        case "online_merge":
            assert options.sparsifier is not None
            assert options.consensus is not None
            sparsifier = _call(getattr(om, options.sparsifier), values)
            consensus = _call(getattr(om, options.consensus), values)
            parts = {"sparsifier": sparsifier, "consensus": consensus}
            tx = om.fused_chain(inner, _call(om.online_merge, {**values, **parts}))
        case name:
            tx = om.fused_chain(inner, _call(getattr(om, name), values))
    rounding = options.update_rounding
    if options.delta_storage or rounding == "nearest":
        return tx  # a merge with a delta rounds by itself
    return optax.chain(tx, om.rounded(rounding, seed=options.seed or 0))


def _inputs_axis(path: tuple[str, ...]) -> int:
    """Returns the axis along which the inputs of one output run, counted within one tensor."""
    return -1 if path[-1] in ("embed_tokens", "weight", "bias") else -2

"""The Optax transformation that every online merge is made with."""

import math
from typing import Any, Literal, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from omerge_jax.alpha import Relative
from omerge_jax.consensus import Consensus
from omerge_jax.diagnostics import zero_scalars
from omerge_jax.engine import MergeStep
from omerge_jax.numerics import wide_dtype
from omerge_jax.paths import LayerAxes, path_names, show
from omerge_jax.rounding import Rounding, zero_residual
from omerge_jax.rule import Finish, Merge
from omerge_jax.sparsify import Sparsifier
from omerge_jax.state import OnlineMergeState, place_delta
from omerge_jax.storage import Storage, UnsetDelta, check_storage, is_delta_leaf

DeltaMask = Literal["fixed", "fresh"]
Alpha = optax.ScalarOrSchedule | Relative


def _check(
    alpha: Alpha,
    every_k: chex.Numeric,
    delta_mask: DeltaMask,
    rounding: Rounding,
    diagnostics: bool,
) -> None:
    if isinstance(alpha, (int, float)) and not 0 <= alpha <= 1:
        raise ValueError(
            "alpha is the weight of the reference delta (the update gets 1 - alpha) and must be in "
            f"[0, 1], got alpha = {alpha}"
        )
    if isinstance(every_k, (int, float, np.number)) and (every_k < 1 or int(every_k) != every_k):
        raise ValueError(
            "every_k is the number of optimizer steps from one merge to the next and must be an "
            f"integer of at least 1, got every_k = {every_k}"
        )
    if delta_mask not in get_args(DeltaMask):
        raise ValueError(f"delta_mask must be 'fixed' or 'fresh', got delta_mask = {delta_mask!r}")
    if rounding not in get_args(Rounding):
        raise ValueError(
            f"rounding must be 'stochastic', 'compensated' or 'nearest', got rounding = {rounding!r}"
        )
    if not isinstance(diagnostics, bool):
        raise ValueError(
            "diagnostics must be True or False (under optax.inject_hyperparams name it in "
            f"static_args), got diagnostics = {diagnostics!r}"
        )


def _check_delta(storage: Storage, delta: Any) -> None:
    if storage == "recompute" and delta is not None:
        raise ValueError(
            "storage='recompute' holds no delta: leave delta unset and give reference_params and "
            "base_params to update"
        )


def _is_literal(value: Any, literal: int) -> bool:
    return isinstance(value, (int, float, np.integer)) and value == literal


def _require_delta(reference_delta: Any) -> None:
    unset = [
        show(path_names(key_path))
        for key_path, leaf in jax.tree_util.tree_flatten_with_path(reference_delta, is_delta_leaf)[
            0
        ]
        if isinstance(leaf, UnsetDelta)
    ]
    if unset:
        raise ValueError(
            f"online merging has no reference delta for {', '.join(unset[:3])}"
            f"{' …' if len(unset) > 3 else ''}: set it once before the first step with opt_state = "
            "omerge_jax.with_delta(opt_state, omerge_jax.task_vector(reference_params, "
            "base_params)), or give delta=…; for no reference term use omerge_jax.child_tuning"
        )


def _require_arguments(merge: Merge, params: Any, reference: tuple[Any, Any]) -> None:
    if merge.rounds and params is None:
        raise ValueError(
            f"rounding={merge.rounding!r} rounds to what the parameters can hold: call "
            "update(updates, state, params), or give rounding='nearest', which loses most of a small "
            "reference term"
        )
    if merge.finish is not None and params is None:
        raise ValueError("weight decay needs the parameters: call update(grads, state, params)")
    if merge.uses_delta and merge.storage == "recompute" and None in reference:
        raise ValueError(
            "storage='recompute' subtracts the base from the reference at every merge: call "
            "update(updates, state, params, reference_params=…, base_params=…)"
        )


def _init_state(merge: Merge, params: optax.Params, delta: Any, plain: bool) -> OnlineMergeState:
    def like(make: Any) -> Any:
        return jax.tree.map(make, params)

    def unset(key_path: tuple[Any, ...], param: Any) -> UnsetDelta:
        shape = tuple(param.shape)
        return UnsetDelta(shape, merge.recipe(shape, path_names(key_path)))

    def zero_cache(param: Any) -> jax.Array:
        # zeros_like, not zeros: a sharded parameter gets a cache that is sharded alike.
        return jnp.zeros_like(param, dtype=wide_dtype(param.dtype))

    reference = optax.EmptyState() if merge.uses_delta else None
    if merge.uses_delta and merge.storage != "recompute":
        reference = jax.tree_util.tree_map_with_path(unset, params)
        if delta is not None:
            reference = place_delta(reference, delta)
    entries = sum(math.prod(shape) for shape in merge.fit_shapes(params).values())
    compensated = merge.rounds and merge.rounding == "compensated"
    return OnlineMergeState(
        merge_count=jnp.zeros([], jnp.int32),
        reference_delta=reference,
        delta_fit=jnp.full([entries], -1.0, jnp.float32) if merge.fits_delta else None,
        cached_delta=None if plain else like(zero_cache),
        rounding_residual=like(zero_residual) if compensated else None,
        merge_scalars=zero_scalars(merge.diagnostics),
    )


def _scaled(alpha: Alpha, scale: chex.Numeric, step: jax.Array) -> jax.Array | Relative:
    """Returns the alpha of a step."""
    number = alpha.share if isinstance(alpha, Relative) else alpha
    number = jnp.asarray(number(step) if callable(number) else number, jnp.float32) * scale
    return Relative(number, alpha.scope) if isinstance(alpha, Relative) else number


def merge_transformation(
    sparsifier: Sparsifier,
    consensus: Consensus,
    *,
    alpha: Alpha,
    delta: Any,
    every_k: chex.Numeric,
    delta_mask: DeltaMask,
    storage: Storage,
    rounding: Rounding,
    seed: chex.Numeric,
    layer_axes: LayerAxes,
    diagnostics: bool,
    finish: Finish | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation of `online_merge`, which documents the arguments.

    Args:
      sparsifier: F.
      consensus: ⊕.
      alpha: weight of the reference.
      delta: τ_r or None.
      every_k: steps from merge to merge.
      delta_mask: whether F(τ_r) is drawn once or at every step.
      storage: how the delta is held.
      rounding: how updates are rounded.
      seed: fixes stochastic rounding.
      layer_axes: which leading axes index separate tensors.
      diagnostics: whether the full metrics are measured.
      finish: ``(update, param, path, step) -> update``, done to every update, merged or passed on,
        before it is rounded.
    """
    _check(alpha, every_k, delta_mask, rounding, diagnostics)
    _check_delta(storage, delta)
    check_storage(storage, sparsifier, delta_mask == "fixed")
    merge = Merge(
        sparsifier=sparsifier,
        consensus=consensus,
        layer_axes=layer_axes,
        fresh_delta=delta_mask == "fresh",
        uses_delta=not _is_literal(alpha, 0),
        storage=storage,
        rounding=rounding,
        seed=seed,
        diagnostics=diagnostics,
        finish=finish,
    )
    plain = _is_literal(every_k, 1)

    def init(params: optax.Params) -> OnlineMergeState:
        return _init_state(merge, params, delta, plain)

    def update(
        updates: optax.Updates,
        state: OnlineMergeState,
        params: optax.Params | None = None,
        *,
        reference_params: Any = None,
        base_params: Any = None,
        look_ahead: Any = None,
        alpha_scale: chex.Numeric = 1.0,
        **extra_args: Any,
    ) -> tuple[optax.Updates, OnlineMergeState]:
        del extra_args
        _require_delta(state.reference_delta)
        reference = (reference_params, base_params)
        _require_arguments(merge, params, reference)
        rate = _scaled(alpha, alpha_scale, state.merge_count)
        step = MergeStep(merge, state, rate, updates, params, reference, look_ahead)
        cached = None
        if plain:
            merged, residual, scalars = step.merge(updates, None)
        else:
            merged, cached, residual, scalars = step.merge_every(every_k, updates)
        return merged, OnlineMergeState(
            merge_count=jnp.asarray(optax.safe_increment(state.merge_count)),
            reference_delta=state.reference_delta,
            delta_fit=step.fit,
            cached_delta=cached,
            rounding_residual=residual,
            merge_scalars=scalars,
        )

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]

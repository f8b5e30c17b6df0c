"""Whole optimizers in the order of the authors' code: Adam, merge, then weight decay."""

import math
from collections.abc import Callable
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import optax

from omerge_jax import consensus
from omerge_jax.alpha import Alpha
from omerge_jax.checks import is_float
from omerge_jax.fused import fused_chain
from omerge_jax.online import EVERY_STEP, DeltaMask, merge_then_round
from omerge_jax.paths import LayerAxes, Path, map_by_path
from omerge_jax.rounding import Rounding
from omerge_jax.sparsifiers.base import Draw
from omerge_jax.sparsifiers.magnitude import magnitude
from omerge_jax.sparsifiers.random import random
from omerge_jax.storage import Storage

Mask = Any | Callable[[optax.Params], Any] | None


def _adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float,
    b2: float,
    eps: float,
    mu_dtype: jax.typing.DTypeLike | None,
) -> optax.GradientTransformation:
    """Adam as −lr·√(1−β2^t)/(1−β1^t) · (m / (√v + eps)).

    Written out because ``optax.scale_by_adam`` adds eps after the bias correction, and because the
    order of operations decides which of two nearly equal updates is larger: at the first step all
    magnitudes agree to a few units in the last place, and OnTIES keeps the largest.
    """
    moments = optax.scale_by_adam(b1, b2, mu_dtype=mu_dtype)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        # The caller may have set strict promotion, but moments and gradients may differ in dtype.
        with jax.numpy_dtype_promotion("standard"):
            count = jnp.asarray(optax.safe_increment(state.count))
            # m ← β1·m + (1 − β1)·g and v ← β2·v + (1 − β2)·g².
            mu = jax.tree.map(lambda g, m: b1 * m + (1 - b1) * g, updates, state.mu)
            nu = jax.tree.map(lambda g, v: b2 * v + (1 - b2) * g * g, updates, state.nu)
            rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
            # Δθ = −lr·√(1 − β2^t)/(1 − β1^t) · m/(√v + eps).
            size = -jnp.sqrt(_one_minus_power(b2, count)) * (rate / _one_minus_power(b1, count))
            steps = jax.tree.map(
                lambda g, m, v: (size * (m / (jnp.sqrt(v) + eps))).astype(g.dtype), updates, mu, nu
            )
            if mu_dtype is not None:
                mu = optax.tree.cast(mu, mu_dtype)
        return steps, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(moments.init, update)  # pyright: ignore


def _one_minus_power(base: chex.Numeric, exponent: jax.Array) -> jax.Array:
    """1 − base^exponent without the cancellation that costs float32 its last digits."""
    if isinstance(base, (int, float)):
        log = math.log(base) if base > 0 else -math.inf
    else:
        log = jnp.log(base)
    return -jnp.expm1(exponent.astype(jnp.float32) * jnp.asarray(log, jnp.float32))


def _decay_merged(
    learning_rate: optax.ScalarOrSchedule, weight_decay: chex.Numeric, mask: Mask
) -> optax.GradientTransformation:
    """Decays what an update leads to: θ ← (θ + u)·(1 − lr·wd), so that decay is not merged."""
    if isinstance(weight_decay, (int, float)) and weight_decay == 0:
        return optax.identity()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        if params is None:
            raise ValueError("weight decay needs the parameters: call update(grads, state, params)")
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate

        def decay(path: Path, update: jax.Array, param: jax.Array) -> jax.Array:
            if not is_float(path, update, param):
                return update
            # u ← u − lr·wd·(θ + u)
            return update - rate * weight_decay * (param.astype(update.dtype) + update)

        count = jnp.asarray(optax.safe_increment(state.count))
        return map_by_path(decay, updates, params), optax.ScaleByScheduleState(count)

    init = lambda params: optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))  # noqa: E731
    decayed = optax.GradientTransformation(init, update)  # pyright: ignore[reportArgumentType]
    return decayed if mask is None else optax.masked(decayed, mask)


def on_dare_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: chex.Numeric = 0.0,
    *,
    alpha: Alpha,
    density: optax.ScalarOrSchedule,
    delta: Any = None,
    every_k: int = EVERY_STEP,
    rescale: Literal["inverse", "norm", "none"] = "inverse",
    delta_mask: DeltaMask = "fresh",
    clip: chex.Numeric | None = 1.0,
    storage: Storage = "dense",
    rounding: Rounding = "stochastic",
    seed: chex.Numeric = 0,
    layer_axes: LayerAxes = None,
    diagnostics: bool = False,
    draw: Draw | None = None,
    mask: Mask = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with OnDARE, as the authors' code orders it.

    Differs from ``optax.chain(optax.adamw(...), on_dare(...))`` in two ways: ``eps`` is added to the
    square root of the second moment before its bias is corrected, and decoupled weight decay acts on
    the merged parameters, so that it is neither masked nor rescaled.

    Args:
      learning_rate: a float or a schedule.
      b1, b2: decays of the first and of the second moment.
      eps: added to the uncorrected square root.
      weight_decay: decay per unit of learning rate, on the merged parameters.
      alpha, density, delta, every_k, rescale, delta_mask, clip: as in `on_dare`; with
        ``rescale="norm"`` the norm that is divided by gets ``eps`` added, as in the authors' code.
      storage, rounding, seed, layer_axes, diagnostics, draw: as in `on_dare`.
      mask: which parameters decay, as in ``optax.adamw``: a tree of bools or a callable; None for all.
      mu_dtype: dtype of the first moment; None for the parameters'.

    Returns:
      A transformation; ``update`` needs the parameters where weight decay is not 0.

    Raises:
      ValueError: see `on_dare`.

    Example:
      >>> import omerge_jax as om
      >>> tx = om.on_dare_adamw(1e-6, alpha=5e-7, density=1e-2, weight_decay=0.1)

    References:
      Lu et al., https://arxiv.org/abs/2405.17931, Algorithm 1, and its published code.
    """
    merge = merge_then_round(
        random(density, rescale=rescale, clip=clip, seed=seed, draw=draw, eps=eps),
        consensus.linear(),
        _decay_merged(learning_rate, weight_decay, mask),
        alpha=alpha,
        delta=delta,
        every_k=every_k,
        delta_mask=delta_mask,
        storage=storage,
        rounding=rounding,
        seed=seed,
        layer_axes=layer_axes,
        diagnostics=diagnostics,
    )
    return fused_chain(_adam(learning_rate, b1, b2, eps, mu_dtype), merge)


def on_ties_adamw(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-6,
    weight_decay: chex.Numeric = 0.0,
    *,
    alpha: Alpha,
    density: optax.ScalarOrSchedule,
    delta: Any = None,
    every_k: int = EVERY_STEP,
    rescale: Literal["none", "norm"] = "none",
    election: Literal["unweighted", "weighted"] = "unweighted",
    threshold: Literal["exact", "sampled"] = "exact",
    storage: Storage = "dense",
    rounding: Rounding = "stochastic",
    seed: chex.Numeric = 0,
    layer_axes: LayerAxes = None,
    diagnostics: bool = False,
    mask: Mask = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with OnTIES, as the authors' code orders it; see `on_dare_adamw` for the differences.

    Args:
      learning_rate, b1, b2, eps, weight_decay, mask, mu_dtype: as in `on_dare_adamw`.
      alpha, density, delta, every_k, rescale, election, threshold: as in `on_ties`.
      storage, rounding, seed, layer_axes, diagnostics: as in `on_ties`.

    Returns:
      A transformation; ``update`` needs the parameters where weight decay is not 0.

    Raises:
      ValueError: see `on_ties`.

    Example:
      >>> import omerge_jax as om
      >>> tx = om.on_ties_adamw(1e-6, alpha=5e-7, density=0.1, weight_decay=0.1)

    References:
      Lu et al., https://arxiv.org/abs/2405.17931, Algorithm 1, and its published code.
    """
    merge = merge_then_round(
        magnitude(density, rescale=rescale, threshold=threshold, seed=seed),
        consensus.sign(election),
        _decay_merged(learning_rate, weight_decay, mask),
        alpha=alpha,
        delta=delta,
        every_k=every_k,
        delta_mask="fixed",
        storage=storage,
        rounding=rounding,
        seed=seed,
        layer_axes=layer_axes,
        diagnostics=diagnostics,
    )
    return fused_chain(_adam(learning_rate, b1, b2, eps, mu_dtype), merge)

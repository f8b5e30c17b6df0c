"""Updates of optimizers that merge nothing, rounded so that narrow parameters move all the same.

A bfloat16 parameter of 1 does not change when less than 0.002 is added to it. The merging optimizers
round their own updates (`omerge_jax.online_merge`, ``rounding``); this does it for all others.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from omerge_jax.paths import path_names
from omerge_jax.random_mask import random_bits
from omerge_jax.rounding import round_compensated, round_stochastically


class RoundedState(NamedTuple):
    """State of `rounded`.

    Attributes:
      round_count: int32 scalar, steps taken.
      residual: what rounding cut off so far, float32 like the parameters; None unless compensated.
    """

    round_count: jax.Array
    residual: Any


def rounded(
    rounding: Literal["stochastic", "compensated"], *, seed: int = 0
) -> optax.GradientTransformation:
    """Rounds every update to what its parameter can hold. Chain it last.

    Args:
      rounding: ``"stochastic"``: up or down at random, right on average, without memory.
        ``"compensated"``: to nearest, and the rest is kept for the next step, in four bytes a
        parameter.
      seed: integer that, with step, path and index of an entry, fixes the random choices.

    Returns:
      A transformation whose ``update`` needs the parameters and emits float32.

    Example:
      >>> tx = optax.chain(optax.sgd(1e-3), rounded("compensated"))

    References:
      Zamirai et al., Revisiting BFloat16 Training, https://arxiv.org/abs/2010.06192.
    """
    compensated = rounding == "compensated"

    def init(params: Any) -> RoundedState:
        like = None
        if compensated:
            like = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), params)
        return RoundedState(jnp.zeros([], jnp.int32), like)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, RoundedState]:
        if params is None:
            raise ValueError("rounded needs the parameters in update(updates, state, params).")
        count = jnp.asarray(optax.safe_increment(state.round_count))
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), updates)
        if compensated:
            both = jax.tree.map(round_compensated, wide, state.residual, params)
            pairs = jax.tree.transpose(jax.tree.structure(wide), jax.tree.structure((0, 0)), both)
            return pairs[0], RoundedState(count, pairs[1])

        def up_or_down(key_path: Any, leaf: jax.Array, param: jax.Array) -> jax.Array:
            path = path_names(key_path)
            step = state.round_count
            bits = random_bits(leaf.shape, seed=seed, step=step, path=path, role="apply")
            return round_stochastically(leaf, param, bits)

        moved = jax.tree_util.tree_map_with_path(up_or_down, wide, params)
        return moved, RoundedState(count, None)

    return optax.GradientTransformation(init, update)


def with_moments_in(
    tx: optax.GradientTransformation, dtype: jax.typing.DTypeLike
) -> optax.GradientTransformation:
    """Lets an optimizer see gradients and parameters in a dtype, which its moments then have.

    In bfloat16 a second moment whose decay is 0.999 stands still: what decays in a step is below half
    of its last digit.

    Args:
      tx: the optimizer.
      dtype: of its state and of the updates it emits.
    """

    def cast(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)

    def init(params: Any) -> Any:
        return tx.init(cast(params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return tx.update(cast(updates), state, None if params is None else cast(params))

    return optax.GradientTransformation(init, update)

"""Optimizers whose moments have another dtype than the parameters."""

from __future__ import annotations

from typing import Any

import jax
import optax


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

"""Whether a step adds anything of the reference, by the rewards of its batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from train.config import AdamWOptions, AlphaOptions, OptimizerOptions

AlphaScale = Callable[[Mapping[str, jax.Array]], jax.Array]


def alpha_gate(options: AdamWOptions) -> AlphaScale | None:
    """What alpha is multiplied by in a step, from the metrics of its loss.

    Args:
        options: The optimizer; its ``alpha.gate`` is read.

    Returns:
        ``f(metrics)``: 1 where the batch ranks at least so many of its pairs right, else 0, float32;
        or None where every step adds the reference.
    """
    alpha = options.alpha if isinstance(options, OptimizerOptions) else None
    if not isinstance(alpha, AlphaOptions) or alpha.gate is None:
        return None
    least = alpha.gate
    return lambda metrics: (metrics["rewards/accuracies"] >= least).astype(jnp.float32)

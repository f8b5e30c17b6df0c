"""Turns the merge off in steps whose batch is ranked badly: alpha times 0 or 1."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from train.config import AdamWOptions, AlphaOptions, OptimizerOptions

AlphaScale = Callable[[Mapping[str, jax.Array]], jax.Array]


def make_alpha_scale(options: AdamWOptions) -> AlphaScale | None:
    """Makes ``f(metrics)``, the factor of alpha in a step, from the metrics of the step's loss.

    Args:
        options: The optimizer; its ``alpha.gate`` is read.

    Returns:
        A function whose value is float32: 1 where ``rewards/accuracies`` is at least the gate, else 0.
        None where every step adds the reference.
    """
    alpha = options.alpha if isinstance(options, OptimizerOptions) else None
    if not isinstance(alpha, AlphaOptions) or alpha.gate is None:
        return None
    least = alpha.gate
    return lambda metrics: (metrics["rewards/accuracies"] >= least).astype(jnp.float32)

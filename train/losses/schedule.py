"""β as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from train.types import Metrics

BETA_SCHEDULES = ("constant", "linear", "cosine")
"""Courses that β can take from its first value to its last."""

BetaAt = Callable[[jax.Array], jax.Array]


def beta_schedule(kind: str, beta: float, beta_final: float | None, steps: int) -> BetaAt | None:
    """β of every step: `beta` in the first of `steps` updates and `beta_final` in the last.

    `kind` is a name in `BETA_SCHEDULES`. Both values are positive; `beta_final` is None exactly
    when `kind` is `"constant"`. Raises `ValueError` for an unknown kind or values that do not go
    together.

    Returns:
      `f(step) -> β`, float32 `[]`, for a traced number of updates done before, from 0; None for a
      constant β, which needs no step.

    Example:
      >>> import jax.numpy as jnp
      >>> beta_at = beta_schedule("linear", 0.1, 0.3, steps=3)
      >>> [round(float(beta_at(jnp.int32(step))), 6) for step in range(3)]
      [0.1, 0.2, 0.3]
    """
    if kind not in BETA_SCHEDULES:
        raise ValueError(f"beta_schedule must be one of {', '.join(BETA_SCHEDULES)}, got {kind!r}.")
    if kind == "constant":
        if beta_final is not None:
            raise ValueError(
                f"beta_final is {beta_final}, but a constant beta has no use for it; unset it, or "
                "set beta_schedule to linear or cosine."
            )
        return None
    if beta_final is None or not 0 < beta_final < math.inf:
        raise ValueError(
            f"beta_final must be positive with beta_schedule {kind!r}, got {beta_final}."
        )

    def beta_at(step: jax.Array) -> jax.Array:
        share = jnp.clip(jnp.asarray(step, jnp.float32) / max(steps - 1, 1), 0, 1)
        if kind == "cosine":
            share = (1 - jnp.cos(jnp.pi * share)) / 2
        return beta + (beta_final - beta) * share

    return beta_at


def scheduled_beta(
    beta_at: BetaAt | None, batch: Mapping[str, Any]
) -> tuple[jax.Array | None, Metrics]:
    """β of a batch's step and its metric; None and no metric where β is constant."""
    if beta_at is None:
        return None, {}
    beta = beta_at(batch["step"])
    return beta, {"beta": beta}

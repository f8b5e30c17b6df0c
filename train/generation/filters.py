"""Temperature and truncation of a next-token distribution, as transformers defines them."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Filters:
    """How a token is chosen; the fields apply in their order, as transformers does it.

    Attributes:
        temperature: Divides the logits; 0 takes the most probable token.
        top_k: Number of most probable tokens that are kept, and those that tie with the last of them.
        top_p: Keep the smallest set of most probable tokens that holds this much (Holtzman et al.
            2020, arXiv 1904.09751).
        min_p: Keep tokens at least so probable, relative to the most probable one (Nguyen et al.
            2024, arXiv 2407.01082).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature must be 0 or larger, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p}")


def filter_logits(logits: jax.Array, filters: Filters) -> jax.Array:
    """Logits over the temperature, which is above 0, float32 ``[..., vocab]``; -inf where left out.

    At least one token of each row stays finite.

    Example:
        >>> filter_logits(jnp.array([0.0, 2.0, 1.0]), Filters(top_k=2))
        Array([-inf,   2.,   1.], dtype=float32)
    """
    logits = logits / filters.temperature
    if filters.top_k is not None:
        kth = jax.lax.top_k(logits, min(filters.top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if filters.top_p < 1:
        logits = _keep_nucleus(logits, filters.top_p)
    if filters.min_p > 0:
        probability = jax.nn.softmax(logits)
        least = filters.min_p * probability.max(axis=-1, keepdims=True)
        logits = jnp.where(probability < least, -jnp.inf, logits)
    return logits


def _keep_nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """The logits of the fewest most probable tokens that hold `top_p`, the others minus infinity."""
    order = jnp.argsort(logits, axis=-1)  # ascending: the tail that is cut comes first
    ascending = jnp.take_along_axis(logits, order, axis=-1)
    cut = jnp.cumsum(jax.nn.softmax(ascending), axis=-1) <= 1 - top_p
    cut = cut.at[..., -1].set(False)
    kept = jnp.where(cut, -jnp.inf, ascending)
    return jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)

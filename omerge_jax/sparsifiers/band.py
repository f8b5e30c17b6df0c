"""F by a band of magnitudes (Breadcrumbs): neither the largest entries nor the smallest are kept."""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from omerge_jax.checks import check_number
from omerge_jax.sparsifiers.base import (
    EdgeSparsifier,
    FittedSparsifier,
    SparsifyContext,
    check_common,
    count_at,
    keeps_all,
    static_density,
    tie_order,
)
from omerge_jax.threshold.edge import is_beyond, top_k_edge


@dataclasses.dataclass(frozen=True)
class _Band(EdgeSparsifier):
    gamma: jax.typing.ArrayLike

    def fit(self, x: jax.Array, ctx: SparsifyContext) -> jax.Array | None:
        if keeps_all(self.density):
            return None
        outliers, kept = self._counts(x, ctx)
        order = tie_order(x, ctx, self.seed)
        edges = [
            top_k_edge(x, count, order, ctx.layer_axes) for count in (outliers + kept, outliers)
        ]
        return self.with_scale(jnp.concatenate(edges, axis=-1), x, ctx)

    def capacity(self, entries: int) -> int:
        return int(static_density(self.density) * entries)

    def _counts(self, x: jax.Array, ctx: SparsifyContext) -> tuple[jax.Array, jax.Array]:
        """Numbers of entries of a tensor that are dropped as outliers, and that are kept."""
        entries, kept = math.prod(x.shape[ctx.layer_axes :]), self.count(x, ctx)
        return jnp.minimum(count_at(self.gamma, entries), jnp.uint32(entries) - kept), kept

    def keep(self, x: jax.Array, edges: jax.Array, ctx: SparsifyContext) -> jax.Array:
        order = tie_order(x, ctx, self.seed)
        # What is not finite is no outlier to be dropped: it must be seen.
        outlier = is_beyond(x, edges[..., 3:6], order) & jnp.isfinite(x)
        return jnp.where(is_beyond(x, edges[..., :3], order) & ~outlier, x, 0)


def band(
    density: optax.ScalarOrSchedule,
    *,
    gamma: jax.typing.ArrayLike = 0.01,
    rescale: Literal["none", "norm"] = "none",
    seed: jax.typing.ArrayLike = 0,
) -> FittedSparsifier:
    """Drops the largest entries of each tensor, and the smallest (Breadcrumbs).

    Of n entries the ``int(gamma * n)`` of largest magnitude are dropped, the next ``int(density * n)``
    are kept, and the rest are dropped. Where the two shares add up to more than n, fewer of the
    largest are dropped. A tensor too small to keep one entry is dropped whole. ``density = 1`` keeps
    everything.

    Of equal magnitudes at an edge of the band a choice spread over the tensor is kept, another one at
    every step, so that the counts always hold.

    Args:
      density: share kept, in (0, 1]; a float, a schedule of the step, or traced. Only a Python float
        gives the count exactly; others are multiplied in float32.
      gamma: share of the largest entries dropped, in [0, 1); a float, or traced.
      rescale: ``"norm"`` gives what is kept the L1 norm it had before, per tensor.
      seed: integer that, with the step, path and index, orders equal magnitudes.

    Returns:
      A sparsifier with ``fit`` and ``apply``: float array in, the same shape and dtype out. The fit
      is float32 [*layers, 6], or [*layers, 7] with ``rescale="norm"``.

    Raises:
      ValueError: a density outside (0, 1], a gamma outside [0, 1), or another bad argument.

    Example:
      >>> from omerge_jax import SparsifyContext
      >>> ctx = SparsifyContext(jnp.int32(0), ("kernel",), "update")
      >>> band(0.5, gamma=0.25)(jnp.array([1.0, -9.0, 2.0, 3.0]), ctx).tolist()
      [0.0, 0.0, 2.0, 3.0]

    References:
      Davari and Belilovsky, Model Breadcrumbs, https://arxiv.org/abs/2312.06795, Section 3.
    """
    check_common(density, rescale, ("none", "norm"), seed)
    check_number("gamma", gamma, "in [0, 1)", "the share of outliers dropped")
    return _Band(density, rescale, seed, gamma)

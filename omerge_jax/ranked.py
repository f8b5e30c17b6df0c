"""Sparsifiers that rank magnitudes: MAGPRUNE (DELLA) and the band of Breadcrumbs.

Both follow the protocol of :mod:`omerge_jax.sparsify`.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from omerge_jax import random_mask
from omerge_jax.paths import Path, show
from omerge_jax.sparsify import (
    Draw,
    FittedSparsifier,
    Sparsifier,
    SparsifyContext,
    check_density,
    density_at,
    keeps_all,
    norm_ratio,
    random_capacity,
    static_density,
    tie_order,
)
from omerge_jax.threshold import is_beyond, per_layer, top_k_edge

RankAxis = int | None | Callable[[Path], int | None]


@dataclasses.dataclass(frozen=True)
class _Ranked:
    density: optax.ScalarOrSchedule
    epsilon: jax.typing.ArrayLike
    rescale: Literal["inverse", "norm", "none"]
    axis: RankAxis
    seed: jax.typing.ArrayLike
    draw: Draw | None

    def __call__(self, x: jax.Array, ctx: SparsifyContext) -> jax.Array:
        if keeps_all(self.density):
            return x
        share = self._keep_probability(x, ctx)
        mask = self._mask(x, share, ctx)
        scaled = (x / share).astype(x.dtype) if self.rescale == "inverse" else x
        kept = jnp.where(mask, scaled, 0)
        if self.rescale == "norm":
            kept = kept * per_layer(norm_ratio(x, kept, ctx.layer_axes, 0.0), x)
        return kept

    def _keep_probability(self, x: jax.Array, ctx: SparsifyContext) -> jax.Array:
        """Float32 probabilities that broadcast to ``x``."""
        density = jnp.asarray(density_at(self.density, ctx.step), jnp.float32)
        # A schedule may come closer to 0 or 1 than epsilon, where the window has to narrow.
        epsilon = jnp.minimum(jnp.float32(self.epsilon), jnp.minimum(density, 1 - density))
        axis, rows = rank_axis_of(self.axis, x.shape, ctx.layer_axes, ctx.path), x
        if axis is None:
            axis, layers = ctx.layer_axes, x.shape[: ctx.layer_axes]
            rows = x.reshape(*layers, math.prod(x.shape[ctx.layer_axes :]))
        entries = rows.shape[axis]
        if entries < 2:
            return density
        order = jnp.argsort(jnp.abs(rows), axis=axis, stable=True)
        rank = jnp.argsort(order, axis=axis).astype(jnp.float32) / (entries - 1)
        return (density - epsilon + rank * 2 * epsilon).reshape(x.shape)

    def _mask(self, x: jax.Array, share: jax.Array, ctx: SparsifyContext) -> jax.Array:
        if self.draw is not None:
            return self.draw(x, share, ctx)
        return random_mask.bernoulli(
            x.shape, share, seed=self.seed, step=ctx.step, path=ctx.path, role=ctx.role
        )

    def capacity(self, entries: int) -> int:
        return random_capacity(self.density, entries)


def rank_axis_of(axis: RankAxis, shape: Sequence[int], layer_axes: int, path: Path) -> int | None:
    """Returns the axis of a leaf to rank over; None for all axes of a tensor.

    Raises:
      ValueError: the tensors of the leaf have no such axis.
    """
    axis = axis(path) if callable(axis) else axis
    own_axes = len(shape) - layer_axes
    if own_axes < 2 or axis is None:
        return None
    if not -own_axes <= axis < own_axes:
        raise ValueError(
            f"the axis to rank over must be one of the {own_axes} axes of a tensor, got {axis} for the "
            f"leaf {show(path)} of shape {tuple(shape)} with layer_axes = {layer_axes}"
        )
    return layer_axes + axis % own_axes


def check_epsilon(epsilon: jax.typing.ArrayLike, density: optax.ScalarOrSchedule) -> None:
    """Raises ValueError where Python numbers put ``density ± epsilon`` outside (0, 1)."""
    if not isinstance(epsilon, (int, float)):
        return
    if not epsilon >= 0:
        raise ValueError(f"epsilon must not be negative, got epsilon = {epsilon}")
    if not isinstance(density, (int, float)) or density == 1:
        return
    if not 0 < density - epsilon <= density + epsilon < 1:
        raise ValueError(
            "density - epsilon and density + epsilon must lie in (0, 1), got density = "
            f"{density} and epsilon = {epsilon}; take a smaller epsilon"
        )


def magnitude_ranked(
    density: optax.ScalarOrSchedule,
    *,
    epsilon: jax.typing.ArrayLike = 0.15,
    rescale: Literal["inverse", "norm", "none"] = "inverse",
    axis: RankAxis = -1,
    seed: jax.typing.ArrayLike = 0,
    draw: Draw | None = None,
) -> Sparsifier:
    """Keeps larger entries with higher probability (MAGPRUNE, the drop step of DELLA).

    Within a row the probability of being kept rises linearly with the rank of the magnitude, from
    ``density - epsilon`` for the smallest entry to ``density + epsilon`` for the largest. Equal
    magnitudes are ranked by their position. A row of one entry is kept with probability
    ``density``. ``density = 1`` keeps everything.

    Args:
      density: mean share kept, in (0, 1]; a float, a schedule of the step, or traced.
      epsilon: half the width of the window of probabilities. Numbers that reach out of (0, 1) are an
        error; a schedule that comes closer to 0 or 1 narrows the window.
      rescale: ``"inverse"`` divides a kept entry by its own probability (unbiased; the paper).
        ``"norm"`` gives what is kept the L1 norm it had before, per tensor (mergekit).
        ``"none"`` leaves it.
      axis: the axis along which a row runs, counted within one tensor (after its layer axes), or a
        callable of the leaf's path; None ranks all entries of a tensor together. The paper ranks the
        inputs of each output: the last axis of a PyTorch weight [out, in] but ``-2`` of a Flax kernel
        [in, out]. A tensor of one axis is one row. The sort stays local where a row is on one device.
      seed: integer that, with the step, the leaf's path and the element's index, fixes the mask.
      draw: another source of masks, ``(x, probability, ctx) -> bool array`` with a float32 probability
        that broadcasts to ``x``; None for the counter-based one.

    Returns:
      A sparsifier: float array in, the same shape and dtype out.

    Raises:
      ValueError: a density outside (0, 1], an epsilon that does not fit it, an unknown ``rescale``;
        when called, an ``axis`` that a tensor does not have.

    Example:
      >>> from omerge_jax.sparsify import SparsifyContext
      >>> ctx = SparsifyContext(jnp.int32(0), ("kernel",), "update")
      >>> f = magnitude_ranked(0.5, epsilon=0.4, rescale="none", draw=lambda x, p, ctx: p > 0.6)
      >>> f(jnp.array([[1.0, -4.0, 2.0], [0.1, 0.2, 0.3]]), ctx).tolist()
      [[0.0, -4.0, 0.0], [0.0, 0.0, 0.30000001192092896]]

    References:
      Deep et al., DELLA-Merging, https://arxiv.org/abs/2406.11617, Section 3.
    """
    check_density(density)
    check_epsilon(epsilon, density)
    if rescale not in ("inverse", "norm", "none"):
        raise ValueError(f"rescale must be 'inverse', 'norm' or 'none', got rescale = {rescale!r}")
    return _Ranked(density, epsilon, rescale, axis, seed, draw)


@dataclasses.dataclass(frozen=True)
class _Band:
    density: optax.ScalarOrSchedule
    gamma: jax.typing.ArrayLike
    rescale: Literal["none", "norm"]
    seed: jax.typing.ArrayLike
    takes_samples = True

    def __call__(self, x: jax.Array, ctx: SparsifyContext) -> jax.Array:
        return self.apply(x, self.fit(x, ctx), ctx)

    def fit(self, x: jax.Array, ctx: SparsifyContext) -> jax.Array | None:
        if keeps_all(self.density):
            return None
        outliers, kept = self._counts(x, ctx)
        order = tie_order(x, ctx, self.seed)
        edges = [
            top_k_edge(x, count, order, ctx.layer_axes) for count in (outliers + kept, outliers)
        ]
        fitted = jnp.concatenate(edges, axis=-1)
        if self.rescale == "none":
            return fitted
        scale = norm_ratio(x, self._keep(x, fitted, ctx), ctx.layer_axes, 0.0)
        return jnp.concatenate([fitted, scale.astype(jnp.float32)[..., None]], axis=-1)

    def apply(self, x: jax.Array, fitted: jax.Array | None, ctx: SparsifyContext) -> jax.Array:
        if fitted is None:
            return x
        kept = self._keep(x, fitted, ctx)
        return kept if self.rescale == "none" else kept * per_layer(fitted[..., 6], x)

    def capacity(self, entries: int) -> int:
        return int(static_density(self.density) * entries)

    def _counts(self, x: jax.Array, ctx: SparsifyContext) -> tuple[jax.Array, jax.Array]:
        """Numbers of entries of a tensor that are dropped as outliers, and that are kept."""
        entries = math.prod(x.shape[ctx.layer_axes :])
        kept = _share_of(entries, density_at(self.density, ctx.step))
        return jnp.minimum(_share_of(entries, self.gamma), jnp.uint32(entries) - kept), kept

    def _keep(self, x: jax.Array, fitted: jax.Array, ctx: SparsifyContext) -> jax.Array:
        order = tie_order(x, ctx, self.seed)
        outlier = is_beyond(x, fitted[..., 3:6], order)
        # Where no outlier is dropped, what is not finite is not hidden either.
        outlier &= ~per_layer(jnp.isinf(fitted[..., 3]), x)
        return jnp.where(is_beyond(x, fitted[..., :3], order) & ~outlier, x, 0)


def _share_of(entries: int, share: jax.typing.ArrayLike) -> jax.Array:
    if isinstance(share, (int, float)):
        return jnp.uint32(int(share * entries))
    # The product may round up, also to 2**32, which uint32 does not hold.
    count = jnp.minimum(jnp.floor(jnp.float32(share) * entries), 4294967040.0).astype(jnp.uint32)
    return jnp.minimum(count, jnp.uint32(entries))


def check_gamma(gamma: jax.typing.ArrayLike) -> None:
    """Raises ValueError where a Python number is not a share of outliers: 0 <= gamma < 1."""
    if isinstance(gamma, (int, float)) and not 0 <= gamma < 1:
        raise ValueError(
            f"gamma is the share of outliers dropped and must be in [0, 1), got gamma = {gamma}"
        )


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
      ValueError: a density outside (0, 1], a gamma outside [0, 1), or an unknown ``rescale``.

    Example:
      >>> from omerge_jax.sparsify import SparsifyContext
      >>> ctx = SparsifyContext(jnp.int32(0), ("kernel",), "update")
      >>> band(0.5, gamma=0.25)(jnp.array([1.0, -9.0, 2.0, 3.0]), ctx).tolist()
      [0.0, 0.0, 2.0, 3.0]

    References:
      Davari and Belilovsky, Model Breadcrumbs, https://arxiv.org/abs/2312.06795, Section 3.
    """
    check_density(density)
    check_gamma(gamma)
    if rescale not in ("none", "norm"):
        raise ValueError(f"rescale must be 'none' or 'norm', got rescale = {rescale!r}")
    return _Band(density, gamma, rescale, seed)

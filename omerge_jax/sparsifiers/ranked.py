"""F at random with a probability that rises with the rank of a magnitude (MAGPRUNE, DELLA)."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from omerge_jax.checks import check_number, known
from omerge_jax.paths import Path, show
from omerge_jax.sparsifiers.base import (
    Draw,
    DrawnSparsifier,
    Sparsifier,
    SparsifyContext,
    check_common,
    density_at,
    keeps_all,
    norm_ratio,
)
from omerge_jax.threshold.edge import per_layer

RankAxis = int | None | Callable[[Path], int | None]


@dataclasses.dataclass(frozen=True)
class _Ranked(DrawnSparsifier):
    epsilon: jax.typing.ArrayLike
    axis: RankAxis

    def __call__(self, x: jax.Array, ctx: SparsifyContext) -> jax.Array:
        if keeps_all(self.density):
            return x
        share = self._keep_probability(x, ctx)
        mask = self.mask(x, share, ctx)
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


def rank_axis_of(axis: RankAxis, shape: Sequence[int], layer_axes: int, path: Path) -> int | None:
    """Returns the axis of a leaf to rank over, None for all; ValueError where a tensor lacks it."""
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
      >>> from omerge_jax import SparsifyContext
      >>> ctx = SparsifyContext(jnp.int32(0), ("kernel",), "update")
      >>> f = magnitude_ranked(0.5, epsilon=0.4, rescale="none", draw=lambda x, p, ctx: p > 0.6)
      >>> f(jnp.array([[1.0, -4.0, 2.0], [0.1, 0.2, 0.3]]), ctx).tolist()
      [[0.0, -4.0, 0.0], [0.0, 0.0, 0.30000001192092896]]

    References:
      Deep et al., DELLA-Merging, https://arxiv.org/abs/2406.11617, Section 3.
    """
    check_common(density, rescale, ("inverse", "norm", "none"), seed)
    check_number("epsilon", epsilon, "at least 0")
    width, middle = known(epsilon), known(density)
    if width is not None and middle is not None and middle != 1:
        low, high = middle - width, middle + width
        if not 0 < low <= high < 1:
            raise ValueError(
                "density - epsilon and density + epsilon must lie in (0, 1), got density = "
                f"{density} and epsilon = {epsilon}; take a smaller epsilon"
            )
    return _Ranked(density, rescale, seed, draw, epsilon, axis)

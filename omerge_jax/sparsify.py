"""Sparsifiers F: which entries of an update, or of the reference delta, are kept.

A sparsifier is any callable ``(x, ctx) -> array`` of the same shape. One whose choice rests on a few
numbers per tensor (a threshold, a scale) may also offer ``fit(x, ctx)`` and ``apply(x, fitted, ctx)``
with ``sparsifier(x, ctx) == apply(x, fit(x, ctx), ctx)``; the fit of a fixed delta is then computed
once and kept in the optimizer state instead of every step.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from omerge_jax import random_mask
from omerge_jax.paths import Path
from omerge_jax.threshold import top_k_threshold

Role = Literal["update", "delta"]


@dataclasses.dataclass(frozen=True)
class SparsifyContext:
    """What a sparsifier may depend on besides the values.

    Attributes:
      step: int32 scalar, the optimizer steps taken before this one; 0 for a fixed delta.
      path: path names of the leaf.
      role: ``"update"`` for Δθ, ``"delta"`` for τ_r.
      layer_axes: number of leading axes of the leaf that index separate tensors.
    """

    step: jax.Array
    path: Path
    role: Role
    layer_axes: int = 0


Sparsifier = Callable[[jax.Array, SparsifyContext], jax.Array]
Draw = Callable[[jax.Array, jax.typing.ArrayLike, SparsifyContext], jax.Array]


@runtime_checkable
class FittedSparsifier(Protocol):
    """A sparsifier that rests on a few numbers per tensor, see the module's text."""

    def __call__(self, x: jax.Array, ctx: SparsifyContext) -> jax.Array:
        """Sparsifies ``x``."""
        ...

    def fit(self, x: jax.Array, ctx: SparsifyContext) -> jax.Array | None:
        """Returns non-negative float32 [*layers, m], or None where nothing is to be fitted."""
        ...

    def apply(self, x: jax.Array, fitted: jax.Array | None, ctx: SparsifyContext) -> jax.Array:
        """Sparsifies ``x`` with what was fitted."""
        ...


def check_density(density: optax.ScalarOrSchedule) -> None:
    """Raises ValueError where a Python number is not a density: 0 < density <= 1."""
    if isinstance(density, (int, float)) and not 0 < density <= 1:
        raise ValueError(
            f"density is the share of entries kept and must be in (0, 1], got density = {density}"
        )


def _density_at(density: optax.ScalarOrSchedule, step: jax.Array) -> jax.typing.ArrayLike:
    return density(step) if callable(density) else density


def _keeps_all(density: optax.ScalarOrSchedule) -> bool:
    return isinstance(density, (int, float)) and density == 1


def _tensor_sums(x: jax.Array, layer_axes: int) -> jax.Array:
    return jnp.sum(x, axis=tuple(range(layer_axes, x.ndim)))


def _per_layer(values: jax.Array, x: jax.Array) -> jax.Array:
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))


# The authors' code adds this to the norm of the masked update that it divides by.
_RANDOM_NORM_EPS = 1e-6


def _norm_ratio(dense: jax.Array, kept: jax.Array, layer_axes: int, eps: float) -> jax.Array:
    """Per tensor, the factor that gives ``kept`` the L1 norm of ``dense``; 0 where none is kept."""
    before = _tensor_sums(jnp.abs(dense), layer_axes)
    after = _tensor_sums(jnp.abs(kept), layer_axes) + eps
    return jnp.where(after > 0, before / jnp.where(after > 0, after, 1), 0)


def identity() -> Sparsifier:
    """Keeps everything."""
    return lambda x, ctx: x


@dataclasses.dataclass(frozen=True)
class _Random:
    density: optax.ScalarOrSchedule
    rescale: Literal["inverse", "norm", "none"]
    clip: jax.typing.ArrayLike | None
    seed: jax.typing.ArrayLike
    draw: Draw | None

    def __call__(self, x: jax.Array, ctx: SparsifyContext) -> jax.Array:
        density = _density_at(self.density, ctx.step)
        kept = x
        if not _keeps_all(self.density):
            kept = jnp.where(self._mask(x, density, ctx), x, 0)
            kept = kept if self.rescale == "none" else kept / density
        normed = self.rescale == "norm" and ctx.role == "update"
        if normed:
            kept = kept * _per_layer(_norm_ratio(x, kept, ctx.layer_axes, _RANDOM_NORM_EPS), x)
        if self.clip is not None and (ctx.role == "delta" or normed):
            limit = jnp.asarray(self.clip, kept.dtype)
            kept = jnp.clip(kept, -limit, limit)
        return kept

    def _mask(self, x: jax.Array, density: jax.typing.ArrayLike, ctx: SparsifyContext) -> jax.Array:
        if self.draw is not None:
            return self.draw(x, density, ctx)
        return random_mask.bernoulli(
            x.shape, density, seed=self.seed, step=ctx.step, path=ctx.path, role=ctx.role
        )


def random(
    density: optax.ScalarOrSchedule,
    *,
    rescale: Literal["inverse", "norm", "none"] = "inverse",
    clip: jax.typing.ArrayLike | None = 1.0,
    seed: jax.typing.ArrayLike = 0,
    draw: Draw | None = None,
) -> Sparsifier:
    """Keeps each entry with probability ``density`` (DARE).

    Args:
      density: share kept, in (0, 1]; a float, a schedule of the step, or traced.
      rescale: ``"inverse"`` divides kept entries by ``density`` (unbiased; the authors' code, which
        uses dropout). ``"norm"`` gives the kept update the L1 norm of the dense one, per tensor (the
        authors' ``rescale`` flag; the delta is still divided by ``density``; as there,
        1e-6 is added to the norm divided by, which shrinks updates of a smaller norm). ``"none"``
        leaves them (the paper's text, Eq. 3).
      clip: the delta, and with ``"norm"`` the update, is clamped to ±clip; None for no clamp.
      seed: integer that, with the step, the leaf's path and the element's index, fixes the mask.
      draw: another source of masks, ``(x, density, ctx) -> bool array``; None for the counter-based
        one.

    Returns:
      A sparsifier.

    Raises:
      ValueError: a density outside (0, 1] or an unknown ``rescale``.

    References:
      Yu et al., Language Models are Super Mario, https://arxiv.org/abs/2311.03099; Lu et al.,
      https://arxiv.org/abs/2405.17931, Eq. 3.
    """
    check_density(density)
    if rescale not in ("inverse", "norm", "none"):
        raise ValueError(f"rescale must be 'inverse', 'norm' or 'none', got rescale = {rescale!r}")
    return _Random(density, rescale, clip, seed, draw)


@dataclasses.dataclass(frozen=True)
class _Magnitude:
    density: optax.ScalarOrSchedule
    rescale: Literal["none", "norm"]

    def __call__(self, x: jax.Array, ctx: SparsifyContext) -> jax.Array:
        return self.apply(x, self.fit(x, ctx), ctx)

    def fit(self, x: jax.Array, ctx: SparsifyContext) -> jax.Array | None:
        if _keeps_all(self.density):
            return None
        threshold = top_k_threshold(x, self._count(x, ctx), ctx.layer_axes)
        if self.rescale == "none":
            return threshold[..., None]
        scale = _norm_ratio(x, _keep_large(x, threshold), ctx.layer_axes, 0.0)
        return jnp.stack([threshold, scale.astype(jnp.float32)], axis=-1)

    def apply(self, x: jax.Array, fitted: jax.Array | None, ctx: SparsifyContext) -> jax.Array:
        if fitted is None:
            return x
        kept = _keep_large(x, fitted[..., 0])
        return kept if self.rescale == "none" else kept * _per_layer(fitted[..., 1], x)

    def _count(self, x: jax.Array, ctx: SparsifyContext) -> jax.Array:
        entries = math.prod(x.shape[ctx.layer_axes :])
        density = _density_at(self.density, ctx.step)
        if isinstance(density, (int, float)):
            count = int(density * entries)
            return jnp.uint32(count if count >= 1 else entries)
        # The product of a float32 density is exact enough, but may round up to 2**32.
        share = jnp.asarray(density, jnp.float32)
        count = jnp.minimum(jnp.floor(share * entries), 4294967040.0).astype(jnp.uint32)
        return jnp.where(count >= 1, jnp.minimum(count, jnp.uint32(entries)), jnp.uint32(entries))


def _keep_large(x: jax.Array, threshold: jax.Array) -> jax.Array:
    """Keeps what reaches the threshold; compares bits, since floats may flush subnormals to 0."""
    bits = jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.uint32)
    limit = jax.lax.bitcast_convert_type(threshold.astype(jnp.float32), jnp.uint32)
    return jnp.where(bits >= _per_layer(limit, x), x, 0)


def magnitude(
    density: optax.ScalarOrSchedule, *, rescale: Literal["none", "norm"] = "none"
) -> FittedSparsifier:
    """Keeps the ``int(density * n)`` entries of largest magnitude of each tensor (TIES).

    Entries equal to the smallest kept one are all kept. A tensor too small to keep one entry is left
    dense, as in the authors' code.

    Args:
      density: share kept, in (0, 1]; a float, a schedule of the step, or traced. Only a Python float
        gives the count exactly; others are multiplied in float32.
      rescale: ``"norm"`` gives what is kept the L1 norm it had before, per tensor.

    Returns:
      A sparsifier with ``fit`` and ``apply``.

    Raises:
      ValueError: a density outside (0, 1] or an unknown ``rescale``.

    References:
      Yadav et al., TIES-Merging, https://arxiv.org/abs/2306.01708; Lu et al.,
      https://arxiv.org/abs/2405.17931, Section 3.2.
    """
    check_density(density)
    if rescale not in ("none", "norm"):
        raise ValueError(f"rescale must be 'none' or 'norm', got rescale = {rescale!r}")
    return _Magnitude(density, rescale)

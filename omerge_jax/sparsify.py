"""Sparsifiers F: which entries of an update, or of the reference delta, are kept.

A sparsifier is any callable ``(x, ctx) -> array`` of the same shape. One whose choice rests on a few
numbers per tensor (a threshold, a scale) may also offer ``fit(x, ctx)`` and ``apply(x, fitted, ctx)``
with ``sparsifier(x, ctx) == apply(x, fit(x, ctx), ctx)``; the fit of a fixed delta is then computed
once and kept in the optimizer state instead of every step. One with a true attribute
``takes_samples`` can also be applied to a sample of a leaf (``ctx.sample``), by ``ctx.coordinates`` and
``ctx.leaf_shape``. One with ``capacity(entries)`` says how many entries it keeps at most.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax

from omerge_jax import random_mask
from omerge_jax.exact import Entries
from omerge_jax.numerics import wide_dtype
from omerge_jax.paths import Path
from omerge_jax.sample import Sample
from omerge_jax.threshold import per_layer
from omerge_jax.tie_order import TieOrder

Shaped = jax.Array | jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class SparsifyContext:
    """What a sparsifier may depend on besides the values.

    Attributes:
      step: int32 scalar, the optimizer steps taken before this one; 0 for a fixed delta.
      path: path names of the leaf.
      role: ``"update"`` for Δθ, ``"delta"`` for τ_r; in `offline_merge` ``"model0"``, ``"model1"`` …
      layer_axes: number of leading axes of the leaf that index separate tensors.
      sample: set where ``x`` is not the whole leaf but this sample of it.
    """

    step: jax.Array
    path: Path
    role: str
    layer_axes: int = 0
    sample: Sample | None = None

    def coordinates(self, x: jax.Array) -> list[jax.Array]:
        """Returns, per axis of the leaf, the uint32 coordinates of the entries of ``x``."""
        if self.sample is not None:
            return self.sample.coordinates()
        return [jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis) for axis in range(x.ndim)]

    def leaf_shape(self, x: Shaped) -> Sequence[int]:
        """Returns the shape of the leaf that ``x`` is, or is a sample of."""
        return x.shape if self.sample is None else self.sample.shape


class Sparsifier(Protocol):
    """F: any callable that keeps some entries of an array, see the module's text."""

    def __call__(self, x: jax.Array, ctx: SparsifyContext, /) -> jax.Array:
        """Returns ``x`` with what is not kept set to 0; what is kept may be rescaled."""
        ...


Draw = Callable[[jax.Array, jax.typing.ArrayLike, SparsifyContext], jax.Array]


@runtime_checkable
class FittedSparsifier(Protocol):
    """A sparsifier that rests on a few numbers per tensor, see the module's text."""

    def __call__(self, x: jax.Array, ctx: SparsifyContext) -> jax.Array:
        """Sparsifies ``x``."""
        ...

    def fit(self, x: jax.Array, ctx: SparsifyContext) -> jax.Array | None:
        """Returns non-negative float32 [*layers, m], or None where nothing is to be fitted.

        ``x`` may be a sample of the leaf (``ctx.sample``); a delta comes in the dtype it is held in.
        """
        ...

    def apply(self, x: jax.Array, fitted: jax.Array | None, ctx: SparsifyContext) -> jax.Array:
        """Sparsifies ``x`` with what was fitted."""
        ...


@runtime_checkable
class SampledSparsifier(FittedSparsifier, Protocol):
    """A fitted sparsifier that would rather fit a sample of an update than all of it."""

    def choose_sample(self, shape: Sequence[int], ctx: SparsifyContext) -> Sample | None:
        """Returns the sample to fit, of a leaf of ``shape``; None for all of it."""
        ...


@runtime_checkable
class RecomputingSparsifier(FittedSparsifier, Protocol):
    """A fitted sparsifier that can fit a leaf which is computed anew at every pass over it."""

    def choose_first_sample(self, shape: Sequence[int], ctx: SparsifyContext) -> Sample | None:
        """Returns the sample that `fit_entries` asks for; None where `fit` is what to call."""
        ...

    def fit_entries(self, entries: Entries, ctx: SparsifyContext) -> jax.Array:
        """Returns what ``fit`` of the whole leaf returns."""
        ...


def check_density(density: optax.ScalarOrSchedule) -> None:
    """Raises ValueError where a Python number is not a density: 0 < density <= 1."""
    if isinstance(density, (int, float)) and not 0 < density <= 1:
        raise ValueError(
            f"density is the share of entries kept and must be in (0, 1], got density = {density}"
        )


def density_at(density: optax.ScalarOrSchedule, step: jax.Array) -> jax.typing.ArrayLike:
    """Returns the density at a step, where it is a schedule."""
    return density(step) if callable(density) else density


def keeps_all(density: optax.ScalarOrSchedule) -> bool:
    """Whether a density is the literal 1."""
    return isinstance(density, (int, float)) and density == 1


def _tensor_sums(x: jax.Array, layer_axes: int) -> jax.Array:
    return jnp.sum(x, axis=tuple(range(layer_axes, x.ndim)))


# The authors' code adds this to the norm of the masked update that it divides by.
_RANDOM_NORM_EPS = 1e-6


def norm_ratio(dense: jax.Array, kept: jax.Array, layer_axes: int, eps: float) -> jax.Array:
    """Per tensor, the factor that gives ``kept`` the L1 norm of ``dense``; 0 where none is kept."""
    before, after = (
        _tensor_sums(jnp.abs(x.astype(wide_dtype(x.dtype))), layer_axes) for x in (dense, kept)
    )
    after = after + eps
    return jnp.where(after > 0, before / jnp.where(after > 0, after, 1), 0)


@dataclasses.dataclass(frozen=True)
class _Identity:
    takes_samples = True

    def __call__(self, x: jax.Array, ctx: SparsifyContext) -> jax.Array:
        return x


def identity() -> Sparsifier:
    """Keeps everything.

    Example:
      >>> ctx = SparsifyContext(step=jnp.int32(0), path=("w",), role="update")
      >>> identity()(jnp.array([1.0, 0.0]), ctx).tolist()
      [1.0, 0.0]
    """
    return _Identity()


@dataclasses.dataclass(frozen=True)
class _Random:
    density: optax.ScalarOrSchedule
    rescale: Literal["inverse", "norm", "none"]
    clip: jax.typing.ArrayLike | None
    seed: jax.typing.ArrayLike
    draw: Draw | None

    @property
    def takes_samples(self) -> bool:
        return self.draw is None

    def __call__(self, x: jax.Array, ctx: SparsifyContext) -> jax.Array:
        density = density_at(self.density, ctx.step)
        kept = x
        if not keeps_all(self.density):
            kept = jnp.where(self._mask(x, density, ctx), x, 0)
            # Times the inverse, as dropout does: a division per entry would cost as much as the mask.
            kept = kept if self.rescale == "none" else kept * jnp.asarray(1 / density, kept.dtype)
        normed = self.rescale == "norm" and ctx.role == "update"
        if normed:
            kept = kept * per_layer(norm_ratio(x, kept, ctx.layer_axes, _RANDOM_NORM_EPS), x)
        if self.clip is not None and (ctx.role == "delta" or normed):
            limit = jnp.asarray(self.clip, kept.dtype)
            kept = jnp.clip(kept, -limit, limit)
        return kept

    def _mask(self, x: jax.Array, density: jax.typing.ArrayLike, ctx: SparsifyContext) -> jax.Array:
        if self.draw is not None:
            return self.draw(x, density, ctx)
        return random_mask.bernoulli(
            ctx.leaf_shape(x),
            density,
            seed=self.seed,
            step=ctx.step,
            path=ctx.path,
            role=ctx.role,
            coordinates=ctx.coordinates(x),
        )

    def capacity(self, entries: int) -> int:
        return random_capacity(self.density, entries)


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

    Example:
      >>> ctx = SparsifyContext(step=jnp.int32(0), path=("w",), role="update")
      >>> sorted(set(random(0.5)(jnp.ones(100), ctx).tolist()))
      [0.0, 2.0]

    References:
      Yu et al., Language Models are Super Mario, https://arxiv.org/abs/2311.03099; Lu et al.,
      https://arxiv.org/abs/2405.17931, Eq. 3.
    """
    check_density(density)
    if rescale not in ("inverse", "norm", "none"):
        raise ValueError(f"rescale must be 'inverse', 'norm' or 'none', got rescale = {rescale!r}")
    return _Random(density, rescale, clip, seed, draw)


def random_capacity(density: optax.ScalarOrSchedule, entries: int) -> int:
    """Entries a Bernoulli mask keeps at most: eight standard deviations above the mean."""
    share = static_density(density)
    spread = math.sqrt(entries * share * (1 - share))
    return min(entries, math.ceil(entries * share + 8 * spread + 8))


def static_density(density: optax.ScalarOrSchedule) -> float:
    """Returns a density that is a Python number.

    Raises:
      ValueError: it is a schedule or an array, so that nobody knows how many entries it keeps.
    """
    if not isinstance(density, (int, float)):
        raise ValueError(
            "storage='sparse' needs a density that is a Python number (under "
            f"optax.inject_hyperparams name it in static_args), got density = {density!r}"
        )
    return density


def tie_order(x: Shaped, ctx: SparsifyContext, seed: jax.typing.ArrayLike) -> TieOrder:
    """Returns the order in which equal magnitudes of ``x`` are kept."""
    start = random_mask.order_start(seed, ctx.step, ctx.path)
    return TieOrder(start, tuple(ctx.leaf_shape(x)), ctx.layer_axes, ctx.sample)

"""Sparsifiers F: which entries of an update, or of the reference delta, are kept.

A sparsifier is any callable ``(x, ctx) -> array`` of the same shape. The library's own are classes,
which say more about themselves: `BaseSparsifier` has what a merge may ask of any sparsifier, and
`FittedSparsifier` is the base of those whose choice rests on a few numbers per tensor, such as a
threshold or a scale. A leaf always arrives with its layer axes in front.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Literal, Protocol

import jax
import jax.numpy as jnp
import optax

from omerge_jax import random_mask
from omerge_jax.checks import check_choice, check_integer, check_number, check_schedule
from omerge_jax.entries import Entries, Sample
from omerge_jax.numerics import wide_dtype, widened
from omerge_jax.paths import Path
from omerge_jax.threshold.edge import TieOrder, per_layer

_DENSITY = "the share of entries kept"
Shaped = jax.Array | jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class SparsifyContext:
    """What a sparsifier may depend on besides the values.

    Attributes:
      step: int32 scalar, the optimizer steps taken before this one; 0 for a fixed delta.
      path: path names of the leaf.
      role: ``"update"`` for Δθ, ``"delta"`` for τ_r; in `offline_merge` ``"model0"``, ``"model1"`` …
      layer_axes: number of leading axes of ``x`` that index separate tensors.
      sample: set where ``x`` is not the whole leaf but this sample of it.
    """

    step: jax.Array
    path: Path
    role: str
    layer_axes: int = 0
    sample: Sample | None = None

    def coordinates(self, x: jax.Array) -> list[jax.Array]:
        """Returns, per axis of the leaf, the uint32 coordinates of the entries of ``x``."""
        if self.sample is None:
            return random_mask.all_coordinates(x.shape)
        return self.sample.coordinates()

    def leaf_shape(self, x: Shaped) -> Sequence[int]:
        """Returns the shape of the leaf that ``x`` is, or is a sample of."""
        return x.shape if self.sample is None else self.sample.shape


class Sparsifier(Protocol):
    """F: any callable that keeps some entries of an array."""

    def __call__(self, x: jax.Array, ctx: SparsifyContext, /) -> jax.Array:
        """Returns ``x`` with what is not kept set to 0; what is kept may be rescaled."""
        ...


Draw = Callable[[jax.Array, jax.typing.ArrayLike, SparsifyContext], jax.Array]


class BaseSparsifier(abc.ABC):
    """A sparsifier that says what a merge may ask of it.

    Numbers it is made of should be fields of a frozen dataclass, so that it has a hash: a state that
    holds a sparse or fitted delta keeps its sparsifier.
    """

    @property
    def takes_samples(self) -> bool:
        """Whether ``x`` may be a sample of the leaf (``ctx.sample``); read by the diagnostics."""
        return False

    @abc.abstractmethod
    def __call__(self, x: jax.Array, ctx: SparsifyContext) -> jax.Array:
        """Returns ``x`` with what is not kept set to 0.

        A merge calls it with the update, unless it is a `FittedSparsifier`, and with a delta that is
        drawn anew at every step. `with_delta` calls it once where F(τ_r) itself is stored.
        """

    def capacity(self, entries: int) -> int | None:
        """Returns how many of a tensor's entries are kept at most; None where that is unknown.

        Called when a transformation with ``storage="sparse"`` is made, and for every leaf of its delta.
        """
        return None


class FittedSparsifier(BaseSparsifier):
    """A sparsifier that rests on a few numbers per tensor."""

    def __call__(self, x: jax.Array, ctx: SparsifyContext) -> jax.Array:
        """Returns ``apply(x, fit(x, ctx), ctx)``."""
        return self.apply(x, self.fit(x, ctx), ctx)

    @abc.abstractmethod
    def fit(self, x: jax.Array, ctx: SparsifyContext) -> jax.Array | None:
        """Returns non-negative float32 [*layers, m], or None where nothing is to be fitted.

        `with_delta` calls it with every leaf of a fixed delta, in the dtype that it is held in, and
        keeps the result; a merge calls it through `fit_entries`.
        """

    @abc.abstractmethod
    def apply(self, x: jax.Array, fitted: jax.Array | None, ctx: SparsifyContext) -> jax.Array:
        """Returns ``x`` sparsified with what was fitted; called at every merge."""

    def choose_sample(self, shape: Sequence[int], ctx: SparsifyContext) -> Sample | None:
        """Returns the sample of an update to fit, or None for all of it.

        Called at every merge, by `fit_entries` and by the diagnostics, which look at the same entries.
        """
        return None

    def fits_whole(self, shape: Sequence[int], ctx: SparsifyContext) -> bool:
        """Whether `fit_entries` reads the whole leaf as one array.

        Called by a merge in `fused_chain`, which has everything else read before updates are computed.
        """
        return self.choose_sample(shape, ctx) is None

    def fit_entries(self, entries: Entries, ctx: SparsifyContext) -> jax.Array | None:
        """Returns what is fitted to an update that can be read again; called once a merge.

        By default that is ``fit`` of the sample that `choose_sample` names, or of the whole leaf. A
        sparsifier that takes several passes overrides this, so that the leaf need not be stored.
        """
        sample = self.choose_sample(entries.shape, ctx)
        if sample is None:
            return self.fit(widened(entries.whole()), ctx)
        return self.fit(widened(entries.sample(sample)), dataclasses.replace(ctx, sample=sample))


@dataclasses.dataclass(frozen=True)
class EdgeSparsifier(FittedSparsifier):
    """Keeps entries by edges among the magnitudes; with ``"norm"`` a factor follows them in the fit."""

    density: optax.ScalarOrSchedule
    rescale: Literal["none", "norm"]
    seed: jax.typing.ArrayLike

    @property
    def takes_samples(self) -> bool:
        """Edges that were found for a leaf, or for a sample of it, hold for any sample of it."""
        return True

    @abc.abstractmethod
    def keep(self, x: jax.Array, edges: jax.Array, ctx: SparsifyContext) -> jax.Array:
        """Returns ``x`` with 0 where its edges, from `top_k_edge`, leave an entry out."""

    def count(self, x: Shaped, ctx: SparsifyContext) -> jax.Array:
        """Returns int(p·n) for n entries of each tensor of ``x``, a uint32 scalar."""
        entries = math.prod(x.shape[ctx.layer_axes :])
        return count_at(density_at(self.density, ctx.step), entries)

    def with_scale(self, edges: jax.Array, x: jax.Array, ctx: SparsifyContext) -> jax.Array:
        """Returns the edges, followed by the factor that ``rescale="norm"`` needs."""
        if self.rescale == "none":
            return edges
        scale = norm_ratio(x, self.keep(x, edges, ctx), ctx.layer_axes, 0.0)
        return jnp.concatenate([edges, scale.astype(jnp.float32)[..., None]], axis=-1)

    def apply(self, x: jax.Array, fitted: jax.Array | None, ctx: SparsifyContext) -> jax.Array:
        """Returns ``x`` sparsified, with the norm it had before where ``rescale="norm"``."""
        if fitted is None:
            return x
        kept = self.keep(x, fitted, ctx)
        # F(x) ← F(x) · ‖x‖₁ / ‖F(x)‖₁
        return kept if self.rescale == "none" else kept * per_layer(fitted[..., -1], x)


@dataclasses.dataclass(frozen=True)
class DrawnSparsifier(BaseSparsifier):
    """Keeps entries at random; ``draw`` is another source of masks than the places of the entries."""

    density: optax.ScalarOrSchedule
    rescale: Literal["inverse", "norm", "none"]
    seed: jax.typing.ArrayLike
    draw: Draw | None

    def mask(self, x: jax.Array, share: jax.typing.ArrayLike, ctx: SparsifyContext) -> jax.Array:
        """Returns which entries of ``x`` are kept, each with the probability ``share``."""
        if self.draw is not None:
            return self.draw(x, share, ctx)
        return random_mask.bernoulli(
            ctx.leaf_shape(x),
            share,
            seed=self.seed,
            step=ctx.step,
            path=ctx.path,
            role=ctx.role,
            coordinates=ctx.coordinates(x),
        )

    def capacity(self, entries: int) -> int:
        """Returns the mean number of entries that a mask keeps, and eight standard deviations."""
        share = static_density(self.density)
        spread = math.sqrt(entries * share * (1 - share))
        return min(entries, math.ceil(entries * share + 8 * spread + 8))


@dataclasses.dataclass(frozen=True)
class _Callable(BaseSparsifier):
    function: Sparsifier

    def __call__(self, x: jax.Array, ctx: SparsifyContext) -> jax.Array:
        return self.function(x, ctx)


def as_sparsifier(sparsifier: Sparsifier) -> BaseSparsifier:
    """Returns a sparsifier that can be asked everything, from any callable."""
    return sparsifier if isinstance(sparsifier, BaseSparsifier) else _Callable(sparsifier)


@dataclasses.dataclass(frozen=True)
class _Identity(BaseSparsifier):
    @property
    def takes_samples(self) -> bool:
        return True

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


def check_density(density: optax.ScalarOrSchedule) -> None:
    """Raises ValueError where a number is not a density: 0 < density <= 1."""
    check_schedule("density", density, "in (0, 1]", _DENSITY)


def check_common(
    density: optax.ScalarOrSchedule, rescale: str, rescales: Sequence[str], seed: object
) -> None:
    """Checks the arguments that all sparsifiers have."""
    check_density(density)
    check_choice("rescale", rescale, rescales)
    check_integer("seed", seed)


def density_at(density: optax.ScalarOrSchedule, step: jax.Array) -> jax.typing.ArrayLike:
    """Returns the density at a step, where it is a schedule."""
    share = density(step) if callable(density) else density
    check_number("density", share, "in (0, 1]", _DENSITY)
    return share


def keeps_all(density: optax.ScalarOrSchedule) -> bool:
    """Whether a density is the literal 1."""
    return isinstance(density, (int, float)) and density == 1


def static_density(density: optax.ScalarOrSchedule) -> float:
    """Returns a density, which must be a Python number; raises ValueError for any other."""
    if not isinstance(density, (int, float)):
        raise ValueError(
            "storage='sparse' needs a density that is a Python number (under "
            f"optax.inject_hyperparams name it in static_args), got density = {density!r}"
        )
    return density


def count_at(share: jax.typing.ArrayLike, entries: int) -> jax.Array:
    """Returns int(share · entries) as a uint32 scalar; exact for a Python number, else in float32."""
    if isinstance(share, (int, float)):
        return jnp.uint32(int(share * entries))
    # The product may round up, also to 2**32, which uint32 does not hold.
    count = jnp.minimum(jnp.floor(jnp.float32(share) * entries), 4294967040.0).astype(jnp.uint32)
    return jnp.minimum(count, jnp.uint32(entries))


def norm_ratio(
    dense: jax.Array, kept: jax.Array, layer_axes: int, eps: jax.typing.ArrayLike
) -> jax.Array:
    """Per tensor, ‖dense‖₁ / (‖kept‖₁ + eps), which gives ``kept`` its norm back; 0 for 0 / 0."""
    before, after = (
        jnp.sum(jnp.abs(x.astype(wide_dtype(x.dtype))), tuple(range(layer_axes, x.ndim)))
        for x in (dense, kept)
    )
    after = after + eps
    # A NaN is not equal to 0, so that what is kept becomes NaN and not silently 0.
    return jnp.where(after == 0, 0, before / jnp.where(after == 0, 1, after))


def tie_order(x: Shaped, ctx: SparsifyContext, seed: jax.typing.ArrayLike) -> TieOrder:
    """Returns the order in which equal magnitudes of ``x`` are kept."""
    start = random_mask.mask_key(seed, ctx.step, ctx.path, "order")[0]
    return TieOrder(start, tuple(ctx.leaf_shape(x)), ctx.layer_axes, ctx.sample)

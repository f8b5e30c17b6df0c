"""F by magnitude (TIES): the largest entries of each tensor are kept."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from omerge_jax.checks import check_choice
from omerge_jax.entries import Entries, Sample, choose_sample, entries_of
from omerge_jax.sparsifiers.base import (
    EdgeSparsifier,
    FittedSparsifier,
    Shaped,
    SparsifyContext,
    check_common,
    keeps_all,
    static_density,
    tie_order,
)
from omerge_jax.threshold.bracketed import Bracket, find_edge, large_top_k_edge
from omerge_jax.threshold.edge import is_beyond, search, top_k_edge, top_k_threshold

# With a share p kept, 1/p times as many entries are looked at: the share that is really kept is then
# off by half a percent of p (one standard deviation).
_SAMPLE_ENTRIES = 2.0**15
# For where an exact threshold is looked for first.
_BRACKET_ENTRIES = 2.0**13
# For a density that is not a Python number.
_DENSITY_IF_UNKNOWN = 0.1


@dataclasses.dataclass(frozen=True)
class _Magnitude(EdgeSparsifier):
    threshold: Literal["exact", "sampled"]

    def choose_sample(self, shape: Sequence[int], ctx: SparsifyContext) -> Sample | None:
        if self.threshold == "exact" or keeps_all(self.density):
            return None
        return choose_sample(shape, ctx.layer_axes, _SAMPLE_ENTRIES / self._share, ctx.step)

    def fit(self, x: jax.Array, ctx: SparsifyContext) -> jax.Array | None:
        if keeps_all(self.density):
            return None
        sample = None if ctx.sample is not None else self.choose_sample(x.shape, ctx)
        if sample is not None:
            return self.fit(sample.take(x), dataclasses.replace(ctx, sample=sample))
        count, order = self._count(x, ctx), tie_order(x, ctx, self.seed)
        first = self._first_sample(x.shape, ctx)
        if first is None:
            edge = top_k_edge(x, count, order, ctx.layer_axes)
        else:
            bracket = self._bracket(first.take(x), ctx)
            edge = large_top_k_edge(x, count, order, ctx.layer_axes, bracket)
        return self.with_scale(edge, x, ctx)

    def fits_whole(self, shape: Sequence[int], ctx: SparsifyContext) -> bool:
        return super().fits_whole(shape, ctx) and self._first_sample(shape, ctx) is None

    def fit_entries(self, entries: Entries, ctx: SparsifyContext) -> jax.Array | None:
        if entries.stored or self._first_sample(entries.shape, ctx) is None:
            return super().fit_entries(entries, ctx)
        # A large leaf that is not stored is read in passes.
        edge = self._find_edge(entries, ctx)[0]
        if self.rescale == "none":
            return edge
        return self.with_scale(edge, entries.read_again(jnp.int32(0)), ctx)

    def keep(self, x: jax.Array, edges: jax.Array, ctx: SparsifyContext) -> jax.Array:
        # F(x): the int(p·n) entries of largest magnitude (Section 3.2, OnTIES).
        return jnp.where(is_beyond(x, edges[..., :3], tie_order(x, ctx, self.seed)), x, 0)

    def capacity(self, entries: int) -> int:
        return int(static_density(self.density) * entries) or entries

    def passes(self, x: jax.Array, ctx: SparsifyContext) -> jax.Array:
        """Returns how often `fit` reads ``x``, or its sample, an int32 scalar."""
        if self._first_sample(x.shape, ctx) is not None:
            return self._find_edge(entries_of(x), ctx)[1]
        if (sample := self.choose_sample(x.shape, ctx)) is not None:
            x, ctx = sample.take(x), dataclasses.replace(ctx, sample=sample)
        return search(x, self._count(x, ctx), tie_order(x, ctx, self.seed), ctx.layer_axes)[2]

    @property
    def _share(self) -> float:
        density = self.density
        return density if isinstance(density, (int, float)) else _DENSITY_IF_UNKNOWN

    def _first_sample(self, shape: Sequence[int], ctx: SparsifyContext) -> Sample | None:
        """Returns the sample that says where the exact search of a large leaf begins."""
        exact = ctx.sample is None and self.choose_sample(shape, ctx) is None
        if keeps_all(self.density) or not exact:
            return None
        return choose_sample(shape, ctx.layer_axes, _BRACKET_ENTRIES / self._share, ctx.step)

    def _find_edge(self, entries: Entries, ctx: SparsifyContext) -> tuple[jax.Array, jax.Array]:
        first = self._first_sample(entries.shape, ctx)
        assert first is not None
        like = jax.ShapeDtypeStruct(entries.shape, jnp.float32)
        bracket = self._bracket(entries.sample(first), ctx)
        count, order = self._count(like, ctx), tie_order(like, ctx, self.seed)
        return find_edge(entries, count, order, ctx.layer_axes, bracket)

    def _bracket(self, sampled: jax.Array, ctx: SparsifyContext) -> Bracket:
        """Returns where a sample says that the threshold is."""
        count = self._count(sampled, ctx)
        # Six standard deviations of the count that a random sample of this size has.
        margin = jnp.ceil(6 * jnp.sqrt(count.astype(jnp.float32))).astype(jnp.uint32)
        more = jnp.minimum(count + margin, math.prod(sampled.shape[ctx.layer_axes :]))
        fewer = jnp.maximum(count, margin + 1) - margin
        return Bracket(*(top_k_threshold(sampled, k, ctx.layer_axes) for k in (more, fewer)))

    def _count(self, x: Shaped, ctx: SparsifyContext) -> jax.Array:
        """Returns k = int(p·n), or n where that is 0: such a tensor is left dense."""
        count = self.count(x, ctx)
        return jnp.where(count >= 1, count, jnp.uint32(math.prod(x.shape[ctx.layer_axes :])))


def magnitude(
    density: optax.ScalarOrSchedule,
    *,
    rescale: Literal["none", "norm"] = "none",
    threshold: Literal["exact", "sampled"] = "exact",
    seed: jax.typing.ArrayLike = 0,
) -> FittedSparsifier:
    """Keeps the ``int(density * n)`` entries of largest magnitude of each tensor (TIES).

    Exactly so many: of entries that tie with the smallest kept magnitude (all of them after a sign
    optimizer such as ``optax.lion``) a choice spread evenly over the tensor is kept, another one at
    every step. A tensor too small to keep one entry is left dense, as in the authors' code.

    Args:
      density: share kept, in (0, 1]; a float, a schedule of the step, or traced. Only a Python float
        gives the count exactly; others are multiplied in float32.
      rescale: ``"norm"`` gives what is kept the L1 norm it had before, per tensor.
      threshold: ``"exact"`` finds it in about three passes over the tensor (about six over a small
        one); in `fused_chain` each pass recomputes the update instead of storing it. ``"sampled"``
        takes it from about 32768 / density entries of each tensor, at least 1/64 of them, in rows that
        change from step to step, without a pass over all: the share kept is off by about half a percent
        of itself. Tensors hardly larger than their sample are done exactly.
      seed: integer that, with the step, path and index, orders equal magnitudes.

    Returns:
      A sparsifier with ``fit`` and ``apply``.

    Raises:
      ValueError: a density outside (0, 1], an unknown ``rescale`` or ``threshold``.

    Example:
      >>> ctx = SparsifyContext(step=jnp.int32(0), path=("w",), role="update")
      >>> magnitude(0.5)(jnp.array([0.1, -5.0, 2.0, -0.3]), ctx).tolist()
      [0.0, -5.0, 2.0, 0.0]

    References:
      Yadav et al., TIES-Merging, https://arxiv.org/abs/2306.01708; Lu et al.,
      https://arxiv.org/abs/2405.17931, Section 3.2.
    """
    check_common(density, rescale, ("none", "norm"), seed)
    check_choice("threshold", threshold, ("exact", "sampled"))
    return _Magnitude(density, rescale, seed, threshold)

"""The k-th largest magnitude of each tensor, exactly, without a sort and without a gather.

The bit pattern of a non-negative float32 is ordered like its value, so the threshold is found by
narrowing an interval: one pass over the tensor counts how many entries reach each of 15 candidates,
which leaves a fourteenth of it. Nine passes are always enough for all 31 bits. The search stops earlier
once the count is exact. Only the counts cross devices, so a sharded array stays where it is. Where
magnitudes tie, the search goes on over an order of the entries, which says which of them are among
the k. Of a large leaf `omerge_jax.threshold.bracketed` finds the same in fewer passes.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from omerge_jax import random_mask
from omerge_jax.entries import Sample
from omerge_jax.numerics import sum_together, widened

Order = Callable[[jax.typing.ArrayLike], jax.Array]
_PARTS = 14
_ALL = 2**32 - 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TieOrder:
    """A different uint32 for every entry of each tensor of a leaf, which is computed where it is used.

    Held as an array it would be as large as the leaf. With a ``sample`` it is the order of its entries.
    """

    start: jax.Array  # uint32 scalar, from the seed, the step and the leaf
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    layer_axes: int = dataclasses.field(metadata={"static": True})
    sample: Sample | None = None

    def __call__(self, never: jax.typing.ArrayLike) -> jax.Array:
        """Returns the order, uint32 that broadcasts to the leaf, or to its sample.

        ``never`` is a false bool scalar; where the compiler does not know that it is, it computes
        nothing ahead of the place where the order is used.
        """
        moved = jnp.asarray(never, jnp.uint32)
        if self.sample is None:
            coordinates = random_mask.all_coordinates(self.shape)
        else:
            coordinates = self.sample.coordinates()
        inner = [coordinate + moved for coordinate in coordinates[self.layer_axes :]]
        return random_mask.spread_order(self.start, inner, self.shape[self.layer_axes :])

    def at(self, index: jax.Array) -> jax.Array:
        """Returns the order of entries by their row-major index in the tensor, uint32."""
        size = math.prod(self.shape[self.layer_axes :])
        return random_mask.spread_order(self.start, [index], (size,))


def top_k_threshold(x: jax.Array, k: jax.typing.ArrayLike, layer_axes: int = 0) -> jax.Array:
    """Returns the magnitude that the ``k`` largest entries of each tensor reach, float32 [*layers].

    ``abs(x) >= threshold`` keeps the k largest of each tensor of ``x`` [*layers, ...] and what ties
    with the smallest of them; values are compared as float32. The threshold lies above the next
    magnitude and at or below the k-th. ``k`` is an integer from 1 to the entries of a tensor, and may
    be traced. Raises ValueError where a tensor has 2**32 entries or more, which no count can hold.

    Example:
      >>> x = jnp.array([0.1, -5.0, 2.0, -0.3])
      >>> (jnp.abs(x) >= top_k_threshold(x, 2)).tolist()
      [False, True, True, False]
    """
    magnitude = search(x, k, None, layer_axes)[0]
    return jax.lax.bitcast_convert_type(magnitude, jnp.float32)


# Compiled by itself, or every call outside of jax.jit would compile its loop anew.
@functools.partial(jax.jit, static_argnames="layer_axes")
def top_k_edge(
    x: jax.Array, k: jax.typing.ArrayLike, order: Order, layer_axes: int = 0
) -> jax.Array:
    """Returns what singles out exactly the ``k`` largest entries of each tensor, see `is_beyond`.

    The edge is float32 [*layers, 3]. ``x`` and ``k`` are as in `top_k_threshold`, but k may be 0. The
    ``order``, a pytree, is called with a false bool scalar and returns uint32 that broadcast to ``x``,
    different for every entry of a tensor: of entries that tie, those with the highest are among the k.
    """
    k = jnp.asarray(k)
    magnitude, limit, _ = search(x, jnp.maximum(k, 1), order, layer_axes)
    return as_edge(magnitude, limit, k)


def as_edge(magnitude: jax.Array, limit: jax.Array, k: jax.Array) -> jax.Array:
    """Returns an edge, float32 [*layers, 3], which nothing is beyond where the scalar ``k`` is 0.

    ``magnitude`` are the bits of the threshold, and ``limit`` says which of the entries that tie with
    it are beyond it, both uint32 [*layers].
    """
    threshold = jax.lax.bitcast_convert_type(magnitude, jnp.float32)
    threshold = jnp.where(k > 0, threshold, jnp.inf)
    limit = jnp.where(k > 0, limit, jnp.uint32(_ALL))
    # The limit in halves, which floats hold exactly.
    halves = [(limit >> 16).astype(jnp.float32), (limit & 0xFFFF).astype(jnp.float32)]
    return jnp.stack([threshold, *halves], axis=-1)


def is_beyond(x: jax.Array, edge: jax.Array, order: Order) -> jax.Array:
    """Returns which entries of ``x`` are among the k of an edge; ``order`` is what it was made with."""
    bits, threshold = magnitude_bits(x), per_layer(magnitude_bits(edge[..., 0]), x)
    high, low = edge[..., 1].astype(jnp.uint32), edge[..., 2].astype(jnp.uint32)
    return (bits > threshold) | (
        (bits == threshold) & (order(False) >= per_layer(high << 16 | low, x))
    )


def magnitude_bits(x: jax.Array) -> jax.Array:
    """Returns uint32 that are ordered like ``abs(x)``; unlike floats, no subnormal is flushed to 0."""
    return jax.lax.bitcast_convert_type(jnp.abs(widened(x).astype(jnp.float32)), jnp.uint32)


def per_layer(values: jax.Array, x: jax.Array) -> jax.Array:
    """Returns ``values`` [*layers] with axes of length 1 behind, to broadcast against ``x``."""
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))


def search(
    x: jax.Array, k: jax.typing.ArrayLike, order: Order | None, layer_axes: int = 0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the threshold's bits, the limit among ties, and how many passes were taken.

    The arguments are those of `top_k_edge`; without an order all ties are kept.
    """
    layers = x.shape[:layer_axes]
    wanted = jnp.broadcast_to(jnp.asarray(k).astype(jnp.uint32), layers)
    return search_keys(
        lambda never: magnitude_bits(jnp.where(never, 0, x)), order, wanted, x.shape, _ALL >> 1
    )


def search_keys(
    keys_of: Callable[[jax.Array], jax.Array],
    order: Order | None,
    wanted: jax.Array,
    shape: tuple[int, ...],
    last: int = _ALL,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the largest number that ``wanted`` keys reach, the limit among ties, and the passes.

    ``keys_of`` gives the keys, uint32 of ``shape`` [*layers, ...], from a false bool scalar (see
    `top_k_edge`, also for ``order``). ``wanted`` is uint32 [*layers]; no key is larger than ``last``.
    """
    layers = shape[: wanted.ndim]
    per_tensor = countable(shape, wanted.ndim)
    nothing, everything = jnp.zeros(layers, jnp.uint32), jnp.full(layers, _ALL, jnp.uint32)
    total = jnp.full(layers, per_tensor, jnp.uint32)
    start = _Interval(nothing, jnp.full(layers, last, jnp.uint32), total)
    found, passes = _narrow(keys_of, start, wanted)
    if order is None:
        return found.low, nothing, passes

    def ranks(never: jax.Array) -> jax.Array:
        keys = keys_of(never)
        settled = per_layer(found.low, keys)
        tied = jnp.where(keys == settled, order(never), jnp.uint32(0))
        return jnp.where(keys > settled, jnp.uint32(_ALL), tied)

    among_ties, more = _narrow(ranks, _Interval(nothing, everything, found.reaching), wanted)
    return found.low, among_ties.low, passes + more


def countable(shape: tuple[int, ...], layer_axes: int) -> int:
    """Returns the entries of a tensor of a leaf; raises ValueError where 32 bits cannot count them."""
    per_tensor = math.prod(shape[layer_axes:])
    if per_tensor >= _ALL:
        raise ValueError(
            f"a tensor of {per_tensor} entries is too large to count in 32 bits; if the leaf of "
            f"shape {shape} stacks layers, say so with layer_axes"
        )
    return per_tensor


class _Interval(NamedTuple):
    """Numbers, uint32 [*layers], between which the largest one is sought that enough keys reach."""

    low: jax.Array
    last: jax.Array  # inclusive
    reaching: jax.Array  # how many keys reach ``low``


def _narrow(
    keys_of: Callable[[jax.Array], jax.Array], start: _Interval, wanted: jax.Array
) -> tuple[_Interval, jax.Array]:
    """Narrows ``start`` to the largest number that ``wanted`` of the keys or more reach.

    ``keys_of`` gives the keys, uint32 [*layers, ...], from a bool scalar that is never true, which the
    compiler does not know. Keys that do not change in the loop it would compute before it and write
    out, an array as large as the leaf. A tensor of which exactly ``wanted`` keys reach the beginning
    of ``start`` is not searched. Returns the number of passes as well, an int32 scalar.
    """

    def open_tensors(interval: _Interval) -> jax.Array:
        return (interval.reaching != wanted) & (interval.low != interval.last)

    def unfinished(carry: tuple[Any, ...]) -> jax.Array:
        return jnp.any(open_tensors(carry[1]))

    def narrow(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        passes, interval = carry
        narrower = _narrower(keys_of(passes < 0), interval, wanted)
        # A tensor whose search is over waits for the others.
        return passes + 1, choose(open_tensors(interval), narrower, interval)

    passes, interval = jax.lax.while_loop(unfinished, narrow, (jnp.int32(0), start))
    return interval, passes


def _narrower(keys: jax.Array, interval: _Interval, wanted: jax.Array) -> _Interval:
    """Returns the part of an interval that the number is in."""
    low, last, reaching = interval
    part = (last - low) // jnp.uint32(_PARTS) + 1
    # Where parts are too many for a short interval, the rest begin at its end.
    begins = [low + jnp.minimum(jnp.uint32(n) * part, last - low) for n in range(1, _PARTS)]
    marks = [(keys >= per_layer(begin, keys)).astype(jnp.uint32) for begin in begins]
    numbers = sum_together(marks, tuple(range(wanted.ndim, keys.ndim)))
    found = _Interval(low, jnp.minimum(low + part - 1, last), reaching)
    for begin, number in zip(begins, numbers, strict=True):
        end = jnp.minimum(begin + jnp.minimum(part - 1, last - begin), last)
        found = choose(number >= wanted, _Interval(begin, end, number), found)
    return found


def choose(condition: jax.Array, chosen: Any, other: Any) -> Any:
    """Returns, tensor by tensor, one of two intervals (trees of arrays [*layers])."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), chosen, other)

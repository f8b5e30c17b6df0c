"""The k-th largest magnitude of each tensor, exactly, without a sort and without a gather.

The bit pattern of a non-negative float32 is ordered like its value, so the threshold is found digit
by digit: one pass over the tensor counts how many entries reach each of 15 candidates and fixes four
more bits. Eight passes are always enough; the search stops earlier once the count is exact. Only the
counts cross devices, so a sharded array stays where it is. Where magnitudes tie, the search goes on
over the digits of an order of the entries, which says which of them are among the k.
"""

import functools
import math

import jax
import jax.numpy as jnp

from omerge_jax.numerics import sum_together

_DIGIT_BITS = 4
_CANDIDATES = 2**_DIGIT_BITS - 1
_DIGITS = 32 // _DIGIT_BITS
_ALL = 2**32 - 1


def top_k_threshold(x: jax.Array, k: jax.typing.ArrayLike, layer_axes: int = 0) -> jax.Array:
    """Returns the magnitude that the ``k`` largest entries of each tensor reach.

    Args:
      x: float array [*layers, ...]; values are compared as float32.
      k: integer scalar, 1 <= k <= entries per tensor; may be traced.
      layer_axes: number of leading axes that index separate tensors.

    Returns:
      float32 array [*layers]: ``abs(x) >= threshold`` keeps the k largest of each tensor, and what
      ties with the smallest of them. It lies above the next magnitude and at or below the k-th.

    Raises:
      ValueError: a tensor has 2**32 entries or more, which the counts cannot hold.

    Example:
      >>> x = jnp.array([0.1, -5.0, 2.0, -0.3])
      >>> (jnp.abs(x) >= top_k_threshold(x, 2)).tolist()
      [False, True, True, False]
    """
    return _search(x, k, None, layer_axes)[0]


# Compiled by itself, or every call outside of jax.jit would compile its loop anew.
@functools.partial(jax.jit, static_argnames="layer_axes")
def top_k_edge(
    x: jax.Array, k: jax.typing.ArrayLike, order: jax.Array, layer_axes: int = 0
) -> jax.Array:
    """Returns what singles out exactly the ``k`` largest entries of each tensor, see `is_beyond`.

    Args:
      x: float array [*layers, ...]; values are compared as float32.
      k: integer scalar, 0 <= k <= entries per tensor; may be traced.
      order: uint32, broadcastable to ``x``, different for every entry of a tensor; of entries that
        tie, those with the highest are among the k.
      layer_axes: number of leading axes that index separate tensors.

    Returns:
      float32 array [*layers, 3].

    Raises:
      ValueError: see `top_k_threshold`.
    """
    k = jnp.asarray(k)
    threshold, limit = _search(x, jnp.maximum(k, 1), order, layer_axes)
    threshold = jnp.where(k > 0, threshold, jnp.inf)
    limit = jnp.where(k > 0, limit, jnp.uint32(_ALL))
    # The limit in halves, which floats hold exactly.
    halves = [(limit >> 16).astype(jnp.float32), (limit & 0xFFFF).astype(jnp.float32)]
    return jnp.stack([threshold, *halves], axis=-1)


def is_beyond(x: jax.Array, edge: jax.Array, order: jax.Array) -> jax.Array:
    """Returns which entries of ``x`` [*layers, ...] are among the k that an edge was made for.

    Args:
      x: float array [*layers, ...].
      edge: what `top_k_edge` returned, float32 [*layers, 3].
      order: the order it was given.
    """
    bits, threshold = magnitude_bits(x), per_layer(magnitude_bits(edge[..., 0]), x)
    high, low = edge[..., 1].astype(jnp.uint32), edge[..., 2].astype(jnp.uint32)
    return (bits > threshold) | ((bits == threshold) & (order >= per_layer(high << 16 | low, x)))


def magnitude_bits(x: jax.Array) -> jax.Array:
    """Returns uint32 that are ordered like ``abs(x)``; unlike floats, no subnormal is flushed to 0."""
    return jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.uint32)


def per_layer(values: jax.Array, x: jax.Array) -> jax.Array:
    """Returns ``values`` [*layers] with axes of length 1 behind, to broadcast against ``x``."""
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim))


def _search(
    x: jax.Array, k: jax.typing.ArrayLike, order: jax.Array | None, layer_axes: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the threshold and the tie limit; without an order all ties are kept."""
    per_tensor = math.prod(x.shape[layer_axes:])
    if per_tensor >= 2**32:
        raise ValueError(
            f"a tensor of {per_tensor} entries is too large to count in 32 bits; if the leaf of "
            f"shape {x.shape} stacks layers, say so with layer_axes"
        )
    layers, axes = x.shape[:layer_axes], tuple(range(layer_axes, x.ndim))
    wanted = jnp.broadcast_to(jnp.asarray(k).astype(jnp.uint32), layers)
    bits = magnitude_bits(x)

    def keys(magnitude: jax.Array, among_ties: jax.Array) -> jax.Array:
        """What is compared: magnitudes, and once these are settled the order of the ties."""
        if order is None:
            return bits
        settled = per_layer(magnitude, x)
        tied = jnp.where(bits == settled, order, jnp.uint32(0))
        return jnp.where(among_ties, jnp.where(bits > settled, jnp.uint32(_ALL), tied), bits)

    def unfinished(carry: tuple[jax.Array, ...]) -> jax.Array:
        digit, _, _, reaching = carry
        last = _DIGITS if order is None else 2 * _DIGITS
        return (digit < last) & jnp.any(reaching != wanted)

    def next_digit(carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        digit, magnitude, limit, reaching = carry
        among_ties = digit >= _DIGITS
        low = jnp.where(among_ties, limit, magnitude)
        place = 32 - _DIGIT_BITS * (1 + digit % _DIGITS)
        unit = jnp.uint32(1) << place.astype(jnp.uint32)
        candidates = [low + jnp.uint32(n + 1) * unit for n in range(_CANDIDATES)]
        compared = keys(magnitude, among_ties)
        marks = [(compared >= per_layer(c, x)).astype(jnp.uint32) for c in candidates]
        for candidate, number in zip(candidates, sum_together(marks, axes), strict=True):
            # A tensor whose search is over waits for the others.
            better = (number >= wanted) & (reaching != wanted)
            low = jnp.where(better, candidate, low)
            reaching = jnp.where(better, number, reaching)
        return (
            digit + 1,
            jnp.where(among_ties, magnitude, low),
            jnp.where(among_ties, low, limit),
            reaching,
        )

    nothing = jnp.zeros(layers, jnp.uint32)
    start = (jnp.int32(0), nothing, nothing, jnp.full(layers, per_tensor, jnp.uint32))
    _, magnitude, limit, _ = jax.lax.while_loop(unfinished, next_digit, start)
    return jax.lax.bitcast_convert_type(magnitude, jnp.float32), limit

"""The k-th largest magnitude of each tensor, exactly, without a sort and without a gather.

The bit pattern of a non-negative float32 is ordered like its value, so the threshold is found digit
by digit: one pass over the tensor counts how many entries reach each of 15 candidates and fixes four
more bits. Eight passes are always enough; the search stops earlier once the count is exact. Only the
counts cross devices, so a sharded array stays where it is.
"""

import math

import jax
import jax.numpy as jnp

from omerge_jax.numerics import sum_together

_DIGIT_BITS = 4
_CANDIDATES = 2**_DIGIT_BITS - 1


def top_k_threshold(x: jax.Array, k: jax.typing.ArrayLike, layer_axes: int = 0) -> jax.Array:
    """Returns a magnitude that exactly the ``k`` largest entries of each tensor reach.

    Entries that tie with the k-th largest are all above the threshold, so more than ``k`` are kept
    only where magnitudes are equal.

    Args:
      x: float array [*layers, ...]; values are compared as float32.
      k: integer scalar, 1 <= k <= entries per tensor; may be traced.
      layer_axes: number of leading axes that index separate tensors.

    Returns:
      float32 array [*layers]: ``abs(x) >= threshold`` keeps the k largest of each tensor. It lies
      above the (k+1)-th largest magnitude and at or below the k-th.

    Raises:
      ValueError: a tensor has 2**32 entries or more, which the counts cannot hold.

    Example:
      >>> x = jnp.array([0.1, -5.0, 2.0, -0.3])
      >>> (jnp.abs(x) >= top_k_threshold(x, 2)).tolist()
      [False, True, True, False]
    """
    per_tensor = math.prod(x.shape[layer_axes:])
    if per_tensor >= 2**32:
        raise ValueError(
            f"a tensor of {per_tensor} entries is too large to count in 32 bits; if the leaf of "
            f"shape {x.shape} stacks layers, say so with layer_axes"
        )
    layers = x.shape[:layer_axes]
    bits = jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.uint32)
    wanted = jnp.broadcast_to(jnp.asarray(k).astype(jnp.uint32), layers)

    def unfinished(carry: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        shift, _, count = carry
        return (shift >= 0) & jnp.any(count != wanted)

    def next_digit(
        carry: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        shift, low, count = carry
        step = jnp.uint32(1) << shift.astype(jnp.uint32)
        candidates = [low + jnp.uint32(digit + 1) * step for digit in range(_CANDIDATES)]
        counts = _count_reaching(bits, candidates, layer_axes)
        for candidate, reaching in zip(candidates, counts, strict=True):
            enough = reaching >= wanted
            low = jnp.where(enough, candidate, low)
            count = jnp.where(enough, reaching, count)
        return shift - _DIGIT_BITS, low, count

    start = (
        jnp.int32(32 - _DIGIT_BITS),
        jnp.zeros(layers, jnp.uint32),
        jnp.full(layers, per_tensor, jnp.uint32),
    )
    _, low, _ = jax.lax.while_loop(unfinished, next_digit, start)
    return jax.lax.bitcast_convert_type(low, jnp.float32)


def _count_reaching(
    bits: jax.Array, candidates: list[jax.Array], layer_axes: int
) -> list[jax.Array]:
    """Counts the entries of each tensor that reach each candidate, in one pass."""
    trailing = (1,) * (bits.ndim - layer_axes)
    reached = [(bits >= c.reshape(c.shape + trailing)).astype(jnp.uint32) for c in candidates]
    return sum_together(reached, tuple(range(layer_axes, bits.ndim)))

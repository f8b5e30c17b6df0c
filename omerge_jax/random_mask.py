"""Bernoulli draws that are a pure function of (seed, step, path, role, element index).

``jax.random.bernoulli`` materialises its bits and costs an order of magnitude more than the AdamW
step it would mask. Here every element hashes its own index, so the draw fuses into whatever reads
it, and because nothing but the index enters, the mask is the same on any mesh and after a resume.
The hash is keyed between its rounds (not only at its input, where two keys would merely shift one
common sequence), and the 32-bit mixing constants are those of the ``lowbias32`` search
(https://nullprogram.com/blog/2018/07/31/, public domain).
"""

import hashlib
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from omerge_jax.paths import Path

_WORD = 2**32


def _mix(x: jax.Array) -> jax.Array:
    """Bijective 32-bit finaliser."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


# An odd multiplier: the bits of a role are a bijection of the bits of the element, and both roles
# together fill their square evenly, so that one hash serves both masks of a step.
_STREAMS = {"update": None, "delta": 0x9E3779B9}
# Multiples of these, modulo 2**32, are spread as evenly as multiples can be: the fractional parts of
# the golden ratio and of the square root of 2.
_GOLDEN, _SILVER = 0x9E3779B9, 0x6A09E667


def mask_key(
    seed: jax.typing.ArrayLike, step: jax.typing.ArrayLike, path: Path, role: str = ""
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the three uint32 scalars that key the draws of one leaf at one step, for one role."""
    digest = hashlib.blake2b("\0".join((role, *path)).encode(), digest_size=8).digest()
    name = [int.from_bytes(digest[i : i + 4], "little") for i in (0, 4)]
    seed = seed % _WORD if isinstance(seed, int) else seed
    words = [jnp.asarray(word, jnp.uint32) for word in (seed, step, *name)]
    keys = []
    for stream in (0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35):
        state = jnp.uint32(stream)
        for word in words:
            state = _mix((state ^ word) + jnp.uint32(stream))
        keys.append(state)
    return keys[0], keys[1], keys[2]


def element_index(
    coordinates: Sequence[jax.Array], shape: Sequence[int]
) -> tuple[jax.Array | None, jax.Array]:
    """Returns the row-major index of elements as two uint32 words, ``(high, low)``.

    ``coordinates`` are one uint32 array per axis, broadcastable against each other; ``high`` is None
    where the size of the whole array is at most 2**32. Raises ValueError where a single axis, or the
    product of the leading axes, exceeds 2**32.
    """
    if not shape:
        return None, jnp.uint32(0)
    split = len(shape) - 1
    while split > 0 and math.prod(shape[split - 1 :]) <= _WORD:
        split -= 1
    row_size = math.prod(shape[split:])
    if row_size > _WORD or math.prod(shape[:split]) > _WORD:
        raise ValueError(f"an axis of more than 2**32 elements is not supported, got shape {shape}")
    inner = _linear(coordinates[split:], shape[split:])
    if split == 0:
        return None, inner
    row = _linear(coordinates[:split], shape[:split])
    high, start = _multiply_wide(row, row_size)
    low = start + inner
    return high + (low < start).astype(jnp.uint32), low


def _linear(coordinates: Sequence[jax.Array], shape: Sequence[int]) -> jax.Array:
    index = coordinates[0]
    for coordinate, size in zip(coordinates[1:], shape[1:], strict=True):
        index = index * jnp.uint32(size) + coordinate
    return index


def _multiply_wide(x: jax.Array, factor: int) -> tuple[jax.Array, jax.Array]:
    """Returns the high and low words of ``x * factor``; ``factor`` is at most 2**32."""
    if factor == _WORD:
        return x, jnp.zeros_like(x)
    f_low, f_high = jnp.uint32(factor & 0xFFFF), jnp.uint32(factor >> 16)
    x_low, x_high = x & 0xFFFF, x >> 16
    middle = x_high * f_low + (x_low * f_low >> 16)
    carry = (middle & 0xFFFF) + x_low * f_high
    return x_high * f_high + (middle >> 16) + (carry >> 16), x * jnp.uint32(factor)


def hash_index(
    key: tuple[jax.Array, jax.Array, jax.Array], high: jax.Array | None, low: jax.Array
) -> jax.Array:
    """Returns 32 uniform bits per element index (a bijection of ``low`` for a fixed ``high``)."""
    a, b, c = key
    if high is not None:
        spread = _mix(high + a)
        b, c = b ^ spread, c + spread * jnp.uint32(0x9E3779B9)
    # Without the first product neighbours at power-of-two distances are visibly correlated.
    x = low * jnp.uint32(0x9E3779B9) + a
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D) + b
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B) + c
    return x ^ (x >> 16)


def all_coordinates(shape: Sequence[int]) -> list[jax.Array]:
    """Returns, per axis, the uint32 coordinates of all elements."""
    return [jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in range(len(shape))]


def spread_order(
    start: jax.Array, coordinates: Sequence[jax.Array], shape: Sequence[int]
) -> jax.Array:
    """Returns a different uint32 for every element of a tensor of at most 2**32 elements.

    The elements beyond any limit are spread evenly over the tensor (multiples of an odd number near
    2**32 times the fractional part of the square root of 2); another ``start``, a uint32 scalar, puts
    other elements first. One multiplication per element.
    """
    return element_index(coordinates, shape)[1] * jnp.uint32(_SILVER) + start


def rounding_bits(
    shape: Sequence[int], *, seed: jax.typing.ArrayLike, step: jax.typing.ArrayLike, path: Path
) -> jax.Array:
    """Returns 32 bits per element of a leaf for stochastic rounding; one multiplication per element.

    For every element they are uniform and independent from step to step, which is what keeps a sum
    over steps unbiased. Within a step the elements share them out evenly instead of independently.
    """
    _, low = element_index(all_coordinates(shape), shape)
    start, _, _ = mask_key(seed, step, path, "rounding")
    return low * jnp.uint32(_GOLDEN) + start


def bernoulli(
    shape: Sequence[int],
    density: jax.typing.ArrayLike,
    *,
    seed: jax.typing.ArrayLike,
    step: jax.typing.ArrayLike,
    path: Path = (),
    role: str = "update",
    coordinates: Sequence[jax.Array] | None = None,
) -> jax.Array:
    """Draws a mask that keeps each element of a leaf with probability ``density``.

    The density, in (0, 1], is a float or a (traced) array that broadcasts to the mask, one probability
    per element. Another step, path or role is another draw; the same arguments give the same mask under
    any sharding. With ``coordinates``, uint32 per axis of the leaf, the mask has their shape and is
    that of these elements, else it has the leaf's ``shape``.

    Raises ValueError where a single axis exceeds 2**32 elements, or ``density`` does not broadcast.

    Example:
      >>> mask = bernoulli((1000, 1000), 0.01, seed=0, step=0, path=("kernel",))
      >>> bool(abs(mask.mean() - 0.01) < 1e-3)
      True
    """
    high, low = element_index(coordinates or all_coordinates(shape), shape)
    # The two roles of a merge share a hash, which the compiler computes once.
    bits = hash_index(mask_key(seed, step, path, "" if role in _STREAMS else role), high, low)
    if (stream := _STREAMS.get(role)) is not None:
        bits = bits * jnp.uint32(stream)
    share = jnp.asarray(density, jnp.float32)
    if share.ndim:
        share = jnp.broadcast_to(share, bits.shape)
    # m = [bits < p·2³²], which is 1 with probability p.
    # The largest float32 below 2**32: beyond it the conversion to uint32 is undefined.
    limit = jnp.minimum(share * float(_WORD), 4294967040.0).astype(jnp.uint32)
    return (bits < limit) | (share >= 1.0)

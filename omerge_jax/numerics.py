"""Small numerical parts that several modules share."""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp


def wide_dtype(*dtypes: jax.typing.DTypeLike) -> Any:
    """The dtype in which leaves of these dtypes are computed together: at least float32."""
    # The caller may have set strict promotion, under which bfloat16 and float32 have no common dtype.
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, dtypes, jnp.float32)


def copied(x: Any) -> Any:
    """Returns a copy, so that ``x`` can be donated; of an abstract array there is nothing to copy."""
    return x if isinstance(x, jax.ShapeDtypeStruct) else jnp.copy(x)


def widened(x: jax.Array) -> jax.Array:
    """Returns ``x`` in the dtype it is computed in, with the value that it has where it is stored.

    A compiler is free not to round what it has just computed in bfloat16, and may do so in one place
    where it is computed and not in the next.
    """
    wide = x.astype(wide_dtype(x.dtype))
    if x.dtype != jnp.bfloat16:
        return wide
    return jax.lax.reduce_precision(wide, exponent_bits=8, mantissa_bits=7)


Reduction = Literal["sum", "max", "min"]
_COMBINE = {"sum": jnp.add, "max": jnp.maximum, "min": jnp.minimum}


def reduce_together(
    wanted: Sequence[tuple[jax.Array, Reduction]], axes: tuple[int, ...]
) -> list[jax.Array]:
    """Reduces arrays of one shape over ``axes`` in one reduction of several outputs.

    What the arrays are computed from is read once, and the CPU compiler vectorises a reduction of
    several outputs where it does not vectorise a single one.
    """
    kinds = [kind for _, kind in wanted]

    def combine(left: Any, right: Any) -> list[jax.Array]:
        return [_COMBINE[kind](a, b) for kind, a, b in zip(kinds, left, right, strict=True)]

    largest = jnp.uint32(2**32 - 1)
    starts = [largest if kind == "min" else jnp.zeros([], x.dtype) for x, kind in wanted]
    return list(jax.lax.reduce([x for x, _ in wanted], starts, combine, axes))


def sum_together(arrays: Sequence[jax.Array], axes: tuple[int, ...]) -> list[jax.Array]:
    """Sums arrays of one shape, see `reduce_together`."""
    return reduce_together([(array, "sum") for array in arrays], axes)


def renewed(tree: Any, turn: jax.Array) -> Any:
    """Returns ``tree`` unchanged; the compiler takes it to depend on ``turn``."""
    return jax.lax.optimization_barrier((turn, tree))[1]

"""Small numerical parts that several modules share."""

from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp


def wide_dtype(dtype: jax.typing.DTypeLike) -> Any:
    """The dtype in which leaves of ``dtype`` are computed: at least float32."""
    return jnp.promote_types(dtype, jnp.float32)


def sum_together(arrays: Sequence[jax.Array], axes: tuple[int, ...]) -> list[jax.Array]:
    """Sums arrays of one shape and dtype over ``axes`` in one reduction of several outputs.

    What the arrays are computed from is read once, and the CPU compiler vectorises a reduction of
    several outputs where it does not vectorise a single one.
    """

    def add(left: list[jax.Array], right: list[jax.Array]) -> list[jax.Array]:
        return [a + b for a, b in zip(left, right, strict=True)]

    zeros = [jnp.zeros([], array.dtype) for array in arrays]
    return jax.lax.reduce(list(arrays), zeros, add, axes)


Reduction = Literal["sum", "max", "min"]
_REDUCE = {"sum": jnp.sum, "max": jnp.max, "min": jnp.min}
_COMBINE = {"sum": jnp.add, "max": jnp.maximum, "min": jnp.minimum}


def reduce_together(
    wanted: Sequence[tuple[jax.Array, Reduction]], axes: tuple[int, ...]
) -> list[jax.Array]:
    """Reduces uint32 arrays of one shape over ``axes``, reading once what they are computed from.

    The CPU compiler needs one reduction of several outputs for that, see `sum_together`. Others find
    it themselves, and would gather the parts of such a reduction from all devices instead of summing
    them: these are no scalars.
    """
    arrays, kinds = zip(*wanted, strict=True)

    def combine(left: Any, right: Any) -> list[jax.Array]:
        return [_COMBINE[kind](a, b) for kind, a, b in zip(kinds, left, right, strict=True)]

    def at_once(arrays: Any) -> list[jax.Array]:
        largest = jnp.uint32(2**32 - 1)
        starts = [largest if kind == "min" else jnp.uint32(0) for kind in kinds]
        return list(jax.lax.reduce(list(arrays), starts, combine, axes))

    def one_by_one(arrays: Any) -> list[jax.Array]:
        reduced = []
        for array, kind in zip(arrays, kinds, strict=True):
            dtype = {"dtype": jnp.uint32} if kind == "sum" else {}
            reduced.append(_REDUCE[kind](array, axes, **dtype))
        return reduced

    return jax.lax.platform_dependent(list(arrays), cpu=at_once, default=one_by_one)


def renewed(tree: Any, turn: jax.Array) -> Any:
    """Returns a tree of arrays as it is, which the compiler takes to depend on ``turn``."""
    return jax.lax.optimization_barrier((turn, tree))[1]

"""Small numerical parts that several modules share."""

from collections.abc import Sequence
from typing import Any

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

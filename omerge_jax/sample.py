"""A regular sample of a leaf: some rows of every block of rows.

Statistics of an update (a threshold, a norm, a share) need not read all of it. The sample is taken
along an axis by splitting it into blocks, which a mesh axis that divides the array also divides, so
that no device asks another for entries; from every block come the same few neighbouring rows, which
a TPU reads as whole tiles.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

_BLOCK = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sample:
    """Which entries of a leaf are in the sample.

    Attributes:
      shape: shape of the leaf.
      axis: the axis that is sampled.
      block: rows per block along ``axis``; divides ``shape[axis]``.
      width: rows taken of every block.
      step: int32 scalar; successive steps look at other rows.
    """

    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})
    block: int = dataclasses.field(metadata={"static": True})
    width: int = dataclasses.field(metadata={"static": True})
    step: jax.Array

    @property
    def offset(self) -> jax.Array:
        """The first row taken of every block, an int32 scalar."""
        turn = (self.step * 7) % (self.block // self.width)
        return turn.astype(jnp.int32) * self.width

    def take(self, x: jax.Array) -> jax.Array:
        """Returns the sample of ``x`` [*shape] with ``axis`` split into [blocks, width]."""
        split = (self.shape[self.axis] // self.block, self.block)
        blocks = x.reshape(self.shape[: self.axis] + split + self.shape[self.axis + 1 :])
        return jax.lax.dynamic_slice_in_dim(blocks, self.offset, self.width, self.axis + 1)

    def coordinates(self) -> list[jax.Array]:
        """Returns, per axis of the leaf, the uint32 coordinates of the sample's entries."""
        before, after = self.shape[: self.axis], self.shape[self.axis + 1 :]
        shape = (*before, self.shape[self.axis] // self.block, self.width, *after)
        grid = [jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in range(len(shape))]
        row = grid[self.axis] * self.block + grid[self.axis + 1] + self.offset.astype(jnp.uint32)
        return [*grid[: self.axis], row, *grid[self.axis + 2 :]]


def choose_sample(
    shape: Sequence[int], layer_axes: int, entries: float, step: jax.Array
) -> Sample | None:
    """Returns a sample of at least about ``entries`` entries of each tensor of a leaf.

    Args:
      shape: shape of the leaf.
      layer_axes: number of leading axes that index separate tensors.
      entries: wanted entries per tensor.
      step: int32 scalar; successive steps look at other rows.

    Returns:
      A sample of 1/64 of the leaf or more, or None where all of it should be taken.
    """
    size = math.prod(shape[layer_axes:])
    if not size:
        return None
    share = entries / size
    for axis in range(layer_axes, len(shape)):
        block = next(b for b in range(min(_BLOCK, shape[axis]), 0, -1) if shape[axis] % b == 0)
        width = max(1, math.ceil(share * block))
        if 2 * width <= block:
            return Sample(tuple(shape), axis, block, width, step)
    return None

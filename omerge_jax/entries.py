"""A leaf that may be computed on demand: it can be read whole, more than once, or as a sample.

In `fused_chain` the update of a leaf is not stored: every reading computes it anew from the gradient,
the moments and the parameter. In a plain chain it is an array, and a reading reads that.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from omerge_jax.numerics import renewed
from omerge_jax.paths import Axes, to_front

Part = Callable[[jax.Array], jax.Array]

_BLOCK = 64


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sample:
    """A regular sample of a leaf: some rows of every block of rows.

    Statistics of an update (a threshold, a norm, a share) need not read all of it. An axis is split
    into blocks, which a mesh axis that divides the array also divides, so that no device asks another
    for entries. From every block come the same few neighbouring rows, which a TPU reads as whole tiles.
    """

    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})
    # Rows in a block, which divides ``shape[axis]``, and rows taken of every block.
    block: int = dataclasses.field(metadata={"static": True})
    width: int = dataclasses.field(metadata={"static": True})
    step: jax.Array  # int32 scalar; successive steps look at other rows

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

    That is 1/64 of the leaf or more; None where all of it should be taken.
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


@dataclasses.dataclass(frozen=True)
class Entries:
    """A leaf that can be read more than once, stored or not."""

    shape: tuple[int, ...]
    dtype: Any
    whole: Callable[[], jax.Array]  # gives the leaf as an array that is computed once
    # `read(part)` returns `part(leaf)`, computed by applying `part` to the inputs the leaf is computed
    # from.
    read: Callable[[Part], jax.Array]
    # Makes the compiler compute an array before the whole leaf.
    compute_first: Callable[[jax.Array], None] = lambda known: None
    stored: bool = False  # whether the leaf is an array, so that a reading computes nothing

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of entries."""
        return math.prod(self.shape)

    def sample(self, sample: Sample) -> jax.Array:
        """Returns a sample of the leaf."""
        return self.read(sample.take)

    def read_again(self, turn: jax.Array) -> jax.Array:
        """Returns the whole leaf, read once more, which the compiler takes to depend on ``turn``.

        ``turn`` is an int32 scalar. Without this the compiler would hoist the value out of the loop and
        store it.
        """
        return self.read(lambda x: renewed(x, turn))

    def front(self, axes: Axes) -> "Entries":
        """Returns the leaf with its layer axes in front."""
        order = [*axes, *(axis for axis in range(self.ndim) if axis not in axes)]
        return dataclasses.replace(
            self,
            shape=tuple(self.shape[axis] for axis in order),
            whole=lambda: to_front(self.whole(), axes),
            read=lambda part: self.read(lambda x: part(to_front(x, axes))),
        )


def entries_of(x: "jax.Array | Entries") -> Entries:
    """Returns the entries of an array that is stored; entries are returned as they are."""
    if isinstance(x, Entries):
        return x
    return Entries(tuple(x.shape), x.dtype, lambda: x, lambda part: part(x), stored=True)

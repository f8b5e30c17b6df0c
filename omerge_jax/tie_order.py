"""The order in which entries of equal magnitude are kept."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from omerge_jax import random_mask
from omerge_jax.sample import Sample


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TieOrder:
    """A different uint32 for every entry of each tensor of a leaf, which is computed where it is used.

    Held as an array it would be as large as the leaf.

    Attributes:
      start: uint32 scalar, from the seed, the step and the leaf.
      shape: shape of the leaf.
      layer_axes: number of leading axes that index separate tensors.
      sample: where the order of this sample of the leaf is wanted.
    """

    start: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    layer_axes: int = dataclasses.field(metadata={"static": True})
    sample: Sample | None = None

    def __call__(self, never: jax.typing.ArrayLike) -> jax.Array:
        """Returns the order, uint32 that broadcasts to the leaf, or to its sample.

        Args:
          never: bool scalar that is false; where the compiler does not know, nothing is computed ahead.
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

"""How the reference delta is held in the optimizer state.

======================  ===================================================================  ==========
``storage``             what the state holds                                                 bytes each
======================  ===================================================================  ==========
``"dense"``             τ_r as it is given to `with_delta`, in any dtype                     2 (bf16)
``"sparse"``            the entries of F(τ_r) and their places, where F stands still         ≈ 7·density
``"pinned_host"``       τ_r in the host's memory, copied to the device at every step         0 + 2 there
``"recompute"``         nothing: ``update`` is given θ_r and θ_b and subtracts               0
======================  ===================================================================  ==========
"""

import dataclasses
import math
from typing import Any, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.core import Tracer

from omerge_jax.numerics import wide_dtype
from omerge_jax.paths import Path
from omerge_jax.sparsify import Sparsifier, SparsifyContext

Storage = Literal["dense", "sparse", "pinned_host", "recompute"]


@runtime_checkable
class BoundedSparsifier(Protocol):
    """A sparsifier that knows how many entries of a tensor it keeps at most."""

    def capacity(self, entries: int) -> int:
        """Returns the largest number of entries kept of a tensor of ``entries`` entries."""
        ...


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one leaf of a delta is to be held; static, and kept with the leaf.

    Attributes:
      storage: how.
      sparsifier: F, where its result is held.
      layer_axes: number of leading axes of the leaf that index separate tensors.
      path: path names of the leaf.
    """

    storage: Storage
    sparsifier: Sparsifier | None = None
    layer_axes: int = 0
    path: Path = ()

    def entries_kept(self, shape: tuple[int, ...]) -> int | None:
        """Returns how many entries of each tensor are held; None where a dense leaf is smaller."""
        if self.storage != "sparse" or not isinstance(self.sparsifier, BoundedSparsifier):
            return None
        entries = math.prod(shape[self.layer_axes :])
        capacity = max(1, self.sparsifier.capacity(entries))
        # Rounded up by an eighth at most, so that meshes can divide it.
        unit = 1 << max(0, capacity.bit_length() - 4)
        capacity = -(-capacity // unit) * unit
        return capacity if 3 * capacity < entries else None

    def encode(self, delta: jax.Array) -> Any:
        """Returns the leaf that goes into the state."""
        if self.storage == "pinned_host":
            return _to_host(delta)
        kept = self.entries_kept(delta.shape)
        # A copy, so that the state and whatever the delta came from can both be donated.
        return jnp.array(delta, copy=True) if kept is None else self._compress(delta, kept)

    def _compress(self, delta: jax.Array, kept: int) -> "SparseDelta":
        layers, tensor = delta.shape[: self.layer_axes], delta.shape[self.layer_axes :]
        if math.prod(tensor) >= 2**31:
            raise ValueError(
                f"a tensor of {math.prod(tensor)} entries is too large for storage='sparse'; if "
                f"the leaf of shape {delta.shape} stacks layers, say so with layer_axes"
            )
        assert self.sparsifier is not None
        step = jnp.zeros([], jnp.int32)
        ctx = SparsifyContext(step, self.path, "delta", self.layer_axes)
        sparse = self.sparsifier(delta.astype(wide_dtype(delta.dtype)), ctx).astype(delta.dtype)

        def compress(row: jax.Array) -> tuple[jax.Array, jax.Array]:
            (places,) = jnp.nonzero(row, size=kept, fill_value=0)
            real = jnp.arange(kept) < jnp.count_nonzero(row)
            return places.astype(jnp.int32), jnp.where(real, row[places], 0)

        rows = sparse.reshape(math.prod(layers), math.prod(tensor))
        # One tensor after the other: on a mesh each is gathered for its search.
        places, values = jax.lax.map(compress, rows)
        shape = (*layers, kept)
        return SparseDelta(places.reshape(shape), values.reshape(shape), delta.shape, self)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class UnsetDelta:
    """Marks, without any array, where a leaf of the reference delta belongs.

    Attributes:
      shape: shape of the parameter.
      recipe: how the leaf will be held.
    """

    shape: tuple[int, ...]
    recipe: Recipe


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseDelta:
    """The entries of F(τ_r) of one leaf.

    Attributes:
      places: int32 [*layers, kept], row-major positions within each tensor; 0 where unused.
      values: [*layers, kept]; 0 where unused.
      shape: shape of the leaf.
      recipe: how it was made.
    """

    places: jax.Array
    values: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    recipe: Recipe = dataclasses.field(metadata={"static": True})

    def dense(self) -> jax.Array:
        """Returns F(τ_r) [*shape], by its coordinates so that a sharded leaf is not gathered."""
        layers = self.recipe.layer_axes
        grid = [
            jax.lax.broadcasted_iota(jnp.int32, self.places.shape, axis) for axis in range(layers)
        ]
        places = jnp.unravel_index(self.places, self.shape[layers:])
        return jnp.zeros(self.shape, self.values.dtype).at[(*grid, *places)].add(self.values)


def is_delta_leaf(node: Any) -> bool:
    """Whether ``node`` is one leaf of a reference delta that is not an array (for tree maps)."""
    return isinstance(node, (UnsetDelta, SparseDelta))


def check_storage(storage: Storage, sparsifier: Sparsifier, stands_still: bool) -> None:
    """Raises ValueError where a delta cannot be held that way.

    Args:
      storage: how.
      sparsifier: F.
      stands_still: whether F(τ_r) is the same at every step.
    """
    if storage not in ("dense", "sparse", "pinned_host", "recompute"):
        raise ValueError(
            "storage must be 'dense', 'sparse', 'pinned_host' or 'recompute', got storage = "
            f"{storage!r}"
        )
    if storage != "sparse":
        return
    if not stands_still:
        raise ValueError(
            "storage='sparse' holds F(τ) once and for all, but delta_mask='fresh' draws it anew at "
            "every step: give delta_mask='fixed', or another storage"
        )
    if not isinstance(sparsifier, BoundedSparsifier):
        raise ValueError(
            "storage='sparse' needs a sparsifier with a capacity, such as random, magnitude or band; "
            f"got {sparsifier!r}"
        )
    sparsifier.capacity(2**20)
    try:
        hash(sparsifier)
    except TypeError as error:
        raise ValueError(
            "storage='sparse' needs a sparsifier made of Python numbers (under "
            f"optax.inject_hyperparams name density, seed and clip in static_args), got {sparsifier!r}"
        ) from error


def _to_host(delta: jax.Array) -> jax.Array:
    # Under a trace nobody knows the device yet.
    if not isinstance(delta, Tracer) and delta.devices().pop().platform == "cpu":
        raise ValueError(
            "storage='pinned_host' is for accelerators: on the CPU backend all memory is the host's, "
            "and donating a buffer of that kind ends the process; use storage='dense'"
        )
    return jax.device_put(delta, jax.memory.Space.Host)


def to_device(delta: jax.Array) -> jax.Array:
    """Returns a delta of the host's memory as an array of the device; inside jit."""
    return jax.device_put(delta, jax.memory.Space.Device)

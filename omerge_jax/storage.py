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
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.core import Tracer

from omerge_jax.checks import check_choice
from omerge_jax.numerics import wide_dtype
from omerge_jax.paths import Axes, LayerAxes, Path, layer_axes_of, to_front
from omerge_jax.sparsifiers.base import BaseSparsifier, FittedSparsifier, SparsifyContext

Storage = Literal["dense", "sparse", "pinned_host", "recompute"]


def fixed_context(path: Path, layers: int) -> SparsifyContext:
    """Returns the context in which a fixed delta is sparsified: that of step 0."""
    return SparsifyContext(jnp.zeros([], jnp.int32), path, "delta", layers)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one leaf of a delta is to be held; static, and kept with the leaf."""

    storage: Storage
    sparsifier: BaseSparsifier | None = None  # F, where F(τ_r) is held
    layer_axes: Axes = ()
    path: Path = ()

    def entries_kept(self, shape: tuple[int, ...]) -> int | None:
        """Returns how many entries of each tensor are held; None where a dense leaf is smaller."""
        if self.storage != "sparse" or self.sparsifier is None:
            return None
        entries = math.prod(n for axis, n in enumerate(shape) if axis not in self.layer_axes)
        capacity = max(1, self.sparsifier.capacity(entries) or entries)
        # Rounded up by an eighth at most, so that meshes can divide it.
        unit = 1 << max(0, capacity.bit_length() - 4)
        capacity = -(-capacity // unit) * unit
        return capacity if 3 * capacity < entries else None

    def encode(self, delta: jax.Array) -> Any:
        """Returns the leaf that goes into the state."""
        if self.storage == "pinned_host":
            # Under a trace nobody knows the device yet.
            if not isinstance(delta, Tracer) and delta.devices().pop().platform == "cpu":
                raise ValueError(
                    "storage='pinned_host' is for accelerators: on the CPU backend all memory is the "
                    "host's, and donating a buffer of that kind ends the process; use storage='dense'"
                )
            return jax.device_put(delta, jax.memory.Space.Host)
        kept = self.entries_kept(delta.shape)
        # A copy, so that the state and whatever the delta came from can both be donated.
        return jnp.array(delta, copy=True) if kept is None else self._compress(delta, kept)

    def _compress(self, delta: jax.Array, kept: int) -> "SparseDelta":
        front, count = to_front(delta, self.layer_axes), len(self.layer_axes)
        layers, tensor = front.shape[:count], front.shape[count:]
        if math.prod(tensor) >= 2**31:
            raise ValueError(
                f"a tensor of {math.prod(tensor)} entries is too large for storage='sparse'; if "
                f"the leaf of shape {delta.shape} stacks layers, say so with layer_axes"
            )
        assert self.sparsifier is not None
        ctx = fixed_context(self.path, count)
        sparse = self.sparsifier(front.astype(wide_dtype(delta.dtype)), ctx).astype(delta.dtype)

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
    """Marks, without any array, where a leaf of the reference delta of this shape belongs."""

    shape: tuple[int, ...]
    recipe: Recipe


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SparseDelta:
    """The entries of F(τ_r) of one leaf of ``shape``.

    ``places``, int32 [*layers, kept], are row-major positions within each tensor; they and the
    ``values`` [*layers, kept] are 0 where unused.
    """

    places: jax.Array
    values: jax.Array
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    recipe: Recipe = dataclasses.field(metadata={"static": True})

    def dense(self) -> jax.Array:
        """Returns F(τ_r) [*shape], by its coordinates so that a sharded leaf is not gathered."""
        axes = self.recipe.layer_axes
        others = [axis for axis in range(len(self.shape)) if axis not in axes]
        shape, layers = self.places.shape, range(len(axes))
        grid = [jax.lax.broadcasted_iota(jnp.int32, shape, axis) for axis in layers]
        places = jnp.unravel_index(self.places, tuple(self.shape[axis] for axis in others))
        index = dict(zip((*axes, *others), (*grid, *places), strict=True))
        where = tuple(index[axis] for axis in range(len(self.shape)))
        return jnp.zeros(self.shape, self.values.dtype).at[where].add(self.values)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DeltaFit:
    """What a sparsifier fitted to the leaves of a fixed delta that are not sparse.

    ``values``, float32 [m], are the fits of all leaves, one after the other.
    """

    values: jax.Array
    sparsifier: FittedSparsifier = dataclasses.field(metadata={"static": True})
    layer_axes: LayerAxes = dataclasses.field(metadata={"static": True})

    def _shapes(self, leaves: dict[Path, Any]) -> dict[Path, tuple[int, ...]]:
        """Returns the shapes of the fits to leaves of a state's delta, without those that have none."""
        shapes = {}
        for path, leaf in leaves.items():
            unset = isinstance(leaf, UnsetDelta)
            if isinstance(leaf, SparseDelta) or (unset and leaf.recipe.entries_kept(leaf.shape)):
                continue
            like = jax.ShapeDtypeStruct(leaf.shape, jnp.float32)
            fitted = jax.eval_shape(lambda x, path=path: self._fit(path, x), like)
            if fitted is not None:
                shapes[path] = tuple(fitted.shape)
        return shapes

    def _fit(self, path: Path, delta: jax.Array) -> jax.Array | None:
        axes = layer_axes_of(self.layer_axes, path, delta.ndim)
        return self.sparsifier.fit(to_front(delta, axes), fixed_context(path, len(axes)))

    def unset(self, leaves: dict[Path, Any]) -> "DeltaFit":
        """Returns the fit of a delta that is not set: zeros of the size that it will have."""
        size = sum(map(math.prod, self._shapes(leaves).values()))
        return dataclasses.replace(self, values=jnp.zeros([size], jnp.float32))

    def fit(self, held: dict[Path, Any], delta: dict[Path, Any]) -> jax.Array:
        """Returns the values of the fit to the leaves of a ``delta`` on the device, as given.

        ``held`` are the leaves of the state, which tell where F(τ_r) itself is held.
        """
        parts = [
            jnp.ravel(jnp.asarray(self._fit(path, jnp.asarray(delta[path]))))
            for path in self._shapes(held)
        ]
        return jnp.concatenate([jnp.zeros([0], jnp.float32), *parts])

    def split(self, held: dict[Path, Any]) -> dict[Path, jax.Array]:
        """Returns the fits by the paths of their leaves."""
        fits, start = {}, 0
        for path, shape in self._shapes(held).items():
            fits[path] = self.values[start : start + math.prod(shape)].reshape(shape)
            start += math.prod(shape)
        return fits


def is_delta_leaf(node: Any) -> bool:
    """Whether ``node`` is one leaf of a reference delta that is not an array (for tree maps)."""
    return isinstance(node, (UnsetDelta, SparseDelta))


def has_hash(value: Any) -> bool:
    """Whether ``value`` has a hash, as a static part of a pytree must: it has no arrays in it."""
    try:
        hash(value)
    except TypeError:
        return False
    return True


def check_storage(storage: Storage, sparsifier: BaseSparsifier, stands_still: bool) -> None:
    """Raises ValueError where a delta, whose F(τ_r) may stand still, cannot be held that way."""
    check_choice("storage", storage, get_args(Storage))
    if storage != "sparse":
        return
    if not stands_still:
        raise ValueError(
            "storage='sparse' holds F(τ) once and for all, but delta_mask='fresh' draws it anew at "
            "every step: give delta_mask='fixed', or another storage"
        )
    if sparsifier.capacity(2**20) is None:
        raise ValueError(
            "storage='sparse' needs a sparsifier with a capacity, such as random, magnitude or band; "
            f"got {sparsifier!r}"
        )
    if not has_hash(sparsifier):
        raise ValueError(
            "storage='sparse' needs a sparsifier made of Python numbers (under "
            f"optax.inject_hyperparams name density, seed and clip in static_args), got {sparsifier!r}"
        )

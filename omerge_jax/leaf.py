"""The arrays of one leaf at one step of a merge, or of a sample of it."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from omerge_jax.numerics import wide_dtype
from omerge_jax.paths import Path
from omerge_jax.sample import Sample


def difference(held: tuple[jax.Array, ...], dtype: Any = None) -> jax.Array:
    """Returns what is held of a delta, one array or two to subtract; by default at least float32."""
    wide = jnp.promote_types(wide_dtype(held[0].dtype), held[-1].dtype)
    first, *second = (x.astype(wide) for x in held)
    delta = first - second[0] if second else first
    return delta if dtype is None else delta.astype(dtype)


@dataclasses.dataclass
class Leaf:
    """The arrays of one leaf at one step, or of a sample of them.

    Attributes:
      path: path names.
      dtype: dtype of the updates.
      update: Δθ, and with step-K what has been moved since the last merge, in a wide dtype.
      moved: the latter alone; None without step-K.
      held: what is held of τ_r, or of F(τ_r): one array, or two whose difference it is, in their own
        dtypes (converting them here would make the compiler write the result out); empty without a
        reference.
      sparse: whether it is F(τ_r).
      delta_fit: what the sparsifier fitted to it.
      param: the parameter; None where it is unknown.
      residual: what rounding cut off before; None unless it is compensated.
      sample: set where the arrays are a sample.
    """

    path: Path
    dtype: Any
    update: jax.Array
    moved: jax.Array | None
    held: tuple[jax.Array, ...]
    sparse: bool
    delta_fit: jax.Array | None
    param: jax.Array | None
    residual: jax.Array | None
    sample: Sample | None = None

    @property
    def delta(self) -> jax.Array | None:
        """τ_r or F(τ_r), in the dtype of the update; None without a reference."""
        if not self.held:
            return None
        return difference(self.held, self.update.dtype)

    def take(self, sample: Sample, update: jax.Array | None) -> "Leaf":
        """Returns a sample of this leaf; ``update`` is that of the update, where it is known."""

        def of(x: jax.Array | None) -> jax.Array | None:
            return None if x is None else sample.take(x)

        return dataclasses.replace(
            self,
            update=sample.take(self.update) if update is None else update,
            moved=of(self.moved),
            held=tuple(sample.take(x) for x in self.held),
            param=of(self.param),
            residual=of(self.residual),
            sample=sample,
        )


class Sparse(NamedTuple):
    """What is kept of a leaf.

    Attributes:
      fit: what the sparsifier fitted to the update; None where it fits nothing.
      update: F(Δθ).
      delta: F(τ_r); None without a reference.
    """

    fit: jax.Array | None
    update: jax.Array
    delta: jax.Array | None

    def take(self, sample: Sample | None) -> "Sparse":
        """Returns a sample of what is kept."""
        assert sample is not None
        delta = None if self.delta is None else sample.take(self.delta)
        return Sparse(self.fit, sample.take(self.update), delta)

"""What a merge does at every step, as opposed to what it does it to."""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp

from omerge_jax.consensus import Consensus
from omerge_jax.diagnostics import SAMPLE_ENTRIES
from omerge_jax.exact import Entries
from omerge_jax.paths import LayerAxes, Path, leaves_by_path, resolve_layer_axes
from omerge_jax.rounding import Rounding
from omerge_jax.sample import Sample, choose_sample
from omerge_jax.sparsify import (
    FittedSparsifier,
    RecomputingSparsifier,
    SampledSparsifier,
    Sparsifier,
    SparsifyContext,
)
from omerge_jax.storage import Recipe, Storage, is_delta_leaf

FitEntries = Callable[[Entries, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class Finish:
    """What is done to every update, merged or passed on, before it is rounded.

    Attributes:
      apply: ``(update, param, step) -> update``, float32 or float64.
      mask: which leaves it is done to: a tree of bools, a callable of the parameters, None for all.
    """

    apply: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    mask: Any


@dataclasses.dataclass(frozen=True)
class Merge:
    """What does not change from step to step.

    Attributes:
      sparsifier: F.
      consensus: ⊕.
      layer_axes: which leading axes index separate tensors.
      fresh_delta: whether F(τ) is drawn anew at every step.
      uses_delta: False where alpha is the literal 0.
      storage: how the delta is held.
      rounding: how what is emitted is rounded to what the parameters can hold.
      seed: fixes stochastic rounding.
      diagnostics: whether the full metrics are measured.
      finish: what is done to a merged update before it is rounded, None for nothing.
    """

    sparsifier: Sparsifier
    consensus: Consensus
    layer_axes: LayerAxes
    fresh_delta: bool
    uses_delta: bool
    storage: Storage
    rounding: Rounding
    seed: chex.Numeric
    diagnostics: bool
    finish: Finish | None

    @property
    def fits_delta(self) -> bool:
        """Whether something is fitted to the delta once, and kept."""
        fixed = self.uses_delta and not self.fresh_delta
        return fixed and isinstance(self.sparsifier, FittedSparsifier)

    @property
    def rounds(self) -> bool:
        """Whether updates are rounded; without a reference term they are left to the caller."""
        return self.uses_delta and self.rounding != "nearest"

    def layers(self, shape: tuple[int, ...], path: Path) -> int:
        """Returns how many leading axes of a leaf index separate tensors."""
        return resolve_layer_axes(self.layer_axes, path, len(shape))

    def recipe(self, shape: tuple[int, ...], path: Path) -> Recipe:
        """Returns how the delta of a leaf is to be held."""
        if self.storage != "sparse":
            return Recipe(self.storage)
        return Recipe("sparse", self.sparsifier, self.layers(shape, path), path)

    def context(self, shape: tuple[int, ...], path: Path, step: Any, role: str) -> SparsifyContext:
        """Returns what the sparsifier is told; the step of a fixed delta stands still."""
        if role == "delta" and not self.fresh_delta:
            step = jnp.zeros([], jnp.int32)
        return SparsifyContext(step, path, role, self.layers(shape, path))

    def fit_shapes(self, tree: Any) -> dict[Path, tuple[int, ...]]:
        """Shapes of what the sparsifier fits to each leaf of a delta; empty where nothing is."""
        if not self.fits_delta:
            return {}
        shapes = {}
        for path, leaf in leaves_by_path(tree, is_delta_leaf).items():
            shape = tuple(leaf.shape)
            if self.recipe(shape, path).entries_kept(shape) is not None:
                continue  # F(τ) itself is held
            like = jax.ShapeDtypeStruct(shape, jnp.float32)
            fitted = jax.eval_shape(lambda x, path=path: self.fit(x, path), like)
            if fitted is not None:
                shapes[path] = fitted.shape
        return shapes

    def fit(self, delta: jax.Array, path: Path) -> jax.Array | None:
        """Fits the sparsifier to a fixed delta."""
        assert isinstance(self.sparsifier, FittedSparsifier)
        ctx = self.context(delta.shape, path, None, "delta")
        return self.sparsifier.fit(delta, ctx)

    def sample(self, shape: tuple[int, ...], path: Path, step: jax.Array) -> Sample | None:
        """Returns the sample of an update that a step looks at; None for all of it, or none."""
        ctx = self.context(shape, path, step, "update")
        if isinstance(self.sparsifier, SampledSparsifier):
            wanted = self.sparsifier.choose_sample(shape, ctx)
            if wanted is not None:
                return wanted
        if not self.diagnostics:
            return None
        return choose_sample(shape, ctx.layer_axes, SAMPLE_ENTRIES, step)

    def fit_entries(self, shape: tuple[int, ...], path: Path) -> FitEntries | None:
        """Returns what fits the sparsifier to an update that is computed anew wherever it is read.

        It is called with the entries and the step; None for where there is no such thing, or no need.
        """
        sparsifier = self.sparsifier
        if not isinstance(sparsifier, RecomputingSparsifier):
            return None
        static = self.context(shape, path, jnp.zeros([], jnp.int32), "update")
        if sparsifier.choose_first_sample(shape, static) is None:
            return None

        def fit(entries: Entries, step: jax.Array) -> jax.Array:
            return sparsifier.fit_entries(entries, self.context(shape, path, step, "update"))

        return fit

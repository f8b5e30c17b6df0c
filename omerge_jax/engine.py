"""The merge of a step, leaf by leaf: what `online_merge` runs between its state and its output."""

import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax

from omerge_jax import sparsify
from omerge_jax.consensus import Consensus
from omerge_jax.diagnostics import leaf_sums, move, prefixed, scalars_from_sums, sums_width
from omerge_jax.numerics import wide_dtype
from omerge_jax.paths import LayerAxes, Path, leaves_by_path, path_names, resolve_layer_axes
from omerge_jax.sparsify import FittedSparsifier, Sparsifier, SparsifyContext
from omerge_jax.state import OnlineMergeState


class Merge:
    """The merge of one leaf, with what does not change from step to step."""

    def __init__(
        self,
        sparsifier: Sparsifier,
        consensus: Consensus,
        layer_axes: LayerAxes,
        fresh_delta: bool,
        uses_delta: bool,
    ):
        self.sparsifier = sparsifier
        self.consensus = consensus
        self.layer_axes = layer_axes
        self.uses_delta = uses_delta
        self.fresh_delta = fresh_delta
        self.fits = uses_delta and not fresh_delta and isinstance(sparsifier, FittedSparsifier)

    def context(self, x: Any, path: Path, step: Any, role: sparsify.Role) -> SparsifyContext:
        """Returns what the sparsifier is told about an update or a delta."""
        axes = resolve_layer_axes(self.layer_axes, path, len(x.shape))
        return SparsifyContext(step=step, path=path, role=role, layer_axes=axes)

    def delta_context(self, x: Any, path: Path, step: Any) -> SparsifyContext:
        """Returns the same for a delta, whose step stands still where its mask is fixed."""
        fixed_step = jnp.zeros([], jnp.int32)
        return self.context(x, path, step if self.fresh_delta else fixed_step, "delta")

    def fit_shapes(self, params: Any) -> dict[Path, tuple[int, ...]]:
        """Shapes of what the sparsifier fits to each leaf of a delta; empty where nothing is."""
        if not self.fits:
            return {}
        shapes = {}
        for path, leaf in leaves_by_path(params).items():
            fitted = jax.eval_shape(
                lambda x, path=path: self._fit(x, path),
                jax.ShapeDtypeStruct(leaf.shape, jnp.float32),
            )
            if fitted is not None:
                shapes[path] = fitted.shape
        return shapes

    def _fit(self, delta: jax.Array, path: Path) -> jax.Array | None:
        assert isinstance(self.sparsifier, FittedSparsifier)
        ctx = self.delta_context(delta, path, None)
        return self.sparsifier.fit(delta.astype(wide_dtype(delta.dtype)), ctx)

    def fit_all(self, deltas: dict[Path, jax.Array], shapes: dict[Path, Any]) -> jax.Array:
        """Fits every delta; float32 [m], the fits one behind the other."""
        fitted = [self._fit(deltas[path], path) for path in shapes]
        return jnp.concatenate([jnp.ravel(f).astype(jnp.float32) for f in fitted if f is not None])

    def kept_delta(
        self, delta: jax.Array, fitted: jax.Array | None, path: Path, step: jax.Array
    ) -> jax.Array:
        """Returns F(τ_r) of one leaf."""
        ctx = self.delta_context(delta, path, step)
        if self.fits and isinstance(self.sparsifier, FittedSparsifier):
            return self.sparsifier.apply(delta, fitted, ctx)
        return self.sparsifier(delta, ctx)

    def kept_update(self, update: jax.Array, path: Path, step: jax.Array) -> jax.Array:
        """Returns F(Δθ) of one leaf."""
        return self.sparsifier(update, self.context(update, path, step, "update"))


def _split_fit(
    vector: jax.Array | None, shapes: dict[Path, tuple[int, ...]]
) -> dict[Path, jax.Array]:
    parts: dict[Path, jax.Array] = {}
    start = 0
    for path, shape in shapes.items():
        assert vector is not None
        size = math.prod(shape)
        parts[path] = vector[start : start + size].reshape(shape)
        start += size
    return parts


def _fit_once(
    merge: Merge, state: OnlineMergeState, shapes: dict[Path, tuple[int, ...]]
) -> jax.Array | None:
    """Returns the fit of the fixed delta, computed at the first step that needs it."""
    if state.delta_fit is None or state.delta_fit.size == 0:
        return state.delta_fit
    return jax.lax.cond(
        state.delta_fit[0] < 0,
        lambda delta, fit: merge.fit_all(leaves_by_path(delta), shapes),
        lambda delta, fit: fit,
        state.reference_delta,
        state.delta_fit,
    )


def _realised(param: jax.Array | None, update: jax.Array, dtype: Any) -> jax.Array:
    """What adding ``update`` moves the parameter by, which rounding can make nothing in bfloat16.

    Step-K rolls the span back: rolling back more than was moved would drive parameters away.
    """
    return (update if param is None else move(param, update)).astype(dtype)


class MergeStep:
    """One step of the merge over all leaves."""

    def __init__(
        self,
        merge: Merge,
        state: OnlineMergeState,
        alpha: jax.Array,
        params: optax.Params | None,
        diagnostics: int,
    ):
        self.leaf_merge = merge
        self.state = state
        self.alpha = alpha
        self.diagnostics = diagnostics
        self.deltas = leaves_by_path(state.reference_delta)
        shapes = merge.fit_shapes(state.reference_delta)
        self.fit = _fit_once(merge, state, shapes)
        self.fitted = _split_fit(self.fit, shapes)
        self.params = None if params is None else leaves_by_path(params)

    def merge(
        self, updates: optax.Updates, cached: dict[Path, jax.Array] | None
    ) -> tuple[optax.Updates, dict[str, jax.Array]]:
        """Returns the merged updates (less what is cached) and the scalars of this step."""
        before = self.state.merge_scalars
        total = before["merge_alpha_total"] + self.alpha
        scalars = {"merge_alpha": self.alpha, "merge_alpha_total": total}
        if not self.diagnostics:
            return self._merge_leaves(updates, cached)[0], scalars
        if self.diagnostics == 1 or cached is not None:
            merged, measured = self._measure(updates, cached)
        else:
            stale = {name: value for name, value in before.items() if name not in scalars}
            step = self.state.merge_count
            merged, measured = jax.lax.cond(
                (step == 0) | ((step + 1) % self.diagnostics == 0),
                lambda u: self._measure(u, cached),
                lambda u: (self._merge_leaves(u, cached)[0], stale),
                updates,
            )
        return merged, scalars | measured

    def _measure(
        self, updates: optax.Updates, cached: dict[Path, jax.Array] | None
    ) -> tuple[optax.Updates, dict[str, jax.Array]]:
        merged, sums = self._merge_leaves(updates, cached, measure=True)
        total = sum(sums, jnp.zeros([sums_width()], jnp.float32))
        return merged, prefixed(scalars_from_sums(total, knows_params=self.params is not None))

    def _merge_leaves(
        self,
        updates: optax.Updates,
        cached: dict[Path, jax.Array] | None,
        measure: bool = False,
    ) -> tuple[optax.Updates, list[jax.Array]]:
        sums: list[jax.Array] = []

        def one(key_path: tuple[Any, ...], update: jax.Array) -> jax.Array:
            if not jnp.issubdtype(update.dtype, jnp.inexact):
                return update
            path = path_names(key_path)
            moved = None if cached is None else cached[path]
            return self._leaf(path, update, moved, sums if measure else None)

        return jax.tree_util.tree_map_with_path(one, updates), sums

    def _leaf(
        self,
        path: Path,
        update: jax.Array,
        moved: jax.Array | None,
        sums: list[jax.Array] | None,
    ) -> jax.Array:
        rule, step = self.leaf_merge, self.state.merge_count
        wide = update.astype(wide_dtype(update.dtype))
        total = wide if moved is None else wide + moved
        kept = rule.kept_update(total, path, step)
        if rule.uses_delta:
            delta = self.deltas[path].astype(total.dtype)
            kept_delta = rule.kept_delta(delta, self.fitted.get(path), path, step)
            merged = rule.consensus(kept, kept_delta, self.alpha.astype(total.dtype))
        else:
            delta = kept_delta = jnp.zeros_like(total)
            merged = kept
        merged = merged if moved is None else merged - moved
        merged = merged.astype(update.dtype)
        if sums is not None:
            param = None if self.params is None else self.params[path]
            sums.append(leaf_sums(total, kept, delta, kept_delta, merged, param, self.alpha))
        return merged

    def merge_every(
        self, every_k: chex.Numeric, updates: optax.Updates
    ) -> tuple[optax.Updates, Any, dict[str, jax.Array]]:
        """Step-K: merges where the step's number is a multiple of K, else passes and caches."""
        cached, params = self.state.cached_delta, self.params

        def merge(updates: Any, cached: Any) -> tuple[Any, Any, dict[str, jax.Array]]:
            merged, scalars = self.merge(updates, leaves_by_path(cached))
            return merged, jax.tree.map(jnp.zeros_like, cached), scalars

        def collect(updates: Any, cached: Any) -> tuple[Any, Any, dict[str, jax.Array]]:
            new = leaves_by_path(updates)

            def add(key_path: tuple[Any, ...], total: jax.Array) -> jax.Array:
                path = path_names(key_path)
                if path not in new:
                    return total
                param = None if params is None else params[path]
                return total + _realised(param, new[path], total.dtype)

            summed = jax.tree_util.tree_map_with_path(add, cached)
            return updates, summed, self.state.merge_scalars

        due = (self.state.merge_count + 1) % jnp.asarray(every_k, jnp.int32) == 0
        return jax.lax.cond(due, merge, collect, updates, cached)

"""The merge of a step, leaf by leaf: what `online_merge` runs between its state and its output."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax

from omerge_jax import random_mask
from omerge_jax.alpha import Relative
from omerge_jax.diagnostics import leaf_sums, move, prefixed, scalars_from_sums
from omerge_jax.leaf import Leaf, Sparse, difference
from omerge_jax.numerics import wide_dtype, widened
from omerge_jax.paths import Path, from_prefix, leaves_by_path, path_names
from omerge_jax.rounding import round_compensated, round_stochastically
from omerge_jax.rule import FitEntries, Merge
from omerge_jax.sample import Sample
from omerge_jax.sparsify import FittedSparsifier, SampledSparsifier, Sparsifier
from omerge_jax.state import OnlineMergeState
from omerge_jax.storage import SparseDelta, is_delta_leaf, to_device
from omerge_jax.threshold import per_layer


class Wanted(NamedTuple):
    """What a step wants to know of updates before it is given them.

    Attributes:
      samples: samples of updates.
      fits: what the sparsifier is to be fitted to, without an array of it.
    """

    samples: dict[Path, Sample]
    fits: dict[Path, FitEntries]


class Ahead(NamedTuple):
    """What is known of updates before they are.

    Attributes:
      samples: samples of updates.
      fits: what the sparsifier was fitted to them.
    """

    samples: dict[Path, jax.Array]
    fits: dict[Path, jax.Array]


LookAhead = Callable[[Wanted], Ahead]


class MergeStep:
    """One step of the merge over all leaves.

    Args:
      merge: what does not change.
      state: the state before the step.
      alpha: weight of the reference, a float32 scalar or a share of the norm.
      updates: what is to be merged.
      params: parameters, or None.
      reference: parameters of the reference and of the base, for ``storage="recompute"``.
      look_ahead: tells of the updates what needs no array of the whole of them, or None.
    """

    def __init__(
        self,
        merge: Merge,
        state: OnlineMergeState,
        alpha: jax.Array | Relative,
        updates: optax.Updates,
        params: optax.Params | None,
        reference: tuple[Any, Any],
        look_ahead: LookAhead | None,
    ):
        self.rule = merge
        self.state = state
        self.alpha = alpha
        self.updates = updates
        self.params = None if params is None else leaves_by_path(params)
        mask = None if merge.finish is None else merge.finish.mask
        self.finish_mask = mask(params) if callable(mask) else mask
        self.look_ahead = look_ahead
        self.residuals = leaves_by_path(state.rounding_residual)
        self.held = self._held(reference)
        recomputes = merge.storage == "recompute"
        known = updates if params is None else params
        shapes = merge.fit_shapes(known if recomputes else state.reference_delta)
        self.fit = self._fit_once(shapes)
        self.fitted = _split_fit(self.fit, shapes)

    def _held(self, reference: tuple[Any, Any]) -> dict[Path, Any]:
        """Returns what is known of the delta of every leaf, see `_arrays`."""
        if not self.rule.uses_delta:
            return {}
        if self.rule.storage != "recompute":
            return leaves_by_path(self.state.reference_delta, is_delta_leaf)
        ours, theirs = (leaves_by_path(tree) for tree in reference)
        return {path: (leaf, theirs[path]) for path, leaf in ours.items()}

    def _fit_once(self, shapes: dict[Path, tuple[int, ...]]) -> jax.Array | None:
        """Returns the fit of the fixed delta, computed at the first step that needs it."""
        fit = self.state.delta_fit
        if fit is None or fit.size == 0:
            return fit

        def compute(held: dict[Path, Any], fit: jax.Array) -> jax.Array:
            deltas = {path: self._arrays(held[path])[0] for path in shapes}
            # A single array as it is held: widened, the search would need a copy of it.
            known = {
                p: held[0] if len(held) == 1 else difference(held) for p, held in deltas.items()
            }
            parts = [self.rule.fit(known[path], path) for path in shapes]
            return jnp.concatenate([jnp.ravel(p).astype(fit.dtype) for p in parts if p is not None])

        held = {path: self.held[path] for path in shapes}
        return jax.lax.cond(fit[0] < 0, compute, lambda _, fit: fit, held, fit)

    def _arrays(self, held: Any) -> tuple[tuple[jax.Array, ...], bool]:
        """Returns what is held of τ_r or F(τ_r), see `Leaf`, and whether it is the latter."""
        if isinstance(held, SparseDelta):
            return (held.dense(),), True
        if isinstance(held, tuple):
            return held, False
        return (to_device(held) if self.rule.storage == "pinned_host" else held,), False

    def _leaves(
        self, updates: optax.Updates, cached: dict[Path, jax.Array] | None
    ) -> dict[Path, Leaf]:
        leaves = {}
        for path, update in leaves_by_path(updates).items():
            if not jnp.issubdtype(update.dtype, jnp.inexact):
                continue
            wide = widened(update)
            moved = None if cached is None else cached[path]
            held, sparse = self._arrays(self.held[path]) if self.rule.uses_delta else ((), False)
            leaves[path] = Leaf(
                path=path,
                dtype=update.dtype,
                update=wide if moved is None else wide + moved,
                moved=moved,
                held=held,
                sparse=sparse,
                delta_fit=self.fitted.get(path),
                param=None if self.params is None else self.params[path],
                residual=self.residuals.get(path),
            )
        return leaves

    def _look_ahead(self, leaves: dict[Path, Leaf]) -> tuple[dict[Path, Leaf], dict[Path, Any]]:
        """Returns samples of the leaves that a sample is wanted of, and the fits that are known."""
        step = self.state.merge_count
        wanted = Wanted({}, {})
        for path, leaf in leaves.items():
            if (sample := self.rule.sample(leaf.update.shape, path, step)) is not None:
                wanted.samples[path] = sample
            # Of a span of several steps the update is a part.
            fit = None if leaf.moved is not None else self.rule.fit_entries(leaf.update.shape, path)
            if fit is not None:
                wanted.fits[path] = fit
        known = Ahead({}, {}) if self.look_ahead is None else self.look_ahead(wanted)
        sampled = {}
        for path, sample in wanted.samples.items():
            leaf, update = leaves[path], known.samples.get(path)
            if update is not None:
                update = update.astype(leaf.update.dtype)
                if leaf.moved is not None:
                    update = update + sample.take(leaf.moved)
            sampled[path] = leaf.take(sample, update)
        return sampled, known.fits

    def merge(
        self, updates: optax.Updates, cached: dict[Path, jax.Array] | None
    ) -> tuple[optax.Updates, Any, dict[str, jax.Array]]:
        """Returns the merged updates (less what is cached), the residuals and the scalars."""
        leaves = self._leaves(updates, cached)
        sampled, fits = self._look_ahead(leaves)

        def sparsify(path: Path, leaf: Leaf) -> Sparse:
            fit = fits.get(path)
            return self._keep(
                leaf, self._fit_update(leaf, sampled.get(path)) if fit is None else fit
            )

        sparse = {}
        if isinstance(self.alpha, Relative):
            sparse = {path: sparsify(path, leaf) for path, leaf in leaves.items()}
        alphas = self._alphas(leaves, sparse)
        emitted, residuals, sums = {}, {}, []
        for path, leaf in leaves.items():
            # One leaf after the other, which is also how the compiler then lays out its work.
            chosen = sparse.get(path) or sparsify(path, leaf)
            emitted[path], residuals[path] = self._emit(leaf, chosen, alphas[path])
            if self.rule.diagnostics:
                sums.append(self._measure(leaf, sampled.get(path), chosen, alphas[path]))
        scalars = self._alpha_scalars(leaves, alphas)
        if self.rule.diagnostics:
            known = self.params is not None
            scalars |= prefixed(scalars_from_sums(sums, knows_params=known))
        return (
            _replace_leaves(updates, emitted),
            _replace_leaves(self.state.rounding_residual, residuals),
            scalars,
        )

    def _fit_update(self, leaf: Leaf, sampled: Leaf | None) -> jax.Array | None:
        rule, step = self.rule, self.state.merge_count
        if not isinstance(rule.sparsifier, FittedSparsifier):
            return None
        ctx = rule.context(leaf.update.shape, leaf.path, step, "update")
        if sampled is None or not isinstance(rule.sparsifier, SampledSparsifier):
            return rule.sparsifier.fit(leaf.update, ctx)
        if rule.sparsifier.choose_sample(leaf.update.shape, ctx) is None:
            return rule.sparsifier.fit(leaf.update, ctx)
        ctx = dataclasses.replace(ctx, sample=sampled.sample)
        return rule.sparsifier.fit(sampled.update, ctx)

    def _keep(self, leaf: Leaf, fit: jax.Array | None) -> Sparse:
        rule, step = self.rule, self.state.merge_count
        shape = leaf.update.shape if leaf.sample is None else leaf.sample.shape

        def sparsify(x: jax.Array, fitted: jax.Array | None, role: str, refit: bool) -> jax.Array:
            ctx = rule.context(shape, leaf.path, step, role)
            ctx = dataclasses.replace(ctx, sample=leaf.sample)
            if isinstance(rule.sparsifier, FittedSparsifier) and not refit:
                return rule.sparsifier.apply(x, fitted, ctx)
            return rule.sparsifier(x, ctx)

        kept = sparsify(leaf.update, fit, "update", False)
        delta = leaf.delta
        if delta is None or leaf.sparse:
            return Sparse(fit, kept, delta)
        return Sparse(fit, kept, sparsify(delta, leaf.delta_fit, "delta", rule.fresh_delta))

    def _alphas(
        self, leaves: dict[Path, Leaf], sparse: dict[Path, Sparse]
    ) -> dict[Path, jax.Array]:
        """Returns alpha per leaf: a scalar, or [*layers]."""
        if not isinstance(self.alpha, Relative):
            return dict.fromkeys(leaves, self.alpha)
        squares = {}
        for path, chosen in sparse.items():
            ours, theirs = chosen.update, chosen.delta
            axes = tuple(range(self.rule.layers(ours.shape, path), ours.ndim))
            terms = [ours, jnp.zeros_like(ours) if theirs is None else theirs]
            squares[path] = [jnp.sum(jnp.square(x.astype(jnp.float32)), axes) for x in terms]
        if self.alpha.scope == "global" and squares:
            totals = [sum(jnp.sum(pair[i]) for pair in squares.values()) for i in (0, 1)]
            squares = dict.fromkeys(leaves, totals)
        return {
            path: self.alpha.alpha(jnp.sqrt(pair[0]), jnp.sqrt(pair[1]))
            for path, pair in squares.items()
        }

    def _merged(self, leaf: Leaf, chosen: Sparse, alpha: jax.Array) -> jax.Array:
        """Returns the merge of a leaf, less what has been moved, before it is rounded."""
        merged = chosen.update
        if chosen.delta is not None:
            weight = per_layer(alpha.astype(merged.dtype), merged)
            merged = self.rule.consensus(merged, chosen.delta, weight)
        if leaf.moved is not None:
            merged = merged - leaf.moved
        return self._finish(merged, leaf.param, leaf.path)

    def _finish(self, update: jax.Array, param: jax.Array | None, path: Path) -> jax.Array:
        finish, mask = self.rule.finish, self.finish_mask
        if finish is None or not (mask is None or from_prefix(mask, path, "mask")):
            return update
        assert param is not None
        return finish.apply(update, param, self.state.merge_count)

    def _emit(
        self, leaf: Leaf, chosen: Sparse, alpha: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns what is emitted for a leaf and the residual of its rounding."""
        merged = self._merged(leaf, chosen, alpha)
        if not self.rule.rounds:
            return merged.astype(leaf.dtype), leaf.residual
        assert leaf.param is not None
        if self.rule.rounding == "compensated":
            assert leaf.residual is not None
            rounded, residual = round_compensated(merged, leaf.residual, leaf.param)
            return rounded.astype(leaf.dtype), residual
        shape = merged.shape if leaf.sample is None else leaf.sample.shape
        bits = random_mask.rounding_bits(
            shape,
            seed=self.rule.seed,
            step=self.state.merge_count,
            path=leaf.path,
            coordinates=None if leaf.sample is None else leaf.sample.coordinates(),
        )
        return round_stochastically(merged, leaf.param, bits).astype(leaf.dtype), None

    def _alpha_scalars(
        self, leaves: dict[Path, Leaf], alphas: dict[Path, jax.Array]
    ) -> dict[str, jax.Array]:
        alpha = self.alpha
        if isinstance(alpha, Relative):
            sizes = {path: float(leaf.update.size) for path, leaf in leaves.items()}
            terms = [jnp.mean(alphas[path]) * size for path, size in sizes.items()]
            alpha = sum(terms, jnp.zeros([], jnp.float32)) / max(1.0, sum(sizes.values()))
        total = self.state.merge_scalars["merge_alpha_total"] + alpha
        return {"merge_alpha": jnp.asarray(alpha), "merge_alpha_total": total}

    def _measure(
        self, leaf: Leaf, sampled: Leaf | None, chosen: Sparse, alpha: jax.Array
    ) -> jax.Array:
        """Returns the sums of a leaf that the metrics are made of, from a sample where it is large."""
        looked_at, share = leaf, 1.0
        if sampled is not None:
            looked_at, share = sampled, leaf.update.size / sampled.update.size
            known = takes_samples(self.rule.sparsifier)
            chosen = self._keep(sampled, chosen.fit) if known else chosen.take(sampled.sample)
        emitted, _ = self._emit(looked_at, chosen, alpha)
        return share * leaf_sums(
            looked_at.update,
            looked_at.delta,
            chosen.update,
            chosen.delta,
            emitted,
            looked_at.param,
            jnp.mean(alpha),
        )

    def merge_every(
        self, every_k: chex.Numeric, updates: optax.Updates
    ) -> tuple[optax.Updates, Any, Any, dict[str, jax.Array]]:
        """Step-K: merges where the step's number is a multiple of K, else passes and caches."""
        state = self.state

        def merge(updates: Any, cached: Any) -> tuple[Any, Any, Any, dict[str, jax.Array]]:
            merged, residual, scalars = self.merge(updates, leaves_by_path(cached))
            return merged, jax.tree.map(jnp.zeros_like, cached), residual, scalars

        def collect(updates: Any, cached: Any) -> tuple[Any, Any, Any, dict[str, jax.Array]]:
            new = leaves_by_path(updates)

            def add(key_path: tuple[Any, ...], total: jax.Array) -> jax.Array:
                path = path_names(key_path)
                return total + self._realised(path, new[path], total) if path in new else total

            summed = jax.tree_util.tree_map_with_path(add, cached)
            return self._pass(updates), summed, state.rounding_residual, state.merge_scalars

        due = (state.merge_count + 1) % jnp.asarray(every_k, jnp.int32) == 0
        return jax.lax.cond(due, merge, collect, updates, state.cached_delta)

    def _realised(self, path: Path, update: jax.Array, total: jax.Array) -> jax.Array:
        """What adding ``update`` moves its parameter by, which rounding can make nothing in bfloat16.

        Step-K rolls the span back: rolling back more than was moved would drive parameters away.
        """
        param = None if self.params is None else self.params[path]
        return (update if param is None else move(param, update)).astype(total.dtype)

    def _pass(self, updates: optax.Updates) -> optax.Updates:
        """Returns the updates of a step without a merge."""
        params = self.params
        if self.rule.finish is None or params is None:
            return updates

        def one(key_path: tuple[Any, ...], update: jax.Array) -> jax.Array:
            if not jnp.issubdtype(update.dtype, jnp.inexact):
                return update
            path = path_names(key_path)
            wide = update.astype(wide_dtype(update.dtype))
            return self._finish(wide, params[path], path).astype(update.dtype)

        return jax.tree_util.tree_map_with_path(one, updates)


def takes_samples(sparsifier: Sparsifier) -> bool:
    """Whether a sparsifier can be applied to a sample of a leaf, see `SparsifyContext.sample`."""
    return bool(getattr(sparsifier, "takes_samples", False))


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


def _replace_leaves(tree: Any, leaves: dict[Path, Any]) -> Any:
    """Returns ``tree`` with the leaves that ``leaves`` names in place of its own."""

    def one(key_path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        new = leaves.get(path_names(key_path))
        return leaf if new is None else new

    return jax.tree_util.tree_map_with_path(one, tree)

"""One step of a merge: F(Δθ) ⊕ F(τ_r) (Eq. 2 of arXiv 2405.17931), leaf by leaf."""

import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from omerge_jax.alpha import Alpha, Relative, alpha_at, alpha_of_leaves
from omerge_jax.checks import is_float
from omerge_jax.consensus import Consensus
from omerge_jax.diagnostics import SAMPLE_ENTRIES, leaf_sums, scalars_from_sums
from omerge_jax.entries import Entries, Sample, choose_sample, entries_of
from omerge_jax.numerics import wide_dtype, widened
from omerge_jax.paths import (
    LayerAxes,
    Path,
    from_front,
    layer_axes_of,
    leaves_by_path,
    map_by_path,
    to_front,
)
from omerge_jax.sparsifiers.base import BaseSparsifier, FittedSparsifier, SparsifyContext
from omerge_jax.state import OnlineMergeState
from omerge_jax.storage import SparseDelta, Storage, is_delta_leaf
from omerge_jax.threshold.edge import per_layer


@dataclasses.dataclass(frozen=True)
class MergeSettings:
    """Settings of a merge that stay fixed across steps; `online_merge` documents them."""

    sparsifier: BaseSparsifier
    consensus: Consensus
    alpha: Alpha
    every_k: int
    fixed_delta: bool  # whether F(τ_r) is the same at every step
    storage: Storage
    layer_axes: LayerAxes
    rounding_follows: bool  # so that the addition to the parameters loses no update
    diagnostics: bool

    @property
    def uses_delta(self) -> bool:
        """Whether there is a reference term: alpha is not the literal 0."""
        alpha = self.alpha
        return not (isinstance(alpha, (int, float, np.number)) and alpha == 0)


class HeldDelta(NamedTuple):
    """One leaf's delta, as passed to a step.

    ``arrays`` are τ_r or F(τ_r): one array, or two whose difference it is, in the dtypes they are held
    in. They are not converted here, because the compiler would then store the converted copy.
    """

    arrays: tuple[jax.Array, ...]
    sparse: bool = False  # whether it is F(τ_r)
    # What the sparsifier fitted to it when it was set; None where it did not.
    fit: jax.Array | None = None


class Kept(NamedTuple):
    """F(Δθ), and F(τ_r) or None without a reference, of a leaf or of a sample of it."""

    update: jax.Array
    delta: jax.Array | None


@dataclasses.dataclass(eq=False)
class LeafMerge:
    """The merge of one leaf at one step; arrays have the leaf's layer axes moved to the front."""

    settings: MergeSettings
    path: Path
    step: jax.Array  # int32 scalar, the optimizer steps taken before this one
    update: Entries  # Δθ, or with step-K the span Δθ + θ − θ_m since the last merge
    # θ − θ_m, what the parameter has moved since the last merge; None for every_k=1.
    moved: jax.Array | None
    delta: HeldDelta | None  # None without a reference
    param: jax.Array | None  # θ, for the diagnostics; None where it is unknown

    def __post_init__(self) -> None:
        ndim = self.update.ndim
        self.axes = layer_axes_of(self.settings.layer_axes, self.path, ndim)
        self.update = self.update.front(self.axes)
        self.ctx = self.context("update")
        self.moved = None if self.moved is None else to_front(self.moved, self.axes)
        self.param = None if self.param is None else to_front(self.param, self.axes)

    def look_ahead(self) -> None:
        """Computes the fit and the metrics sample before the full update, if that is made on demand."""
        if self.update.stored:
            return
        sparsifier, shape = self.settings.sparsifier, self.update.shape
        fits = isinstance(sparsifier, FittedSparsifier) and not sparsifier.fits_whole(
            shape, self.ctx
        )
        for known in (self.fit if fits else None, self.sampled_update):
            if known is not None:
                self.update.compute_first(known)

    def context(self, role: str, sample: Sample | None = None) -> SparsifyContext:
        """Returns the context of a sparsifier; a fixed delta is always at step 0."""
        is_fixed = role == "delta" and self.settings.fixed_delta
        step = jnp.zeros([], jnp.int32) if is_fixed else self.step
        return SparsifyContext(step, self.path, role, len(self.axes), sample)

    @functools.cached_property
    def fit(self) -> jax.Array | None:
        """What the sparsifier fits to the update; None where it fits nothing."""
        sparsifier = self.settings.sparsifier
        if not isinstance(sparsifier, FittedSparsifier):
            return None
        return sparsifier.fit_entries(self.update, self.ctx)

    @functools.cached_property
    def sampled_update(self) -> jax.Array | None:
        """The sample of the update that the metrics are measured on; None for all of it."""
        return None if self.sample is None else widened(self.update.sample(self.sample))

    @functools.cached_property
    def sample(self) -> Sample | None:
        """Which entries the metrics are measured on; None for all of them."""
        if not self.settings.diagnostics:
            return None
        sparsifier, shape, fitted_to = self.settings.sparsifier, self.update.shape, None
        if isinstance(sparsifier, FittedSparsifier):
            fitted_to = sparsifier.choose_sample(shape, self.ctx)
        return fitted_to or choose_sample(shape, len(self.axes), SAMPLE_ENTRIES, self.step)

    def _delta(self, sample: Sample | None = None) -> jax.Array | None:
        """Returns τ_r = θ_r − θ_b, or F(τ_r), or a sample of it, in the dtype of the merge."""
        if self.delta is None:
            return None
        arrays = [to_front(x, self.axes) for x in self.delta.arrays]
        arrays = arrays if sample is None else [sample.take(x) for x in arrays]
        wide = wide_dtype(arrays[0].dtype, arrays[-1].dtype)
        first, *second = (x.astype(wide) for x in arrays)
        # τ_r = θ_r − θ_b, where the two are given at every step (storage="recompute").
        delta = first - second[0] if second else first
        return delta.astype(wide_dtype(self.update.dtype))

    def sparsify(self, sample: Sample | None = None) -> Kept:
        """Returns F(Δθ) and F(τ_r) of the leaf, or of a sample of it."""
        sparsifier = self.settings.sparsifier
        update = widened(self.update.whole()) if sample is None else self.sampled_update
        assert update is not None
        ctx = self.context("update", sample)
        # F(Δθ): a random share (Eq. 3) or the largest entries, as the sparsifier says.
        if isinstance(sparsifier, FittedSparsifier):
            kept = sparsifier.apply(update, self.fit, ctx)
        else:
            kept = sparsifier(update, ctx)
        delta = self._delta(sample)
        if delta is None or self.delta is None or self.delta.sparse:
            return Kept(kept, delta)
        # F(τ_r), by the same F.
        ctx = self.context("delta", sample)
        if self.delta.fit is not None and isinstance(sparsifier, FittedSparsifier):
            return Kept(kept, sparsifier.apply(delta, self.delta.fit, ctx))
        return Kept(kept, sparsifier(delta, ctx))

    def merge(self, kept: Kept, alpha: jax.Array, moved: jax.Array | None) -> jax.Array:
        """Returns the merged update, not yet rounded, for a leaf or a sample of it."""
        merged = kept.update
        if kept.delta is not None:
            # F(Δθ) ⊕ F(τ_r) (Eq. 2), with α of the tensor; ⊕ is Eq. 4 or Eq. 5 to 7.
            weight = per_layer(alpha.astype(merged.dtype), merged)
            merged = self.settings.consensus(merged, kept.delta, weight)
        # θ_m + F(Δc + Δθ) ⊕ F(τ_r) (Algorithm 2), as an update of θ = θ_m + Δc.
        return merged if moved is None else merged - moved

    def squares(self, kept: Kept) -> tuple[jax.Array, jax.Array]:
        """Returns ‖F(Δθ)‖² and ‖F(τ_r)‖² of every tensor, float32 [*layers]."""
        assert kept.delta is not None
        axes, both = tuple(range(len(self.axes), kept.update.ndim)), (kept.update, kept.delta)
        ours, theirs = (jnp.sum(jnp.square(x.astype(jnp.float32)), axes) for x in both)
        return ours, theirs

    def measure(self, kept: Kept, alpha: jax.Array) -> jax.Array:
        """Returns the sums that the metrics need, from a sample where the leaf is large."""
        sample, share = self.sample, 1.0

        def taken(x: jax.Array | None) -> jax.Array | None:
            return x if x is None or sample is None else sample.take(x)

        if sample is None:
            update = widened(self.update.whole())
        else:
            assert self.sampled_update is not None
            update = self.sampled_update
            share = self.update.size / update.size
            if self.settings.sparsifier.takes_samples:
                kept = self.sparsify(sample)
            else:
                kept = Kept(sample.take(kept.update), taken(kept.delta))
        emitted = self.merge(kept, alpha, taken(self.moved)).astype(self.update.dtype)
        param = None if self.settings.rounding_follows else taken(self.param)
        return share * leaf_sums(
            update, self._delta(sample), kept.update, kept.delta, emitted, param, jnp.mean(alpha)
        )


class MergeStep:
    """One step over all leaves; ``reference`` is θ_r and θ_b, for ``storage="recompute"``."""

    def __init__(
        self,
        settings: MergeSettings,
        state: OnlineMergeState,
        params: Any,
        reference: tuple[Any, Any],
        alpha_scale: chex.Numeric,
    ):
        self.settings, self.state = settings, state
        self.alpha = alpha_at(settings.alpha, alpha_scale, state.merge_count)
        self.params = None if params is None else leaves_by_path(params)
        self.deltas = held_deltas(settings, state, reference)

    def merge(
        self, updates: optax.Updates, moved: dict[Path, jax.Array] | None
    ) -> tuple[optax.Updates, dict[str, jax.Array]]:
        """Returns the merged updates, not yet rounded, and the scalars of the step.

        ``updates`` are Δθ, or the span since the last merge: arrays, or entries that can be read
        again. ``moved`` is θ − θ_m by path, None for ``every_k=1``. The result is float32 or wider.
        """
        params = self.params or {}
        leaves = {
            path: LeafMerge(
                self.settings,
                path,
                self.state.merge_count,
                entries_of(update),
                moved=None if moved is None else moved[path],
                delta=self.deltas[path] if self.settings.uses_delta else None,
                param=params.get(path),
            )
            for path, update in leaves_by_path(updates).items()
            if is_float(path, update, params.get(path))
        }
        for leaf in leaves.values():
            leaf.look_ahead()
        kept = {}
        if isinstance(self.alpha, Relative):
            # α such that ‖α·F(τ_r)‖ is the wanted share of the step, from norms over all leaves.
            kept = {path: leaf.sparsify() for path, leaf in leaves.items()}
            squares = {path: leaf.squares(kept[path]) for path, leaf in leaves.items()}
            alphas = alpha_of_leaves(self.alpha, squares)
        else:
            alphas = dict.fromkeys(leaves, self.alpha)
        merged, sums = {}, []
        for path, leaf in leaves.items():
            # One leaf at a time, so that the compiler schedules them in this order.
            both = kept.get(path) or leaf.sparsify()
            emitted = leaf.merge(both, alphas[path], leaf.moved)
            merged[path] = from_front(emitted, leaf.axes)
            if self.settings.diagnostics:
                sums.append(leaf.measure(both, alphas[path]))
        scalars = self._alpha_scalars(leaves, alphas)
        if self.settings.diagnostics:
            scalars |= scalars_from_sums(sums, knows_params=self.params is not None)

        def emit(path: Path, update: Any) -> jax.Array:
            return merged[path] if path in merged else entries_of(update).whole()

        return map_by_path(emit, updates), scalars

    def _alpha_scalars(
        self, leaves: dict[Path, LeafMerge], alphas: dict[Path, jax.Array]
    ) -> dict[str, jax.Array]:
        alpha = self.alpha
        if isinstance(alpha, Relative):
            # The mean of the tensors' α, weighted by size: Σ αᵢ·nᵢ / Σ nᵢ.
            sizes = {path: float(leaf.update.size) for path, leaf in leaves.items()}
            terms = [jnp.mean(alphas[path]) * size for path, size in sizes.items()]
            alpha = sum(terms, jnp.zeros([], jnp.float32)) / max(1.0, sum(sizes.values()))
        total = self.state.merge_scalars["merge_alpha_total"] + alpha
        return {"merge_alpha": jnp.asarray(alpha), "merge_alpha_total": total}

    def merge_every_k(
        self, updates: optax.Updates
    ) -> tuple[optax.Updates, Any, dict[str, jax.Array]]:
        """Step-K (Algorithm 2): merges where the step's number is a multiple of K, else passes.

        Returns the updates, not yet rounded, θ_m, and the scalars of the last merge.
        """
        count, every_k = self.state.merge_count, jnp.asarray(self.settings.every_k, jnp.int32)
        params = self.params
        assert params is not None
        # Right after a merge, θ_m = θ. The rounded result is known only at the next call, so θ_m is
        # set here.
        merged_params = map_by_path(
            lambda path, last: jnp.where(count % every_k == 0, params[path], last),
            self.state.merged_params,
        )
        last = leaves_by_path(merged_params)

        def merge(wide: Any) -> tuple[Any, dict[str, jax.Array]]:
            # Δc = θ − θ_m: what the steps since the last merge have moved.
            moved = {
                path: params[path].astype(wider) - last[path].astype(wider)
                for path, update in leaves_by_path(wide).items()
                if is_float(path, update, params[path])
                for wider in [wide_dtype(params[path].dtype)]
            }
            # Δθ ← Δθ + Δc
            span = map_by_path(lambda p, u: u + moved[p] if p in moved else u, wide)
            return self.merge(span, moved)

        wide = jax.tree.map(_widened_whole, updates)
        passed = lambda wide: (wide, self.state.merge_scalars)  # noqa: E731
        merged, scalars = jax.lax.cond((count + 1) % every_k == 0, merge, passed, wide)
        return merged, merged_params, scalars


def _widened_whole(update: Any) -> jax.Array:
    whole = entries_of(update).whole()
    return widened(whole) if jnp.issubdtype(whole.dtype, jnp.floating) else whole


def held_deltas(
    settings: MergeSettings, state: OnlineMergeState, reference: tuple[Any, Any]
) -> dict[Path, HeldDelta]:
    """Returns every leaf's delta, as passed to a step."""
    if not settings.uses_delta:
        return {}
    if settings.storage == "recompute":
        ours, theirs = (leaves_by_path(tree) for tree in reference)
        return {path: HeldDelta((leaf, theirs[path])) for path, leaf in ours.items()}
    leaves = leaves_by_path(state.reference_delta, is_delta_leaf)
    fits = {} if state.delta_fit is None else state.delta_fit.split(leaves)
    held = {}
    for path, leaf in leaves.items():
        if isinstance(leaf, SparseDelta):
            held[path] = HeldDelta((leaf.dense(),), sparse=True)
        else:
            on_host = settings.storage == "pinned_host"
            array = jax.device_put(leaf, jax.memory.Space.Device) if on_host else leaf
            held[path] = HeldDelta((array,), fit=fits.get(path))
    return held

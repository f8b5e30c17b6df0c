"""Online merging as an Optax transformation: blend every update with the reference's delta.

One step is θ ← θ + F(Δθ) ⊕ F(τ_r) (Eq. 2 of arXiv 2405.17931), where Δθ is the update that the
optimizer before it in the chain proposes. The merge acts on final, signed updates: chain it after
the learning rate.
"""

import dataclasses
from typing import Any, Literal, get_args

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from omerge_jax.alpha import ALPHA, Alpha, Relative
from omerge_jax.checks import (
    check_callable,
    check_choice,
    check_delta,
    check_not_swapped,
    check_schedule,
    check_whole,
)
from omerge_jax.consensus import Consensus
from omerge_jax.diagnostics import zero_scalars
from omerge_jax.numerics import copied
from omerge_jax.paths import (
    LayerAxes,
    layer_axes_of,
    layer_axes_rule,
    leaves_by_path,
    path_names,
    show,
)
from omerge_jax.rounding import Rounding, rounded
from omerge_jax.sparsifiers.base import FittedSparsifier, Sparsifier, as_sparsifier
from omerge_jax.state import OnlineMergeState, place_in_state
from omerge_jax.step import MergeSettings, MergeStep
from omerge_jax.storage import (
    DeltaFit,
    Recipe,
    Storage,
    UnsetDelta,
    check_storage,
    has_hash,
    is_delta_leaf,
)

DeltaMask = Literal["fixed", "fresh"]
# Of numpy, as optax.inject_hyperparams makes an array of every Python int, defaults included: nobody
# would know when tracing that it is 1, and the parameters of the last merge would be kept for nothing.
EVERY_STEP: Any = np.int64(1)


def online_merge(
    sparsifier: Sparsifier,
    consensus: Consensus,
    *,
    alpha: Alpha,
    delta: Any = None,
    every_k: int = EVERY_STEP,
    delta_mask: DeltaMask = "fresh",
    storage: Storage = "dense",
    rounding: Rounding = "stochastic",
    seed: chex.Numeric = 0,
    layer_axes: LayerAxes = None,
    diagnostics: bool = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Merges every update with the reference's delta: F(Δθ) ⊕ F(τ_r).

    Chain it last, after an optimizer and its learning rate: it rounds to what the parameters can hold.

    With ``every_k`` = K it follows Algorithm 2: updates pass, only rounded, for K − 1 steps, and step K
    emits ``merge(Δc + Δθ) − Δc``. Δc = θ − θ_m is what the parameters have moved since the last merge,
    whose parameters θ_m are kept in the state. They end at the roll-back plus the merge of the whole
    span, whatever follows in the chain, as long as ``update`` is given the parameters that its updates
    are added to. The authors' code sums the proposed updates instead: in bfloat16 that rolls back what
    rounding never moved; on recorded runs of their code (float32, K = 3, 9 steps) both ways end within
    1.3e-7 of the largest parameter. K counts steps of this transformation: put ``optax.MultiSteps``
    outermost.

    Args:
      sparsifier: F, a callable ``(x, ctx) -> array``, such as `random` or `magnitude`. It is given
        float32 (or float64) arrays and a `SparsifyContext`.
      consensus: ⊕, an elementwise callable ``(update, delta, alpha) -> array``.
      alpha: weight of the reference in [0, 1]; a float, a schedule of the optimizer step, traced, or a
        share of the step's norm (`relative`). The literal 0 needs and keeps no delta, and takes no
        consensus: what is emitted is F(Δθ), not rounded.
      delta: τ_r, copied into the state by ``init``; None to set it later with `with_delta`, which
        keeps it out of the compiled ``init``.
      every_k: K, an integer of at least 1; under ``optax.inject_hyperparams`` name it in
        ``static_args`` where it is given.
      delta_mask: ``"fresh"`` sparsifies τ_r anew at every step. ``"fixed"`` does it once, as the
        authors' code (at step 0 of the mask and of a density schedule; an injected density counts as
        it is at each step): what a random mask dropped never arrives, and with 1/p scaling what it
        kept arrives 1/p times over, which diverges for a small p.
      storage: how τ_r is held. ``"dense"``: as given. ``"sparse"``: the kept entries of F(τ_r) and
        their places, where F(τ_r) stands still. ``"pinned_host"``: in the host's memory, copied to
        the accelerator at every merge. ``"recompute"``: not at all; ``update`` takes
        ``reference_params`` and ``base_params`` and subtracts, and sparsifies τ_r at every merge.
      rounding: how updates are rounded before they are emitted, see `rounded`. ``"stochastic"`` and
        ``"compensated"`` let a reference term arrive that lies far below a parameter's last digit;
        they need the parameters in ``update``. ``"nearest"`` leaves it to the addition, which loses
        such a term for good; give it where something else follows in the chain, and `rounded` last.
      seed: integer that fixes stochastic rounding.
      layer_axes: which axes of a leaf index separate tensors, where layers are stacked: None, an int
        n for the n leading axes, a tuple of ints for these axes (``(1,)`` where MaxText scans), a
        callable of the path names that returns one of these, or a tree prefix of them. Every tensor
        is sparsified as if it were a leaf; indices count with these axes in front.
      diagnostics: whether the full `merge_metrics` are measured, from a sample of every larger tensor.
        In an ``optax.chain`` that makes the compiler write the updates out; in `fused_chain` it does
        not.

    Returns:
      A transformation with `OnlineMergeState`. Emitted updates keep their dtype; merge and rounding
      are computed in float32 (float64 for float64 updates). Leaves of integers pass. Its ``update``
      takes ``alpha_scale``, by which alpha (or its share of the norm) is multiplied in that step, such
      as 0 while the reward is low.

    Raises:
      ValueError: an argument out of range or of another kind; and, when ``update`` is traced, a
        missing delta, missing parameters, complex leaves or shards of leaves (inside
        ``jax.shard_map``). A schedule that leaves its range raises outside of ``jax.jit``; compiled it
        is reported by ``jax.experimental.checkify.checkify(tx.update)``.

    Example:
      >>> import optax, omerge_jax as om
      >>> tx = optax.chain(
      ...     optax.adamw(1e-6),
      ...     om.online_merge(om.magnitude(0.1), om.sign(), alpha=5e-7),
      ... )

    References:
      Lu et al., Online Merging Optimizers, https://arxiv.org/abs/2405.17931, Eq. 2, Algorithms 1, 2.
    """
    return merge_then_round(
        sparsifier,
        consensus,
        optax.identity(),
        alpha=alpha,
        delta=delta,
        every_k=every_k,
        delta_mask=delta_mask,
        storage=storage,
        rounding=rounding,
        seed=seed,
        layer_axes=layer_axes,
        diagnostics=diagnostics,
    )


def merge_then_round(
    sparsifier: Sparsifier,
    consensus: Consensus,
    between: optax.GradientTransformation,
    *,
    delta: Any,
    delta_mask: DeltaMask,
    rounding: Rounding,
    seed: chex.Numeric,
    **settings: Any,
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation of `online_merge`, which documents the arguments.

    ``between`` is given the merged updates, in float32 or wider, before they are rounded.
    """
    check_choice("delta_mask", delta_mask, get_args(DeltaMask))
    check_callable("sparsifier", sparsifier, ("x", "ctx"), "omerge_jax.random(0.1)")
    check_callable("consensus", consensus, ("update", "delta", "alpha"), "omerge_jax.linear()")
    round_updates = rounded(rounding, seed=seed)
    merge = MergeSettings(
        as_sparsifier(sparsifier),
        consensus,
        fixed_delta=delta_mask == "fixed",
        rounding_follows=rounding != "nearest",
        **settings,
    )
    if not merge.uses_delta:
        merge = dataclasses.replace(merge, rounding_follows=False)
        round_updates = optax.identity()
    _check(merge, delta)
    return _transformation(merge, delta, optax.chain(between, round_updates))


def _check(settings: MergeSettings, delta: Any) -> None:
    """Raises ValueError where settings of a merge are out of range or contradict each other."""
    alpha, every_k = settings.alpha, settings.every_k
    if not isinstance(alpha, Relative):
        check_schedule("alpha", alpha, "in [0, 1]", ALPHA)
        check_not_swapped(alpha, getattr(settings.sparsifier, "density", None))
    if not isinstance(every_k, (int, np.integer)) or every_k < 1:
        raise ValueError(
            "every_k is the number of optimizer steps from one merge to the next and must be an "
            f"integer of at least 1, got every_k = {every_k!r}; under optax.inject_hyperparams name it "
            "in static_args"
        )
    if not isinstance(settings.diagnostics, bool):
        raise ValueError(
            "diagnostics must be True or False (under optax.inject_hyperparams name it in "
            f"static_args), got diagnostics = {settings.diagnostics!r}"
        )
    if settings.storage == "recompute" and delta is not None:
        raise ValueError(
            "storage='recompute' holds no delta: leave delta unset and give reference_params and "
            "base_params to update"
        )
    layer_axes_rule(settings.layer_axes)
    check_storage(settings.storage, settings.sparsifier, settings.fixed_delta)
    check_delta(delta)


def _transformation(
    settings: MergeSettings, delta: Any, after: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Returns the merge and then ``after``, which is given updates in float32 or wider."""

    def init(params: optax.Params) -> OnlineMergeState:
        state = _unset_state(settings, params, after)
        return state if delta is None or not settings.uses_delta else place_in_state(state, delta)

    def update(
        updates: optax.Updates,
        state: OnlineMergeState,
        params: optax.Params | None = None,
        *,
        reference_params: Any = None,
        base_params: Any = None,
        alpha_scale: chex.Numeric = 1.0,
        **extra_args: Any,
    ) -> tuple[optax.Updates, OnlineMergeState]:
        del extra_args
        for path, leaf in leaves_by_path(updates if params is None else params).items():
            check_whole(path, leaf)
        reference = (reference_params, base_params)
        _require(settings, state, params, reference)
        step = MergeStep(settings, state, params, reference, alpha_scale)
        merged_params = None
        if state.merged_params is None:
            merged, scalars = step.merge(updates, None)
        else:
            merged, merged_params, scalars = step.merge_every_k(updates)
        # u = round(F(Δθ) ⊕ F(τ_r)); the caller adds it: θ ← θ + u.
        emitted, rounding_state = after.update(merged, state.rounding_state, params)
        emitted = jax.tree.map(lambda new, old: new.astype(old.dtype), emitted, updates)
        return emitted, state._replace(
            merge_count=jnp.asarray(optax.safe_increment(state.merge_count)),
            merged_params=merged_params,
            rounding_state=rounding_state,
            merge_scalars=scalars,
        )

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def _unset_state(
    settings: MergeSettings, params: optax.Params, after: optax.GradientTransformation
) -> OnlineMergeState:
    """Returns the state before the first step, without a delta."""
    sparsifier = settings.sparsifier

    def unset(key_path: tuple[Any, ...], param: Any) -> UnsetDelta:
        shape, path = tuple(param.shape), path_names(key_path)
        if settings.storage != "sparse":
            return UnsetDelta(shape, Recipe(settings.storage))
        axes = layer_axes_of(settings.layer_axes, path, len(shape))
        return UnsetDelta(shape, Recipe("sparse", sparsifier, axes, path))

    delta_fit = None
    reference_delta = optax.EmptyState() if settings.uses_delta else None
    if settings.uses_delta and settings.storage != "recompute":
        reference_delta = jax.tree_util.tree_map_with_path(unset, params)
        rule = layer_axes_rule(settings.layer_axes)
        # What is made of traced numbers cannot be kept in the state: it is fitted at every merge.
        if (
            settings.fixed_delta
            and isinstance(sparsifier, FittedSparsifier)
            and has_hash((sparsifier, rule))
        ):
            fit = DeltaFit(jnp.zeros([0], jnp.float32), sparsifier, rule)
            delta_fit = fit.unset(leaves_by_path(reference_delta, is_delta_leaf))
    return OnlineMergeState(
        merge_count=jnp.zeros([], jnp.int32),
        reference_delta=reference_delta,
        delta_fit=delta_fit,
        merged_params=None if settings.every_k == 1 else jax.tree.map(copied, params),
        rounding_state=after.init(params),
        merge_scalars=zero_scalars(settings.diagnostics),
    )


def _require(
    settings: MergeSettings, state: OnlineMergeState, params: Any, reference: tuple[Any, Any]
) -> None:
    """Raises ValueError where a step lacks its delta, its parameters or its models."""
    leaves = leaves_by_path(state.reference_delta, is_delta_leaf)
    unset = [show(path) for path, leaf in leaves.items() if isinstance(leaf, UnsetDelta)]
    if unset:
        raise ValueError(
            f"online merging has no reference delta for {', '.join(unset[:3])}"
            f"{' …' if len(unset) > 3 else ''}: set it once before the first step with opt_state = "
            "omerge_jax.with_delta(opt_state, omerge_jax.task_vector(reference_params, "
            "base_params)), or give delta=…; for no reference term use omerge_jax.child_tuning"
        )
    if state.merged_params is not None and params is None:
        raise ValueError(
            "every_k other than 1 rolls the parameters back to the last merge: call update(updates, "
            "state, params)"
        )
    if settings.uses_delta and settings.storage == "recompute" and None in reference:
        raise ValueError(
            "storage='recompute' subtracts the base from the reference at every merge: call "
            "update(updates, state, params, reference_params=…, base_params=…)"
        )

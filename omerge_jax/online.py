"""Online merging as Optax transformations: blend every update with the reference's delta.

One step is θ ← θ + F(Δθ) ⊕ F(τ_r) (Eq. 2 of arXiv 2405.17931), where Δθ is the update that the
optimizer before it in the chain proposes. The merge acts on final, signed updates: chain it after
the learning rate.
"""

import math
from typing import Any, Literal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

from omerge_jax import consensus as consensus_lib
from omerge_jax import sparsify
from omerge_jax.consensus import Consensus
from omerge_jax.diagnostics import zero_scalars
from omerge_jax.engine import Merge, MergeStep
from omerge_jax.numerics import wide_dtype
from omerge_jax.paths import LayerAxes, path_names, show
from omerge_jax.sparsify import Sparsifier
from omerge_jax.state import OnlineMergeState, UnsetDelta, place_delta

DeltaMask = Literal["fixed", "fresh"]


def _check(
    alpha: optax.ScalarOrSchedule, every_k: chex.Numeric, delta_mask: DeltaMask, diagnostics: int
) -> None:
    if isinstance(alpha, (int, float)) and not 0 <= alpha <= 1:
        raise ValueError(
            "alpha is the weight of the reference delta (the update gets 1 - alpha) and must be in "
            f"[0, 1], got alpha = {alpha}"
        )
    if isinstance(every_k, (int, float, np.number)) and (every_k < 1 or int(every_k) != every_k):
        raise ValueError(
            "every_k is the number of optimizer steps from one merge to the next and must be an "
            f"integer of at least 1, got every_k = {every_k}"
        )
    if delta_mask not in ("fixed", "fresh"):
        raise ValueError(f"delta_mask must be 'fixed' or 'fresh', got delta_mask = {delta_mask!r}")
    if not isinstance(diagnostics, int) or diagnostics < 0:
        raise ValueError(
            "diagnostics must be a bool or a non-negative Python int (under optax.inject_hyperparams "
            f"name it in static_args), got diagnostics = {diagnostics}"
        )


def _zero_cache(param: Any) -> jax.Array:
    # zeros_like, not zeros: a sharded parameter gets a cache that is sharded alike.
    return jnp.zeros_like(param, dtype=wide_dtype(param.dtype))


def _is_literal(value: Any, literal: int) -> bool:
    return isinstance(value, (int, float, np.integer)) and value == literal


def _require_delta(reference_delta: Any) -> None:
    unset = [
        show(path_names(key_path))
        for key_path, leaf in jax.tree_util.tree_flatten_with_path(
            reference_delta, is_leaf=lambda node: isinstance(node, UnsetDelta)
        )[0]
        if isinstance(leaf, UnsetDelta)
    ]
    if unset:
        raise ValueError(
            f"online merging has no reference delta for {', '.join(unset[:3])}"
            f"{' …' if len(unset) > 3 else ''}: set it once before the first step with opt_state = "
            "omerge_jax.with_delta(opt_state, omerge_jax.task_vector(reference_params, "
            "base_params)), or give delta=…; for no reference term use omerge_jax.child_tuning"
        )


def online_merge(
    sparsifier: Sparsifier,
    consensus: Consensus,
    *,
    alpha: optax.ScalarOrSchedule,
    delta: Any = None,
    every_k: chex.Numeric = 1,
    delta_mask: DeltaMask = "fixed",
    layer_axes: LayerAxes = None,
    diagnostics: bool | int = False,
) -> optax.GradientTransformationExtraArgs:
    r"""Merges every update with the reference's delta: F(Δθ) ⊕ F(τ_r).

    Chain it after an optimizer, after its learning rate. With ``every_k`` = K the updates pass
    unchanged for K − 1 steps while their sum Δc is kept, and step K emits
    ``merge(Δc + Δθ) − Δc``: the parameters already moved by Δc, so that this leaves them at the
    roll-back plus the merge of the whole span (Algorithm 2). K counts steps of this transformation:
    with ``optax.MultiSteps`` put ``MultiSteps`` outermost.

    Args:
      sparsifier: F, a callable ``(x, ctx) -> array``, see `omerge_jax.sparsify`. It is given float32
        (or float64) arrays.
      consensus: ⊕, a callable ``(update, delta, alpha) -> array``.
      alpha: weight of the reference in [0, 1]; a float, a schedule of the optimizer step, or traced.
        The literal 0 needs and keeps no delta, and takes no consensus: what is emitted is F(Δθ).
      delta: τ_r, copied into the state by ``init``; None to set it later with `with_delta`, which
        keeps it out of the compiled ``init``.
      every_k: K, at least 1. Anything but a Python int (as under ``optax.inject_hyperparams`` without
        ``static_args``) also works but always keeps the sum of updates in memory.
      delta_mask: ``"fixed"`` sparsifies τ_r once (step 0 of the mask, and of a density schedule; an
        injected density counts as it is at each step), ``"fresh"`` at every step.
      layer_axes: which leading axes index separate tensors, where layers are stacked: None, an int,
        a callable of the path names, or a tree prefix of ints.
      diagnostics: True for the full `merge_metrics` at every merge, an int n for every n-th step (with
        ``every_k`` = 1; on CPU a set costs about six AdamW steps), False for none.

    Returns:
      A transformation with `OnlineMergeState`. Emitted updates keep their dtype; the merge is
      computed in float32 (float64 for float64 updates). Whatever is smaller than half a unit in the
      last place of its parameter is lost when the update is added: with alpha near 1e-7 that is
      most of the reference term, and ``rounding_lost`` in `merge_metrics` shows it.

    Raises:
      ValueError: an argument out of range; and, when ``update`` is traced, a missing delta.

    Example:
      >>> import optax, omerge_jax as om
      >>> tx = optax.chain(
      ...     optax.adamw(1e-6),
      ...     om.online_merge(om.magnitude(0.1), om.sign(), alpha=5e-7),
      ... )

    References:
      Lu et al., Online Merging Optimizers, https://arxiv.org/abs/2405.17931, Eq. 2, Algorithms 1, 2.
    """
    _check(alpha, every_k, delta_mask, diagnostics)
    uses_delta = not _is_literal(alpha, 0)
    merge = Merge(sparsifier, consensus, layer_axes, delta_mask == "fresh", uses_delta)
    plain = _is_literal(every_k, 1)

    def init(params: optax.Params) -> OnlineMergeState:
        def like(make: Any) -> Any:
            return jax.tree.map(make, params)

        reference = None
        if uses_delta:
            unset = like(lambda p: UnsetDelta(tuple(p.shape)))
            reference = unset if delta is None else place_delta(params, delta)
        entries = sum(math.prod(shape) for shape in merge.fit_shapes(params).values())
        return OnlineMergeState(
            merge_count=jnp.zeros([], jnp.int32),
            reference_delta=reference,
            delta_fit=jnp.full([entries], -1.0, jnp.float32) if merge.fits else None,
            cached_delta=None if plain else like(_zero_cache),
            merge_scalars=zero_scalars(diagnostics),
        )

    def update(
        updates: optax.Updates,
        state: OnlineMergeState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, OnlineMergeState]:
        del extra_args
        _require_delta(state.reference_delta)
        rate = jnp.asarray(alpha(state.merge_count) if callable(alpha) else alpha, jnp.float32)
        step = MergeStep(merge, state, rate, params, diagnostics)
        if plain:
            merged, scalars = step.merge(updates, None)
            cached = None
        else:
            merged, cached, scalars = step.merge_every(every_k, updates)
        return merged, state._replace(
            merge_count=optax.safe_increment(state.merge_count),
            delta_fit=step.fit,
            cached_delta=cached,
            merge_scalars=scalars,
        )

    return optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]


def on_dare(
    alpha: optax.ScalarOrSchedule,
    density: optax.ScalarOrSchedule,
    *,
    delta: Any = None,
    every_k: chex.Numeric = 1,
    rescale: Literal["inverse", "norm", "none"] = "inverse",
    delta_mask: DeltaMask = "fixed",
    clip: chex.Numeric | None = 1.0,
    seed: chex.Numeric = 0,
    layer_axes: LayerAxes = None,
    diagnostics: bool | int = False,
    draw: sparsify.Draw | None = None,
) -> optax.GradientTransformationExtraArgs:
    """OnDARE: random sparsification and a linear blend with the reference's delta.

    The defaults follow the authors' code: kept entries are divided by ``density``, the mask of the
    delta is drawn once and the result clamped to ±1. ``rescale="none", delta_mask="fresh",
    clip=None`` is the paper's formula.

    Args:
      alpha: weight of the reference, see `online_merge`.
      density: share of entries kept, p, in (0, 1]; a float, a schedule or traced.
      delta: see `online_merge`.
      every_k: see `online_merge`.
      rescale: see `random`.
      delta_mask: see `online_merge`.
      clip: see `random`.
      seed: integer that fixes all masks.
      layer_axes: see `online_merge`; matters for ``rescale="norm"``.
      diagnostics: see `online_merge`.
      draw: another source of masks, see `random`.

    Returns:
      A transformation with `OnlineMergeState`.

    Raises:
      ValueError: see `online_merge` and `random`.

    Example:
      >>> import optax, omerge_jax as om
      >>> tx = optax.chain(optax.adamw(1e-6), om.on_dare(alpha=5e-7, density=1e-2))

    References:
      Lu et al., https://arxiv.org/abs/2405.17931, Section 3.2 (OnDARE), Eq. 3 and 4.
    """
    return online_merge(
        sparsify.random(density, rescale=rescale, clip=clip, seed=seed, draw=draw),
        consensus_lib.linear(),
        alpha=alpha,
        delta=delta,
        every_k=every_k,
        delta_mask=delta_mask,
        layer_axes=layer_axes,
        diagnostics=diagnostics,
    )


def on_ties(
    alpha: optax.ScalarOrSchedule,
    density: optax.ScalarOrSchedule,
    *,
    delta: Any = None,
    every_k: chex.Numeric = 1,
    rescale: Literal["none", "norm"] = "none",
    election: Literal["unweighted", "weighted"] = "unweighted",
    layer_axes: LayerAxes = None,
    diagnostics: bool | int = False,
) -> optax.GradientTransformationExtraArgs:
    """OnTIES: the entries of largest magnitude, and a sign consensus with the reference's delta.

    The defaults follow the authors' code; ``election="weighted"`` is the paper's consensus.

    Args:
      alpha: weight of the reference, see `online_merge`.
      density: share of entries kept per tensor, p, in (0, 1]; a float, a schedule or traced.
      delta: see `online_merge`.
      every_k: see `online_merge`.
      rescale: see `magnitude`.
      election: see `sign`.
      layer_axes: which leading axes index separate tensors, see `online_merge`: with stacked layers
        the largest entries are found per layer.
      diagnostics: see `online_merge`.

    Returns:
      A transformation with `OnlineMergeState`.

    Raises:
      ValueError: see `online_merge`, `magnitude` and `sign`.

    Example:
      >>> import optax, omerge_jax as om
      >>> tx = optax.chain(optax.adamw(1e-6), om.on_ties(alpha=5e-7, density=0.1))

    References:
      Lu et al., https://arxiv.org/abs/2405.17931, Section 3.2 (OnTIES), Eq. 5 to 7.
    """
    return online_merge(
        sparsify.magnitude(density, rescale=rescale),
        consensus_lib.sign(election),
        alpha=alpha,
        delta=delta,
        every_k=every_k,
        layer_axes=layer_axes,
        diagnostics=diagnostics,
    )


def child_tuning(
    density: optax.ScalarOrSchedule,
    *,
    every_k: chex.Numeric = 1,
    rescale: Literal["inverse", "norm", "none"] = "inverse",
    clip: chex.Numeric | None = 1.0,
    seed: chex.Numeric = 0,
    layer_axes: LayerAxes = None,
    diagnostics: bool | int = False,
) -> optax.GradientTransformationExtraArgs:
    """ChildTuning-F: OnDARE with alpha 0, random dropout of the updates without a reference.

    Args:
      density: share of entries kept, in (0, 1].
      every_k: see `online_merge`.
      rescale: see `random`.
      clip: see `random`.
      seed: integer that fixes all masks.
      layer_axes: see `online_merge`.
      diagnostics: see `online_merge`.

    Returns:
      A transformation with `OnlineMergeState` that needs no delta.

    Raises:
      ValueError: see `online_merge` and `random`.

    Example:
      >>> import optax, omerge_jax as om
      >>> tx = optax.chain(optax.adamw(1e-6), om.child_tuning(density=0.3))

    References:
      Xu et al., Raise a Child in Large Language Model, https://arxiv.org/abs/2109.05687.
    """
    return on_dare(
        0,
        density,
        every_k=every_k,
        rescale=rescale,
        clip=clip,
        seed=seed,
        layer_axes=layer_axes,
        diagnostics=diagnostics,
    )

"""The merging methods by name: a sparsifier, a consensus and a rounding each.

Below them `omerge_jax.online` makes the transformation, `omerge_jax.step` takes one step of it, and the
arithmetic stands in `omerge_jax.sparsifiers`, `omerge_jax.consensus` and `omerge_jax.rounding`.
"""

from typing import Any, Literal

import chex
import optax

from omerge_jax import consensus
from omerge_jax.alpha import Alpha
from omerge_jax.online import EVERY_STEP, DeltaMask, online_merge
from omerge_jax.paths import LayerAxes
from omerge_jax.rounding import Rounding
from omerge_jax.sparsifiers.base import Draw
from omerge_jax.sparsifiers.magnitude import magnitude
from omerge_jax.sparsifiers.random import random
from omerge_jax.storage import Storage


def on_dare(
    alpha: Alpha,
    *,
    density: optax.ScalarOrSchedule,
    delta: Any = None,
    every_k: int = EVERY_STEP,
    rescale: Literal["inverse", "norm", "none"] = "inverse",
    delta_mask: DeltaMask = "fresh",
    clip: chex.Numeric | None = 1.0,
    storage: Storage = "dense",
    rounding: Rounding = "stochastic",
    seed: chex.Numeric = 0,
    layer_axes: LayerAxes = None,
    diagnostics: bool = False,
    draw: Draw | None = None,
) -> optax.GradientTransformationExtraArgs:
    """OnDARE: random sparsification and a linear blend with the reference's delta.

    By default kept entries are divided by ``density``, masks are drawn at every step, and the delta is
    clamped to ±1. ``delta_mask="fixed", rounding="nearest"`` is the authors' code; ``rescale="none",
    clip=None, rounding="nearest"`` is the paper's formula.

    Args:
      alpha: weight of the reference in [0, 1], see `online_merge`.
      density: share of entries kept, p, in (0, 1]; a float, a schedule or traced.
      delta, every_k, delta_mask, storage, rounding, diagnostics: as in `online_merge`.
      rescale, clip, draw: as in `random`.
      seed: integer that fixes all masks and the rounding.
      layer_axes: as in `online_merge`; matters for ``rescale="norm"``.

    Returns:
      A transformation with `OnlineMergeState`.

    Raises:
      ValueError: see `online_merge` and `random`.

    Example:
      >>> import optax, omerge_jax as om
      >>> tx = optax.chain(optax.adamw(1e-6), om.on_dare(alpha=5e-7, density=1e-2))
      >>> authors = {"delta_mask": "fixed", "rounding": "nearest"}
      >>> tx = optax.chain(optax.adamw(1e-6), om.on_dare(alpha=5e-7, density=1e-2, **authors))

    References:
      Lu et al., https://arxiv.org/abs/2405.17931, Section 3.2 (OnDARE), Eq. 3 and 4.
    """
    return online_merge(
        # F(x) = m ⊙ x / p with m ~ Bernoulli(p) (Eq. 3; "none" leaves 1/p out as the paper does).
        random(density, rescale=rescale, clip=clip, seed=seed, draw=draw),
        # F(Δθ) ⊕ F(τ_r) = (1 − α)·F(Δθ) + α·F(τ_r) (Eq. 4).
        consensus.linear(),
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


def on_ties(
    alpha: Alpha,
    *,
    density: optax.ScalarOrSchedule,
    delta: Any = None,
    every_k: int = EVERY_STEP,
    rescale: Literal["none", "norm"] = "none",
    election: Literal["unweighted", "weighted"] = "unweighted",
    threshold: Literal["exact", "sampled"] = "exact",
    storage: Storage = "dense",
    rounding: Rounding = "stochastic",
    seed: chex.Numeric = 0,
    layer_axes: LayerAxes = None,
    diagnostics: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """OnTIES: the entries of largest magnitude, and a sign consensus with the reference's delta.

    With ``rounding="nearest"`` this is the authors' code; ``election="weighted"`` is the paper's
    consensus.

    Args:
      alpha: weight of the reference in [0, 1], see `online_merge`.
      density: share of entries kept per tensor, p, in (0, 1]; a float, a schedule or traced.
      delta, every_k, storage, rounding, diagnostics: as in `online_merge`.
      rescale, election: as in `magnitude` and in `sign`.
      threshold: as in `magnitude`; in `fused_chain` neither needs an array of the update.
      seed: integer that fixes the rounding and which of equal magnitudes are kept.
      layer_axes: as in `online_merge`: with stacked layers the largest entries are found per layer.

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
        # F(x): the int(p·n) entries of largest magnitude (Section 3.2).
        magnitude(density, rescale=rescale, threshold=threshold, seed=seed),
        # F(Δθ) ⊕ F(τ_r): the sum of the weighted terms that have the elected sign (Eq. 5 to 7).
        consensus.sign(election),
        alpha=alpha,
        delta=delta,
        every_k=every_k,
        delta_mask="fixed",
        storage=storage,
        rounding=rounding,
        seed=seed,
        layer_axes=layer_axes,
        diagnostics=diagnostics,
    )


def child_tuning(
    density: optax.ScalarOrSchedule,
    *,
    every_k: int = EVERY_STEP,
    rescale: Literal["inverse", "norm", "none"] = "inverse",
    clip: chex.Numeric | None = 1.0,
    seed: chex.Numeric = 0,
    layer_axes: LayerAxes = None,
    diagnostics: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """ChildTuning-F: OnDARE with alpha 0, random dropout of the updates without a reference.

    Args:
      density: share of entries kept, in (0, 1].
      rescale, clip: as in `random`.
      seed: integer that fixes all masks.
      every_k, layer_axes, diagnostics: as in `online_merge`.

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
    # α = 0: F(Δθ) alone.
    return on_dare(
        0,
        density=density,
        every_k=every_k,
        rescale=rescale,
        clip=clip,
        seed=seed,
        layer_axes=layer_axes,
        diagnostics=diagnostics,
    )


def keep_largest(
    density: optax.ScalarOrSchedule,
    *,
    every_k: int = EVERY_STEP,
    rescale: Literal["none", "norm"] = "none",
    threshold: Literal["exact", "sampled"] = "exact",
    seed: chex.Numeric = 0,
    layer_axes: LayerAxes = None,
    diagnostics: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Keeps the entries of largest magnitude of every update: OnTIES without a reference.

    After AdamW the largest entries are those whose gradient keeps its sign from step to step. Steps get
    shorter with fewer entries, so it wants a larger learning rate than the optimizer alone.

    Args:
      density: share of entries kept per tensor, in (0, 1].
      rescale, threshold: as in `magnitude`.
      seed: integer that fixes which of equal magnitudes are kept.
      every_k, layer_axes, diagnostics: as in `online_merge`.

    Returns:
      A transformation with `OnlineMergeState` that needs no delta.

    Raises:
      ValueError: see `online_merge` and `magnitude`.

    Example:
      >>> import optax, omerge_jax as om
      >>> tx = optax.chain(optax.adamw(3e-6), om.keep_largest(density=0.1))

    References:
      No paper: OnTIES (https://arxiv.org/abs/2405.17931) without its reference; docs/taxbench.md.
    """
    # α = 0: F(Δθ) alone.
    return on_ties(
        0,
        density=density,
        every_k=every_k,
        rescale=rescale,
        threshold=threshold,
        seed=seed,
        layer_axes=layer_axes,
        diagnostics=diagnostics,
    )

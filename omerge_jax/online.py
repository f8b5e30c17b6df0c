"""Online merging as Optax transformations: blend every update with the reference's delta.

One step is θ ← θ + F(Δθ) ⊕ F(τ_r) (Eq. 2 of arXiv 2405.17931), where Δθ is the update that the
optimizer before it in the chain proposes. The merge acts on final, signed updates: chain it after
the learning rate.
"""

from typing import Any, Literal

import chex
import optax

from omerge_jax import consensus as consensus_lib
from omerge_jax import sparsify
from omerge_jax.consensus import Consensus
from omerge_jax.largest import magnitude
from omerge_jax.paths import LayerAxes
from omerge_jax.rounding import Rounding
from omerge_jax.sparsify import Sparsifier
from omerge_jax.storage import Storage
from omerge_jax.transformation import Alpha, DeltaMask, merge_transformation


def online_merge(
    sparsifier: Sparsifier,
    consensus: Consensus,
    *,
    alpha: Alpha,
    delta: Any = None,
    every_k: chex.Numeric = 1,
    delta_mask: DeltaMask = "fresh",
    storage: Storage = "dense",
    rounding: Rounding = "stochastic",
    seed: chex.Numeric = 0,
    layer_axes: LayerAxes = None,
    diagnostics: bool = False,
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
      consensus: ⊕, an elementwise callable ``(update, delta, alpha) -> array``.
      alpha: weight of the reference in [0, 1]; a float, a schedule of the optimizer step, traced, or a
        share of the step's norm (`relative`). The literal 0 needs and keeps no delta, and takes no
        consensus: what is emitted is F(Δθ), not rounded.
      delta: τ_r, copied into the state by ``init``; None to set it later with `with_delta`, which
        keeps it out of the compiled ``init``.
      every_k: K, at least 1. Anything but a Python int (as under ``optax.inject_hyperparams`` without
        ``static_args``) also works but always keeps the sum of updates in memory.
      delta_mask: ``"fresh"`` sparsifies τ_r anew at every step. ``"fixed"`` does it once, as the
        authors' code (step 0 of the mask, and of a density schedule; an injected density counts as it
        is at each step): whatever a random mask dropped then never arrives, and with 1/p scaling what
        it kept arrives 1/p times over, which diverges for a small p.
      storage: how τ_r is held. ``"dense"``: as given. ``"sparse"``: the kept entries of F(τ_r) and
        their places, where F(τ_r) stands still. ``"pinned_host"``: in the host's memory, copied to
        the accelerator at every merge. ``"recompute"``: not at all; ``update`` takes
        ``reference_params`` and ``base_params`` and subtracts.
      rounding: how the emitted update is rounded to what its parameter can hold. ``"stochastic"``: up
        or down at random, so that a reference term far below the parameter's last digit arrives on
        average, without memory. ``"compensated"``: to nearest, and the rest is kept for the next step,
        which is exact and costs four bytes a parameter. ``"nearest"``: left to the addition, which
        loses such a term for good. The first two need the parameters in ``update``, and the update to
        be what is added to them (nothing behind it in the chain).
      seed: integer that fixes stochastic rounding.
      layer_axes: which leading axes index separate tensors, where layers are stacked: None, an int,
        a callable of the path names, or a tree prefix of ints.
      diagnostics: whether the full `merge_metrics` are measured, from a sample of every larger tensor.
        In an ``optax.chain`` that makes the compiler write the updates out; in `fused_chain` it does
        not.

    Returns:
      A transformation with `OnlineMergeState`. Emitted updates keep their dtype; the merge is
      computed in float32 (float64 for float64 updates). Its ``update`` takes ``alpha_scale``, by which
      alpha (or its share of the norm) is multiplied in that step, such as 0 while the reward is low.

    Raises:
      ValueError: an argument out of range; and, when ``update`` is traced, a missing delta or
        missing parameters.

    Example:
      >>> import optax, omerge_jax as om
      >>> tx = optax.chain(
      ...     optax.adamw(1e-6),
      ...     om.online_merge(om.magnitude(0.1), om.sign(), alpha=5e-7),
      ... )

    References:
      Lu et al., Online Merging Optimizers, https://arxiv.org/abs/2405.17931, Eq. 2, Algorithms 1, 2.
    """
    return merge_transformation(
        sparsifier,
        consensus,
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


def on_dare(
    alpha: Alpha,
    density: optax.ScalarOrSchedule,
    *,
    delta: Any = None,
    every_k: chex.Numeric = 1,
    rescale: Literal["inverse", "norm", "none"] = "inverse",
    delta_mask: DeltaMask = "fresh",
    clip: chex.Numeric | None = 1.0,
    storage: Storage = "dense",
    rounding: Rounding = "stochastic",
    seed: chex.Numeric = 0,
    layer_axes: LayerAxes = None,
    diagnostics: bool = False,
    draw: sparsify.Draw | None = None,
) -> optax.GradientTransformationExtraArgs:
    """OnDARE: random sparsification and a linear blend with the reference's delta.

    By default kept entries are divided by ``density``, masks are drawn at every step, and the delta is
    clamped to ±1. ``delta_mask="fixed", rounding="nearest"`` is the authors' code; ``rescale="none",
    clip=None, rounding="nearest"`` is the paper's formula.

    Args:
      alpha: weight of the reference, see `online_merge`.
      density: share of entries kept, p, in (0, 1]; a float, a schedule or traced.
      delta: see `online_merge`.
      every_k: see `online_merge`.
      rescale: see `random`.
      delta_mask: see `online_merge`.
      clip: see `random`.
      storage: see `online_merge`.
      rounding: see `online_merge`.
      seed: integer that fixes all masks and the rounding.
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
      >>> authors = {"delta_mask": "fixed", "rounding": "nearest"}
      >>> tx = optax.chain(optax.adamw(1e-6), om.on_dare(alpha=5e-7, density=1e-2, **authors))

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
        storage=storage,
        rounding=rounding,
        seed=seed,
        layer_axes=layer_axes,
        diagnostics=diagnostics,
    )


def on_ties(
    alpha: Alpha,
    density: optax.ScalarOrSchedule,
    *,
    delta: Any = None,
    every_k: chex.Numeric = 1,
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
      alpha: weight of the reference, see `online_merge`.
      density: share of entries kept per tensor, p, in (0, 1]; a float, a schedule or traced.
      delta: see `online_merge`.
      every_k: see `online_merge`.
      rescale: see `magnitude`.
      election: see `sign`.
      threshold: see `magnitude`; in `fused_chain` neither needs an array of the update.
      storage: see `online_merge`.
      rounding: see `online_merge`.
      seed: integer that fixes the rounding and which of equal magnitudes are kept.
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
        magnitude(density, rescale=rescale, threshold=threshold, seed=seed),
        consensus_lib.sign(election),
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
    every_k: chex.Numeric = 1,
    rescale: Literal["inverse", "norm", "none"] = "inverse",
    clip: chex.Numeric | None = 1.0,
    seed: chex.Numeric = 0,
    layer_axes: LayerAxes = None,
    diagnostics: bool = False,
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


def keep_largest(
    density: optax.ScalarOrSchedule,
    *,
    every_k: chex.Numeric = 1,
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
      every_k: see `online_merge`.
      rescale: see `magnitude`.
      threshold: see `magnitude`; in `fused_chain` neither needs an array of the update.
      seed: integer that fixes which of equal magnitudes are kept.
      layer_axes: see `on_ties`.
      diagnostics: see `online_merge`.

    Returns:
      A transformation with `OnlineMergeState` that needs no delta.

    Raises:
      ValueError: see `online_merge` and `magnitude`.

    Example:
      >>> import optax, omerge_jax as om
      >>> tx = optax.chain(optax.adamw(3e-6), om.keep_largest(density=0.1))

    References:
      No paper: what is left of OnTIES (https://arxiv.org/abs/2405.17931) without its reference;
      docs/taxbench.md has what it does.
    """
    return on_ties(
        0,
        density,
        every_k=every_k,
        rescale=rescale,
        threshold=threshold,
        seed=seed,
        layer_axes=layer_axes,
        diagnostics=diagnostics,
    )

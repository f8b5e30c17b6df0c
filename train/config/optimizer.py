"""Optimizers and learning-rate schedules."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from train.config.base import DType

OptimizerName = Literal[
    "adamw",
    "lion",
    "on_dare",
    "on_ties",
    "on_dare_adamw",
    "on_ties_adamw",
    "child_tuning",
    "keep_largest",
    "online_merge",
]


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """A number over time.

    Attributes:
        type: Shape after the warm-up.
        warmup_steps: Steps in which it rises linearly from 0.
        final_scale: Share of the peak that is left at the last step (linear and cosine).
    """

    type: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: int = 0
    final_scale: float = 0.0


def _constant() -> ScheduleOptions:
    return ScheduleOptions(type="constant")


@dataclass(frozen=True, kw_only=True)
class AlphaOptions:
    """Weight of the reference delta over time, or relative to the size of the steps.

    Attributes:
        value: Peak weight, 0 to 1. Give this or `relative`.
        relative: Peak share of the norm of every step that the reference gets, 0 to 1, whatever the
            learning rate.
        scope: What the norms for `relative` are taken over: global (all parameters) or tensor (each
            tensor of each layer by itself). Unset: global.
        schedule: The number over the steps of the run.
        gate: Reward accuracy, 0 to 1: a step whose batch ranks a smaller share of its pairs right
            adds nothing of the reference. Unset: every step does.
    """

    value: float | None = None
    relative: float | None = None
    scope: Literal["global", "tensor"] | None = None
    schedule: ScheduleOptions = field(default_factory=_constant)
    gate: float | None = None


@dataclass(frozen=True, kw_only=True)
class AdamWOptions:
    """AdamW with gradient clipping.

    Attributes:
        learning_rate: Peak learning rate.
        b1: Decay of the first moment. Unset: the optimizer's own default, as for the two below.
        b2: Decay of the second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        max_grad_norm: Gradients of a larger global norm are scaled down to it; 0 turns clipping
            off.
    """

    learning_rate: float
    b1: float | None = None
    b2: float | None = None
    eps: float | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(AdamWOptions):
    """The optimizer. A field that the chosen one has no use for must stay unset.

    Attributes:
        name: adamw; lion; on_dare or on_ties (merging after `inner`, whose weight decay is merged
            too); on_dare_adamw or on_ties_adamw (the authors' order: weight decay after the merge);
            child_tuning (random masks alone); keep_largest (largest entries alone); online_merge (any
            `sparsifier` with any `consensus`).
        alpha: Weight of the reference delta, 0 to 1; the policy's update gets 1 − alpha. A number, or
            the fields of a schedule or of a relative weight.
        inner: Optimizer whose updates are merged: adamw (unset), lion or sgd.
        sparsifier: Which entries online_merge keeps: random (DARE), magnitude (TIES),
            magnitude_ranked (DELLA), band (Breadcrumbs) or identity (all).
        consensus: How online_merge joins update and delta: linear or sign.
        density: Share of the entries that are kept, in (0, 1].
        epsilon: Half the width of the window of probabilities around density (magnitude_ranked).
        gamma: Share of the largest entries that are dropped (band).
        every_k: Merge on every k-th step only.
        rescale: What makes up for dropped entries: inverse (divide by density), norm (keep the L1
            norm), none.
        delta_mask: fresh (a new random mask on the delta at each step) or fixed (one for the whole
            run, as in the authors' code).
        clip: Bound on the entries of the sparsified delta, and with rescale norm of the update; 0
            turns it off.
        election: Sign vote of TIES: unweighted (the authors' code) or weighted (the paper).
        threshold: How TIES finds the largest entries: exact, or sampled (faster; the share kept is
            off by about half a percent of itself).
        storage: How the delta is held: dense, sparse (kept entries alone; with random masks it needs
            delta_mask fixed), pinned_host (in the host's memory, on an accelerator) or recompute (not
            at all: the weights of reference and base stay in memory, which are subtracted at
            every merge, and checkpoints hold none of it).
        rounding: stochastic or compensated (what is added arrives, however small, also in bfloat16) or
            nearest. Unset: stochastic where a delta is merged, nearest otherwise.
        moment_dtype: Type of the optimizer's moments. Unset: that of the parameters; bfloat16 second
            moments hardly decay.
        seed: Seed of the random masks and of the rounding.
        delta_dtype: Type in which the delta is held. Unset: that of the parameters.
        diagnostics: Whether to log the full set of merge/... metrics. Unset: only merge/alpha and
            alpha_total.
    """

    name: OptimizerName = "adamw"
    alpha: float | AlphaOptions | None = None
    inner: Literal["adamw", "lion", "sgd"] | None = None
    sparsifier: Literal["random", "magnitude", "magnitude_ranked", "band", "identity"] | None = None
    consensus: Literal["linear", "sign"] | None = None
    density: float | None = None
    epsilon: float | None = None
    gamma: float | None = None
    every_k: int | None = None
    rescale: Literal["inverse", "norm", "none"] | None = None
    delta_mask: Literal["fixed", "fresh"] | None = None
    clip: float | None = None
    election: Literal["unweighted", "weighted"] | None = None
    threshold: Literal["exact", "sampled"] | None = None
    storage: Literal["dense", "sparse", "pinned_host", "recompute"] | None = None
    rounding: Literal["stochastic", "compensated", "nearest"] | None = None
    moment_dtype: Literal["float32", "bfloat16"] | None = None
    seed: int | None = None
    delta_dtype: DType | None = None
    diagnostics: bool | None = None

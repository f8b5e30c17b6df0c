"""Optimizers and learning-rate schedules."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from train.config import ranges
from train.config.base import DType, UserError

OptimizerName = Literal[
    "adamw",
    "lion",
    "on_dare",
    "on_dare_adamw",
    "on_ties",
    "on_ties_adamw",
    "child_tuning",
    "keep_largest",
    "online_merge",
]
Sparsifier = Literal["random", "magnitude", "magnitude_ranked", "band", "identity"]
Consensus = Literal["linear", "sign"]
Inner = Literal["adamw", "lion", "sgd"]
Storage = Literal["dense", "sparse", "pinned_host", "recompute"]
Rounding = Literal["stochastic", "compensated", "nearest"]


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """The learning rate, or another number, over the steps of a run.

    Attributes:
        type: Shape after the warm-up.
        warmup_steps: Steps in which it rises linearly from 0.
        final_scale: Share of the peak that is left at the last step (linear and cosine).
    """

    type: Literal["constant", "linear", "cosine"] = "linear"
    warmup_steps: ranges.NonNegativeInt = 0
    final_scale: ranges.ClosedUnitInterval = 0.0

    def check_together(self, name: str) -> None:
        """Refuses an end for a schedule that has none. Raises `UserError`."""
        if self.type == "constant" and self.final_scale:
            raise UserError(
                f"{name}.final_scale is {self.final_scale}, but a constant schedule has no use for "
                f"it; unset it, or choose another {name}.type."
            )


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

    value: ranges.Share | None = None
    relative: ranges.Share | None = None
    scope: Literal["global", "tensor"] | None = None
    schedule: ScheduleOptions = field(default_factory=partial(ScheduleOptions, type="constant"))
    gate: ranges.Share | None = None

    def check_together(self, name: str) -> None:
        """Checks that there is one peak. Raises `UserError`."""
        if (self.value is None) == (self.relative is None):
            raise UserError(f"Give exactly one of {name}.value and {name}.relative.")
        if self.scope is not None and self.relative is None:
            raise UserError(
                f"{name}.scope is set to {self.scope!r}, but only alpha.relative has a use for it. "
                "Unset it."
            )


@dataclass(frozen=True, kw_only=True)
class AdamWOptions:
    """AdamW with gradient clipping.

    Attributes:
        learning_rate: Peak learning rate.
        b1: Decay of the first moment. Unset: 0.9.
        b2: Decay of the second moment. Unset: 0.999, and 0.99 for lion.
        eps: Added to the root of the second moment. Unset: 1e-8, and 1e-6 for on_dare_adamw and
            on_ties_adamw.
        weight_decay: Decoupled weight decay.
        max_grad_norm: Gradients of a larger global norm are scaled down to it; 0 turns clipping
            off.
    """

    learning_rate: ranges.PositiveFloat
    b1: ranges.BelowOne | None = None
    b2: ranges.BelowOne | None = None
    eps: ranges.PositiveFloat | None = None
    weight_decay: ranges.NonNegativeFloat = 0.0
    max_grad_norm: ranges.NonNegativeFloat = 1.0

    @property
    def inner_name(self) -> Inner:
        """The optimizer whose updates are merged, or applied as they are."""
        return "lion" if self._setting("name") == "lion" else self._setting("inner") or "adamw"

    @property
    def delta_storage(self) -> Storage | None:
        """How the reference delta is held; None where none is merged, as at alpha 0."""
        return (self._setting("storage") or "dense") if self._setting("alpha") else None

    @property
    def holds_delta(self) -> bool:
        """Whether the state holds a delta, which has to be set before the first step."""
        return self.delta_storage not in (None, "recompute")

    @property
    def update_rounding(self) -> Rounding:
        """How updates are rounded to what parameters can hold."""
        merges = self.delta_storage is not None
        return self._setting("rounding") or ("stochastic" if merges else "nearest")

    def _setting(self, name: str) -> Any:
        """Returns a setting of `OptimizerOptions`, or None where there is none."""
        return getattr(self, name, None)


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
            Unset: 0.15.
        gamma: Share of the largest entries that are dropped (band). Unset: 0.01.
        every_k: Merge on every k-th step only. Unset: 1.
        rescale: What makes up for dropped entries: inverse (divide by density), norm (keep the L1
            norm), none. Unset: inverse for random masks, none for the largest entries.
        delta_mask: fresh (a new random mask on the delta at each step) or fixed (one for the whole
            run, as in the authors' code). Unset: fresh.
        clip: Bound on the entries of the sparsified delta, and with rescale norm of the update; 0
            turns it off. Unset: 1.
        election: Sign vote of TIES: unweighted (the authors' code) or weighted (the paper).
            Unset: unweighted.
        threshold: How TIES finds the largest entries: exact, or sampled (faster; the share kept is
            off by about half a percent of itself). Unset: exact.
        storage: How the delta is held: dense, sparse (kept entries alone; with random masks it needs
            delta_mask fixed), pinned_host (in the host's memory, on an accelerator) or recompute (not
            at all: the weights of reference and base stay in memory, which are subtracted at
            every merge, and checkpoints hold none of it). Unset: dense.
        rounding: stochastic or compensated (what is added arrives, however small, also in bfloat16) or
            nearest. Unset: stochastic where a delta is merged, nearest otherwise.
        moment_dtype: Type of the optimizer's moments. Unset: that of the parameters; bfloat16 second
            moments hardly decay.
        seed: Seed of the random masks and of the rounding. Unset: 0.
        delta_dtype: Type in which the delta is held. Unset: that of the parameters.
        diagnostics: Whether to log the full set of merge/... metrics. Unset: only merge/alpha and
            alpha_total.
    """

    name: OptimizerName = "adamw"
    alpha: ranges.ClosedUnitInterval | AlphaOptions | None = None
    inner: Inner | None = None
    sparsifier: Sparsifier | None = None
    consensus: Consensus | None = None
    density: ranges.Share | None = None
    epsilon: ranges.NonNegativeFloat | None = None
    gamma: ranges.BelowOne | None = None
    every_k: ranges.PositiveInt | None = None
    rescale: Literal["inverse", "norm", "none"] | None = None
    delta_mask: Literal["fixed", "fresh"] | None = None
    clip: ranges.NonNegativeFloat | None = None
    election: Literal["unweighted", "weighted"] | None = None
    threshold: Literal["exact", "sampled"] | None = None
    storage: Storage | None = None
    rounding: Rounding | None = None
    moment_dtype: Literal["float32", "bfloat16"] | None = None
    seed: ranges.Seed | None = None
    delta_dtype: DType | None = None
    diagnostics: bool | None = None

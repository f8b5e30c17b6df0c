"""Losses on answers that are labelled desirable or not, one by one: KTO and APO-zero.

Formulas, defaults and metric names are those of TRL 1.16 (`KTOTrainer`).
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass

import jax
import jax.numpy as jnp
import numpy as np

from train.losses.pair import Beta
from train.types import Metrics

UNPAIRED_LOSSES = ("kto", "apo_zero_unpaired")
"""Losses on unpaired answers by the names TRL gives them."""


def kto(
    logps: jax.Array,
    reference_logps: jax.Array,
    desirable: jax.Array,
    kl: jax.Array,
    *,
    beta: Beta,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[jax.Array, Metrics]:
    """KTO on unpaired examples (Ethayarajh et al., 2024, arXiv:2402.01306, equations 7 and 8).

    `logps` and `reference_logps` are float32 `[batch]`, log-probabilities of each completion, and
    `desirable` bool `[batch]` is its label. `desirable_weight` is λ_D and `undesirable_weight` λ_U.
    `kl` estimates the policy's divergence from the reference, a scalar: the mean over the global
    batch of `policy − reference` on mismatched completions. It is clamped at 0 here, after that
    mean, and carries no gradient.

    Returns:
      The loss of each example, float32 `[batch]`, and the metrics `kl`, `rewards/chosen`,
      `rewards/rejected`, `rewards/margins`, `logps/chosen`, `logps/rejected`: means over the
      examples of that label, NaN when the batch has none (TRL then leaves the metric out).
    """
    kl = jax.lax.stop_gradient(jnp.maximum(kl, 0.0))
    logratio = logps - reference_logps
    # λ_D (1 − σ(β (r − z₀))) and λ_U (1 − σ(β (z₀ − r))), with the log-ratio r and the divergence z₀.
    # σ(−x) keeps its digits where 1 − σ(x) rounds to 0.
    loss = jnp.where(
        desirable,
        desirable_weight * jax.nn.sigmoid(-beta * (logratio - kl)),
        undesirable_weight * jax.nn.sigmoid(-beta * (kl - logratio)),
    )
    return loss, {"kl": kl, **_label_means(logps, beta * logratio, desirable)}


def _label_means(logps: jax.Array, rewards: jax.Array, desirable: jax.Array) -> Metrics:
    metrics: Metrics = {}
    for name, label in (("chosen", desirable), ("rejected", ~desirable)):
        metrics[f"rewards/{name}"] = jnp.mean(jax.lax.stop_gradient(rewards), where=label)
        metrics[f"logps/{name}"] = jnp.mean(jax.lax.stop_gradient(logps), where=label)
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return metrics


@dataclass(frozen=True)
class UnpairedLoss:
    """A loss of `UNPAIRED_LOSSES` with its settings.

    `beta` is positive; λ_D (`desirable_weight`) and λ_U (`undesirable_weight`) are 0 or larger, and
    one of them is positive. Raises `ValueError` for an unknown loss or a setting out of range.
    """

    type: str = "kto"
    _: KW_ONLY
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.type not in UNPAIRED_LOSSES:
            raise ValueError(
                f"Unknown type {self.type!r} for unpaired answers. Available: "
                f"{', '.join(UNPAIRED_LOSSES)}."
            )
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}.")
        for name in ("desirable_weight", "undesirable_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be 0 or larger, got {getattr(self, name)}.")
        if not self.desirable_weight and not self.undesirable_weight:
            raise ValueError(
                "desirable_weight and undesirable_weight are both 0: nothing is learned."
            )

    @property
    def needs_kl(self) -> bool:
        """Whether the loss needs the divergence, estimated on mismatched completions."""
        return self.type == "kto"

    def __call__(
        self,
        logps: jax.Array,
        reference_logps: jax.Array,
        desirable: jax.Array,
        kl: jax.Array | None = None,
        beta: Beta | None = None,
    ) -> tuple[jax.Array, Metrics]:
        """Loss of each example, float32 `[batch]`, and metrics; arguments are those of `kto`."""
        if not self.needs_kl:
            # APO-zero (arXiv:2408.06266, equation 7), one answer at a time: KTO, divergence 0.
            kl = jnp.zeros([])
        elif kl is None:
            raise ValueError("The kto loss needs kl, the divergence on mismatched completions.")
        return kto(
            logps.astype(jnp.float32),
            reference_logps.astype(jnp.float32),
            desirable,
            kl.astype(jnp.float32),
            beta=self.beta if beta is None else beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )


def label_balance_warning(
    labels: np.ndarray, desirable_weight: float, undesirable_weight: float
) -> str | None:
    """A sentence that says which weights of the two labels would do; None where they are in range.

    The KTO paper advises `1 ≤ λ_D n_D / (λ_U n_U) ≤ 4/3` (section 4.2). `labels` are bool `[rows]`,
    true for desirable answers.

    Example:
      >>> label_balance_warning(np.array([True, False]), 1.0, 1.0)
      >>> "desirable_weight from 3 to 4" in label_balance_warning(
      ...     np.array([True, False, False, False]), 1.0, 1.0
      ... )
      True
    """
    desirable = int(np.sum(labels))
    undesirable = len(labels) - desirable
    if not desirable or not undesirable:
        missing = "undesirable" if desirable else "desirable"
        return f"No answer is labelled {missing}; the loss only sees one side."
    found, given = desirable * desirable_weight, undesirable * undesirable_weight
    # Two digits, so that weights as they are written down count as met.
    if given and 0.995 <= found / given <= 4 / 3 + 0.005:
        return None
    least, most = (given / desirable * factor for factor in (1, 4 / 3))
    lowest, highest = (found / undesirable / factor for factor in (4 / 3, 1))
    return (
        f"{desirable} answers are desirable and {undesirable} are not; weighted, their ratio is "
        f"{found / given if given else float('inf'):.3g}, and the KTO paper advises 1 to 4/3. Set "
        f"desirable_weight from {least:.3g} to {most:.3g}, or undesirable_weight from "
        f"{lowest:.3g} to {highest:.3g}."
    )

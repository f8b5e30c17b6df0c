"""The loss on preference pairs: losses by name, their weighted sum, and TRL's metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from train.losses import pair as on_pairs
from train.losses import reference_free
from train.losses.pair import Beta, PairLogps
from train.types import Metrics


class _Loss(NamedTuple):
    """A loss, the settings besides β that it takes, and whether `chosen_nll` is part of it."""

    function: Callable[..., jax.Array] | None
    takes: tuple[str, ...] = ()
    has_nll: bool = False


_SMOOTHED = ("label_smoothing",)
LOSSES: dict[str, _Loss] = {
    "sigmoid": _Loss(on_pairs.sigmoid, _SMOOTHED),
    "ipo": _Loss(on_pairs.ipo),
    "hinge": _Loss(on_pairs.hinge),
    "robust": _Loss(on_pairs.robust, _SMOOTHED),
    "sigmoid_norm": _Loss(on_pairs.sigmoid_norm),
    "exo_pair": _Loss(on_pairs.exo_pair, _SMOOTHED),
    "nca_pair": _Loss(on_pairs.nca_pair),
    "bco_pair": _Loss(on_pairs.bco_pair),
    "sppo_hard": _Loss(on_pairs.sppo_hard),
    "aot": _Loss(on_pairs.aot, _SMOOTHED),
    "aot_unpaired": _Loss(on_pairs.aot_unpaired, _SMOOTHED),
    "apo_zero": _Loss(on_pairs.apo_zero),
    "apo_down": _Loss(on_pairs.apo_down),
    "discopop": _Loss(on_pairs.discopop, ("discopop_tau",)),
    "sft": _Loss(None, has_nll=True),
    "simpo": _Loss(reference_free.simpo, ("simpo_gamma", *_SMOOTHED)),
    "orpo": _Loss(reference_free.odds, has_nll=True),
}
"""Losses on pairs by the names TRL gives them."""

REFERENCE_FREE = ("simpo", "orpo")
"""Losses whose rewards are defined without a reference; `sft` goes along with either kind."""

WHOLE_BATCH = ("aot", "aot_unpaired", "bco_pair")
"""Losses that compare the pairs of a batch, so that parts of a batch are not enough."""


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss of `LOSSES`, or a weighted sum of several; defaults are TRL's.

    `weights` has one for each name; None is 1 each, as in TRL. `ld_alpha` weighs the tokens past
    the length of the shorter answer (LD-DPO, arXiv:2409.06411); None is 1. Whoever sums
    log-probabilities applies it (`sum_logps`), to the policy's and to the reference's.

    Raises:
      ValueError: For an unknown loss, a setting out of range, or one that differs from its default
        although no loss takes it; nothing falls back silently.

    Example:
      >>> import jax.numpy as jnp
      >>> zero = jnp.zeros(2)
      >>> pair = PairLogps(zero, zero, zero, zero, zero + 1, zero + 1)
      >>> PreferenceLoss("ipo", beta=0.5)(pair).tolist()
      [1.0, 1.0]
      >>> PreferenceLoss(["ipo", "sft"], weights=[1.0, 0.1], beta=0.5)(pair).tolist()
      [1.0, 1.0]
    """

    type: str | Sequence[str] = "sigmoid"
    _: KW_ONLY
    weights: Sequence[float] | None = None
    beta: float = 0.1
    ld_alpha: float | None = None
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    discopop_tau: float = 0.05

    def __post_init__(self) -> None:
        if not self.types:
            raise ValueError("type names no loss; give at least one.")
        for name in self.types:
            if name not in LOSSES:
                raise ValueError(
                    f"Unknown loss_type {name!r} for preference pairs. Available: "
                    f"{', '.join(LOSSES)}."
                )
        self._check_weights()
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}.")
        self._check_settings()
        self._check_ld_alpha()

    def _check_weights(self) -> None:
        types, weights = list(self.types), [weight for _, weight in self.terms]
        if self.weights is not None and len(self.weights) != len(types):
            raise ValueError(
                f"weights must hold one number for each of the {len(types)} losses {types}, got "
                f"{list(self.weights)}."
            )
        if not all(abs(weight) < math.inf for weight in weights) or not any(weights):
            raise ValueError(f"weights must be finite and not all 0, got {weights}.")
        if len(set(types)) < len(types):
            raise ValueError(f"type names a loss twice: {types}. Add up their weights.")

    def _check_settings(self) -> None:
        ranges = {
            "label_smoothing": ("in [0, 0.5)", 0 <= self.label_smoothing < 0.5),
            "simpo_gamma": ("0 or larger", 0 <= self.simpo_gamma < math.inf),
            "discopop_tau": ("in (0, 1]", 0 < self.discopop_tau <= 1),
        }
        for name, (expected, holds) in ranges.items():
            value = getattr(self, name)
            if not holds:
                raise ValueError(f"{name} must be {expected}, got {value}.")
            takers = [known for known, loss in LOSSES.items() if name in loss.takes]
            if value != getattr(PreferenceLoss, name) and not set(takers) & set(self.types):
                raise ValueError(
                    f"{name} is only defined for loss_type {', '.join(map(repr, takers))}, got "
                    f"{value} with {', '.join(map(repr, self.types))}."
                )
        if "exo_pair" in self.types and not self.label_smoothing:
            raise ValueError(
                "label_smoothing must be positive for loss_type 'exo_pair', got 0; its paper uses "
                "0.001."
            )

    def _check_ld_alpha(self) -> None:
        if self.ld_alpha is None:
            return
        if not 0 <= self.ld_alpha <= 1:
            raise ValueError(f"ld_alpha must be in [0, 1], got {self.ld_alpha}.")
        free = sorted({*REFERENCE_FREE, "sft"} & set(self.types))
        if free:
            raise ValueError(
                f"ld_alpha is set, but {', '.join(free)} needs the log-probabilities of whole "
                "answers; unset it."
            )

    @property
    def types(self) -> tuple[str, ...]:
        """The names of the losses."""
        return (self.type,) if isinstance(self.type, str) else tuple(self.type)

    @property
    def terms(self) -> list[tuple[str, float]]:
        """Each loss with its weight."""
        weights = [1.0] * len(self.types) if self.weights is None else self.weights
        return list(zip(self.types, weights, strict=False))

    @property
    def needs_reference(self) -> bool:
        """Whether the loss or its metrics read the reference's log-probabilities."""
        free = set(self.types) & set(REFERENCE_FREE)
        return not free or not set(self.types) <= {*REFERENCE_FREE, "sft"}

    @property
    def nll_weight(self) -> float:
        """Weight of the cross-entropy of the chosen answers, a mean over tokens and not over pairs."""
        return sum(weight for name, weight in self.terms if LOSSES[name].has_nll)

    def __call__(self, pair: PairLogps, beta: Beta | None = None) -> jax.Array:
        """The weighted sum of the losses, float32 `[batch]`, whatever floats `pair` holds.

        Its mean is the loss of the batch: every pair has the cross-entropy of the whole batch.
        """
        return self.without_nll(pair, beta) + self.nll_weight * self.nll(pair)

    def without_nll(self, pair: PairLogps, beta: Beta | None = None) -> jax.Array:
        """The loss of each pair without the cross-entropy, float32 `[batch]`."""
        pair = _as_float32(pair)
        total = jnp.zeros(pair.chosen.shape, jnp.float32)
        for name, weight in self.terms:
            loss = LOSSES[name]
            if loss.function is not None:
                settings = {setting: getattr(self, setting) for setting in loss.takes}
                beta_now = self.beta if beta is None else beta
                total = total + weight * loss.function(pair, beta_now, **settings)
        return total

    def nll(self, pair: PairLogps) -> jax.Array:
        """Cross-entropy of the chosen answers, float32 `[]`: the mean over all their tokens."""
        return reference_free.chosen_nll(_as_float32(pair))

    def metrics(self, pair: PairLogps, beta: Beta | None = None) -> Metrics:
        """TRL's metrics of a batch, float32 scalars: `pair_metrics`, or those of its `CPOTrainer`.

        Without a reference, log-probabilities are those per token, rewards are β times them, and
        `nll_loss` is the cross-entropy of the chosen answers; ORPO's log odds ratios come with it.
        """
        pair, beta = _as_float32(pair), self.beta if beta is None else beta
        if self.needs_reference:
            return pair_metrics(pair, beta)
        chosen, rejected = logps = reference_free.mean_logps(pair)
        metrics = _means((beta * chosen, beta * rejected), logps)
        metrics["nll_loss"] = jax.lax.stop_gradient(reference_free.chosen_nll(pair))
        if "orpo" in self.types:
            odds = jax.lax.stop_gradient(reference_free.log_odds_ratio(pair))
            metrics["log_odds_chosen"] = jnp.mean(odds)
            metrics["log_odds_ratio"] = jnp.mean(jax.nn.log_sigmoid(odds))
        return metrics

    def at_reference(self) -> float | None:
        """The loss while policy and reference agree; None where it depends on the data."""
        if {*REFERENCE_FREE, "sft"} & set(self.types):
            return None
        zero, one = jnp.zeros(1), jnp.ones(1)
        return float(self(PairLogps(zero, zero, zero, zero, one, one))[0])


def _as_float32(pair: PairLogps) -> PairLogps:
    """The same in float32: squares and 1/β soon leave float16's range."""
    return PairLogps(*(field.astype(jnp.float32) for field in pair))


def sum_logps(
    logps: jax.Array, mask: jax.Array, other_mask: jax.Array, ld_alpha: float | None
) -> jax.Array:
    """Sums of log-probabilities, float32 `[batch]`, in which tokens past the shorter answer weigh less.

    `logps` are float32 `[batch, completion]`, 0 where masked, and `mask` and `other_mask` are those
    of the same answers and of the other answer of each pair, padded on the right. The tokens past
    the shorter answer's length weigh `ld_alpha`; None is 1. TRL logs rewards and log-probabilities
    as these sums.
    """
    if ld_alpha is None:
        return jnp.sum(logps, axis=1)
    shared = jnp.minimum(jnp.sum(mask, axis=1), jnp.sum(other_mask, axis=1))
    weight = jnp.where(jnp.arange(logps.shape[1]) < shared[:, None], 1.0, ld_alpha)
    return jnp.sum(logps * weight, axis=1)


def pair_metrics(pair: PairLogps, beta: Beta) -> Metrics:
    """TRL's metrics of a preference batch, float32 scalars without gradient.

    Rewards are β times the log-ratios of whole answers for every loss, those that divide by the
    length included. `rewards/accuracies` is the share of pairs whose chosen reward is strictly
    larger; the others are batch means: `rewards/chosen`, `rewards/rejected`, `rewards/margins`,
    `logps/chosen` and `logps/rejected`.
    """
    rewards = beta * pair.chosen_logratio, beta * pair.rejected_logratio
    return _means(rewards, (pair.chosen, pair.rejected))


def _means(rewards: tuple[jax.Array, jax.Array], logps: tuple[jax.Array, jax.Array]) -> Metrics:
    chosen, rejected = rewards
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
        "rewards/margins": chosen - rejected,
        "logps/chosen": logps[0],
        "logps/rejected": logps[1],
    }
    return {name: jnp.mean(jax.lax.stop_gradient(value)) for name, value in values.items()}

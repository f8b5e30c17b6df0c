"""Losses on pairs by name: their settings, weighted mixes, and the metrics that go with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from train.losses import pair as on_pairs
from train.losses import reference_free
from train.losses.pair import Beta, PairLogps

Metrics = dict[str, jax.Array]


class _Named(NamedTuple):
    """A loss, the settings besides β that it takes, and whether `chosen_nll` is part of it."""

    function: Callable[..., jax.Array] | None
    takes: tuple[str, ...] = ()
    has_nll: bool = False


_SMOOTHED = ("label_smoothing",)
LOSSES: dict[str, _Named] = {
    "sigmoid": _Named(on_pairs.sigmoid, _SMOOTHED),
    "ipo": _Named(on_pairs.ipo),
    "hinge": _Named(on_pairs.hinge),
    "robust": _Named(on_pairs.robust, _SMOOTHED),
    "sigmoid_norm": _Named(on_pairs.sigmoid_norm),
    "exo_pair": _Named(on_pairs.exo_pair, _SMOOTHED),
    "nca_pair": _Named(on_pairs.nca_pair),
    "bco_pair": _Named(on_pairs.bco_pair),
    "sppo_hard": _Named(on_pairs.sppo_hard),
    "aot": _Named(on_pairs.aot, _SMOOTHED),
    "aot_unpaired": _Named(on_pairs.aot_unpaired, _SMOOTHED),
    "apo_zero": _Named(on_pairs.apo_zero),
    "apo_down": _Named(on_pairs.apo_down),
    "discopop": _Named(on_pairs.discopop, ("discopop_tau",)),
    "sft": _Named(None, has_nll=True),
    "simpo": _Named(reference_free.simpo, ("simpo_gamma", *_SMOOTHED)),
    "orpo": _Named(reference_free.odds, has_nll=True),
}
"""Losses on pairs by the names TRL gives them."""

REFERENCE_FREE = ("simpo", "orpo")
"""Those whose rewards are defined without a reference; `sft` goes along with either kind."""

WHOLE_BATCH = ("aot", "aot_unpaired", "bco_pair")
"""Those that compare the pairs of a batch, so that parts of a batch are not enough."""

_DEFAULTS = {"label_smoothing": 0.0, "simpo_gamma": 0.5, "discopop_tau": 0.05}


@dataclass(frozen=True)
class PairLoss:
    """A weighted sum of losses with their settings, from `pair_loss`.

    Attributes:
      types: Names in `LOSSES`.
      weights: One for each.
      beta: What is used where a call gives no other.
      ld_alpha: Weight of the tokens past the length of the shorter answer, None for 1. Whoever sums
        log-probabilities applies it (`weigh_tail`), to the policy's and to the reference's.
      settings: Of the losses, by name.
    """

    types: tuple[str, ...]
    weights: tuple[float, ...]
    beta: float
    ld_alpha: float | None
    settings: dict[str, float]

    @property
    def needs_reference(self) -> bool:
        """Whether the loss or its metrics read the reference's log-probabilities."""
        free = set(self.types) & set(REFERENCE_FREE)
        return not free or not set(self.types) <= {*REFERENCE_FREE, "sft"}

    @property
    def nll_weight(self) -> float:
        """Weight of the cross-entropy of the chosen answers, a mean over tokens and not over pairs."""
        named = zip(self.types, self.weights, strict=True)
        return sum(weight for name, weight in named if LOSSES[name].has_nll)

    def __call__(self, pair: PairLogps, beta: Beta | None = None) -> jax.Array:
        """The weighted sum of the losses, float32 `[batch]`, whatever floats `pair` holds.

        Its mean is the loss of the batch: every pair has the cross-entropy of the whole batch.
        """
        return self.of_pairs(pair, beta) + self.nll_weight * self.nll(pair)

    def of_pairs(self, pair: PairLogps, beta: Beta | None = None) -> jax.Array:
        """What there is without the cross-entropy, float32 `[batch]`."""
        pair = _as_float32(pair)
        beta = self.beta if beta is None else beta
        total = jnp.zeros(pair.chosen.shape, jnp.float32)
        for name, weight in zip(self.types, self.weights, strict=True):
            function, takes, _ = LOSSES[name]
            own = {setting: self.settings[setting] for setting in takes}
            if function is not None:
                total = total + weight * function(pair, beta, **own)
        return total

    def nll(self, pair: PairLogps) -> jax.Array:
        """Cross-entropy of the chosen answers, float32 `[]`: the mean over all their tokens."""
        return reference_free.chosen_nll(_as_float32(pair))

    def metrics(self, pair: PairLogps, beta: Beta | None = None) -> Metrics:
        """TRL's metrics of a batch: `pair_metrics`, or `reference_free_metrics`."""
        pair, beta = _as_float32(pair), self.beta if beta is None else beta
        if self.needs_reference:
            return pair_metrics(pair, beta)
        metrics = reference_free_metrics(pair, beta)
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
    """Sums of float16 are at home in float32: squares and 1/β leave float16's range early."""
    return PairLogps(*(field.astype(jnp.float32) for field in pair))


def pair_loss(
    loss_type: str | Sequence[str] = "sigmoid",
    *,
    weights: Sequence[float] | None = None,
    beta: float = 0.1,
    ld_alpha: float | None = None,
    **settings: float,
) -> PairLoss:
    """A loss of `LOSSES`, or a weighted sum of several, with its settings filled in and checked.

    Args:
      loss_type: A name in `LOSSES`, or several.
      weights: One for each name; None for 1 each, as in TRL.
      beta: Positive.
      ld_alpha: In [0, 1] (LD-DPO, arXiv:2409.06411), None to leave it out.
      settings: `label_smoothing` in [0, 0.5), `simpo_gamma` not negative, `discopop_tau` in (0, 1];
        other than their defaults only where a loss takes them.

    Raises:
      ValueError: For an unknown loss or a setting out of range; nothing falls back silently.

    Example:
      >>> import jax.numpy as jnp
      >>> zero = jnp.zeros(2)
      >>> pair = PairLogps(zero, zero, zero, zero, zero + 1, zero + 1)
      >>> pair_loss("ipo", beta=0.5)(pair).tolist()
      [1.0, 1.0]
      >>> pair_loss(["ipo", "sft"], weights=[1.0, 0.1], beta=0.5)(pair).tolist()
      [1.0, 1.0]
    """
    types = (loss_type,) if isinstance(loss_type, str) else tuple(loss_type)
    if not types:
        raise ValueError("type names no loss; give at least one.")
    for name in types:
        if name not in LOSSES:
            raise ValueError(
                f"Unknown loss_type {name!r} for preference pairs. Available: {', '.join(LOSSES)}."
            )
    weights = tuple(weights) if weights is not None else (1.0,) * len(types)
    _check_weights(types, weights)
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}.")
    _check_settings(types, settings)
    loss = PairLoss(types, weights, beta, ld_alpha, {**_DEFAULTS, **settings})
    _check_tail(loss)
    return loss


def _check_weights(types: tuple[str, ...], weights: tuple[float, ...]) -> None:
    if len(weights) != len(types):
        raise ValueError(
            f"weights must hold one number for each of the {len(types)} losses {list(types)}, got "
            f"{list(weights)}."
        )
    if not all(abs(weight) < float("inf") for weight in weights) or not any(weights):
        raise ValueError(f"weights must be finite and not all 0, got {list(weights)}.")
    if len(set(types)) < len(types):
        raise ValueError(f"type names a loss twice: {list(types)}. Add up their weights.")


def _check_settings(types: tuple[str, ...], settings: dict[str, Any]) -> None:
    unknown = set(settings) - set(_DEFAULTS)
    if unknown:
        raise TypeError(f"Unknown settings {sorted(unknown)}; there are {list(_DEFAULTS)}.")
    values = {**_DEFAULTS, **settings}
    ranges = (
        ("label_smoothing", "in [0, 0.5)", 0 <= values["label_smoothing"] < 0.5),
        ("simpo_gamma", "0 or larger", 0 <= values["simpo_gamma"] < float("inf")),
        ("discopop_tau", "in (0, 1]", 0 < values["discopop_tau"] <= 1),
    )
    for name, expected, holds in ranges:
        if not holds:
            raise ValueError(f"{name} must be {expected}, got {values[name]}.")
        takers = [known for known, loss in LOSSES.items() if name in loss.takes]
        if values[name] != _DEFAULTS[name] and not set(takers) & set(types):
            raise ValueError(
                f"{name} is only defined for loss_type {', '.join(map(repr, takers))}, got "
                f"{values[name]} with {', '.join(map(repr, types))}."
            )
    if "exo_pair" in types and not values["label_smoothing"]:
        raise ValueError(
            "label_smoothing must be positive for loss_type 'exo_pair', got 0; its paper uses 0.001."
        )


def _check_tail(loss: PairLoss) -> None:
    if loss.ld_alpha is None:
        return
    if not 0 <= loss.ld_alpha <= 1:
        raise ValueError(f"ld_alpha must be in [0, 1], got {loss.ld_alpha}.")
    free = sorted({*REFERENCE_FREE, "sft"} & set(loss.types))
    if free:
        raise ValueError(
            f"ld_alpha is set, but {', '.join(free)} needs the log-probabilities of whole answers; "
            "unset it."
        )


def weigh_tail(
    logps: jax.Array, mask: jax.Array, other_mask: jax.Array, ld_alpha: float | None
) -> jax.Array:
    """Sums of log-probabilities in which tokens past the shorter answer's length weigh less.

    Args:
      logps: Per-token, float32 `[batch, completion]`, 0 where masked.
      mask: bool `[batch, completion]`, of the same answers, padded on the right.
      other_mask: That of the other answer of each pair.
      ld_alpha: Weight of the tail; None for 1.

    Returns:
      float32 `[batch]`. TRL logs rewards and log-probabilities as these sums.
    """
    if ld_alpha is None:
        return jnp.sum(logps, axis=1)
    shared = jnp.minimum(jnp.sum(mask, axis=1), jnp.sum(other_mask, axis=1))
    weight = jnp.where(jnp.arange(logps.shape[1]) < shared[:, None], 1.0, ld_alpha)
    return jnp.sum(logps * weight, axis=1)


def pair_metrics(pair: PairLogps, beta: Beta) -> Metrics:
    """TRL's metrics of a preference batch, float32 scalars without gradient.

    Rewards are β times the log-ratios of whole answers for every loss, those that divide by the
    length included.

    Returns:
      `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `rewards/accuracies` (share of pairs
      whose chosen reward is strictly larger), `logps/chosen` and `logps/rejected`, as batch means.
    """
    rewards = beta * pair.chosen_logratio, beta * pair.rejected_logratio
    return _means(rewards, (pair.chosen, pair.rejected))


def reference_free_metrics(pair: PairLogps, beta: Beta) -> Metrics:
    """Metrics of TRL's `CPOTrainer` for SimPO and of its `ORPOTrainer`.

    Returns:
      The names of `pair_metrics` with log-probabilities per token and β times those as rewards, and
      `nll_loss`, the cross-entropy of the chosen answers.
    """
    logps = reference_free.mean_logps(pair)
    metrics = _means((beta * logps[0], beta * logps[1]), logps)
    return {**metrics, "nll_loss": jax.lax.stop_gradient(reference_free.chosen_nll(pair))}


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

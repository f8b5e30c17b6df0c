"""Losses of the DPO family, KTO and SFT, as pure functions of summed log-probabilities.

Conventions and metric names are those of TRL: rewards are `beta * (policy − reference)` in nats
times beta, log-probabilities are sums over the completion tokens, and every function returns the
loss of each example, so that the caller decides how to average.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp


class PairLogps(NamedTuple):
    """What a preference loss sees of a batch; every field is float32 `[batch]`.

    Attributes:
      chosen: Policy log-probability of the chosen completion, summed over its tokens.
      rejected: The same for the rejected completion.
      reference_chosen: Reference model's log-probability of the chosen completion.
      reference_rejected: The same for the rejected completion.
      chosen_length: Tokens in the chosen completion.
      rejected_length: Tokens in the rejected completion.
    """

    chosen: jax.Array
    rejected: jax.Array
    reference_chosen: jax.Array
    reference_rejected: jax.Array
    chosen_length: jax.Array
    rejected_length: jax.Array

    @property
    def chosen_logratio(self) -> jax.Array:
        """Log-ratio log π(chosen) − log π_ref(chosen)."""
        return self.chosen - self.reference_chosen

    @property
    def rejected_logratio(self) -> jax.Array:
        """Log-ratio log π(rejected) − log π_ref(rejected)."""
        return self.rejected - self.reference_rejected


def sigmoid(pair: PairLogps, beta: float, label_smoothing: float = 0.0) -> jax.Array:
    """DPO (Rafailov et al., 2023, arXiv:2305.18290), with the conservative variant's smoothing.

    `−(1−ε) log σ(β h) − ε log σ(−β h)` where `h` is the difference of log-ratios. `ε` is the
    probability that a label is flipped (cDPO, https://ericmitchell.ai/cdpo.pdf); TRL ≥ 1.0 has
    dropped it from its `sigmoid` loss, so compare with ε = 0.

    Args:
      pair: Log-probabilities.
      beta: Strength of the pull towards the reference model.
      label_smoothing: ε, in [0, 0.5).

    Returns:
      float32 `[batch]`; ln 2 where policy and reference agree.
    """
    logits = beta * (pair.chosen_logratio - pair.rejected_logratio)
    return -(
        (1 - label_smoothing) * jax.nn.log_sigmoid(logits)
        + label_smoothing * jax.nn.log_sigmoid(-logits)
    )


def ipo(pair: PairLogps, beta: float) -> jax.Array:
    """IPO (Azar et al., 2023, arXiv:2310.12036, equation 17), averaged over tokens.

    The paper writes the log-ratio of whole sequences. Its authors' results, and TRL, use the mean
    per token, which keeps the target margin `1 / (2 β)` comparable across lengths; so does this.
    `beta` is the paper's τ.

    Returns:
      float32 `[batch]`; `1 / (4 β²)` where policy and reference agree.
    """
    chosen = pair.chosen_logratio / jnp.maximum(pair.chosen_length, 1)
    rejected = pair.rejected_logratio / jnp.maximum(pair.rejected_length, 1)
    return jnp.square(chosen - rejected - 1 / (2 * beta))


def hinge(pair: PairLogps, beta: float) -> jax.Array:
    """Hinge loss on the reward margin (SLiC, Zhao et al., 2023, arXiv:2305.10425), as in TRL.

    Returns:
      float32 `[batch]`; 1 where policy and reference agree.
    """
    return jax.nn.relu(1 - beta * (pair.chosen_logratio - pair.rejected_logratio))


LOSSES: dict[str, Callable[..., jax.Array]] = {"sigmoid": sigmoid, "ipo": ipo, "hinge": hinge}
"""Losses on pairs by the names TRL gives them."""


def pair_loss(
    loss_type: str, *, beta: float, label_smoothing: float = 0.0
) -> Callable[[PairLogps], jax.Array]:
    """A loss of `LOSSES` with its settings filled in and checked.

    Args:
      loss_type: A name in `LOSSES`.
      beta: Positive.
      label_smoothing: In [0, 0.5); other than 0 only for `"sigmoid"`.

    Raises:
      ValueError: For an unknown loss or a setting out of range; nothing falls back silently.

    Example:
      >>> import jax.numpy as jnp
      >>> zero = jnp.zeros(2)
      >>> pair = PairLogps(zero, zero, zero, zero, zero + 1, zero + 1)
      >>> pair_loss("ipo", beta=0.5)(pair).tolist()
      [1.0, 1.0]
    """
    if loss_type not in LOSSES:
        raise ValueError(
            f"Unknown loss_type {loss_type!r} for preference pairs. Available: {', '.join(LOSSES)}."
        )
    if not beta > 0:
        raise ValueError(f"beta must be positive, got {beta}.")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}.")
    if loss_type == "sigmoid":
        return lambda pair: sigmoid(pair, beta, label_smoothing)
    if label_smoothing:
        raise ValueError(
            f"label_smoothing is only defined for loss_type 'sigmoid', got {label_smoothing} "
            f"with {loss_type!r}."
        )
    return lambda pair: LOSSES[loss_type](pair, beta)


def pair_metrics(pair: PairLogps, beta: float) -> dict[str, jax.Array]:
    """TRL's metrics of a preference batch, float32 scalars without gradient.

    Returns:
      `rewards/chosen`, `rewards/rejected`, `rewards/margins`, `rewards/accuracies` (share of pairs
      whose chosen reward is strictly larger), `logps/chosen` and `logps/rejected`, as batch means.
    """
    chosen = jax.lax.stop_gradient(beta * pair.chosen_logratio)
    rejected = jax.lax.stop_gradient(beta * pair.rejected_logratio)
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).astype(jnp.float32),
        "rewards/margins": chosen - rejected,
        "logps/chosen": jax.lax.stop_gradient(pair.chosen),
        "logps/rejected": jax.lax.stop_gradient(pair.rejected),
    }
    return {name: jnp.mean(value) for name, value in values.items()}


def kto(
    logps: jax.Array,
    reference_logps: jax.Array,
    desirable: jax.Array,
    kl: jax.Array,
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """KTO on unpaired examples (Ethayarajh et al., 2024, arXiv:2402.01306, equations 7 and 8).

    Args:
      logps: Policy log-probability of each completion, float32 `[batch]`.
      reference_logps: The reference model's, float32 `[batch]`.
      desirable: bool `[batch]`, the label of each completion.
      kl: Estimate of the policy's divergence from the reference, a scalar: the mean over the global
        batch of `policy − reference` on mismatched completions. It is clamped at 0 here, after that
        mean, and carries no gradient.
      beta: Strength of the pull towards the reference model.
      desirable_weight: λ_D, weight of the desirable examples.
      undesirable_weight: λ_U, weight of the others.

    Returns:
      The loss of each example, float32 `[batch]`, and the metrics `kl`, `rewards/chosen`,
      `rewards/rejected`, `rewards/margins`, `logps/chosen`, `logps/rejected`: means over the
      examples of that label, NaN when the batch has none (TRL then leaves the metric out).
    """
    kl = jax.lax.stop_gradient(jnp.maximum(kl, 0.0))
    logratio = logps - reference_logps
    loss = jnp.where(
        desirable,
        desirable_weight * (1 - jax.nn.sigmoid(beta * (logratio - kl))),
        undesirable_weight * (1 - jax.nn.sigmoid(beta * (kl - logratio))),
    )
    metrics = {"kl": kl}
    reward = jax.lax.stop_gradient(beta * logratio)
    for name, label in (("chosen", desirable), ("rejected", ~desirable)):
        metrics[f"rewards/{name}"] = jnp.mean(reward, where=label)
        metrics[f"logps/{name}"] = jnp.mean(jax.lax.stop_gradient(logps), where=label)
    metrics["rewards/margins"] = metrics["rewards/chosen"] - metrics["rewards/rejected"]
    return loss, metrics


def sft(
    logps: jax.Array, mask: jax.Array, top1: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Negative log-likelihood per completion token, averaged over all tokens of the batch.

    Args:
      logps: Per-token log-probabilities, float32 `[batch, completion]`, 0 where masked.
      mask: bool `[batch, completion]`, true at completion tokens.
      top1: bool `[batch, completion]`, whether the model ranks the token first.

    Returns:
      The scalar loss, and the metrics `loss`, `mean_token_accuracy` and `num_tokens` (completion
      tokens in the batch), float32 scalars.
    """
    tokens = jnp.sum(mask, dtype=jnp.float32)
    loss = -jnp.sum(logps) / jnp.maximum(tokens, 1)
    accuracy = jnp.sum(top1 & mask, dtype=jnp.float32) / jnp.maximum(tokens, 1)
    metrics = {
        "loss": jax.lax.stop_gradient(loss),
        "mean_token_accuracy": accuracy,
        "num_tokens": tokens,
    }
    return loss, metrics

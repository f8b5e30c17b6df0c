"""GRPO and its relatives on sampled answers, as pure functions of per-token log-probabilities.

Formulas, names and defaults are those of TRL 1.16 (`GRPOTrainer`), after DeepSeekMath (Shao et al.,
2024, arXiv:2402.03300, equation 3). With the ratio `r` of policy and sampling policy at a token and
the advantage `A` of its answer, a token's loss is `−min(r A, clip(r, 1−ε, 1+ε_high) A) + β KL`, and
`type` says how tokens are averaged and how `r` is bounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import NamedTuple

import jax
import jax.numpy as jnp

GROUP_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")

BATCH_TOKEN_MEANS = ("dapo", "cispo", "vespo")
"""Losses that are means over the tokens of a whole batch, however many parts it is looked at in."""

_DECAYS = ("vespo_lambda_pos", "vespo_lambda_neg")
_CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
_READ_BY = {
    "epsilon": _CLIPPED,
    "epsilon_high": (*_CLIPPED, "cispo"),
    "delta": _CLIPPED,
    **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos"), ("sapo",)),
    **dict.fromkeys(("vespo_k_pos", "vespo_k_neg", *_DECAYS), ("vespo",)),
}

_POSITIVE = ("positive", lambda value: 0 < value < math.inf)
_NOT_NEGATIVE = ("0 or larger", lambda value: 0 <= value < math.inf)
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "beta": _NOT_NEGATIVE,
    "epsilon": ("in (0, 1)", lambda value: 0 < value < 1),
    "epsilon_high": ("positive", lambda value: value > 0),
    **dict.fromkeys(("sapo_temperature_neg", "sapo_temperature_pos", *_DECAYS), _POSITIVE),
    **dict.fromkeys(("vespo_k_pos", "vespo_k_neg"), _NOT_NEGATIVE),
    "delta": ("above 1", lambda value: value > 1),
}


class GroupLogps(NamedTuple):
    """What the loss sees of sampled answers; only the tokens where `mask` is true count.

    Attributes:
      logps: The policy's log-probability of every token, float32 `[rows, length]`.
      old_logps: Those of the policy that sampled; None where it is the same policy.
      reference_logps: Those of the reference; None where β is 0.
      advantages: float32 `[rows]`.
      mask: bool `[rows, length]`.
    """

    logps: jax.Array
    old_logps: jax.Array | None
    reference_logps: jax.Array | None
    advantages: jax.Array
    mask: jax.Array


@dataclass(frozen=True, kw_only=True)
class GroupLoss:
    """The loss of a batch of sampled answers; names and defaults are those of TRL's `GRPOConfig`.

    Attributes:
      type: `grpo` averages the tokens of an answer, then the answers; `bnpo` averages the tokens of
        the batch, or of each part of it under gradient accumulation; `dapo` (arXiv:2503.14476) those
        of the whole batch; `dr_grpo` (arXiv:2503.20783) divides by the greatest length,
        `max_completion_length`; `luspo` (arXiv:2602.05261) adds up an answer's tokens; `cispo`
        (arXiv:2506.13585) bounds the weight of a token and not its loss; `sapo` (arXiv:2511.20347) has
        a smooth gate in place of the clip; `vespo` (arXiv:2602.10693) weighs an answer by
        `w^k exp(λ (1 − w))`, `w` being the ratio of its probabilities, without a gradient through the
        weight.
      epsilon: Lower bound of the ratio, below 1.
      epsilon_high: Upper bound, above 1; None: `epsilon`. For `cispo` the largest weight itself.
      delta: Upper bound of the ratio where the clip has none (INTELLECT-2, arXiv:2505.07291).
      importance_sampling_level: `token`; or `sequence`, one ratio an answer (GSPO, arXiv:2507.18071),
        the geometric mean over its tokens.
      use_bias_correction_kl: Multiply the divergence by the ratio, whose gradient is then that of the
        reverse divergence (DeepSeek-V3.2, arXiv:2512.02556).

    `_pos` is for advantages of 0 and above, but above 0 for `sapo`, and `_neg` for the others.

    Raises:
      ValueError: A setting is out of range, or of no use to the loss.
    """

    type: str = "dapo"
    beta: float = 0.0
    epsilon: float = 0.2
    epsilon_high: float | None = None
    delta: float | None = None
    importance_sampling_level: str = "token"
    use_bias_correction_kl: bool = True
    sapo_temperature_neg: float = 1.05
    sapo_temperature_pos: float = 1.0
    vespo_k_pos: float = 2.0
    vespo_lambda_pos: float = 3.0
    vespo_k_neg: float = 3.0
    vespo_lambda_neg: float = 2.0
    max_completion_length: int = 512

    def __post_init__(self) -> None:
        levels = ("token", "sequence")
        for name, known in (("type", GROUP_LOSSES), ("importance_sampling_level", levels)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}.")
        for name, (expected, holds) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise ValueError(f"{name} must be {expected}, got {value!r}.")
        self._check_read()
        if self.type == "cispo" and self.epsilon_high is None:
            raise ValueError(
                "epsilon_high must be set with type cispo, whose largest weight of a token it is "
                "(5.0 in arXiv:2510.13786)."
            )
        level = self.importance_sampling_level
        needed = {"luspo": "sequence", "vespo": "token"}.get(self.type, level)
        if level != needed:
            raise ValueError(
                f"importance_sampling_level must be {needed} with type {self.type}, got {level!r}."
            )

    def _check_read(self) -> None:
        """Refuses a setting that the loss would not read."""
        for field in fields(self):
            value, readers = getattr(self, field.name), _READ_BY.get(field.name, GROUP_LOSSES)
            if value != field.default and self.type not in readers:
                raise ValueError(
                    f"{field.name} is set to {value!r}, but type {self.type} has no use for it (only "
                    f"{', '.join(readers)}). Unset it."
                )
        if not self.beta and not self.use_bias_correction_kl:
            raise ValueError(
                "use_bias_correction_kl is false, but with beta 0 there is no divergence."
            )

    @property
    def upper(self) -> float:
        """`epsilon_high`, or `epsilon` where that is None."""
        return self.epsilon if self.epsilon_high is None else self.epsilon_high

    def __call__(self, tokens: GroupLogps) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The loss of a batch and its metrics, all float32 scalars.

        The metrics are `kl` where β is not 0 (the mean over tokens of what is multiplied by β), and
        `clip_ratio/low_mean`, `high_mean`, `region_mean` (shares of the tokens, or of the answers
        where there is one ratio for each answer), `low_min` and `high_max` (of an answer), or
        `cispo_clip_ratio`, or `vespo/phi_seq_mean` (the mean weight of an answer).
        """
        log_ratio = self._log_ratio(tokens)
        ratio, advantages = jnp.exp(log_ratio), tokens.advantages[:, None]
        metrics = {}
        if self.type == "vespo":
            weight = self._weight(log_ratio, advantages, tokens.mask)
            loss = -weight * advantages * tokens.logps
            metrics["vespo/phi_seq_mean"] = jnp.mean(weight)
        else:
            loss = self._policy(tokens, ratio, advantages)
        if self.beta:
            divergence = self._divergence(tokens, ratio)
            loss = loss + self.beta * divergence
            metrics["kl"] = token_mean(divergence, tokens.mask)
        metrics |= self._clipped(ratio, advantages, tokens.mask)
        return self._average(loss, tokens.mask), jax.lax.stop_gradient(metrics)

    def _log_ratio(self, tokens: GroupLogps) -> jax.Array:
        """Log r of each token, `[rows, length]`, or of each answer, `[rows, 1]`."""
        old = tokens.old_logps
        ratio = tokens.logps - (jax.lax.stop_gradient(tokens.logps) if old is None else old)
        if self.importance_sampling_level == "token":
            return ratio
        return row_means(ratio, tokens.mask)[:, None]

    def _policy(self, tokens: GroupLogps, ratio: jax.Array, advantages: jax.Array) -> jax.Array:
        """The loss of each token, or of each answer where there is one ratio for each answer."""
        if self.type == "cispo":
            # −sg(min(r, ε_high)) A log π (arXiv:2506.13585)
            weight = jax.lax.stop_gradient(jnp.minimum(ratio, self.upper))
            return -weight * advantages * tokens.logps
        if self.type == "sapo":
            positive, other = self.sapo_temperature_pos, self.sapo_temperature_neg
            # −(4 / τ) σ(τ (r − 1)) A (arXiv:2511.20347)
            temperature = jnp.where(advantages > 0, positive, other)
            return -jax.nn.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantages
        # −min(r A, clip(r, 1 − ε, 1 + ε_high) A)
        clipped = jnp.clip(ratio, 1 - self.epsilon, 1 + self.upper)
        return -jnp.minimum(self._bounded(ratio) * advantages, clipped * advantages)

    def _weight(self, log_ratio: jax.Array, advantages: jax.Array, mask: jax.Array) -> jax.Array:
        """VESPO's weight of every answer, `[rows, 1]`, with the bounds of the published code."""
        # w^k exp(λ (1 − w)) = exp(λ + k log w − λ w), with log w the sum of an answer's log-ratios
        moved = jnp.sum(jnp.where(mask, jnp.clip(log_ratio, -20, 20), 0.0), axis=1, keepdims=True)
        moved = jnp.clip(moved, math.log(1e-8), 20)
        positive = advantages >= 0
        exponent = jnp.where(positive, self.vespo_k_pos, self.vespo_k_neg)
        decay = jnp.where(positive, self.vespo_lambda_pos, self.vespo_lambda_neg)
        return jax.lax.stop_gradient(jnp.exp(decay + exponent * moved - decay * jnp.exp(moved)))

    def _bounded(self, ratio: jax.Array) -> jax.Array:
        """The ratio with the upper bound `delta`."""
        return ratio if self.delta is None else jnp.minimum(ratio, self.delta)

    def _divergence(self, tokens: GroupLogps, ratio: jax.Array) -> jax.Array:
        """The estimator k3 (http://joschu.net/blog/kl-approx.html) of the reverse divergence."""
        assert tokens.reference_logps is not None
        # k3 = π_ref / π − log(π_ref / π) − 1
        difference = tokens.reference_logps - tokens.logps
        found = jnp.exp(difference) - difference - 1
        return found * ratio if self.use_bias_correction_kl else found

    def _average(self, loss: jax.Array, mask: jax.Array) -> jax.Array:
        """One number from the losses of tokens, as `type` says."""
        loss = jnp.where(mask, loss, 0.0)  # also spreads an answer's loss over its tokens
        if self.type in ("grpo", "sapo"):
            return jnp.mean(row_means(loss, mask))
        if self.type == "dr_grpo":
            return jnp.sum(loss) / (len(loss) * self.max_completion_length)
        if self.type == "luspo":
            return jnp.mean(jnp.sum(loss, axis=1))
        return token_mean(loss, mask)

    def _clipped(
        self, ratio: jax.Array, advantages: jax.Array, mask: jax.Array
    ) -> dict[str, jax.Array]:
        if self.type == "cispo":
            above = (ratio > self.upper) & (advantages > 0)
            return {"cispo_clip_ratio": token_mean(above, mask)}
        if self.type not in _CLIPPED:
            return {}
        ratio = self._bounded(ratio)
        low = (ratio < 1 - self.epsilon) & (advantages < 0)
        high = (ratio > 1 + self.upper) & (advantages > 0)
        counted = jnp.any(mask, axis=1)
        least = jnp.min(jnp.where(counted, row_means(low, mask), 1.0))
        return {
            "clip_ratio/low_mean": token_mean(low, mask),
            "clip_ratio/high_mean": token_mean(high, mask),
            "clip_ratio/region_mean": token_mean(low | high, mask),
            "clip_ratio/low_min": jnp.where(jnp.any(counted), least, 0.0),
            "clip_ratio/high_max": jnp.max(row_means(high, mask)),
        }


def row_means(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Means over the masked tokens of each row, float32 `[rows]`; 0 where a row has none."""
    count = jnp.sum(mask, axis=1, dtype=jnp.float32)
    return jnp.sum(jnp.where(mask, values, 0.0), axis=1) / jnp.maximum(count, 1)


def token_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean over all masked tokens, float32 `[]`, 0 without any; `[rows, 1]` is averaged over rows."""
    values = values.astype(jnp.float32)
    if values.shape[1] == 1 != mask.shape[1]:
        return jnp.mean(values)
    count = jnp.sum(mask, dtype=jnp.float32)
    return jnp.sum(jnp.where(mask, values, 0.0)) / jnp.maximum(count, 1)

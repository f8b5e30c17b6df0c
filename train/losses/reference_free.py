"""Losses on pairs that ask no reference model: SimPO, ORPO and cross-entropy of the chosen answer.

Formulas and defaults are those of TRL 1.16 (`CPOTrainer`, `ORPOTrainer`, and `sft` of
`DPOTrainer`). SimPO and ORPO define the reward of an answer as `β / length · log π(answer)`, and
that is what is logged for them.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from train.losses.pair import Beta, PairLogps, smoothed


def mean_logps(pair: PairLogps) -> tuple[jax.Array, jax.Array]:
    """Log-probability per token of the chosen and of the rejected answers, each `[batch]`."""
    chosen = pair.chosen / jnp.maximum(pair.chosen_length, 1)
    return chosen, pair.rejected / jnp.maximum(pair.rejected_length, 1)


def chosen_nll(pair: PairLogps) -> jax.Array:
    """Cross-entropy of the chosen answers, averaged over all their tokens; a scalar."""
    return -jnp.sum(pair.chosen) / jnp.maximum(jnp.sum(pair.chosen_length), 1)


def simpo(
    pair: PairLogps, beta: Beta, simpo_gamma: float = 0.5, label_smoothing: float = 0.0
) -> jax.Array:
    """SimPO (Meng et al., 2024, arXiv:2405.14734, equation 6).

    `−log σ(β (mean log π(chosen) − mean log π(rejected)) − γ)`. The paper uses β from 2 to 10 and γ
    about half of β; TRL's defaults are 0.1 and 0.5. Mixed with `sft` it is TRL's CPO-SimPO, whose
    `cpo_alpha` is the weight.
    """
    chosen, rejected = mean_logps(pair)
    return smoothed(beta * (chosen - rejected) - simpo_gamma, label_smoothing)


def log_odds_ratio(pair: PairLogps) -> jax.Array:
    """Log of the ratio of the odds of the chosen to the rejected answer, `[batch]` (ORPO)."""

    def log_odds(logp: jax.Array) -> jax.Array:
        logp = jnp.minimum(logp, -1e-6)  # the odds of probability 1 are infinite
        return logp - _log1mexp(logp)

    chosen, rejected = mean_logps(pair)
    return log_odds(chosen) - log_odds(rejected)


def odds(pair: PairLogps, beta: Beta) -> jax.Array:
    """ORPO (Hong et al., 2024, arXiv:2403.07691, equation 6) without its `chosen_nll`, `[batch]`.

    −β times `log σ` of the log odds ratio; β is the paper's λ. The cross-entropy that goes with it
    is that of the answer given the prompt, as the paper writes it; TRL's also counts the tokens of
    the prompt.
    """
    return -beta * jax.nn.log_sigmoid(log_odds_ratio(pair))


def _log1mexp(x: jax.Array) -> jax.Array:
    """log(1 − exp(x)) of negative `x` without cancellation, and with finite gradients."""
    small = x > -jnp.log(2.0)
    # Each branch gets an argument that it can differentiate, even where the other is taken.
    near = jnp.log(-jnp.expm1(jnp.where(small, x, -1.0)))
    return jnp.where(small, near, jnp.log1p(-jnp.exp(jnp.where(small, -1.0, x))))

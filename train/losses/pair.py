"""Losses on preference pairs, as pure functions of summed log-probabilities.

Formulas, defaults and names are those of TRL 1.16 (`DPOTrainer`). Every function takes the pairs of
a batch and β, and returns the loss of each pair, float32 `[batch]`, so that the caller decides how
to average. A log-ratio is the policy's log-probability of an answer less the reference's, and the
margin `h` the log-ratio of the chosen answer less that of the rejected one.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Beta = float | jax.Array


class PairLogps(NamedTuple):
    """What a preference loss sees of a batch; every field is float32 `[batch]`.

    Log-probabilities of the policy and of the reference are sums over the tokens of an answer, and
    the lengths are numbers of tokens.
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

    @property
    def margin(self) -> jax.Array:
        """The difference of the log-ratios."""
        return self.chosen_logratio - self.rejected_logratio

    @property
    def mean_margin(self) -> jax.Array:
        """The difference of the log-ratios, each divided by the tokens of its answer."""
        chosen = self.chosen_logratio / jnp.maximum(self.chosen_length, 1)
        return chosen - self.rejected_logratio / jnp.maximum(self.rejected_length, 1)


def smoothed(logits: jax.Array, label_smoothing: float) -> jax.Array:
    """`−(1−ε) log σ(x) − ε log σ(−x)`: logistic loss when a share ε of the labels is flipped."""
    loss = -(1 - label_smoothing) * jax.nn.log_sigmoid(logits)
    return loss - label_smoothing * jax.nn.log_sigmoid(-logits)


def sigmoid(pair: PairLogps, beta: Beta, label_smoothing: float = 0.0) -> jax.Array:
    """DPO (Rafailov et al., 2023, arXiv:2305.18290), with the conservative variant's smoothing.

    `−(1−ε) log σ(β h) − ε log σ(−β h)`, which is ln 2 where policy and reference agree. `ε`, in
    [0, 0.5), is the probability that a label is flipped (cDPO, https://ericmitchell.ai/cdpo.pdf);
    TRL ≥ 1.0 has dropped it from its `sigmoid` loss, so compare with ε = 0.
    """
    return smoothed(beta * pair.margin, label_smoothing)


def sigmoid_norm(pair: PairLogps, beta: Beta) -> jax.Array:
    """DPO on log-ratios per token (length-normalised DPO of Tülu 3, arXiv:2411.15124)."""
    return -jax.nn.log_sigmoid(beta * pair.mean_margin)


def robust(pair: PairLogps, beta: Beta, label_smoothing: float = 0.0) -> jax.Array:
    """Robust DPO (Chowdhury et al., 2024, arXiv:2403.00409): unbiased under flips of share ε."""
    logits = beta * pair.margin
    clean = -(1 - label_smoothing) * jax.nn.log_sigmoid(logits)
    flipped = -label_smoothing * jax.nn.log_sigmoid(-logits)
    return (clean - flipped) / (1 - 2 * label_smoothing)


def ipo(pair: PairLogps, beta: Beta) -> jax.Array:
    """IPO (Azar et al., 2023, arXiv:2310.12036, equation 17), averaged over tokens.

    The paper writes the log-ratio of whole sequences. Its authors' results, and TRL, use the mean
    per token, which keeps the target margin `1 / (2 β)` comparable across lengths; so does this.
    `beta` is the paper's τ. The loss is `1 / (4 β²)` where policy and reference agree.
    """
    return jnp.square(pair.mean_margin - 1 / (2 * beta))


def hinge(pair: PairLogps, beta: Beta) -> jax.Array:
    """Hinge loss on the reward margin (SLiC, Zhao et al., 2023, arXiv:2305.10425), as in TRL.

    It is 1 where policy and reference agree.
    """
    return jax.nn.relu(1 - beta * pair.margin)


def exo_pair(pair: PairLogps, beta: Beta, label_smoothing: float) -> jax.Array:
    """EXO (Ji et al., 2024, arXiv:2402.00856, equation 16) for two answers.

    The reverse divergence `KL(p ‖ [1−ε, ε])` of `p = softmax(β · log-ratios)`; ε must be positive,
    and the paper uses 1e-3.
    """
    logits = beta * pair.margin
    win = jax.nn.log_sigmoid(logits) - jnp.log1p(-label_smoothing)
    lose = jax.nn.log_sigmoid(-logits) - jnp.log(label_smoothing)
    return jax.nn.sigmoid(logits) * win + jax.nn.sigmoid(-logits) * lose


def nca_pair(pair: PairLogps, beta: Beta) -> jax.Array:
    """NCA (Chen et al., 2024, arXiv:2402.05369): rewards of both answers are held near 0."""
    chosen, rejected = beta * pair.chosen_logratio, beta * pair.rejected_logratio
    pull = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return -jax.nn.log_sigmoid(chosen) - 0.5 * pull


def bco_pair(pair: PairLogps, beta: Beta) -> jax.Array:
    """BCO (Jung et al., 2024, arXiv:2404.04656) on pairs, without its reward shift, as in TRL."""
    chosen = jax.nn.log_sigmoid(beta * pair.chosen_logratio)
    return -chosen - jax.nn.log_sigmoid(-beta * pair.rejected_logratio)


def sppo_hard(pair: PairLogps, beta: Beta) -> jax.Array:
    """SPPO (Wu et al., 2024, arXiv:2405.00675, equation 4.7) with win probabilities of 1 and 0."""
    chosen = jnp.square(pair.chosen_logratio - 0.5 / beta)
    return chosen + jnp.square(pair.rejected_logratio + 0.5 / beta)


def aot(pair: PairLogps, beta: Beta, label_smoothing: float = 0.0) -> jax.Array:
    """AOT (Melnyk et al., 2024, arXiv:2406.05882) on pairs: quantiles of margins are compared.

    The policy's and the reference's margins are sorted over the whole batch, on all devices
    together, so entry `i` is of quantile `i` and not of pair `i`.
    """
    policy = jnp.sort(pair.chosen - pair.rejected)
    reference = jnp.sort(pair.reference_chosen - pair.reference_rejected)
    return smoothed(beta * (policy - reference), label_smoothing)


def aot_unpaired(pair: PairLogps, beta: Beta, label_smoothing: float = 0.0) -> jax.Array:
    """AOT (arXiv:2406.05882) on the sorted rewards of chosen and rejected answers."""
    difference = jnp.sort(pair.chosen_logratio) - jnp.sort(pair.rejected_logratio)
    return smoothed(beta * difference, label_smoothing)


def apo_zero(pair: PairLogps, beta: Beta) -> jax.Array:
    """APO-zero (D'Oosterlinck et al., 2024, arXiv:2408.06266, equation 7).

    For chosen answers better than the model's own: their likelihood rises, the other one falls.
    """
    chosen = jax.nn.sigmoid(-beta * pair.chosen_logratio)
    return chosen + jax.nn.sigmoid(beta * pair.rejected_logratio)


def apo_down(pair: PairLogps, beta: Beta) -> jax.Array:
    """APO-down (arXiv:2408.06266, equation 8).

    For chosen answers worse than the model's own: both likelihoods fall, the rejected one more.
    """
    return jax.nn.sigmoid(beta * pair.chosen_logratio) + jax.nn.sigmoid(-beta * pair.margin)


def discopop(pair: PairLogps, beta: Beta, discopop_tau: float = 0.05) -> jax.Array:
    """DiscoPOP (Lu et al., 2024, arXiv:2406.08414, equation 5): logistic and exponential, blended.

    `(1 − m) · −log σ(x) + m · exp(−x)` with `x = β h` and `m = σ(x / τ)`. The second term is
    computed as one exponential: at very negative `x` its factors are 0 and infinity.
    """
    logits = beta * pair.margin
    logistic = -jax.nn.log_sigmoid(logits) * jax.nn.sigmoid(-logits / discopop_tau)
    return logistic + jnp.exp(jax.nn.log_sigmoid(logits / discopop_tau) - logits)

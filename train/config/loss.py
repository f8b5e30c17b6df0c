"""Settings of the losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from train.config import ranges


@dataclass(frozen=True, kw_only=True)
class SFTLossOptions:
    """Cross-entropy of the answers.

    Attributes:
        vocab_chunk: Work through the vocabulary in pieces of this many entries, so that the logits
            are never held whole; null: all at once; auto: in pieces when the vocabulary is large.
    """

    vocab_chunk: ranges.PositiveInt | Literal["auto"] | None = "auto"


@dataclass(frozen=True, kw_only=True)
class BetaOptions(SFTLossOptions):
    """A loss with rewards.

    Attributes:
        beta: Strength of the pull towards the reference.
        beta_schedule: constant, or from beta in the first step to beta_final in the last along a
            line or half a cosine. Evaluations use beta throughout, so that they compare.
        beta_final: Beta of the last step; only with a schedule.
    """

    beta: ranges.PositiveFloat = 0.1
    beta_schedule: Literal["constant", "linear", "cosine"] = "constant"
    beta_final: ranges.PositiveFloat | None = None


@dataclass(frozen=True, kw_only=True)
class PreferenceLossOptions(BetaOptions):
    """Preference loss; the names and defaults are TRL's.

    Attributes:
        type: Name of the loss, or a list of names to add up: sigmoid (DPO), ipo, hinge, robust,
            sigmoid_norm, exo_pair, nca_pair, bco_pair, sppo_hard, aot, aot_unpaired, apo_zero,
            apo_down, discopop, sft (cross-entropy of the chosen answers), and without a reference
            simpo and orpo.
        weights: One factor for each name of a list. Unset: 1 each.
        label_smoothing: Assumed share of pairs whose labels are swapped; for sigmoid (then cDPO),
            robust, exo_pair, aot, aot_unpaired and simpo.
        ld_alpha: Weight of the tokens of an answer past the length of the shorter one of its pair
            (LD-DPO). Unset: they count like the others.
        simpo_gamma: Target margin of simpo.
        discopop_tau: Temperature at which discopop changes from one loss to the other.
    """

    type: list[str] | str = "sigmoid"
    weights: list[float] | None = None
    label_smoothing: ranges.BelowHalf = 0.0
    ld_alpha: ranges.ClosedUnitInterval | None = None
    simpo_gamma: ranges.NonNegativeFloat = 0.5
    discopop_tau: ranges.Share = 0.05


@dataclass(frozen=True, kw_only=True)
class UnpairedLossOptions(BetaOptions):
    """Loss on answers labelled one by one; the names and defaults are TRL's.

    Attributes:
        type: kto, or apo_zero_unpaired, which needs no estimate of the divergence.
        desirable_weight: Factor of the loss of desirable answers, against unequal numbers.
        undesirable_weight: Factor of the loss of undesirable answers.
    """

    type: Literal["kto", "apo_zero_unpaired"] = "kto"
    desirable_weight: ranges.NonNegativeFloat = 1.0
    undesirable_weight: ranges.NonNegativeFloat = 1.0


@dataclass(frozen=True, kw_only=True)
class GroupLossOptions(SFTLossOptions):
    """Policy-gradient loss on groups of sampled answers; names and defaults are those of TRL's GRPO.

    Attributes:
        type: How the losses of tokens become one: dapo (the mean over the tokens of the batch), grpo
            (over the tokens of an answer, then over the answers), bnpo (dapo on each part of a batch
            under gradient accumulation), dr_grpo (the sum divided by sampling.max_new_tokens), luspo
            (the sum over an answer), cispo (bounded weights in place of a clip), sapo (a smooth gate
            in place of a clip) or vespo (answers weighed by how their probability has changed).
        beta: Weight of the divergence from the reference, the model at model.path. 0: there is none,
            and nothing is held in memory for it.
        epsilon: How far below 1 the ratio of new and old probability counts.
        epsilon_high: How far above 1 it counts. Unset: as far as below. For cispo: the largest ratio.
        delta: Largest ratio where the clip sets no bound (two-sided GRPO). Unset: none.
        importance_sampling_level: token, or sequence for one ratio an answer (GSPO).
        use_bias_correction_kl: Multiply the divergence by the ratio, for an unbiased gradient.
        mask_truncated_completions: Leave answers out of the loss that have not ended after
            sampling.max_new_tokens. Their rewards count in the means of their groups.
        sapo_temperature_neg: Temperature of sapo's gate for answers no better than their group's mean.
        sapo_temperature_pos: Temperature of sapo's gate for answers better than their group's mean.
        vespo_k_pos: How fast vespo's weights fall where an answer no worse than its group's mean has
            become less likely.
        vespo_lambda_pos: How fast they fall where such an answer has become more likely.
        vespo_k_neg: The same as vespo_k_pos, for answers worse than their group's mean.
        vespo_lambda_neg: The same as vespo_lambda_pos, for answers worse than their group's mean.
    """

    type: Literal["dapo", "grpo", "bnpo", "dr_grpo", "luspo", "cispo", "sapo", "vespo"] = "dapo"
    beta: ranges.NonNegativeFloat = 0.0
    epsilon: ranges.OpenUnitInterval = 0.2
    epsilon_high: ranges.PositiveFloat | None = None
    delta: ranges.AboveOne | None = None
    importance_sampling_level: Literal["token", "sequence"] = "token"
    use_bias_correction_kl: bool = True
    mask_truncated_completions: bool = False
    sapo_temperature_neg: ranges.PositiveFloat = 1.05
    sapo_temperature_pos: ranges.PositiveFloat = 1.0
    vespo_k_pos: ranges.NonNegativeFloat = 2.0
    vespo_lambda_pos: ranges.PositiveFloat = 3.0
    vespo_k_neg: ranges.NonNegativeFloat = 3.0
    vespo_lambda_neg: ranges.PositiveFloat = 2.0

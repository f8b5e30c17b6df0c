"""Settings of the losses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class SFTLossOptions:
    """Cross-entropy of the answers.

    Attributes:
        vocab_chunk: Work through the vocabulary in pieces of this many entries, so that the logits
            are never held whole; null: all at once; auto: in pieces when the vocabulary is large.
    """

    vocab_chunk: int | Literal["auto"] | None = "auto"


@dataclass(frozen=True, kw_only=True)
class BetaOptions(SFTLossOptions):
    """A loss with rewards.

    Attributes:
        beta: Strength of the pull towards the reference.
        beta_schedule: constant, or from beta in the first step to beta_final in the last along a
            line or half a cosine. Evaluations use beta throughout, so that they compare.
        beta_final: Beta of the last step; only with a schedule.
    """

    beta: float = 0.1
    beta_schedule: Literal["constant", "linear", "cosine"] = "constant"
    beta_final: float | None = None


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
    label_smoothing: float = 0.0
    ld_alpha: float | None = None
    simpo_gamma: float = 0.5
    discopop_tau: float = 0.05


@dataclass(frozen=True, kw_only=True)
class UnpairedLossOptions(BetaOptions):
    """Loss on answers labelled one by one; the names and defaults are TRL's.

    Attributes:
        type: kto, or apo_zero_unpaired, which needs no estimate of the divergence.
        desirable_weight: Factor of the loss of desirable answers, against unequal numbers.
        undesirable_weight: Factor of the loss of undesirable answers.
    """

    type: Literal["kto", "apo_zero_unpaired"] = "kto"
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

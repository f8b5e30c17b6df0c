"""Losses on preference pairs, unpaired and sampled answers, and of SFT, as pure functions of logps.

Conventions, defaults and metric names are those of TRL: rewards are `beta * (policy − reference)`
in nats times beta, and log-probabilities are sums over the completion tokens.
"""

from train.losses.group import GROUP_LOSSES, GroupLogps, GroupLoss
from train.losses.mix import (
    LOSSES,
    REFERENCE_FREE,
    WHOLE_BATCH,
    PairLoss,
    pair_loss,
    pair_metrics,
    reference_free_metrics,
    weigh_tail,
)
from train.losses.pair import PairLogps
from train.losses.schedule import BETA_SCHEDULES, BetaAt, beta_schedule
from train.losses.sft import sft
from train.losses.unpaired import (
    UNPAIRED_LOSSES,
    UnpairedLoss,
    apo_zero_unpaired,
    kto,
    label_balance_warning,
    unpaired_loss,
)

__all__ = [
    "BETA_SCHEDULES",
    "GROUP_LOSSES",
    "LOSSES",
    "REFERENCE_FREE",
    "UNPAIRED_LOSSES",
    "WHOLE_BATCH",
    "BetaAt",
    "GroupLogps",
    "GroupLoss",
    "PairLogps",
    "PairLoss",
    "UnpairedLoss",
    "apo_zero_unpaired",
    "beta_schedule",
    "kto",
    "label_balance_warning",
    "pair_loss",
    "pair_metrics",
    "reference_free_metrics",
    "sft",
    "unpaired_loss",
    "weigh_tail",
]

"""Losses on preference pairs, unpaired and sampled answers, and of SFT, as pure functions of logps.

Conventions, defaults and metric names are those of TRL: rewards are `beta * (policy − reference)`
in nats times beta, and log-probabilities are sums over the completion tokens.
"""

from train.losses.group import GROUP_LOSSES, GroupLogps, GroupLoss
from train.losses.pair import PairLogps
from train.losses.preference import (
    LOSSES,
    REFERENCE_FREE,
    WHOLE_BATCH,
    PreferenceLoss,
    pair_metrics,
    sum_logps,
)
from train.losses.schedule import BETA_SCHEDULES, BetaAt, beta_schedule
from train.losses.sft import sft
from train.losses.start import check_starts_at_reference, check_unpaired_start
from train.losses.unpaired import UNPAIRED_LOSSES, UnpairedLoss, kto, label_balance_warning

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
    "PreferenceLoss",
    "UnpairedLoss",
    "beta_schedule",
    "check_starts_at_reference",
    "check_unpaired_start",
    "kto",
    "label_balance_warning",
    "pair_metrics",
    "sft",
    "sum_logps",
]

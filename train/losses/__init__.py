"""Losses on preference pairs, unpaired and sampled answers, and of SFT, as pure functions of logps.

Conventions, defaults and metric names are those of TRL: rewards are `beta * (policy − reference)`
in nats times beta, and log-probabilities are sums over the completion tokens.
"""

from train.losses.group import GroupLogps, GroupLoss
from train.losses.pair import PairLogps
from train.losses.preference import (
    LOSSES,
    REFERENCE_FREE,
    PreferenceLoss,
    pair_metrics,
    sum_logps,
)
from train.losses.schedule import BetaAt, beta_schedule
from train.losses.sft import sft
from train.losses.start import check_starts_at_reference, check_unpaired_start
from train.losses.unpaired import UNPAIRED_LOSSES, UnpairedLoss, kto, label_balance_warning

__all__ = [
    "LOSSES",
    "REFERENCE_FREE",
    "UNPAIRED_LOSSES",
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

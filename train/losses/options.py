"""From the settings of a run to the loss that they describe."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from train.config import BetaOptions, GroupLossOptions, PreferenceLossOptions, UserError
from train.losses.group import GroupLoss
from train.losses.preference import WHOLE_BATCH, PreferenceLoss
from train.losses.schedule import BetaAt, beta_schedule
from train.losses.unpaired import UnpairedLoss

Loss = TypeVar("Loss", PreferenceLoss, UnpairedLoss, GroupLoss)


def loss_from(kind: type[Loss], options: BetaOptions | GroupLossOptions, **others: Any) -> Loss:
    """A loss of the class `kind`, with the settings that have the names of its fields.

    `others` are the fields that the settings lack. Raises `UserError` for a setting out of range.
    """
    names = {one.name for one in fields(kind)} & {one.name for one in fields(options)}
    try:
        return kind(**{name: getattr(options, name) for name in names}, **others)
    except ValueError as error:
        raise UserError(f"loss: {error}") from error


def beta_from(options: BetaOptions, steps: int) -> BetaAt | None:
    """β of every step, None if constant; `UserError` if the schedule's settings do not fit together."""
    try:
        return beta_schedule(options.beta_schedule, options.beta, options.beta_final, steps)
    except ValueError as error:
        raise UserError(f"loss: {error}") from error


def check_preference_loss(options: PreferenceLossOptions, microbatches: int) -> PreferenceLoss:
    """The loss on pairs, once its settings are found to go together.

    Raises `UserError` for a field out of range and for a loss that microbatches cannot compute.
    """
    loss = loss_from(PreferenceLoss, options)
    beta_from(options, steps=1)
    whole = set(loss.types) & set(WHOLE_BATCH)
    if whole and microbatches > 1:
        raise UserError(
            f"trainer.gradient_accumulation_steps is {microbatches}, but loss.type {min(whole)} "
            "compares all pairs of a batch; set it to 1, or choose another loss."
        )
    return loss

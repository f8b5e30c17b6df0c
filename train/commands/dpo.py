"""``python -m train dpo``: alignment on preference pairs, with or without online merging."""

from __future__ import annotations

from functools import partial
from typing import Any

from train.config import DPOConfig, PreferenceLossOptions, UserError
from train.data import tokenize_preference
from train.evaluation.held_out import evaluate_preferences
from train.inputs.model import blamed_on
from train.losses import WHOLE_BATCH, PairLoss, beta_schedule, pair_loss
from train.objectives.preference import (
    check_starts_at_reference,
    preference_loss,
    reference_logps_fn,
)
from train.runs.alignment import Objective, align, check_merge
from train.runs.run import Run, set_up


def run(config: DPOConfig) -> None:
    """Aligns from the start or from the last checkpoint, and exports the model.

    Raises:
        UserError: something given cannot be used; before training starts.
    """
    check_merge(config)
    loss_of = check_loss(config.loss, config.trainer.gradient_accumulation_steps)
    if config.sync_ref_model and not loss_of.needs_reference:
        raise UserError(
            f"sync_ref_model is set, but loss.type {' and '.join(loss_of.types)} has no reference; "
            "unset it, or choose another loss."
        )
    this = set_up("dpo", config, tokenize_preference)
    if this is not None:
        align(config, this, _objective(config, this))


def check_loss(loss: PreferenceLossOptions, parts: int) -> PairLoss:
    """Checks the settings of a loss on pairs whose batches are looked at in `parts`.

    Raises:
        UserError: a field is out of range, or the loss cannot be computed in parts.
    """
    with blamed_on("loss"):
        loss_of = pair_loss(**settings_of(loss))
        beta_schedule(loss.beta_schedule, loss.beta, loss.beta_final, steps=1)
    whole = set(loss_of.types) & set(WHOLE_BATCH)
    if whole and parts > 1:
        raise UserError(
            f"trainer.gradient_accumulation_steps is {parts}, but loss.type {min(whole)} compares all "
            "pairs of a batch; set it to 1, or choose another loss."
        )
    return loss_of


def settings_of(loss: PreferenceLossOptions) -> dict[str, Any]:
    """Arguments of `train.losses.pair_loss`."""
    return {
        "loss_type": loss.type,
        "weights": loss.weights,
        "beta": loss.beta,
        "label_smoothing": loss.label_smoothing,
        "ld_alpha": loss.ld_alpha,
        "simpo_gamma": loss.simpo_gamma,
        "discopop_tau": loss.discopop_tau,
    }


def _objective(config: DPOConfig, this: Run) -> Objective:
    loss, settings = config.loss, settings_of(config.loss)
    score = reference_logps_fn(this.graphdef, vocab_chunk=loss.vocab_chunk, ld_alpha=loss.ld_alpha)
    beta_at = beta_schedule(loss.beta_schedule, loss.beta, loss.beta_final, this.steps)
    return Objective(
        loss_fn=preference_loss(
            this.graphdef, beta_at=beta_at, vocab_chunk=loss.vocab_chunk, **settings
        ),
        evaluate=partial(
            evaluate_preferences,
            score,
            batch_size=this.eval_batch_size,
            mesh=this.mesh,
            **settings,
        ),
        score=score,
        names=("chosen", "rejected") if pair_loss(**settings).needs_reference else (),
        depends_on=() if loss.ld_alpha is None else ("ld_alpha", loss.ld_alpha),
        check_first=partial(check_starts_at_reference, **settings),
        synced=config.sync_ref_model,
    )

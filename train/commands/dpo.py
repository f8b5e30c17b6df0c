"""``python -m train dpo``: alignment on preference pairs, with or without online merging."""

from __future__ import annotations

from functools import partial

from train.config import DPOConfig, UserError
from train.data import tokenize_preference
from train.evaluation.held_out import evaluate_preferences
from train.losses import PreferenceLoss, check_starts_at_reference
from train.losses.options import beta_from, check_preference_loss
from train.objectives.preference import preference_loss, reference_logps_fn
from train.runs.alignment import Objective, align, check_merge
from train.runs.run import Run, set_up


def run(config: DPOConfig) -> None:
    """Aligns from the start or from the last checkpoint, and exports the model.

    Raises:
        UserError: something given cannot be used; before training starts.
    """
    check_merge(config)
    loss = check_preference_loss(config.loss, config.trainer.gradient_accumulation_steps)
    if config.sync_ref_model and not loss.needs_reference:
        raise UserError(
            f"sync_ref_model is set, but loss.type {' and '.join(loss.types)} has no reference; "
            "unset it, or choose another loss."
        )
    this = set_up("dpo", config, tokenize_preference)
    if this is not None:
        align(config, this, _objective(config, this, loss))


def _objective(config: DPOConfig, this: Run, loss: PreferenceLoss) -> Objective:
    chunk, ld_alpha = config.loss.vocab_chunk, loss.ld_alpha
    score = reference_logps_fn(this.graphdef, vocab_chunk=chunk, ld_alpha=ld_alpha)
    beta_at = beta_from(config.loss, this.steps)
    return Objective(
        loss_fn=preference_loss(this.graphdef, loss, beta_at=beta_at, vocab_chunk=chunk),
        evaluate=partial(
            evaluate_preferences,
            score,
            batch_size=this.eval_batch_size,
            mesh=this.mesh,
            loss=loss,
        ),
        score=score,
        names=("chosen", "rejected") if loss.needs_reference else (),
        depends_on=() if ld_alpha is None else ("ld_alpha", ld_alpha),
        check_first=partial(check_starts_at_reference, loss=loss),
        synced=config.sync_ref_model,
    )

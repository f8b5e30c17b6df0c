"""``python -m train dpo``: alignment on preference pairs, with or without online merging."""

from __future__ import annotations

from functools import partial

from train.config import DPOConfig, UserError
from train.data import tokenize_preference
from train.evaluation.held_out import evaluate_preferences
from train.losses import check_starts_at_reference
from train.losses.options import beta_from, check_preference_loss
from train.objectives.preference import preference_loss, reference_logps_fn
from train.runs.set_up import check_config, set_up
from train.runs.train import Objective, train


def train_dpo(config: DPOConfig) -> None:
    """Aligns from the start or from the last checkpoint, and exports the model.

    Raises `UserError` before training starts where something given cannot be used.
    """
    loss = check_preference_loss(config.loss, config.trainer.gradient_accumulation_steps)
    check_config(config)
    if config.sync_ref_model and not loss.needs_reference:
        raise UserError(
            f"sync_ref_model is set, but loss.type {' and '.join(loss.types)} has no reference; "
            "unset it, or choose another loss."
        )
    run = set_up("dpo", config, tokenize_preference)
    if run is None:
        return
    chunk, beta_at = config.loss.vocab_chunk, beta_from(config.loss, run.steps)
    score = reference_logps_fn(run.graphdef, vocab_chunk=chunk, ld_alpha=loss.ld_alpha)
    batches = {"batch_size": run.eval_batch_size, "mesh": run.mesh}
    objective = Objective(
        loss_fn=preference_loss(run.graphdef, loss, beta_at=beta_at, vocab_chunk=chunk),
        evaluate=partial(evaluate_preferences, score, **batches, loss=loss),
        score=score,
        names=("chosen", "rejected") if loss.needs_reference else (),
        depends_on=() if loss.ld_alpha is None else ("ld_alpha", loss.ld_alpha),
        check_first=partial(check_starts_at_reference, loss=loss),
        synced=config.sync_ref_model,
    )
    train(run, objective)

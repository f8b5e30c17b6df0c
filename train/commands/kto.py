"""``python -m train kto``: alignment on answers that are labelled desirable or not, one by one."""

from __future__ import annotations

from functools import partial
from typing import Any

from rich.console import Console

from train.config import KTOConfig, UnpairedLossOptions, UserError
from train.data import TokenDataset, tokenize_unpaired
from train.data.mismatched import in_random_order, with_kl_completions
from train.evaluation.held_out import evaluate_unpaired
from train.inputs.model import blamed_on
from train.losses import beta_schedule, label_balance_warning
from train.losses import unpaired_loss as loss_of
from train.objectives.preference import check_unpaired_start, unpaired_logps_fn, unpaired_loss
from train.runs.alignment import Objective, align, check_merge
from train.runs.run import Run, set_up


def run(config: KTOConfig) -> None:
    """Aligns from the start or from the last checkpoint, and exports the model.

    Raises:
        UserError: something given cannot be used; before training starts.
    """
    check_merge(config)
    loss = config.loss
    with blamed_on("loss"):
        loss_of(**_settings(loss))
        beta_schedule(loss.beta_schedule, loss.beta, loss.beta_final, steps=1)
    if loss.type == "kto":
        # Its batches are made once, with other completions for the divergence.
        for name, value in (("mix", config.data.mix), ("buckets", config.data.buckets)):
            if value:
                raise UserError(
                    f"data.{name} is set to {value!r}, but loss.type kto has the same batches in every "
                    "epoch and no use for it; unset it."
                )
    this = set_up("kto", config, tokenize_unpaired, partial(arrange, config))
    if this is not None:
        align(config, this, _objective(config, this))


def _settings(loss: UnpairedLossOptions) -> dict[str, Any]:
    return {
        "loss_type": loss.type,
        "beta": loss.beta,
        "desirable_weight": loss.desirable_weight,
        "undesirable_weight": loss.undesirable_weight,
    }


def arrange(
    config: KTOConfig, data: TokenDataset, held_out: TokenDataset | None, console: Console
) -> tuple[TokenDataset, TokenDataset | None]:
    """Orders the rows once, pairs prompts with other completions, and looks at the labels."""
    loss, trainer = config.loss, config.trainer
    warning = label_balance_warning(
        data.arrays["label"], loss.desirable_weight, loss.undesirable_weight
    )
    if warning is not None:
        console.print(f"Warning: {warning}", highlight=False, soft_wrap=True)
    if loss.type != "kto":
        return data, held_out
    data = in_random_order(data, trainer.seed)
    left = len(data) % trainer.batch_size
    if left and len(data) > trainer.batch_size:
        console.print(
            f"{left} of {len(data)} rows do not fill a batch of {trainer.batch_size} and are left "
            "out: for the divergence, a batch has the same rows in every epoch.",
            highlight=False,
            soft_wrap=True,
        )
    with blamed_on("data"):
        data = with_kl_completions(data, trainer.batch_size)
        if held_out is not None:
            # Its divergence is the mean over all rows, so all of them are one batch, however few
            # are scored at a time.
            held_out = with_kl_completions(in_random_order(held_out, 0), len(held_out))
    return data, held_out


def _objective(config: KTOConfig, this: Run) -> Objective:
    loss, settings = config.loss, _settings(config.loss)
    names = ("completion", "kl") if loss.type == "kto" else ("completion",)
    score = unpaired_logps_fn(this.graphdef, names, vocab_chunk=loss.vocab_chunk)
    beta_at = beta_schedule(loss.beta_schedule, loss.beta, loss.beta_final, this.steps)
    return Objective(
        loss_fn=unpaired_loss(
            this.graphdef, beta_at=beta_at, vocab_chunk=loss.vocab_chunk, **settings
        ),
        evaluate=partial(
            evaluate_unpaired, score, batch_size=this.eval_batch_size, mesh=this.mesh, **settings
        ),
        score=score,
        names=names,
        depends_on=(),
        check_first=partial(check_unpaired_start, beta=loss.beta),
        shuffle=loss.type != "kto",
    )

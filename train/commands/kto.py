"""``python -m train kto``: alignment on answers that are labelled desirable or not, one by one."""

from __future__ import annotations

from functools import partial

from rich.console import Console

from train.config import KTOConfig, UserError
from train.data import TokenDataset, tokenize_unpaired
from train.data.mismatched import in_random_order, with_kl_completions
from train.evaluation.held_out import evaluate_unpaired
from train.inputs.model import blamed_on
from train.losses import UnpairedLoss, check_unpaired_start, label_balance_warning
from train.losses.options import beta_from, loss_from
from train.objectives.unpaired import unpaired_logps_fn, unpaired_loss
from train.runs.set_up import check_config, set_up
from train.runs.train import Objective, train


def train_kto(config: KTOConfig) -> None:
    """Aligns from the start or from the last checkpoint, and exports the model.

    Raises `UserError` before training starts where something given cannot be used.
    """
    loss = loss_from(UnpairedLoss, config.loss)
    beta_from(config.loss, steps=1)
    check_config(config)
    if loss.needs_kl:
        # Its batches are made once, with other completions for the divergence.
        for name, value in (("mix", config.data.mix), ("buckets", config.data.buckets)):
            if value:
                raise UserError(
                    f"data.{name} is set to {value!r}, but loss.type kto has the same batches in every "
                    "epoch and no use for it; unset it."
                )
    run = set_up("kto", config, tokenize_unpaired, partial(arrange, config))
    if run is None:
        return
    names = ("completion", "kl") if loss.needs_kl else ("completion",)
    chunk, beta_at = config.loss.vocab_chunk, beta_from(config.loss, run.steps)
    score = unpaired_logps_fn(run.graphdef, names, vocab_chunk=chunk)
    batches = {"batch_size": run.eval_batch_size, "mesh": run.mesh}
    objective = Objective(
        loss_fn=unpaired_loss(run.graphdef, loss, beta_at=beta_at, vocab_chunk=chunk),
        evaluate=partial(evaluate_unpaired, score, **batches, loss=loss),
        score=score,
        names=names,
        check_first=partial(check_unpaired_start, beta=loss.beta),
        shuffle=not loss.needs_kl,
    )
    train(run, objective)


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

"""``python -m train sft``: supervised fine-tuning."""

from __future__ import annotations

from functools import partial

from train.config import SFTConfig
from train.data import tokenize_sft
from train.evaluation.held_out import evaluate_sft
from train.inputs.records import packed
from train.objectives.sft import sft_loss
from train.runs.set_up import check_config, set_up
from train.runs.train import Objective, train


def train_sft(config: SFTConfig) -> None:
    """Trains from the start or from the last checkpoint, and exports the model.

    Raises `UserError` before training starts where something given cannot be used.
    """
    check_config(config)
    run = set_up(
        "sft",
        config,
        tokenize_sft,
        lambda data, held_out, console: (packed(config.data, data, console), held_out),
    )
    if run is None:
        return
    loss_fn = sft_loss(run.graphdef, vocab_chunk=config.loss.vocab_chunk)
    evaluate = partial(evaluate_sft, loss_fn, batch_size=run.eval_batch_size, mesh=run.mesh)
    train(run, Objective(loss_fn, evaluate))

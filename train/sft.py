"""``python -m train sft``: supervised fine-tuning."""

from __future__ import annotations

import jax

from train.config import SFTConfig
from train.data import tokenize_sft
from train.held_out import evaluate_sft
from train.objectives import sft_loss
from train.optimizers import make_optimizer
from train.prepare import hash_model
from train.run import set_up
from train.step import State, init_state


def run(config: SFTConfig) -> None:
    """Trains from the start or from the last checkpoint, and exports the model.

    Raises:
        UserError: something given cannot be used; before training starts.
    """
    this = set_up("sft", config, tokenize_sft)
    if this is None:
        return
    this.begin(model=hash_model(config.model.path))
    tx = make_optimizer(config.optimizer, this.schedule)
    loss_fn = sft_loss(this.graphdef, vocab_chunk=config.loss.vocab_chunk)
    evaluate = None
    if this.held_out is not None:
        evaluate = evaluate_sft(
            loss_fn, this.held_out, batch_size=this.eval_batch_size, mesh=this.mesh
        )

    def start() -> State:
        return init_state(this.load(config.model.path, "model.path"), tx)

    like = jax.eval_shape(lambda params: init_state(params, tx), this.shapes)
    this.train(loss_fn, tx, start, like=like, data=this.data, evaluate=evaluate)

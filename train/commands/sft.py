"""``python -m train sft``: supervised fine-tuning."""

from __future__ import annotations

import jax
from rich.console import Console

from train.config import SFTConfig
from train.data import TokenDataset, tokenize_sft
from train.distributed.mesh import on_mesh
from train.evaluation.held_out import evaluate_sft
from train.inputs.model import hash_start, packed
from train.objectives.sft import sft_loss
from train.optimizers.build import make_optimizer
from train.runs.run import set_up
from train.training.step import init_state
from train.types import Params, State


def run(config: SFTConfig) -> None:
    """Trains from the start or from the last checkpoint, and exports the model.

    Raises:
        UserError: something given cannot be used; before training starts.
    """

    def arrange(
        data: TokenDataset, held_out: TokenDataset | None, console: Console
    ) -> tuple[TokenDataset, TokenDataset | None]:
        return packed(config.data, data, console), held_out

    this = set_up("sft", config, tokenize_sft, arrange)
    if this is None:
        return
    tx = make_optimizer(config.optimizer, this.schedule)
    this.begin(**hash_start(config.model))
    loss_fn = sft_loss(this.graphdef, vocab_chunk=config.loss.vocab_chunk)
    evaluate = None
    if this.held_out is not None:
        evaluate = evaluate_sft(
            loss_fn, this.held_out, batch_size=this.eval_batch_size, mesh=this.mesh
        )

    rest: list[Params] = []  # what is not trained, once it is loaded

    def load() -> Params:
        trained, frozen = this.split(this.load_start())
        rest.append(frozen)
        return trained

    def make_state(params: Params) -> State:
        return init_state(params, tx, averages=this.averages)

    def frozen() -> Params:
        if not this.split(this.shapes)[1]:
            return {}
        if not rest:
            load()
        return rest[0]

    like = jax.eval_shape(make_state, this.trained_shapes)
    with on_mesh(this.mesh):
        this.train(
            loss_fn,
            tx,
            lambda: make_state(load()),
            like=like,
            data=this.data,
            evaluate=evaluate,
            frozen=frozen,
        )

"""Training and answering in the benchmark, on the parts that train real models.

The decoder, the losses, the step and the optimizers are those of `python -m train sft` and
`python -m train dpo`; only the data come ready-made (`examples`) instead of from files.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from train.config import AdamWOptions, ScheduleOptions
from train.generation.sampler import make_greedy
from train.models import Decoder, ModelConfig, layer_axes, split_model
from train.objectives.preference import preference_loss, reference_logps_fn, sft_loss
from train.optimizers.alpha import AlphaScale
from train.optimizers.build import make_optimizer
from train.optimizers.schedules import make_schedule
from train.taxbench.miniature import examples, tasks
from train.taxbench.miniature.examples import Batch, Questions
from train.training.averages import Followers
from train.training.step import LossFn, init_state, make_train_step

Params = dict[str, Any]
Tick = Callable[[int], None]
Visit = Callable[[int, Params, dict[str, float]], None]

MODEL = ModelConfig(
    "llama",
    vocab_size=tasks.VOCAB_SIZE,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=16,
    # Sequences of 20 tokens need no long wavelengths.
    rope_theta=100.0,
    tie_word_embeddings=True,
    initializer_range=0.1,
)
"""85 000 parameters: the smallest decoder that learns all families in about a minute."""

# Steps are dispatched ahead of the device; this often the loop waits, so that progress is real.
_SYNC_EVERY = 10


class Trainer:
    """A compiled training step with its optimizer, to be run on any number of seeds.

    Args:
        loss_fn: `loss_fn(params, batch) -> (loss, metrics)`.
        tx: the optimizer.
        steps: length of a run.
        batch_size: rows of the data in a step.
        ema_decay: of the moving average that is visited in place of the parameters.
        alpha_scale: what the weight of the reference is multiplied by, from a step's metrics.
    """

    def __init__(
        self,
        loss_fn: LossFn,
        tx: optax.GradientTransformation,
        *,
        steps: int,
        batch_size: int,
        ema_decay: float | None = None,
        alpha_scale: AlphaScale | None = None,
    ):
        self._tx = tx
        self._followers = Followers(ema_decay=ema_decay)
        self._visited = "params" if ema_decay is None else "ema"
        self._step = make_train_step(
            loss_fn, tx, followers=self._followers, alpha_scale=alpha_scale
        )
        self.steps, self.batch_size = steps, batch_size

    def run(
        self,
        params: Params,
        data: Batch,
        rng: np.random.Generator,
        *,
        delta: Params | None = None,
        frozen: Params | None = None,
        visit: Visit | None = None,
        visit_every: int = 1,
        check_start: Callable[[dict[str, jax.Array]], None] | None = None,
        tick: Tick = lambda steps: None,
    ) -> Params:
        """Trains from `params`, which stay valid.

        Args:
            params: start.
            data: examples, arrays of equal length.
            rng: order of the examples.
            delta: τ_r, where the optimizer merges.
            frozen: parameters beside `params` that are not trained.
            visit: called with (step, params, metrics of the step) every `visit_every` steps; the
                parameters are only valid during the call.
            visit_every: steps from one visit to the next.
            check_start: given the metrics of the first step; raises when the run makes no sense.
            tick: told how many more steps are done.

        Returns:
            The trained parameters.
        """
        state = init_state(params, self._tx, delta, self._followers)
        done = 0
        batches = examples.batches(data, self.batch_size, rng, self.steps)
        for step, batch in enumerate(batches, start=1):
            state, metrics = self._step(state, batch, frozen)
            if step == 1 and check_start is not None:
                check_start(metrics)
            if step % _SYNC_EVERY == 0 or step == self.steps:
                jax.block_until_ready(metrics)
                tick(step - done)
                done = step
            if visit is not None and step % visit_every == 0:
                visit(step, state[self._visited], {name: float(v) for name, v in metrics.items()})
        return state["params"]


class Lab:
    """What every seed and method shares: the model's structure and its compiled functions."""

    def __init__(self) -> None:
        self.graphdef, _ = split_model(Decoder(MODEL, nnx.Rngs(0)))
        self._greedy = make_greedy(
            self.graphdef,
            max_new_tokens=examples.INSTRUCTION_COMPLETION,
            eos_id=tasks.EOS,
            pad_id=tasks.PAD,
        )
        self._reference_logps = reference_logps_fn(self.graphdef)

    def fresh_params(self, seed: int) -> Params:
        """Random parameters."""
        return split_model(Decoder(MODEL, nnx.Rngs(seed)))[1]

    def supervised(
        self, *, learning_rate: float, warmup_steps: int, steps: int, batch_size: int
    ) -> Trainer:
        """A trainer for the base model or for fine-tuning."""
        # A short memory of squared gradients suits runs of a thousand steps.
        options = AdamWOptions(learning_rate=learning_rate, b2=0.98)
        shape = ScheduleOptions(type="cosine", warmup_steps=warmup_steps, final_scale=0.02)
        rate = make_schedule(shape, learning_rate, steps)
        return Trainer(
            sft_loss(self.graphdef),
            make_optimizer(options, rate, layer_axes=layer_axes, steps=steps),
            steps=steps,
            batch_size=batch_size,
        )

    def aligner(
        self,
        options: AdamWOptions,
        *,
        beta: float,
        warmup_steps: int,
        steps: int,
        batch_size: int,
    ) -> Trainer:
        """A trainer for DPO."""
        return Trainer(
            preference_loss(self.graphdef, beta=beta),
            self.optimizer(options, warmup_steps, steps),
            steps=steps,
            batch_size=batch_size,
        )

    @staticmethod
    def optimizer(
        options: AdamWOptions, warmup_steps: int, steps: int
    ) -> optax.GradientTransformation:
        """An optimizer for alignment: a learning rate that stays after its warm-up."""
        shape = ScheduleOptions(type="constant", warmup_steps=warmup_steps)
        rate = make_schedule(shape, options.learning_rate, steps)
        return make_optimizer(options, rate, layer_axes=layer_axes, steps=steps)

    def with_reference(self, params: Params, pairs: Batch) -> Batch:
        """Preference data with the log-probabilities of the reference model `params`."""
        chosen, rejected = self._reference_logps(params, pairs)
        return pairs | {
            "reference_chosen_logps": np.asarray(chosen),
            "reference_rejected_logps": np.asarray(rejected),
        }

    def answers(self, params: Params, questions: Questions) -> np.ndarray:
        """Greedy answers, int32 [n, T]."""
        out = self._greedy(
            params, jnp.asarray(questions.prompt_tokens), jnp.asarray(questions.prompt_mask)
        )
        return np.asarray(out)

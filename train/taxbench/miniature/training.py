"""Training and answering in the benchmark, on the parts that train real models.

The decoder, the losses, the step and the optimizers are those of `python -m train sft` and
`python -m train dpo`; only the data come ready-made (`examples`) instead of from files.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from train.config import AdamWOptions, ScheduleOptions
from train.generation.sampler import make_greedy
from train.models import Decoder, ModelConfig, layer_axes, split_model
from train.objectives.preference import reference_logps_fn
from train.objectives.sft import sft_loss
from train.optimizers.alpha import AlphaScale
from train.optimizers.build import make_optimizer
from train.optimizers.schedules import make_schedule
from train.taxbench.miniature import examples, tasks
from train.taxbench.miniature.examples import Batch, Questions
from train.taxbench.miniature.scoring import is_right, style_score
from train.taxbench.miniature.trajectories import Point
from train.training.averages import ParameterAverages
from train.training.step import init_state, make_train_step
from train.types import LossFn

Params = dict[str, Any]
Tick = Callable[[int], None]
"""A function that is told how many more steps, or models, are done."""

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

_WARMUP_STEPS = 10
# Steps are dispatched ahead of the device; this often the loop waits, so that progress is real.
_SYNC_EVERY = 10


def silent(units: int) -> None:
    """A `Tick` that shows nothing."""


def alignment_optimizer(options: AdamWOptions, steps: int) -> optax.GradientTransformation:
    """Makes an optimizer for alignment; its learning rate stays constant after the warm-up."""
    warmup = min(_WARMUP_STEPS, steps - 1)
    return _optimizer(options, ScheduleOptions(type="constant", warmup_steps=warmup), steps)


def _optimizer(
    options: AdamWOptions, shape: ScheduleOptions, steps: int
) -> optax.GradientTransformation:
    rate = make_schedule(shape, options.learning_rate, steps)
    return make_optimizer(options, rate, layer_axes=layer_axes, steps=steps)


class Trainer:
    """A compiled training step with its optimizer, to be run on any number of seeds.

    With `ema_decay` the moving average is given out in place of the parameters. `alpha_scale` computes
    from a step's metrics what the weight of the reference is multiplied by. `check_start` is given
    the metrics of the first step and raises when the run makes no sense.
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
        check_start: Callable[[dict[str, jax.Array]], None] = lambda metrics: None,
    ):
        self._tx, self._check_start = tx, check_start
        self._averages = ParameterAverages(ema_decay=ema_decay)
        self._given_out = "params" if ema_decay is None else "ema"
        self._step = make_train_step(loss_fn, tx, averages=self._averages, alpha_scale=alpha_scale)
        self.steps, self.batch_size = steps, batch_size

    def train(
        self,
        params: Params,
        data: Batch,
        rng: np.random.Generator,
        *,
        every: int,
        delta: Params | None = None,
        frozen: Params | None = None,
        tick: Tick = silent,
    ) -> Iterator[tuple[int, Params, dict[str, float]]]:
        """Trains from `params`, which stay valid, on the examples of `data` in a random order.

        `delta` is τ_r, where the optimizer merges; `frozen` are parameters that are not trained.

        Yields:
            Step, parameters and the step's metrics, every `every` steps and after the last one. The
            parameters are valid until the next step is asked for.
        """
        state = init_state(params, self._tx, delta, self._averages)
        batches = examples.batches(data, self.batch_size, rng, self.steps)
        for step, batch in enumerate(batches, start=1):
            state, metrics = self._step(state, batch, frozen)
            if step == 1:
                self._check_start(metrics)
            if step % _SYNC_EVERY == 0 or step == self.steps:
                jax.block_until_ready(metrics)
                tick((step - 1) % _SYNC_EVERY + 1)
            if step % every == 0 or step == self.steps:
                numbers = {name: float(value) for name, value in metrics.items()}
                yield step, state[self._given_out], numbers


class Lab:
    """The model's structure and its compiled functions, which all seeds and methods share."""

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
        """Draws random parameters."""
        return split_model(Decoder(MODEL, nnx.Rngs(seed)))[1]

    def supervised(self, learning_rate: float, steps: int, batch_size: int) -> Trainer:
        """Makes a trainer for the base model or for fine-tuning."""
        # A short memory of squared gradients suits runs of a thousand steps.
        options = AdamWOptions(learning_rate=learning_rate, b2=0.98)
        warmup = min(50, steps - 1)
        shape = ScheduleOptions(type="cosine", warmup_steps=warmup, final_scale=0.02)
        tx = _optimizer(options, shape, steps)
        return Trainer(sft_loss(self.graphdef), tx, steps=steps, batch_size=batch_size)

    def with_reference(self, params: Params, pairs: Batch) -> Batch:
        """Adds the log-probabilities of the reference model `params` to preference data."""
        chosen, rejected = self._reference_logps(params, pairs)
        return pairs | {
            "reference_chosen_logps": np.asarray(chosen),
            "reference_rejected_logps": np.asarray(rejected),
        }

    def answers(self, params: Params, questions: Questions) -> np.ndarray:
        """Answers greedily, int32 [n, T]."""
        prompts = map(jnp.asarray, (questions.prompt_tokens, questions.prompt_mask))
        return np.asarray(self._greedy(params, *prompts))

    def grade(self, params: Params, questions: Questions, at: float, **extra: Any) -> Point:
        """Scores a model's answers as a point of a trajectory; `extra` are fields of `Point`."""
        generated = self.answers(params, questions)
        right = is_right(generated, questions.answers)
        return Point(at, style_score(generated), right, **extra)

"""The models that are aligned: for every seed a base and a fine-tuned model, trained once and kept."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util

from train.files.whole import whole_file
from train.taxbench.miniature import examples
from train.taxbench.miniature.examples import Batch, Questions
from train.taxbench.miniature.training import Lab, Params, Tick, Trainer
from train.taxbench.miniature.trajectories import Point, grade

# The pairs are about two families of eight; the tax shows on all of them.
PREFERENCE_FAMILIES = ("copy", "add")
LABEL_NOISE, WRONG_RATE, STYLE_RATE = 0.15, 0.3, 0.2
# Facts take more repetitions than rules; copying takes fewer.
STATEMENT_WEIGHTS = {"facts": 3.0, "copy": 0.5, "reverse": 0.5}
BASE_LEARNING_RATE, SFT_LEARNING_RATE, SUPERVISED_BATCH = 4e-3, 2e-3, 128


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to align and what to align and score it with.

    Attributes:
        base: parameters before fine-tuning.
        sft: parameters after it; the reference, and where every method starts.
        pairs: preference data with the reference's log-probabilities.
        questions: held-out questions.
        start: the score of `sft`.
        seed: orders the preference data, the same for all methods.
    """

    base: Params
    sft: Params
    pairs: Batch
    questions: Questions
    start: Point
    seed: int


@dataclasses.dataclass(frozen=True)
class Models:
    """Parameters on the host: the base model, the one half-way through fine-tuning, the fine-tuned."""

    base: Params
    earlier: Params
    sft: Params

    def save(self, path: Path) -> None:
        """Writes all three into one .npz file."""
        flat: Any = traverse_util.flatten_dict(dataclasses.asdict(self), sep="/")
        with whole_file(path) as file:
            np.savez(file, allow_pickle=False, **flat)

    @classmethod
    def load(cls, path: Path) -> Models:
        """Reads what `save` wrote."""
        with np.load(path, allow_pickle=False) as file:
            return cls(**traverse_util.unflatten_dict(dict(file), sep="/"))


def train_models(
    lab: Lab, seed: int, base_steps: int, sft_steps: int, ticks: tuple[Tick, Tick]
) -> Models:
    """Trains the base model from scratch and fine-tunes it.

    Args:
        lab: compiled functions.
        seed: of the parameters, the data and their order.
        base_steps: steps of the first stage.
        sft_steps: steps of the second.
        ticks: told about the steps of the two stages.
    """
    n, rng = SUPERVISED_BATCH, np.random.default_rng([seed, 1])

    def stage(rate: float, steps: int) -> Trainer:
        warmup = min(50, steps - 1)
        return lab.supervised(learning_rate=rate, warmup_steps=warmup, steps=steps, batch_size=n)

    data = examples.statements(rng, n * base_steps, STATEMENT_WEIGHTS)
    base = stage(BASE_LEARNING_RATE, base_steps).run(
        lab.fresh_params(seed), data, rng, tick=ticks[0]
    )
    data = examples.instructions(rng, n * sft_steps, STYLE_RATE)
    halves: list[Params] = []
    sft = stage(SFT_LEARNING_RATE, sft_steps).run(
        base,
        data,
        rng,
        tick=ticks[1],
        visit=lambda step, params, metrics: halves.append(on_host(params)),
        visit_every=max(sft_steps // 2, 1),
    )
    return Models(on_host(base), halves[0], on_host(sft))


def on_host(params: Any) -> Params:
    """A copy as numpy arrays, which outlives donated buffers."""
    return jax.tree.map(np.array, params)


def make_subject(lab: Lab, models: Models, seed: int, pairs: int, questions: int) -> Subject:
    """The preference data and questions for a fine-tuned model."""
    data = examples.preferences(
        np.random.default_rng([seed, 2]),
        pairs,
        PREFERENCE_FAMILIES,
        noise=LABEL_NOISE,
        wrong_rate=WRONG_RATE,
    )
    # Of their own for every seed, so that settings are not chosen on the questions of the report.
    asked = examples.questions(np.random.default_rng([seed, 5]), questions)
    start = grade(lab.answers(models.sft, asked), asked, at=0)
    data = lab.with_reference(models.sft, data)
    return Subject(models.base, models.sft, data, asked, start, seed)

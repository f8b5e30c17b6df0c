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
from train.taxbench.miniature.sizes import Sizes
from train.taxbench.miniature.training import Lab, Params, Tick, silent
from train.taxbench.miniature.trajectories import Point

# The pairs are about two families of eight; the tax shows on all of them.
PREFERENCE_FAMILIES = ("copy", "add")
LABEL_NOISE, WRONG_RATE, STYLE_RATE = 0.15, 0.3, 0.2
# Facts take more repetitions than rules; copying takes fewer.
STATEMENT_WEIGHTS = {"facts": 3.0, "copy": 0.5, "reverse": 0.5}
BASE_LEARNING_RATE, SFT_LEARNING_RATE, SUPERVISED_BATCH = 4e-3, 2e-3, 128


@dataclasses.dataclass(frozen=True)
class Subject:
    """A model to align and what to align and score it with."""

    base: Params  # before fine-tuning
    sft: Params  # after it; the reference, and where every method starts
    pairs: Batch  # preference data with the reference's log-probabilities
    questions: Questions
    start: Point  # the score of `sft`
    seed: int  # orders the preference data, the same for all methods


@dataclasses.dataclass(frozen=True)
class Models:
    """Parameters on the host of the base model, the one half-way through fine-tuning, and its end."""

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
    lab: Lab, seed: int, sizes: Sizes, ticks: tuple[Tick, Tick] = (silent, silent)
) -> Models:
    """Trains the base model from scratch and fine-tunes it.

    The seed decides the parameters, the data and their order. `ticks` are told about the steps of
    the two stages.
    """
    n, rng = SUPERVISED_BATCH, np.random.default_rng([seed, 1])
    base_steps, sft_steps = sizes.base_steps, sizes.sft_steps
    data = examples.statements(rng, n * base_steps, STATEMENT_WEIGHTS)
    trainer = lab.supervised(BASE_LEARNING_RATE, base_steps, n)
    start = lab.fresh_params(seed)
    stage = trainer.train(start, data, rng, every=base_steps, tick=ticks[0])
    [base] = [on_host(params) for _, params, _ in stage]
    data = examples.instructions(rng, n * sft_steps, STYLE_RATE)
    trainer = lab.supervised(SFT_LEARNING_RATE, sft_steps, n)
    stage = trainer.train(base, data, rng, every=sft_steps // 2, tick=ticks[1])
    half, *_, sft = [on_host(params) for _, params, _ in stage]
    return Models(base, half, sft)


def on_host(params: Any) -> Params:
    """Copies parameters to numpy arrays, which outlive donated buffers."""
    return jax.tree.map(np.array, params)


def make_subject(lab: Lab, models: Models, seed: int, sizes: Sizes) -> Subject:
    """Makes the preference data and questions for a fine-tuned model."""
    rng = np.random.default_rng([seed, 2])
    data = examples.preferences(
        rng, sizes.pairs, PREFERENCE_FAMILIES, noise=LABEL_NOISE, wrong_rate=WRONG_RATE
    )
    # Every seed has its own questions, so that settings are not chosen on those of the report.
    asked = examples.questions(np.random.default_rng([seed, 5]), sizes.questions)
    start = lab.grade(models.sft, asked, at=0)
    data = lab.with_reference(models.sft, data)
    return Subject(models.base, models.sft, data, asked, start, seed)

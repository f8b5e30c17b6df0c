"""Settings that the demo and the suite share, and the sizes on which results depend."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from train.config import UserError, ranges, require

ALIGN_BATCH = 64
"""Pairs in a step of alignment."""

VERSION = 2
"""Counts changes of tasks, data, models and evaluation; results of two versions are never mixed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Settings that the demo and the suite share.

    Attributes:
        output_dir: Directory for the results.
        base_steps: Steps of training a base model.
        sft_steps: Steps of fine-tuning it on instructions.
        steps: Steps of alignment, the same for every method.
        eval_every: Alignment steps from one evaluation to the next; a divisor of `steps`.
        pairs: Preference pairs, 64 or more.
        questions: Held-out questions in each of the eight families.
        reward: Reward at which capabilities are compared.
    """

    output_dir: str
    base_steps: ranges.TwoOrMore = 1000
    sft_steps: ranges.TwoOrMore = 500
    steps: ranges.TwoOrMore = 160
    eval_every: ranges.PositiveInt = 10
    pairs: ranges.PositiveInt = 4000
    questions: ranges.PositiveInt = 64
    reward: ranges.OpenUnitInterval = 0.8

    def check_together(self, name: str) -> None:
        """Checks that pairs fill a batch and that the last step is evaluated. Raises `UserError`."""
        require(self.pairs >= ALIGN_BATCH, "pairs", self.pairs, f"{ALIGN_BATCH} or larger")
        if self.steps % self.eval_every:
            raise UserError(
                f"eval_every must divide steps, so that the last step is evaluated; got "
                f"{self.eval_every} and {self.steps}."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig(BenchmarkConfig):
    """The alignment tax in miniature, trained from scratch.

    Attributes:
        output_dir: Directory for the results. Every run gets a new run-NNN directory inside it;
            earlier ones stay as they are.
        seed: Seed of the model, the data and their order.
        control_weight: λ of the control that adds λ·τ to AdamW's models after training.
    """

    output_dir: str = "demo-output"
    seed: ranges.NonNegativeInt = 0
    questions: ranges.PositiveInt = 100
    control_weight: ranges.PositiveFloat = 0.1


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers of steps, data and questions, as in `BenchmarkConfig`; `batch_size` counts pairs."""

    base_steps: int = 1000
    sft_steps: int = 500
    steps: int = 160
    eval_every: int = 10
    pairs: int = 4000
    questions: int = 64
    batch_size: int = ALIGN_BATCH
    version: int = VERSION

    @classmethod
    def of(cls, config: BenchmarkConfig) -> Sizes:
        """Takes the sizes that are fields of a command's settings."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in vars(config).items() if name in names})


def models_file(directory: Path, seed: int, sizes: Sizes) -> Path:
    """The file of a seed's base and fine-tuned model; other numbers of steps have another file."""
    return directory / f"models-{seed}-{sizes.base_steps}-{sizes.sft_steps}.npz"

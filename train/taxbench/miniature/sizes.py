"""Sizes of the benchmark, on which results depend besides seed and recipe."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from train.config import UserError, require

ALIGN_BATCH = 64
"""Pairs in a step of alignment."""

VERSION = 2
"""Counts changes of tasks, data, models and evaluation; results of two versions are never mixed."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Numbers of steps, data and questions.

    Attributes:
        base_steps: steps of training the base model.
        sft_steps: steps of fine-tuning it.
        steps: steps of alignment.
        eval_every: steps from one evaluation to the next.
        pairs: preference pairs.
        questions: held-out questions in each family.
        batch_size: pairs in a step of alignment.
        version: `VERSION`.
    """

    base_steps: int = 1000
    sft_steps: int = 500
    steps: int = 160
    eval_every: int = 10
    pairs: int = 4000
    questions: int = 64
    batch_size: int = ALIGN_BATCH
    version: int = VERSION

    @classmethod
    def of(cls, config: Any) -> Sizes:
        """Takes the sizes that are fields of a command's settings."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in vars(config).items() if name in names})


def check_sizes(config: Any) -> None:
    """Checks the fields that the demo and the suite have in common.

    Raises:
        UserError: names the first field that cannot be used.
    """
    for name in ("base_steps", "sft_steps", "steps"):
        require(getattr(config, name) >= 2, name, getattr(config, name), "2 or larger")
    for name in ("eval_every", "questions"):
        require(getattr(config, name) >= 1, name, getattr(config, name), "1 or larger")
    require(config.pairs >= ALIGN_BATCH, "pairs", config.pairs, f"{ALIGN_BATCH} or larger")
    require(0 < config.reward < 1, "reward", config.reward, "between 0 and 1")
    if config.steps % config.eval_every:
        raise UserError(
            f"eval_every must divide steps, so that the last step is evaluated; got "
            f"{config.eval_every} and {config.steps}."
        )


def models_file(directory: Path, seed: int, sizes: Sizes) -> Path:
    """The file of the base and the fine-tuned model of a seed; other numbers of steps have another."""
    return directory / f"models-{seed}-{sizes.base_steps}-{sizes.sft_steps}.npz"

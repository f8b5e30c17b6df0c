"""How large the benchmark is: what results rest on besides seed and recipe."""

import dataclasses
from pathlib import Path


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
    """

    base_steps: int = 1000
    sft_steps: int = 500
    steps: int = 160
    eval_every: int = 10
    pairs: int = 4000
    questions: int = 64
    batch_size: int = 64


def models_file(directory: Path, seed: int, sizes: Sizes) -> Path:
    """Where the base and the fine-tuned model of a seed are kept; models of other lengths elsewhere."""
    return directory / f"models-{seed}-{sizes.base_steps}-{sizes.sft_steps}.npz"

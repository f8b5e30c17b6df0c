"""How large the benchmark is: what results rest on besides seed and recipe."""

import dataclasses


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

"""Length of a run, and what it writes when."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class EarlyStopOptions:
    """When to end before the last step. Held-out metrics have the names they are logged under.

    Attributes:
        metric: Held-out metric that must go on improving, such as eval_rewards/margins or
            eval_loss. Unset: floors alone decide.
        mode: max or min, the direction that is better. Unset: min for names that end in loss,
            perplexity, nll or bits_per_byte, otherwise max.
        patience: Evaluations in a row without an improvement that end the run.
        min_delta: Smallest change that is an improvement.
        floors: Metrics with the worst value that each may have, such as the accuracy of a task under
            `evaluation`: the run ends at the first evaluation that is below (above, for losses),
            and what is exported is the best by `trainer.export_best`, or else the last, of the
            evaluated steps that keep to all floors. In YAML:
            ``floors: {eval_tasks/sums/accuracy: 0.6}``.
        max_drop: The same with floors counted from the model before the first step: how much worse
            each metric may become, in its own unit. 0.02 for an accuracy allows two points less.
    """

    metric: str | None = None
    mode: Literal["min", "max"] | None = None
    patience: int = 3
    min_delta: float = 0.0
    floors: dict[str, float] = field(default_factory=dict)
    max_drop: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class EMAOptions:
    """Exponential moving average of the weights, in float32.

    Attributes:
        decay: Share of the average that is kept at a step.
        export: Export the average; false: it is in the checkpoints alone.
        evaluate: Evaluate the average during training instead of the weights.
    """

    decay: float = 0.999
    export: bool = True
    evaluate: bool = True


@dataclass(frozen=True, kw_only=True)
class TrainerOptions:
    """Length of the run, and what it writes when.

    Attributes:
        steps: Optimizer steps. Give this or `epochs`.
        epochs: Passes over the training records.
        batch_size: Records (pairs, for preferences; rows, with `data.packing`) in a step, over all
            devices.
        gradient_accumulation_steps: Equal parts of `batch_size` that are looked at one after the other
            before an update: the same update with less memory.
        eval_batch_size: Records in one evaluation batch. Unset: `batch_size`.
        eval_every: Evaluate after every so many steps, besides at the end. Unset: only at the end.
        save_every: Write a checkpoint after every so many steps, besides at the end. Unset: only at
            the end.
        keep: Checkpoints to keep. With 2 or more, a damaged one can be done without.
        log_every: Steps from one line of metrics to the next.
        seed: Seed of the order of the records, and of sampled answers.
        max_skipped_steps: A step whose loss or gradient is not finite is skipped and counted; more
            of them in a row end the run. 0: the first one does.
        early_stop: When to end before the last step.
        export_best: Held-out metric by which the checkpoint to export is chosen (the lowest value
            of names that end in loss, perplexity, nll or bits_per_byte, the highest of others).
            That checkpoint is kept. Unset: the last step is exported, unless it is below a floor of
            `early_stop`.
        ema: Moving average of the weights.
    """

    batch_size: int
    steps: int | None = None
    epochs: float | None = None
    gradient_accumulation_steps: int = 1
    eval_batch_size: int | None = None
    eval_every: int | None = None
    save_every: int | None = None
    keep: int = 2
    log_every: int = 1
    seed: int = 0
    max_skipped_steps: int = 10
    early_stop: EarlyStopOptions | None = None
    export_best: str | None = None
    ema: EMAOptions | None = None

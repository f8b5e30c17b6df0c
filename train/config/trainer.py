"""Length of a run, and what it writes when."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from train.config import ranges
from train.config.base import UserError


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
    patience: ranges.PositiveInt = 3
    min_delta: ranges.NonNegativeFloat = 0.0
    floors: dict[str, float] = field(default_factory=dict)
    max_drop: dict[str, ranges.NonNegativeFloat] = field(default_factory=dict)

    @property
    def metrics(self) -> list[str]:
        """The held-out metrics that decide."""
        return [*([] if self.metric is None else [self.metric]), *self.floors, *self.max_drop]

    def check_together(self, name: str) -> None:
        """Checks that a metric decides, and each in one way. Raises `UserError`."""
        if not self.metrics:
            raise UserError(
                f"{name} has neither a metric nor floors nor max_drop; give one, or unset early_stop."
            )
        for metric in self.max_drop:
            if metric in self.floors:
                raise UserError(
                    f"{name} has {metric} both in floors and in max_drop; keep one of them."
                )
        if self.mode is not None and self.metric is None:
            raise UserError(f"{name}.mode is set without a metric; give one, or unset mode.")


@dataclass(frozen=True, kw_only=True)
class EMAOptions:
    """Exponential moving average of the weights, in float32.

    Attributes:
        decay: Share of the average that is kept at a step.
        export: Export the average; false: it is in the checkpoints alone.
        evaluate: Evaluate the average during training instead of the weights.
    """

    decay: ranges.BelowOne = 0.999
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

    batch_size: ranges.PositiveInt
    steps: ranges.PositiveInt | None = None
    epochs: ranges.PositiveFloat | None = None
    gradient_accumulation_steps: ranges.PositiveInt = 1
    eval_batch_size: ranges.PositiveInt | None = None
    eval_every: ranges.PositiveInt | None = None
    save_every: ranges.PositiveInt | None = None
    keep: ranges.PositiveInt = 2
    log_every: ranges.PositiveInt = 1
    seed: ranges.Seed = 0
    max_skipped_steps: ranges.NonNegativeInt = 10
    early_stop: EarlyStopOptions | None = None
    export_best: str | None = None
    ema: EMAOptions | None = None

    def check_together(self, name: str) -> None:
        """Checks that the run has one length, and its evaluations a time. Raises `UserError`."""
        if (self.steps is None) == (self.epochs is None):
            raise UserError(f"Give exactly one of {name}.steps and {name}.epochs.")
        for field_name in ("early_stop", "export_best"):
            if getattr(self, field_name) is not None and self.eval_every is None:
                raise UserError(
                    f"{name}.{field_name} is set, but {name}.eval_every is not, so that nothing is "
                    "evaluated before the end; give it, or unset the former."
                )

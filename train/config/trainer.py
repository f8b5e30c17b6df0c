"""Length of a run, and what it writes when."""

from __future__ import annotations

from dataclasses import dataclass


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
        batch_size: Records (pairs, for preferences) in a step, over all devices.
        gradient_accumulation_steps: Equal parts of `batch_size` that are looked at one after the other
            before an update: the same update with less memory.
        eval_batch_size: Records in one evaluation batch. Unset: `batch_size`.
        eval_every: Evaluate after every so many steps, besides at the end. Unset: only at the end.
        save_every: Write a checkpoint after every so many steps, besides at the end. Unset: only at
            the end.
        keep: Checkpoints to keep.
        log_every: Steps from one line of metrics to the next.
        seed: Seed of the order of the records.
        fsdp: Devices over which parameters and batches are split. Unset: all of them.
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
    fsdp: int | None = None
    ema: EMAOptions | None = None

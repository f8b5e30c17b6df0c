"""The training loop: feeds, logs, evaluates, saves and resumes.

Step k is dispatched before the metrics of step k − 1 are read, so the device never waits for the
host. Only where an evaluation or a checkpoint is due does the host wait for the device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from train.checkpoint import Checkpoints
from train.config import TrainerOptions, UserError
from train.metrics_log import MetricsLog
from train.output_dir import OutputDir
from train.sharding import put_batch
from train.step import Batch, Metrics, State


class Loader(Protocol):
    """Batches without end, with a position that can be stored as JSON."""

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> Any:
        """The position, of types that JSON has."""
        ...

    def set_state(self, state: Any) -> None:
        """Goes back to a position."""
        ...


@dataclass(frozen=True)
class Job:
    """What one kind of training gives to the loop.

    Attributes:
        start: Makes the state of a new run; not called when a checkpoint is resumed.
        like: The state's shapes, dtypes and shardings, to restore into.
        step: From `train.step.make_train_step`.
        loader: Training batches.
        evaluate: Held-out metrics of parameters, or None.
        check_first: Called with the metrics of step 1 of a new run; raises when they cannot be.
        learning_rates: Rate of every update; its length is the number of steps.
        mesh: Where batches go.
        evaluated: What of the state is evaluated: params, or their average ema.
    """

    start: Callable[[], State]
    like: State
    step: Callable[[State, Batch], tuple[State, Metrics]]
    loader: Loader
    evaluate: Callable[[Any], dict[str, float]] | None
    check_first: Callable[[Mapping[str, float]], None] | None
    learning_rates: np.ndarray
    mesh: Mesh | None
    evaluated: str = "params"


def fit(job: Job, options: TrainerOptions, output: OutputDir, console: Console) -> State:
    """Trains from the start or from the last checkpoint to the end.

    Args:
        job: What to train.
        options: What to write when.
        output: Directory of the run, begun.
        console: Where progress is shown.

    Returns:
        The final state, which is also the last checkpoint.

    Raises:
        UserError: the loss is no longer finite, at a step that is logged or that an evaluation or a
            checkpoint follows. Earlier checkpoints stay.
    """
    steps = len(job.learning_rates)
    with Checkpoints(output.checkpoints, every=options.save_every, keep=options.keep) as saved:
        done = saved.latest() or 0
        if done:
            state, position = saved.restore(done, job.like)
            job.loader.set_state(position)
            console.print(f"Resuming after step {done} of {steps}.")
        else:
            state = job.start()
        with MetricsLog(output.path, done) as log, _progress(console) as progress:
            reporter = _Reporter(job, options, log, progress, done)
            for step in range(done + 1, steps + 1):
                batch = next(job.loader)
                state, metrics = job.step(state, put_batch(batch, job.mesh))
                reporter.dispatched(step, metrics, batch)
                last = step == steps
                due = options.eval_every is not None and step % options.eval_every == 0
                if job.evaluate is not None and (due or last):
                    reporter.flush()
                    reporter.evaluated(step, job.evaluate(state[job.evaluated]))
                if saved.due(step) or last:
                    # The log is complete up to a checkpoint before that checkpoint exists.
                    reporter.flush()
                    saved.save(step, state, job.loader.get_state())
                    reporter.skip_time()
            saved.wait()
    return state


class _Reporter:
    """Reads the metrics of a step once the next one is on its way, and writes them."""

    def __init__(
        self, job: Job, options: TrainerOptions, log: MetricsLog, progress: Progress, done: int
    ) -> None:
        self.job, self.options, self.log, self.progress = job, options, log, progress
        self.first = done == 0
        self.pending: tuple[int, Metrics] | None = None
        self.tokens = 0
        self.since = time.perf_counter()
        self.task: TaskID = progress.add_task(
            "training", total=len(job.learning_rates), completed=done, figures=""
        )

    def dispatched(self, step: int, metrics: Metrics, batch: Mapping[str, np.ndarray]) -> None:
        previous, self.pending = self.pending, (step, metrics)
        self._report(previous)
        self.tokens += count_tokens(batch)
        if self.first:
            self.first = False
            if self.job.check_first is not None:
                row = _read(metrics)
                _check_finite(step, row)
                self.job.check_first(row)

    def flush(self) -> None:
        """Waits for the last step dispatched and reports it."""
        previous, self.pending = self.pending, None
        self._report(previous, waited_for=True)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        self.log.write(step, metrics)
        self.progress.console.print(f"step {step}  {_figures(metrics)}")
        self.skip_time()

    def skip_time(self) -> None:
        """Leaves what happened since the last report out of the throughput."""
        self.tokens, self.since = 0, time.perf_counter()

    def _report(self, pending: tuple[int, Metrics] | None, *, waited_for: bool = False) -> None:
        if pending is None:
            return
        step, metrics = pending
        if step % self.options.log_every and step not in (1, len(self.job.learning_rates)):
            if waited_for:  # what follows is not to save or to evaluate lost weights
                _check_finite(step, _read(metrics))
            self.progress.update(self.task, completed=step)
            return
        row = _read(metrics)
        rate = self.tokens / (time.perf_counter() - self.since)
        learning_rate = float(self.job.learning_rates[step - 1])
        self.log.write(step, {**row, "learning_rate": learning_rate, "tokens_per_second": rate})
        _check_finite(step, row)
        self.skip_time()
        figures = f"{_figures(row)}  {rate:,.0f} tok/s"
        self.progress.update(self.task, completed=step, figures=figures)


def count_tokens(batch: Mapping[str, np.ndarray]) -> int:
    """Real tokens that a batch sends through the model; a prompt counts once for each answer."""
    answers = [name for name in batch if name.endswith("_mask") and name != "prompt_mask"]
    prompts = len(answers) * int(batch["prompt_mask"].sum())
    return prompts + sum(int(batch[name].sum()) for name in answers)


def _read(metrics: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}


def _check_finite(step: int, row: Mapping[str, float]) -> None:
    loss = row["loss"]
    if not math.isfinite(loss):
        raise UserError(
            f"loss is {loss} at step {step}, so training stopped and nothing is exported. Lower "
            "optimizer.learning_rate, in a new output_dir; metrics.jsonl shows how it came about "
            "(grad_norm), and the checkpoints before it stay."
        )


_SHOWN = {
    "loss": "loss",
    "eval_loss": "eval loss",
    "rewards/margins": "margin",
    "eval_rewards/margins": "eval margin",
    "eval_rewards/accuracies": "eval accuracy",
    "mean_token_accuracy": "token accuracy",
    "eval_mean_token_accuracy": "eval token accuracy",
}


def _figures(row: Mapping[str, float]) -> str:
    return "  ".join(f"{shown} {row[name]:.4g}" for name, shown in _SHOWN.items() if name in row)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=console,
    )

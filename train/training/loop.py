"""The training loop: feeds, logs, evaluates, saves and resumes.

Step k is dispatched before the metrics of step k − 1 are read, so the device never waits for the
host. Only where an evaluation or a checkpoint is due does the host wait for the device. A signal to
stop counts at the end of a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
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

from train.config import TrainerOptions, UserError
from train.data import is_packed, padding_share
from train.distributed.batches import put_batch
from train.distributed.processes import from_first, is_first
from train.distributed.stop import Stopped, StopSignals
from train.files.metrics_log import MetricsLog, read_metrics
from train.files.run_directory import OutputDir
from train.training.checkpoint import Checkpoints
from train.training.eval_monitor import EvalMonitor
from train.types import Batch, Metrics, State


class Loader(Protocol):
    """Batches without end, with a position that can be stored as JSON."""

    def __next__(self) -> dict[str, np.ndarray]: ...

    def get_state(self) -> Any:
        """The position, of types that JSON has."""
        ...

    def set_state(self, state: Any) -> None:
        """Goes back to a position."""
        ...


Prepared = tuple[dict[str, np.ndarray], dict[str, float]]
"""The batch of a step, and metrics of it."""


@dataclass(frozen=True)
class Job:
    """What one kind of training gives to the loop.

    Attributes:
        start: Makes the state of a new run; not called when a checkpoint is resumed.
        like: The state's shapes, dtypes and shardings, to restore into.
        step: From `train.training.step.make_train_step`.
        loader: Training batches.
        evaluate: Held-out metrics of parameters, or None.
        check_first: Called with the metrics of step 1 of a new run; raises when they cannot be.
        learning_rates: Rate of every update; its length is the number of steps.
        mesh: Where batches go.
        prepare: Makes the batch of a step of the loader's, given the state before it and the number
            of steps done, and what is logged of it: what on-policy training samples. It waits for
            the device.
        steps_per_batch: Steps on a batch before the next one is taken. A run can be saved only
            between batches: what is saved and evaluated when has to be a multiple, and a signal
            counts at the next one.
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
    prepare: Callable[[State, Batch, int], Prepared] | None = None
    steps_per_batch: int = 1
    evaluated: str = "params"


def fit(job: Job, options: TrainerOptions, output: OutputDir, console: Console) -> State:
    """Trains from the start or from the last intact checkpoint to the end.

    Args:
        job: What to train.
        options: What to write when.
        output: Directory of the run, begun.
        console: Where progress is shown.

    Returns:
        The final state, which is also the last checkpoint.

    Raises:
        Stopped: SIGTERM or SIGINT came; everything is saved.
        UserError: too many steps in a row were not finite, or the disk has no room. Earlier
            checkpoints stay.
    """

    def warn(message: str) -> None:
        console.print(f"Warning: {message}", style="yellow", highlight=False, soft_wrap=True)

    saving: dict[str, Any] = {"every": options.save_every, "keep": options.keep, "warn": warn}
    with Checkpoints(output.checkpoints, **saving) as saved, StopSignals() as signals:
        done = saved.newest_intact() or 0
        if done:
            state, position = saved.restore(done, job.like)
            job.loader.set_state(position)
            console.print(f"Resuming after step {done} of {len(job.learning_rates)}.")
        else:
            state = job.start()
        with MetricsLog(output.path, done) as log, _progress(console) as progress:
            reporter = _Reporter(job, options, log, progress, done, warn)
            watch = EvalMonitor(options, _rows_until(done, output.path / "metrics.jsonl"))
            training = _Training(job, options, saved, signals, reporter, watch)
            state, done, stopped = training.run(state, done)
        saved.wait()
        if saved.latest() != done:
            raise UserError(
                f"step {done} is not saved, so nothing is exported. Make room in {output.path}; the "
                f"same command goes on from step {saved.latest() or 0}."
            )
        if stopped or signals.agreed():
            raise Stopped(
                f"Stopped and saved after step {done} of {len(job.learning_rates)}; the same command "
                "goes on from there."
            )
    if watch.reason is not None and done < len(job.learning_rates):
        console.print(f"Stopped early: {watch.reason}.", highlight=False, soft_wrap=True)
    return state


def _rows_until(step: int, path: Path) -> list[dict[str, float]]:
    """What a run that goes on after `step` has logged.

    The first process reads it, which has just mended the file: a kill may have cut off its last
    line, and the others may see that for a while. All must call this.
    """
    rows = read_metrics(path) if step and is_first() and path.exists() else []
    return from_first([row for row in rows if row["step"] <= step])


@dataclass
class _Training:
    """The steps, and what happens between them."""

    job: Job
    options: TrainerOptions
    saved: Checkpoints
    signals: StopSignals
    reporter: _Reporter
    watch: EvalMonitor

    def run(self, state: State, done: int) -> tuple[State, int, bool]:
        """Trains on after `done` steps.

        Returns:
            The final state, saved or being saved; its step; whether a signal ended it.
        """
        job, steps, batch = self.job, len(self.job.learning_rates), None
        # A run that was stopped may owe the evaluation of its last step.
        if self._evaluation_is_due(done) or (self.watch.wants_start and done == 0):
            self._evaluate(done, state)
        for step in range(done + 1, steps + 1):
            if self.watch.reason is not None:  # and was so before it was resumed
                break
            if batch is None or done % job.steps_per_batch == 0:
                batch = self._next_batch(state, done)
            placed, counts, known = batch
            state, metrics = job.step(state, placed)
            done = step
            self.reporter.dispatched(step, {**metrics, **known}, counts)
            stopped = self.signals.agreed() and step % job.steps_per_batch == 0
            best = not stopped and self._evaluation_is_due(step) and self._evaluate(step, state)
            last = step == steps or stopped or self.watch.reason is not None
            if self.saved.due(step) or best or last:
                self._save(step, state)
            if stopped:
                return state, step, True
        return state, done, False

    def _next_batch(
        self, state: State, done: int
    ) -> tuple[Batch, Mapping[str, Any], Mapping[str, float]]:
        """A batch on the devices, what there is in it, and what is logged of it."""
        batch, known = next(self.job.loader), {}
        if self.job.prepare is not None:
            # It waits for the last step anyway, whose time is then its own.
            self.reporter.flush()
            batch, known = self.job.prepare(state, batch, done)
        placed = put_batch(batch, self.job.mesh)
        # A process knows its own rows; counting all of them is left to the devices.
        counts = _counts(batch) if jax.process_count() == 1 else _counts_jit(placed)
        return placed, counts, known

    def _evaluation_is_due(self, step: int) -> bool:
        every = self.options.eval_every if step else None
        due = step == len(self.job.learning_rates) or (every is not None and step % every == 0)
        return due and self.job.evaluate is not None and step not in self.watch.evaluated

    def _evaluate(self, step: int, state: State) -> bool:
        """Returns whether the step is the best so far."""
        assert self.job.evaluate is not None
        self.reporter.flush()
        found = self.job.evaluate(state[self.job.evaluated])
        # Every process is to decide the same, and a reward may tell each of them something else.
        metrics = from_first({name: float(value) for name, value in found.items()})
        self.reporter.evaluated(step, metrics)
        return self.watch.record(step, metrics)

    def _save(self, step: int, state: State) -> None:
        # The log is complete up to a checkpoint before that checkpoint exists.
        self.reporter.flush()
        best = self.watch.best_step
        also_keep = () if best is None else (best,)
        self.saved.save(step, state, self.job.loader.get_state(), also_keep=also_keep)
        self.reporter.skip_time()


_Pending = tuple[int, Mapping[str, Any]] | None


class _Reporter:
    """Reads the metrics of a step once the next one is on its way, and writes them."""

    def __init__(
        self,
        job: Job,
        options: TrainerOptions,
        log: MetricsLog,
        progress: Progress,
        done: int,
        warn: Callable[[str], None],
    ) -> None:
        self.job, self.options, self.log, self.progress = job, options, log, progress
        self.first, self.warn = done == 0, warn
        self.pending: _Pending = None
        self.skipped: float | None = None
        self.tokens: list[Any] = []
        self.since = time.perf_counter()
        self.task: TaskID = progress.add_task(
            "training", total=len(job.learning_rates), completed=done, rate="", figures=""
        )

    def dispatched(self, step: int, metrics: Mapping[str, Any], counts: Mapping[str, Any]) -> None:
        shown = {**metrics, "padding_share": counts["padding_share"]}
        previous, self.pending = self.pending, (step, shown)
        self._report(previous)
        self.tokens.append(counts["tokens"])
        if self.first and self.job.check_first is not None:
            row = _read(metrics)
            # A step that was skipped says nothing, and leaves the next one to be the first.
            self.first = row.get(_IN_A_ROW, 0) > 0
            if not self.first:
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
        self.tokens, self.since = [], time.perf_counter()

    def _report(self, pending: _Pending, *, waited_for: bool = False) -> None:
        if pending is None:
            return
        step, metrics = pending
        self.progress.update(self.task, completed=step)
        if step % self.options.log_every and step not in (1, len(self.job.learning_rates)):
            # What follows is not to save or to evaluate in vain; otherwise seldom enough.
            if waited_for or step % max(1, self.options.max_skipped_steps) == 0:
                self._check_skips(step, _read(metrics))
            return
        row = _read(metrics)
        rate = sum(map(float, self.tokens)) / (time.perf_counter() - self.since)
        shown = {name: value for name, value in row.items() if name != _IN_A_ROW}
        learning_rate = float(self.job.learning_rates[step - 1])
        self.log.write(step, {**shown, "learning_rate": learning_rate, "tokens_per_second": rate})
        self._check_skips(step, row)
        self.skip_time()
        self.progress.update(self.task, rate=f"{rate:,.0f} tok/s", figures=_figures(row))

    def _check_skips(self, step: int, row: Mapping[str, float]) -> None:
        total, in_a_row = row.get("skipped_steps", 0), row.get(_IN_A_ROW, 0)
        found = f"loss {row['loss']:.4g}, grad_norm {row.get('grad_norm', math.nan):.4g}"
        if in_a_row > self.options.max_skipped_steps:
            raise UserError(
                f"the last {in_a_row:.0f} steps up to step {step} were not finite ({found}), so "
                "training stopped and nothing is exported; trainer.max_skipped_steps is "
                f"{self.options.max_skipped_steps}. They changed no weight, and the checkpoints "
                "stay. Lower optimizer.learning_rate or look at the records, in a new output_dir; "
                "metrics.jsonl shows how it came about."
            )
        if in_a_row or (self.skipped is not None and total > self.skipped):
            self.warn(f"{total:.0f} steps skipped up to step {step}: not finite ({found}).")
        self.skipped = total


def count_tokens(batch: Mapping[str, Any]) -> Any:
    """Real tokens that a batch sends through the model; a prompt counts once for each answer.

    Traceable.
    """
    if is_packed(batch):
        return (batch["packed_parts"] >= 0).sum()
    answers = [name for name in batch if name.endswith("_mask") and name != "prompt_mask"]
    prompts = len(answers) * batch["prompt_mask"].sum()
    return prompts + sum(batch[name].sum() for name in answers)


def _counts(batch: Mapping[str, Any]) -> dict[str, Any]:
    return {"padding_share": padding_share(batch), "tokens": count_tokens(batch)}


_counts_jit = jax.jit(_counts)


def _read(metrics: Mapping[str, Any]) -> dict[str, float]:
    row = {name: float(value) for name, value in jax.device_get(dict(metrics)).items()}
    # Means over a label that the batch lacks (KTO); TRL too leaves them out.
    absent = ("rewards/", "logps/")
    return {k: v for k, v in row.items() if not (math.isnan(v) and k.startswith(absent))}


_IN_A_ROW = "skipped_in_a_row"
_SHOWN = {
    "loss": "loss",
    "eval_loss": "eval loss",
    "objective/scores": "score",
    "eval_objective/scores": "eval score",
    "reward": "reward",
    "eval_reward": "eval reward",
    "rewards/margins": "margin",
    "eval_rewards/margins": "eval margin",
    "eval_rewards/accuracies": "eval accuracy",
    "mean_token_accuracy": "token accuracy",
    "eval_mean_token_accuracy": "eval token accuracy",
    "merge/reference_ratio": "merge share",
}

_SHOWN_OF_TASKS = ("/accuracy", "/perplexity", "/exact_match")


def _figures(row: Mapping[str, float]) -> str:
    tasks = {
        name: name.removeprefix("eval_").rpartition("/")[0]
        for name in row
        if name.startswith("eval_") and name.endswith(_SHOWN_OF_TASKS)
    }
    shown = {**_SHOWN, **tasks}
    return "  ".join(f"{label} {row[name]:.4g}" for name, label in shown.items() if name in row)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[figures]}"),
        console=console,
    )

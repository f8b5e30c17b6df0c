"""The training loop: feeds, logs, evaluates, saves and resumes.

A batch is drawn by the loader, completed where the policy answers its prompts, put on the mesh,
stepped and logged. Step k is dispatched before the metrics of step k − 1 are read, so the device
never waits for the host. Only where an evaluation or a checkpoint is due does the host wait for the
device. A signal to stop counts at the end of a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from train.config import TrainerOptions, UserError
from train.distributed.mesh import put_batch
from train.distributed.processes import first_tells, is_first
from train.distributed.stop import Stopped, StopSignals
from train.files.metrics_log import MetricsLog, read_metrics
from train.files.run_directory import OutputDir
from train.training.checkpoint import Checkpoints
from train.training.step_log import CheckFirst, StepLog, count_batch, progress_bar
from train.training.watch import Watch
from train.types import Batch, Metrics, Prepared, State


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
    """What the loop calls.

    Attributes:
        start: Makes the state of a new run; not called when a checkpoint is resumed.
        like: The state's shapes, dtypes and shardings, to restore into.
        step: From `train.training.step.make_train_step`.
        loader: Training batches.
        evaluate: Held-out metrics of a state, or None.
        check_first: Called with the metrics of step 1 of a new run; raises when they cannot be.
        learning_rates: Rate of every update; its length is the number of steps.
        mesh: Where batches go.
        prepare: Makes the batch of a step of the loader's, given the state before it and the number
            of steps done, and what is logged of it: what on-policy training samples. It waits for
            the device.
        steps_per_batch: Steps on a batch before the next one is taken. A run can be saved only
            between batches: what is saved and evaluated when has to be a multiple, and a signal
            counts at the next one.
    """

    start: Callable[[], State]
    like: State
    step: Callable[[State, Batch], tuple[State, Metrics]]
    loader: Loader
    evaluate: Callable[[State], dict[str, float]] | None
    check_first: CheckFirst | None
    learning_rates: np.ndarray
    mesh: Mesh | None
    prepare: Callable[[State, Batch, int], Prepared] | None = None
    steps_per_batch: int = 1


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

    steps, rates = len(job.learning_rates), job.learning_rates
    saving: dict[str, Any] = {"every": options.save_every, "keep": options.keep, "warn": warn}
    with Checkpoints(output.checkpoints, **saving) as saved, StopSignals() as signals:
        done = saved.newest_intact() or 0
        if done:
            state, position = saved.restore(done, job.like)
            job.loader.set_state(position)
            console.print(f"Resuming after step {done} of {steps}.")
        else:
            state = job.start()
        with MetricsLog(output.path, done) as file, progress_bar(console) as progress:
            check = None if done else job.check_first
            log = StepLog(options, rates, done, file, progress, check_first=check, warn=warn)
            watch = Watch(options, _rows_until(done, output.path / "metrics.jsonl"))
            evaluations = _Evaluations(job, options.eval_every, watch, log)
            state, done, stopped = _train(job, saved, signals, log, evaluations, state, done)
        saved.wait()
        if saved.latest() != done:
            raise UserError(
                f"step {done} is not saved, so nothing is exported. Make room in {output.path}; the "
                f"same command goes on from step {saved.latest() or 0}."
            )
        if stopped or signals.agreed():
            raise Stopped(
                f"Stopped and saved after step {done} of {steps}; the same command goes on from there."
            )
    if watch.reason is not None and done < steps:
        console.print(f"Stopped early: {watch.reason}.", highlight=False, soft_wrap=True)
    return state


def _train(
    job: Job,
    saved: Checkpoints,
    signals: StopSignals,
    log: StepLog,
    evaluations: _Evaluations,
    state: State,
    done: int,
) -> tuple[State, int, bool]:
    """Takes the steps after `done`, and evaluates and saves between them.

    Returns:
        The final state, saved or being saved; its step; whether a signal ended it.
    """
    steps, watch, stopped = len(job.learning_rates), evaluations.watch, False
    placed, counts, known = {}, {}, {}
    # A run that was stopped may owe the evaluation of its last step.
    if evaluations.due(done) or (watch.wants_start and done == 0):
        evaluations.evaluate(done, state)
    while done < steps and watch.reason is None and not stopped:
        if not placed or done % job.steps_per_batch == 0:
            batch, known = next(job.loader), {}
            if job.prepare is not None:
                log.flush()  # sampling waits for the last step anyway, whose time is then its own
                batch, known = job.prepare(state, batch, done)
            placed = put_batch(batch, job.mesh)
            counts = count_batch(batch, placed)
        state, metrics = job.step(state, placed)
        done += 1
        log.dispatched(done, {**metrics, **known}, counts)
        stopped = signals.agreed() and done % job.steps_per_batch == 0
        best = not stopped and evaluations.due(done) and evaluations.evaluate(done, state)
        last = done == steps or stopped or watch.reason is not None
        if saved.due(done) or best or last:
            log.flush()  # the log is complete up to a checkpoint before that checkpoint exists
            also_keep = () if watch.best_step is None else (watch.best_step,)
            saved.save(done, state, job.loader.get_state(), also_keep=also_keep)
            log.skip_time()
    return state, done, stopped


@dataclass(frozen=True)
class _Evaluations:
    """Held-out metrics: when they are due, and what they decide.

    Attributes:
        job: The job.
        every: Steps from one evaluation to the next; None for one at the end alone.
        watch: Follows the metrics.
        log: Where they are written.
    """

    job: Job
    every: int | None
    watch: Watch
    log: StepLog

    def due(self, step: int) -> bool:
        """Whether an evaluation after `step` is due and not made yet."""
        at_interval = step > 0 and self.every is not None and step % self.every == 0
        due = at_interval or step == len(self.job.learning_rates)
        return due and self.job.evaluate is not None and step not in self.watch.evaluated

    def evaluate(self, step: int, state: State) -> bool:
        """Returns whether the step is the best so far."""
        assert self.job.evaluate is not None
        self.log.flush()
        found = self.job.evaluate(state)
        # Every process is to decide the same, and a reward may tell each of them something else.
        metrics = first_tells({name: float(value) for name, value in found.items()})
        self.log.evaluated(step, metrics)
        return self.watch.see(step, metrics)


def _rows_until(step: int, path: Path) -> list[dict[str, float]]:
    """What a run that goes on after `step` has logged.

    The first process reads it, which has just mended the file: a kill may have cut off its last
    line, and the others may see that for a while. All must call this.
    """
    rows = read_metrics(path) if step and is_first() and path.exists() else []
    return first_tells([row for row in rows if row["step"] <= step])

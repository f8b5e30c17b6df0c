"""The training loop: feeds, logs, evaluates, saves and resumes.

The loader draws a batch. Where the policy answers its prompts, `prepare` samples the answers. The
batch is put on the mesh, stepped and logged. Step k is dispatched before the metrics of step k − 1
are read, so the device never waits for the host. The host waits for the device where an evaluation
or a checkpoint is due, before `prepare`, and at step 1 where `check_first` reads its metrics. A
signal to stop counts at the end of a batch's steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from train.config import TrainerOptions, UserError
from train.distributed.batches import put_batch
from train.distributed.processes import from_first, is_first
from train.distributed.stop import Stopped, StopSignals
from train.files.metrics_log import MetricsLog, read_metrics
from train.files.run_directory import OutputDir
from train.training.checkpoint import Checkpoints
from train.training.eval_monitor import EvalMonitor
from train.training.step_log import CheckFirst, StepLog, count_batch, progress_bar
from train.types import Batch, Metrics, Prepared, State


@dataclass(frozen=True)
class Job:
    """The functions and settings that the loop is given.

    `loader` gives training batches without end. Its `get_state` gives a position that JSON can hold,
    and `set_state` goes back there. `check_first` is called with the metrics of step 1 of a new run and
    raises when they are impossible. `prepare` completes a batch with what on-policy training samples,
    given the state and the number of steps done; it waits for the device. Each batch is used for
    `steps_per_batch` steps, and a run is saved and evaluated only between batches.
    """

    start: Callable[[], State]  # makes the state of a new run; not called when one is resumed
    like: State  # shapes, dtypes and shardings, to restore into
    step: Callable[[State, Batch], tuple[State, Metrics]]
    loader: Any
    evaluate: Callable[[State], dict[str, float]] | None  # held-out metrics
    check_first: CheckFirst | None
    learning_rates: np.ndarray  # of every update, so its length is the number of steps
    mesh: Mesh | None
    prepare: Callable[[State, Batch, int], Prepared] | None = None
    steps_per_batch: int = 1


def fit(
    job: Job, options: TrainerOptions, output: OutputDir, console: Console
) -> tuple[State, int]:
    """Trains from the start or from the last intact checkpoint to the end.

    Returns the final state, which is also the last checkpoint, and the step whose weights are to be
    exported. Raises `Stopped` where SIGTERM or SIGINT came and everything is saved; `UserError` where
    too many steps in a row were not finite, the disk has no room, or no evaluated step meets the
    required minimum scores. Earlier checkpoints stay.
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
            watch = EvalMonitor(options, _rows_until(done, output.path / "metrics.jsonl"))
            every = options.eval_every
            state, done, stopped = _train(job, state, done, every, saved, signals, log, watch)
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
    return state, watch.step_to_export(done)


def _train(
    job: Job,
    state: State,
    done: int,
    eval_every: int | None,
    saved: Checkpoints,
    signals: StopSignals,
    log: StepLog,
    watch: EvalMonitor,
) -> tuple[State, int, bool]:
    """Takes the steps after `done`; returns the last state, its step, and whether a signal came."""
    steps, placed, counts, known, stopped = len(job.learning_rates), {}, {}, {}, False

    def evaluation_is_due() -> bool:
        due = done == steps or (done > 0 and eval_every is not None and done % eval_every == 0)
        return due and job.evaluate is not None and done not in watch.evaluated

    def evaluate_and_record() -> bool:
        """Evaluates the state, logs the scores, and returns whether they are the best so far."""
        assert job.evaluate is not None
        log.flush()
        found = {name: float(value) for name, value in job.evaluate(state).items()}
        # A reward may give each process other values, and all must decide alike: the first one's count.
        metrics = from_first(found)
        log.evaluated(done, metrics)
        return watch.record(done, metrics)

    # A run that was stopped may have ended before the evaluation of its last step.
    if evaluation_is_due() or (watch.wants_start and done == 0):
        evaluate_and_record()
    while done < steps and watch.reason is None and not stopped:
        if not placed or done % job.steps_per_batch == 0:
            batch, known = next(job.loader), {}
            if job.prepare is not None:
                log.flush()  # or the time of sampling would count as that of the last step
                batch, known = job.prepare(state, batch, done)
            placed = put_batch(batch, job.mesh)
            counts = count_batch(batch, placed)
        state, metrics = job.step(state, placed)
        done += 1
        log.dispatched(done, {**metrics, **known}, counts)
        stopped = signals.agreed() and done % job.steps_per_batch == 0
        best = not stopped and evaluation_is_due() and evaluate_and_record()
        last = done == steps or stopped or watch.reason is not None
        if saved.due(done) or best or last:
            log.flush()  # the log is complete up to a checkpoint before that checkpoint exists
            also_keep = () if watch.best_step is None else (watch.best_step,)
            saved.save(done, state, job.loader.get_state(), also_keep=also_keep)
            log.skip_time()
    return state, done, stopped


def _rows_until(step: int, path: Path) -> list[dict[str, float]]:
    """The metrics that a run has logged up to `step`; all processes must call this.

    Only the first process reads the file. A kill may have cut off its last line. The first process has
    just repaired that; the others may still see the damaged line for a while.
    """
    rows = read_metrics(path) if step and is_first() and path.exists() else []
    return from_first([row for row in rows if row["step"] <= step])

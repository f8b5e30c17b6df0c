"""Shows and writes the metrics of every step, which are read once the next step is on its way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from train.config import TrainerOptions, UserError
from train.data import is_packed, padding_share
from train.files.metrics_log import MetricsLog

CheckFirst = Callable[[Mapping[str, float]], None]

_IN_A_ROW = "skipped_in_a_row"
HEADLINES = {
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
"""Metrics that a reader looks for first, and how they are called in a line of the terminal."""
_OF_TASKS = ("/accuracy", "/perplexity", "/exact_match")


class StepLog:
    """Writes the metrics of step k once step k + 1 is dispatched, so that the device never waits.

    `check_first` is called with the metrics of the first step that is not skipped.
    """

    def __init__(
        self,
        options: TrainerOptions,
        learning_rates: np.ndarray,
        done: int,
        file: MetricsLog,
        progress: Progress,
        *,
        check_first: CheckFirst | None,
        warn: Callable[[str], None],
    ) -> None:
        self._options, self._learning_rates = options, learning_rates
        self._file, self._progress, self._warn = file, progress, warn
        self._check_first = check_first
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        self._skipped: float | None = None
        self._task = progress.add_task(
            "training", total=len(learning_rates), completed=done, rate="", figures=""
        )
        self.skip_time()

    def dispatched(self, step: int, metrics: Mapping[str, Any], counts: Mapping[str, Any]) -> None:
        """Takes the metrics of a step, still on the device, and reports the step before it."""
        previous = self._pending
        self._pending = step, {**metrics, "padding_share": counts["padding_share"]}
        self._report(previous)
        self._tokens.append(counts["tokens"])
        if self._check_first is not None:
            row = _read(metrics)
            # A step that was skipped says nothing, and leaves the next one to be the first.
            if not row.get(_IN_A_ROW, 0):
                self._check_first(row)
                self._check_first = None

    def flush(self) -> None:
        """Waits for the last step dispatched and reports it."""
        previous, self._pending = self._pending, None
        self._report(previous, waited_for=True)

    def evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes and shows held-out metrics."""
        self._file.write(step, metrics)
        self._progress.console.print(f"step {step}  {_figures(metrics)}")
        self.skip_time()

    def skip_time(self) -> None:
        """Leaves what happened since the last report out of the throughput."""
        self._tokens: list[Any] = []
        self._since = time.perf_counter()

    def _report(
        self, pending: tuple[int, Mapping[str, Any]] | None, *, waited_for: bool = False
    ) -> None:
        if pending is None:
            return
        step, metrics = pending
        self._progress.update(self._task, completed=step)
        if step % self._options.log_every and step not in (1, len(self._learning_rates)):
            # No evaluation or save after too many skips; otherwise rarely, because reading waits.
            if waited_for or step % max(1, self._options.max_skipped_steps) == 0:
                self._check_skips(step, _read(metrics))
            return
        row = _read(metrics)
        rate = sum(map(float, self._tokens)) / (time.perf_counter() - self._since)
        shown = {name: value for name, value in row.items() if name != _IN_A_ROW}
        learning_rate = float(self._learning_rates[step - 1])
        self._file.write(step, {**shown, "learning_rate": learning_rate, "tokens_per_second": rate})
        self._check_skips(step, row)
        self.skip_time()
        self._progress.update(self._task, rate=f"{rate:,.0f} tok/s", figures=_figures(row))

    def _check_skips(self, step: int, row: Mapping[str, float]) -> None:
        total, in_a_row = row.get("skipped_steps", 0), row.get(_IN_A_ROW, 0)
        found = f"loss {row['loss']:.4g}, grad_norm {row.get('grad_norm', math.nan):.4g}"
        if in_a_row > self._options.max_skipped_steps:
            raise UserError(
                f"the last {in_a_row:.0f} steps up to step {step} were not finite ({found}), so "
                "training stopped and nothing is exported; trainer.max_skipped_steps is "
                f"{self._options.max_skipped_steps}. They changed no weight, and the checkpoints "
                "stay. Lower optimizer.learning_rate or look at the records, in a new output_dir; "
                "metrics.jsonl shows how it came about."
            )
        if in_a_row or (self._skipped is not None and total > self._skipped):
            self._warn(f"{total:.0f} steps skipped up to step {step}: not finite ({found}).")
        self._skipped = total


def count_batch(batch: Mapping[str, np.ndarray], placed: Mapping[str, Any]) -> Mapping[str, Any]:
    """The real tokens and the share of padding of a batch, which is `placed` on the devices.

    Each of several processes knows only its own rows, so there the devices count.
    """
    return _counts(batch) if jax.process_count() == 1 else _counts_jit(placed)


def count_tokens(batch: Mapping[str, Any]) -> Any:
    """Real tokens that a batch sends through the model; a prompt counts once for each answer."""
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


def _figures(row: Mapping[str, float]) -> str:
    """The metrics that a line of the terminal has room for."""
    tasks = {
        name: name.removeprefix("eval_").rpartition("/")[0]
        for name in row
        if name.startswith("eval_") and name.endswith(_OF_TASKS)
    }
    shown = {**HEADLINES, **tasks}
    return "  ".join(f"{label} {row[name]:.4g}" for name, label in shown.items() if name in row)


def progress_bar(console: Console) -> Progress:
    """A bar of the steps done, with their throughput and the latest figures."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("{task.fields[figures]}"),
        console=console,
    )

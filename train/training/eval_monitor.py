"""Decides by held-out metrics when to stop early and which checkpoint is the best.

All of it follows from the evaluations so far, so a resumed run finds its way by reading its log.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from train.config import TrainerOptions, UserError


def lower_is_better(metric: str) -> bool:
    """Whether a metric of this name should fall: losses and perplexities, as in transformers."""
    return metric.endswith(("loss", "perplexity", "nll", "bits_per_byte"))


class EvalMonitor:
    """Follows the evaluations of a run: when to stop early, and which step is the best.

    It reads `early_stop` and `export_best` of the options, and the evaluations among the logged `rows`.
    The best step is that of the best evaluation by `export_best`, or of the last one where only floors
    are given, among those that keep to all floors. Step 0, before training, does not count.
    """

    def __init__(self, options: TrainerOptions, rows: Iterable[Mapping[str, float]] = ()) -> None:
        self._stop, self._best_by = options.early_stop, options.export_best
        self.best_step: int | None = None
        self.reason: str | None = None  # why the run ends before its last step, in words
        self.evaluated: set[int] = set()  # steps of all evaluations
        self._floors = {} if self._stop is None else dict(self._stop.floors)
        self._best = self._best_watched = -math.inf
        self._without_gain = 0
        for row in rows:
            if any(name.startswith("eval_") for name in row):
                self.record(int(row["step"]), row)

    @property
    def wants_start(self) -> bool:
        """Whether the model is to be evaluated before the first step."""
        return 0 not in self.evaluated and (self._stop or self._best_by) is not None

    def record(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Takes note of an evaluation; returns whether its step is now the best.

        Raises `UserError` where a metric that the settings name is missing, or the model is beyond a
        floor before the first step.
        """
        self.evaluated.add(step)
        self._set_floors(step, metrics)
        crossed = self._look_for_stop(step, metrics)
        if self._best_by is not None:
            score = _score(self._best_by, metrics, "trainer.export_best")
        elif self._floors:
            score = float(step)
        else:
            return False
        if step == 0 or crossed or not score > self._best:
            return False
        self._best, self.best_step = score, step
        return True

    def _set_floors(self, step: int, metrics: Mapping[str, float]) -> None:
        """Turns the drops that are allowed into floors, at the evaluation before the first step."""
        drops = {} if self._stop is None else self._stop.max_drop
        field = "trainer.early_stop.max_drop"
        for name, drop in drops.items():
            if name in self._floors:
                continue
            if step != 0:
                raise UserError(
                    f"{field}: the evaluation of {name} before the first step is missing from "
                    "metrics.jsonl. Start again in a new output_dir."
                )
            start = _score(name, metrics, field) - drop
            if math.isinf(start):
                raise UserError(f"{field}: before the first step {name} is {metrics[name]}.")
            self._floors[name] = -start if lower_is_better(name) else start

    def _look_for_stop(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Sets `reason` where the run is over; returns whether a floor is crossed."""
        stop = self._stop
        if stop is None:
            return False
        crossed = [
            f"{name} is {metrics[name]:.4g}, and {floor:.4g} is the floor"
            for name, floor in self._floors.items()
            if _score(name, metrics, "trainer.early_stop.floors")
            < (-floor if lower_is_better(name) else floor)
        ]
        if crossed and step == 0:
            raise UserError(
                f"trainer.early_stop.floors: before the first step {'; '.join(crossed)} already. "
                "Give one that the model meets."
            )
        if crossed:
            self.reason = f"at step {step} {'; '.join(crossed)}"
        if stop.metric is not None:
            score = _score(stop.metric, metrics, "trainer.early_stop.metric", stop.mode)
            if score > self._best_watched + stop.min_delta:
                self._best_watched, self._without_gain = score, 0
            else:
                self._without_gain += 1
            if self._without_gain >= stop.patience and self.reason is None:
                self.reason = (
                    f"{stop.metric} has not improved in the last {self._without_gain} evaluations "
                    f"(step {step})"
                )
        return bool(crossed)

    def step_to_export(self, last: int) -> int:
        """The step to export; raises `UserError` where no evaluated step keeps to the floors."""
        if self.best_step is not None:
            return self.best_step
        if self._floors:
            raise UserError(
                f"{self.reason or 'no step was evaluated'}, and no earlier step was evaluated, so "
                "nothing is exported; the checkpoints stay. Lower optimizer.learning_rate or "
                "trainer.eval_every, in a new output_dir; `python -m train export` writes the last "
                f"one, of step {last}."
            )
        return last


def _score(metric: str, metrics: Mapping[str, float], field: str, mode: str | None = None) -> float:
    """The value, negated where lower is better; minus infinity where it is NaN."""
    if metric not in metrics:
        names = ", ".join(sorted(name for name in metrics if name.startswith("eval_")))
        raise UserError(f"{field}: there is no held-out metric {metric!r}; there are {names}.")
    value = float(metrics[metric])
    lower = lower_is_better(metric) if mode is None else mode == "min"
    return -math.inf if math.isnan(value) else -value if lower else value

"""Early stop and the best step, by sequences of held-out metrics worked out by hand."""

from __future__ import annotations

import math

import pytest

from train.config import EarlyStopOptions, TrainerOptions, UserError
from train.files.metrics_log import read_metrics
from train.training.eval_monitor import EvalMonitor, lower_is_better

MARGIN, LOSS, SKILL = "eval_rewards/margins", "eval_loss", "eval_tasks/sums"


def options(export_best=None, **stop) -> TrainerOptions:
    early_stop = EarlyStopOptions(**stop) if stop else None
    return TrainerOptions(
        batch_size=1, eval_every=1, early_stop=early_stop, export_best=export_best
    )


def stops_at(metric: str, values: list[float], **stop) -> int | None:
    monitor = EvalMonitor(options(**{"metric": metric, **stop}))
    for step, value in enumerate(values):
        monitor.record(step, {metric: value})
        if monitor.reason is not None:
            return step
    return None


@pytest.mark.parametrize(
    ("metric", "values", "stop", "expected"),
    [
        (MARGIN, [0, 1, 2, 3, 4], {"patience": 1}, None),
        (MARGIN, [0, 1, 2, 2, 4], {"patience": 1}, 3),  # equal is no improvement
        (MARGIN, [0, 1, 0.5, 2, 1, 1.5, 1.9, 3], {"patience": 3}, 6),
        (MARGIN, [0, 1, 1.04, 1.08, 1.2], {"patience": 2, "min_delta": 0.05}, None),
        (MARGIN, [0, 1, 1.04, 1.05, 1.2], {"patience": 2, "min_delta": 0.05}, 3),
        (LOSS, [3, 2, 1, 1.5, 1.2], {"patience": 2}, 4),
        (LOSS, [3, 2, 1], {"patience": 1, "mode": "max"}, 1),
        (MARGIN, [0, math.nan, math.nan], {"patience": 2}, 2),
    ],
)
def test_patience(metric, values, stop, expected):
    assert stops_at(metric, values, **stop) == expected


def test_floor_ends_the_run_and_says_why():
    monitor = EvalMonitor(options(floors={SKILL: 0.5, LOSS: 2.0}))
    monitor.record(0, {SKILL: 0.8, LOSS: 1.0})
    monitor.record(1, {SKILL: 0.5, LOSS: 2.0})  # at the floor is not below it
    assert monitor.reason is None
    monitor.record(2, {SKILL: 0.4, LOSS: 2.5})
    assert monitor.reason is not None
    assert "at step 2 eval_tasks/sums is 0.4, and 0.5 is the floor" in monitor.reason
    assert "eval_loss is 2.5, and 2 is the floor" in monitor.reason


def test_floor_that_the_start_does_not_meet_is_refused():
    monitor = EvalMonitor(options(floors={SKILL: 0.9}))
    with pytest.raises(UserError, match=r"floors: before the first step eval_tasks/sums is 0\.8"):
        monitor.record(0, {SKILL: 0.8})


def test_best_step_is_an_intact_one_above_the_floors():
    monitor = EvalMonitor(options(MARGIN, floors={SKILL: 0.5}))
    rows = [(0, 9, 0.8), (1, 1, 0.8), (2, 3, 0.7), (3, 2, 0.6), (4, 5, 0.4)]
    found = [monitor.record(step, {MARGIN: margin, SKILL: skill}) for step, margin, skill in rows]
    assert found == [False, True, True, False, False]  # before training, and below the floor, not
    assert monitor.best_step == 2


def test_drop_is_counted_from_the_start():
    monitor = EvalMonitor(options(max_drop={SKILL: 0.1, LOSS: 0.5}))
    monitor.record(0, {SKILL: 0.8, LOSS: 1.0})
    monitor.record(1, {SKILL: 0.71, LOSS: 1.5})  # as bad as is allowed
    assert monitor.reason is None
    monitor.record(2, {SKILL: 0.69, LOSS: 1.51})
    assert monitor.reason is not None
    assert "at step 2 eval_tasks/sums is 0.69, and 0.7 is the floor" in monitor.reason
    assert "eval_loss is 1.51, and 1.5 is the floor" in monitor.reason


@pytest.mark.parametrize("stop", [{"floors": {SKILL: 0.5}}, {"max_drop": {SKILL: 0.3}}])
def test_last_step_within_the_floors_is_exported(stop):
    values = [0.8, 0.6, 0.7, 0.55, 0.2]
    rows = [{"step": step, SKILL: value} for step, value in enumerate(values)]
    assert EvalMonitor(options(**stop), rows[:3]).step_to_export(2) == 2
    monitor = EvalMonitor(options(**stop), rows)
    assert monitor.step_to_export(4) == 3
    with pytest.raises(UserError, match=r"at step 1 .* nothing is exported; .* export"):
        EvalMonitor(options(**stop), [rows[0], {"step": 1, SKILL: math.nan}]).step_to_export(1)


def test_drop_without_a_start_is_refused():
    stop = options(max_drop={SKILL: 0.1})
    with pytest.raises(UserError, match="max_drop: the evaluation of eval_tasks/sums before"):
        EvalMonitor(stop, [{"step": 4, SKILL: 0.5}])
    with pytest.raises(UserError, match="before the first step eval_tasks/sums is nan"):
        EvalMonitor(stop).record(0, {SKILL: math.nan})


def test_log_gives_the_same_answer(tmp_path):
    rows = [{"step": s, LOSS: v} for s, v in enumerate([3.0, 2.0, 1.0, 1.5, 1.4])]
    rows.insert(2, {"step": 1, "loss": 7.0})  # of training
    monitor = EvalMonitor(options(LOSS, metric=LOSS, patience=2), rows)
    assert monitor.best_step == 2
    assert monitor.reason is not None
    assert monitor.evaluated == {0, 1, 2, 3, 4}
    assert not monitor.wants_start
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(str(row).replace("'", '"') + "\n" for row in rows))
    assert EvalMonitor(options(LOSS), read_metrics(log)).step_to_export(last=4) == 2


def test_unknown_metric_is_named_with_those_there_are():
    metrics = {LOSS: 1.0, MARGIN: 0.0, "loss": 3.0}
    for field, given in (
        ("trainer.early_stop.metric", options(metric="eval_los")),
        ("trainer.early_stop.floors", options(floors={"eval_los": 1.0})),
        ("trainer.export_best", options("eval_los")),
    ):
        message = rf"{field}: .* 'eval_los'; there are eval_loss, eval_rewards/margins\."
        with pytest.raises(UserError, match=message):
            EvalMonitor(given).record(0, metrics)


def test_direction_follows_the_name():
    lower = (LOSS, "eval_texts/a/perplexity", "eval_texts/a/nll", "eval_texts/a/bits_per_byte")
    assert all(map(lower_is_better, lower))
    assert not any(map(lower_is_better, (MARGIN, SKILL, "eval_tasks/sums/logp")))

"""The metrics log, and what a resume drops from it."""

from __future__ import annotations

import json

import pytest
from tensorboardX.proto.event_pb2 import (  # pyright: ignore[reportAttributeAccessIssue]
    Event,
    SessionLog,
)

from train.config import UserError
from train.files.metrics_log import MetricsLog, keep_until, read_metrics


def scalars(directory) -> dict[tuple[str, int], float]:
    """What TensorBoard shows: a session's start hides what earlier ones logged from its step on."""
    found = {}
    for path in sorted(directory.glob("events*")):
        data, start = path.read_bytes(), 0
        while start < len(data):
            length = int.from_bytes(data[start : start + 8], "little")
            event = Event.FromString(data[start + 12 : start + 12 + length])
            if event.session_log.status == SessionLog.START:
                found = {key: value for key, value in found.items() if key[1] < event.step}
            for value in event.summary.value:
                found[value.tag, event.step] = value.simple_value
            start += 16 + length
    return found


def test_lines_and_tensorboard_hold_the_same(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": 0.5, "rewards/margins": -1.0})
        log.write(2, {"loss": 0.25})
    assert read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": 0.5, "rewards/margins": -1.0},
        {"step": 2, "loss": 0.25},
    ]
    assert scalars(tmp_path / "tensorboard") == {
        ("loss", 1): 0.5,
        ("rewards/margins", 1): -1.0,
        ("loss", 2): 0.25,
    }


def test_every_line_is_on_disk_at_once(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": 0.5})
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": 0.5}\n'


def test_resume_drops_later_steps(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(1, 6):
            log.write(step, {"loss": float(step)})
    with MetricsLog(tmp_path, resume_step=3) as log:
        log.write(4, {"loss": 40.0})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_new_start_hides_what_a_killed_run_logged(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(1, 4):
            log.write(step, {"loss": float(step)})
    # One file per second and process; the second run's comes later.
    (before,) = (tmp_path / "tensorboard").iterdir()
    before.rename(before.with_name("events.out.tfevents.0"))
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": 10.0})
    assert scalars(tmp_path / "tensorboard") == {("loss", 1): 10.0}


def test_resume_drops_a_line_that_was_cut_off(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2)]
    path.write_text("\n".join(whole) + '\n{"step": 3, "lo')
    keep_until(path, 3)
    assert path.read_text() == "\n".join(whole) + "\n"


def test_new_run_has_nothing_to_drop(tmp_path):
    keep_until(tmp_path / "metrics.jsonl", 0)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_line_that_is_being_written_is_passed_over_and_damage_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 0.5}]
    for damaged in ('{"loss": 1.0}', "[]", "\0\0", "{"):
        path.write_text(f'{{"step": 1}}\n{damaged}\n{{"step": 3}}\n')
        for read in (read_metrics, lambda path: keep_until(path, 3)):
            with pytest.raises(UserError, match=r"metrics\.jsonl, line 2 is damaged"):
                read(path)
        assert damaged in path.read_text()
    keep_until(path, 0)  # a run without a checkpoint starts again, whatever the file holds
    assert path.read_text() == ""

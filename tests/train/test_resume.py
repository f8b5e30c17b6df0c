"""A run that is killed with SIGKILL and started again ends bit for bit like one that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.train.tiny_runs import read_tensors, run_flags, write_inputs
from train.cli import main
from train.distributed.stop import EXIT_STATUS, Stopped
from train.training.checkpoint import Checkpoints

STEPS, EVERY = 48, 4
SETTINGS = {
    "trainer__steps": STEPS,
    "trainer__save_every": EVERY,
    "trainer__eval_every": 8,
    "trainer__log_every": 3,
    "optimizer__every_k": 3,
    "optimizer__delta_mask": "fresh",
    "schedule__warmup_steps": 4,
}
SHORT = {"trainer__steps": 5, "trainer__save_every": 1, "trainer__keep": 3}
TIMEOUT = 300


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def command(inputs: dict[str, str], output: Path) -> list[str]:
    return ["dpo", *run_flags(inputs, output, **SETTINGS)]


def start_and_kill(arguments: list[str], due) -> None:
    """Runs the command in a process of its own and kills it as soon as `due()` holds."""
    process = subprocess.Popen(
        [sys.executable, "-m", "train", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    deadline = time.monotonic() + TIMEOUT
    try:
        while not due():
            assert process.poll() is None, "the run ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert process.returncode == -signal.SIGKILL


def complete(checkpoints: Path) -> list[int]:
    return sorted(int(path.name) for path in checkpoints.glob("*") if path.name.isdecimal())


def rows_of(output: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [{name: v for name, v in row.items() if name != "tokens_per_second"} for row in rows]


@pytest.mark.slow
def test_killed_twice_and_still_bit_identical(inputs, tmp_path, capsys):
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert main(command(inputs, undisturbed)) == 0

    checkpoints = killed / "checkpoints"
    # First in the middle of writing a checkpoint, when a complete one is there already.
    start_and_kill(
        command(inputs, killed),
        lambda: complete(checkpoints) and any(checkpoints.glob("*tmp*")),
    )
    first = max(complete(checkpoints))
    assert first < STEPS
    # Then somewhere between checkpoints, after the run has resumed and gone on.
    start_and_kill(command(inputs, killed), lambda: max(complete(checkpoints)) >= first + 2 * EVERY)
    second = max(complete(checkpoints))
    assert first < second < STEPS
    assert not (killed / "export").exists()

    capsys.readouterr()
    assert main(command(inputs, killed)) == 0
    shown = capsys.readouterr().out
    assert f"Resuming after step {second} of {STEPS}." in shown
    assert "Loading the model" not in shown  # neither weights nor reference are read again

    expected, found = read_tensors(undisturbed / "export"), read_tensors(killed / "export")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype
        np.testing.assert_array_equal(tensor, found[name], err_msg=name)
    start = read_tensors(Path(inputs["model"]))
    assert any((start[name] != found[name]).any() for name in found)

    assert rows_of(killed) == rows_of(undisturbed)  # no step is missing and none comes twice


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("finished") / "run"
    assert main(["dpo", *run_flags(inputs, output, **SHORT)]) == 0
    return output


@pytest.fixture
def run(inputs, finished, tmp_path):
    """A copy of the finished run, and its command line."""
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    return output, ["dpo", *run_flags(inputs, output, **SHORT)]


def test_finished_run_is_left_alone(run, capsys):
    output, arguments = run
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    assert main(arguments) == 0
    assert "holds this run, finished: nothing to do" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_kept_checkpoints_are_the_last_ones(run):
    output, _ = run
    with Checkpoints(output / "checkpoints", read_only=True) as saved:
        assert saved.steps() == [3, 4, 5]


def test_export_that_was_killed_is_made_up_for(run):
    output, arguments = run
    expected = read_tensors(output / "export")
    # What is on disk when the kill comes while the export is being written.
    (output / "summary.json").unlink()
    (output / "export").rename(output / ".export.partial-4711")
    assert main(arguments) == 0
    found = read_tensors(output / "export")
    assert all((expected[name] == found[name]).all() for name in expected)
    assert not list(output.glob(".export.partial*"))


def test_resume_that_scores_the_reference_again_lets_go_of_its_weights(run, monkeypatch, capsys):
    output, arguments = run
    (output / "summary.json").unlink()
    shutil.rmtree(output / "reference")
    held = []

    def stop(job, *rest):
        held.append(job.start.__self__.loaded)
        raise Stopped("before the first step")

    monkeypatch.setattr("train.runs.train.fit", stop)
    assert main(arguments) == EXIT_STATUS
    assert "Loading the model" in capsys.readouterr().out
    shutil.rmtree(output / "checkpoints")
    shutil.rmtree(output / "reference")
    assert main(arguments) == EXIT_STATUS
    assert held[0] is None
    assert held[1] is not None  # a new start has a use for them


def test_resume_refuses_changed_weights(run, inputs, capsys):
    output, arguments = run
    (output / "summary.json").unlink()  # as if it had been killed before the end
    base = Path(inputs["base"]) / "model.safetensors"
    content = base.read_bytes()
    base.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    try:
        assert main(arguments) == 2
    finally:
        base.write_bytes(content)
    assert "holds a run whose base had other content than now" in capsys.readouterr().err


def test_export_command_writes_any_checkpoint(run, inputs, tmp_path, capsys):
    output, _ = run
    last, earlier = tmp_path / "last", tmp_path / "earlier"
    assert main(["export", "--run", str(output), "--output", str(last)]) == 0
    assert main(["export", "--run", str(output), "--output", str(earlier), "--step", "3"]) == 0
    exported = read_tensors(output / "export")
    found, before = read_tensors(last), read_tensors(earlier)
    assert all((exported[name] == found[name]).all() for name in exported)
    assert any((exported[name] != before[name]).any() for name in exported)
    assert main(["export", "--run", str(output), "--output", str(last)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["export", "--run", str(output), "--output", "x", "--step", "1"]) == 2
    assert "no checkpoint 1 in" in capsys.readouterr().err


def dtypes(directory: Path) -> set[str]:
    return {tensor.dtype.name for tensor in read_tensors(directory).values()}


def test_export_command_writes_the_type_that_the_run_was_given(run, tmp_path, capsys):
    output, _ = run
    settings = output / "config.yaml"
    text = settings.read_text()
    assert "export_dtype: null" in text
    settings.write_text(text.replace("export_dtype: null", "export_dtype: float16"))
    command = ["export", "--run", str(output), "--output"]
    assert main([*command, str(tmp_path / "recorded")]) == 0
    assert dtypes(tmp_path / "recorded") == {"float16"}
    assert main([*command, str(tmp_path / "given"), "--dtype", "float32"]) == 0
    assert dtypes(tmp_path / "given") == {"float32"}
    settings.unlink()
    assert main([*command, str(tmp_path / "unknown")]) == 2
    message = capsys.readouterr().err
    assert "run: model.export_dtype cannot be read from" in message
    assert "give dtype" in message

"""Whole runs that are stopped, go on elsewhere, end early, or meet another process."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.train.tiny_runs import read_tensors, run_flags, write_inputs
from train.cli import main
from train.files import lock
from train.files.metrics_log import read_metrics
from train.training import loop

SETTINGS = {"trainer__steps": 8, "trainer__eval_every": 4}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(["dpo", *run_flags(inputs, output, **SETTINGS)]) == 0
    return output


def assert_same_export(one: Path, other: Path) -> None:
    left, right = read_tensors(one / "export"), read_tensors(other / "export")
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        np.testing.assert_array_equal(tensor, right[name], err_msg=name)


@pytest.mark.slow
def test_signal_stops_with_its_own_status_and_nothing_is_lost(
    inputs, undisturbed, tmp_path, monkeypatch, capfd
):
    command = ["dpo", *run_flags(inputs, tmp_path / "run", **SETTINGS)]
    batches = iter(range(1, 9))

    def put_batch(batch, mesh, put=loop.put_batch):
        if next(batches) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return put(batch, mesh)

    with monkeypatch.context() as patched:
        patched.setattr("train.training.loop.put_batch", put_batch)
        assert main(command) == 75
    shown = capfd.readouterr().err
    assert "SIGTERM: saving after this step" in shown
    assert "Stopped and saved after step 5 of 8; the same command goes on from there." in shown
    assert "Traceback" not in shown
    assert not (tmp_path / "run" / "export").exists()
    assert main(command) == 0
    assert "Resuming after step 5 of 8." in capfd.readouterr().out
    assert_same_export(tmp_path / "run", undisturbed)


def test_run_that_another_process_holds_is_refused(inputs, undisturbed, tmp_path, capsys):
    output = tmp_path / "run"
    output.mkdir()
    program = (
        f"import pathlib, train.files.lock as l; l.hold(pathlib.Path({str(output)!r})); input()"
    )
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, env=environment
    ) as other:
        while not (output / lock.LOCK_FILE).exists() or not (output / lock.LOCK_FILE).read_text():
            assert other.poll() is None
        assert main(["dpo", *run_flags(inputs, output, **SETTINGS)]) == 2
        assert f"is in use by process {other.pid} on host" in capsys.readouterr().err
        assert [path.name for path in output.iterdir()] == [lock.LOCK_FILE]
        other.kill()
    lock.refuse_if_held(output)


@pytest.mark.slow
def test_best_checkpoint_is_exported(inputs, undisturbed, tmp_path, monkeypatch, capsys):
    # Values by evaluation, the first before training; step 4 of 12 is the best, 8 the last.
    values = iter([0.1, 0.5, 0.3, 0.2])

    def make_evaluate(*args, **settings):
        return lambda params: {"eval_rewards/margins": next(values)}

    monkeypatch.setattr("train.commands.dpo.evaluate_preferences", make_evaluate)
    stop = {
        "trainer__export_best": "eval_rewards/margins",
        "trainer__early_stop__metric": "eval_rewards/margins",
        "trainer__early_stop__patience": 1,
    }
    flags = run_flags(inputs, tmp_path / "run", **SETTINGS, **stop, trainer__keep=1)
    assert main(["dpo", *flags]) == 0
    shown = capsys.readouterr().out
    assert "Best by eval_rewards/margins: step 4." in shown
    assert "Model of step 4" in shown
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["steps"], summary["exported_step"]) == (8, 4)
    exports = [str(tmp_path / name) for name in ("best", "last")]
    for step, output in zip("48", exports, strict=True):
        command = ["export", "--run", str(tmp_path / "run"), "--output", output, "--step", step]
        assert main(command) == 0
    best, last = (read_tensors(Path(path)) for path in exports)
    exported = read_tensors(tmp_path / "run" / "export")
    assert all((exported[name] == best[name]).all() for name in best)
    assert any((exported[name] != last[name]).any() for name in best)


def test_damaged_checkpoint_is_not_exported(undisturbed, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    file = run / "checkpoints" / "8" / "data" / "metadata"
    file.write_bytes(file.read_bytes()[:-1])
    assert main(["export", "--run", str(run), "--output", str(tmp_path / "out")]) == 2
    assert "step: checkpoint 8 in" in (message := capsys.readouterr().err)
    assert "is damaged (data/metadata has" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("attention", ["splash", "cudnn"])
def test_a_run_of_another_device_is_exported_here(undisturbed, tmp_path, attention):
    """No attention is computed, so its program need not run on this machine."""
    run, out = tmp_path / "run", tmp_path / "out"
    shutil.copytree(undisturbed, run)
    record = json.loads((run / "run.json").read_text())
    assert record["settings"]["model.attention"] == "xla"
    record["settings"]["model.attention"] = attention
    (run / "run.json").write_text(json.dumps(record))
    assert main(["export", "--run", str(run), "--output", str(out)]) == 0
    expected, found = read_tensors(undisturbed / "export"), read_tensors(out)
    assert expected.keys() == found.keys()
    assert all((found[name] == expected[name]).all() for name in expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"trainer__export_best": "eval_loss", "trainer__eval_every": None},
            "trainer.export_best is set, but trainer.eval_every is not",
        ),
        ({"trainer__early_stop__patience": 2}, "has neither a metric nor floors"),
        (
            {"trainer__early_stop__metric": "eval_loss", "trainer__early_stop__patience": 0},
            "trainer.early_stop.patience must be positive, got 0",
        ),
        ({"trainer__max_skipped_steps": -1}, "trainer.max_skipped_steps must be 0 or larger"),
    ],
)
def test_settings_that_cannot_work_are_refused(inputs, tmp_path, capsys, changes, message):
    flags = run_flags(inputs, tmp_path / "run", **(SETTINGS | changes))
    assert main(["dpo", *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# Virtual devices have to be asked for before jax starts.
ON_A_MESH = """
import json, os, signal, sys
import train.cli, train.training.loop as loop
stop, order, *command = sys.argv[1:]
real, numbers = loop.put_batch, iter(range(1, 99))
def put_batch(batch, mesh):
    with open(order, "a") as file:
        file.write(json.dumps(batch["index"].tolist()) + "\\n")
    if next(numbers) == int(stop):
        os.kill(os.getpid(), signal.SIGTERM)
    return real(batch, mesh)
loop.put_batch = put_batch
sys.exit(train.cli.main(command))
"""
# Devices along (fsdp, tensor); the step that a signal comes in, counted from the start; exit status.
MESHES = (((8, 1), 3, 75), ((4, 1), 3, 75), ((2, 4), 0, 0))


@pytest.mark.slow
def test_run_goes_on_from_mesh_to_mesh(inputs, undisturbed, tmp_path):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    order = tmp_path / "order.jsonl"
    for (fsdp, tensor), stop, status in MESHES:
        mesh = {"mesh__fsdp": fsdp, "mesh__tensor": tensor}
        command = ["dpo", *run_flags(inputs, tmp_path / "run", **SETTINGS, **mesh)]
        done = subprocess.run(
            [sys.executable, "-c", ON_A_MESH, str(stop), order, *command],
            capture_output=True,
            text=True,
            env=environment,
            timeout=300,
        )
        assert done.returncode == status, done.stderr
    expected, found = (
        {row["step"]: row["loss"] for row in read_metrics(path / "metrics.jsonl") if "loss" in row}
        for path in (undisturbed, tmp_path / "run")
    )
    assert list(found) == list(range(1, 9))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)
    # 32 rows make four batches: every epoch has each row once, across the change of meshes.
    batches = [json.loads(line) for line in order.read_text().splitlines()]
    for epoch in (batches[:4], batches[4:]):
        assert len({row for rows in epoch for row in rows}) == 32
    before, after = (read_tensors(path / "export") for path in (undisturbed, tmp_path / "run"))
    for name, tensor in before.items():  # other masks would move single weights by the rate, 1e-3
        np.testing.assert_allclose(after[name], tensor, atol=1e-4, err_msg=name)

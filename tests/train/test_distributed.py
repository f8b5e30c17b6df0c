"""Runs of several processes: the same training, the same files, and what happens when one ends."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.train.builders import save_reward_model
from tests.train.groups import Wound, run_group, statuses
from tests.train.tiny_runs import flags, read_tensors, run_flags, write_inputs, write_jsonl
from train.cli import main
from train.files.metrics_log import read_metrics
from train.models import from_hf, to_hf

# One device has one sum of rows, several have one each: the last digits of float32 differ.
LOSS_RTOL, WEIGHTS_ATOL = 1e-5, 1e-4


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def losses(run: Path) -> dict[float, float]:
    return {
        row["step"]: row["loss"] for row in read_metrics(run / "metrics.jsonl") if "loss" in row
    }


def assert_same_run(run: Path, expected: Path) -> None:
    """The same losses, padding and trained weights up to the order of sums."""
    assert losses(run).keys() == losses(expected).keys()
    np.testing.assert_allclose(
        list(losses(run).values()), list(losses(expected).values()), rtol=LOSS_RTOL
    )
    rows, other = (read_metrics(path / "metrics.jsonl") for path in (run, expected))
    for row, reference in zip(rows, other, strict=True):
        assert row.keys() == reference.keys()
        for name in ("padding_share", "eval_loss", "eval_rewards/margins"):
            if name in row:
                assert row[name] == pytest.approx(reference[name], rel=1e-4)
    assert largest_difference(run, expected) < WEIGHTS_ATOL


def largest_difference(run: Path, other: Path) -> float:
    left, right = read_tensors(run / "export"), read_tensors(other / "export")
    assert left.keys() == right.keys()
    return max(float(np.abs(left[name] - right[name]).max()) for name in left)


def mesh_flags(data: int, fsdp: int, tensor: int) -> dict[str, int]:
    return {"mesh__data": data, "mesh__fsdp": fsdp, "mesh__tensor": tensor}


@pytest.mark.slow
def test_two_processes_train_like_one(inputs, tmp_path):
    short = {"trainer__steps": 3, "data__eval_fraction": None, "data__buckets": 1}
    assert main(["dpo", *run_flags(inputs, tmp_path / "one", **short)]) == 0
    command = run_flags(inputs, tmp_path / "two", **short)
    group = run_group(tmp_path / "logs", ["dpo", *command], processes=2, devices=2)
    assert statuses(group) == [0, 0]
    assert_same_run(tmp_path / "two", tmp_path / "one")
    first, second = (one.log for one in group)
    assert "Model of step 3" in first
    assert "step" not in second  # the first process alone reports
    settings = json.loads((tmp_path / "two" / "run.json").read_text())["settings"]
    assert not [name for name in settings if name.startswith(("distributed", "mesh"))]


TEN_STEPS = {"trainer__steps": 10, "trainer__eval_every": 5}
GROUPS = {
    "2 processes, fsdp": (2, 2, (1, 2, 1)),
    "2 processes, tensor": (2, 2, (1, 1, 2)),
    "4 processes, fsdp": (4, 4, (1, 4, 1)),
    "4 processes, tensor": (4, 4, (1, 1, 4)),
    "4 processes, both, 2 devices each": (4, 8, (1, 2, 4)),
}


@pytest.fixture(scope="module")
def undisturbed(inputs, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    assert main(["dpo", *run_flags(inputs, output, **TEN_STEPS)]) == 0
    return output


@pytest.mark.slow
@pytest.mark.parametrize("name", GROUPS)
def test_any_number_of_processes_gives_the_same_curve_and_masks(
    name, inputs, undisturbed, tmp_path
):
    processes, devices, mesh = GROUPS[name]
    command = run_flags(inputs, tmp_path / "run", **TEN_STEPS, **mesh_flags(*mesh))
    group = run_group(tmp_path / "logs", ["dpo", *command], processes=processes, devices=devices)
    assert statuses(group) == [0] * processes
    assert_same_run(tmp_path / "run", undisturbed)

    # What the mesh wrote is, bit for bit, what one device writes of the same checkpoint.
    out = tmp_path / "out"
    assert main(["export", "--run", str(tmp_path / "run"), "--output", str(out)]) == 0
    files = [file.relative_to(out) for file in out.rglob("*") if file.is_file()]
    assert {"model.safetensors", "config.json"} <= {str(file) for file in files}
    for file in files:
        if file.name != "README.md":  # the model card names the directory
            assert (out / file).read_bytes() == (tmp_path / "run" / "export" / file).read_bytes()


@pytest.mark.slow
def test_other_masks_would_be_seen(inputs, undisturbed, tmp_path):
    other = run_flags(inputs, tmp_path / "run", **TEN_STEPS, optimizer__seed=1)
    assert main(["dpo", *other]) == 0
    assert largest_difference(tmp_path / "run", undisturbed) > 10 * WEIGHTS_ATOL


@pytest.mark.slow
@pytest.mark.parametrize("which", [0, 3])
def test_a_killed_process_ends_the_others_by_name_and_the_restart_goes_on(
    which, inputs, undisturbed, tmp_path
):
    settings = TEN_STEPS | {"trainer__save_every": 4}
    command = ["dpo", *run_flags(inputs, tmp_path / "run", **settings, **mesh_flags(1, 2, 2))]
    wound = Wound(which, 7, signal.SIGKILL)
    group = run_group(tmp_path / "killed", command, processes=4, devices=4, wound=wound)
    for number, one in enumerate(group):
        if number == which:
            assert one.status == -signal.SIGKILL
            continue
        assert one.status == 75, one.log[-2500:]
        assert one.seconds < 60
        assert f"process {which} of 4 (host " in one.log
        assert "is gone: it was killed, or its host is down. This process stops too" in one.log
    assert not (tmp_path / "run" / "export").exists()

    group = run_group(tmp_path / "again", command, processes=4, devices=4)
    assert statuses(group) == [0] * 4
    assert "Resuming after step 4 of 10." in group[0].log
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_a_signal_to_one_process_saves_and_stops_all_after_the_same_step(
    inputs, undisturbed, tmp_path
):
    command = ["dpo", *run_flags(inputs, tmp_path / "run", **TEN_STEPS, **mesh_flags(1, 2, 1))]
    wound = Wound(1, 6, signal.SIGTERM)
    group = run_group(tmp_path / "stopped", command, processes=2, devices=2, wound=wound)
    assert [one.status for one in group] == [75, 75], [one.log[-2500:] for one in group]
    stopped = "Stopped and saved after step 7 of 10; the same command goes on from there."
    assert all(stopped in one.log for one in group)
    assert "SIGTERM: saving after this step" in group[1].log

    # Fewer machines now: the same run goes on in one process.
    assert main(command) == 2  # with the mesh of two devices, which it does not have
    resumed = ["dpo", *run_flags(inputs, tmp_path / "run", **TEN_STEPS)]
    assert main(resumed) == 0
    assert_same_run(tmp_path / "run", undisturbed)


@pytest.mark.slow
def test_an_error_of_one_process_ends_the_others_with_its_words(inputs, tmp_path):
    program = f"""
import os, sys
import train.cli
if os.environ["JAX_PROCESS_ID"] == "1":
    sys.argv[sys.argv.index({inputs["pairs"]!r})] += "-missing"
sys.exit(train.cli.main(sys.argv[1:]))
"""
    command = ["dpo", *run_flags(inputs, tmp_path / "run", **TEN_STEPS)]
    group = run_group(tmp_path / "logs", command, processes=2, devices=2, program=program)
    assert [one.status for one in group] == [2, 2], [one.log[-2500:] for one in group]
    assert "error: data.path" in group[1].log
    assert "process 1 of 2 (host " in group[0].log
    assert "ended with an error: data.path" in group[0].log
    assert not (tmp_path / "run").exists()
    assert max(one.seconds for one in group) < 60


ON_POLICY = {
    "online-dpo": ("loss", "objective/scores", "eval_objective/scores", "completions/mean_length"),
    # The loss of answers that were just sampled is 0 up to rounding, whatever its gradient is.
    "grpo": ("grad_norm", "reward", "reward_std", "eval_reward", "completions/mean_length"),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", ON_POLICY)
def test_processes_that_share_rows_sample_the_answers_of_one(command, inputs, tmp_path):
    save_reward_model(tmp_path / "reward")
    prompts = [{"prompt": [{"role": "user", "content": f"{n}?"}]} for n in range(24)]
    settings: dict[str, Any] = {
        "data.path": write_jsonl(tmp_path / "prompts.jsonl", prompts),
        "data.max_completion_length": None,
        "sampling.max_new_tokens": 8,
        "reward.model": tmp_path / "reward",
        "trainer.steps": 3,
    }
    given = dict(zip(*[iter(run_flags(inputs, tmp_path / "one"))] * 2, strict=True))
    values = {name[2:]: value for name, value in given.items()} | settings
    if command == "grpo":
        values |= {"sampling.num_generations": 4, "reward.scale_rewards": "batch", "loss.beta": 0.1}
    assert main([command, *flags(values)]) == 0
    # Two of four processes share the rows of each half of a batch.
    mesh = {"mesh.fsdp": 2, "mesh.tensor": 2, "output_dir": tmp_path / "four"}
    arguments = [command, *flags(values | mesh)]
    group = run_group(tmp_path / "logs", arguments, processes=4, devices=4)
    assert statuses(group) == [0] * 4
    rows, reference = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("four", "one"))
    for name in ON_POLICY[command]:
        found, expected = ([row[name] for row in one if name in row] for one in (rows, reference))
        np.testing.assert_allclose(found, expected, rtol=1e-4, err_msg=name)


ROUND_TRIP = """
import sys
import jax
from train.config import DistributedOptions, MeshOptions
from train.distributed.join import joined
with joined(DistributedOptions()):
    from train.models import from_hf, split_model, to_hf
    from train.distributed.mesh import make_mesh
    model = from_hf(sys.argv[1], mesh=make_mesh(MeshOptions(fsdp=2, tensor=2)))
    spread = [leaf for leaf in jax.tree.leaves(split_model(model)[1]) if not leaf.is_fully_replicated]
    assert len(spread) > 5 and not any(leaf.is_fully_addressable for leaf in spread)
    to_hf(model, sys.argv[2], like=sys.argv[1])
"""


@pytest.mark.slow
def test_weights_read_by_two_processes_are_written_bit_for_bit(inputs, tmp_path):
    arguments = [inputs["model"], str(tmp_path / "out")]
    group = run_group(tmp_path / "logs", arguments, processes=2, devices=4, program=ROUND_TRIP)
    assert statuses(group) == [0, 0]
    to_hf(from_hf(inputs["model"]), tmp_path / "alone", like=inputs["model"])
    for file in (tmp_path / "alone").iterdir():
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name
    kept, written = (read_tensors(path) for path in (Path(inputs["model"]), tmp_path / "out"))
    assert kept.keys() == written.keys()
    assert all(kept[name].tobytes() == written[name].tobytes() for name in kept)

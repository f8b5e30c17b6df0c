"""Whole runs on meshes of eight virtual devices, against the same run on one."""

import json

import numpy as np
import pytest

from tests.train.tiny_runs import read_tensors, run_flags, write_inputs
from tests.virtual_devices import run_python
from train.config import MeshOptions, UserError
from train.distributed.mesh import mesh_shape

PROGRAM = """
import json, sys
import jax
from train.cli import main
for command, flags in json.loads(sys.argv[1]):
    assert main([command, *flags]) == 0, flags
    jax.clear_caches()
"""
MESHES = {"1": (1, 1, 1), "8": (1, 8, 1), "2x4": (2, 4, 1), "2x2x2": (2, 2, 2), "4 of 8": (1, 2, 2)}
PARTS = {"trainer__gradient_accumulation_steps": 2, "trainer__eval_batch_size": 8}
LORA = {"optimizer__name": "adamw", "optimizer__alpha": None, "optimizer__density": None}
KINDS = {
    "dpo in parts, averaged": ("dpo", PARTS | {"trainer__ema__decay": 0.5}),
    # Not OnTIES: Adam's first updates are nearly all as large as each other, and rounding chooses.
    "kto in parts": ("kto", PARTS | {"loss__type": "kto"}),
    "lora": ("dpo", LORA | {"model__base": None, "model__lora__rank": 4}),
    "sparse delta": ("dpo", {"optimizer__storage": "sparse", "optimizer__delta_mask": "fixed"}),
}


def on_mesh(shape, **settings):
    """Settings of a short run on a mesh."""
    axes = zip(("data", "fsdp", "tensor"), shape, strict=True)
    return {f"mesh__{axis}": size for axis, size in axes} | {"trainer__steps": 3} | settings


def train(commands):
    """Runs commands, each with its flags, in a process that has eight devices."""
    run_python("-c", PROGRAM, json.dumps(commands, default=str), devices=8, timeout=600)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The directory of the same run on every mesh."""
    root = tmp_path_factory.mktemp("meshes")
    inputs, commands = write_inputs(root), []
    for name, shape in MESHES.items():
        settings = on_mesh(shape, reference_cache=root / f"reference {name}")
        commands.append(("dpo", run_flags(inputs, root / name, **settings)))
    train(commands)
    return {name: root / name for name in MESHES}


@pytest.fixture(scope="module")
def kinds(tmp_path_factory):
    """Directories of several kinds of runs, on one device and on 2x2x2."""
    root = tmp_path_factory.mktemp("kinds")
    inputs, commands = write_inputs(root), []
    for name, (command, changes) in KINDS.items():
        for mesh in ("1", "2x2x2"):
            settings = on_mesh(MESHES[mesh], **changes)
            commands.append((command, run_flags(inputs, root / f"{name} {mesh}", **settings)))
    train(commands)
    return root


def read_log(run):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [(row["loss"], row["grad_norm"]) for row in lines if "loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MESHES if name != "1"])
def test_losses_and_gradients_are_those_of_one_device(runs, name):
    expected = read_log(runs["1"])
    assert len(expected) == 3
    np.testing.assert_allclose(read_log(runs[name]), expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MESHES if name != "1"])
def test_the_trained_model_is_that_of_one_device(runs, name):
    expected, found = read_tensors(runs["1"] / "export"), read_tensors(runs[name] / "export")
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, atol=2e-4, err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_run_is_that_of_one_device(kinds, name):
    expected, found = (read_log(kinds / f"{name} {mesh}") for mesh in ("1", "2x2x2"))
    assert len(expected) == 3
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    expected, found = (read_tensors(kinds / f"{name} {mesh}" / "export") for mesh in ("1", "2x2x2"))
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, atol=2e-4, err_msg=key)


def test_what_the_other_axes_leave_goes_to_fsdp():
    assert mesh_shape(MeshOptions(data=2, tensor=2), 8) == (2, 2, 2)
    assert mesh_shape(MeshOptions(fsdp=3), 8) == (1, 3, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (MeshOptions(data=2, fsdp=8), r"mesh.data \* mesh.fsdp \* mesh.tensor must be at most 8"),
        (MeshOptions(tensor=3), r"mesh.data \* mesh.tensor must be a divisor of the 8 devices"),
    ],
)
def test_meshes_that_do_not_fit_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        mesh_shape(options, 8)

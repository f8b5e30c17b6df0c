"""Whole runs on meshes of eight virtual devices, against the same run on one."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from tests.train.tiny_runs import read_tensors, run_flags, write_inputs
from train.config import MeshOptions, UserError
from train.sharding import mesh_shape

PROGRAM = """
import json, sys
import jax
from train.cli import main
for flags in json.loads(sys.argv[1]):
    assert main(["dpo", *flags]) == 0, flags
    jax.clear_caches()
"""
MESHES = {"1": (1, 1, 1), "8": (1, 8, 1), "2x4": (2, 4, 1), "2x2x2": (2, 2, 2), "4 of 8": (1, 2, 2)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The directory of the same run on every mesh."""
    root = tmp_path_factory.mktemp("meshes")
    inputs, commands = write_inputs(root), []
    for name, (data, fsdp, tensor) in MESHES.items():
        mesh = {"mesh__data": data, "mesh__fsdp": fsdp, "mesh__tensor": tensor}
        settings = {"trainer__steps": 3, "reference_cache": root / f"reference {name}"}
        commands.append(run_flags(inputs, root / name, **mesh, **settings))
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps(commands)],
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {name: root / name for name in MESHES}


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

"""Runs that hold no delta but both models, next to runs that hold it, and stopped on the way."""

from __future__ import annotations

import json
import shutil

import jax
import numpy as np
import optax
import pytest

import omerge_jax as om
from tests.train.tiny_runs import read_tensors, run_flags, write_inputs
from train.cli import main
from train.config import OptimizerOptions
from train.optimizers.build import make_optimizer
from train.training.step import init_state, make_train_step


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def names_in_checkpoint(run, step):
    """Paths of the arrays, as Orbax has noted them."""
    file = run / "checkpoints" / str(step) / "state" / "_METADATA"
    return set(json.loads(file.read_text())["tree_metadata"])


@pytest.mark.slow
def test_run_is_that_with_a_delta_and_goes_on_after_a_stop(inputs, tmp_path):
    settings = {"trainer__steps": 4, "trainer__save_every": 2, "data__eval_fraction": None}
    runs = {name: tmp_path / name for name in ("dense", "recompute")}
    settings |= {"optimizer__alpha": 0.1, "data__buckets": 1}
    commands = {
        name: ["dpo", *run_flags(inputs, run, **settings, optimizer__storage=name)]
        for name, run in runs.items()
    }
    for command in commands.values():
        assert main(command) == 0
    dense, recomputed = (read_tensors(run / "export") for run in runs.values())
    for name, value in dense.items():
        np.testing.assert_array_equal(recomputed[name], value)
    names = {name: names_in_checkpoint(run, 4) for name, run in runs.items()}
    held = {name: [n for n in found if "'reference_delta', " in n] for name, found in names.items()}
    assert len(held["dense"]) == len([n for n in names["dense"] if n.startswith("('params', ")])
    assert held["recompute"] == []
    run = runs["recompute"]
    for path in (run / "checkpoints" / "4", run / "export"):
        shutil.rmtree(path)
    (run / "summary.json").unlink()
    assert main(commands["recompute"]) == 0
    again = read_tensors(run / "export")
    assert all(np.array_equal(again[name], recomputed[name]) for name in recomputed)


@pytest.mark.parametrize("name", ["on_dare", "on_ties", "on_dare_adamw", "on_ties_adamw"])
def test_step_takes_both_models(name):
    rng = np.random.default_rng(0)
    params, base = ({"w": rng.normal(size=(8, 16)).astype(np.float32)} for _ in range(2))
    delta, models = om.task_vector(params, base), {"reference_params": params, "base_params": base}
    ends = []
    for storage in ("dense", "recompute"):
        options = OptimizerOptions(
            name=name, storage=storage, learning_rate=1e-2, alpha=0.1, density=0.5
        )
        recomputes = storage == "recompute"
        assert options.delta_storage == storage
        assert options.holds_delta == (not recomputes)
        tx = make_optimizer(options, optax.constant_schedule(1e-2))
        step = make_train_step(lambda p, b: (((p["w"] - b["x"]) ** 2).mean(), {}), tx)
        state = init_state(params, tx, None if recomputes else delta)
        for _ in range(3):
            state, _ = step(state, {"x": np.ones((1, 16))}, {}, models if recomputes else {})
        ends.append(jax.device_get(state["params"]["w"]))
    np.testing.assert_array_equal(*ends)
    assert np.abs(ends[0] - params["w"]).max() > 1e-3


def test_type_of_a_delta_that_is_not_held_is_refused(inputs, tmp_path, capsys):
    changes = {"optimizer__storage": "recompute", "optimizer__delta_dtype": "bfloat16"}
    assert main(["dpo", *run_flags(inputs, tmp_path / "run", **changes)]) == 2
    assert (
        "optimizer.delta_dtype is bfloat16, but with storage recompute" in capsys.readouterr().err
    )

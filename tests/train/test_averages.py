"""The moving average of the weights, and the reference that follows the policy, by hand in numpy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train.builders import make_batch, make_model
from tests.train.tiny_runs import read_tensors, run_flags, write_inputs
from train.cli import main
from train.objectives.preference import preference_loss, reference_logps_fn
from train.training.averages import ParameterAverages
from train.training.checkpoint import restore_params
from train.training.step import init_state, make_train_step

RATE = 0.1


def quadratic(params, batch):
    return jnp.sum(jnp.square(params["w"] - batch["x"][0])), {}


def walk(averages, steps, dtype=jnp.float32):
    """States of gradient descent on a quadratic, on the host."""
    tx = optax.sgd(RATE)
    step = make_train_step(
        quadratic, tx, averages=averages, reference_columns=lambda params, batch: {}
    )
    state = init_state({"w": jnp.array([1.0, -2.0], dtype)}, tx, averages=averages)
    states = [jax.device_get(state)]
    for number in range(steps):
        state, _ = step(state, {"x": np.full((1, 2), number, np.float32)})
        states.append(jax.device_get(state))
    return states


def test_average_is_the_exponential_one():
    states = walk(ParameterAverages(ema_decay=0.75), 5)
    mean = states[0]["params"]["w"].astype(np.float64)
    for state in states[1:]:
        mean = 0.75 * mean + 0.25 * state["params"]["w"]
        np.testing.assert_allclose(state["ema"]["w"], mean, rtol=1e-6)


def test_average_of_bfloat16_is_float32_and_moves():
    states = walk(ParameterAverages(ema_decay=0.999), 3, jnp.bfloat16)
    assert states[-1]["ema"]["w"].dtype == np.float32
    assert (states[1]["ema"]["w"] != states[0]["ema"]["w"]).all()


@pytest.mark.parametrize("alpha", [0.6, 1.0])
def test_reference_follows_every_few_steps(alpha):
    states = walk(ParameterAverages(mixup_alpha=alpha, sync_steps=2), 5)
    reference = states[0]["params"]["w"].astype(np.float64)
    for number, state in enumerate(states[1:], start=1):
        if number % 2 == 0:
            reference = alpha * state["params"]["w"] + (1 - alpha) * reference
        np.testing.assert_allclose(state["reference"]["w"], reference, rtol=1e-6)


def test_a_skipped_step_moves_no_copy():
    averages, tx = ParameterAverages(ema_decay=0.5, mixup_alpha=1.0, sync_steps=1), optax.sgd(RATE)
    step = make_train_step(
        quadratic, tx, averages=averages, reference_columns=lambda params, batch: {}
    )
    state = init_state({"w": jnp.array([1.0, -2.0])}, tx, averages=averages)
    state, _ = step(state, {"x": np.ones((1, 2), np.float32)})
    before = jax.device_get(state)
    state, metrics = step(state, {"x": np.full((1, 2), np.nan, np.float32)})
    assert metrics["skipped_steps"] == 1
    for name in ("params", "ema", "reference"):
        np.testing.assert_array_equal(state[name]["w"], before[name]["w"])
    state, _ = step(state, {"x": np.zeros((1, 2), np.float32)})
    assert (np.asarray(state["ema"]["w"]) != before["ema"]["w"]).all()
    np.testing.assert_array_equal(state["reference"]["w"], state["params"]["w"])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_loss_is_relative_to_the_reference_of_the_state(accumulate):
    graphdef, params = make_model()
    batch = make_batch(("chosen", "rejected"))
    score = reference_logps_fn(graphdef)

    def columns(params, batch):
        chosen, rejected = score(params, batch)
        return {"reference_chosen_logps": chosen, "reference_rejected_logps": rejected}

    tx, averages = optax.sgd(0.5), ParameterAverages(mixup_alpha=1.0, sync_steps=2)
    step = make_train_step(
        preference_loss(graphdef),
        tx,
        microbatches=accumulate,
        averages=averages,
        reference_columns=columns,
    )
    state = init_state(params, tx, averages=averages)
    rewards = []
    for _ in range(4):
        state, metrics = step(state, batch)
        rewards.append(abs(float(metrics["rewards/chosen"])))
    # Steps 1 and 3 are the first ones after the reference became the policy.
    assert max(rewards[0], rewards[2]) < 1e-5
    assert min(rewards[1], rewards[3]) > 1e-3


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_a_run_with_both_resumes_to_the_same_bits_and_exports_the_average(inputs, tmp_path, capsys):
    run, plain = tmp_path / "run", tmp_path / "plain"
    fields = {"trainer__steps": 3, "trainer__save_every": 1, "data__eval_fraction": None} | {
        "trainer__ema__decay": 0.5,
        "sync_ref_model": "true",
        "ref_model_mixup_alpha": 1.0,
        "ref_model_sync_steps": 1,
        "trainer__gradient_accumulation_steps": 2,
    }
    arguments = ["dpo", *run_flags(inputs, run, **fields)]
    assert main(arguments) == 0
    assert all(abs(row["rewards/chosen"]) < 1e-4 for row in rows_of(run))  # synced at every step
    expected = read_tensors(run / "export")
    (run / "summary.json").unlink()
    shutil.rmtree(run / "checkpoints" / "3")
    shutil.rmtree(run / "export")
    assert main(arguments) == 0
    assert "Resuming after step 2 of 3" in capsys.readouterr().out
    found = read_tensors(run / "export")
    assert all((expected[name] == found[name]).all() for name in expected)
    assert main(["export", "--run", str(run), "--output", str(plain)]) == 0
    again = read_tensors(plain)
    assert all((expected[name] == again[name]).all() for name in expected)


def test_the_best_step_is_exported_as_its_average_beside_frozen_weights(
    inputs, tmp_path, monkeypatch, capsys
):
    values = iter([0.0, 0.5, 0.1])  # before training, at step 1, at step 2

    def make_evaluate(*args, **settings):
        return lambda params: {"eval_loss": -next(values)}

    monkeypatch.setattr("train.commands.dpo.evaluate_preferences", make_evaluate)
    run, single = tmp_path / "run", tmp_path / "single"
    fields = {"trainer__steps": 2, "trainer__eval_every": 1, "model__trainable": "[down_proj]"} | {
        "trainer__ema__decay": 0.5,
        "trainer__export_best": "eval_loss",
        "optimizer__storage": "dense",
    }
    assert main(["dpo", *run_flags(inputs, run, **fields)]) == 0
    assert "Best by eval_loss: step 1." in capsys.readouterr().out
    command = ["export", "--run", str(run), "--step", "1", "--output", str(single)]
    assert main(command) == 0
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shape = jax.ShapeDtypeStruct((2, 48, 32), jnp.float32, sharding=place)
    held = {"layers": {"mlp": {"down_proj": {"kernel": shape}}}}
    mean = restore_params(run / "checkpoints", 1, held, "ema")
    start, best = read_tensors(Path(inputs["model"])), read_tensors(run / "export")
    again = read_tensors(single)
    for name, tensor in best.items():
        assert (tensor == again[name]).all()
        if "down_proj" in name:
            layer = int(name.split(".")[2])
            kernel = np.asarray(mean["layers"]["mlp"]["down_proj"]["kernel"])[layer]
            np.testing.assert_array_equal(tensor, kernel.T)
            assert (tensor != start[name]).any()
        else:
            np.testing.assert_array_equal(tensor, start[name])


def test_a_reference_follows_only_where_the_loss_has_one(inputs, tmp_path, capsys):
    fields = {"sync_ref_model": "true", "loss__type": "simpo"}
    assert main(["dpo", *run_flags(inputs, tmp_path / "run", **fields)]) == 2
    assert "loss.type simpo has no reference" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ref_model_sync_steps": 4},
            "ref_model_sync_steps is set to 4, but sync_ref_model is not",
        ),
        (
            {"sync_ref_model": "true", "ref_model_mixup_alpha": 1.5},
            "ref_model_mixup_alpha must be in (0, 1], got 1.5",
        ),
        ({"trainer__ema__decay": 1.0}, "trainer.ema.decay must be in [0, 1), got 1.0"),
    ],
)
def test_settings_that_do_not_fit(changes, message, inputs, tmp_path, capsys):
    assert main(["dpo", *run_flags(inputs, tmp_path / "run", **changes)]) == 2
    assert message in capsys.readouterr().err

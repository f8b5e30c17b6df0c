"""Checkpoints: bit-exact round trips, what stays, and what a killed save leaves behind."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import omerge_jax as om
from train.checkpoint import Checkpoints, abstract, restore_params
from train.config import UserError
from train.step import init_state

TX = optax.chain(optax.adamw(1e-3), om.on_dare(alpha=1e-3, density=0.5, every_k=2))


def make_state(seed: int = 0):
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "w": jax.random.normal(keys[0], (8, 4)),
        "b": jax.random.normal(keys[1], (3,), jnp.bfloat16),
    }
    delta = {"w": jax.random.normal(keys[2], (8, 4)), "b": jnp.ones(3, jnp.bfloat16)}
    return init_state(params, TX, delta)


def assert_same(one, other) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert left.dtype == right.dtype
        np.testing.assert_array_equal(np.asarray(left), np.asarray(right))


def test_round_trip_is_bit_exact(tmp_path):
    state, position = make_state(), {"next_index": 7, "epoch": [1, 2]}
    with Checkpoints(tmp_path / "c") as saved:
        assert saved.latest() is None
        saved.save(3, state, position)
        saved.wait()
        assert saved.latest() == 3
    like = abstract(jax.eval_shape(make_state))
    with Checkpoints(tmp_path / "c") as saved:
        restored, found = saved.restore(3, like)
        assert_same(restored, state)
        assert found == position
    assert_same(restore_params(tmp_path / "c", 3, like["params"]), state["params"])


def test_state_may_be_donated_while_it_is_written(tmp_path):
    state = make_state()
    kept = jax.tree.map(np.asarray, jax.device_get(state))
    overwrite = jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)
    with Checkpoints(tmp_path) as saved:
        saved.save(1, state, {})
        overwrite(state)
        saved.wait()
        assert_same(saved.restore(1, abstract(jax.eval_shape(make_state)))[0], kept)


def test_due_steps_and_kept_ones(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path, every=2, keep=2) as saved:
        assert [step for step in range(1, 8) if saved.due(step)] == [2, 4, 6]
        for step in (2, 4, 6, 7):
            saved.save(step, state, {})
        saved.wait()
        assert saved.steps() == [6, 7]
    with Checkpoints(tmp_path / "never") as saved:
        assert not any(saved.due(step) for step in range(1, 8))


def test_remains_of_a_killed_save_do_not_count(tmp_path):
    with Checkpoints(tmp_path) as saved:
        saved.save(5, make_state(), {})
    remains = tmp_path / "10.orbax-checkpoint-tmp"
    (remains / "state").mkdir(parents=True)
    (remains / "state" / "half.bin").write_bytes(b"half")
    with Checkpoints(tmp_path, read_only=True) as saved:
        assert saved.latest() == 5
    assert remains.exists()  # reading leaves everything as it is
    with Checkpoints(tmp_path, every=5, keep=2) as saved:
        assert saved.latest() == 5
        saved.save(10, make_state(1), {})
        saved.wait()
        assert saved.steps() == [5, 10]
        assert_same(
            saved.restore(10, abstract(jax.eval_shape(make_state)))[0]["params"],
            make_state(1)["params"],
        )
    assert not remains.exists()


def test_other_shapes_are_refused(tmp_path):
    with Checkpoints(tmp_path) as saved:
        saved.save(1, make_state(), {})
    like = abstract(jax.eval_shape(make_state))
    like["params"]["w"] = jax.ShapeDtypeStruct((9, 4), jnp.float32, sharding=like["step"].sharding)
    with (
        Checkpoints(tmp_path) as saved,
        pytest.raises(UserError, match=r"checkpoint 1 in .* cannot be restored"),
    ):
        saved.restore(1, like)

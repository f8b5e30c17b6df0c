"""A step that is not finite changes nothing but counters."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import omerge_jax as om
from train.training.step import init_state, make_train_step

OPTIMIZERS = {
    "adamw": lambda: optax.adamw(1e-2),
    "on_dare": lambda: optax.chain(optax.adamw(1e-2), om.on_dare(0.1, density=0.5, every_k=2)),
    "compensated": lambda: om.on_ties_adamw(1e-2, alpha=0.1, density=0.5, rounding="compensated"),
}


def make_params() -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0))
    return {
        "w": jax.random.normal(keys[0], (8, 4)),
        "b": jax.random.normal(keys[1], (3,), jnp.bfloat16),
    }


def loss_fn(params: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    loss = sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(params))
    # The root has an infinite gradient at 0, where its value is finite.
    return loss * batch["factor"] + jnp.sqrt(batch["root"] * params["w"][0, 0] ** 2), {}


GOOD = {"factor": np.float32(1), "root": np.float32(1)}
BAD = {
    "nan": {**GOOD, "factor": np.float32(np.nan)},
    "inf": {**GOOD, "factor": np.float32(np.inf)},
    "overflow of the norm": {**GOOD, "factor": np.float32(1e30)},
    "gradient alone": {**GOOD, "root": np.float32(0)},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bad", BAD)
def test_bad_step_changes_counters_alone(optimizer, bad):
    tx, params = OPTIMIZERS[optimizer](), make_params()
    delta = None if optimizer == "adamw" else jax.tree.map(jnp.ones_like, params)
    step, state = make_train_step(loss_fn, tx), init_state(params, tx, delta)
    state, _ = step(state, GOOD)
    before = jax.device_get(state)
    for count in (1, 2):
        state, metrics = step(state, BAD[bad])
        assert not np.isfinite([metrics["loss"], metrics["grad_norm"]]).all()
        assert (metrics["skipped_steps"], metrics["skipped_in_a_row"]) == (count, count)
    for name in ("params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state[name]), before[name])
    assert int(state["step"]) == 3
    state, metrics = step(state, GOOD)
    assert (metrics["skipped_steps"], metrics["skipped_in_a_row"]) == (2, 0)
    assert (np.asarray(state["params"]["w"]) != before["params"]["w"]).any()
    assert step._cache_size() == 1  # type: ignore[attr-defined]


def test_state_is_still_donated():
    tx, params = optax.adamw(1e-2), {"w": jnp.ones((512, 1024))}
    step: Any = make_train_step(loss_fn, tx)
    compiled = step.lower(init_state(params, tx), GOOD).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= 3 * params["w"].nbytes

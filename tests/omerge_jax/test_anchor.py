"""The pull towards the start against its closed form, and where it comes in a chain."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import omerge_jax as om


def _run(tx, params, grads, steps):
    state = tx.init(params)
    for _ in range(steps):
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_alone_it_shrinks_the_distance_geometrically():
    start = {"w": jnp.array([1.0, -2.0])}
    tx = om.anchored(0.1)
    state = tx.init(start)
    params = {"w": start["w"] + jnp.array([3.0, 4.0])}
    for _ in range(5):
        updates, state = tx.update({"w": jnp.zeros(2)}, state, params)
        params = optax.apply_updates(params, updates)
    expected = np.array([1.0, -2.0]) + 0.9**5 * np.array([3.0, 4.0])
    np.testing.assert_allclose(params["w"], expected, rtol=1e-6)


def test_constant_updates_end_at_their_ratio_to_the_rate():
    # θ − θ₀ = u·(1 − (1 − r)ⁿ)/r, the sum of a geometric series.
    tx = optax.chain(optax.sgd(1.0), om.anchored(0.2))
    end = _run(tx, {"w": jnp.array([5.0])}, {"w": jnp.array([-1.0])}, 12)
    np.testing.assert_allclose(end["w"], 5 + (1 - 0.8**12) / 0.2, rtol=1e-6)


def test_the_gate_takes_back_only_what_goes_against_delta():
    delta = {"w": jnp.array([1.0, 1.0, 0.0, -2.0])}
    tx = optax.chain(optax.sgd(1.0), om.anchored(0.5, gate="opposing", delta=delta))
    # The first step moves by -grad: the pull sees no distance yet.
    end = _run(tx, {"w": jnp.zeros(4)}, {"w": jnp.array([1.0, -1.0, 1.0, 1.0])}, 2)
    np.testing.assert_allclose(end["w"], [-1.5, 2.0, -2.0, -2.0])


def test_rate_follows_a_schedule_and_works_compiled_in_bfloat16():
    start = {"w": jnp.zeros(3, jnp.bfloat16)}
    tx = om.anchored(lambda step: jnp.where(step == 0, 0.0, 0.5))
    state = jax.jit(tx.init)(start)
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    first, state = jax.jit(tx.update)({"w": jnp.zeros(3, jnp.bfloat16)}, state, params)
    second, state = jax.jit(tx.update)({"w": jnp.zeros(3, jnp.bfloat16)}, state, params)
    assert first["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.asarray(first["w"], np.float32), np.zeros(3))
    np.testing.assert_array_equal(np.asarray(second["w"], np.float32), np.full(3, -0.5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rate": 1.5}, r"rate is .* must be in \[0, 1\], got rate = 1.5"),
        ({"rate": 0.1, "gate": "both"}, "gate must be 'all' or 'opposing', got gate = 'both'"),
        ({"rate": 0.1, "gate": "opposing"}, "needs a delta"),
        ({"rate": 0.1, "delta": {"w": jnp.ones(1)}}, "has no use for a delta"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        om.anchored(**arguments)


def test_it_needs_the_parameters():
    tx = om.anchored(0.1)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update({"w": jnp.ones(1)}, tx.init({"w": jnp.ones(1)}))

"""The metrics of a merge against numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import omerge_jax as om


def test_metrics_are_what_numpy_computes():
    rng = np.random.default_rng(0)
    update, delta = (rng.normal(size=(40, 30)).astype(np.float32) for _ in range(2))
    alpha, density = 0.3, 0.25
    tx = om.on_ties(alpha, density, diagnostics=True)
    params = {"w": jnp.ones((40, 30))}
    state = om.with_delta(tx.init(params), {"w": jnp.asarray(delta)})
    updates, state = tx.update({"w": jnp.asarray(update)}, state, params)
    found = {name: float(value) for name, value in om.merge_metrics(state).items()}

    def top(x):
        return np.where(np.abs(x) >= np.sort(np.abs(x).ravel())[-300], x, 0).astype(np.float64)

    f_update, f_delta = top(update), top(delta)
    both = (f_update != 0) & (f_delta != 0)
    merged = np.asarray(updates["w"], np.float64)
    assert found["alpha"] == pytest.approx(alpha)
    assert found["alpha_total"] == pytest.approx(alpha)
    assert found["kept_share"] == pytest.approx(0.25)
    assert found["sign_agreement"] == pytest.approx(
        (np.sign(f_update) == np.sign(f_delta))[both].mean(), rel=1e-5
    )
    ratio = alpha * np.linalg.norm(f_delta) / ((1 - alpha) * np.linalg.norm(f_update))
    assert found["reference_ratio"] == pytest.approx(ratio, rel=1e-5)
    cosine = (update * delta).sum() / np.linalg.norm(update) / np.linalg.norm(delta)
    assert found["cosine"] == pytest.approx(cosine, abs=1e-5)
    assert found["update_norm"] == pytest.approx(np.linalg.norm(merged), rel=1e-5)
    assert found["rounding_lost"] == 0


def test_rounding_lost_counts_updates_that_move_nothing():
    """One ulp of 1 in bfloat16 is 2**-7: smaller updates are lost, larger ones arrive."""
    tx = om.child_tuning(1.0, diagnostics=True)
    params = {"w": jnp.ones(4, jnp.bfloat16)}
    updates = {"w": jnp.asarray([1e-4, 0.1, -1e-4, 0.0], jnp.bfloat16)}
    _, state = jax.jit(tx.update)(updates, tx.init(params), params)
    assert float(om.merge_metrics(state)["rounding_lost"]) == pytest.approx(2 / 3)
    _, state = tx.update(updates, tx.init(params))
    assert np.isnan(float(om.merge_metrics(state)["rounding_lost"]))


def test_several_merges_are_told_apart():
    labels = {"a": "x", "b": "y"}
    by_label = {"x": om.on_dare(0.1, 0.5), "y": om.on_ties(0.2, 0.5)}
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    tx = optax.partition(by_label, labels)
    state = om.with_delta(tx.init(params), params)
    _, state = tx.update(params, state, params)
    found = om.merge_metrics(state)
    assert float(found["alpha/0"]) == pytest.approx(0.1)
    assert float(found["alpha/1"]) == pytest.approx(0.2)
    assert om.merge_metrics(optax.adamw(1e-3).init(params)) == {}


@pytest.mark.parametrize("every_k", [1, 2])
def test_measuring_every_few_steps_changes_no_update(every_k):
    params, delta = {"w": jnp.arange(1.0, 50.0)}, {"w": jnp.sin(jnp.arange(49.0))}
    states, trajectories = {}, {}
    for diagnostics in (False, True, 3):
        tx = om.on_ties(0.3, 0.5, every_k=every_k, diagnostics=diagnostics)
        state = om.with_delta(tx.init(params), delta)
        steps = []
        for step in range(6):
            grads = {"w": jnp.cos(params["w"] + step)}
            updates, state = tx.update(grads, state, params)
            steps.append((updates["w"], om.merge_metrics(state)))
        trajectories[diagnostics] = np.stack([u for u, _ in steps])
        states[diagnostics] = [metrics for _, metrics in steps]
    np.testing.assert_allclose(trajectories[3], trajectories[True], rtol=1e-6)
    np.testing.assert_allclose(trajectories[False], trajectories[True], rtol=1e-6)
    for name, value in states[True][5].items():
        assert float(states[3][5][name]) == pytest.approx(float(value), rel=1e-5, abs=1e-6), name
    if every_k == 1:
        norms = [float(m["update_norm"]) for m in states[3]]
        assert norms[0] == norms[1]
        assert norms[1] != norms[2] == norms[3] == norms[4] != norms[5]


def test_a_bad_period_is_refused():
    with pytest.raises(ValueError, match="diagnostics must be a bool or a non-negative Python int"):
        om.on_dare(0.1, 0.5, diagnostics=-1)


def test_counts_do_not_stop_at_the_last_exact_float():
    entries = 2**25 + 2**12
    tx = om.child_tuning(0.5, diagnostics=True, rescale="none")
    params = {"w": jnp.ones((2**13 + 1, 2**12), jnp.bfloat16)}
    _, state = jax.jit(tx.update)(params, tx.init(params))
    metrics = om.merge_metrics(state)
    assert float(metrics["kept_share"]) == pytest.approx(0.5, abs=1e-3)
    assert float(metrics["update_norm"]) == pytest.approx((entries / 2) ** 0.5, rel=1e-3)

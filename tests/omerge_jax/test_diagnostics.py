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
    tx = om.on_ties(alpha, density=density, diagnostics=True)
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
    by_label = {"x": om.on_dare(0.1, density=0.5), "y": om.on_ties(0.2, density=0.5)}
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    tx = optax.partition(by_label, labels)
    state = om.with_delta(tx.init(params), params)
    _, state = tx.update(params, state, params)
    found = om.merge_metrics(state)
    assert float(found["alpha/0"]) == pytest.approx(0.1)
    assert float(found["alpha/1"]) == pytest.approx(0.2)
    assert om.merge_metrics(optax.adamw(1e-3).init(params)) == {}


@pytest.mark.parametrize("every_k", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("factory", [om.on_dare, om.on_ties])
def test_measuring_changes_no_update(factory, every_k):
    params, delta = {"w": jnp.arange(1.0, 50.0)}, {"w": jnp.sin(jnp.arange(49.0))}
    trajectories = []
    for diagnostics in (False, True):
        tx = factory(0.3, density=0.5, every_k=every_k, diagnostics=diagnostics)
        state = om.with_delta(tx.init(params), delta)
        steps = []
        for step in range(6):
            updates, state = tx.update({"w": jnp.cos(params["w"] + step)}, state, params)
            steps.append(updates["w"])
        trajectories.append(np.stack(steps))
    np.testing.assert_array_equal(*trajectories)


def large(seed, shape=(8192, 256)):
    """Rows of very different scales, so that a sample of a few neighbours would be far off."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(size=(shape[0], 1)))
    return jnp.asarray(scale * rng.normal(size=shape), jnp.float32)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["dare", "ties", "band", "plain callable"])
def test_a_large_leaf_is_estimated_from_a_sample(name, fused):
    """Against the same metrics of a step whose leaves are split into ones small enough to count."""
    if name == "plain callable" and fused:
        pytest.skip("a callable that takes no samples is computed whole, fused or not")
    sparsifier = {
        "dare": om.random(0.3, seed=1),
        "ties": om.magnitude(0.3),
        "band": om.band(0.3, gamma=0.05),
        "plain callable": lambda x, ctx: jnp.where(x > 0, x, 0),
    }[name]
    params, delta, grads = ({"w": large(seed)} for seed in range(3))
    merge = om.online_merge(sparsifier, om.sign(), alpha=0.3, diagnostics=True)
    inner = optax.adam(1e-2)
    tx = om.fused_chain(inner, merge) if fused else optax.chain(inner, merge)
    state = om.with_delta(tx.init(params), delta)
    updates, state = jax.jit(tx.update)(grads, state, params)
    found = {name: float(value) for name, value in om.merge_metrics(state).items()}
    plain, _ = inner.update(grads, inner.init(params), params)
    ctx = {"step": jnp.int32(0), "path": ("w",)}
    kept = sparsifier(plain["w"], om.SparsifyContext(role="update", **ctx))
    kept_delta = sparsifier(delta["w"], om.SparsifyContext(role="delta", **ctx))
    kept, kept_delta = np.asarray(kept, np.float64), np.asarray(kept_delta, np.float64)
    both = (kept != 0) & (kept_delta != 0)
    ratio = 0.3 * np.linalg.norm(kept_delta) / (0.7 * np.linalg.norm(kept))
    assert found["kept_share"] == pytest.approx((kept != 0).mean(), rel=0.05)
    assert found["sign_agreement"] == pytest.approx(
        ((kept > 0) == (kept_delta > 0))[both].mean(), 0.05
    )
    assert found["reference_ratio"] == pytest.approx(ratio, rel=0.15)
    norm = np.linalg.norm(np.asarray(updates["w"], np.float64))
    assert found["update_norm"] == pytest.approx(norm, rel=0.15)


def test_diagnostics_is_a_bool():
    with pytest.raises(
        ValueError, match=r"diagnostics must be True or False .* got diagnostics = 10"
    ):
        om.on_dare(0.1, density=0.5, diagnostics=10)


def test_counts_do_not_stop_at_the_last_exact_float():
    entries = 2**25 + 2**12
    tx = om.child_tuning(0.5, diagnostics=True, rescale="none")
    params = {"w": jnp.ones((2**13 + 1, 2**12), jnp.bfloat16)}
    _, state = jax.jit(tx.update)(params, tx.init(params))
    metrics = om.merge_metrics(state)
    assert float(metrics["kept_share"]) == pytest.approx(0.5, abs=1e-3)
    assert float(metrics["update_norm"]) == pytest.approx((entries / 2) ** 0.5, rel=1e-3)

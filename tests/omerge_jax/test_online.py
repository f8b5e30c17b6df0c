"""Online merging against float64 references written from the paper and the authors' order."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import omerge_jax as om
from omerge_jax import random_mask

RATE = 1e-2


def make(seed=0, shapes=None):
    rng = np.random.default_rng(seed)
    shapes = shapes or {"w": (24, 17), "b": (13,)}
    return {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}


def run(tx, params, grads, delta=None):
    state = tx.init(params)
    state = state if delta is None else om.with_delta(state, delta)
    update = jax.jit(tx.update)
    trajectory = []
    for g in grads:
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(params)
    assert update._cache_size() == 1, "the second call compiled again"
    return trajectory, state


def top_share(x, density):
    """TIES in numpy: the int(p·n) largest magnitudes; dense where that is none."""
    k = int(density * x.size)
    if k < 1:
        return x
    return np.where(np.abs(x) >= np.sort(np.abs(x).ravel())[-k], x, 0)


def ties_paper(update, delta, alpha):
    a, b = (1 - alpha) * update, alpha * delta
    return np.where(a * b >= 0, a + b, np.where(np.abs(a) >= np.abs(b), a, b))


def ties_authors(update, delta, alpha):
    elected = np.where(update + delta >= 0, 1, -1)
    a, b = (1 - alpha) * update, alpha * delta
    return np.where(np.sign(a) == elected, a, 0) + np.where(np.sign(b) == elected, b, 0)


@pytest.mark.parametrize(
    ("election", "consensus"), [("weighted", ties_paper), ("unweighted", ties_authors)]
)
@pytest.mark.parametrize(("alpha", "density"), [(0.3, 0.25), (1e-4, 0.6), (0.3, 1.0)])
def test_on_ties_follows_the_formula(election, consensus, alpha, density):
    params, delta, grads = make(0), make(1), [make(2), make(3)]
    tx = optax.chain(optax.sgd(RATE), om.on_ties(alpha, density=density, election=election))
    trajectory, _ = run(tx, params, grads, delta)
    for name in params:
        theta = np.asarray(params[name], np.float64)
        tau = top_share(np.asarray(delta[name], np.float64), density)
        for step, g in enumerate(grads):
            update = top_share(np.asarray(np.float32(-RATE) * np.asarray(g[name])), density)
            theta = theta + consensus(update.astype(np.float64), tau, alpha)
            np.testing.assert_allclose(trajectory[step][name], theta, rtol=2e-6, atol=2e-7)


def masks_of(path, shape, density, step, role, seed=0):
    key = {"seed": seed, "step": step, "path": (path,), "role": role}
    return np.asarray(random_mask.bernoulli(shape, density, **key))


@pytest.mark.parametrize("semantics", ["authors", "paper"])
def test_on_dare_follows_the_formula(semantics):
    alpha, density = 0.2, 0.4
    params, delta, grads = make(0), make(1), [make(2), make(3), make(4)]
    paper = {"rescale": "none", "clip": None}
    authors = {"delta_mask": "fixed", "rounding": "nearest"}
    tx = om.on_dare(alpha, density=density, **(paper if semantics == "paper" else authors))
    trajectory, _ = run(optax.chain(optax.sgd(RATE), tx), params, grads, delta)
    for name in params:
        theta = np.asarray(params[name], np.float64)
        for step, g in enumerate(grads):
            update = -RATE * np.asarray(g[name], np.float64)
            tau = np.asarray(delta[name], np.float64)
            keep = masks_of(name, update.shape, density, step, "update")
            tau_step = step if semantics == "paper" else 0
            keep_tau = masks_of(name, update.shape, density, tau_step, "delta")
            update, tau = update * keep, tau * keep_tau
            if semantics == "authors":
                update, tau = update / density, np.clip(tau / density, -1, 1)
            theta = theta + (1 - alpha) * update + alpha * tau
            np.testing.assert_allclose(trajectory[step][name], theta, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize(
    "tx",
    [
        om.on_dare(0, density=1.0),
        om.on_ties(0, density=1.0),
        om.child_tuning(1.0),
        om.keep_largest(1.0),
    ],
)
def test_all_kept_without_reference_is_the_inner_optimizer_exactly(tx):
    params, grads = make(0), [make(i) for i in range(2, 7)]
    plain, _ = run(optax.adamw(RATE), params, grads)
    assert tx.init(params).reference_delta is None
    merged, _ = run(optax.chain(optax.adamw(RATE), tx), params, grads)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(merged), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("rescale", ["none", "norm"])
def test_keep_largest_is_a_sort_of_every_layer(rescale):
    rng = np.random.default_rng(0)
    params = {"stacked": jnp.zeros((3, 40, 25)), "w": jnp.zeros(7)}
    gradients = {name: rng.normal(size=x.shape).astype(np.float32) for name, x in params.items()}
    axes = {"stacked": 1, "w": 0}
    tx = optax.chain(optax.sgd(RATE), om.keep_largest(0.1, rescale=rescale, layer_axes=axes))
    found, _ = tx.update(gradients, tx.init(params), params)
    # 7 entries at 0.1 keep none, and a tensor that would keep none stays whole (the authors' rule).
    np.testing.assert_array_equal(found["w"], -np.float32(RATE) * gradients["w"])
    for layer, gradient in zip(np.asarray(found["stacked"]), gradients["stacked"], strict=True):
        flat = -np.float32(RATE) * gradient.ravel()
        expected = np.where(np.argsort(np.argsort(-np.abs(flat))) < 100, flat, 0)
        if rescale == "norm":
            expected *= np.abs(flat).sum() / np.abs(expected).sum()
        np.testing.assert_allclose(layer.ravel(), expected, rtol=1e-6)


def test_fixed_delta_mask_stays_and_fresh_one_moves():
    delta = {"w": jnp.ones(2000)}
    zero = {"w": jnp.zeros(2000)}
    for mode, changes in [("fixed", False), ("fresh", True)]:
        tx = om.on_dare(0.5, density=0.3, delta_mask=mode, clip=None)
        state = om.with_delta(tx.init(zero), delta)
        first, state = tx.update(zero, state, zero)
        second, _ = tx.update(zero, state, zero)
        assert bool((first["w"] != second["w"]).any()) == changes
        assert 0.25 < float((first["w"] != 0).mean()) < 0.35


@pytest.mark.parametrize("name", ["dare", "ties"])
def test_step_k_is_algorithm_2(name):
    """Between merges the inner optimizer runs free; on step K the span is rolled back and merged."""
    every, alpha, density = 3, 0.3, 0.5
    params, delta, grads = make(0), make(1), [make(i) for i in range(2, 11)]
    factory = om.on_dare if name == "dare" else om.on_ties
    tx = optax.chain(
        optax.sgd(RATE), factory(alpha, density=density, every_k=every, rounding="nearest")
    )
    trajectory, state = run(tx, params, grads, delta)
    merge_once = factory(alpha, density=density, rounding="nearest")
    rolled_back = params
    for step, _ in enumerate(grads):
        if (step + 1) % every:
            continue
        span = jax.tree.map(lambda *g: -RATE * sum(g), *grads[step + 1 - every : step + 1])
        single = om.with_delta(merge_once.init(params), delta)
        single = single._replace(merge_count=jnp.int32(step))
        merged, _ = merge_once.update(span, single)
        rolled_back = optax.apply_updates(rolled_back, merged)
        for leaf in params:
            np.testing.assert_allclose(
                trajectory[step][leaf], rolled_back[leaf], rtol=1e-5, atol=1e-6
            )
    assert float(om.merge_metrics(state)["alpha_total"]) == pytest.approx(3 * alpha)
    free, _ = run(optax.sgd(RATE), params, grads[:2])
    np.testing.assert_array_equal(trajectory[1]["w"], free[1]["w"])


@pytest.mark.parametrize("factory", [om.on_dare, om.on_ties])
def test_schedules_are_evaluated_at_the_optimizer_step(factory):
    params, delta, grads = make(0), make(1), [make(i) for i in range(2, 6)]
    alpha = optax.linear_schedule(0.4, 0.0, 4)
    density = optax.linear_schedule(0.8, 0.4, 4)
    fixed = {"delta_mask": "fixed"} if factory is om.on_dare else {}
    scheduled, state = run(factory(alpha, density=density, **fixed), params, grads, delta)
    # The fixed delta is sparsified once, at the density of step 0.
    theta = params
    for step, g in enumerate(grads):
        value = jnp.float32(density(step))
        at_step = lambda s, v=value: jnp.where(s == 0, 0.8, v)  # noqa: E731
        tx = factory(jnp.float32(alpha(step)), density=at_step, **fixed)
        single = om.with_delta(tx.init(params), delta)._replace(merge_count=jnp.int32(step))
        updates, _ = tx.update(g, single, theta)
        theta = optax.apply_updates(theta, updates)
        for name in params:
            np.testing.assert_allclose(scheduled[step][name], theta[name], rtol=1e-6, atol=1e-6)
    assert float(om.merge_metrics(state)["alpha_total"]) == pytest.approx(0.4 + 0.3 + 0.2 + 0.1)


def test_top_share_is_taken_per_stacked_layer():
    params = {"layers": {"w": make(0, {"w": (3, 40, 50)})["w"]}, "head": make(1, {"w": (40,)})["w"]}
    params["layers"]["w"] *= jnp.array([1e-3, 1.0, 1e3])[:, None, None]
    tx = om.on_ties(0, density=0.1, layer_axes=lambda path: int(path[0] == "layers"))
    updates, _ = tx.update(params, tx.init(params))
    kept = np.asarray(updates["layers"]["w"] != 0).sum((1, 2))
    assert kept.tolist() == [200, 200, 200]
    prefix = om.on_ties(0, density=0.1, layer_axes={"layers": 1, "head": 0})
    same, _ = prefix.update(params, prefix.init(params))
    np.testing.assert_array_equal(same["layers"]["w"], updates["layers"]["w"])
    flat = om.on_ties(0, density=0.1)
    pooled, _ = flat.update(params, flat.init(params))
    assert np.asarray(pooled["layers"]["w"] != 0).sum((1, 2)).tolist() == [0, 0, 600]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: om.on_dare(2, density=0.5), r"alpha.*\[0, 1\], got alpha = 2"),
        (lambda: om.on_ties(-0.1, density=0.5), r"alpha.*got alpha = -0.1"),
        (lambda: om.on_dare(0.1, density=0), r"density.*\(0, 1\], got density = 0"),
        (lambda: om.on_ties(0.1, density=1.5), r"density.*got density = 1.5"),
        (lambda: om.on_dare(0.1, density=0.5, every_k=0), "every_k.*at least 1, got every_k = 0"),
        (lambda: om.on_ties(0.1, density=0.5, every_k=2.5), "every_k.*got every_k = 2.5"),
        (
            lambda: om.on_dare(0.1, density=0.5, rescale="x"),
            "rescale must be 'inverse', 'norm' or 'none'",
        ),
        (
            lambda: om.on_ties(0.1, density=0.5, rescale="inverse"),
            "rescale must be 'none' or 'norm'",
        ),
        (
            lambda: om.on_dare(0.1, density=0.5, delta_mask="x"),
            "delta_mask must be 'fixed' or 'fresh'",
        ),
        (
            lambda: om.on_ties(0.1, density=0.5, election="x"),
            "election must be 'unweighted' or 'weighted'",
        ),
        (
            lambda: om.on_ties(0.1, density=0.5, threshold="x"),
            "threshold must be 'exact' or 'sampled'",
        ),
        (
            lambda: om.on_ties(0.1, density=0.5, rounding="x"),
            "rounding must be 'stochastic', 'compensated'",
        ),
        (lambda: om.on_ties(0.1, density=0.5, storage="x"), "storage must be 'dense', 'sparse'"),
        (lambda: om.relative(1.5), r"share.*\[0, 1\], got share = 1.5"),
        (lambda: om.relative(0.5, scope="x"), "scope must be 'global' or 'tensor'"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_update_without_a_delta_says_how_to_set_one():
    params = make(0)
    tx = optax.chain(optax.adamw(RATE), om.on_dare(1e-3, density=0.5))
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"no reference delta for b, w: .*with_delta"):
        jax.jit(tx.update)(params, state, params)


def test_with_delta_reports_what_does_not_fit():
    params = make(0)
    tx = om.on_ties(0.1, density=0.5)
    with pytest.raises(ValueError, match="delta has no leaf w"):
        om.with_delta(tx.init(params), {"b": params["b"]})
    with pytest.raises(ValueError, match=r"delta leaf w has shape \(3,\), the parameter has"):
        om.with_delta(tx.init(params), params | {"w": jnp.ones(3)})
    with pytest.raises(ValueError, match="no online merge that takes a delta"):
        om.with_delta(optax.adamw(RATE).init(params), params)


def test_a_new_delta_is_fitted_anew():
    """Replacing the reference in mid-run must not keep the old delta's threshold."""
    zero = {"w": jnp.zeros(100)}
    tx = om.on_ties(0.5, density=0.1)
    state = om.with_delta(tx.init(zero), {"w": jnp.arange(100.0)})
    _, state = tx.update(zero, state, zero)
    state = om.with_delta(state, {"w": -jnp.arange(100.0) / 1e3})
    updates, _ = tx.update(zero, state, zero)
    assert int((updates["w"] != 0).sum()) == 10


def test_preset_decays_the_merged_parameters():
    """The authors' order: p ← (p + merge(Δθ))·(1 − lr·wd), decay neither masked nor merged."""
    params, delta, g = make(0), make(1), make(2)
    common = {"alpha": 0.2, "density": 0.5}
    plain = om.on_dare_adamw(RATE, **common)
    decayed = om.on_dare_adamw(RATE, weight_decay=0.3, **common)
    (without,), _ = run(plain, params, [g], delta)
    (with_decay,), _ = run(decayed, params, [g], delta)
    for name in params:
        expected = np.asarray(without[name]) * (1 - RATE * 0.3)
        np.testing.assert_allclose(with_decay[name], expected, rtol=1e-6, atol=1e-7)
    masked = om.on_ties_adamw(RATE, weight_decay=0.3, mask={"w": True, "b": False}, **common)
    bare = om.on_ties_adamw(RATE, **common)
    (some,), _ = run(masked, params, [g], delta)
    (none,), _ = run(bare, params, [g], delta)
    np.testing.assert_array_equal(some["b"], none["b"])
    assert bool((some["w"] != none["w"]).any())


def test_preset_adam_is_the_authors_adam():
    """−lr·√(1−β2^t)/(1−β1^t)·m/(√v + eps) in float64, with a large eps that shows its place."""
    params, grads = make(0), [make(i) for i in range(2, 8)]
    tx = om.on_dare_adamw(RATE, b1=0.8, b2=0.95, eps=0.1, alpha=0, density=1.0)
    trajectory, _ = run(tx, params, grads)
    for name in params:
        theta = np.asarray(params[name], np.float64)
        m = v = np.zeros_like(theta)
        for t, g in enumerate(grads, 1):
            g64 = np.asarray(g[name], np.float64)
            m, v = 0.8 * m + 0.2 * g64, 0.95 * v + 0.05 * g64**2
            theta = theta - RATE * np.sqrt(1 - 0.95**t) / (1 - 0.8**t) * m / (np.sqrt(v) + 0.1)
            np.testing.assert_allclose(trajectory[t - 1][name], theta, rtol=1e-6, atol=1e-6)


def test_step_k_in_bfloat16_does_not_roll_back_what_never_moved():
    """Updates too small for bfloat16 are lost; rolling them back would drive parameters down."""
    params = {"w": jnp.ones(100, jnp.bfloat16)}
    updates = {"w": jnp.full(100, 1e-3, jnp.bfloat16)}
    tx = om.child_tuning(0.5, every_k=5, rescale="none")
    state = tx.init(params)
    for _ in range(20):
        merged, state = tx.update(updates, state, params)
        params = optax.apply_updates(params, merged)
    assert float(params["w"].astype(jnp.float32).min()) >= 1


def test_decay_leaves_integer_parameters_alone():
    params = {"w": jnp.ones(3), "n": jnp.int32(1000)}
    tx = om.on_dare_adamw(0.1, weight_decay=0.1, alpha=0, density=1.0)
    grads = {"w": jnp.ones(3), "n": jnp.int32(0)}
    updates, _ = tx.update(grads, tx.init(params), params)
    assert int(updates["n"]) == 0


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_an_injected_density_of_low_precision_still_sparsifies(dtype):
    params = {"w": jnp.asarray(np.random.default_rng(0).normal(size=200_000), dtype)}
    tx = optax.inject_hyperparams(om.on_ties)(alpha=0.1, density=0.1)
    state = jax.jit(om.with_delta)(tx.init(params), {"w": jnp.zeros(200_000)})
    updates, _ = tx.update(params, state, params)
    assert float((updates["w"] != 0).mean()) < 0.12


@pytest.mark.parametrize("seed", [2**31, 2**40 + 3, -1])
def test_any_integer_is_a_seed(seed):
    params = {"w": jnp.ones(64)}
    tx = om.child_tuning(0.5, seed=seed)
    updates, _ = tx.update(params, tx.init(params))
    assert 10 < int((updates["w"] != 0).sum()) < 54


def operations(tx, params, state):
    return str(jax.make_jaxpr(tx.update)(params, state, params))


@pytest.mark.parametrize("storage", ["dense", "sparse"])
def test_a_fixed_delta_is_fitted_when_it_is_set(storage):
    """No step decides whether it is the first one."""
    params = make(0)
    tx = om.on_ties(0.1, density=0.05, storage=storage)
    state = om.with_delta(tx.init(params), make(1))
    assert " cond[" not in operations(tx, params, state)
    fitted = state.delta_fit.values
    _, after = tx.update(params, state, params)
    np.testing.assert_array_equal(after.delta_fit.values, fitted)
    again = om.with_delta(after, make(2))
    assert again.delta_fit.values.shape == fitted.shape
    abstract = jax.eval_shape(om.with_delta, tx.init(params), make(1))
    assert abstract.delta_fit.values.shape == fitted.shape


def test_numbers_that_are_traced_fit_a_fixed_delta_at_every_merge():
    params, delta = make(0), make(1)
    tx = optax.inject_hyperparams(om.on_ties)(alpha=0.1, density=0.5)
    state = om.with_delta(tx.init(params), delta)
    assert state.inner_state.delta_fit is None
    found, _ = jax.jit(tx.update)(params, state, params)
    plain = om.on_ties(0.1, density=0.5)
    expected, _ = jax.jit(plain.update)(params, om.with_delta(plain.init(params), delta), params)
    for name in params:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-6)


def test_step_k_keeps_the_parameters_of_the_last_merge():
    """In their dtype; and none of them where every step merges, also under inject_hyperparams."""
    params = {"w": jnp.ones(8, jnp.bfloat16)}
    tx = om.child_tuning(1.0, every_k=3)
    state = tx.init(params)
    assert state.merged_params["w"].dtype == jnp.bfloat16
    for step in range(7):
        updates, state = tx.update({"w": jnp.full(8, 0.5, jnp.bfloat16)}, state, params)
        params = optax.apply_updates(params, updates)
        # Known from the step after a merge on.
        assert float(state.merged_params["w"][0]) == 1 + 0.5 * (step // 3 * 3)
    with pytest.raises(ValueError, match=r"rolls the parameters back .* call update\(updates"):
        tx.update(params, state)
    injected = optax.inject_hyperparams(om.on_dare)(alpha=0.1, density=0.5)
    assert injected.init(params).inner_state.merged_params is None

"""An alpha relative to the step, against norms in float64, and schedules of alpha."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import omerge_jax as om

SHAPES = {"layers": (3, 20, 30), "head": (40, 5)}


def tree(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {k: jnp.asarray(scale * rng.normal(size=s), jnp.float32) for k, s in SHAPES.items()}


def layer_axes(path):
    return int(path[0] == "layers")


def step(alpha, updates, delta, **options):
    """One step of a linear merge; what is emitted, and the state."""
    options = {"rounding": "nearest", "layer_axes": layer_axes} | options
    tx = om.online_merge(om.identity(), om.linear(), alpha=alpha, **options)
    params = tree(9)
    # Compiled, as a delta of zeros is refused outside of jit.
    state = jax.jit(om.with_delta)(tx.init(params), delta)
    return jax.jit(tx.update)(updates, state, params)


def norm(x):
    return np.linalg.norm(np.asarray(x, np.float64))


def norms(update, delta, emitted):
    """Norms of the two terms of the linear merge that was emitted, entry arrays in float64."""
    update, delta, emitted = (np.asarray(x, np.float64) for x in (update, delta, emitted))
    apart = delta - update
    alpha = ((emitted - update) * apart).sum() / (apart * apart).sum()
    return norm(alpha * delta), norm((1 - alpha) * update), alpha


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e3])
def test_per_tensor_every_tensor_gets_its_share(share, scale):
    updates, delta = tree(0, scale), tree(1)
    emitted, _ = step(om.relative(share, scope="tensor"), updates, delta)
    tensors = [(updates[k], delta[k], emitted[k]) for k in ("head",)]
    tensors += [tuple(t["layers"][i] for t in (updates, delta, emitted)) for i in range(3)]
    for tensor in tensors:
        theirs, ours, _ = norms(*tensor)
        assert theirs / (theirs + ours) == pytest.approx(share, rel=1e-3)


@pytest.mark.parametrize("share", [0.05, 0.5])
def test_globally_all_tensors_share_one_alpha(share):
    updates, delta = tree(0, 1e-3), tree(1)
    updates["head"] *= 100
    emitted, state = step(om.relative(share), updates, delta)
    found = {name: norms(updates[name], delta[name], emitted[name]) for name in SHAPES}
    alphas = [alpha for _, _, alpha in found.values()]
    assert alphas[0] == pytest.approx(alphas[1], rel=1e-3)
    theirs, ours = (np.linalg.norm([terms[i] for terms in found.values()]) for i in (0, 1))
    assert theirs / (theirs + ours) == pytest.approx(share, rel=1e-3)
    assert float(om.merge_metrics(state)["alpha"]) == pytest.approx(alphas[0], rel=1e-3)


def test_the_norms_are_those_of_what_is_kept():
    updates, delta = tree(0, 1e-3), tree(1)
    tx = om.on_dare(om.relative(0.2), density=0.3, rounding="nearest", diagnostics=True)
    params = tree(9)
    state = om.with_delta(tx.init(params), delta)
    _, state = jax.jit(tx.update)(updates, state, params)
    # ‖α·F(τ)‖ ÷ ‖(1 − α)·F(Δθ)‖ for a share of 0.2.
    ratio = float(om.merge_metrics(state)["reference_ratio"])
    assert ratio == pytest.approx(0.2 / 0.8, rel=1e-4)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_nothing_to_compare_with_is_no_reference_term(scope):
    zeros = jax.tree.map(jnp.zeros_like, tree(0))
    for updates, delta in [(zeros, tree(1)), (tree(0), zeros), (zeros, zeros)]:
        emitted, state = step(om.relative(0.3, scope=scope), updates, delta)
        jax.tree.map(np.testing.assert_array_equal, emitted, updates)
        assert float(om.merge_metrics(state)["alpha"]) == 0


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_the_share_can_be_a_schedule_that_ends(scope):
    share = optax.linear_schedule(0.5, 0.0, 2)
    tx = om.online_merge(
        om.identity(), om.linear(), alpha=om.relative(share, scope=scope), rounding="nearest"
    )
    params, updates, delta = tree(9), tree(0), tree(1)
    state = om.with_delta(tx.init(params), delta)
    alphas = []
    for _ in range(4):
        emitted, state = tx.update(updates, state, params)
        alphas.append(float(om.merge_metrics(state)["alpha"]))
    assert alphas[0] > alphas[1] > 0
    assert alphas[2:] == [0, 0]
    jax.tree.map(np.testing.assert_array_equal, emitted, updates)
    assert float(om.merge_metrics(state)["alpha_total"]) == pytest.approx(sum(alphas), rel=1e-5)


def test_it_follows_the_learning_rate():
    """The very point: one share for learning rates decades apart, where a fixed alpha needs two."""
    delta, grads = tree(1), tree(0)
    moved = {}
    for rate in (1e-2, 1e-6):
        tx = optax.chain(
            optax.sgd(rate), om.on_dare(om.relative(0.1), density=1.0, rounding="nearest")
        )
        params = tree(9)
        state = om.with_delta(tx.init(params), delta)
        updates, _ = tx.update(grads, state, params)
        moved[rate] = norm(updates["head"]) / rate
    assert moved[1e-2] == pytest.approx(moved[1e-6], rel=0.02)


@pytest.mark.parametrize("make", [om.on_dare_adamw, om.on_ties_adamw])
@pytest.mark.parametrize("every_k", [1, 3])
def test_it_goes_wherever_an_alpha_goes(make, every_k):
    tx = make(1e-2, alpha=om.relative(0.1, scope="tensor"), density=0.5, every_k=every_k)
    params = tree(9)
    state = om.with_delta(tx.init(params), tree(1))
    update = jax.jit(tx.update)
    for _ in range(4):
        updates, state = update(tree(0), state, params)
        params = optax.apply_updates(params, updates)
    assert update._cache_size() == 1
    assert 0 < float(om.merge_metrics(state)["alpha"]) < 1


def test_a_schedule_of_alpha_that_ends_at_zero_leaves_the_update():
    tx = om.on_dare(optax.linear_schedule(0.5, 0.0, 2), density=1.0, rounding="nearest")
    params, updates = tree(9), tree(0)
    state = om.with_delta(tx.init(params), tree(1))
    for _ in range(3):
        emitted, state = tx.update(updates, state, params)
    jax.tree.map(np.testing.assert_array_equal, emitted, updates)
    assert float(om.merge_metrics(state)["alpha_total"]) == pytest.approx(0.75)


def _around(merge):
    """The same merge inside of other transformations, none of which changes what it emits."""
    yield merge
    yield optax.chain(optax.identity(), merge)
    yield optax.masked(merge, {"layers": True, "head": True})
    yield optax.apply_if_finite(merge, 3)
    several = optax.MultiSteps(merge, 1)  # its gradient_transformation() passes nothing on
    yield optax.GradientTransformationExtraArgs(several.init, several.update)
    yield om.fused_chain(optax.identity(), merge)


@pytest.mark.parametrize("alpha", [0.2, om.relative(0.3), optax.constant_schedule(0.2)])
def test_a_step_can_scale_alpha(alpha):
    updates, delta, params = tree(0), tree(1), tree(9)
    merge = om.online_merge(om.identity(), om.linear(), alpha=alpha, rounding="nearest")
    scaled = {"alpha": 0.1, "share": 0.15}
    smaller = om.relative(scaled["share"]) if isinstance(alpha, om.Relative) else scaled["alpha"]
    half, _ = step(smaller, updates, delta)
    for tx in map(optax.with_extra_args_support, _around(merge)):
        state = om.with_delta(tx.init(params), delta)
        for scale, expected in ((0.5, half), (0.0, updates)):
            found, _ = tx.update(updates, state, params, alpha_scale=jnp.float32(scale))
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, expected)

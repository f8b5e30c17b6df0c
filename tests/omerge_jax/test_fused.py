"""The fused chain is the chain, and a sampled threshold keeps about the share it should."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import omerge_jax as om

RATE = 1e-2
# With a usual eps all magnitudes of Adam's first update agree to the last digits, and which of them
# are the largest depends on how the compiler rounds.
INNER = {
    "adamw": lambda: optax.adamw(RATE, eps=0.1),
    "lion": lambda: optax.lion(RATE),
    "momentum": lambda: optax.sgd(RATE, momentum=0.9, nesterov=True),
    "rmsprop": lambda: optax.rmsprop(RATE),
    "schedule": lambda: optax.adam(
        optax.linear_schedule(RATE, 0, 10), eps=0.1, mu_dtype=jnp.bfloat16
    ),
}


def tree(seed):
    """Leaves that are sampled (a large one) and leaves that are not."""
    rng = np.random.default_rng(seed)
    row_scale = np.exp(rng.normal(size=(2, 4096, 1)))
    large = row_scale * rng.normal(size=(2, 4096, 192))
    return {
        "layers": jnp.asarray(large, jnp.float32),
        "bias": jnp.asarray(rng.normal(size=33), jnp.float32),
        "scale": jnp.float32(rng.normal()),
    }


def layer_axes(path):
    return int(path[0] == "layers")


def walk(tx, steps=2):
    params = tree(0)
    state = om.with_delta(tx.init(params), tree(1))
    update = jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(tree(2 + step), state, params)
        params = optax.apply_updates(params, updates)
    assert update._cache_size() == 1
    return params, updates, state


@pytest.mark.parametrize(
    "inner",
    [
        pytest.param(make, id=name, marks=() if name == "adamw" else pytest.mark.slow)
        for name, make in INNER.items()
    ],
)
@pytest.mark.parametrize("threshold", ["exact", "sampled"])
def test_it_emits_what_the_chain_emits(inner, threshold):
    options = {"threshold": threshold, "layer_axes": layer_axes, "rounding": "nearest"}
    chained, _, before = walk(optax.chain(inner(), om.on_ties(0.1, density=0.3, **options)))
    fused, _, after = walk(om.fused_chain(inner(), om.on_ties(0.1, density=0.3, **options)))
    for name in chained:
        # Computed twice, a threshold may come out an ulp apart and keep one entry more or less.
        same = np.isclose(fused[name], chained[name], rtol=1e-5, atol=1e-6)
        assert same.mean() > 0.9999, name
    assert jax.tree.structure(tuple(after)) == jax.tree.structure(before)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("density", [0.02, 0.1, 0.5])
def test_a_sampled_threshold_keeps_the_share(density, fused):
    """Within 2 % of the density over a few steps, on rows whose scales differ by orders."""
    merge = om.on_ties(0, density=density, threshold="sampled", layer_axes=layer_axes)
    tx = om.fused_chain(optax.adam(RATE), merge) if fused else optax.chain(optax.adam(RATE), merge)
    params = tree(0)
    state = tx.init(params)
    update, shares = jax.jit(tx.update), []
    for step in range(6):
        updates, state = update(tree(2 + step), state, params)
        shares.append(np.asarray(updates["layers"] != 0).mean((1, 2)))
        assert int((updates["bias"] != 0).sum()) == int(density * 33) or density < 0.03
    assert np.mean(shares[1:]) == pytest.approx(density, rel=0.02)
    assert np.abs(np.asarray(shares[1:]) / density - 1).max() < 0.1


def test_a_sampled_threshold_halves_ties_too():
    """After a sign optimizer all magnitudes are equal."""
    tx = om.fused_chain(optax.lion(RATE), om.on_ties(0, density=0.25, threshold="sampled"))
    params = tree(0)
    updates, _ = jax.jit(tx.update)(tree(1), tx.init(params), params)
    assert float((updates["layers"] != 0).mean()) == pytest.approx(0.25, rel=0.02)


@pytest.mark.parametrize(
    ("inner", "operation"),
    [
        (optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(RATE)), "reduce"),
        (optax.adafactor(RATE), "reduce"),
        (optax.contrib.muon(RATE), "dot_general"),
    ],
    ids=["clip", "adafactor", "muon"],
)
def test_an_optimizer_that_mixes_entries_is_refused(inner, operation):
    tx = om.fused_chain(inner, om.on_ties(0.1, density=0.3, threshold="sampled"))
    params, delta, grads = ({"w": tree(seed)["layers"][0]} for seed in range(3))
    state = om.with_delta(tx.init(params), delta)
    with pytest.raises(
        ValueError, match=f"treats every entry on its own, but it uses .*'{operation}"
    ):
        tx.update(grads, state, params)


def test_it_works_behind_clipping_inside_masked_and_with_nnx():
    merge = om.on_ties(0.1, density=0.3, threshold="sampled", diagnostics=True)
    masked = optax.masked(merge, {"layers": True, "bias": False, "scale": False})
    tx = optax.chain(optax.clip_by_global_norm(1.0), om.fused_chain(optax.adamw(RATE), masked))
    _, updates, state = walk(tx)
    assert float(om.merge_metrics(state)["kept_share"]) == pytest.approx(0.3, rel=0.1)
    assert float((updates["bias"] != 0).mean()) == 1

    model = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    delta = jax.tree.map(jnp.sin, nnx.state(model, nnx.Param))
    tx = om.fused_chain(
        optax.adam(RATE), om.on_dare(0.1, density=0.5, delta=delta, diagnostics=True)
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    optimizer.update(model, jax.tree.map(jnp.cos, nnx.state(model, nnx.Param)))
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert bool((before["kernel"] != after["kernel"]).any())


def test_step_k_samples_the_whole_span():
    options = {"threshold": "sampled", "every_k": 2, "rounding": "nearest"}
    chained, _, _ = walk(optax.chain(optax.adam(RATE), om.on_ties(0.1, density=0.3, **options)), 4)
    fused, _, _ = walk(om.fused_chain(optax.adam(RATE), om.on_ties(0.1, density=0.3, **options)), 4)
    same = np.isclose(fused["layers"], chained["layers"], rtol=1e-5, atol=1e-6)
    assert same.mean() > 0.9999


@pytest.mark.parametrize(
    ("mix", "operation"),
    [
        (lambda g: jnp.cumsum(g, 0), "cumsum"),
        (lambda g: g * jnp.arange(g.shape[0])[:, None], "iota"),
        (lambda g: jnp.roll(g, 1, 0), "slice"),
        (lambda g: g * jax.random.uniform(jax.random.key(0), g.shape), "random"),
    ],
)
def test_only_operations_that_are_known_to_be_elementwise_are_allowed(mix, operation):
    inner = optax.stateless(lambda updates, params: jax.tree.map(mix, updates))
    tx = om.fused_chain(inner, om.on_ties(0, density=0.3, threshold="sampled"))
    params = {"w": tree(0)["layers"][0]}
    with pytest.raises(ValueError, match=f"it uses .*'{operation}"):
        tx.update(params, tx.init(params), params)


def test_what_computes_with_updates_goes_around_the_fused_chain():
    inner, merge = optax.adam(RATE, eps=0.1), om.on_ties(0.1, density=0.3, rounding="nearest")
    plain, _, _ = walk(om.fused_chain(inner, merge))
    around, _, _ = walk(optax.apply_if_finite(om.fused_chain(inner, merge), 3))
    for name in plain:
        np.testing.assert_allclose(around[name], plain[name], rtol=1e-5, atol=1e-6)
    for other in (optax.apply_if_finite(merge, 3), optax.chain(merge, optax.scale(0.5))):
        with pytest.raises(ValueError, match=r"something else has the state .* around fused_chain"):
            om.fused_chain(inner, other).init(tree(0))


@pytest.mark.parametrize("wrapper", ["partition", "inject_hyperparams"])
def test_wrappers_that_hand_updates_on_may_stand_around_the_merge(wrapper):
    inner, options = optax.adam(RATE, eps=0.1), {"threshold": "sampled", "rounding": "nearest"}
    plain, _, _ = walk(om.fused_chain(inner, om.on_ties(0.1, density=0.3, **options)))
    merge = {
        "partition": optax.partition(
            {name: om.on_ties(0.1, density=0.3, **options) for name in "ab"},
            {"layers": "a", "bias": "b", "scale": "a"},
        ),
        "inject_hyperparams": optax.inject_hyperparams(om.on_ties, ("density", "seed"))(
            0.1, density=0.3, **options
        ),
    }[wrapper]
    found, _, _ = walk(om.fused_chain(inner, merge))
    for name in plain:
        same = np.isclose(found[name], plain[name], rtol=1e-5, atol=1e-6)
        assert same.mean() > 0.9999, name

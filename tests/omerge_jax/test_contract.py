"""What every transformation of the library keeps to, whatever it is composed with."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import omerge_jax as om

RATE = 1e-2
MERGES = {
    "on_dare": lambda **kw: om.on_dare(**({"alpha": 0.1, "density": 0.5} | kw)),
    "on_ties": lambda **kw: om.on_ties(**({"alpha": 0.1, "density": 0.5} | kw)),
    "on_dare_k2": lambda **kw: om.on_dare(**({"alpha": 0.1, "density": 0.5, "every_k": 2} | kw)),
    "on_ties_norm": lambda **kw: om.on_ties(
        **({"alpha": 0.1, "density": 0.5, "rescale": "norm"} | kw)
    ),
}
each_merge = pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES.keys())


def tree(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = {"block": {"kernel": (8, 6), "bias": (6,)}, "scale": ()}
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s), dtype), shapes, is_leaf=lambda s: type(s) is tuple
    )


def train(tx, params, delta, steps=4, grads=None):
    state = om.with_delta(tx.init(params), delta)
    update = jax.jit(tx.update)
    for step in range(steps):
        g = grads[step] if grads else jax.tree.map(lambda p, s=step: jnp.cos(p + s), params)
        updates, state = update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_same(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if tolerance:
            np.testing.assert_allclose(x, y, **tolerance)
        else:
            np.testing.assert_array_equal(x, y)


@each_merge
def test_the_delta_is_no_constant_of_the_update(merge):
    """A megabyte of weights would be two megabytes of program text."""
    params = {"w": jnp.sin(jnp.arange(2.0**18)).reshape(512, 512)}
    tx = optax.chain(optax.adamw(RATE), merge(delta=params))
    lowered = jax.jit(tx.update).lower(params, tx.init(params), params)
    assert len(lowered.as_text()) < 300_000


@each_merge
def test_scalars_can_be_read_after_the_state_was_donated(merge):
    params = tree(0)
    tx = merge(diagnostics=True)
    state = om.with_delta(tx.init(params), params)
    update = jax.jit(tx.update, donate_argnums=1)
    _, state = update(params, state, params)
    metrics = om.merge_metrics(state)
    update(params, state, params)
    assert all(np.isfinite(float(value)) for value in metrics.values())


@each_merge
def test_containers_change_nothing(merge):
    model = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    states = nnx.state(model)
    plain = nnx.to_pure_dict(states)
    delta = jax.tree.map(jnp.sin, plain)
    trained = {}
    containers = {"dict": plain, "FrozenDict": FrozenDict(plain), "State": states}
    for name, params in containers.items():
        trained[name], _ = train(optax.chain(optax.adamw(RATE), merge()), params, delta)
    assert_same(trained["dict"], trained["FrozenDict"])
    assert_same(trained["dict"], trained["State"])


@each_merge
def test_nnx_optimizer(merge):
    """nnx.Optimizer gives Variables to init and arrays to update."""
    model = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    delta = jax.tree.map(jnp.sin, nnx.state(model, nnx.Param))
    plain = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    tx = optax.chain(optax.sgd(RATE), merge(delta=delta))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for step in range(2):
        grads = jax.tree.map(lambda p, s=step: jnp.cos(p + s), nnx.state(model, nnx.Param))
        optimizer.update(model, grads)
    expected, _ = train(optax.chain(optax.sgd(RATE), merge()), plain, delta, steps=2)
    # Without jit XLA fuses nothing, so that the last bit may differ.
    assert_same(nnx.to_pure_dict(nnx.state(model, nnx.Param)), expected, rtol=1e-6)


@each_merge
def test_masked_and_partition_merge_the_chosen_leaves_alone(merge):
    params, delta = tree(0), tree(1)
    whole, _ = train(optax.chain(optax.sgd(RATE), merge()), params, delta)
    plain, _ = train(
        optax.chain(optax.sgd(RATE), om.child_tuning(1.0), merge(alpha=0.1)), params, delta
    )
    assert_same(whole, plain)
    mask = {"block": {"kernel": True, "bias": False}, "scale": False}
    masked, _ = train(optax.chain(optax.sgd(RATE), optax.masked(merge(), mask)), params, delta)
    labels = {"block": {"kernel": "merge", "bias": "free"}, "scale": "free"}
    by_label = {"merge": optax.chain(optax.sgd(RATE), merge()), "free": optax.sgd(RATE)}
    parted, _ = train(optax.partition(by_label, labels), params, delta)
    assert_same(masked, parted)
    np.testing.assert_array_equal(masked["block"]["kernel"], whole["block"]["kernel"])
    state = optax.sgd(RATE).init(params)
    free = params
    for step in range(4):
        grads = jax.tree.map(lambda p, s=step: jnp.cos(p + s), free)
        updates, state = optax.sgd(RATE).update(grads, state)
        free = optax.apply_updates(free, updates)
    np.testing.assert_allclose(masked["block"]["bias"], free["block"]["bias"], rtol=1e-6)


@each_merge
def test_apply_if_finite_skips_a_bad_step(merge):
    params, delta = tree(0), tree(1)
    good = tree(2)
    bad = jax.tree.map(lambda x: x * jnp.nan, good)
    tx = optax.apply_if_finite(optax.chain(optax.adamw(RATE), merge()), 5)
    skipped, _ = train(tx, params, delta, 3, [good, bad, tree(3)])
    clean, _ = train(tx, params, delta, 2, [good, tree(3)])
    assert_same(skipped, clean)


@pytest.mark.parametrize(
    "inner",
    [
        optax.lion(RATE),
        optax.sgd(RATE, momentum=0.9),
        optax.contrib.muon(RATE),
        optax.adafactor(RATE),
    ],
    ids=["lion", "momentum", "muon", "adafactor"],
)
@pytest.mark.parametrize("merge", [MERGES["on_dare"], MERGES["on_ties"]], ids=["dare", "ties"])
def test_after_any_inner_optimizer_the_merge_acts_on_its_updates(merge, inner):
    params, delta, grads = tree(0), tree(1), [tree(2), tree(3)]
    chained, _ = train(optax.chain(inner, merge()), params, delta, 2, grads)
    inner_state, tx = inner.init(params), merge()
    state, theta = om.with_delta(tx.init(params), delta), params
    # Adam-like first steps are equal up to rounding, and the largest are kept: compile them alike.
    inner_update = jax.jit(inner.update)
    for g in grads:
        updates, inner_state = inner_update(g, inner_state, theta)
        updates, state = tx.update(updates, state, theta)
        theta = optax.apply_updates(theta, updates)
    assert_same(chained, theta, rtol=1e-4, atol=1e-5)


@each_merge
def test_schedule_free_trains(merge):
    params, delta = tree(0), tree(1)
    tx = optax.contrib.schedule_free(optax.chain(optax.sgd(RATE), merge()), RATE)
    trained, _ = train(tx, params, delta)
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(trained))


@each_merge
@pytest.mark.parametrize("every_k", [1, 2])
def test_a_leaf_without_an_update_stays_without(merge, every_k):
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    tx = merge(every_k=every_k)
    state = om.with_delta(tx.init(params), params)
    for _ in range(2):
        updates, state = tx.update({"a": params["a"], "b": None}, state, params)
    assert updates["b"] is None


def test_layer_axes_under_injection_says_how():
    tx = optax.inject_hyperparams(om.on_ties)(0.1, density=0.5, layer_axes=1)
    params = {"w": jnp.ones((2, 3))}
    with pytest.raises(ValueError, match=r"layer_axes must be known .* static_args"):
        tx.init(params)


@each_merge
def test_empty_trees_none_leaves_and_extra_arguments(merge):
    tx = merge()
    updates, _ = tx.update({}, tx.init({}), {}, value=1.0)
    assert updates == {}
    params = {"w": jnp.ones((3,)), "frozen": None}
    state = om.with_delta(tx.init(params), {"w": jnp.ones(3)})
    updates, _ = tx.update(params, state, params, unknown="argument")
    assert updates["frozen"] is None


def test_renaming_the_order_of_leaves_changes_nothing():
    params, delta = tree(0), tree(1)
    backwards = dict(reversed(params.items()))
    a, _ = train(om.on_dare(0.1, density=0.5), params, delta)
    b, _ = train(om.on_dare(0.1, density=0.5), backwards, delta)
    assert_same(a, b)

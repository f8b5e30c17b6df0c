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
def test_state_keeps_structure_and_dtypes_and_compiles_once(merge):
    params, delta = tree(0), tree(1)
    tx = optax.chain(optax.adamw(RATE), merge(diagnostics=True))
    state = om.with_delta(tx.init(params), delta)
    update = jax.jit(tx.update, donate_argnums=1)
    before = jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)
    for _ in range(3):
        _, state = update(params, state, params)
    assert jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state) == before
    assert update._cache_size() == 1


@each_merge
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_emitted_updates_keep_their_dtype(merge, dtype):
    params = tree(0, dtype)
    tx = merge()
    updates, _ = tx.update(params, om.with_delta(tx.init(params), tree(1)), params)
    assert all(u.dtype == dtype for u in jax.tree.leaves(updates))


@each_merge
def test_params_delta_and_state_can_all_be_donated(merge):
    params, delta = tree(0), tree(1)
    tx = optax.chain(optax.sgd(RATE), merge())
    state = om.with_delta(tx.init(params), delta)

    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    for _ in range(3):
        params, state = jitted(params, state)
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(params))
    assert not any(x.is_deleted() for x in jax.tree.leaves(delta))


@each_merge
def test_abstract_init_gives_the_structure_of_the_real_one(merge):
    params = tree(0)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    tx = optax.chain(optax.adamw(RATE), merge())
    made = om.with_delta(tx.init(params), params)
    shapes = jax.eval_shape(lambda p, d: om.with_delta(tx.init(p), d), abstract, abstract)
    assert jax.tree.structure(made) == jax.tree.structure(shapes)
    assert [x.shape for x in jax.tree.leaves(made)] == [x.shape for x in jax.tree.leaves(shapes)]


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
def test_inject_hyperparams_is_the_plain_transformation(merge):
    params, delta = tree(0), tree(1)
    plain, _ = train(optax.chain(optax.sgd(RATE), merge()), params, delta)
    injected = optax.inject_hyperparams(lambda alpha, density: merge(alpha=alpha, density=density))
    changed, state = train(
        optax.chain(optax.sgd(RATE), injected(alpha=0.1, density=0.5)), params, delta
    )
    assert_same(plain, changed, rtol=1e-6, atol=1e-6)
    assert float(om.merge_metrics(state)["alpha"]) == pytest.approx(0.1)


@pytest.mark.parametrize("factory", [om.on_dare, om.on_ties])
def test_inject_hyperparams_over_the_public_factory(factory):
    """All numbers become traced, every_k and seed too."""
    params, delta = tree(0), tree(1)
    for every_k in (1, 3):
        arguments = {"alpha": 0.1, "density": 0.5, "every_k": every_k}
        plain, _ = train(factory(**arguments), params, delta)
        injected, _ = train(optax.inject_hyperparams(factory)(**arguments), params, delta)
        assert_same(plain, injected, rtol=1e-5, atol=1e-6)


@each_merge
def test_multi_steps_outermost_counts_optimizer_steps(merge):
    params, delta = tree(0), tree(1)
    chain = optax.chain(optax.sgd(RATE), merge())
    grads = [tree(i) for i in range(2, 10)]
    pairs = zip(grads[::2], grads[1::2], strict=True)
    means = [jax.tree.map(lambda a, b: (a + b) / 2, *pair) for pair in pairs]
    accumulated, state = train(optax.MultiSteps(chain, 2), params, delta, 8, grads)
    direct, _ = train(chain, params, delta, 4, means)
    assert_same(accumulated, direct, rtol=1e-5, atol=1e-6)
    (merge_state,) = [
        s
        for s in jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, om.OnlineMergeState))
        if isinstance(s, om.OnlineMergeState)
    ]
    assert int(merge_state.merge_count) == 4


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
def test_param_shardings_apply_to_state_subtrees(merge):
    params, delta = tree(0), tree(1)
    tx = optax.chain(optax.adamw(RATE), merge())
    state = om.with_delta(tx.init(params), delta)
    specs = jax.tree.map(lambda p: f"spec{p.shape}", params)
    marked = optax.tree.map_params(
        tx, lambda leaf, spec: (leaf.shape, spec), state, specs, transform_non_params=lambda _: None
    )
    reference = marked[1].reference_delta
    assert reference["block"]["kernel"] == ((8, 6), "spec(8, 6)")
    assert marked[1].merge_count is None


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
    tx = optax.inject_hyperparams(om.on_ties)(0.1, 0.5, layer_axes=1)
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


@each_merge
def test_inside_scan(merge):
    params, delta = tree(0), tree(1)
    tx = optax.chain(optax.sgd(RATE), merge())

    def body(carry, step):
        params, state = carry
        grads = jax.tree.map(lambda p: jnp.cos(p + step), params)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    start = (params, om.with_delta(tx.init(params), delta))
    (scanned, _), _ = jax.lax.scan(body, start, jnp.arange(4.0))
    looped, _ = train(tx, params, delta)
    assert_same(scanned, looped, rtol=1e-6, atol=1e-6)


def test_renaming_the_order_of_leaves_changes_nothing():
    params, delta = tree(0), tree(1)
    backwards = dict(reversed(params.items()))
    a, _ = train(om.on_dare(0.1, 0.5), params, delta)
    b, _ = train(om.on_dare(0.1, 0.5), backwards, delta)
    assert_same(a, b)

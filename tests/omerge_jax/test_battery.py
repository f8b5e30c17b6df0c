"""What Optax asks of every transformation that it takes, asked of every one of this library.

The tests follow those that Optax runs over its contributed optimizers. Where types say enough nothing
is compiled: `jax.eval_shape` runs the Python of an update alone.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import omerge_jax as om
from tests.omerge_jax.builders import ALL, marks, named, start

each = pytest.mark.parametrize("name", named(ALL))
NUMBERS = {"alpha", "density", "rate", "learning_rate"}


def tree(seed, dtype=jnp.float32):
    """A matrix and a scalar; small, as every case compiles several programs."""
    rng = np.random.default_rng(seed)
    return {"w": jnp.asarray(rng.normal(size=(8, 6)), dtype), "s": jnp.asarray(0.5, dtype)}


def begin(name, params, delta=None, **options):
    """A transformation and its state; the gated anchor is made with its delta."""
    delta = tree(1) if delta is None else delta
    tx = ALL[name].make(**({"delta": delta} if name == "anchored opposing" else {}), **options)
    return tx, start(tx, params, delta)


@functools.cache
def two_steps(name):
    """The updates of two steps that all the others are compared with."""
    tx, state = begin(name, tree(0))
    return steps(tx, state)


def steps(tx, state):
    update, found = jax.jit(tx.update), []
    for seed in (2, 3):
        updates, state = update(tree(seed), state, tree(0))
        found.append(updates)
    return found


def types(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type, jax.typeof(x).sharding), tree)


def assert_close(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)


@each
def test_unknown_arguments_donation_and_one_compilation(name):
    """The state keeps its structure and types, so that the second call runs the first's program."""
    params, delta = tree(0), tree(1)
    tx, state = begin(name, params, delta)
    before = types(state)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = tx.update(tree(2), state, params, unknown_argument=1)
        return optax.apply_updates(params, updates), state

    for _ in range(3):
        params, state = step(params, state)
        assert jax.tree.structure(state) == jax.tree.structure(before, is_leaf=_is_type)
        assert types(state) == before
    assert step._cache_size() == 1
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))
    assert not any(x.is_deleted() for x in jax.tree.leaves(delta))


def _is_type(node):
    return isinstance(node, tuple) and len(node) == 4 and isinstance(node[2], bool)


@each
def test_injected_numbers_are_the_numbers(name):
    """Floats and seeds become arrays; what is not a number is static, and so is every_k."""
    factory, options = ALL[name].factory, dict(ALL[name].options)
    numbers = {key for key in NUMBERS & options.keys() if isinstance(options[key], float)}
    if name == "anchored opposing":
        options["delta"] = tree(1)
    tx = optax.inject_hyperparams(factory, options.keys() - numbers)(**options)
    state = start(tx, tree(0), tree(1))
    assert numbers <= state.hyperparams.keys()
    assert_close(steps(tx, state), two_steps(name))


@pytest.mark.parametrize(
    ("name", "number"),
    [
        pytest.param(name, key, marks=marks(name))
        for name, case in ALL.items()
        for key in sorted(NUMBERS & case.options.keys())
    ],
)
def test_schedules_are_taken_where_numbers_are(name, number):
    """Compiled for alpha alone; of the others the types are compared."""
    value = ALL[name].options[number]
    if isinstance(value, om.Relative):
        constant = om.relative(optax.constant_schedule(value.share), scope=value.scope)
    else:
        constant = optax.constant_schedule(value)
    tx, state = begin(name, tree(0), **{number: constant})
    if number in ("alpha", "rate"):
        assert_close(steps(tx, state), two_steps(name))
    after = jax.eval_shape(tx.update, tree(2), state, tree(0))
    assert types_of_shapes(after[1]) == types_of_shapes(state)


def types_of_shapes(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


@each
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float64])
def test_dtypes_hold_also_where_a_condition_skips_the_step(name, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        params = tree(0, dtype)
        tx, state = begin(name, params)

        def step(carry, taken):
            go = lambda: tx.update(tree(2, dtype), state=carry[1], params=carry[0])  # noqa: E731
            updates, state = jax.lax.cond(taken, go, lambda: carry)
            return (optax.apply_updates(carry[0], updates), state), updates

        taken = jnp.array([True, False])
        carry, updates = jax.eval_shape(lambda c: jax.lax.scan(step, c, taken), (params, state))
        assert types_of_shapes(carry[1]) == types_of_shapes(state)
        assert all(x.dtype == dtype for x in jax.tree.leaves((carry[0], updates)))


@each
def test_accumulated_steps_are_one_step(name):
    """MultiSteps goes outermost: nothing moves on the first micro-step, and on the second the mean."""
    tx, state = begin(name, tree(0))
    several = optax.MultiSteps(tx, every_k_schedule=2)
    state = several.init(tree(0))._replace(inner_opt_state=state)
    update = jax.jit(several.update)
    for expected in two_steps(name)[:1]:
        nothing, state = update(tree(2), state, tree(0))
        assert not any(np.any(x) for x in jax.tree.leaves(nothing))
        found, state = update(tree(2), state, tree(0))
        assert_close(found, expected)


@each
def test_abstract_states_are_the_real_ones(name):
    params = tree(0)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    tx, real = begin(name, params)
    found = jax.eval_shape(functools.partial(start, tx), abstract, abstract)
    assert jax.tree.structure(found) == jax.tree.structure(real)
    assert types_of_shapes(found) == types_of_shapes(real)
    assert types_of_shapes(jax.eval_shape(tx.update, params, found, params)[1]) == (
        types_of_shapes(real)
    )


@each
def test_a_sharded_state_stays_as_it_is_sharded(name):
    """With explicit axes the sharding is part of the type."""
    mesh = jax.make_mesh((1,), ("x",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        place = {"w": NamedSharding(mesh, P("x")), "s": NamedSharding(mesh, P())}
        params = jax.device_put(tree(0), place)
        tx, _ = begin(name, params)
        state = start(tx, params, jax.device_put(tree(1), place))
        updates, after = jax.eval_shape(tx.update, params, state, params)
        assert updates["w"].sharding.spec == P("x", None)
        same = jax.tree.map(lambda x, y: jax.typeof(x).sharding == y.sharding, state, after)
        assert all(jax.tree.leaves(same))


@each
def test_shardings_of_parameters_can_be_mapped_onto_the_state(name):
    tx, state = begin(name, tree(0))
    specs = {"w": "spec of w", "s": "spec of s"}
    marked = optax.tree.map_params(
        tx, lambda x, spec: f"{x.shape} {spec}", state, specs, transform_non_params=lambda _: None
    )
    assert set(jax.tree.leaves(marked)) <= {"(8, 6) spec of w", "() spec of s"}

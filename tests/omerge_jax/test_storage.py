"""However the delta is held, the trajectory is that of a dense float32 delta."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import omerge_jax as om
from tests.virtual_devices import run_python

STEPS = 4
FACTORIES = {
    "on_dare": lambda **kw: om.on_dare(0.1, density=0.05, delta_mask="fixed", **kw),
    "on_ties": lambda **kw: om.on_ties(0.1, density=0.05, **kw),
    "on_ties_norm": lambda **kw: om.on_ties(0.1, density=0.05, rescale="norm", **kw),
    "band": lambda **kw: om.online_merge(
        om.band(0.05), om.linear(), alpha=0.1, delta_mask="fixed", **kw
    ),
    "on_ties_adamw": lambda **kw: om.on_ties_adamw(1e-2, alpha=0.1, density=0.05, **kw),
}
each_factory = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES.keys())
each_span = pytest.mark.parametrize("every_k", [1, pytest.param(2, marks=pytest.mark.slow)])


def tree(seed):
    rng = np.random.default_rng(seed)
    shapes = {"layers": (3, 40, 60), "bias": (30,), "scale": ()}
    return {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}


def layer_axes(path):
    return int(path[0] == "layers")


def walk(tx, *, delta=None, **arguments):
    params = tree(0)
    state = tx.init(params)
    state = state if delta is None else om.with_delta(state, delta)
    update = jax.jit(tx.update)
    for step in range(STEPS):
        grads = jax.tree.map(lambda p, s=step: jnp.cos(p + s), params)
        updates, state = update(grads, state, params, **arguments)
        params = optax.apply_updates(params, updates)
    assert update._cache_size() == 1
    return params, state


def assert_same(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, **({"rtol": 0, "atol": 0} | tolerance))


@each_factory
@each_span
def test_sparse_is_dense(factory, every_k):
    make = {"every_k": every_k, "layer_axes": layer_axes}
    expected, dense = walk(factory(**make), delta=tree(1))
    found, sparse = walk(factory(storage="sparse", **make), delta=tree(1))
    assert_same(found, expected, rtol=1e-6, atol=1e-7)
    held, all_of_it = (om_bytes(state) for state in (sparse, dense))
    assert held < 0.7 * all_of_it


def om_bytes(state):
    """Bytes of the reference delta of the one merge in an optimizer state."""
    is_merge = lambda node: isinstance(node, om.OnlineMergeState)  # noqa: E731
    (merge,) = [n for n in jax.tree.leaves(state, is_leaf=is_merge) if is_merge(n)]
    return sum(leaf.nbytes for leaf in jax.tree.leaves(merge.reference_delta))


@pytest.mark.parametrize("factory", [om.on_dare, om.on_ties])
def test_at_density_a_hundredth_a_delta_takes_a_fifth_of_a_byte_per_parameter(factory):
    """The budget, with bfloat16 values, over leaves like a decoder's."""
    fixed = {"delta_mask": "fixed"} if factory is om.on_dare else {}
    tx = factory(1e-4, density=0.01, storage="sparse", layer_axes=layer_axes, **fixed)
    params = {"layers": jnp.zeros((4, 128, 512)), "embed": jnp.zeros((1000, 128))}
    rng = np.random.default_rng(0)
    delta = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.bfloat16), params)
    state = om.with_delta(tx.init(params), delta)
    entries = sum(p.size for p in params.values())
    assert om_bytes(state) / entries < 0.2
    assert om_bytes(state) / entries > 0.01 * 6 * 0.9


@each_factory
@each_span
def test_recompute_is_dense_and_holds_nothing(factory, every_k):
    make = {"every_k": every_k, "layer_axes": layer_axes}
    base, reference = tree(2), tree(3)
    expected, _ = walk(factory(**make), delta=om.task_vector(reference, base))
    tx = factory(storage="recompute", **make)
    found, state = walk(tx, reference_params=reference, base_params=base)
    assert_same(found, expected, rtol=1e-6, atol=1e-7)
    assert om_bytes(state) == 0


def test_recompute_takes_checkpoints_in_bfloat16_exactly():
    half = [jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree(seed)) for seed in (2, 3)]
    delta = om.task_vector(half[1], half[0])
    make = FACTORIES["on_ties"]
    expected, _ = walk(make(), delta=delta)
    found, _ = walk(make(storage="recompute"), reference_params=half[1], base_params=half[0])
    assert_same(found, expected)


@each_factory
def test_a_bfloat16_delta_is_off_by_its_own_rounding(factory):
    delta = tree(1)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), delta)
    back = jax.tree.map(lambda x: x.astype(jnp.float32), half)
    assert_same(walk(factory(), delta=half)[0], walk(factory(), delta=back)[0])
    for x, y in zip(jax.tree.leaves(back), jax.tree.leaves(delta), strict=True):
        np.testing.assert_allclose(x, y, rtol=2.0**-8)


def test_host_memory_is_dense():
    """Placed under jit, since the CPU's own memory is refused otherwise; nothing is donated."""
    tx = om.on_dare(0.1, density=0.5, delta_mask="fixed", storage="pinned_host", rounding="nearest")
    params, delta = tree(0), tree(1)
    state = jax.jit(om.with_delta)(tx.init(params), delta)
    kinds = {leaf.sharding.memory_kind for leaf in jax.tree.leaves(state.reference_delta)}
    assert kinds == {"pinned_host"}
    plain = om.on_dare(0.1, density=0.5, delta_mask="fixed", rounding="nearest")
    expected, _ = plain.update(params, om.with_delta(plain.init(params), delta), params)
    update = jax.jit(tx.update)
    for _ in range(2):
        found, after = update(params, state, params)
        assert_same(found, expected, rtol=1e-6)
    held = jax.tree.leaves(after.reference_delta)
    assert {leaf.sharding.memory_kind for leaf in held} == {"pinned_host"}


def test_host_memory_is_refused_where_it_is_the_only_one():
    tx = om.on_dare(0.1, density=0.5, storage="pinned_host")
    with pytest.raises(ValueError, match="is for accelerators"):
        om.with_delta(tx.init(tree(0)), tree(1))


@pytest.mark.parametrize("storage", ["dense", "sparse"])
def test_a_delta_can_be_replaced(storage):
    make = FACTORIES["on_ties"]
    tx = make(storage=storage)
    state = om.with_delta(tx.init(tree(0)), tree(1))
    _, state = tx.update(tree(4), state, tree(0))
    again = om.with_delta(state, tree(2))
    fresh = om.with_delta(tx.init(tree(0)), tree(2))._replace(
        merge_count=again.merge_count, rounding_state=again.rounding_state
    )
    assert jax.tree.structure(again) == jax.tree.structure(fresh)
    found, _ = tx.update(tree(4), again, tree(0))
    expected, _ = tx.update(tree(4), fresh, tree(0))
    assert_same(found, expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: om.on_dare(0.1, density=0.5, storage="sparse"), "give delta_mask='fixed'"),
        (
            lambda: om.on_ties(0.1, density=optax.constant_schedule(0.1), storage="sparse"),
            "needs a density that is a Python number",
        ),
        (
            lambda: om.online_merge(
                lambda x, ctx: x, om.linear(), alpha=0.1, delta_mask="fixed", storage="sparse"
            ),
            "needs a sparsifier with a capacity",
        ),
        (
            lambda: om.on_dare(
                0.1, density=0.5, delta_mask="fixed", storage="sparse", seed=jnp.int32(1)
            ),
            "made of Python numbers",
        ),
        (lambda: om.on_ties(0.1, density=0.5, storage="recompute", delta={}), "holds no delta"),
    ],
)
def test_what_cannot_be_held_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_recompute_says_what_it_needs():
    tx = om.on_ties(0.1, density=0.5, storage="recompute")
    params = tree(0)
    state = tx.init(params)
    with pytest.raises(ValueError, match="reference_params=…, base_params=…"):
        tx.update(params, state, params, base_params=params)
    with pytest.raises(ValueError, match="another storage than 'recompute'"):
        om.with_delta(state, params)


SHARDED = """
import re, jax, jax.numpy as jnp, numpy as np, optax, omerge_jax as om
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
values = np.random.default_rng(0).normal(size=(3, 512, 256)).astype(np.float32)
found = []
for spec in (P(), P(None, "x"), P(None, None, "x")):
    place = NamedSharding(mesh, spec)
    params = {"layers": jax.device_put(values, place)}
    delta = {"layers": jax.device_put(values[:, ::-1], place)}
    tx = om.on_ties(0.1, density=0.02, storage="sparse", layer_axes=1)
    state = om.with_delta(tx.init(params), delta)
    spread = lambda x: NamedSharding(mesh, P(None, "x") if x.ndim == 2 else P())
    state = jax.device_put(state, jax.tree.map(spread, state))
    compiled = jax.jit(tx.update).lower(params, state, params).compile()
    updates, after = compiled(params, state, params)
    assert updates["layers"].sharding.is_equivalent_to(place, 3) or spec == P()
    held = after.reference_delta["layers"].places
    assert held.sharding.shard_shape(held.shape)[1] * 8 == held.shape[1]
    lines = compiled.as_text().splitlines()
    gathers = [line for line in lines if re.search(r" all-gather(-start)?\\(", line)]
    shapes = [shape for line in gathers for shape in re.findall(r"\\[([\\d,]+)\\]", line)]
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in shapes]
    # The entries of F(tau) and their three coordinates, never a leaf (46 times as many).
    assert all(size <= 3 * held.size for size in sizes), sizes
    found.append(np.asarray(updates["layers"]))
for other in found[1:]:
    np.testing.assert_allclose(other, found[0], rtol=1e-6)
print("ok")
"""


def test_sparse_deltas_are_sharded_and_no_leaf_is_gathered():
    run_python("-c", SHARDED, devices=8)

"""The threshold of large leaves, found in passes that may compute the leaf anew, against a sort."""

import functools
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import omerge_jax as om
from omerge_jax.entries import entries_of
from omerge_jax.sparsifiers.base import SparsifyContext
from omerge_jax.threshold.bracketed import Bracket, find_edge
from omerge_jax.threshold.edge import TieOrder, is_beyond
from tests.virtual_devices import run_python

START = jnp.uint32(0x12345678)


@functools.partial(jax.jit, static_argnames="layer_axes")
def kept(x, k, low, high, layer_axes):
    order = TieOrder(START, x.shape, layer_axes)
    edge, passes = find_edge(entries_of(x), k, order, layer_axes, Bracket(low, high))
    return is_beyond(x, edge, order), passes


def sorted_out(x, k, layer_axes):
    """Which entries a sort by magnitude and then by the order of ties keeps."""
    x = np.asarray(jnp.abs(x.astype(jnp.float32))).view(np.uint32)
    tensors = x.reshape(*x.shape[:layer_axes], -1)
    among = np.zeros(tensors.shape, bool)
    order = np.asarray(TieOrder(START, x.shape, layer_axes)(False))
    order = np.broadcast_to(order, x.shape).reshape(tensors.shape)
    for at in np.ndindex(tensors.shape[:-1]):
        among[(*at, np.lexsort((order[at], tensors[at]))[::-1][:k])] = True
    return among.reshape(x.shape)


def assert_keeps_what_a_sort_keeps(x, k, layer_axes, low, high):
    layers = x.shape[:layer_axes]
    low, high = (jnp.broadcast_to(jnp.float32(edge), layers) for edge in (low, high))
    found, passes = kept(x, k, low, high, layer_axes)
    np.testing.assert_array_equal(found, sorted_out(x, k, layer_axes))
    return int(passes)


NORMAL = np.random.default_rng(0).normal(size=(2, 150, 160)).astype(np.float32)
VALUES = {
    "normal": NORMAL,
    "rows of different scales": NORMAL
    * np.exp(3 * np.random.default_rng(1).normal(size=(2, 150, 1))),
    "many decades": np.exp(15 * NORMAL),
    "many zeros": NORMAL * (np.random.default_rng(2).random(NORMAL.shape) < 0.05),
    "few magnitudes": NORMAL.round(1),
    "all equal": np.sign(NORMAL),
    "all zero": 0 * NORMAL,
    "subnormal": NORMAL * 1e-39,
    "infinite and no numbers": np.where(
        NORMAL > 1.5, np.nan, np.where(NORMAL < -1, np.inf, NORMAL)
    ),
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_keeps_what_a_sort_keeps(name, dtype):
    """Also where the search begins far from the threshold."""
    x = jnp.asarray(VALUES[name], dtype)
    for k, low, high in ((2400, 1.5, 1.8), (23_999, 0.0, 0.0), (1, 9.0, 9.0), (24_000, 0.1, 1.0)):
        assert_keeps_what_a_sort_keeps(x, k, 1, low, high)


@pytest.mark.parametrize(
    ("shape", "layer_axes"),
    [((48_000,), 0), ((2, 24_000), 1), ((3, 4, 50, 80), 2), ((24_000, 2), 0), ((40, 3, 4, 100), 0)],
)
def test_any_shape(shape, layer_axes):
    x = jnp.asarray(NORMAL.round(2).reshape(shape), jnp.float16)
    k = x[(0,) * layer_axes].size // 10
    assert_keeps_what_a_sort_keeps(x, k, layer_axes, 1.5, 1.8)


@given(hnp.arrays(np.float32, (2, 12), elements=st.floats(width=32)), st.integers(1, 12), st.data())
@settings(deadline=None, max_examples=100)
def test_any_values_and_any_place_to_begin(x, k, data):
    low, high = (data.draw(st.floats(0, width=32, allow_nan=False)) for _ in range(2))
    assert_keeps_what_a_sort_keeps(jnp.asarray(x), k, 1, low, high)


def test_three_passes_do_for_a_large_tensor():
    x = jnp.asarray(np.random.default_rng(3).normal(size=(1024, 512)), jnp.float32)
    keep: Any = om.magnitude(0.1)
    ctx = SparsifyContext(jnp.int32(0), ("w",), "update")
    assert int(jax.jit(lambda x: keep.passes(x, ctx))(x)) <= 4
    assert int(jnp.count_nonzero(keep(x, ctx))) == int(0.1 * x.size)


@pytest.mark.slow
def test_the_double_precision_of_a_leaf_does_not_matter():
    program = """
import jax, jax.numpy as jnp, numpy as np, omerge_jax as om
from omerge_jax.sparsifiers.base import SparsifyContext
jax.config.update("jax_enable_x64", True)
x = jnp.asarray(np.random.default_rng(0).normal(size=(512, 512)))
kept = om.magnitude(0.5)(x, SparsifyContext(jnp.int32(0), ("w",), "update"))
assert kept.dtype == jnp.float64
print(int(jnp.count_nonzero(kept)))
"""
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.split() == [str(512 * 512 // 2)], run.stderr[-2000:]


# In the fused chain


def updates_of(chain, inner, dtype, density=0.3, steps=2):
    """Updates, step by step, of an optimizer that keeps some entries of a large leaf."""

    def leaf(seed):
        return jnp.asarray(np.random.default_rng(seed).normal(size=(2, 512, 400)), dtype)

    tx = chain(inner, om.on_ties(0, density=density, layer_axes=1, rounding="nearest"))
    state = tx.init({"w": leaf(0)})
    update = jax.jit(tx.update)
    for step in range(steps):
        updates, state = update({"w": leaf(1 + step)}, state, {"w": leaf(0)})
        yield np.asarray(updates["w"].astype(jnp.float32))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("adamw", jnp.float32), ("adamw", jnp.bfloat16), ("lion", jnp.float32)],
)
def test_a_fused_chain_keeps_so_many_and_the_largest(name, dtype):
    inner = optax.adamw(1e-2, eps=0.1) if name == "adamw" else optax.lion(1e-2)
    fused = updates_of(om.fused_chain, inner, dtype)
    whole = updates_of(optax.chain, inner, dtype, density=1.0)
    for ours, dense in zip(fused, whole, strict=True):
        count = int(0.3 * ours[0].size)
        # The compiler may round the last digit of an update differently where it computes it again.
        assert np.abs((ours != 0).sum((1, 2)) - count).max() <= 2
        for some, everything in zip(ours, dense, strict=True):
            smallest = np.sort(np.abs(everything), axis=None)[-count]
            beyond = np.abs(everything) > smallest * (1 + 2**-6)
            assert (some[beyond] != 0).all()


def test_the_update_of_a_large_leaf_is_not_written_out():
    """The program holds no array as large as the leaf beside what it is given and what it returns."""
    shape = (2, 1024, 1024)

    def temporary(chain):
        tx = chain(optax.adamw(1e-2), om.on_ties(0, density=0.3, layer_axes=1, rounding="nearest"))
        params = {"w": jax.ShapeDtypeStruct(shape, jnp.float32)}
        state = jax.eval_shape(tx.init, params)
        step = jax.jit(lambda g, s, p: optax.apply_updates(p, tx.update(g, s, p)[0]))
        compiled: Any = step.lower(params, state, params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary(om.fused_chain) < 2 * 1024 * 1024 * 4 < temporary(optax.chain)


MESHES = """
import jax, jax.numpy as jnp, numpy as np, optax, omerge_jax as om
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
draw = lambda seed: np.random.default_rng(seed).normal(size=(2, 512, 400)).astype(np.float32)
merge = om.on_ties(0, density=lambda step: 0.3 - 0.1 * step, layer_axes=1, rounding="nearest")
tx = om.fused_chain(optax.lion(1e-2), merge)
def run(place):
    state = tx.init({"w": place(draw(0))})
    update = jax.jit(tx.update)
    for step in range(2):
        updates, state = update({"w": place(draw(1 + step))}, state, {"w": place(draw(0))})
    return np.asarray(jax.device_get(updates["w"]))
alone = run(jnp.asarray)
assert ((alone != 0).sum((1, 2)) == int(0.2 * 512 * 400)).all()
for kind, spec in ((AxisType.Auto, P(None, None, "x")), (AxisType.Explicit, P(None, "x"))):
    jax.set_mesh(jax.make_mesh((8,), ("x",), axis_types=(kind,)))
    place = NamedSharding(jax.sharding.get_mesh(), spec)
    np.testing.assert_array_equal(run(lambda x: jax.device_put(x, place)), alone)
"""


def test_any_mesh_and_a_scheduled_density():
    run_python("-c", MESHES, devices=8)

"""Layers stacked along any axis are merged as if every layer were a leaf of its own."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import omerge_jax as om
from omerge_jax.paths import layer_axes_of

SHAPE, LAYERS = (40, 3, 25), 3
MERGES = {
    "ties": lambda **kw: om.on_ties(0.1, density=0.2, **kw),
    "ties norm": lambda **kw: om.on_ties(0.1, density=0.2, rescale="norm", **kw),
    "ties relative": lambda **kw: om.on_ties(om.relative(0.3, scope="tensor"), density=0.2, **kw),
    "ties sparse": lambda **kw: om.on_ties(0.1, density=0.05, storage="sparse", **kw),
    "ties k2": lambda **kw: om.on_ties(0.1, density=0.2, every_k=2, **kw),
    "band": lambda **kw: om.online_merge(om.band(0.2), om.sign(), alpha=0.1, **kw),
}
RANDOM = {
    "dare": lambda **kw: om.on_dare(0.1, density=0.2, **kw),
    "dare norm": lambda **kw: om.on_dare(0.1, density=0.2, rescale="norm", **kw),
    "dare sparse": lambda **kw: om.on_dare(
        0.1, density=0.05, delta_mask="fixed", storage="sparse", **kw
    ),
    "ranked": lambda **kw: om.online_merge(om.magnitude_ranked(0.4), om.linear(), alpha=0.1, **kw),
}


def normal(seed, shape=SHAPE):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def walk(tx, params, delta, grads, update=None):
    """Parameters after a few steps of one leaf."""
    params = {"w": params}
    state = om.with_delta(tx.init(params), {"w": delta})
    update = update or jax.jit(tx.update)
    for grad in grads:
        updates, state = update({"w": grad}, state, params)
        params = optax.apply_updates(params, updates)
    return np.asarray(params["w"]), state


def data():
    scales = jnp.array([1e-2, 1.0, 1e2])[:, None]
    return normal(0), normal(1) * scales, [1e-2 * normal(seed) * scales for seed in (2, 3)]


def front(tree):
    return jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), tree)


@pytest.mark.parametrize("merge", MERGES.values(), ids=MERGES.keys())
def test_layers_on_the_middle_axis_are_layers_by_themselves(merge):
    params, delta, grads = data()
    stacked, _ = walk(merge(rounding="nearest", layer_axes=(1,)), params, delta, grads)
    tx = merge(rounding="nearest")
    update = jax.jit(tx.update)
    for layer in range(LAYERS):
        alone = [jax.tree.map(lambda x, n=layer: x[:, n], tree) for tree in (params, delta, grads)]
        expected, _ = walk(tx, *alone, update)
        np.testing.assert_allclose(stacked[:, layer], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["ties norm", *RANDOM])
def test_layers_on_the_middle_axis_are_layers_in_front(name):
    """Masks too: indices count with the layer axes in front."""
    merge, options = (MERGES | RANDOM)[name], {"rounding": "nearest", "diagnostics": True}
    middle, state = walk(merge(layer_axes={"w": (-2,)}, **options), *data())
    ahead, other = walk(merge(layer_axes=1, **options), *front(data()))
    np.testing.assert_allclose(np.moveaxis(middle, 1, 0), ahead, rtol=1e-6, atol=1e-6)
    for name, value in om.merge_metrics(state).items():
        np.testing.assert_allclose(value, om.merge_metrics(other)[name], rtol=1e-4)


@pytest.mark.parametrize("threshold", ["exact", "sampled"])
def test_a_large_leaf_in_fused_chain(threshold):
    """Its threshold is found in passes, or from a sample, of an update that is not stored."""
    params, delta, grad = (normal(seed, (2048, 2, 192)) for seed in range(3))
    merge = {"rounding": "nearest", "threshold": threshold}
    inner = optax.adam(1e-2, eps=0.1)
    middle = om.fused_chain(
        inner, om.on_ties(0.1, density=0.3, layer_axes=lambda path: (1,), **merge)
    )
    ahead = om.fused_chain(inner, om.on_ties(0.1, density=0.3, layer_axes=1, **merge))
    found, _ = walk(middle, params, delta, [grad])
    expected, _ = walk(ahead, *front([params, delta, [grad]]))
    assert np.isclose(np.moveaxis(found, 1, 0), expected, rtol=1e-5, atol=1e-6).mean() > 0.9999


def test_offline_merges_take_them_too():
    base, model = normal(0), normal(1)
    options = {"method": "ties", "weights": [1.0], "density": 0.2}
    found = om.offline_merge({"w": base}, [{"w": model}], layer_axes=(1,), **options)["w"]
    ahead = {"w": front(base)}, [{"w": front(model)}]
    expected = om.offline_merge(*ahead, layer_axes=1, **options)["w"]
    np.testing.assert_array_equal(front(found), expected)


@pytest.mark.parametrize(
    ("layer_axes", "expected"),
    [
        (None, ()),
        (2, (0, 1)),
        ((1,), (1,)),
        ((-1, 0), (2, 0)),
        (lambda path: (1,), (1,)),
        ({"a": {"w": (2,)}, "b": 0}, (2,)),
        ({"a": 1, "b": 0}, (0,)),
    ],
)
def test_how_they_can_be_given(layer_axes, expected):
    assert layer_axes_of(layer_axes, ("a", "w"), 3) == expected


@pytest.mark.parametrize("layer_axes", [(3,), (0, 0), (0, -3), 4, -1])
def test_axes_that_a_leaf_has_not_are_refused(layer_axes):
    with pytest.raises(ValueError, match=r"layer_axes must .* for the parameter a/w with 3 axes"):
        layer_axes_of(layer_axes, ("a", "w"), 3)

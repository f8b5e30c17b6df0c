"""Task vectors and the matching of leaves across containers."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

import omerge_jax as om


class Pair(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


def linear(seed):
    return nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(seed)))


def test_difference_across_containers():
    reference, base = linear(0), linear(1)
    plain = nnx.to_pure_dict(base)
    for other in (base, plain, FrozenDict(plain), Pair(plain["kernel"], plain["bias"])):
        delta = om.task_vector(reference, other)
        assert jax.tree.structure(delta) == jax.tree.structure(reference)
        expected = reference["kernel"][...] - base["kernel"][...]
        np.testing.assert_array_equal(delta["kernel"][...], expected)


def test_half_precision_is_subtracted_in_float32():
    reference = {"w": jnp.asarray([1.0, 256.0], jnp.bfloat16)}
    base = {"w": jnp.asarray([0.999, 255.25], jnp.float32)}
    delta = om.task_vector(reference, base)
    assert delta["w"].dtype == jnp.float32
    np.testing.assert_allclose(delta["w"], [0.001, 0.75], rtol=1e-4)
    assert om.task_vector(reference, base, dtype=jnp.bfloat16)["w"].dtype == jnp.bfloat16


def test_mismatches_are_all_named_or_zero_on_request():
    reference = {"a": jnp.ones(2), "head": jnp.ones((4, 2)), "new": jnp.ones(3), "n": jnp.arange(2)}
    base = {"a": jnp.zeros(2), "head": jnp.ones((3, 2)), "n": jnp.arange(2)}
    with pytest.raises(ValueError, match=r"2 leaves: head is \(4, 2\) in .*; new is missing"):
        om.task_vector(reference, base)
    delta = om.task_vector(reference, base, on_mismatch="zero")
    assert delta["a"].tolist() == [1, 1]
    assert float(jnp.abs(delta["head"]).max()) == 0
    assert delta["new"].shape == (3,)
    with pytest.raises(ValueError, match="on_mismatch must be 'error' or 'zero'"):
        om.task_vector(reference, base, on_mismatch="skip")


def test_abstract_arrays():
    shape = jax.ShapeDtypeStruct((3, 4), jnp.bfloat16)
    delta = jax.eval_shape(om.task_vector, {"w": shape}, {"w": shape})
    assert delta["w"].shape == (3, 4)
    assert delta["w"].dtype == jnp.float32


def test_two_leaves_of_one_name_are_refused():
    with pytest.raises(ValueError, match="both called 1"):
        om.task_vector({"1": jnp.ones(1)}, Twins(jnp.ones(1), jnp.ones(1)))


@jax.tree_util.register_pytree_with_keys_class
class Twins:
    """A container that gives two children one name."""

    def __init__(self, *children):
        self.children = children

    def tree_flatten_with_keys(self):
        return [(jax.tree_util.DictKey(1), c) for c in self.children], None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)

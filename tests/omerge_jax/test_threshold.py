"""The threshold against a sort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from omerge_jax.threshold.edge import top_k_threshold

jitted = jax.jit(top_k_threshold, static_argnums=2)


def kept(x, k, layer_axes=0):
    threshold = np.asarray(jitted(x, k, layer_axes))
    shape = threshold.shape + (1,) * (x.ndim - threshold.ndim)
    return np.abs(np.asarray(x, np.float32)) >= threshold.reshape(shape)


DISTRIBUTIONS = {
    "normal": lambda rng, n: rng.normal(size=n),
    "heavy tails": lambda rng, n: rng.standard_cauchy(n),
    "adam's first step": lambda rng, n: np.sign(rng.normal(size=n)) * (1e-6 - 1e-9 * rng.random(n)),
    "many zeros": lambda rng, n: rng.normal(size=n) * (rng.random(n) < 0.3),
    "many decades": lambda rng, n: np.exp(20 * rng.normal(size=n)),
}


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("density", [5e-4, 0.01, 0.1, 0.5, 0.99])
def test_keeps_what_a_sort_keeps(name, density):
    x = DISTRIBUTIONS[name](np.random.default_rng(1), 40_000).astype(np.float32)
    k = int(density * x.size)
    kth = np.sort(np.abs(x))[-k]
    np.testing.assert_array_equal(kept(jnp.asarray(x), k), np.abs(x) >= kth)


def test_keeps_exactly_k_where_magnitudes_differ():
    x = np.random.default_rng(2).permutation(np.linspace(-1, 0.999, 30_001)).astype(np.float32)
    assert len(np.unique(np.abs(x))) == x.size
    for k in (1, 2, 17, 3000, 29_999, 30_001):
        assert kept(jnp.asarray(x), k).sum() == k


def test_ties_at_the_threshold_are_all_kept():
    x = jnp.array([3.0, -2.0, 2.0, 2.0, 1.0])
    assert kept(x, 2).tolist() == [True, True, True, True, False]


def test_each_stacked_layer_is_its_own_tensor():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(4, 3, 50, 20)).astype(np.float32)
    x *= 10.0 ** rng.integers(-6, 6, (4, 3, 1, 1))
    mask = kept(jnp.asarray(x), 100, 2)
    assert (mask.sum((2, 3)) == 100).all()
    for i in range(4):
        for j in range(3):
            np.testing.assert_array_equal(mask[i, j], kept(jnp.asarray(x[i, j]), 100))


@given(hnp.arrays(np.float32, 24, elements=st.floats(width=32)), st.integers(1, 24))
@settings(deadline=None, max_examples=200)
def test_any_finite_infinite_or_subnormal_values(x, k):
    x = np.nan_to_num(x, nan=1.5, posinf=np.inf, neginf=-np.inf)
    threshold = np.asarray(jitted(x, k)).view(np.uint32)
    bits = np.append(np.sort(np.abs(x).view(np.uint32))[::-1], 0)
    assert bits[k - 1] >= threshold
    assert k == x.size or bits[k] < threshold or bits[k] == bits[k - 1]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_exact(dtype):
    x = jnp.asarray(np.random.default_rng(4).normal(size=999), dtype)
    kth = np.sort(np.abs(np.asarray(x, np.float32)))[-50]
    np.testing.assert_array_equal(kept(x, 50), np.abs(np.asarray(x, np.float32)) >= kth)


def test_no_sort_in_the_program():
    text = jax.jit(top_k_threshold).lower(jnp.ones(1000), 10).as_text()
    assert "stablehlo.while" in text
    assert "stablehlo.sort" not in text
    assert "chlo.top_k" not in text


def test_a_tensor_too_large_to_count_names_the_way_out():
    big = jax.ShapeDtypeStruct((3, 2**16, 2**16), jnp.bfloat16)
    with pytest.raises(ValueError, match="layer_axes"):
        jax.eval_shape(lambda x: top_k_threshold(x, 5), big)
    assert jax.eval_shape(lambda x: top_k_threshold(x, 5, 2), big).shape == (3, 2**16)

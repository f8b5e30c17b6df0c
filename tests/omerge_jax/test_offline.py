"""One-shot merges against float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

import omerge_jax as om


def models(count):
    rng = np.random.default_rng(0)
    trees = [{"w": rng.normal(size=(5, 3)), "b": rng.normal(size=4)} for _ in range(count)]
    return [
        {k: jnp.asarray(v, jnp.float32) for k, v in t.items()} | {"n": jnp.arange(3)} for t in trees
    ]


def test_linear_is_the_weighted_mean_and_ignores_the_base():
    base, a, b = models(3)
    merged = om.offline_merge(base, [a, FrozenDict(b)], weights=[0.3, 0.9])
    for name in ("w", "b"):
        x, y = np.asarray(a[name], np.float64), np.asarray(b[name], np.float64)
        np.testing.assert_allclose(merged[name], (0.3 * x + 0.9 * y) / 1.2, rtol=1e-6, atol=1e-7)
    assert merged["n"].tolist() == [0, 1, 2]


def test_task_arithmetic_adds_weighted_task_vectors():
    base, a, b = models(3)
    merged = om.offline_merge(base, [a, b], method="task_arithmetic", weights=[0.5, -0.2])
    for name in ("w", "b"):
        o, x, y = (np.asarray(t[name], np.float64) for t in (base, a, b))
        expected = o + 0.5 * (x - o) - 0.2 * (y - o)
        np.testing.assert_allclose(merged[name], expected, rtol=1e-6, atol=1e-7)


def test_bad_input_is_named():
    base, a = models(2)
    with pytest.raises(ValueError, match="method must be one of linear, task_arithmetic"):
        om.offline_merge(base, [a], method="tise", weights=[1.0])
    with pytest.raises(ValueError, match="one entry a model, got 2 for 1"):
        om.offline_merge(base, [a], weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="must not sum to 0"):
        om.offline_merge(base, [a, a], weights=[1.0, -1.0])
    with pytest.raises(ValueError, match=r"models\[1\]: b has shape \(2,\), base has shape \(4,\)"):
        om.offline_merge(base, [a, a | {"b": jnp.ones(2)}], weights=[1.0, 1.0])

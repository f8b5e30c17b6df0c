"""MAGPRUNE and the band of Breadcrumbs against numpy, with their edge cases."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import omerge_jax as om
from omerge_jax import random_mask
from omerge_jax.entries import Sample
from omerge_jax.sparsifiers.band import band
from omerge_jax.sparsifiers.base import SparsifyContext
from omerge_jax.sparsifiers.ranked import magnitude_ranked


def context(step=0, path=("layer", "kernel"), layer_axes=0):
    return SparsifyContext(jnp.int32(step), path, "update", layer_axes)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def sparsify(sparsifier, x, ctx=None):
    return np.asarray(jax.jit(lambda x: sparsifier(x, ctx or context()))(x))


def probabilities(x, density, ctx=None, **settings):
    """What the sparsifier draws with."""
    seen = []

    def draw(values, probability, ctx):
        seen.append(jnp.broadcast_to(probability, values.shape))
        return seen[0] > 2

    assert not magnitude_ranked(density, draw=draw, **settings)(x, ctx or context()).any()
    return np.asarray(seen[0])


def linear_in_rank(x, density, epsilon):
    """Of the rows along the last axis, by counting the smaller ones."""
    smaller = (np.abs(x)[..., None, :] < np.abs(x)[..., :, None]).sum(-1)
    return density - epsilon + 2 * epsilon * smaller / (x.shape[-1] - 1)


@pytest.mark.parametrize(
    ("shape", "axis", "layer_axes"),
    [
        ((7, 11), -1, 0),
        ((7, 11), -2, 0),
        ((7, 11), None, 0),
        ((13,), -2, 0),
        ((3, 7, 11), -2, 1),
        ((3, 7, 11), None, 1),
        ((3, 13), -2, 1),
        ((2, 3, 5, 7), -3, 1),
    ],
)
def test_probability_is_linear_in_the_rank_within_a_row(shape, axis, layer_axes):
    x = normal(*shape)
    found = probabilities(x, 0.4, context(layer_axes=layer_axes), epsilon=0.3, axis=axis)
    own = len(shape) - layer_axes
    if own == 1 or axis is None:
        rows = x.reshape(*shape[:layer_axes], -1)
        expected = linear_in_rank(rows, 0.4, 0.3).reshape(shape)
    else:
        along = axis if axis < 0 else axis + layer_axes
        expected = np.moveaxis(linear_in_rank(np.moveaxis(x, along, -1), 0.4, 0.3), -1, along)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_rows_of_one_entry_have_the_mean_probability():
    for shape, layer_axes in (((), 0), ((1,), 0), ((5, 1), 0), ((5,), 1)):
        found = probabilities(normal(*shape), 0.4, context(layer_axes=layer_axes))
        np.testing.assert_allclose(found, 0.4, rtol=1e-6)
    assert magnitude_ranked(0.4)(jnp.zeros((0, 3)), context()).shape == (0, 3)


def test_equal_magnitudes_are_ranked_by_position():
    found = probabilities(np.float32([2, -1, 1, -2, 1]), 0.5, epsilon=0.4)
    np.testing.assert_allclose(found, [0.7, 0.1, 0.3, 0.9, 0.5], rtol=1e-6)


def test_the_axis_may_depend_on_the_path():
    x, axis = normal(7, 11), lambda path: -2 if path[-1] == "kernel" else -1
    kernel = probabilities(x, 0.5, axis=axis)
    table = probabilities(x, 0.5, context(path=("embedding",)), axis=axis)
    np.testing.assert_array_equal(kernel, probabilities(x, 0.5, axis=-2))
    np.testing.assert_array_equal(table, probabilities(x, 0.5, axis=-1))


def test_a_schedule_near_the_ends_narrows_the_window():
    schedule = optax.linear_schedule(1.0, 0.0, 10)
    x = normal(4, 50)
    np.testing.assert_array_equal(magnitude_ranked(schedule)(x, context(0)), x)
    for step, low, high in ((1, 0.8, 1.0), (5, 0.35, 0.65), (9, 0.0, 0.2)):
        found = probabilities(x, schedule, context(step))
        np.testing.assert_allclose([found.min(), found.max()], [low, high], atol=1e-6)
    assert jnp.isfinite(magnitude_ranked(schedule)(x, context(9))).all()


def test_draws_follow_the_probabilities():
    x = np.tile(normal(1, 5), (40_000, 1))
    kept = sparsify(magnitude_ranked(0.5, epsilon=0.4, rescale="none"), x) != 0
    np.testing.assert_allclose(kept.mean(0), linear_in_rank(x[0], 0.5, 0.4), atol=0.012)
    other = sparsify(magnitude_ranked(0.5, epsilon=0.4, rescale="none", seed=1), x) != 0
    assert 0.1 < (kept != other).mean() < 0.5


def test_a_band_fitted_to_the_whole_applies_to_a_sample():
    x = jnp.where(normal(128, 9) > 0, 1.0, -1.0)
    sample = Sample((128, 9), 0, block=64, width=8, step=jnp.int32(5))
    f, ctx = band(0.5, gamma=0.1), context()
    of_sample = f.apply(sample.take(x), f.fit(x, ctx), dataclasses.replace(ctx, sample=sample))
    np.testing.assert_array_equal(of_sample, sample.take(f(x, ctx)))


def test_capacity_bounds_what_is_kept():
    x = normal(400, 100)
    for f in (band(0.03), magnitude_ranked(0.03, epsilon=0.02)):
        kept = (sparsify(f, x) != 0).sum()
        assert 0.8 * f.capacity(x.size) < kept <= f.capacity(x.size)
    with pytest.raises(ValueError, match="density"):
        band(optax.constant_schedule(0.1)).capacity(10)


def test_rescale():
    x = np.tile(normal(1, 5), (40_000, 1))
    inverse = sparsify(magnitude_ranked(0.5, epsilon=0.4), x)
    np.testing.assert_allclose(inverse.mean(0), x[0], atol=0.04)
    plain = sparsify(magnitude_ranked(0.5, epsilon=0.4, rescale="none"), x)
    probability = linear_in_rank(x[:1], 0.5, 0.4)
    np.testing.assert_allclose(inverse, plain / probability, rtol=1e-5)
    y, ctx = normal(3, 8, 9), context(layer_axes=1)
    normed = sparsify(magnitude_ranked(0.5, rescale="norm"), y, ctx)
    plain = sparsify(magnitude_ranked(0.5, rescale="none"), y, ctx)
    np.testing.assert_allclose(np.abs(normed).sum((1, 2)), np.abs(y).sum((1, 2)), rtol=1e-5)
    np.testing.assert_array_equal(normed != 0, plain != 0)


def test_bernoulli_takes_a_probability_per_element():
    share = jnp.linspace(0, 1, 5)
    bernoulli = jax.jit(lambda p: random_mask.bernoulli((50_000, 5), p, seed=0, step=0))
    mask = bernoulli(share)
    np.testing.assert_allclose(mask.mean(0), share, atol=0.01)
    assert not mask[:, 0].any()
    assert mask[:, 4].all()
    np.testing.assert_array_equal(mask[:, 2], bernoulli(0.5)[:, 2])
    with pytest.raises(ValueError, match="roadcast"):
        random_mask.bernoulli((5,), jnp.full((3, 5), 0.5), seed=0, step=0)


def band_in_numpy(x, density, gamma):
    """By a full sort: the band of int(density·n) entries below the largest int(gamma·n)."""
    kept, order = int(density * x.size), np.argsort(np.abs(x).ravel())
    bottom = max(0, x.size - kept - int(gamma * x.size))
    result = np.zeros(x.size, x.dtype)
    inside = order[bottom : bottom + kept]
    result[inside] = x.ravel()[inside]
    return result.reshape(x.shape)


@pytest.mark.parametrize("shape", [(9, 23), ()])
def test_band_keeps_what_a_sort_keeps(shape):
    x = normal(*shape)
    f = jax.jit(lambda density, gamma: band(density, gamma=gamma)(x, context()))
    for density in (0.001, 0.1, 0.5, 0.75, 0.999):
        for gamma in (0.0, 0.01, 0.25, 0.6, 0.99):
            expected = band_in_numpy(x, density, gamma)
            np.testing.assert_array_equal(f(density, gamma), expected)
    np.testing.assert_array_equal(band(1.0, gamma=0.5)(x, context()), x)


def test_a_python_density_counts_exactly():
    x = normal(1000)
    for density, gamma, kept in ((0.29, 0.07, 290), (0.57, 0.57, 570)):
        assert int(density * 1000) in (kept, kept - 1)
        found = sparsify(band(density, gamma=gamma), x)
        np.testing.assert_array_equal(found, band_in_numpy(x, density, gamma))


def test_equal_magnitudes_at_an_edge_of_the_band_are_chosen_at_random():
    x = np.float32([5, 3, -3, 3, 1, 1, -1, 0.5])
    choose = jax.jit(lambda seed: band(3 / 8, gamma=2 / 8, seed=seed)(x, context()))
    found = [choose(seed).tolist() for seed in range(8)]
    assert all(sorted(map(abs, row)) == [0, 0, 0, 0, 0, 1, 3, 3] for row in found)
    assert len(set(map(tuple, found))) > 1
    equal = jnp.where(jnp.arange(3000) % 2 == 0, 1.0, -1.0).reshape(3, 1000)
    at_step = jax.jit(lambda step: band(0.5, gamma=0.1)(equal, context(step, layer_axes=1)) != 0)
    first, second = at_step(0), at_step(1)
    assert first.sum(1).tolist() == second.sum(1).tolist() == [500] * 3
    assert (first != second).any()


def test_what_is_not_finite_is_never_dropped_as_an_outlier():
    for worst in (np.inf, np.nan):
        x = np.float32([1, worst, 2, 3])
        np.testing.assert_array_equal(sparsify(band(0.5, gamma=0.1), x), [0, worst, 0, 3])
        np.testing.assert_array_equal(sparsify(band(0.5, gamma=0.25), x), [0, worst, 2, 3])


def test_band_fit_and_apply_per_layer():
    x = normal(4, 6, 7) * np.float32([[[1]], [[10]], [[1e-20]], [[1e-40]]])
    ctx = context(layer_axes=1)
    for rescale, numbers in (("none", 6), ("norm", 7)):
        f = band(0.4, gamma=0.1, rescale=rescale)
        fitted, kept = jax.jit(lambda x, f=f: (f.fit(x, ctx), f(x, ctx)))(x)
        assert fitted.shape == (4, numbers)
        assert fitted.dtype == jnp.float32
        assert (fitted >= 0).all()
        np.testing.assert_array_equal(f.apply(x, fitted, ctx), kept)
        for layer in range(3):
            expected = band_in_numpy(x[layer], 0.4, 0.1)
            scale = np.abs(x[layer]).sum() / np.abs(expected).sum() if numbers == 7 else 1
            np.testing.assert_allclose(kept[layer], expected * scale, rtol=1e-5)
    assert isinstance(f, om.FittedSparsifier)
    assert band(1.0).fit(x, ctx) is None


@pytest.mark.parametrize("make", [lambda: band(0.5), lambda: magnitude_ranked(0.5)])
def test_dtype_hash_and_compilation(make):
    x = jnp.asarray(normal(6, 7), jnp.bfloat16)
    kept = make()(x, context())
    assert kept.dtype == jnp.bfloat16
    assert 0 < (kept == 0).mean() < 1
    assert hash(make()) == hash(make())
    np.testing.assert_array_equal(jax.jit(lambda x: make()(x, context()))(x), kept)


@pytest.mark.parametrize("make", [lambda: band(0.5), lambda: magnitude_ranked(0.5)])
def test_they_sparsify_online_merging(make):
    params = {"w": jnp.asarray(normal(6, 7))}
    delta, gradient = {"w": normal(6, 7, seed=1)}, {"w": normal(6, 7, seed=2)}
    tx = optax.chain(optax.sgd(0.1), om.online_merge(make(), om.linear(), alpha=0.25))
    state = om.with_delta(tx.init(params), delta)
    updates, _ = jax.jit(tx.update)(gradient, state, params)
    expected = []
    for x, role in ((-0.1 * gradient["w"], "update"), (delta["w"], "delta")):
        ctx = SparsifyContext(jnp.int32(0), ("w",), role)
        expected.append(make()(jnp.asarray(x), ctx))
    expected = 0.75 * expected[0] + 0.25 * expected[1]
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-5, atol=1e-6)


def test_bad_settings_are_named():
    for make in (band, magnitude_ranked):
        for density in (0, -0.1, 1.5):
            with pytest.raises(ValueError, match=f"got density = {density}"):
                make(density)
        with pytest.raises(ValueError, match="got rescale = 'l1'"):
            make(0.5, rescale="l1")
    with pytest.raises(ValueError, match=r"got gamma = 1\.0"):
        band(0.5, gamma=1.0)
    with pytest.raises(ValueError, match=r"density = 0\.9 and epsilon = 0\.15"):
        magnitude_ranked(0.9)
    with pytest.raises(ValueError, match=r"epsilon must be at least 0, got epsilon = -0\.1"):
        magnitude_ranked(0.5, epsilon=-0.1)
    magnitude_ranked(1.0)
    with pytest.raises(ValueError, match=r"got -3 for the leaf layer/kernel of shape \(3, 7, 9\)"):
        magnitude_ranked(0.5, axis=-3)(jnp.zeros((3, 7, 9)), context(layer_axes=1))

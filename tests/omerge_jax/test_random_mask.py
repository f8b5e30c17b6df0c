"""The counter-based masks are Bernoulli, independent, and the same everywhere."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from omerge_jax import random_mask
from tests.virtual_devices import run_python

DENSITIES = (5e-4, 1e-2, 0.1, 0.5, 0.9)
SHAPE = (2500, 4000)
# Over all tests of this file about 100 p-values are looked at, on fixed seeds.
SIGNIFICANCE = 1e-4


def draw(shape, density, **key):
    key = {"seed": 0, "step": 0, "path": ("layers", "kernel"), **key}
    fn = jax.jit(lambda: random_mask.bernoulli(shape, density, **key))
    return np.asarray(fn())


def chi_square(counts, trials, density):
    """p-value of counts of kept entries in equal groups of ``trials`` draws."""
    expected = trials * density
    statistic = ((counts - expected) ** 2 / (expected * (1 - density))).sum()
    return stats.chi2.sf(statistic, len(counts))


def correlation_p(a, b):
    """p-value of the correlation of two masks."""
    a, b = a.ravel().astype(np.float64), b.ravel().astype(np.float64)
    cov = (a * b).mean() - a.mean() * b.mean()
    z = cov / math.sqrt(a.var() * b.var()) * math.sqrt(a.size)
    return 2 * stats.norm.sf(abs(z))


@pytest.mark.parametrize("density", DENSITIES)
def test_kept_share_over_rows_and_columns(density):
    mask = draw(SHAPE, density)
    rows, columns = mask.sum(1), mask.sum(0)
    total = stats.binomtest(int(mask.sum()), mask.size, density).pvalue
    assert total > SIGNIFICANCE
    # Groups of at least 50 expected entries, so that chi-square holds at the smallest density.
    per_row = math.ceil(50 / (density * SHAPE[1]))
    groups = rows[: len(rows) // per_row * per_row].reshape(-1, per_row).sum(1)
    p = chi_square(groups, per_row * SHAPE[1], density)
    assert SIGNIFICANCE < p < 1 - SIGNIFICANCE
    per_column = math.ceil(50 / (density * SHAPE[0]))
    groups = columns[: len(columns) // per_column * per_column].reshape(-1, per_column).sum(1)
    p = chi_square(groups, per_column * SHAPE[0], density)
    assert SIGNIFICANCE < p < 1 - SIGNIFICANCE


@pytest.mark.parametrize("density", DENSITIES)
def test_independent_of_steps_leaves_roles_seeds_and_neighbours(density):
    mask = draw(SHAPE, density)
    others = {
        "step": draw(SHAPE, density, step=1),
        "far step": draw(SHAPE, density, step=1000),
        "leaf": draw(SHAPE, density, path=("layers", "bias")),
        "role": draw(SHAPE, density, role="delta"),
        "seed": draw(SHAPE, density, seed=1),
    }
    for name, other in others.items():
        assert correlation_p(mask, other) > SIGNIFICANCE, name
    for lag in (1, 2, 3, 16, 128, 1024):
        assert correlation_p(mask[:, lag:], mask[:, :-lag]) > SIGNIFICANCE, ("columns", lag)
        assert correlation_p(mask[lag:], mask[:-lag]) > SIGNIFICANCE, ("rows", lag)


def test_steps_are_not_shifts_of_one_another():
    """A hash keyed only at its input would show one mask inside the other at some offset."""
    first, second = (draw((4096,), 0.5, step=step) for step in (0, 1))
    signal = np.fft.rfft(first - first.mean()), np.fft.rfft(second - second.mean())
    cross = np.fft.irfft(signal[0] * np.conj(signal[1]))
    assert np.abs(cross).max() / (4096 * 0.25) < 6 / math.sqrt(4096)


@pytest.mark.parametrize("density", [5e-4, 0.3, 1.0])
def test_a_traced_density_gives_the_same_mask(density):
    traced = jax.jit(lambda d: random_mask.bernoulli((64, 300), d, seed=3, step=2))
    fixed = random_mask.bernoulli((64, 300), density, seed=3, step=2)
    np.testing.assert_array_equal(traced(jnp.float32(density)), fixed)
    if density == 1.0:
        assert bool(fixed.all())


def test_masks_nest_as_density_grows():
    small, large = draw((1000,), 0.2), draw((1000,), 0.6)
    assert (large | ~small).all()


def test_mask_follows_the_row_major_index_whatever_the_shape():
    flat = draw((60,), 0.5)
    for shape in [(6, 10), (3, 4, 5), (60, 1), (1, 60)]:
        np.testing.assert_array_equal(draw(shape, 0.5).ravel(), flat)


def test_a_scalar_and_an_empty_leaf():
    assert draw((), 1.0).shape == ()
    assert draw((0, 3), 0.5).shape == (0, 3)


@pytest.mark.parametrize(
    "shape",
    [
        (3, 5, 7),
        (80, 8192, 28672),
        (126, 16384, 53248),
        (2**16, 2**16),
        (2**17, 2**16),
        (3, 2**32),
        (5, 2**31 + 11),
        (2**20 + 7, 2**20 + 9),
        (2**31, 2, 2**9),
    ],
)
def test_element_index_does_not_wrap(shape):
    rng = np.random.default_rng(0)
    corners = np.array([[0] * len(shape), [n - 1 for n in shape]], np.uint64)
    inside = np.stack([rng.integers(0, n, 500, dtype=np.uint64) for n in shape], 1)
    points = np.concatenate([corners, inside])
    coordinates = [jnp.asarray(points[:, axis].astype(np.uint32)) for axis in range(len(shape))]
    high, low = random_mask.element_index(coordinates, shape)
    high = np.zeros(len(points), np.uint64) if high is None else np.asarray(high).astype(np.uint64)
    found = [(int(h) << 32) + int(w) for h, w in zip(high, np.asarray(low), strict=True)]
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    expected = [sum(int(c) * s for c, s in zip(p, strides, strict=True)) for p in points]
    assert found == expected


def test_the_high_word_changes_the_draw():
    key = random_mask.mask_key(0, 0, ("w",), "update")
    low = jnp.arange(100_000, dtype=jnp.uint32)
    plain = np.asarray(random_mask.hash_index(key, jnp.uint32(0), low)) < 2**31
    for high in (1, 2, 3):
        other = np.asarray(random_mask.hash_index(key, jnp.uint32(high), low)) < 2**31
        assert correlation_p(plain, other) > SIGNIFICANCE
        assert 0.49 < other.mean() < 0.51


def test_an_axis_beyond_32_bits_is_refused():
    with pytest.raises(ValueError, match=r"more than 2\*\*32 elements"):
        random_mask.element_index([jnp.zeros(1, jnp.uint32)], (2**32 + 1,))


MESH_PROGRAM = """
import hashlib, jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from omerge_jax import random_mask
devices = len(jax.devices())
mesh = jax.make_mesh((devices,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
for spec in (P("fsdp"), P(None, "fsdp")):
    fn = lambda step: random_mask.bernoulli((512, 4096), 0.1, seed=7, step=step, path=("w",))
    mask = jax.jit(fn, out_shardings=NamedSharding(mesh, spec))(jnp.int32(5))
    print(hashlib.sha256(np.asarray(mask).tobytes()).hexdigest(), len(mask.addressable_shards))
"""


def test_the_same_mask_on_one_and_on_eight_devices():
    digests, shards = set(), set()
    for devices in (1, 8):
        for line in run_python("-c", MESH_PROGRAM, devices=devices).splitlines():
            digest, count = line.split()
            digests.add(digest)
            shards.add(int(count))
    assert shards == {1, 8}
    assert len(digests) == 1

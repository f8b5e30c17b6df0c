"""Every kind of merge under eval_shape, out_shardings, vmap, checkify, scan and cond."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify

import omerge_jax as om
from omerge_jax.sparsifiers import magnitude
from omerge_jax.storage import SparseDelta

RATE, ALPHA, DENSITY = 1e-2, 0.1, 0.1


def plain(factory):
    return lambda **options: factory(ALPHA, density=DENSITY, **options)


def whole(factory):
    return lambda **options: factory(
        RATE, alpha=ALPHA, density=DENSITY, weight_decay=0.1, **options
    )


def relative(**options):
    return om.on_dare_adamw(RATE, alpha=om.relative(0.2), density=DENSITY, **options)


def band(seed, **options):
    keep = om.band(DENSITY, gamma=0.02, seed=seed)
    return om.online_merge(keep, om.linear(), alpha=ALPHA, seed=seed, **options)


def ranked(seed, **options):
    keep = om.magnitude_ranked(DENSITY, epsilon=0.05, seed=seed)
    return om.online_merge(keep, om.sign("weighted"), alpha=ALPHA, seed=seed, **options)


FIXED = {"delta_mask": "fixed"}
SAMPLED = {"threshold": "sampled"}
NEAREST, COMPENSATED = {"rounding": "nearest"}, {"rounding": "compensated"}
SPARSE, RECOMPUTE = {"storage": "sparse"}, {"storage": "recompute"}
CASES = {
    "dare": (plain(om.on_dare), {}),
    "dare sparse compensated k2": (
        plain(om.on_dare),
        FIXED | SPARSE | COMPENSATED | {"every_k": 2},
    ),
    "dare norm recompute": (plain(om.on_dare), RECOMPUTE | {"rescale": "norm"}),
    "ties": (plain(om.on_ties), {"diagnostics": True}),
    "ties sparse nearest k3": (plain(om.on_ties), SPARSE | NEAREST | {"every_k": 3}),
    "ties sampled recompute compensated": (
        plain(om.on_ties),
        SAMPLED | RECOMPUTE | COMPENSATED,
    ),
    "dare_adamw recompute k2": (whole(om.on_dare_adamw), RECOMPUTE | {"every_k": 2}),
    "dare_adamw relative": (relative, {}),
    "ties_adamw sparse compensated": (whole(om.on_ties_adamw), SPARSE | COMPENSATED),
    "ties_adamw sampled nearest k2": (
        whole(om.on_ties_adamw),
        SAMPLED | NEAREST | {"every_k": 2},
    ),
    "band": (band, {}),
    "band sparse nearest": (band, FIXED | SPARSE | NEAREST),
    "ranked compensated k2": (ranked, COMPENSATED | {"every_k": 2}),
    "ranked sparse": (ranked, FIXED | SPARSE),
}
# What the short tests run; every kind of sparsifier, storage, rounding and span is among them.
SHORT = (
    "dare",
    "dare sparse compensated k2",
    "ties",
    "ties sampled recompute compensated",
    "dare_adamw recompute k2",
    "ranked compensated k2",
)
LONG = tuple(case for case in CASES if case not in SHORT)
each_case = pytest.mark.parametrize(
    "case", [*SHORT, *(pytest.param(case, marks=pytest.mark.slow) for case in LONG)]
)


@pytest.fixture(autouse=True)
def small_samples(monkeypatch):
    """So that a small leaf has a sampled threshold too."""
    monkeypatch.setattr(magnitude, "_SAMPLE_ENTRIES", 16.0)


def layer_axes(path):
    return int(path[0] == "layers")


def merge_of(case, seed=0):
    """The transformation by itself."""
    factory, options = CASES[case]
    return optax.with_extra_args_support(factory(layer_axes=layer_axes, seed=seed, **options))


def make(case, seed):
    """The transformation after the optimizer that it needs."""
    inner = optax.identity() if "adamw" in case else optax.sgd(RATE)
    return optax.chain(inner, merge_of(case, seed))


def has(case, option):
    return option.items() <= CASES[case][1].items()


def tree(seed):
    """Two leaves of any values that cost nothing to compile, from a seed that may be traced."""
    shapes = {"layers": (2, 512, 2), "scale": ()}
    numbers = {name: 1 + np.arange(np.prod(s), dtype=np.float32) for name, s in shapes.items()}
    return {name: jnp.cos(x.reshape(shapes[name]) * (seed + 1)) for name, x in numbers.items()}


def start(case, seed):
    """Parameters and state at step 0; the seed is that of the data too."""
    params, tx = tree(seed), make(case, seed_of(case, seed))
    state = tx.init(params)
    return params, state if has(case, RECOMPUTE) else om.with_delta(state, tree(seed + 1))


def models(seed):
    return {"reference_params": tree(seed + 2), "base_params": tree(seed + 3)}


def advance(case, seed, params, state, step):
    """One training step; every merge is given the models that storage="recompute" asks for."""
    tx = make(case, seed_of(case, seed))
    grads = jax.tree.map(lambda p: jnp.cos(3 * p + step), params)
    updates, state = tx.update(grads, state, params, **models(seed))
    return optax.apply_updates(params, updates), state


def seed_of(case, seed):
    """The seed of the merge, which storage="sparse" hashes, so that it cannot be traced."""
    return 7 if has(case, SPARSE) else seed


@functools.cache
def compiled(case):
    return jax.jit(functools.partial(advance, case))


def loop(case, seed, steps):
    params, state = start(case, seed)
    for step in range(steps):
        params, state = compiled(case)(seed, params, state, float(step))
    return params, state


def types(tree):
    """Shapes and dtypes, and whether the dtypes are weak."""
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), tree)


def assert_same(a, b):
    """The compiler may round the last digit otherwise in another program."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6)


@each_case
def test_the_cases_are_what_they_say(case):
    _, state = start(case, 0)
    is_sparse = lambda leaf: isinstance(leaf, SparseDelta)  # noqa: E731
    assert any(map(is_sparse, jax.tree.leaves(state, is_leaf=is_sparse))) == has(case, SPARSE)
    if has(case, SAMPLED):
        keep = om.magnitude(DENSITY, threshold="sampled")
        ctx = om.SparsifyContext(jnp.int32(0), ("layers",), "update", 1)
        assert keep.choose_sample(tree(0)["layers"].shape, ctx) is not None


@each_case
def test_eval_shape_tells_the_real_types(case):
    before = jax.eval_shape(lambda: start(case, 0))
    real = start(case, 0)
    assert jax.tree.structure(before) == jax.tree.structure(real)
    assert types(before) == types(real)
    after = jax.eval_shape(functools.partial(advance, case), 0, *before, 0.0)
    real = loop(case, 0, 1)
    assert jax.tree.structure(after) == jax.tree.structure(real)
    assert types(after) == types(real) == types(before)


@each_case
def test_scan_and_cond_are_the_loop(case):
    """Steps that a condition skips leave no trace."""

    def body(carry, turn):
        step, taken = turn
        go, stay = functools.partial(advance, case, 0), lambda params, state, step: (params, state)
        return jax.lax.cond(taken, go, stay, *carry, step), None

    turns = (jnp.array([0.0, 9.0, 1.0, 2.0, 9.0, 3.0]), jnp.array([1, 0, 1, 1, 0, 1], bool))
    scanned, _ = jax.jit(lambda carry: jax.lax.scan(body, carry, turns))(start(case, 0))
    assert_same(scanned, loop(case, 0, 4))


@each_case
def test_vmap_over_seeds_is_a_loop_over_seeds(case):
    seeds = jnp.arange(5, 8, dtype=jnp.int32)
    together = jax.vmap(functools.partial(start, case))(seeds)
    update = jax.jit(jax.vmap(functools.partial(advance, case), in_axes=(0, 0, 0, None)))
    for step in range(2):
        together = update(seeds, *together, float(step))
    for index, seed in enumerate(seeds):
        assert_same(jax.tree.map(lambda x, i=index: x[i], together), loop(case, seed, 2))


@each_case
def test_checkify_passes_good_steps_and_reports_a_bad_one(case):
    """Without an optimizer before it, so that the merge is what passes the NaN on."""
    tx, params = merge_of(case), tree(0)
    state = tx.init(params)
    state = state if has(case, RECOMPUTE) else om.with_delta(state, tree(1))
    update = functools.partial(tx.update, **models(0))
    checked = jax.jit(checkify.checkify(update, errors=checkify.all_checks))
    for step in range(2):
        error, (_, state) = checked(tree(step), state, params)
        assert error.get() is None
    error, _ = checked(jax.tree.map(lambda p: p * jnp.nan, params), state, params)
    assert "nan generated by primitive" in error.get()


SHARDED = """
import json, sys, functools, jax, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from omerge_jax.sparsifiers import magnitude
from test_transformations import advance, assert_same, has, loop, start, SPARSE
magnitude._SAMPLE_ENTRIES = 16.0
kind, cases = AxisType[sys.argv[1]], json.loads(sys.argv[2])
mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
for case in cases:
    # JAX wants to be told of a scatter with explicit axes, so a sparse delta lies on every device.
    replicated = kind == AxisType.Explicit and has(case, SPARSE)
    def place(x):
        spread = x.ndim > 1 and x.shape[1] % 8 == 0 and not (replicated and x.ndim == 2)
        return NamedSharding(mesh, P(None, "x") if spread else P())
    expected = loop(case, 0, 2)
    with jax.set_mesh(mesh):
        shardings = jax.tree.map(place, jax.eval_shape(lambda: start(case, 0)))
        for told in ({}, {"out_shardings": shardings}):
            update = jax.jit(functools.partial(advance, case, 0), donate_argnums=(0, 1), **told)
            carry = jax.jit(lambda: start(case, 0), out_shardings=shardings)()
            for step in range(2):
                carry = update(*carry, float(step))
            found = jax.tree_util.tree_leaves_with_path(carry)
            for (path, x), wanted in zip(found, jax.tree.leaves(shardings), strict=True):
                assert x.sharding.is_equivalent_to(wanted, x.ndim), (case, path, x.sharding)
            assert_same(carry, expected)
print("ok")
"""


@pytest.mark.parametrize(
    ("axis_type", "cases"),
    [
        ("Auto", SHORT[1::2]),
        pytest.param("Auto", LONG + SHORT[::2], marks=pytest.mark.slow),
        pytest.param("Explicit", tuple(CASES), marks=pytest.mark.slow),
    ],
    ids=["auto", "auto long", "explicit"],
)
def test_params_and_state_stay_where_out_shardings_put_them(axis_type, cases):
    # LLVM's optimizations take longer than they save here.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", SHARDED, axis_type, json.dumps(cases)]
    here = Path(__file__).parent
    run = subprocess.run(
        command, env=env, cwd=here, capture_output=True, text=True, check=False, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]

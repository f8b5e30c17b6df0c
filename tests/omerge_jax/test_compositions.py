"""Merges inside what Optax and Flax offer, against loops that are written by hand.

Every composition trains a small network, and ends where a loop ends that calls the inner optimizer
alone and does the merge in numpy and float64: the formulas of the paper, the masks of
`omerge_jax.random_mask` for OnDARE, a sort for OnTIES.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax import contrib

import omerge_jax as om
from omerge_jax import random_mask
from omerge_jax.sparsifiers import magnitude
from omerge_jax.state import merge_states

RATE, ALPHA, DENSITY, SEED = 0.1, 0.02, 0.4, 5
STEPS = 12


def dare(update, delta, path, step, alpha=ALPHA):
    """(1 - α)·F(Δθ) + α·F(τ) with both masks drawn at this step; the delta is clamped to ±1."""
    ours, theirs = dare_kept(update, delta, path, step)
    return (1 - alpha) * ours + alpha * theirs


def dare_kept(update, delta, path, step):
    ours = np.where(bernoulli(update.shape, path, step, "update"), update / DENSITY, 0)
    theirs = np.where(bernoulli(delta.shape, path, step, "delta"), delta / DENSITY, 0)
    return ours, np.clip(theirs, -1, 1)


@functools.cache
def bernoulli(shape, path, step, role):
    options = {"seed": SEED, "step": step, "path": path, "role": role}
    return np.asarray(random_mask.bernoulli(shape, DENSITY, **options))


def ties(update, delta, path, step, alpha=ALPHA):
    """Weighted sum of the terms whose sign is that of F(Δθ) + F(τ)."""
    ours, theirs = ties_kept(update, delta, path, step)
    positive = ours + theirs >= 0
    return (1 - alpha) * np.where((ours > 0) == positive, ours, 0) + alpha * np.where(
        (theirs > 0) == positive, theirs, 0
    )


def ties_kept(update, delta, path, step):
    def keep(x, step):
        count = int(DENSITY * x.size) or x.size
        # The last key is the first to be sorted by.
        kept = np.lexsort((tie_order(x.size, path, step), np.abs(x).ravel()))[-count:]
        mask = np.zeros(x.size, bool)
        mask[kept] = True
        return np.where(mask.reshape(x.shape), x, 0)

    return keep(update, step), keep(delta, 0)


@functools.cache
def tie_order(size, path, step):
    start = int(random_mask.mask_key(SEED, step, path, "order")[0])
    return (np.arange(size, dtype=np.uint64) * 0x6A09E667 + start) % 2**32


class Kind(NamedTuple):
    """A merge of the library, and the same by hand."""

    factory: Callable[..., Any]
    by_hand: Callable[..., Any]
    kept: Callable[..., Any]

    def make(self, alpha=ALPHA, **options):
        options = {"seed": SEED, "rounding": "nearest"} | options
        return self.factory(alpha, density=DENSITY, **options)

    def merge(self, updates, delta, step, alpha=ALPHA):
        """Merges the leaves of nested dicts."""

        def one(key_path, update, tau):
            arrays = np.asarray(update, np.float64), np.asarray(tau, np.float64)
            return self.by_hand(*arrays, names(key_path), step, alpha)

        return jax.tree_util.tree_map_with_path(one, updates, delta)


KINDS = {"on_dare": Kind(om.on_dare, dare, dare_kept), "on_ties": Kind(om.on_ties, ties, ties_kept)}
each_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())


def names(key_path):
    return tuple(str(key.key) for key in key_path)


def random_tree(seed, shapes, size):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(size * rng.normal(size=shape), jnp.float32),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


SHAPES = {"hidden": {"kernel": (6, 8), "bias": (8,)}, "out": {"kernel": (8, 4)}}
START = random_tree(0, SHAPES, 0.4)
DELTA = random_tree(1, SHAPES, 0.1)
# An entry that OnDARE clamps once it is divided by the density.
DELTA["out"]["kernel"] = DELTA["out"]["kernel"].at[0, 0].set(0.8)
INPUTS = random_tree(2, (64, 6), 1.0)
TARGETS = jnp.tanh(INPUTS @ random_tree(3, (6, 4), 0.5))


def network(params, inputs):
    hidden = jnp.tanh(inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["out"]["kernel"]


@jax.jit
def loss(params):
    return jnp.mean(jnp.sum((network(params, INPUTS) - TARGETS) ** 2, -1))


# Compiled apart from the optimizer, so that both loops are given the same gradients.
gradient = jax.jit(jax.grad(loss))


def training_loop(tx, params=START, delta=DELTA, steps=STEPS, grad=gradient):
    """Returns the parameters and the state after some steps of the library."""
    # Compiled, as a delta of zeros is refused outside of jit.
    state = jax.jit(om.with_delta)(tx.init(params), delta)
    update = jax.jit(tx.update)
    for _ in range(steps):
        updates, state = update(grad(params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def loop_by_hand(inner, merge, params=START, delta=DELTA, steps=STEPS, grad=gradient):
    """Returns the parameters after some steps of ``inner`` whose updates ``merge`` merges."""
    state = inner.init(params)
    update = jax.jit(inner.update)
    for step in range(steps):
        updates, state = update(grad(params), state, params)
        params = add(params, merge(updates, delta, step))
    return params


def add(params, updates):
    return jax.tree.map(lambda p, u: jnp.asarray(np.float64(p) + u, p.dtype), params, updates)


def assert_close(trained, expected):
    assert jax.tree.structure(trained) == jax.tree.structure(expected)
    for ours, theirs in zip(jax.tree.leaves(trained), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def assert_trained(params, start=START, loss=loss):
    assert float(loss(params)) < 0.6 * float(loss(start))


MOMENTUM = optax.sgd(RATE / 2, momentum=0.5)


@each_kind
def test_the_loop_by_hand_tells_a_missing_delta_and_another_alpha(kind):
    """What all others rest on: that they could fail."""
    chained, _ = training_loop(optax.chain(MOMENTUM, kind.make()))
    assert_close(chained, loop_by_hand(MOMENTUM, kind.merge))
    zero = jax.tree.map(jnp.zeros_like, DELTA)
    for changes in ({"delta": zero}, {"merge": lambda *a: kind.merge(*a, alpha=1.001 * ALPHA)}):
        with pytest.raises(AssertionError):
            assert_close(chained, loop_by_hand(MOMENTUM, **({"merge": kind.merge} | changes)))


@each_kind
def test_masked_leaves_pass_unmerged(kind):
    """A head that the base lacks has no delta; the other leaves keep theirs."""
    mask = {"hidden": True, "out": {"kernel": False}}
    tx = optax.chain(MOMENTUM, optax.masked(kind.make(), mask))
    trained, _ = training_loop(tx, delta={"hidden": DELTA["hidden"]})

    def merge(updates, delta, step):
        merged = kind.merge({"hidden": updates["hidden"]}, {"hidden": delta["hidden"]}, step)
        return merged | {"out": updates["out"]}

    assert_close(trained, loop_by_hand(MOMENTUM, merge))
    assert_trained(trained)


@each_kind
def test_partition_gives_every_group_its_alpha_and_freezes_the_rest(kind):
    groups = {
        "strong": optax.chain(MOMENTUM, kind.make(alpha=3 * ALPHA)),
        "weak": optax.chain(optax.sgd(RATE), kind.make()),
        "frozen": optax.set_to_zero(),
    }
    labels = {"hidden": {"kernel": "strong", "bias": "frozen"}, "out": "weak"}
    trained, state = training_loop(optax.partition(groups, labels))

    inner = optax.partition(
        {"strong": MOMENTUM, "weak": optax.sgd(RATE), "frozen": optax.set_to_zero()}, labels
    )

    def merge(updates, delta, step):
        strong, weak = (kind.merge(updates, delta, step, alpha) for alpha in (3 * ALPHA, ALPHA))
        frozen = np.zeros(SHAPES["hidden"]["bias"])
        hidden = {"kernel": strong["hidden"]["kernel"], "bias": frozen}
        return {"hidden": hidden, "out": weak["out"]}

    assert_close(trained, loop_by_hand(inner, merge))
    np.testing.assert_array_equal(trained["hidden"]["bias"], START["hidden"]["bias"])
    assert_trained(trained)
    metrics = om.merge_metrics(state)
    totals = sorted(float(v) for name, v in metrics.items() if name.startswith("alpha_total"))
    np.testing.assert_allclose(totals, [STEPS * ALPHA, 3 * STEPS * ALPHA], rtol=1e-5)


@each_kind
@pytest.mark.parametrize("against", ["zero", "initial"])
def test_lora_adapters_are_the_parameters(kind, against):
    """The reference is a pair of adapters too; in the end the product goes into the base."""
    weight = random_tree(4, (6, 4), 0.3)
    shapes = {"a": (6, 3), "b": (3, 4)}
    initial = {"a": random_tree(5, shapes["a"], 0.4), "b": jnp.zeros(shapes["b"])}
    reference = jax.tree.map(jnp.add, initial, random_tree(6, shapes, 0.2))
    base = initial if against == "initial" else jax.tree.map(jnp.zeros_like, initial)
    delta = om.task_vector(reference, base)

    @jax.jit
    def adapted_loss(adapters):
        outputs = INPUTS @ weight + INPUTS @ adapters["a"] @ adapters["b"]
        return jnp.mean(jnp.sum((outputs - TARGETS) ** 2, -1))

    problem = {"params": reference, "delta": delta, "grad": jax.jit(jax.grad(adapted_loss))}
    trained, _ = training_loop(optax.chain(MOMENTUM, kind.make()), steps=25, **problem)
    expected = loop_by_hand(MOMENTUM, kind.merge, steps=25, **problem)
    assert_close(trained, expected)
    assert_trained(trained, reference, adapted_loss)


@each_kind
@pytest.mark.parametrize(
    "inner",
    [
        # With the usual eps, Adam's first step has one magnitude up to rounding, which a compiler
        # decides; galore and muon run Adam on vectors.
        contrib.galore(RATE, 3, 4, base_optimizer=optax.scale_by_adam(eps=1e-2)),
        contrib.muon(RATE, eps=1e-2),
        optax.adamw(RATE, eps=1e-2, weight_decay=0.1),
    ],
    ids=["galore", "muon", "adamw"],
)
def test_after_an_optimizer_that_mixes_or_scales_entries(kind, inner):
    trained, _ = training_loop(optax.chain(inner, kind.make()))
    assert_close(trained, loop_by_hand(inner, kind.merge))
    assert_trained(trained)


@each_kind
def test_lion_whose_updates_all_tie(kind):
    """|Δθ| is the learning rate everywhere: which entries OnTIES keeps is its order of ties alone."""
    inner = optax.lion(RATE / 4, weight_decay=0.0)
    trained, _ = training_loop(optax.chain(inner, kind.make()))
    assert_close(trained, loop_by_hand(inner, kind.merge))
    assert_trained(trained)


def test_magnitude_keeps_its_count_of_lion_updates_and_others_at_every_step():
    tx = optax.chain(optax.lion(RATE, weight_decay=0.0), om.on_ties(0, density=DENSITY))
    state, kept = tx.init(START), []
    for _ in range(3):
        updates, state = tx.update(gradient(START), state, START)
        kept.append(np.asarray(updates["hidden"]["kernel"] != 0))
    assert [mask.sum() for mask in kept] == [int(DENSITY * 48)] * 3
    assert (kept[0] != kept[1]).any()
    assert (kept[1] != kept[2]).any()


@each_kind
def test_schedule_free_averages_what_the_merge_emits(kind):
    """The merge moves z; gradients are taken at y, and x is what is evaluated."""
    b1 = 0.8
    tx = contrib.schedule_free(optax.chain(optax.sgd(RATE), kind.make()), RATE, b1=b1)
    trained, state = training_loop(tx)
    x = y = z = START
    for step in range(STEPS):
        updates = jax.tree.map(lambda g: -RATE * g, gradient(y))
        z = add(z, kind.merge(updates, DELTA, step))
        x = jax.tree.map(lambda a, b, t=step: a + (b - a) / (t + 1), x, z)
        y = jax.tree.map(lambda a, b: b1 * a + (1 - b1) * b, x, z)
    assert_close(trained, y)
    assert_close(contrib.schedule_free_eval_params(state, trained), x)
    assert_trained(y)
    assert_trained(x)


@each_kind
def test_multi_steps_outermost_merges_once_per_optimizer_step(kind):
    """Micro-batches are halves of the data; steps are counted in whole ones."""
    halves = [(INPUTS[:32], TARGETS[:32]), (INPUTS[32:], TARGETS[32:])]
    micro = jax.jit(
        jax.grad(lambda p, x, y: jnp.mean(jnp.sum((network(p, x) - y) ** 2, -1))),
    )
    tx = optax.MultiSteps(optax.chain(MOMENTUM, kind.make()), every_k_schedule=2)
    params, state = START, om.with_delta(tx.init(START), DELTA)
    update = jax.jit(tx.update)
    for step in range(2 * STEPS):
        updates, state = update(micro(params, *halves[step % 2]), state, params)
        if step % 2 == 0:
            assert not any(jnp.any(u) for u in jax.tree.leaves(updates))
        params = optax.apply_updates(params, updates)

    def mean(params):
        return jax.tree.map(lambda a, b: (a + b) / 2, *(micro(params, *half) for half in halves))

    assert_close(params, loop_by_hand(MOMENTUM, kind.merge, grad=mean))
    assert_trained(params)
    assert [int(s.merge_count) for s in merge_states(state)] == [STEPS]


@each_kind
def test_apply_if_finite_skips_the_merge_too(kind):
    """After a step that is not finite, masks and Σ alpha go on as if it had not been."""
    bad = (1, 4, 5)

    calls = iter(range(STEPS + len(bad)))

    def interrupted(params):
        scale = jnp.nan if next(calls) in bad else 1.0
        return jax.tree.map(lambda g: g * scale, gradient(params))

    tx = optax.apply_if_finite(optax.chain(MOMENTUM, kind.make()), max_consecutive_errors=3)
    trained, state = training_loop(tx, steps=STEPS + len(bad), grad=interrupted)
    assert_close(trained, loop_by_hand(MOMENTUM, kind.merge))
    assert_trained(trained)
    assert int(state.total_notfinite) == len(bad)
    assert float(om.merge_metrics(state)["alpha_total"]) == pytest.approx(STEPS * ALPHA, rel=1e-5)


STATIC = {"numbers": (), "layer_axes": ("layer_axes", "every_k", "density", "seed")}


@each_kind
@pytest.mark.parametrize("static_args", STATIC.values(), ids=STATIC.keys())
def test_inject_hyperparams_follows_a_schedule_and_a_hand(kind, static_args):
    """The merge's alpha follows a schedule; the learning rate is changed between two steps."""
    falling = optax.linear_schedule(4 * ALPHA, 0.0, STEPS)
    options = {"rounding": "nearest", "seed": SEED}
    if static_args:
        # A callable that is no schedule.
        options["layer_axes"] = lambda path: int(path[0] == "stacked")
    merge = optax.inject_hyperparams(kind.factory, static_args)(falling, density=DENSITY, **options)
    tx = optax.chain(optax.inject_hyperparams(optax.sgd)(RATE), merge)
    params, state = START, om.with_delta(tx.init(START), DELTA)
    update = jax.jit(tx.update)
    expected = START
    for step in range(STEPS):
        rate = RATE if step < STEPS // 2 else RATE / 2
        state[0].hyperparams["learning_rate"] = jnp.float32(rate)
        updates, state = update(gradient(params), state, params)
        params = optax.apply_updates(params, updates)
        proposed = jax.tree.map(lambda g, rate=rate: -rate * g, gradient(expected))
        alpha = 4 * ALPHA * (1 - step / STEPS)
        expected = add(expected, kind.merge(proposed, DELTA, step, alpha))
    assert update._cache_size() == 1
    assert_close(params, expected)
    assert_trained(params)
    assert float(om.merge_metrics(state)["alpha"]) == pytest.approx(alpha, rel=1e-5)


def perceptron():
    first, second = (nnx.Rngs(seed) for seed in (0, 1))
    return nnx.Sequential(nnx.Linear(6, 8, rngs=first), nnx.tanh, nnx.Linear(8, 4, rngs=second))


def adapted_linear():
    return nnx.LoRA(6, 3, 4, base_module=nnx.Linear(6, 4, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))


MODELS = {"all parameters": (perceptron, nnx.Param), "LoRA": (adapted_linear, nnx.LoRAParam)}


@each_kind
@pytest.mark.parametrize("example", MODELS.values(), ids=MODELS.keys())
def test_nnx_optimizer(kind, example):
    make, trainable = example
    model = make()

    def model_loss(model):
        return jnp.mean(jnp.sum((model(INPUTS) - TARGETS) ** 2, -1))

    graphdef, chosen, rest = nnx.split(model, trainable, ...)
    start = nnx.to_pure_dict(chosen)
    delta = jax.tree.map(lambda p: 0.1 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), start)
    optimizer = nnx.Optimizer(model, optax.chain(MOMENTUM, kind.make()), wrt=trainable)
    optimizer.opt_state = om.with_delta(optimizer.opt_state, delta)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(model_loss, argnums=nnx.DiffState(0, trainable))(model)
        optimizer.update(model, grads)

    @jax.jit
    def pure_loss(params):
        return model_loss(nnx.merge(graphdef, params, rest))

    for _ in range(STEPS):
        step(model, optimizer)
    trained = nnx.to_pure_dict(nnx.state(model, trainable))
    problem = {"params": start, "delta": delta, "grad": jax.jit(jax.grad(pure_loss))}
    assert_close(trained, loop_by_hand(MOMENTUM, kind.merge, **problem))
    assert_trained(trained, start, pure_loss)


@each_kind
def test_fused_chain(kind):
    inner = optax.adamw(RATE, eps=1e-2)
    trained, _ = training_loop(om.fused_chain(inner, kind.make()))
    assert_close(trained, loop_by_hand(inner, kind.merge))
    assert_trained(trained)


@pytest.mark.parametrize("wrapper", ["masked", "partition"])
def test_fused_chain_around_groups_of_leaves_with_a_sampled_threshold(wrapper, monkeypatch):
    """The state of the inner optimizer has no moments for some leaves."""
    monkeypatch.setattr(magnitude, "_SAMPLE_ENTRIES", 4.0)
    labels = {"hidden": "adam", "out": "sgd"}
    inner = {
        "masked": optax.masked(optax.adam(RATE, eps=1e-2), {"hidden": True, "out": False}),
        "partition": optax.partition(
            {"adam": optax.adam(RATE, eps=1e-2), "sgd": optax.sgd(RATE)}, labels
        ),
    }[wrapper]
    merge = KINDS["on_ties"].make(threshold="sampled")
    fused, _ = training_loop(om.fused_chain(inner, merge), steps=3)
    chained, _ = training_loop(optax.chain(inner, merge), steps=3)
    assert_close(fused, chained)


@each_kind
def test_step_k_rolls_the_span_back_and_merges_it_whole(kind):
    """Algorithm 2 with the roll-back done, not derived."""
    every_k = 3
    trained, state = training_loop(optax.chain(MOMENTUM, kind.make(every_k=every_k)))
    inner = MOMENTUM
    params = last_merge = START
    inner_state, span = inner.init(START), jax.tree.map(np.zeros_like, START)
    for step in range(STEPS):
        updates, inner_state = inner.update(gradient(params), inner_state, params)
        span = jax.tree.map(np.add, span, updates)
        if (step + 1) % every_k:
            params = optax.apply_updates(params, updates)
        else:
            params = last_merge = add(last_merge, kind.merge(span, DELTA, step))
            span = jax.tree.map(np.zeros_like, span)
    assert_close(trained, params)
    assert_trained(trained)
    merges = STEPS // every_k
    assert float(om.merge_metrics(state)["alpha_total"]) == pytest.approx(merges * ALPHA, rel=1e-5)


SCHEDULES = {
    "warm-up": optax.linear_schedule(0.0, 2 * ALPHA, STEPS),
    "cosine": optax.cosine_decay_schedule(2 * ALPHA, STEPS),
    "on and off": lambda step: jnp.where(step % 2 == 0, ALPHA, 0.0),
}


@each_kind
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES.keys())
def test_alpha_schedules_are_read_at_the_step_of_the_merge(kind, schedule):
    trained, state = training_loop(optax.chain(MOMENTUM, kind.make(alpha=schedule)))
    alphas = [float(schedule(step)) for step in range(STEPS)]

    def merge(updates, delta, step):
        return kind.merge(updates, delta, step, alphas[step])

    assert_close(trained, loop_by_hand(MOMENTUM, merge))
    assert_trained(trained)
    assert float(om.merge_metrics(state)["alpha_total"]) == pytest.approx(sum(alphas), rel=1e-5)


@each_kind
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_relative_gives_the_reference_its_share_of_the_norm(kind, scope):
    """Solved for α: α·‖F(τ)‖ = s·(α·‖F(τ)‖ + (1 − α)·‖F(Δθ)‖)."""
    share = 0.1
    tx = optax.chain(MOMENTUM, kind.make(alpha=om.relative(share, scope=scope)))
    trained, _ = training_loop(tx)

    def merge(updates, delta, step):
        def norms(key_path, update, tau):
            arrays = np.asarray(update, np.float64), np.asarray(tau, np.float64)
            return np.array([np.linalg.norm(x) for x in kind.kept(*arrays, names(key_path), step)])

        by_leaf = jax.tree_util.tree_map_with_path(norms, updates, delta)
        if scope == "global":
            total = np.sqrt(sum(pair**2 for pair in jax.tree.leaves(by_leaf)))
            by_leaf = jax.tree.map(lambda _: total, by_leaf)

        def one(key_path, update, tau, pair):
            arrays = np.asarray(update, np.float64), np.asarray(tau, np.float64)
            alpha = share * pair[0] / (share * pair[0] + (1 - share) * pair[1])
            return kind.by_hand(*arrays, names(key_path), step, alpha)

        return jax.tree_util.tree_map_with_path(one, updates, delta, by_leaf)

    assert_close(trained, loop_by_hand(MOMENTUM, merge))
    assert_trained(trained)

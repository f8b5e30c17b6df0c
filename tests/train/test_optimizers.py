"""Optimizers by name, next to torch and to each other; schedules next to transformers."""

from __future__ import annotations

from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import get_scheduler

import omerge_jax as om
from train.config import AlphaOptions, OptimizerOptions, ScheduleOptions, Sparsifier, UserError
from train.optimizers.alpha import alpha_scale_of
from train.optimizers.build import make_optimizer
from train.optimizers.check import check_optimizer
from train.optimizers.schedules import learning_rates, make_schedule
from train.training.step import init_state, make_train_step

MERGE = {"alpha": 1e-3, "density": 0.5}
STEPS = 6


def options(name: Any = "adamw", **fields: Any) -> OptimizerOptions:
    return OptimizerOptions(learning_rate=1e-2, name=name, **fields)


def draw(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"a": rng.normal(size=(6, 4)), "b": rng.normal(size=(5,))}


def as_jax(tree) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


def walk(
    chosen: OptimizerOptions, *, rate: float = 1e-2, steps: int = STEPS, delta: bool = True
) -> dict[str, np.ndarray]:
    """Parameters after a few steps on fixed gradients of norm about 5."""
    params = as_jax(draw(0))
    tx = make_optimizer(chosen, rate)
    state: Any = tx.init(params)
    if delta and chosen.delta_storage is not None:
        state = om.with_delta(state, as_jax(draw(1)))
    update = jax.jit(tx.update)
    for step in range(steps):
        updates, state = update(as_jax(draw(10 + step)), state, params)
        params = as_jax(optax.apply_updates(params, updates))
    return jax.device_get(params)


def test_adamw_equals_torch():
    chosen = options(b1=0.8, b2=0.95, eps=1e-6, weight_decay=0.1, max_grad_norm=1.0)
    found = walk(chosen)
    params = {name: torch.tensor(x, requires_grad=True) for name, x in draw(0).items()}
    optimizer = torch.optim.AdamW(
        params.values(), lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1
    )
    for step in range(STEPS):
        for name, gradient in draw(10 + step).items():
            params[name].grad = torch.tensor(gradient)
        assert torch.nn.utils.clip_grad_norm_(params.values(), 1.0) > 1  # clipping does something
        optimizer.step()
    for name, tensor in params.items():
        np.testing.assert_allclose(found[name], tensor.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_clipping_can_be_turned_off():
    clipped, free = (walk(options(max_grad_norm=norm, b1=0.0, eps=1.0)) for norm in (1.0, 0.0))
    assert np.abs(clipped["a"] - free["a"]).max() > 1e-4


@pytest.mark.parametrize("name", ["on_dare", "on_ties", "child_tuning", "keep_largest"])
def test_a_full_mask_and_no_reference_leave_adamw(name):
    fields = {"density": 1.0} | ({"alpha": 0.0} if name.startswith("on_") else {})
    expected, found = (
        walk(options(weight_decay=0.1)),
        walk(options(name, weight_decay=0.1, **fields)),
    )
    for leaf in expected:
        np.testing.assert_allclose(found[leaf], expected[leaf], rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["on_dare", "on_dare_adamw", "on_ties", "on_ties_adamw", "online_merge"]
)
def test_merging_optimizers_want_the_delta(name):
    more = {"sparsifier": "random", "consensus": "sign"} if name == "online_merge" else {}
    assert options(name, **MERGE, **more).holds_delta
    assert options(name, density=0.5, alpha=0.0, **more).delta_storage is None
    with pytest.raises(ValueError, match="with_delta"):
        walk(options(name, **MERGE, **more), delta=False)
    moved = walk(options(name, **MERGE, **more))
    unmoved = walk(options(name, density=0.5, alpha=0.0, **more))
    assert np.abs(moved["a"] - unmoved["a"]).max() > 0


@pytest.mark.parametrize("name", ["on_dare", "on_ties"])
def test_weight_decay_is_merged_or_not(name):
    """In the authors' order decay reaches every entry; after optax.adamw it is masked too."""
    fields = {"alpha": 0.0, "density": 0.2, "weight_decay": 0.5}
    start = jax.device_get(as_jax(draw(0)))["a"]
    after_decay = walk(options(f"{name}_adamw", **fields), steps=1)["a"]
    masked_decay = walk(options(name, **fields), steps=1)["a"]
    assert (after_decay != start).all()
    assert (masked_decay == start).mean() > 0.5


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("seed", 1),
        ("delta_mask", "fixed"),
        ("clip", 1e-3),
        ("rescale", "none"),
        ("every_k", 2),
        ("rounding", "nearest"),
    ],
)
def test_fields_of_on_dare_are_read(field, value):
    usual, other = options("on_dare", **MERGE), options("on_dare", **MERGE, **{field: value})
    assert np.abs(walk(usual)["a"] - walk(other)["a"]).max() > 0


def test_election_is_read():
    fields = {"alpha": 0.01, "density": 1.0}
    usual, other = (walk(options("on_ties", election=e, **fields)) for e in (None, "weighted"))
    assert np.abs(usual["a"] - other["a"]).max() > 0


def test_clip_of_zero_is_none():
    clipped, free = (
        walk(options("on_dare", clip=clip, rescale="norm", **MERGE), rate=1e3, steps=1)["a"]
        for clip in (None, 0.0)
    )
    assert np.abs(clipped - draw(0)["a"]).max() < 1.1  # the library's default is 1
    assert np.abs(free - draw(0)["a"]).max() > 100


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (options("on_dare", density=0.5), "optimizer.alpha is not set; on_dare needs it"),
        (options("child_tuning"), "optimizer.density is not set; child_tuning needs it"),
        (options(alpha=0.1), "optimizer.alpha is set to 0.1, but adamw has no use for it"),
        (options("child_tuning", density=0.5, alpha=0.1), "(only on_dare, on_dare_adamw, on_ties"),
        (
            options("on_ties", clip=1.0, **MERGE),
            "optimizer.clip is set to 1.0, but on_ties has no use",
        ),
        (
            options("on_dare", storage="sparse", **MERGE),
            "on_dare: storage='sparse' holds F(τ) once",
        ),
        (
            options("on_dare", alpha=-0.1, density=0.5),
            "optimizer.alpha must be in [0, 1], got -0.1",
        ),
        (
            options("on_dare", alpha=0.1, density=1.1),
            "optimizer.density must be in (0, 1], got 1.1",
        ),
        (options("on_dare", clip=-1.0, **MERGE), "optimizer.clip must be 0 or larger, got -1.0"),
        (
            options("online_merge", consensus="sign", **MERGE),
            "optimizer.sparsifier is not set; online_merge of None and sign needs it",
        ),
        (
            options("online_merge", sparsifier="band", consensus="linear", clip=1.0, **MERGE),
            "online_merge of band and linear has no use for it (only random)",
        ),
        (
            options("online_merge", sparsifier="identity", consensus="linear", **MERGE),
            "optimizer.density is set to 0.5, but online_merge of identity and linear has no use",
        ),
        (
            options(
                "online_merge",
                sparsifier="random",
                consensus="linear",
                election="weighted",
                **MERGE,
            ),
            "has no use for it (only consensus sign)",
        ),
        (options("on_dare_adamw", inner="lion", **MERGE), "optimizer.inner is set to 'lion'"),
        (
            options("on_dare", inner="lion", eps=1e-6, **MERGE),
            "optimizer.eps is set to 1e-06, but lion",
        ),
        (
            options("on_dare", alpha=AlphaOptions(value=0.1, relative=0.1), density=0.5),
            "exactly one of optimizer.alpha.value and optimizer.alpha.relative",
        ),
        (
            options("on_dare", alpha=AlphaOptions(value=0.1, scope="tensor"), density=0.5),
            "optimizer.alpha.scope is set to 'tensor', but only alpha.relative",
        ),
        (
            options("on_dare", alpha=AlphaOptions(relative=1.5), density=0.5),
            "optimizer.alpha.relative must be in (0, 1], got 1.5",
        ),
        (
            options("on_dare", alpha=AlphaOptions(value=0.1, gate=70), density=0.5),
            "optimizer.alpha.gate must be in (0, 1], got 70",
        ),
    ],
)
def test_settings_that_do_not_fit(chosen, message):
    with pytest.raises(UserError) as caught:
        check_optimizer(chosen)
    assert message in str(caught.value)


@pytest.mark.parametrize(("kind", "warmup"), [("linear", 3), ("cosine", 3), ("cosine", 0)])
def test_schedules_equal_those_of_transformers(kind, warmup):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=12)
    expected = []
    for _ in range(12):
        expected.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    schedule = make_schedule(ScheduleOptions(type=kind, warmup_steps=warmup), 0.5, 12)
    np.testing.assert_allclose(learning_rates(schedule, 12), expected, rtol=1e-6, atol=1e-7)


def test_constant_schedule_and_final_scale():
    constant = make_schedule(ScheduleOptions(type="constant", warmup_steps=2), 1.0, 5)
    assert learning_rates(constant, 5).tolist() == [0.0, 0.5, 1.0, 1.0, 1.0]
    for kind in ("linear", "cosine"):
        schedule = make_schedule(ScheduleOptions(type=kind, final_scale=0.25), 1.0, 8)
        assert learning_rates(schedule, 9)[8] == pytest.approx(0.25)


def test_warmup_longer_than_the_run():
    with pytest.raises(UserError, match=r"schedule\.warmup_steps must be smaller than the 5 steps"):
        make_schedule(ScheduleOptions(warmup_steps=5), 1.0, 5)


def test_lion_is_that_of_its_paper():
    """Chen et al. 2023, Algorithm 2, in float64."""
    chosen = options("lion", b1=0.8, b2=0.9, weight_decay=0.1, max_grad_norm=0.0)
    found = walk(chosen)
    params = draw(0)
    momentum = {name: np.zeros_like(x) for name, x in params.items()}
    for step in range(STEPS):
        for name, gradient in draw(10 + step).items():
            direction = np.sign(0.8 * momentum[name] + 0.2 * gradient)
            params[name] = params[name] - 1e-2 * (direction + 0.1 * params[name])
            momentum[name] = 0.9 * momentum[name] + 0.1 * gradient
    for name, expected in params.items():
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)


def test_inner_is_what_is_merged():
    """With everything kept, OnDARE's linear merge is (1 - alpha) of the update plus the delta."""
    alpha = 0.25
    fields = {"alpha": alpha, "density": 1.0, "rounding": "nearest", "max_grad_norm": 0.0}
    for inner in ("lion", "sgd"):
        found = walk(options("on_dare", inner=inner, **fields), steps=1)
        for leaf, start in as_jax(draw(0)).items():
            gradient = draw(10)[leaf]
            update = -1e-2 * (np.sign(gradient) if inner == "lion" else gradient)
            expected = start + (1 - alpha) * update + alpha * np.clip(draw(1)[leaf], -1, 1)
            np.testing.assert_allclose(found[leaf], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("consensus", ["linear", "sign"])
@pytest.mark.parametrize("sparsifier", get_args(Sparsifier))
def test_every_sparsifier_meets_every_consensus(sparsifier, consensus):
    more = {} if sparsifier == "identity" else {"density": 0.5}
    if sparsifier == "magnitude_ranked":
        more["epsilon"] = 0.3
    chosen = options(
        "online_merge", sparsifier=sparsifier, consensus=consensus, alpha=0.1, inner="sgd", **more
    )
    check_optimizer(chosen)
    found = walk(chosen, steps=1)
    # The same thing, put together by hand from the library.
    given = {"axis": -2} if sparsifier == "magnitude_ranked" else {}
    made = {"linear": om.linear, "sign": om.sign}[consensus]()
    merge = om.online_merge(getattr(om, sparsifier)(**more, **given), made, alpha=0.1, layer_axes=0)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-2), merge)
    params = as_jax(draw(0))
    updates, _ = tx.update(
        as_jax(draw(10)), om.with_delta(tx.init(params), as_jax(draw(1))), params
    )
    for leaf, expected in optax.apply_updates(params, updates).items():
        np.testing.assert_allclose(found[leaf], expected, rtol=1e-6)


def test_on_dare_and_on_ties_are_online_merges():
    same = {
        "on_dare": {"sparsifier": "random", "consensus": "linear"},
        "on_ties": {"sparsifier": "magnitude", "consensus": "sign", "delta_mask": "fixed"},
    }
    for name, parts in same.items():
        for leaf, expected in walk(options(name, **MERGE)).items():
            found = walk(options("online_merge", **parts, **MERGE))[leaf]
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (ScheduleOptions(type="constant"), [0.2] * 4),
        (ScheduleOptions(type="linear"), [0.2, 0.15, 0.1, 0.05]),
        (ScheduleOptions(type="cosine"), [0.2 * (1 + np.cos(np.pi * t / 4)) / 2 for t in range(4)]),
        (ScheduleOptions(type="constant", warmup_steps=2), [0, 0.1, 0.2, 0.2]),
    ],
)
@pytest.mark.parametrize("kind", ["value", "relative"])
def test_alpha_follows_its_schedule(kind, schedule, expected):
    fields: dict[str, Any] = {kind: 0.2, "schedule": schedule}
    alpha = AlphaOptions(**fields)
    chosen = options(
        "on_dare", alpha=alpha, density=1.0, clip=0.0, diagnostics=True, rounding="nearest"
    )
    check_optimizer(chosen)
    params, delta = as_jax(draw(0)), as_jax(draw(1))
    tx = make_optimizer(chosen, 1e-2, steps=4)
    plain = make_optimizer(options(), 1e-2)
    start: Any = tx.init(params)
    state, plain_state = om.with_delta(start, delta), plain.init(params)
    update = jax.jit(tx.update)
    for step, share in enumerate(expected):
        gradients = as_jax(draw(10 + step))
        _, state = update(gradients, state, params)
        ours, plain_state = plain.update(gradients, plain_state, params)
        reached = float(om.merge_metrics(state)["alpha"])
        if kind == "relative":
            reference = reached * optax.tree.norm(delta)
            reached = reference / (reference + (1 - reached) * optax.tree.norm(ours))
        assert float(reached) == pytest.approx(share, rel=1e-3, abs=1e-6)


def test_a_warmup_of_alpha_longer_than_the_run():
    alpha = AlphaOptions(value=0.1, schedule=ScheduleOptions(type="constant", warmup_steps=5))
    with pytest.raises(
        UserError, match=r"optimizer\.alpha\.schedule\.warmup_steps must be smaller"
    ):
        make_optimizer(options("on_dare", alpha=alpha, density=0.5), 1e-2, steps=5)


def tiny_steps(chosen: OptimizerOptions, steps: int) -> tuple[np.ndarray, Any]:
    """bfloat16 parameters of 1 after steps of 1e-4, a fortieth of their last digit."""
    params = {"w": jnp.ones(512, jnp.bfloat16)}
    tx = make_optimizer(chosen, 1e-4)
    state: Any = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update({"w": jnp.full(512, -1.0, jnp.bfloat16)}, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    assert params["w"].dtype == jnp.bfloat16
    return np.asarray(params["w"], np.float64), state


@pytest.mark.parametrize("name", ["adamw", "lion", "child_tuning", "keep_largest"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "compensated"])
def test_small_updates_arrive_in_bfloat16(name, rounding):
    fields = {"rounding": rounding, "max_grad_norm": 0.0}
    chosen = options(name, **fields, **({} if name in ("adamw", "lion") else {"density": 1.0}))
    check_optimizer(chosen)
    found, _ = tiny_steps(chosen, 200)
    if rounding == "nearest":
        assert (found == 1).all()
        return
    # bfloat16 next to 1 has steps of 1/128; 512 walks of 200 steps leave 1e-3 of noise.
    if rounding == "stochastic":
        assert found.mean() == pytest.approx(1.02, abs=2e-3)
    else:
        assert (np.abs(found - 1.02) < 2**-7).all()


def test_moments_have_the_type_that_is_asked_for():
    _, state = tiny_steps(options(moment_dtype="float32", rounding="compensated"), 1)
    large = [leaf for leaf in jax.tree.leaves(state) if leaf.size == 512]
    assert len(large) == 3  # two moments and a residual
    assert {leaf.dtype for leaf in large} == {jnp.dtype("float32")}
    params = {"w": jnp.zeros(4, jnp.bfloat16)}
    moments = {}
    for dtype in (None, "float32"):
        tx = make_optimizer(options(moment_dtype=dtype), 1e-3)
        state: Any = tx.init(params)
        update = jax.jit(tx.update)
        for size in [1.0] + 300 * [0.0]:
            _, state = update({"w": jnp.full(4, size, jnp.bfloat16)}, state, params)
        nu = optax.tree.get(state, "nu")["w"]
        moments[dtype] = float(nu[0])
    start = 0.25 * 1e-3  # clipped to a norm of 1
    assert moments["float32"] == pytest.approx(start * 0.999**300, rel=1e-2)
    assert moments[None] == pytest.approx(start, rel=1e-2)  # stands still


def test_the_gate_opens_with_the_reward_accuracy():
    chosen = options("on_dare", alpha=AlphaOptions(value=0.1, gate=0.7), density=0.5)
    check_optimizer(chosen)
    tx = make_optimizer(chosen, 1e-3, layer_axes=lambda path: 0, steps=10)

    def loss_fn(params, batch):
        return jnp.sum(params["w"] ** 2), {"rewards/accuracies": jnp.mean(batch["right"])}

    step = make_train_step(loss_fn, tx, alpha_scale=alpha_scale_of(chosen))
    state = init_state({"w": jnp.ones(8)}, tx, {"w": jnp.ones(8)})
    found = []
    for right in ([1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]):
        state, metrics = step(state, {"right": jnp.array(right)})
        found.append((float(metrics["merge/alpha"]), float(metrics["merge/alpha_total"])))
    np.testing.assert_allclose(found, [(0, 0), (0.1, 0.1), (0, 0.1)])

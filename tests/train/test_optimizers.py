"""Optimizers by name, next to torch and to each other; schedules next to transformers."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import get_scheduler

import omerge_jax as om
from train.config import OptimizerOptions, ScheduleOptions, UserError
from train.optimizers import (
    FIELDS,
    check_optimizer,
    learning_rates,
    make_optimizer,
    make_schedule,
    needs_delta,
)

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
    if delta and needs_delta(chosen):
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


@pytest.mark.parametrize("name", ["on_dare", "on_ties", "child_tuning"])
def test_a_full_mask_and_no_reference_leave_adamw(name):
    fields = {"density": 1.0} if name == "child_tuning" else {"density": 1.0, "alpha": 0.0}
    expected, found = (
        walk(options(weight_decay=0.1)),
        walk(options(name, weight_decay=0.1, **fields)),
    )
    for leaf in expected:
        np.testing.assert_allclose(found[leaf], expected[leaf], rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in FIELDS if "alpha" in FIELDS[name]])
def test_merging_optimizers_want_the_delta(name):
    assert needs_delta(options(name, **MERGE))
    with pytest.raises(ValueError, match="with_delta"):
        walk(options(name, **MERGE), delta=False)
    moved = walk(options(name, **MERGE))
    unmoved = walk(options(name, density=0.5, alpha=0.0))
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

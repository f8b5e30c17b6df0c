"""Objectives on a tiny decoder: KTO's divergence, reference-free losses, β that changes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train.builders import COMPLETION, ROWS, make_batch, make_model
from train.losses import (
    PreferenceLoss,
    UnpairedLoss,
    beta_schedule,
    check_starts_at_reference,
    check_unpaired_start,
)
from train.losses.schedule import BETA_SCHEDULES
from train.objectives.preference import preference_loss, reference_logps_fn
from train.objectives.unpaired import unpaired_logps_fn, unpaired_loss
from train.training.step import init_state, make_train_step


@pytest.fixture(scope="module")
def answers():
    """A model and labelled answers with mismatched ones and the model's own reference."""
    graphdef, params = make_model()
    batch = make_batch(("completion",))
    batch |= {"label": np.array([True, False, True, True])}
    batch |= {
        f"kl_{part}": np.roll(batch[f"completion_{part}"], 1, 0) for part in ("tokens", "mask")
    }
    logps = unpaired_logps_fn(graphdef, ("completion", "kl"))(params, batch)
    names = ("reference_completion_logps", "reference_kl_logps")
    return graphdef, params, {**batch, **dict(zip(names, map(np.asarray, logps), strict=True))}


def shifted(batch, name, by):
    return {**batch, name: batch[name] - np.asarray(by, np.float32)}


def test_kto_starts_with_rewards_and_divergence_of_zero(answers):
    graphdef, params, batch = answers
    loss_fn = jax.jit(unpaired_loss(graphdef, UnpairedLoss(beta=0.5)))
    loss, metrics = loss_fn(params, batch)
    np.testing.assert_allclose(loss, 0.5, rtol=1e-6)
    check_unpaired_start(metrics, beta=0.5, tolerance=1e-5)
    for name in ("reference_completion_logps", "reference_kl_logps"):
        wrong = loss_fn(params, shifted(batch, name, 1.0))[1]
        with pytest.raises(ValueError, match="does not start at the reference"):
            check_unpaired_start(wrong, beta=0.5)


def test_a_batch_of_one_label_can_start(answers):
    graphdef, params, batch = answers
    all_good = {**batch, "label": np.ones(ROWS, bool)}
    metrics = jax.jit(unpaired_loss(graphdef))(params, all_good)[1]
    assert np.isnan(metrics["rewards/rejected"])
    check_unpaired_start(metrics, beta=0.1)


@pytest.mark.parametrize(
    ("by", "kl"), [([-5, -5, 1, 1], 0.0), ([4, -1, 2, -1], 1.0), ([-1, -1, -1, -2], 0.0)]
)
def test_the_divergence_is_clamped_after_the_mean_over_the_batch(answers, by, kl):
    """Clamped row by row, or half by half as devices would, it would be another number."""
    graphdef, params, batch = answers
    metrics = jax.jit(unpaired_loss(graphdef))(params, shifted(batch, "reference_kl_logps", by))[1]
    np.testing.assert_allclose(metrics["kl"], kl, atol=1e-4)


def test_no_gradient_passes_through_the_mismatched_answers(answers):
    graphdef, params, batch = answers
    apart = shifted(batch, "reference_kl_logps", 3.0)
    loss_fn = unpaired_loss(graphdef, UnpairedLoss(beta=0.5))

    def by_hand(params):
        logps = unpaired_logps_fn(graphdef, ("completion",))(params, apart)[0]
        ratio = 0.5 * (logps - apart["reference_completion_logps"] - 3.0)
        sign = jnp.where(apart["label"], 1.0, -1.0)
        return jnp.mean(1 - jax.nn.sigmoid(sign * ratio))

    found, expected = jax.jit(
        lambda params: (jax.grad(lambda p: loss_fn(p, apart)[0])(params), jax.grad(by_hand)(params))
    )(params)
    for ours, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["simpo", "orpo"])
def test_reference_free_losses_read_no_reference(loss_type):
    graphdef, params = make_model()
    batch = make_batch(("chosen", "rejected"))
    tx = optax.adam(1e-2)
    step = make_train_step(preference_loss(graphdef, PreferenceLoss(loss_type)), tx)
    state, first = step(init_state(params, tx), batch)
    check_starts_at_reference(first, PreferenceLoss(loss_type))
    metrics = first
    for _ in range(5):
        state, metrics = step(state, batch)
    assert metrics["loss"] < first["loss"]


def test_tails_of_the_reference_are_weighed_like_the_policy_s():
    graphdef, params = make_model()
    batch = make_batch(("chosen", "rejected"))
    batch["chosen_mask"][:] = True
    batch["rejected_mask"] = np.arange(COMPLETION) < np.array([[1], [2], [3], [6]])

    loss_fn = jax.jit(preference_loss(graphdef, PreferenceLoss(ld_alpha=0.2)))

    def rewards(ld_alpha):
        chosen, rejected = reference_logps_fn(graphdef, ld_alpha=ld_alpha)(params, batch)
        columns = {"reference_chosen_logps": chosen, "reference_rejected_logps": rejected}
        return loss_fn(params, {**batch, **columns})[1]

    check_starts_at_reference(rewards(0.2), PreferenceLoss(ld_alpha=0.2), tolerance=1e-5)
    with pytest.raises(ValueError, match="rewards/chosen"):
        check_starts_at_reference(rewards(None), PreferenceLoss(ld_alpha=0.2))


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_beta_goes_from_its_first_value_to_its_last(kind):
    beta_at = beta_schedule(kind, 0.1, 0.5, 5)
    share = np.linspace(0, 1, 5)
    share = share if kind == "linear" else (1 - np.cos(np.pi * share)) / 2
    found = [float(beta_at(jnp.int32(step))) for step in range(5)]
    np.testing.assert_allclose(found, 0.1 + 0.4 * share, rtol=1e-6)
    assert beta_schedule("constant", 0.1, None, 5) is None


def test_beta_follows_its_schedule_on_the_traced_step():
    graphdef, params = make_model()
    batch = make_batch(("chosen", "rejected"))
    chosen, rejected = reference_logps_fn(graphdef)(params, batch)
    batch |= {"reference_chosen_logps": chosen - 1, "reference_rejected_logps": rejected + 1}
    tx, steps = optax.sgd(0.0), 5
    beta_at = beta_schedule("linear", 0.1, 0.5, steps)
    step = make_train_step(preference_loss(graphdef, beta_at=beta_at), tx)
    state, betas = init_state(params, tx), []
    for _ in range(steps):
        state, metrics = step(state, batch)
        betas.append(float(metrics["beta"]))
        np.testing.assert_allclose(metrics["rewards/margins"], 2 * betas[-1], rtol=1e-4)
        wanted = -jax.nn.log_sigmoid(2 * betas[-1])
        np.testing.assert_allclose(metrics["loss"], wanted, rtol=1e-4)
    np.testing.assert_allclose(betas, np.linspace(0.1, 0.5, steps), rtol=1e-6)
    assert step._cache_size() == 1


@pytest.mark.parametrize(
    ("kind", "final", "message"),
    [
        ("exponential", 0.2, f"one of {', '.join(BETA_SCHEDULES)}, got 'exponential'"),
        ("constant", 0.2, "beta_final is 0.2, but a constant beta has no use"),
        ("linear", None, "beta_final must be positive with beta_schedule 'linear', got None"),
        ("cosine", 0.0, "beta_final must be positive"),
    ],
)
def test_schedules_that_do_not_fit_are_named(kind, final, message):
    with pytest.raises(ValueError, match=message):
        beta_schedule(kind, 0.1, final, 5)

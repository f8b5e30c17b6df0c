"""KTO and APO-zero on labelled answers, against TRL's own loss code."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from trl.trainer.kto_trainer import KTOTrainer

from tests.train.trl_losses import BATCH, BETA, ScoredModel, draw_pairs, run_trl
from train.losses import UnpairedLoss, kto, label_balance_warning


@pytest.mark.parametrize("desirable", [[1, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 0], [0] * 6])
@pytest.mark.parametrize("kl", [0.7, -0.4])
def test_kto_is_trl_s(desirable, kl):
    logps, mask, reference = (array[:BATCH] for array in draw_pairs())
    label = np.array(desirable, bool)
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.8}
    kl_logps = torch.full((BATCH,), -20.0)
    expected_loss, expected, expected_gradient = run_trl(
        KTOTrainer,
        ScoredModel(logps, mask),
        {
            "label": torch.tensor(label),
            "ref_logps": torch.tensor(reference),
            "ref_KL_logps": kl_logps - kl,
        },
        loss_type="kto",
        calculate_KL=True,
        _compute_kl_logps=lambda model, batch: kl_logps,
        **weights,
    )

    def mean_loss(logps):
        loss, metrics = kto(
            jnp.sum(logps, axis=1),
            jnp.asarray(reference),
            jnp.asarray(label),
            jnp.float32(kl),
            beta=BETA,
            **weights,
        )
        return jnp.mean(loss), metrics

    (loss, metrics), gradient = jax.value_and_grad(mean_loss, has_aux=True)(jnp.asarray(logps))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(gradient) * mask, expected_gradient * mask, atol=1e-6)
    for name, value in metrics.items():
        if name in expected:
            np.testing.assert_allclose(value, expected[name], rtol=2e-5, err_msg=name)
        else:
            assert math.isnan(value), name
    assert {"kl", "rewards/rejected", "logps/rejected"} <= set(expected) & set(metrics)


def test_kto_passes_no_gradient_through_the_divergence():
    logps, label = jnp.array([-3.0, -5.0, -2.0]), jnp.array([True, False, True])

    def total(kl):
        return jnp.sum(kto(logps, logps - 1.0, label, kl, beta=BETA)[0])

    assert jax.grad(total)(jnp.float32(0.5)) == 0
    assert total(jnp.float32(0.5)) != total(jnp.float32(0.9))


@pytest.mark.parametrize("desirable", [[1, 0, 0, 1, 1, 0], [1] * 6])
def test_apo_zero_unpaired_is_trl_s(desirable):
    logps, mask, reference = (array[:BATCH] for array in draw_pairs(2))
    weights = {"desirable_weight": 1.3, "undesirable_weight": 0.8}
    expected_loss, expected, expected_gradient = run_trl(
        KTOTrainer,
        ScoredModel(logps, mask),
        {"label": torch.tensor(desirable), "ref_logps": torch.tensor(reference)},
        loss_type="apo_zero_unpaired",
        calculate_KL=False,
        _compute_kl_logps=lambda model, batch: None,
        **weights,
    )
    loss_of = UnpairedLoss("apo_zero_unpaired", beta=BETA, **weights)
    assert not loss_of.needs_kl

    def mean_loss(logps):
        label = jnp.asarray(desirable, bool)
        loss, metrics = loss_of(jnp.sum(logps, axis=1), jnp.asarray(reference), label)
        return jnp.mean(loss), metrics

    (loss, metrics), gradient = jax.value_and_grad(mean_loss, has_aux=True)(jnp.asarray(logps))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(gradient) * mask, expected_gradient * mask, atol=1e-6)
    for name, value in metrics.items():
        if name in expected:
            np.testing.assert_allclose(value, expected[name], rtol=2e-5, err_msg=name)
        else:
            assert math.isnan(value), name


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("logp", [0.0, -1e5])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_extreme_logps_stay_finite(loss_type, logp, dtype):
    label = jnp.array([True, False])
    loss_of = UnpairedLoss(loss_type, beta=BETA)
    logp = max(logp, float(jnp.finfo(dtype).min))

    def total(policy):
        reference = jnp.zeros(2, dtype)
        return jnp.sum(loss_of(policy, reference, label, jnp.float32(1e5))[0])

    value, gradient = jax.value_and_grad(total)(jnp.full(2, logp, dtype))
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()


def test_order_of_the_answers_does_not_matter():
    logps, _, reference = (array[:BATCH] for array in draw_pairs(4))
    label = np.arange(BATCH) % 2 == 0
    order = np.random.default_rng(0).permutation(BATCH)

    def found(rows):
        columns = logps.sum(1)[rows], reference[rows], label[rows]
        loss, metrics = UnpairedLoss("kto", beta=BETA)(*map(jnp.asarray, columns), jnp.float32(0.4))
        return {"loss": jnp.mean(loss), **metrics}

    for name, value in found(order).items():
        np.testing.assert_allclose(value, found(np.arange(BATCH))[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("counts", "weights", "fine"),
    [
        ((10, 10), (1.0, 1.0), True),
        ((10, 10), (1.33, 1.0), True),
        ((10, 10), (1.4, 1.0), False),
        ((10, 30), (1.0, 1.0), False),
        ((10, 30), (3.0, 1.0), True),
        ((10, 30), (1.0, 0.33), True),
        ((30, 10), (1.0, 1.0), False),
        ((30, 10), (1.0, 2.5), True),
        ((10, 0), (1.0, 1.0), False),
    ],
)
def test_unequal_labels_are_warned_about(counts, weights, fine):
    """1 ≤ λ_D n_D / (λ_U n_U) ≤ 4/3 is the advice of the KTO paper."""
    labels = np.repeat([True, False], counts)
    assert (label_balance_warning(labels, *weights) is None) == fine


def test_the_weights_a_warning_names_are_fine():
    labels = np.repeat([True, False], (12, 41))
    message = label_balance_warning(labels, 1.0, 1.0)
    assert message is not None
    assert "desirable_weight from 3.42 to 4.56, or undesirable_weight from 0.22 to 0.293" in message
    for weights in ((3.42, 1.0), (4.56, 1.0), (1.0, 0.22), (1.0, 0.293)):
        assert label_balance_warning(labels, *weights) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "bco"}, "Unknown type 'bco'.*kto, apo_zero_unpaired"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"desirable_weight": -1.0}, "desirable_weight must be 0 or larger, got -1.0"),
        ({"desirable_weight": 0.0, "undesirable_weight": 0.0}, "nothing is learned"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        UnpairedLoss(**settings)

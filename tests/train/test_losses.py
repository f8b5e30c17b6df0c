"""Losses against float64 formulas of the papers and against TRL's own loss code."""

from __future__ import annotations

import math
from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer

from train import losses
from train.losses import LOSSES, PairLogps, kto, pair_loss, pair_metrics, sft

BATCH, LENGTH, BETA = 6, 9, 0.3


def draw_pairs(seed=0):
    """Per-token logps `[2 * BATCH, LENGTH]`, 0 behind each completion, and reference sums."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, LENGTH + 1, 2 * BATCH)
    mask = np.arange(LENGTH) < lengths[:, None]
    logps = np.where(mask, -rng.exponential(2.0, mask.shape), 0).astype(np.float32)
    reference = (logps.sum(1) + rng.normal(0, 3, 2 * BATCH)).astype(np.float32)
    return logps, mask, reference


def as_pair(logps, mask, reference) -> PairLogps:
    sums = jnp.sum(logps, axis=1)
    lengths = jnp.asarray(mask.sum(1), jnp.float32)
    return PairLogps(
        sums[:BATCH],
        sums[BATCH:],
        jnp.asarray(reference[:BATCH]),
        jnp.asarray(reference[BATCH:]),
        lengths[:BATCH],
        lengths[BATCH:],
    )


def log_sigmoid(x):
    return -np.logaddexp(0, -x)


def formula(loss_type, pair, epsilon):
    """The papers' formulas in float64."""
    chosen = np.float64(pair.chosen) - np.float64(pair.reference_chosen)
    rejected = np.float64(pair.rejected) - np.float64(pair.reference_rejected)
    if loss_type == "ipo":
        mean = chosen / np.float64(pair.chosen_length) - rejected / np.float64(pair.rejected_length)
        return (mean - 1 / (2 * BETA)) ** 2
    margin = BETA * (chosen - rejected)
    if loss_type == "hinge":
        return np.maximum(0, 1 - margin)
    return -(1 - epsilon) * log_sigmoid(margin) - epsilon * log_sigmoid(-margin)


@pytest.mark.parametrize(
    ("loss_type", "epsilon"), [("sigmoid", 0.0), ("sigmoid", 0.2), ("ipo", 0.0), ("hinge", 0.0)]
)
def test_losses_are_the_papers(loss_type, epsilon):
    pair = as_pair(*draw_pairs())
    loss = pair_loss(loss_type, beta=BETA, label_smoothing=epsilon)(pair)
    assert loss.shape == (BATCH,)
    np.testing.assert_allclose(loss, formula(loss_type, pair, epsilon), rtol=2e-6, atol=1e-6)


class Accelerator:
    """One process: gathering is the identity."""

    device = torch.device("cpu")

    def gather(self, value):
        return value

    gather_for_metrics = gather


class ScoredModel(torch.nn.Module):
    """Stands for a language model whose completion scores are given."""

    def __init__(self, logps, mask):
        super().__init__()
        self.logps = torch.tensor(logps, requires_grad=True)
        self.mask = torch.tensor(mask)

    def forward(self, **_):
        zeros = torch.zeros_like(self.logps)
        return SimpleNamespace(
            log_probs=self.logps, entropy=zeros, mean_logits=zeros, is_top1=self.mask
        )


def run_trl(trainer_class, model, inputs, **settings):
    """TRL's `_compute_loss` on given scores: loss, metrics and gradient."""
    trainer = SimpleNamespace(
        model=model,
        accelerator=Accelerator(),
        beta=BETA,
        precompute_ref_logps=True,
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _total_train_tokens=0,
        _tp_size=1,
        **settings,
    )
    mask = torch.nn.functional.pad(model.mask, (1, 0)).long()
    inputs = {"input_ids": mask, "attention_mask": mask, "completion_mask": mask, **inputs}
    loss = trainer_class._compute_loss(trainer, model, inputs, False)
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return loss.item(), metrics, model.logps.grad.numpy()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("loss_type", list(LOSSES))
def test_pair_losses_metrics_and_gradients_are_trl_s(loss_type, seed):
    logps, mask, reference = draw_pairs(seed)
    expected_loss, expected, expected_gradient = run_trl(
        DPOTrainer,
        ScoredModel(logps, mask),
        {
            "ref_chosen_logps": torch.tensor(reference[:BATCH]),
            "ref_rejected_logps": torch.tensor(reference[BATCH:]),
        },
        loss_types=[loss_type],
        loss_weights=[1.0],
        ld_alpha=None,
        f_divergence_type="reverse_kl",
        label_smoothing=0.0,
        use_weighting=False,
    )

    def mean_loss(logps):
        return jnp.mean(pair_loss(loss_type, beta=BETA)(as_pair(logps, mask, reference)))

    loss, gradient = jax.value_and_grad(mean_loss)(jnp.asarray(logps))
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(gradient) * mask, expected_gradient * mask, atol=1e-6)
    metrics = pair_metrics(as_pair(logps, mask, reference), BETA)
    assert set(metrics) <= set(expected)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, err_msg=name)


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


def test_swapping_the_answers_turns_the_rewards_around():
    logps, mask, reference = draw_pairs()

    def swap(array):
        return np.roll(array, BATCH, axis=0)

    forward = pair_metrics(as_pair(logps, mask, reference), BETA)
    backward = pair_metrics(as_pair(swap(logps), swap(mask), swap(reference)), BETA)
    assert forward["rewards/chosen"] == backward["rewards/rejected"]
    assert forward["logps/rejected"] == backward["logps/chosen"]
    np.testing.assert_allclose(forward["rewards/margins"], -backward["rewards/margins"], rtol=1e-6)
    assert forward["rewards/accuracies"] == 1 - backward["rewards/accuracies"]


@pytest.mark.parametrize("loss_type", list(LOSSES))
@pytest.mark.parametrize("gap", [-1e5, 1e5])
def test_extreme_margins_stay_finite(loss_type, gap):
    def total(chosen):
        zero = jnp.zeros(1)
        pair = PairLogps(chosen, zero, zero, zero, zero + 4, zero + 4)
        return jnp.sum(pair_loss(loss_type, beta=BETA)(pair))

    value, gradient = jax.value_and_grad(total)(jnp.array([gap]))
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize(("loss_type", "start"), [("sigmoid", math.log(2)), ("hinge", 1.0)])
def test_values_where_policy_and_reference_agree(loss_type, start):
    logps, mask, _ = draw_pairs()
    pair = as_pair(logps, mask, logps.sum(1))
    np.testing.assert_allclose(pair_loss(loss_type, beta=BETA)(pair), start, rtol=1e-6)
    ipo = pair_loss("ipo", beta=BETA)(pair)
    np.testing.assert_allclose(ipo, 1 / (4 * BETA**2), rtol=1e-5)


def test_sft_is_torch_s_cross_entropy():
    rng = np.random.default_rng(0)
    logits = torch.tensor(rng.normal(size=(3, 5, 20)))
    targets = torch.tensor(rng.integers(0, 20, (3, 5)))
    targets[0, 0] = logits[0, 0].argmax()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    expected = torch.nn.functional.cross_entropy(
        logits.reshape(-1, 20), torch.where(mask, targets, -100).reshape(-1)
    )
    logps = torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]
    top1 = logits.argmax(-1) == targets
    loss, metrics = sft(
        jnp.asarray((logps * mask).numpy()), jnp.asarray(mask.numpy()), jnp.asarray(top1.numpy())
    )
    np.testing.assert_allclose(loss, expected.item(), rtol=1e-6)
    assert metrics["num_tokens"] == 9
    hits = (top1 & mask).sum().item()
    assert hits >= 1
    np.testing.assert_allclose(metrics["mean_token_accuracy"], hits / 9, rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "dpo"}, "Unknown loss_type 'dpo'.*Available: sigmoid, ipo, hinge"),
        ({"loss_type": "kto"}, "Unknown loss_type 'kto' for preference pairs"),
        ({"beta": 0.0}, "beta must be positive, got 0.0"),
        ({"beta": math.nan}, "beta must be positive, got nan"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "only defined for loss_type 'sigmoid'"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        losses.pair_loss(**{"loss_type": "sigmoid", "beta": 0.1, **settings})

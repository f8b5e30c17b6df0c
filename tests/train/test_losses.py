"""Losses against float64 formulas of the papers and against TRL's own loss code."""

from __future__ import annotations

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from trl.experimental.cpo import CPOTrainer
from trl.experimental.orpo import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer

from tests.train.trl_losses import (
    BATCH,
    BETA,
    ScoredModel,
    as_pair,
    draw_pairs,
    run_trl,
    run_trl_reference_free,
)
from train.losses import (
    LOSSES,
    REFERENCE_FREE,
    PairLogps,
    PreferenceLoss,
    pair_metrics,
    sft,
    sum_logps,
)

WITH_REFERENCE = [name for name in LOSSES if name not in REFERENCE_FREE]
SETTINGS = {
    "exo_pair": {"label_smoothing": 1e-3},
    "robust": {"label_smoothing": 0.2},
    "aot": {"label_smoothing": 0.1},
    "aot_unpaired": {"label_smoothing": 0.1},
}
"""Settings that make the most of a loss; the others have none, or TRL none."""


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
    loss = PreferenceLoss(loss_type, beta=BETA, label_smoothing=epsilon)(pair)
    assert loss.shape == (BATCH,)
    np.testing.assert_allclose(loss, formula(loss_type, pair, epsilon), rtol=2e-6, atol=1e-6)


def assert_same(ours, theirs, mask):
    """Loss, metrics and gradient of two implementations within 1e-5, relative."""
    (loss, metrics), gradient = ours
    expected_loss, expected, expected_gradient = theirs
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-5, atol=1e-7)
    largest = np.abs(expected_gradient * mask).max()
    np.testing.assert_allclose(
        np.asarray(gradient) * mask, expected_gradient * mask, atol=1e-5 * largest
    )
    assert set(metrics) <= set(expected)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected[name], rtol=1e-5, err_msg=name)


def ours(loss, logps, mask, reference):
    """Value, metrics and gradient of a loss on per-token log-probabilities."""

    def mean_loss(logps):
        other = np.roll(mask, BATCH, axis=0)
        sums = sum_logps(logps, mask, other, loss.ld_alpha)
        pair = as_pair(logps, mask, reference)._replace(chosen=sums[:BATCH], rejected=sums[BATCH:])
        if not loss.needs_reference:
            zero = jnp.zeros(BATCH)
            pair = pair._replace(reference_chosen=zero, reference_rejected=zero)
        return jnp.mean(loss(pair)), loss.metrics(pair)

    return jax.value_and_grad(mean_loss, has_aux=True)(jnp.asarray(logps))


def trl_dpo(loss_types, logps, mask, reference, **settings):
    rest = {
        "loss_weights": [1.0] * len(loss_types),
        "ld_alpha": None,
        "label_smoothing": 0.0,
        **settings,
    }
    return run_trl(
        DPOTrainer,
        ScoredModel(logps, mask),
        {
            "ref_chosen_logps": torch.tensor(reference[:BATCH]),
            "ref_rejected_logps": torch.tensor(reference[BATCH:]),
        },
        loss_types=loss_types,
        f_divergence_type="reverse_kl",
        use_weighting=False,
        args=SimpleNamespace(discopop_tau=0.05),
        **rest,
    )


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("loss_type", WITH_REFERENCE)
def test_pair_losses_metrics_and_gradients_are_trl_s(loss_type, seed):
    drawn = draw_pairs(seed)
    settings = SETTINGS.get(loss_type, {})
    loss = PreferenceLoss(loss_type, beta=BETA, **settings)
    assert_same(ours(loss, *drawn), trl_dpo([loss_type], *drawn, **settings), drawn[1])


def test_mixes_are_trl_s():
    drawn, weights = draw_pairs(5), [0.8, 0.2, 1.0]
    types = ["sigmoid", "bco_pair", "sft"]
    loss = PreferenceLoss(types, weights=weights, beta=BETA)
    assert_same(ours(loss, *drawn), trl_dpo(types, *drawn, loss_weights=weights), drawn[1])
    assert loss.at_reference() is None


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo"])
@pytest.mark.parametrize("ld_alpha", [0.0, 0.3])
def test_tails_weigh_as_in_trl(loss_type, ld_alpha):
    drawn = draw_pairs(6)
    loss = PreferenceLoss(loss_type, beta=BETA, ld_alpha=ld_alpha)
    assert_same(ours(loss, *drawn), trl_dpo([loss_type], *drawn, ld_alpha=ld_alpha), drawn[1])


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("cpo_alpha", [0.0, 0.7])
def test_simpo_is_trl_s(cpo_alpha, epsilon):
    logps, mask, _ = draw_pairs(7)
    expected = run_trl_reference_free(
        CPOTrainer,
        logps,
        mask,
        loss_type="simpo",
        simpo_gamma=0.4,
        cpo_alpha=cpo_alpha,
        label_smoothing=epsilon,
        alpha=0.0,
    )
    types, weights = (["simpo", "sft"], [1.0, cpo_alpha]) if cpo_alpha else (["simpo"], [1.0])
    loss = PreferenceLoss(
        types, weights=weights, beta=BETA, simpo_gamma=0.4, label_smoothing=epsilon
    )
    assert not loss.needs_reference
    assert_same(ours(loss, logps, mask, np.zeros(2 * BATCH, np.float32)), expected, mask)


def test_orpo_is_trl_s():
    logps, mask, reference = draw_pairs(8)
    expected = run_trl_reference_free(ORPOTrainer, logps, mask)
    found = ours(PreferenceLoss("orpo", beta=BETA), logps, mask, reference)
    assert {"log_odds_chosen", "log_odds_ratio", "nll_loss"} <= set(found[0][1])
    assert_same(found, expected, mask)


def test_ipo_divides_by_the_length_and_logs_whole_answers():
    """Twice the tokens at the same mean: the loss of a sum would change, and must not."""
    short = PairLogps(*(jnp.array([x]) for x in (-4.0, -6.0, -5.0, -5.0, 2.0, 2.0)))
    long = PairLogps(*(2 * field for field in short))
    loss = PreferenceLoss("ipo", beta=BETA)
    np.testing.assert_allclose(loss(short), loss(long), rtol=1e-6)
    np.testing.assert_allclose(loss.metrics(short)["rewards/margins"], BETA * 2.0, rtol=1e-6)
    np.testing.assert_allclose(loss.metrics(long)["rewards/margins"], BETA * 4.0, rtol=1e-6)


@pytest.mark.parametrize("loss_type", list(LOSSES))
def test_float16_sums_give_the_float32_loss(loss_type):
    """β = 0.001 makes IPO's target 500, and its square leaves float16's range."""
    pair = as_pair(*draw_pairs(9))
    halves = PairLogps(*(field.astype(jnp.float16) for field in pair))
    loss = PreferenceLoss(loss_type, beta=1e-3, **SETTINGS.get(loss_type, {}))
    wanted = loss(PairLogps(*(field.astype(jnp.float32) for field in halves)))
    found = loss(halves)
    assert found.dtype == jnp.float32
    assert jnp.isfinite(found).all()
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("loss_type", list(LOSSES))
def test_order_of_the_pairs_does_not_matter(loss_type):
    pair = as_pair(*draw_pairs(3))
    order = np.random.default_rng(0).permutation(BATCH)
    shuffled = PairLogps(*(field[order] for field in pair))
    loss = PreferenceLoss(loss_type, beta=BETA, **SETTINGS.get(loss_type, {}))

    def mean(chosen, pair):
        return jnp.mean(loss(pair._replace(chosen=chosen)))

    value, gradient = jax.value_and_grad(mean)(pair.chosen, pair)
    again, moved = jax.value_and_grad(mean)(shuffled.chosen, shuffled)
    np.testing.assert_allclose(again, value, rtol=1e-6)
    np.testing.assert_allclose(moved, gradient[order], rtol=1e-5, atol=1e-7)


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
@pytest.mark.parametrize("logp", [(-1e5, 0.0), (0.0, -1e5), (0.0, 0.0), (-1e5, -1e5)])
def test_extreme_logps_stay_finite(loss_type, logp):
    loss = PreferenceLoss(loss_type, beta=BETA, **SETTINGS.get(loss_type, {}))
    length = jnp.full(1, 4.0)

    def total(policy, reference):
        pair = PairLogps(policy[:1], policy[1:], reference[:1], reference[1:], length, length)
        return jnp.sum(loss(pair))

    policy = jnp.array(logp)
    for reference in (jnp.zeros(2), jnp.array([0.0, -1e5]), jnp.array([-1e5, 0.0])):
        value, gradient = jax.value_and_grad(total)(policy, reference)
        assert jnp.isfinite(value)
        assert jnp.isfinite(gradient).all()


@pytest.mark.parametrize(("loss_type", "start"), [("sigmoid", math.log(2)), ("hinge", 1.0)])
def test_values_where_policy_and_reference_agree(loss_type, start):
    logps, mask, _ = draw_pairs()
    pair = as_pair(logps, mask, logps.sum(1))
    np.testing.assert_allclose(PreferenceLoss(loss_type, beta=BETA)(pair), start, rtol=1e-6)
    ipo = PreferenceLoss("ipo", beta=BETA)(pair)
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
        ({"type": "dpo"}, "Unknown loss_type 'dpo'.*Available: sigmoid, ipo, hinge"),
        ({"type": []}, "names no loss"),
        ({"type": ["sigmoid", "sigmoid"]}, "names a loss twice"),
        ({"type": ["sigmoid", "sft"], "weights": [1.0]}, r"each of the 2 losses.*got \[1.0\]"),
        ({"weights": [0.0]}, "finite and not all 0"),
        ({"weights": [math.inf]}, "finite and not all 0"),
        ({"type": "exo_pair"}, "must be positive for loss_type 'exo_pair'"),
        ({"simpo_gamma": 0.4}, "only defined for loss_type 'simpo', got 0.4 with 'sigmoid'"),
        ({"type": "discopop", "discopop_tau": 0.0}, r"discopop_tau must be in \(0, 1\]"),
        ({"ld_alpha": 1.5}, r"ld_alpha must be in \[0, 1\], got 1.5"),
        ({"type": "orpo", "ld_alpha": 0.5}, "orpo needs the log-probabilities of whole"),
        ({"type": "kto"}, "Unknown loss_type 'kto' for preference pairs"),
        ({"beta": 0.0}, "beta must be positive, got 0.0"),
        ({"beta": math.nan}, "beta must be positive, got nan"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\), got 0.5"),
        (
            {"type": "ipo", "label_smoothing": 0.1},
            "only defined for loss_type 'sigmoid', 'robust'",
        ),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        PreferenceLoss(**{"beta": 0.1, **settings})

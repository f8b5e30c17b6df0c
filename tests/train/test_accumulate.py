"""Accumulated gradients next to those of the large batch, and of float64 formulas."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.train.builders import make_batch, make_model
from tests.train.tiny_runs import run_flags, write_inputs
from train.cli import main
from train.losses import PreferenceLoss, kto
from train.objectives.accumulate import BATCH_MEANS, BatchLoss, loss_and_gradient
from train.objectives.preference import preference_loss
from train.objectives.sft import sft_loss
from train.training.step import init_state, make_train_step

NUMBERS = {
    "x": np.array([0.3, -1.2, 0.8, 2.0, -0.4, 1.1, 0.9, -2.2], np.float32),
    "kl_x": np.array([1.0, 0.2, -0.7, 1.9, 0.6, 1.3, -0.1, 0.4], np.float32),
    # No row of the second part (rows 1, 3, …) is desirable.
    "desirable": np.array([1, 0, 1, 0, 0, 0, 1, 0], bool),
}


def assert_same(found, expected, rtol=2e-5):
    """Equal up to float32 rounding of the largest entry of each leaf."""
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = float(np.abs(theirs).max())
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=rtol * scale)


@pytest.mark.parametrize("loss_type", [None, "sigmoid", ["sigmoid", "sft"], "orpo"])
def test_gradients_and_metrics_are_those_of_the_large_batch(loss_type):
    graphdef, params = make_model()
    names = ("completion",) if loss_type is None else ("chosen", "rejected")
    batch = make_batch(names, seed=3)
    tokens = batch[f"{names[0]}_mask"].sum(axis=1)
    assert tokens[::2].sum() != tokens[1::2].sum()  # the parts differ in weight
    if loss_type is None:
        loss_fn = sft_loss(graphdef)
    else:
        rng = np.random.default_rng(5)
        for name in names:
            batch[f"reference_{name}_logps"] = rng.normal(-20, 3, 4).astype(np.float32)
        loss_fn = preference_loss(graphdef, PreferenceLoss(loss_type))
    (loss, metrics), gradient = jax.jit(loss_and_gradient(loss_fn, 1))(params, batch)
    for parts in (2, 4):
        (ours, our_metrics), ours_gradient = jax.jit(loss_and_gradient(loss_fn, parts))(
            params, batch
        )
        np.testing.assert_allclose(ours, loss, rtol=1e-6)
        assert our_metrics.keys() == metrics.keys()
        for name, value in metrics.items():
            np.testing.assert_allclose(our_metrics[name], value, rtol=1e-5, err_msg=name)
        assert_same(ours_gradient, gradient)


def test_a_mean_of_the_parts_means_would_be_wrong_for_sft():
    graphdef, params = make_model()
    batch = make_batch(("completion",), seed=3)
    loss_fn = sft_loss(graphdef)
    naive = jax.jit(loss_and_gradient(loss_fn.loss_fn, 2))(params, batch)[1]
    exact = jax.jit(loss_and_gradient(loss_fn, 1))(params, batch)[1]
    with pytest.raises(AssertionError):
        assert_same(naive, exact, rtol=1e-3)


def kto_like():
    """KTO of a model with one weight: a log-ratio is the weight times a number."""

    def batch_means(weight, batch):
        return {"kl": jnp.mean(weight * batch["kl_x"])}

    def loss_fn(weight, batch):
        logps = weight * batch["x"]
        kl = batch[BATCH_MEANS]["kl"]
        reference = jnp.zeros_like(logps)
        loss, metrics = kto(logps, reference, batch["desirable"], kl, beta=0.7)
        return jnp.mean(loss), metrics

    def weights(batch):
        desirable = jnp.sum(batch["desirable"], dtype=jnp.float32)
        other = len(batch["x"]) - desirable
        sides = {"chosen": desirable, "rejected": other}
        return {f"{kind}/{side}": n for kind in ("rewards", "logps") for side, n in sides.items()}

    def derived(metrics):
        return {"rewards/margins": metrics["rewards/chosen"] - metrics["rewards/rejected"]}

    return BatchLoss(loss_fn, weights=weights, batch_means=batch_means, derived=derived)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_kto_takes_its_kl_from_the_whole_batch(parts):
    weight, beta = 1.3, 0.7
    (loss, metrics), gradient = jax.jit(loss_and_gradient(kto_like(), parts))(
        jnp.float32(weight), NUMBERS
    )
    x, good = NUMBERS["x"].astype(np.float64), NUMBERS["desirable"]
    kl = max(weight * NUMBERS["kl_x"].astype(np.float64).mean(), 0)
    assert kl > 0  # parts alone would clamp at 0 elsewhere
    sign = np.where(good, 1, -1)
    wins = 1 / (1 + np.exp(-beta * sign * (weight * x - kl)))
    np.testing.assert_allclose(loss, (1 - wins).mean(), rtol=1e-6)
    np.testing.assert_allclose(
        gradient, (-wins * (1 - wins) * beta * sign * x).mean(), rtol=1e-5
    )  # no gradient through the KL
    chosen, rejected = beta * weight * x[good].mean(), beta * weight * x[~good].mean()
    np.testing.assert_allclose(metrics["rewards/chosen"], chosen, rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/rejected"], rejected, rtol=1e-6)
    np.testing.assert_allclose(metrics["rewards/margins"], chosen - rejected, rtol=1e-6)
    np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-6)


def test_terms_of_a_loss_have_weights_of_their_own():
    """Means over rows and over marked rows, added; and a metric that no row has a say in."""

    def loss_fn(weight, batch):
        of_marked = jnp.mean(weight**2 * batch["x"], where=batch["desirable"])
        nothing = jnp.mean(batch["x"], where=batch["desirable"] & False)
        return {"rows": jnp.mean(weight * batch["x"]), "marked": of_marked}, {"none": nothing}

    def weights(batch):
        return {"marked": jnp.sum(batch["desirable"]), "none": jnp.zeros([])}

    (loss, metrics), gradient = loss_and_gradient(BatchLoss(loss_fn, weights=weights), 2)(
        jnp.float32(3.0), NUMBERS
    )
    rows, marked = NUMBERS["x"].mean(), NUMBERS["x"][NUMBERS["desirable"]].mean()
    np.testing.assert_allclose(loss, 3 * rows + 9 * marked, rtol=1e-6)
    np.testing.assert_allclose(gradient, rows + 6 * marked, rtol=1e-6)
    assert np.isnan(metrics["none"])


def test_bfloat16_gradients_are_summed_in_float32():
    ones = {"x": np.ones((512, 1), np.float32)}
    ones["x"][0] = 256.0  # in bfloat16, 256 + 1 is 256

    def loss_fn(weight, batch):
        return jnp.sum(weight.astype(jnp.float32) * batch["x"]), {}

    batch_loss = BatchLoss(loss_fn, weights=lambda _: {"loss": jnp.ones([])})
    gradient = loss_and_gradient(batch_loss, 512)(jnp.bfloat16(1.0), ones)[1]
    assert gradient.dtype == jnp.bfloat16
    assert float(gradient) * 512 == pytest.approx(256 + 511, rel=2**-8)


def test_a_step_takes_it_and_a_batch_has_to_be_divisible():
    graphdef, params = make_model()
    batch = make_batch(("completion",))
    tx, loss_fn = optax.sgd(0.1), sft_loss(graphdef)
    whole = make_train_step(loss_fn, tx)(init_state(params, tx), batch)
    parts = make_train_step(loss_fn, tx, microbatches=2)(init_state(params, tx), batch)
    assert_same(parts[0]["params"], whole[0]["params"], rtol=1e-6)
    np.testing.assert_allclose(parts[1]["grad_norm"], whole[1]["grad_norm"], rtol=1e-5)
    with pytest.raises(ValueError, match="4 rows cannot be split into 3 equal parts"):
        make_train_step(loss_fn, tx, microbatches=3)(init_state(params, tx), batch)


def test_a_command_refuses_a_batch_that_it_cannot_split(tmp_path, capsys):
    flags = run_flags(
        write_inputs(tmp_path), tmp_path / "run", trainer__gradient_accumulation_steps=3
    )
    assert main(["dpo", *flags]) == 2
    message = "trainer.batch_size must be a multiple of 3 (3 trainer.gradient_accumulation_steps)"
    assert message in capsys.readouterr().err

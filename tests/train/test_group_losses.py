"""Every GRPO loss against TRL's own code on the same log-probabilities: value, gradient, metrics."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from train.losses import GroupLogps, GroupLoss

ROWS, LENGTH, GREATEST = 8, 11, 16


class Accelerator:
    """One process: gathering is the identity."""

    device, num_processes = torch.device("cpu"), 1

    def gather(self, value):
        return value

    def reduce(self, value, reduction):
        return value


def draw(seed=0):
    """Log-probabilities that have moved enough for every clip to act; one answer is left out."""
    rng = np.random.default_rng(seed)
    lengths = np.array([11, 1, 4, 7, 0, 9, 3, 10])
    mask = np.arange(LENGTH) < lengths[:, None]
    logps = -rng.exponential(2.0, mask.shape)
    # Some answers have moved as a whole, for ratios of sequences.
    together = np.array([0.6, -0.1, 0.3, -0.7, 0, -0.5, 0.5, 0.05])
    moved = rng.normal(0, 0.4, mask.shape) + together[:, None]
    reference = logps + rng.normal(0, 0.5, mask.shape)
    columns = (np.where(mask, one, 0) for one in (logps, logps - moved, reference))
    advantages = np.array([1.3, -0.4, 0.0, -1.1, 0.8, 0.6, -0.9, -0.2])
    floats = [one.astype(np.float32) for one in (*columns, advantages)]
    return GroupLogps(*map(jnp.asarray, floats), jnp.asarray(mask))


def of_trl(tokens, settings):
    """TRL's `_compute_loss`: loss, gradient with respect to log-probabilities, metrics."""
    known = {"beta": 0.0, "epsilon": 0.2, "epsilon_high": None, "type": "dapo"} | settings
    high = known["epsilon"] if known["epsilon_high"] is None else known["epsilon_high"]
    args = GRPOConfig(output_dir="unused", use_cpu=True, bf16=False, report_to=[])
    for name, value in settings.items():
        if hasattr(args, name):
            setattr(args, name, value)
    args.steps_per_generation = 1
    logps = torch.tensor(np.asarray(tokens.logps), requires_grad=True)
    columns = {
        "prompt_ids": torch.zeros(ROWS, 1, dtype=torch.long),
        "prompt_mask": torch.ones(ROWS, 1, dtype=torch.long),
        "completion_ids": torch.zeros(ROWS, LENGTH, dtype=torch.long),
        "completion_mask": torch.tensor(np.asarray(tokens.mask)).long(),
        "advantages": torch.tensor(np.asarray(tokens.advantages)),
        "ref_per_token_logps": torch.tensor(np.asarray(tokens.reference_logps)),
        "num_items_in_batch": torch.tensor(int(tokens.mask.sum())),
    }
    if tokens.old_logps is not None:
        columns["old_per_token_logps"] = torch.tensor(np.asarray(tokens.old_logps))
    trainer = SimpleNamespace(
        args=args,
        accelerator=Accelerator(),
        model=SimpleNamespace(training=True),
        loss_type=known["type"],
        beta=known["beta"],
        epsilon_low=known["epsilon"],
        epsilon_high=high,
        importance_sampling_level=settings.get("importance_sampling_level", "token"),
        max_completion_length=GREATEST,
        current_gradient_accumulation_steps=1,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        get_gamma_weights=GRPOTrainer.get_gamma_weights,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (
            logps,
            torch.zeros_like(logps),
            None,
        ),
    )
    loss = GRPOTrainer._compute_loss(trainer, None, columns)  # type: ignore[arg-type]
    loss.backward()
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    assert logps.grad is not None
    return float(loss.detach()), logps.grad.numpy(), metrics


CASES = {
    "dapo": {},
    "dapo kl": {"beta": 0.3},
    "grpo": {"type": "grpo", "beta": 0.1, "epsilon": 0.1, "epsilon_high": 0.28},
    "bnpo": {"type": "bnpo", "beta": 0.2, "use_bias_correction_kl": False},
    "dr_grpo": {"type": "dr_grpo", "beta": 0.1, "delta": 1.5},
    "luspo": {"type": "luspo", "beta": 0.1, "importance_sampling_level": "sequence"},
    "cispo": {"type": "cispo", "epsilon_high": 1.2, "beta": 0.1},
    "sapo": {"type": "sapo", "sapo_temperature_neg": 1.3, "sapo_temperature_pos": 0.8},
    "vespo": {"type": "vespo", "beta": 0.1},
    "vespo other weights": {"type": "vespo", "vespo_k_pos": 0.5, "vespo_lambda_neg": 0.7},
    "gspo": {"type": "grpo", "beta": 0.1, "importance_sampling_level": "sequence"},
    "gspo tokens": {"type": "dapo", "importance_sampling_level": "sequence"},
}


@pytest.mark.parametrize("on_policy", [False, True], ids=["moved", "on policy"])
@pytest.mark.parametrize("name", CASES)
def test_loss_gradient_and_metrics_are_trls(name, on_policy):
    settings, tokens = CASES[name], draw()
    tokens = tokens._replace(old_logps=None) if on_policy else tokens
    loss_of = GroupLoss(**settings, max_completion_length=GREATEST)

    def of_logps(logps):
        return loss_of(tokens._replace(logps=logps))

    (loss, metrics), gradient = jax.value_and_grad(of_logps, has_aux=True)(tokens.logps)
    theirs, their_gradient, their_metrics = of_trl(tokens, settings)
    assert float(loss) == pytest.approx(theirs, rel=1e-5, abs=1e-7)
    largest = np.abs(their_gradient).max()
    np.testing.assert_allclose(gradient, their_gradient, rtol=1e-5, atol=1e-6 * largest)
    assert set(metrics) == set(their_metrics) - {"entropy"}
    for name, value in metrics.items():
        assert float(value) == pytest.approx(their_metrics[name], rel=1e-5, abs=1e-7), name
    if not on_policy and settings.get("type") not in ("cispo", "sapo", "vespo"):
        # Else nothing would have been clipped, on either side.
        assert 0 < float(metrics["clip_ratio/low_mean"]) < 1
        assert 0 < float(metrics["clip_ratio/high_mean"]) < 1


def test_a_batch_without_tokens_has_no_loss_and_no_gradient():
    tokens = draw()
    empty = tokens._replace(mask=jnp.zeros_like(tokens.mask))
    for settings in CASES.values():
        loss_of = GroupLoss(**settings)
        loss, gradient = jax.value_and_grad(
            lambda logps, of=loss_of: of(empty._replace(logps=logps))[0]
        )(tokens.logps)
        assert float(loss) == 0
        assert not np.asarray(gradient).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"type": "ppo"}, "type must be one of grpo, bnpo"),
        ({"beta": -0.1}, "beta must be 0 or larger, got -0.1"),
        ({"epsilon": 0.0}, r"epsilon must be in \(0, 1\), got 0.0"),
        ({"epsilon_high": 0.0}, "epsilon_high must be positive"),
        ({"delta": 1.0}, "delta must be above 1"),
        ({"delta": 2.0, "type": "sapo"}, "delta is set to 2.0, but type sapo has no use for it"),
        ({"epsilon_high": 0.3, "type": "vespo"}, "but type vespo has no use for it"),
        ({"vespo_k_pos": 1.0}, "but type dapo has no use for it"),
        ({"use_bias_correction_kl": False}, "with beta 0 there is no divergence"),
        ({"type": "cispo"}, "epsilon_high must be set with type cispo"),
        ({"type": "luspo"}, "importance_sampling_level must be sequence with type luspo"),
        (
            {"type": "vespo", "importance_sampling_level": "sequence"},
            "importance_sampling_level must be token with type vespo",
        ),
        ({"type": "vespo", "vespo_lambda_neg": 0.0}, "vespo_lambda_neg must be positive"),
        ({"type": "vespo", "vespo_k_pos": -1.0}, "vespo_k_pos must be 0 or larger"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level must be one of token"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        GroupLoss(**settings)

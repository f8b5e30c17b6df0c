"""Random log-probabilities, and TRL's own loss code run on them."""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import torch

from train.losses import PairLogps

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


def run_trl_reference_free(trainer_class, logps, mask, **settings):
    """The same for the trainers of SimPO and ORPO, whose forward pass gives means per token."""
    scores, mask = torch.tensor(logps, requires_grad=True), torch.tensor(mask)
    means = scores.sum(1) / mask.sum(1)
    nll = -scores[:BATCH].sum() / mask[:BATCH].sum()
    forward = (means[:BATCH], means[BATCH:], scores[:BATCH], scores[BATCH:], nll)
    trainer = SimpleNamespace(
        accelerator=Accelerator(),
        beta=BETA,
        aux_loss_enabled=False,
        concatenated_forward=lambda model, batch: forward,
        **settings,
    )
    for name in ("cpo_loss", "odds_ratio_loss"):
        if hasattr(trainer_class, name):
            setattr(trainer, name, partial(getattr(trainer_class, name), trainer))
    loss, metrics = trainer_class.get_batch_loss_metrics(trainer, None, {})
    loss.backward()
    return loss.item(), metrics, scores.grad.numpy()

"""The objective of `dpo`: a model's log-probabilities of both answers put into a loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from train.losses import BetaAt, PairLogps, PreferenceLoss, sum_logps
from train.losses.schedule import scheduled_beta
from train.objectives.accumulate import BatchLoss
from train.objectives.logps import VocabChunk
from train.objectives.pair_logps import pair_token_logps
from train.types import Batch, Metrics


def preference_loss(
    graphdef: nnx.GraphDef,
    loss: PreferenceLoss | None = None,
    *,
    beta_at: BetaAt | None = None,
    vocab_chunk: VocabChunk = "auto",
) -> BatchLoss:
    """A loss on preference batches: `loss`, or DPO with its defaults where that is None.

    `beta_at`, from `train.losses.beta_schedule`, gives β at each step and replaces `loss.beta`.

    Returns:
      A `BatchLoss`. Called with `(params, batch)` it returns the terms of the loss, float32
      scalars that add up to the loss of the batch, and the metrics: `loss`, those of
      `PreferenceLoss.metrics`, and `beta` where it changes. `batch` holds
      `prompt_tokens`, `prompt_mask` `[B, P]`, `chosen_tokens`, `chosen_mask`,
      `rejected_tokens`, `rejected_mask` `[B, C]`; `reference_chosen_logps` and
      `reference_rejected_logps` `[B]` unless the loss is reference-free; and with `beta_at` the
      number of updates done, `step` int32 `[]`, which `train.training.step.make_train_step` adds.
      The returned `BatchLoss` also gives the weights for combining microbatches, since the
      cross-entropy of `sft` and `orpo` is a mean over tokens.
    """
    loss = PreferenceLoss() if loss is None else loss

    def loss_fn(params: Any, batch: Batch) -> tuple[Metrics, Metrics]:
        model = nnx.merge(graphdef, params)
        chosen, rejected = _pair_logps(model, batch, vocab_chunk, loss.ld_alpha)
        zero = jnp.zeros_like(chosen)
        pair = PairLogps(
            chosen,
            rejected,
            batch["reference_chosen_logps"] if loss.needs_reference else zero,
            batch["reference_rejected_logps"] if loss.needs_reference else zero,
            jnp.sum(batch["chosen_mask"], axis=1, dtype=jnp.float32),
            jnp.sum(batch["rejected_mask"], axis=1, dtype=jnp.float32),
        )
        beta, logged = scheduled_beta(beta_at, batch)
        terms = {"pairs": jnp.mean(loss.without_nll(pair, beta))}
        if loss.nll_weight:
            terms["nll"] = loss.nll_weight * loss.nll(pair)
        total = jax.lax.stop_gradient(sum(terms.values(), start=jnp.float32(0)))
        return terms, {"loss": total, **loss.metrics(pair, beta), **logged}

    def weights(batch: Batch) -> Metrics:
        return dict.fromkeys(("nll", "nll_loss"), jnp.sum(batch["chosen_mask"], dtype=jnp.float32))

    return BatchLoss(loss_fn, weights=weights)


def reference_logps_fn(
    graphdef: nnx.GraphDef, *, vocab_chunk: VocabChunk = "auto", ld_alpha: float | None = None
) -> Callable[[Any, Batch], tuple[jax.Array, jax.Array]]:
    """A jitted `f(params, batch) -> (chosen_logps, rejected_logps)`, each float32 `[B]`.

    It scores a batch exactly as `preference_loss` does, so a policy that has not moved has rewards
    of zero. `batch` needs no reference log-probabilities.
    """

    @jax.jit
    def reference_logps(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        return _pair_logps(nnx.merge(graphdef, params), batch, vocab_chunk, ld_alpha)

    return reference_logps


def _pair_logps(
    model: Any, batch: Batch, vocab_chunk: VocabChunk, ld_alpha: float | None
) -> tuple[jax.Array, jax.Array]:
    """Summed log-probabilities of the chosen and of the rejected answers, each `[batch]`."""
    masks = [batch["chosen_mask"], batch["rejected_mask"]]
    logps = pair_token_logps(model, batch, vocab_chunk=vocab_chunk)
    other = jnp.concatenate(masks[::-1])
    sums = sum_logps(logps, jnp.concatenate(masks), other, ld_alpha)
    chosen, rejected = jnp.split(sums, 2)
    return chosen, rejected

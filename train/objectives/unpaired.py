"""The objective of `kto`: a model's log-probabilities of labelled answers put into a loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from train.losses import BetaAt, UnpairedLoss
from train.losses.schedule import scheduled_beta
from train.objectives.accumulate import BATCH_MEANS, BatchLoss
from train.objectives.logps import VocabChunk, completion_statistics
from train.types import Batch, Metrics


def unpaired_loss(
    graphdef: nnx.GraphDef,
    loss: UnpairedLoss | None = None,
    *,
    beta_at: BetaAt | None = None,
    vocab_chunk: VocabChunk = "auto",
) -> BatchLoss:
    """A loss on batches of labelled answers: `loss`, or KTO with its defaults where that is None.

    The divergence is estimated on mismatched completions in the batch (`train.data.mismatched`):
    the mean over the whole batch, on all devices together, of their log-ratios, clamped at 0 after
    that. No gradient passes through it, so that forward pass keeps nothing. `beta_at`, from
    `train.losses.beta_schedule`, is β of every step in place of the loss's own.

    Returns:
      `loss_fn(params, batch) -> (loss, metrics)`: the mean loss, and `loss` and the metrics of
      `losses.kto`. `batch` holds `prompt_tokens`, `prompt_mask` `[B, P]`, `completion_tokens`,
      `completion_mask` `[B, C]`, `label` bool `[B]`, `reference_completion_logps` `[B]`, for `kto`
      `kl_tokens`, `kl_mask` `[B, C]` and `reference_kl_logps` `[B]`, and with `beta_at` `step`.
    """
    loss = UnpairedLoss() if loss is None else loss

    def divergence(params: Any, batch: Batch) -> Metrics:
        frozen = jax.lax.stop_gradient(params)
        mismatched = _logps(graphdef, frozen, batch, "kl", vocab_chunk)
        return {"kl": jnp.mean(mismatched - batch["reference_kl_logps"])}

    def loss_fn(params: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        kl = batch[BATCH_MEANS]["kl"] if loss.needs_kl else None
        logps = _logps(graphdef, params, batch, "completion", vocab_chunk)
        beta, logged = scheduled_beta(beta_at, batch)
        reference, label = batch["reference_completion_logps"], batch["label"]
        per_row, metrics = loss(logps, reference, label, kl, beta)
        mean = jnp.mean(per_row)
        return mean, {"loss": jax.lax.stop_gradient(mean), **metrics, **logged}

    return BatchLoss(
        loss_fn,
        weights=_label_counts,
        batch_means=divergence if loss.needs_kl else None,
        derived=_margin,
    )


def _label_counts(batch: Batch) -> Metrics:
    """Means over the answers with a label weigh by their number in a microbatch."""
    counts = {
        "chosen": jnp.sum(batch["label"], dtype=jnp.float32),
        "rejected": jnp.sum(~batch["label"], dtype=jnp.float32),
    }
    return {f"{kind}/{name}": n for kind in ("rewards", "logps") for name, n in counts.items()}


def _margin(metrics: Mapping[str, jax.Array]) -> Metrics:
    return {"rewards/margins": metrics["rewards/chosen"] - metrics["rewards/rejected"]}


def unpaired_logps_fn(
    graphdef: nnx.GraphDef, names: Sequence[str], *, vocab_chunk: VocabChunk = "auto"
) -> Callable[[Any, Batch], tuple[jax.Array, ...]]:
    """A jitted `f(params, batch)` that scores answers as `unpaired_loss` does, float32 `[B]` per name.

    The names are kinds of answers: `"completion"`, and `"kl"` for the mismatched ones.
    """

    @jax.jit
    def logps(params: Any, batch: Batch) -> tuple[jax.Array, ...]:
        return tuple(_logps(graphdef, params, batch, name, vocab_chunk) for name in names)

    return logps


def _logps(
    graphdef: nnx.GraphDef, params: Any, batch: Batch, name: str, vocab_chunk: VocabChunk
) -> jax.Array:
    """Summed log-probabilities of one kind of answer, `[batch]`."""
    model = nnx.merge(graphdef, params)
    return jnp.sum(completion_statistics(model, batch, name, vocab_chunk=vocab_chunk).logps, axis=1)

"""The objective of `grpo`: a model's log-probabilities of sampled tokens put into a `GroupLoss`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from train.losses.group import BATCH_TOKEN_MEANS, GroupLogps, GroupLoss, token_mean
from train.objectives.accumulate import BatchLoss, columns_in_microbatches
from train.objectives.logps import TokenStatistics, VocabChunk, completion_statistics
from train.types import Batch, Metrics

_OF_RATIOS = (
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "cispo_clip_ratio",
)
# Less than any number of tokens: where a batch leaves out all answers, its microbatches weigh the same.
_LEAST_WEIGHT = 1e-20


def group_loss(
    graphdef: nnx.GraphDef,
    loss: GroupLoss,
    *,
    temperature: float = 1.0,
    vocab_chunk: VocabChunk = "auto",
) -> BatchLoss:
    """A loss on sampled answers, whose logits are divided by the `temperature` they were sampled at.

    Returns:
      `loss_fn(params, batch) -> (loss, metrics)`, float32, with the metrics of `GroupLoss` and
      `entropy` (of the distributions at the tokens that count, in nats). `batch` holds
      `prompt_tokens`, `prompt_mask` `[B, P]`, `completion_tokens`, `completion_mask` `[B, C]`,
      `advantages` float32 `[B]`, with a β `reference_logps`, and where the policy has moved since it
      sampled `old_logps`, float32 `[B, C]`. It says how it follows from microbatches: `dapo`,
      `cispo` and `vespo` are means over the tokens of all of them, `bnpo` over those of each.
    """
    per_row = loss.importance_sampling_level == "sequence"

    def loss_fn(params: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        found = _statistics(graphdef, params, batch, temperature, vocab_chunk)
        mask = batch["completion_mask"]
        total, metrics = loss(
            GroupLogps(
                found.logps,
                batch.get("old_logps"),
                batch["reference_logps"] if loss.beta else None,
                batch["advantages"],
                mask,
            )
        )
        return total, {"loss": total, **metrics, "entropy": token_mean(found.entropy, mask)}

    def weights(batch: Batch) -> Metrics:
        tokens = jnp.sum(batch["completion_mask"], dtype=jnp.float32) + _LEAST_WEIGHT
        names = ["kl", "entropy", *(() if per_row else _OF_RATIOS)]
        names += ["loss"] if loss.type in BATCH_TOKEN_MEANS else []
        return dict.fromkeys(names, tokens)

    return BatchLoss(loss_fn, weights=weights)


def sampled_logps_fn(
    graphdef: nnx.GraphDef,
    *,
    temperature: float = 1.0,
    vocab_chunk: VocabChunk = "auto",
    microbatches: int = 1,
) -> Callable[[Any, Batch], tuple[jax.Array]]:
    """`f(params, batch) -> (logps,)`, float32 `[B, C]`: what `group_loss` makes of the same rows."""

    def columns(params: Any, part: Batch) -> Batch:
        return {"logps": _statistics(graphdef, params, part, temperature, vocab_chunk).logps}

    def logps(params: Any, batch: Batch) -> tuple[jax.Array]:
        return (columns_in_microbatches(columns, params, batch, microbatches)["logps"],)

    return logps


def _statistics(
    graphdef: nnx.GraphDef, params: Any, batch: Batch, temperature: float, vocab_chunk: VocabChunk
) -> TokenStatistics:
    model = nnx.merge(graphdef, params)
    return completion_statistics(model, batch, temperature=temperature, vocab_chunk=vocab_chunk)

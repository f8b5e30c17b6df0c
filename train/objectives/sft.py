"""The objective of `sft`: cross-entropy on answers, in rows of their own or packed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from train import losses
from train.data import is_packed
from train.objectives.accumulate import BatchLoss
from train.objectives.logps import (
    TokenStatistics,
    VocabChunk,
    completion_statistics,
    token_statistics,
)
from train.types import Batch, Metrics

if TYPE_CHECKING:
    from train.models import Decoder


def sft_loss(graphdef: nnx.GraphDef, *, vocab_chunk: VocabChunk = "auto") -> BatchLoss:
    """Cross-entropy on the completion tokens of SFT batches, averaged over the batch's tokens.

    Returns:
      `loss_fn(params, batch) -> (loss, metrics)` with the metrics of `losses.sft`. `batch` holds
      `prompt_tokens`, `prompt_mask` `[B, P]`, `completion_tokens` and `completion_mask` `[B, C]`, or
      several examples a row in the columns of `train.data.packing.pack`.
    """

    def scored(batch: Batch) -> jax.Array:
        return batch["packed_from"] >= 0 if is_packed(batch) else batch["completion_mask"]

    def loss_fn(params: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        statistics = packed_statistics if is_packed(batch) else completion_statistics
        found = statistics(nnx.merge(graphdef, params), batch, vocab_chunk=vocab_chunk)
        return losses.sft(found.logps, scored(batch), found.top1)

    def weights(batch: Batch) -> Metrics:
        tokens = jnp.sum(scored(batch), dtype=jnp.float32)
        return {"loss": tokens, "mean_token_accuracy": tokens}

    return BatchLoss(loss_fn, weights=weights, sums=("num_tokens",))


def packed_statistics(
    model: Decoder, batch: Batch, *, vocab_chunk: VocabChunk = None
) -> TokenStatistics:
    """Scores the answer tokens of several examples in a row, each given its own prompt.

    `batch` has the columns of `train.data.packing.pack`. The statistics have the shape of
    `packed_from` and are 0 and false at its padding.
    """
    hidden = model.hidden(batch["packed_ids"], segments=batch["packed_parts"])
    places = jnp.maximum(batch["packed_from"], 0)
    hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
    targets = jnp.take_along_axis(jnp.asarray(batch["packed_ids"]), places + 1, axis=1)
    found = token_statistics(hidden, model.unembedding(), targets, vocab_chunk=vocab_chunk)
    return found.masked(batch["packed_from"] >= 0)

"""The objective of `grpo`: a model's log-probabilities of sampled tokens put into a `GroupLoss`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from train.losses.group import BATCH_TOKEN_MEANS, GroupLogps, GroupLoss, token_mean
from train.objectives.accumulate import Parted, columns_in_parts
from train.objectives.logps import sampled_statistics
from train.objectives.preference import VocabChunk, resolve_vocab_chunk
from train.types import Batch, LossFn, Metrics

_OF_TOKENS = ("kl", "entropy")
_OF_RATIOS = (
    "clip_ratio/low_mean",
    "clip_ratio/high_mean",
    "clip_ratio/region_mean",
    "cispo_clip_ratio",
)
# Less than any number of tokens: a batch whose answers are all left out has parts of equal weight.
_LEAST = 1e-20


def group_loss(
    graphdef: nnx.GraphDef,
    loss_of: GroupLoss,
    *,
    temperature: float = 1.0,
    vocab_chunk: VocabChunk = "auto",
) -> LossFn:
    """A loss on sampled answers.

    Args:
      graphdef: The model's structure, from `train.models.split_model`.
      loss_of: What the log-probabilities are put into.
      temperature: By which the logits are divided, as when the answers were sampled.
      vocab_chunk: See `train.objectives.preference.resolve_vocab_chunk`.

    Returns:
      `loss_fn(params, batch) -> (loss, metrics)`, float32, with the metrics of `GroupLoss` and
      `entropy` (of the distributions at the tokens that count, in nats). `batch` holds
      `prompt_tokens`, `prompt_mask` `[B, P]`, `completion_tokens`, `completion_mask` `[B, C]`,
      `advantages` float32 `[B]`, with a β `reference_logps`, and where the policy has moved since it
      sampled `old_logps`, float32 `[B, C]`. It says how it follows from parts of a batch: `dapo`,
      `cispo` and `vespo` are means over the tokens of all parts, `bnpo` over those of each.
    """
    per_row = loss_of.importance_sampling_level == "sequence"

    def loss_fn(params: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        logps, entropy = _statistics(graphdef, params, batch, temperature, vocab_chunk)
        mask = batch["completion_mask"]
        loss, metrics = loss_of(
            GroupLogps(
                logps,
                batch.get("old_logps"),
                batch["reference_logps"] if loss_of.beta else None,
                batch["advantages"],
                mask,
            )
        )
        return loss, {"loss": loss, **metrics, "entropy": token_mean(entropy, mask)}

    def masses(batch: Batch) -> Metrics:
        tokens = jnp.sum(batch["completion_mask"], dtype=jnp.float32) + _LEAST
        names = [*_OF_TOKENS, *(() if per_row else _OF_RATIOS)]
        names += ["loss"] if loss_of.type in BATCH_TOKEN_MEANS else []
        return dict.fromkeys(names, tokens)

    return Parted(loss_fn, masses=masses)


def sampled_logps_fn(
    graphdef: nnx.GraphDef,
    *,
    temperature: float = 1.0,
    vocab_chunk: VocabChunk = "auto",
    parts: int = 1,
) -> Callable[[Any, Batch], tuple[jax.Array]]:
    """`f(params, batch) -> (logps,)`, float32 `[B, C]`: what `group_loss` makes of the same rows.

    Args:
      graphdef: The model's structure.
      temperature: See `group_loss`.
      vocab_chunk: See there.
      parts: In which a batch is looked at.
    """

    def logps(params: Any, batch: Batch) -> tuple[jax.Array]:
        def columns(params: Any, part: Batch) -> Batch:
            return {"logps": _statistics(graphdef, params, part, temperature, vocab_chunk)[0]}

        return (columns_in_parts(columns, params, batch, parts)["logps"],)

    return logps


def _statistics(
    graphdef: nnx.GraphDef, params: Any, batch: Batch, temperature: float, vocab_chunk: VocabChunk
) -> tuple[jax.Array, jax.Array]:
    model = nnx.merge(graphdef, params)
    return sampled_statistics(
        model,
        batch["prompt_tokens"],
        batch["prompt_mask"],
        batch["completion_tokens"],
        batch["completion_mask"],
        temperature=temperature,
        vocab_chunk=resolve_vocab_chunk(vocab_chunk, model.unembedding().shape[1]),
    )

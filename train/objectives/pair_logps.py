"""Log-probabilities of both answers to a prompt, which is computed once or once for each.

The layout of a batch decides: rows made by `train.data.layout.share_prompt` hold the prompt once
for both answers (arXiv:2410.20305), other batches repeat it. Both give the same numbers up to
rounding, because each token sees the same other tokens in either layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from train.objectives.logps import VocabChunk, completion_statistics, token_statistics

if TYPE_CHECKING:
    from train.models import Decoder


def pair_token_logps(
    model: Decoder, batch: Mapping[str, Any], *, vocab_chunk: VocabChunk = None
) -> jax.Array:
    """Per-token log-probabilities of both answers of every pair, from one forward pass.

    `batch` has `prompt_…`, `chosen_…`, `rejected_…` tokens and masks `[B, P]` and `[B, C]`, with or
    without the columns of `train.data.layout.share_prompt`. The result is float32 `[2 * B, C]`, 0
    where masked: the chosen answers, then the rejected ones.
    """
    if "joined_ids" in batch:
        return _shared(model, batch, vocab_chunk)
    both = {
        "prompt_tokens": jnp.concatenate([batch["prompt_tokens"]] * 2),
        "prompt_mask": jnp.concatenate([batch["prompt_mask"]] * 2),
        "answer_tokens": jnp.concatenate([batch["chosen_tokens"], batch["rejected_tokens"]]),
        "answer_mask": jnp.concatenate([batch["chosen_mask"], batch["rejected_mask"]]),
    }
    return completion_statistics(model, both, "answer", vocab_chunk=vocab_chunk).logps


def _shared(model: Decoder, batch: Mapping[str, Any], vocab_chunk: VocabChunk) -> jax.Array:
    """`pair_token_logps` for rows that hold the prompt once."""
    positions, visible = attention_of_parts(jnp.asarray(batch["joined_parts"]))
    hidden = model.hidden(batch["joined_ids"], positions=positions, visible=visible)
    hidden = jnp.take_along_axis(hidden, batch["scored_from"][..., None], axis=1)
    targets = batch["scored_ids"]
    logps = token_statistics(hidden, model.unembedding(), targets, vocab_chunk=vocab_chunk).logps
    # Back to a row for each answer: the rejected one starts where the chosen one ends.
    number, last = jnp.arange(batch["chosen_mask"].shape[1]), logps.shape[1] - 1
    chosen = jnp.sum(batch["chosen_mask"], axis=1, keepdims=True, dtype=jnp.int32)

    def answer(start: jax.Array | int, mask: jax.Array) -> jax.Array:
        places = jnp.broadcast_to(jnp.minimum(start + number, last), mask.shape)
        return jnp.where(mask, jnp.take_along_axis(logps, places, axis=1), 0.0)

    return jnp.concatenate(
        [answer(0, batch["chosen_mask"]), answer(chosen, batch["rejected_mask"])]
    )


def attention_of_parts(parts: jax.Array, answers: int = 2) -> tuple[jax.Array, jax.Array]:
    """Positions, and who sees whom, in rows that hold a prompt and at most so many `answers` to it.

    `parts` are int `[batch, length]` as `joined_parts` of `train.data.layout.share_prompt`.

    Returns:
      int32 positions `[batch, length]`: all answers count on from the end of the prompt; and bool
      `[batch, length, length]`, true where the token of axis 1 sees that of axis 2: earlier ones of
      its own part, and the prompt.

    Example:
      >>> positions, visible = attention_of_parts(jnp.array([[0, 0, 1, 1, 2]]))
      >>> positions.tolist(), visible[0, 4].tolist()
      ([[0, 1, 2, 3, 2]], [True, True, False, False, True])
    """
    places = jnp.arange(parts.shape[1], dtype=jnp.int32)
    positions = places
    for number in range(1, answers):
        length = jnp.sum(parts == number, axis=1, keepdims=True, dtype=jnp.int32)
        positions = positions - jnp.where(parts > number, length, 0)
    same = parts[:, :, None] == parts[:, None, :]
    return positions, (same | (parts == 0)[:, None, :]) & (places[:, None] >= places)

"""Log-probabilities of the answers in rows that hold several examples (`train.data.packing`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from train.logps import token_statistics

if TYPE_CHECKING:
    from train.models import Decoder


def packed_statistics(
    model: Decoder, batch: Mapping[str, Any], *, vocab_chunk: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Scores the answer tokens of every example given its own prompt, in one forward pass.

    Args:
      model: Anything with `hidden(tokens, mask, positions, visible)` and `unembedding()`, as
        `train.models.Decoder`.
      batch: The columns of `train.data.packing.pack`.
      vocab_chunk: See `train.logps.token_statistics`.

    Returns:
      `(logps, top1)`: float32 and bool, shaped like `packed_from`; 0 and false at its padding.
    """
    positions, visible = attention_of_examples(jnp.asarray(batch["packed_parts"]))
    hidden = model.hidden(batch["packed_ids"], positions=positions, visible=visible)
    places = batch["packed_from"]
    real, places = places >= 0, jnp.maximum(places, 0)
    hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
    targets = jnp.take_along_axis(jnp.asarray(batch["packed_ids"]), places + 1, axis=1)
    logps, top1 = token_statistics(hidden, model.unembedding(), targets, vocab_chunk=vocab_chunk)
    return jnp.where(real, logps, 0.0), top1 & real


def attention_of_examples(parts: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions, and who sees whom, in rows that hold several examples.

    Args:
      parts: int `[batch, length]` as `packed_parts`.

    Returns:
      int32 positions `[batch, length]`, from 0 in every example; and bool `[batch, length, length]`,
      true where the token of axis 1 sees that of axis 2: earlier ones of its own example.

    Example:
      >>> positions, visible = attention_of_examples(jnp.array([[0, 0, 1, 1, -1]]))
      >>> positions.tolist(), visible[0, 3].tolist()
      ([[0, 1, 0, 1, 0]], [False, False, True, True, False])
    """
    places = jnp.arange(parts.shape[1], dtype=jnp.int32)
    starts = jnp.diff(parts, axis=1, prepend=-2) != 0
    first = jax.lax.cummax(jnp.where(starts, places, 0), axis=1)
    same = parts[:, :, None] == parts[:, None, :]
    return places - first, same & (places[:, None] >= places)

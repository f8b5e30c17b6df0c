"""Log-probabilities of the answers in rows that hold several examples (`train.data.packing`)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from train.objectives.logps import token_statistics

if TYPE_CHECKING:
    from train.models import Decoder


def packed_statistics(
    model: Decoder, batch: Mapping[str, Any], *, vocab_chunk: int | None = None
) -> tuple[jax.Array, jax.Array]:
    """Scores the answer tokens of every example given its own prompt, in one forward pass.

    Args:
      model: Anything with `hidden(tokens, segments=…)` and `unembedding()`, as
        `train.models.Decoder`.
      batch: The columns of `train.data.packing.pack`.
      vocab_chunk: See `train.objectives.logps.token_statistics`.

    Returns:
      `(logps, top1)`: float32 and bool, shaped like `packed_from`; 0 and false at its padding.
    """
    hidden = model.hidden(batch["packed_ids"], segments=batch["packed_parts"])
    places = batch["packed_from"]
    real, places = places >= 0, jnp.maximum(places, 0)
    hidden = jnp.take_along_axis(hidden, places[..., None], axis=1)
    targets = jnp.take_along_axis(jnp.asarray(batch["packed_ids"]), places + 1, axis=1)
    logps, top1 = token_statistics(hidden, model.unembedding(), targets, vocab_chunk=vocab_chunk)
    return jnp.where(real, logps, 0.0), top1 & real

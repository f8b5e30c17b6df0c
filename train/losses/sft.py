"""Cross-entropy of the answers."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sft(
    logps: jax.Array, mask: jax.Array, top1: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Negative log-likelihood per completion token, averaged over all tokens of the batch.

    Args:
      logps: Per-token log-probabilities, float32 `[batch, completion]`, 0 where masked.
      mask: bool `[batch, completion]`, true at completion tokens.
      top1: bool `[batch, completion]`, whether the model ranks the token first.

    Returns:
      The scalar loss, and the metrics `loss`, `mean_token_accuracy` and `num_tokens` (completion
      tokens in the batch), float32 scalars.
    """
    tokens = jnp.sum(mask, dtype=jnp.float32)
    loss = -jnp.sum(logps) / jnp.maximum(tokens, 1)
    accuracy = jnp.sum(top1 & mask, dtype=jnp.float32) / jnp.maximum(tokens, 1)
    metrics = {
        "loss": jax.lax.stop_gradient(loss),
        "mean_token_accuracy": accuracy,
        "num_tokens": tokens,
    }
    return loss, metrics

"""Cross-entropy of the answers."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sft(
    logps: jax.Array, mask: jax.Array, top1: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Negative log-likelihood per completion token, averaged over all tokens of the batch.

    All arguments are `[batch, completion]`: `logps` float32, 0 where masked; `mask` bool, true at
    completion tokens; `top1` bool, whether the model ranks the token first. The metrics are `loss`,
    `mean_token_accuracy` and `num_tokens` (completion tokens in the batch), float32 scalars.
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

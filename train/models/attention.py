"""Which program computes attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from train.models.config import ModelConfig

_HALVES = (np.dtype(jnp.bfloat16), np.dtype(jnp.float16))
_CUDNN_WIDTH = 128


def check_attention(config: ModelConfig) -> None:
    """Checks that the attention asked for can run on this machine.

    Raises:
        ValueError: cuDNN's attention with another type or width of heads than it computes, or
            without an NVIDIA GPU.
    """
    if config.attention != "cudnn":
        return
    if np.dtype(config.dtype) not in _HALVES:
        raise ValueError(f"attention is cudnn, which needs dtype bfloat16, not {config.dtype}")
    if config.head_dim % 8 or config.head_dim > _CUDNN_WIDTH:
        raise ValueError(
            f"attention is cudnn, which needs heads of 8, 16, … {_CUDNN_WIDTH} entries, not "
            f"{config.head_dim}; use xla"
        )
    if jax.default_backend() != "gpu":
        raise ValueError(
            f"attention is cudnn, which needs an NVIDIA GPU, and JAX runs on "
            f"{jax.default_backend()}; use xla"
        )


def attend(
    config: ModelConfig,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None,
    causal: bool,
    cached: bool,
) -> jax.Array:
    """Scaled dot-product attention.

    Args:
        config: its ``attention`` says how.
        query: ``[batch, length, heads, head_dim]``.
        key: ``[batch, keys, kv_heads, head_dim]``.
        value: like ``key``.
        mask: see `train.models.layers.AttentionInputs`.
        causal: likewise.
        cached: keys come from a cache. Always XLA's: there is no backward pass, and often one query.

    Returns:
        Like ``query``.
    """
    kind = "cudnn" if config.attention == "cudnn" and not cached else "xla"
    return jax.nn.dot_product_attention(
        query, key, value, mask=mask, is_causal=causal, implementation=kind
    )

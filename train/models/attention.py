"""Which program computes attention."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from train.models.config import ModelConfig
from train.models.splash import splash_attention

_HALVES = (np.dtype(jnp.bfloat16), np.dtype(jnp.float16))
_CUDNN_WIDTH = 128
_BACKENDS = {"cudnn": ("gpu", "an NVIDIA GPU"), "splash": ("tpu", "a TPU")}


def check_attention(config: ModelConfig) -> None:
    """Raises `ValueError` where the attention asked for cannot run on this machine.

    That is an unknown name, no device for it, or for cuDNN's a dtype or width of heads that it does
    not compute.
    """
    kind = config.attention
    if kind == "xla":
        return
    if kind not in _BACKENDS:
        raise ValueError(f"attention is {kind!r}; supported are xla, {', '.join(_BACKENDS)}")
    if kind == "cudnn" and np.dtype(config.dtype) not in _HALVES:
        raise ValueError(f"attention is cudnn, which needs dtype bfloat16, not {config.dtype}")
    if kind == "cudnn" and (config.head_dim % 8 or config.head_dim > _CUDNN_WIDTH):
        raise ValueError(
            f"attention is cudnn, which needs heads of 8, 16, … {_CUDNN_WIDTH} entries, not "
            f"{config.head_dim}; use xla"
        )
    backend, device = _BACKENDS[kind]
    if jax.default_backend() != backend:
        raise ValueError(
            f"attention is {kind}, which needs {device}, and JAX runs on "
            f"{jax.default_backend()}; use xla"
        )


class AttentionInputs(NamedTuple):
    """What every block needs besides the residual stream.

    Attributes:
        cos: float32 ``[batch, length, 1, head_dim / 2]``, as ``sin``.
        mask: bool, broadcastable to ``[batch, heads, length, keys]``, True where a query may look,
            or None for no restriction beyond ``causal``.
        causal: also forbid keys after the query. Off when ``mask`` says it all (cached decoding, rows
            of sequences with a part in common).
        segments: int32 ``[batch, length]``: real tokens see those with their number. It restricts as
            ``mask`` does while ``causal`` is on, for programs that take no mask. None: one number
            for all, or ``mask`` says more.
    """

    cos: jax.Array
    sin: jax.Array
    mask: jax.Array | None
    causal: bool
    segments: jax.Array | None = None


def attend(
    config: ModelConfig,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    inputs: AttentionInputs,
    *,
    cached: bool,
) -> jax.Array:
    """Scaled dot-product attention, as ``config.attention`` says; the result is like ``query``.

    ``query`` is ``[batch, length, heads, head_dim]``; ``key`` and ``value`` are ``[batch, keys,
    kv_heads, head_dim]``. Where keys come from a cache, it is always XLA's: there is no backward
    pass, and often one query. Raises `ValueError` for splash attention of rows of sequences with a
    part in common.
    """
    if config.attention == "splash" and not cached:
        if not inputs.causal:
            raise ValueError(
                "attention is splash, which keeps sequences of a row apart, and these have a part in "
                "common; use xla, or do not share prompts"
            )
        return splash_attention(query, key, value, inputs.segments)
    kind = "cudnn" if config.attention == "cudnn" and not cached else "xla"
    return jax.nn.dot_product_attention(
        query, key, value, mask=inputs.mask, is_causal=inputs.causal, implementation=kind
    )

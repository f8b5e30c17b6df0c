"""The pieces of a decoder block. Attribute names follow Hugging Face's tensor names."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from train.distributed.axes import constrain
from train.models.attention import AttentionInputs, attend
from train.models.config import ModelConfig
from train.models.rope import rotate

RESIDUAL = ("batch", "length", None)
"""Logical axes of the residual stream; its channels stay together."""


class KVCache(NamedTuple):
    """Keys and values of earlier tokens: ``[..., batch, keys, kv_heads, head_dim]``."""

    key: jax.Array
    value: jax.Array


def make_param(value: jax.Array, axes: tuple[str | None, ...]) -> nnx.Param:
    """A parameter that knows its logical axes (`train.distributed.axes`), not yet placed by them."""
    return nnx.Param(value, logical_axes=axes)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, config: ModelConfig):
        self.weight = make_param(jnp.ones(size, config.param_dtype), (None,))
        self.eps = config.rms_norm_eps

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises any ``[..., size]`` and keeps the dtype."""
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        return self.weight[...].astype(x.dtype) * (wide * scale).astype(x.dtype)


class Linear(nnx.Module):
    """``x @ kernel + bias`` with the kernel stored as ``[inputs, outputs]``.

    Where its name is one of ``config.lora_targets``, it has a low-rank adapter (Hu et al. 2021): A
    ``[inputs, rank]``, drawn as PEFT draws it, and B ``[rank, outputs]``, 0.
    """

    def __init__(
        self,
        name: str,
        inputs: int,
        outputs: int,
        config: ModelConfig,
        rngs: nnx.Rngs,
        *,
        axes: tuple[str, str],
        use_bias: bool,
    ):
        kernel = rngs.params.normal((inputs, outputs), config.param_dtype)
        self.kernel = make_param(config.initializer_range * kernel, axes)
        bias = jnp.zeros(outputs, config.param_dtype)
        self.bias = make_param(bias, (axes[1],)) if use_bias else None
        self.lora_scale = config.lora_scale
        rank, dtype, bound = config.lora_rank, config.param_dtype, inputs**-0.5
        if name in config.lora_targets:
            drawn = rngs.params.uniform((inputs, rank), dtype, -bound, bound)
            self.lora_a = make_param(drawn, (axes[0], None))
            self.lora_b = make_param(jnp.zeros((rank, outputs), dtype), (None, axes[1]))
        else:
            self.lora_a = self.lora_b = None

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[..., inputs]`` to ``[..., outputs]`` in the dtype of ``x``."""
        y = x @ self.kernel[...].astype(x.dtype)
        if self.lora_a is not None and self.lora_b is not None:
            low = x @ self.lora_a[...].astype(x.dtype)
            y = y + self.lora_scale * (low @ self.lora_b[...].astype(x.dtype))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query self-attention with rotary positions and optional query and key norms."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config, self.head_dim = config, config.head_dim
        width, queries = config.hidden_size, config.num_heads * config.head_dim
        keys = config.num_kv_heads * config.head_dim

        def project(name: str, outputs: int) -> Linear:
            axes, use_bias = ("embed", "heads"), config.qkv_bias
            return Linear(name, width, outputs, config, rngs, axes=axes, use_bias=use_bias)

        self.q_proj = project("q_proj", queries)
        self.k_proj, self.v_proj = project("k_proj", keys), project("v_proj", keys)
        self.o_proj = Linear(
            "o_proj", queries, width, config, rngs, axes=("heads", "embed"), use_bias=config.o_bias
        )
        self.q_norm = RMSNorm(config.head_dim, config) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config) if config.qk_norm else None

    def __call__(
        self, x: jax.Array, inputs: AttentionInputs, cache: KVCache | None, start: jax.Array | int
    ) -> tuple[jax.Array, KVCache | None]:
        """``[batch, length, hidden]`` to the same; writes ``cache`` at slot ``start``."""
        batch, length, _ = x.shape

        def heads(projected: jax.Array) -> jax.Array:
            return projected.reshape(batch, length, -1, self.head_dim)

        query, key = heads(self.q_proj(x)), heads(self.k_proj(x))
        value = heads(self.v_proj(x))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query = rotate(query, inputs.cos, inputs.sin)
        key = rotate(key, inputs.cos, inputs.sin)
        if cache is not None:
            at = (0, start, 0, 0)
            key = jax.lax.dynamic_update_slice(cache.key, key, at)
            value = jax.lax.dynamic_update_slice(cache.value, value, at)
            cache = KVCache(key, value)
        out = attend(self.config, query, key, value, inputs, cached=cache is not None)
        return self.o_proj(out.reshape(batch, length, -1)), cache


class MLP(nnx.Module):
    """Gated feed-forward block: ``down(silu(gate(x)) * up(x))`` (Shazeer 2020)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width, inner, use_bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        wide = {"axes": ("embed", "mlp"), "use_bias": use_bias}
        self.gate_proj = Linear("gate_proj", width, inner, config, rngs, **wide)
        self.up_proj = Linear("up_proj", width, inner, config, rngs, **wide)
        self.down_proj = Linear(
            "down_proj", inner, width, config, rngs, axes=("mlp", "embed"), use_bias=use_bias
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """``[..., hidden]`` to the same."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nnx.Module):
    """One pre-norm decoder layer."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(config.hidden_size, config)
        self.self_attn = Attention(config, rngs)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config)
        self.mlp = MLP(config, rngs)

    def __call__(
        self,
        x: jax.Array,
        inputs: AttentionInputs,
        cache: KVCache | None = None,
        start: jax.Array | int = 0,
    ) -> tuple[jax.Array, KVCache | None]:
        """``[batch, length, hidden]`` to the same; writes ``cache`` at slot ``start``."""
        attended, cache = self.self_attn(self.input_layernorm(x), inputs, cache, start)
        x = constrain(x + attended, RESIDUAL)
        return constrain(x + self.mlp(self.post_attention_layernorm(x)), RESIDUAL), cache

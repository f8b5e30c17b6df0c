"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864) in the half-split layout."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from train.models.config import ModelConfig


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Rotation per position, in radians, of each pair of channels.

    The result is float32 ``[head_dim / 2]``, computed in float64.

    Example:
        >>> config = ModelConfig("llama", 8, 8, 8, 1, 1, 1, head_dim=4, rope_theta=100.0)
        >>> inverse_frequencies(config)
        array([1. , 0.1], dtype=float32)
    """
    exponent = np.arange(0, config.head_dim, 2, dtype=np.float64) / config.head_dim
    frequency = config.rope_theta**-exponent
    scaling = dict(config.rope_scaling)
    kind = scaling.get("rope_type", "default")
    if kind == "linear":
        frequency = frequency / scaling["factor"]
    elif kind == "llama3":
        # Slow rotations, those with fewer than low_freq_factor turns in the original context, are
        # slowed by `factor`; fast ones stay; in between the two are blended linearly in turns.
        turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
        frequency = (1 - kept) * frequency / scaling["factor"] + kept * frequency
    elif kind != "default":
        raise ValueError(f"rope_scaling has rope_type {kind!r}; supported are linear and llama3")
    return frequency.astype(np.float32)


def rotation_angles(
    config: ModelConfig, positions: jax.Array | np.ndarray
) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the rotations at positions int32 ``[batch, length]``.

    Each is float32 ``[batch, length, 1, head_dim / 2]``, to broadcast over heads.
    """
    angle = jnp.asarray(positions, jnp.float32)[..., None] * inverse_frequencies(config)
    return jnp.cos(angle)[:, :, None, :], jnp.sin(angle)[:, :, None, :]


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates channel ``i`` with channel ``i + head_dim / 2``, in float32, keeping the dtype of ``x``.

    ``x`` is ``[batch, length, heads, head_dim]``; the others come from `rotation_angles`.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)

"""Splash attention: JAX's Pallas kernel for TPUs, causal, without a matrix of all pairs.

The kernel works on one device's heads and rows, so on a mesh it runs under `jax.shard_map`.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from train.distributed.axes import partition_spec

if TYPE_CHECKING:
    from jax.sharding import AbstractMesh

_LANES = 128
"""Lengths are a multiple of this inside of the kernel."""
_LARGEST_BLOCK = 512


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array | None,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Causal attention within the sequences of each row; the result is like ``query``.

    ``query`` is ``[batch, length, heads, head_dim]``; ``key`` and ``value`` have ``kv_heads`` in
    place of ``heads``. Tokens see earlier ones with their number in ``segments``, int32 ``[batch,
    length]``, which padding has too; None lets all see each other. ``interpret`` runs the kernel's
    Python on any machine, for tests.

    Source: ``jax.experimental.pallas.ops.tpu.splash_attention``; FlashAttention-2 (Dao 2023) with
    blocks above the diagonal left out.
    """
    length = query.shape[1]
    padded = -length % _LANES
    if padded:
        # The padding lies behind all tokens, so none of them sees it.
        query, key, value = (
            jnp.pad(x, [(0, 0), (0, padded), (0, 0), (0, 0)]) for x in (query, key, value)
        )
        if segments is not None:
            segments = jnp.pad(segments, [(0, 0), (0, padded)])
    mesh = jax.sharding.get_abstract_mesh()
    attend = functools.partial(_local, interpret=interpret)
    if mesh.empty or mesh.size == 1:
        out = attend(query, key, value, segments)
    else:
        out = _on_mesh(attend, mesh, query, key, value, segments)
    return out[:, :length]


def _on_mesh(attend, mesh: AbstractMesh, query, key, value, segments) -> jax.Array:
    axes = ("batch", None, "heads", None)
    of_query = partition_spec(axes, query.shape, mesh)
    if partition_spec(axes, key.shape, mesh) != of_query:
        # Too few key heads for the mesh: every query head gets its own.
        groups = query.shape[2] // key.shape[2]
        key, value = (jnp.repeat(x, groups, axis=2) for x in (key, value))
    arrays = (query, key, value) if segments is None else (query, key, value, segments)
    specs = [partition_spec(axes[: x.ndim], x.shape, mesh) for x in arrays]
    return jax.shard_map(
        lambda q, k, v, s=None: attend(q, k, v, s),
        in_specs=tuple(specs),
        out_specs=of_query,
        check_vma=False,  # a Pallas call does not say how its outputs vary
    )(*arrays)


def _local(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array | None,
    *,
    interpret: bool,
) -> jax.Array:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    _, length, heads, head_dim = query.shape
    block = next(b for b in (_LARGEST_BLOCK, 384, 256, _LANES) if length % b == 0)
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    sizes: dict[str, Any] = dict.fromkeys(names, block)
    kernel: Any = splash.make_splash_mha(
        splash.MultiHeadMask([splash.CausalMask((length, length))] * heads),
        block_sizes=splash.BlockSizes(**sizes),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )
    rows = [x.swapaxes(1, 2) for x in (query * head_dim**-0.5, key, value)]
    if segments is None:
        out = jax.vmap(kernel)(*rows)
    else:
        out = jax.vmap(kernel)(*rows, splash.SegmentIds(segments, segments))
    return out.swapaxes(1, 2).astype(query.dtype)

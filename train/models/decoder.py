"""The decoder: embedding, scanned blocks, final norm and the output matrix."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from train.distributed.axes import constrain
from train.models.attention import AttentionInputs
from train.models.config import ModelConfig
from train.models.layers import RESIDUAL, Block, KVCache, RMSNorm, make_param
from train.models.rope import rotation_angles
from train.types import Params

REMAT_POLICIES: dict[str, Any] = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_saveable,
    "weight_dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""What is kept of a block for its backward pass; `"none"` keeps everything."""

Array = jax.Array | np.ndarray


class Decoder(nnx.Module):
    """Causal language model of the Llama, Qwen2 and Qwen3 families.

    The parameters of all blocks are stacked on axis 0 under ``layers`` and the forward pass scans
    over them, so compile time does not grow with depth. Fresh parameters are drawn as Hugging Face
    draws them: normal matrices of standard deviation ``initializer_range``, norms 1, biases 0.

    Example:
        >>> config = ModelConfig("llama", 32, 16, 32, 2, 2, 1, 8)
        >>> model = Decoder(config, nnx.Rngs(0))
        >>> model(jnp.zeros((1, 5), jnp.int32)).shape
        (1, 5, 32)
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        vocab, width = config.vocab_size, config.hidden_size

        def draw(rows: int, columns: int) -> jax.Array:
            values = rngs.params.normal((rows, columns), config.param_dtype)
            return config.initializer_range * values

        self.embed_tokens = make_param(draw(vocab, width), ("vocab", "embed"))

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def make_layers(rngs: nnx.Rngs) -> Block:
            return Block(config, rngs)

        self.layers = make_layers(rngs)
        self.norm = RMSNorm(config.hidden_size, config)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else make_param(draw(width, vocab), ("embed", "vocab"))

    def __call__(
        self, tokens: Array, mask: Array | None = None, positions: Array | None = None
    ) -> jax.Array:
        """Logits of the next token at every position, float32 ``[batch, length, vocab]``.

        ``tokens`` are int32 ``[batch, length]``. ``mask``, bool, is True at real tokens, with
        padding on either side; None means that all are real. ``positions``, int32, count real
        tokens from 0 by default. At padding the logits are finite and meaningless.
        """
        return self.logits(self.hidden(tokens, mask, positions))

    def hidden(
        self,
        tokens: Array,
        mask: Array | None = None,
        positions: Array | None = None,
        visible: Array | None = None,
        segments: Array | None = None,
    ) -> jax.Array:
        """Normed hidden states ``[batch, length, hidden_size]`` in ``config.dtype``.

        They are what `unembedding` applies to, for losses that make logits a few at a time. Takes
        the arguments of calling the model, and two more.

        Args:
            tokens: int32 ``[batch, length]``.
            mask: not given together with ``visible``.
            positions: needed with ``visible``.
            visible: bool ``[batch, length, length]``, True where the token of axis 1 may look at
                that of axis 2, at one at least; instead of all earlier ones. For rows that hold
                several sequences with a part in common.
            segments: int32 ``[batch, length]``, for rows that hold sequences one after the other,
                in place of the other three: a token sees the earlier ones with its number, and
                positions count from 0 in each.

        Raises:
            ValueError: ``visible`` comes with ``mask``, or without ``positions``; or ``segments``
                with any of the three.
        """
        causal, keys, apart = True, None, None
        if segments is not None:
            if not (mask is positions is visible is None):
                raise ValueError("segments say all, so mask, positions and visible must be None")
            apart = jnp.asarray(segments)
            positions = segment_positions(apart)
            keys = apart[:, None, :, None] == apart[:, None, None, :]
        elif visible is not None:
            if mask is not None or positions is None:
                raise ValueError("visible needs positions and says all, so mask must be None")
            causal, keys = False, jnp.asarray(visible)[:, None]
        elif mask is not None:
            real = jnp.asarray(mask, bool)
            apart = real.astype(jnp.int32)
            # A padding query sees no real key; letting it see itself keeps its softmax, and so its
            # gradient, finite whatever the attention implementation does with an empty row.
            itself = jnp.eye(tokens.shape[1], dtype=bool)
            keys = real[:, None, None, :] | itself[None, None]
        if positions is None:
            positions = token_positions(tokens, mask)
        cos, sin = rotation_angles(self.config, positions)
        inputs = AttentionInputs(cos, sin, keys, causal, segments=apart)
        return self._forward(tokens, inputs, None, 0)[0]

    def extend(
        self,
        tokens: Array,
        positions: Array,
        visible: Array,
        cache: KVCache,
        start: jax.Array | int,
    ) -> tuple[jax.Array, KVCache]:
        """Runs new tokens against a cache of earlier ones and writes them at slot ``start`` and behind.

        ``tokens`` and ``positions`` are int32 ``[batch, new]``. ``visible``, bool ``[batch, new,
        slots]``, is True where a new token may look into the cache, its own slot included; at least
        one per row. Returns hidden states ``[batch, new, hidden_size]`` and the cache with the new
        tokens written.
        """
        cos, sin = rotation_angles(self.config, positions)
        inputs = AttentionInputs(cos, sin, jnp.asarray(visible)[:, None], causal=False)
        hidden, cache_out = self._forward(tokens, inputs, cache, start)
        assert cache_out is not None
        return hidden, cache_out

    def empty_cache(self, batch: int, slots: int) -> KVCache:
        """Zero keys and values: two ``[layers, batch, slots, kv_heads, head_dim]`` arrays."""
        c = self.config
        shape = (c.num_layers, batch, slots, c.num_kv_heads, c.head_dim)
        return KVCache(jnp.zeros(shape, c.dtype), jnp.zeros(shape, c.dtype))

    def unembedding(self) -> jax.Array:
        """The output matrix ``[hidden_size, vocab]`` in ``config.dtype``."""
        head = self.lm_head
        matrix = self.embed_tokens[...].T if head is None else head[...]
        return matrix.astype(self.config.dtype)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """float32 ``[..., vocab]`` of hidden states ``[..., hidden_size]``."""
        return jnp.matmul(hidden, self.unembedding(), preferred_element_type=jnp.float32)

    def _forward(
        self, tokens: Array, inputs: AttentionInputs, cache: KVCache | None, start: jax.Array | int
    ) -> tuple[jax.Array, KVCache | None]:
        graphdef, stacked = split_model(self.layers)

        def block(x: jax.Array, layer: tuple[Params, KVCache | None]):
            params, layer_cache = layer
            return nnx.merge(graphdef, params)(x, inputs, layer_cache, start)

        if self.config.remat != "none":
            policy = REMAT_POLICIES[self.config.remat]
            # The scan already keeps the recomputation from being merged with the forward pass.
            block = jax.checkpoint(block, prevent_cse=False, policy=policy)
        x = constrain(self.embed_tokens[...][tokens].astype(self.config.dtype), RESIDUAL)
        x, cache = jax.lax.scan(block, x, (stacked, cache))
        return self.norm(x), cache


def token_positions(tokens: Array, mask: Array | None) -> jax.Array:
    """int32 ``[batch, length]``: how many real tokens came before; 0 at leading padding."""
    if mask is None:
        return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    return jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)


def segment_positions(segments: jax.Array) -> jax.Array:
    """int32 ``[batch, length]``: how many tokens of its sequence came before each.

    Example:
        >>> segment_positions(jnp.array([[0, 0, 1, 1, -1]])).tolist()
        [[0, 1, 0, 1, 0]]
    """
    places = jnp.arange(segments.shape[1], dtype=jnp.int32)
    starts = jnp.diff(segments, axis=1, prepend=segments[:, :1] - 1) != 0
    return places - jax.lax.cummax(jnp.where(starts, places, 0), axis=1)


def split_model(model: nnx.Module) -> tuple[nnx.GraphDef, Params]:
    """A model's static structure, and its arrays as a nested dict without NNX types.

    The layers are stacked under ``params["layers"]``. Do this once, outside of the training step;
    inside, `merge_model` costs only tracing time.
    """
    graphdef, state = nnx.split(model)
    return graphdef, nnx.to_pure_dict(state)


def merge_model(graphdef: nnx.GraphDef, params: Params) -> Decoder:
    """Inverse of `split_model`; works on tracers inside `jax.jit`."""
    return nnx.merge(graphdef, params)


def layer_axes(path: tuple[str, ...]) -> int:
    """Leading axes of the leaf at ``path`` that count separate tensors: 1 under ``layers``, else 0.

    Example:
        >>> layer_axes(("layers", "mlp", "up_proj", "kernel")), layer_axes(("norm", "weight"))
        (1, 0)
    """
    return 1 if path[0] == "layers" else 0

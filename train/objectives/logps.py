"""Log-probabilities of tokens: the one function every loss, evaluation and cache goes through.

A language model's logits are by far its largest activation: 16 answers of 512 tokens over a
vocabulary of 152k take 5 GB in float32, and as much again for their gradient. The chunked path
walks over the vocabulary with a running log-sum-exp (Milakov and Gimelshein, 2018,
arXiv:1805.02867) and computes each chunk of logits a second time in the backward pass, so that the
largest array it makes is `[batch, length, chunk]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from train.models import Decoder

VocabChunk = int | None | Literal["auto"]

AUTO_VOCAB_CHUNK = 8192
"""Columns of the vocabulary that `vocab_chunk="auto"` holds at a time."""


def resolve_vocab_chunk(vocab_chunk: VocabChunk, vocab_size: int) -> int | None:
    """The chunk that a setting means for a vocabulary.

    `"auto"` computes all logits at once up to `2 * AUTO_VOCAB_CHUNK` tokens, where they are no
    larger than the other activations, and `AUTO_VOCAB_CHUNK` columns at a time above: a third more
    work in the output projection buys that no `[batch, length, vocabulary]` array exists. On a CPU
    that is faster too (49k tokens, 1024 positions, width 576: 3.0 s instead of 5.4 s with the
    gradient), because a chunk stays near the caches.
    """
    if vocab_chunk != "auto":
        return vocab_chunk
    return AUTO_VOCAB_CHUNK if vocab_size > 2 * AUTO_VOCAB_CHUNK else None


class TokenStatistics(NamedTuple):
    """What a model says of given tokens, each `[batch, length]`.

    Attributes:
      logps: Log-probability of each token, float32.
      top1: Whether no token has a larger logit, bool.
      entropy: Entropy of the distribution at each token, in nats, float32; without gradient.
    """

    logps: jax.Array
    top1: jax.Array
    entropy: jax.Array

    def masked(self, mask: jax.Array) -> TokenStatistics:
        """The same statistics, with 0, false and 0 where `mask` is false."""
        return jax.tree.map(lambda x: jnp.where(mask, x, jnp.zeros_like(x)), self)


def token_statistics(
    hidden: jax.Array,
    unembedding: jax.Array,
    targets: jax.Array,
    *,
    vocab_chunk: VocabChunk = None,
) -> TokenStatistics:
    """Scores one target token at each position; `hidden` and `unembedding` get gradients of `logps`.

    Args:
      hidden: Final hidden states, `[batch, length, width]`, any float dtype.
      unembedding: Output projection, `[width, vocabulary]`.
      targets: Token to score at each position, int `[batch, length]`, in `[0, vocabulary)`.
      vocab_chunk: Columns of the vocabulary to hold at a time, see `resolve_vocab_chunk`; `None`, or
        a number not below the vocabulary, computes all logits at once. Both give the same numbers up
        to rounding.

    Raises:
      ValueError: If `vocab_chunk` is not positive, or the shapes do not belong together.

    Example:
      >>> import jax.numpy as jnp
      >>> hidden, unembedding = jnp.zeros((1, 2, 4)), jnp.zeros((4, 8))
      >>> jnp.exp(token_statistics(hidden, unembedding, jnp.array([[3, 5]])).logps).tolist()
      [[0.125, 0.125]]
    """
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != unembedding.shape[0]:
        raise ValueError(
            "hidden [batch, length, width], unembedding [width, vocabulary] and targets "
            f"[batch, length] do not fit together: {hidden.shape}, {unembedding.shape}, "
            f"{targets.shape}."
        )
    chunk = resolve_vocab_chunk(vocab_chunk, unembedding.shape[1])
    if chunk is not None and chunk < 1:
        raise ValueError(f"vocab_chunk must be a positive number or None, got {vocab_chunk}.")
    if chunk is not None and chunk < unembedding.shape[1]:
        return _chunked(chunk, hidden, unembedding, targets)
    logits = _logits(hidden, unembedding)
    target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    largest = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
    shifted = logits - largest[..., None]
    weights = jnp.exp(shifted)
    weighted = jnp.sum(jax.lax.stop_gradient(weights * shifted), axis=-1)
    return _statistics(target_logits, largest, jnp.sum(weights, axis=-1), weighted)


def completion_statistics(
    model: Decoder,
    batch: Mapping[str, Any],
    name: str = "completion",
    *,
    temperature: float = 1.0,
    vocab_chunk: VocabChunk = None,
) -> TokenStatistics:
    """Scores the tokens of each row's completion of kind `name`, `[batch, completion]`, in one pass.

    Because prompts are padded on the left and completions on the right, the hidden state that
    predicts completion token `i` is always at position `prompt length + i - 1`: only those
    positions are multiplied with the unembedding. The logits are divided by `temperature`. The
    statistics are 0 and false where masked.

    `batch` holds `prompt_tokens` int `[batch, prompt]`, left-padded, at least one token in every
    row; `prompt_mask` bool, true at real tokens; and right-padded `NAME_tokens` and `NAME_mask`,
    `[batch, completion]`.
    """
    prompt, targets = batch["prompt_tokens"], batch[f"{name}_tokens"]
    if prompt.shape[1] < 1:
        raise ValueError("Prompts need at least one position, got prompt_tokens of width 0.")
    tokens = jnp.concatenate([prompt, targets], axis=1)
    mask = jnp.concatenate([batch["prompt_mask"], batch[f"{name}_mask"]], axis=1)
    first = prompt.shape[1] - 1
    hidden = model.hidden(tokens, mask)[:, first : first + targets.shape[1]]
    if temperature != 1:
        hidden = (hidden.astype(jnp.float32) / temperature).astype(hidden.dtype)
    found = token_statistics(hidden, model.unembedding(), targets, vocab_chunk=vocab_chunk)
    return found.masked(batch[f"{name}_mask"])


def _logits(hidden: jax.Array, columns: jax.Array) -> jax.Array:
    """float32 logits: products in the compute dtype, sums in float32."""
    return jnp.matmul(hidden, columns.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _statistics(
    target_logits: jax.Array, largest: jax.Array, total: jax.Array, weighted: jax.Array
) -> TokenStatistics:
    """The statistics from the largest logit, Σ exp(d) and Σ d exp(d) of d = logit − largest."""
    # log p = logit − log Σ exp(logit). Subtracting the largest first keeps likely tokens accurate.
    logps = (target_logits - largest) - jnp.log(total)
    # H = −Σ p log p = log Σ exp(d) − Σ d exp(d) / Σ exp(d)
    entropy = jax.lax.stop_gradient(jnp.log(total) - weighted / total)
    return TokenStatistics(logps, target_logits >= largest, entropy)


def _chunk_columns(unembedding: jax.Array, index: jax.Array, chunk: int):
    """Columns of one chunk, where they start, and which of them earlier chunks have not covered.

    The last chunk is moved back so that it ends with the vocabulary: no padded copy of the matrix,
    and one shape for all chunks. Columns it shares with its predecessor count only once.
    """
    start = jnp.minimum(index * chunk, unembedding.shape[1] - chunk)
    columns = jax.lax.dynamic_slice_in_dim(unembedding, start, chunk, axis=1)
    fresh = start + jnp.arange(chunk) >= index * chunk
    return columns, start, fresh


def _scan_forward(chunk, hidden, unembedding, targets):
    """Target logit, largest logit, Σ exp(d) and Σ d exp(d) of d = logit − largest; float32."""

    def body(carry, index):
        largest, total, weighted, target_logits = carry
        columns, start, fresh = _chunk_columns(unembedding, index, chunk)
        logits = jnp.where(fresh, _logits(hidden, columns), -jnp.inf)
        new_largest = jnp.maximum(largest, jnp.max(logits, axis=-1))
        # With the new largest logit m', Σ exp(l − m') = exp(m − m') Σ exp(l − m) + the chunk's own.
        shifted, moved = logits - new_largest[..., None], largest - new_largest
        weights, shrink = jnp.exp(shifted), jnp.exp(moved)
        weighted = (weighted + moved * total) * shrink
        weighted += jnp.sum(jnp.where(fresh, weights * shifted, 0.0), axis=-1)
        total = total * shrink + jnp.sum(weights, axis=-1)
        offset = targets - start
        mine = (targets >= index * chunk) & (offset < chunk)
        picked = jnp.take_along_axis(logits, jnp.clip(offset, 0, chunk - 1)[..., None], axis=-1)
        target_logits = jnp.where(mine, picked[..., 0], target_logits)
        return (new_largest, total, weighted, target_logits), None

    # Far below any logit, so that the first chunk starts the sums at zero.
    zeros = jnp.zeros(targets.shape, jnp.float32)
    start = (jnp.full(targets.shape, -1e30, jnp.float32), zeros, zeros, zeros)
    chunks = jnp.arange(-(-unembedding.shape[1] // chunk))
    (largest, total, weighted, target_logits), _ = jax.lax.scan(body, start, chunks)
    return target_logits, largest, total, weighted


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(chunk, hidden, unembedding, targets):
    return _statistics(*_scan_forward(chunk, hidden, unembedding, targets))


def _chunked_forward(chunk, hidden, unembedding, targets):
    target_logits, largest, total, weighted = _scan_forward(chunk, hidden, unembedding, targets)
    residuals = hidden, unembedding, targets, largest + jnp.log(total)
    return _statistics(target_logits, largest, total, weighted), residuals


def _chunked_backward(chunk, residuals, cotangents):
    """Per chunk of columns: d logp / d logits = onehot(target) − softmax(logits)."""
    hidden, unembedding, targets, logsumexp = residuals
    cotangent = cotangents[0][..., None]

    def body(carry, index):
        d_hidden, d_unembedding = carry
        columns, start, fresh = _chunk_columns(unembedding, index, chunk)
        probabilities = jnp.exp(_logits(hidden, columns) - logsumexp[..., None])
        onehot = (targets - start)[..., None] == jnp.arange(chunk)
        d_logits = jnp.where(fresh, cotangent * (onehot - probabilities), 0.0)
        d_logits = d_logits.astype(hidden.dtype)
        d_hidden += jnp.matmul(
            d_logits, columns.astype(hidden.dtype).T, preferred_element_type=jnp.float32
        )
        d_columns = jnp.einsum(
            "bld,blv->dv", hidden, d_logits, preferred_element_type=jnp.float32
        ).astype(unembedding.dtype)
        # Every column receives one contribution that is not zero, so adding in its dtype is exact.
        d_columns += jax.lax.dynamic_slice_in_dim(d_unembedding, start, chunk, axis=1)
        d_unembedding = jax.lax.dynamic_update_slice_in_dim(d_unembedding, d_columns, start, axis=1)
        return (d_hidden, d_unembedding), None

    start = jnp.zeros(hidden.shape, jnp.float32), jnp.zeros_like(unembedding)
    chunks = jnp.arange(-(-unembedding.shape[1] // chunk))
    (d_hidden, d_unembedding), _ = jax.lax.scan(body, start, chunks)
    no_gradient = np.zeros(targets.shape, jax.dtypes.float0)
    return d_hidden.astype(hidden.dtype), d_unembedding, no_gradient


_chunked.defvjp(_chunked_forward, _chunked_backward)

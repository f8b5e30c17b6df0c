"""Greedy generation with a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import nnx

from train.models.decoder import Array, Params, merge_model, token_positions

Generate = Callable[[Params, Array, Array], jax.Array]


def make_greedy(
    graphdef: nnx.GraphDef, *, max_new_tokens: int, eos_id: int | Sequence[int], pad_id: int
) -> Generate:
    """Compiles greedy continuation of left-padded prompts.

    Args:
        graphdef: of a `Decoder`, from `split_model`.
        max_new_tokens: tokens to generate per row, at least 1.
        eos_id: token, or several, after which a row ends.
        pad_id: token written after the end of a row.

    Returns:
        ``f(params, tokens, mask)`` for int32 tokens and bool mask ``[batch, prompt]``, padded on
        the left, giving int32 ``[batch, max_new_tokens]``: the continuation with its end token
        kept and ``pad_id`` behind. Compiled once per shape; stops when every row has ended. Raises
        `ValueError` for a mask that is not left-padded or leaves a row empty.

    Raises:
        ValueError: ``max_new_tokens`` below 1.

    Example:
        >>> generate = make_greedy(graphdef, max_new_tokens=8, eos_id=2, pad_id=2)  # doctest: +SKIP
        >>> generate(params, tokens, mask)                               # doctest: +SKIP
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    ends = jnp.asarray(np.atleast_1d(eos_id), jnp.int32)

    @jax.jit
    def run(params: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        model = merge_model(graphdef, params)
        mask = mask.astype(bool)
        batch, prompt = tokens.shape
        slots = prompt + max_new_tokens
        # The last token generated is never run, but its slot keeps the arithmetic plain.
        filled = jnp.pad(mask, ((0, 0), (0, max_new_tokens)))
        slot = jnp.arange(slots)

        def choose(hidden: jax.Array) -> jax.Array:
            return jnp.argmax(model.logits(hidden[:, -1]), axis=-1).astype(jnp.int32)

        query = jnp.arange(prompt)[:, None]
        # Padding queries see their own slot, so that their softmax is over something.
        visible = (filled[:, None, :] & (slot <= query)) | (slot == query)
        hidden, cache = model.extend(
            tokens, token_positions(tokens, mask), visible, model.empty_cache(batch, slots), 0
        )
        token, length = choose(hidden), jnp.sum(mask, axis=1, dtype=jnp.int32)
        out = jnp.full((batch, max_new_tokens), pad_id, jnp.int32).at[:, 0].set(token)
        done = jnp.isin(token, ends)

        def going(state):
            step, _, _, done, _ = state
            return (step < max_new_tokens) & ~jnp.all(done)

        def extend_by_one(state):
            step, token, cache, done, out = state
            now = prompt + step - 1  # slot of the token chosen last
            seen = filled | ((slot >= prompt) & (slot <= now))
            position = (length + step - 1)[:, None]
            hidden, cache = model.extend(token[:, None], position, seen[:, None], cache, now)
            token = jnp.where(done, pad_id, choose(hidden))
            out = jax.lax.dynamic_update_slice(out, token[:, None], (0, step))
            return step + 1, token, cache, done | jnp.isin(token, ends), out

        return jax.lax.while_loop(going, extend_by_one, (1, token, cache, done, out))[-1]

    def generate(params: Params, tokens: Array, mask: Array) -> jax.Array:
        if not isinstance(mask, jax.core.Tracer):
            _check_left_padded(np.asarray(mask, bool))
        return run(params, tokens, mask)

    return generate


def _check_left_padded(mask: np.ndarray) -> None:
    bad = np.flatnonzero(~mask[:, -1] | (np.diff(mask.astype(np.int8), axis=1) < 0).any(axis=1))
    if bad.size:
        raise ValueError(
            f"prompts must be padded on the left and hold a token: rows {bad[:8].tolist()} of the "
            "mask are not"
        )

"""Sampling from a decoder with a key-value cache: greedy, temperature, top-k, top-p and min-p."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import nnx

from train.generation.filters import Filters, filter_logits
from train.models.decoder import Array, merge_model, token_positions
from train.models.layers import KVCache
from train.types import Params


class Samples(NamedTuple):
    """Continuations of a batch of prompts; every field is ``[batch, max_new_tokens]``.

    Attributes:
        tokens: int32; the end token is kept, with ``pad_id`` behind it.
        mask: bool, True up to the end token and at it.
        logps: float32 log-probability of the token under the model at the sampling temperature (1 when
            greedy), before any filter; 0 outside of ``mask``.
    """

    tokens: jax.Array
    mask: jax.Array
    logps: jax.Array


class _State(NamedTuple):
    """How far decoding is: `step` tokens are chosen, and the last of them has not been run yet."""

    step: jax.Array
    done: jax.Array
    filled: jax.Array
    length: jax.Array
    cache: KVCache
    samples: Samples


Greedy = Callable[[Params, Array, Array], jax.Array]


@dataclass(frozen=True)
class Sampler:
    """Compiled continuation of left-padded prompts; one compilation for each shape.

    A row's tokens depend on its prompt and its key alone, up to rounding: not on the other rows,
    the width of the padding or ``max_new_tokens``. A row ends after a token in ``eos_id``, with
    ``pad_id`` written behind it.

    Example:
        >>> sampler = Sampler(graphdef, max_new_tokens=8, eos_id=2, pad_id=2)  # doctest: +SKIP
        >>> keys = jax.random.split(jax.random.key(0), len(tokens))            # doctest: +SKIP
        >>> sampler(params, tokens, mask, keys).tokens                         # doctest: +SKIP
    """

    graphdef: nnx.GraphDef
    max_new_tokens: int
    eos_id: int | Sequence[int]
    pad_id: int
    filters: Filters = field(default_factory=Filters)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        ends = tuple(int(one) for one in np.atleast_1d(self.eos_id))
        object.__setattr__(self, "eos_id", ends)  # hashable, so that jax.jit can key on it

    def __call__(
        self, params: Params, tokens: Array, mask: Array, keys: jax.Array | None = None
    ) -> Samples:
        """Continues every prompt until all rows have ended.

        ``tokens`` are int32 ``[batch, prompt]``, padded on the left; ``mask`` is True at real ones.
        ``keys`` are typed keys ``[batch]``, one for each row; None only where ``temperature`` is 0.
        Raises `ValueError` where keys are missing or the mask is not left-padded or leaves a row
        empty.
        """
        self._check(mask, keys)
        return _sample(self, params, tokens, mask, keys)

    def stream(
        self, params: Params, tokens: Array, mask: Array, keys: jax.Array | None = None
    ) -> Iterator[np.ndarray]:
        """Yields the same tokens step by step, int32 ``[batch]``; ``pad_id`` in rows that ended."""
        self._check(mask, keys)
        state = _start(self, params, tokens, mask, keys)
        for step in range(self.max_new_tokens):
            yield np.asarray(state.samples.tokens[:, step])
            if step + 1 == self.max_new_tokens or bool(state.done.all()):
                return
            state = _advance(self, params, keys, state)

    def _check(self, mask: Array, keys: jax.Array | None) -> None:
        if keys is None and self.filters.temperature > 0:
            raise ValueError(f"temperature {self.filters.temperature} needs a key for every row")
        if isinstance(mask, jax.core.Tracer):
            return
        real = np.asarray(mask, bool)
        bad = np.flatnonzero(~real[:, -1] | (np.diff(real.astype(np.int8), axis=1) < 0).any(axis=1))
        if bad.size:
            raise ValueError(
                f"prompts must be padded on the left and hold a token: rows {bad[:8].tolist()} of the "
                "mask are not"
            )


def make_greedy(
    graphdef: nnx.GraphDef, *, max_new_tokens: int, eos_id: int | Sequence[int], pad_id: int
) -> Greedy:
    """A greedy `Sampler` that gives its tokens alone: ``f(params, tokens, mask)``."""
    greedy = Filters(temperature=0.0)
    sampler = Sampler(graphdef, max_new_tokens, eos_id, pad_id, greedy)
    return lambda params, tokens, mask: sampler(params, tokens, mask).tokens


@partial(jax.jit, static_argnums=0)
def _sample(
    sampler: Sampler, params: Params, tokens: jax.Array, mask: jax.Array, keys: jax.Array | None
) -> Samples:
    def going(state: _State) -> jax.Array:
        return (state.step < sampler.max_new_tokens) & ~jnp.all(state.done)

    state = _start(sampler, params, tokens, mask, keys)
    return jax.lax.while_loop(
        going, lambda state: _advance(sampler, params, keys, state), state
    ).samples


@partial(jax.jit, static_argnums=0)
def _start(
    sampler: Sampler, params: Params, tokens: jax.Array, mask: jax.Array, keys: jax.Array | None
) -> _State:
    """Runs the prompts and chooses the first token of every row."""
    model = merge_model(sampler.graphdef, params)
    mask, new = jnp.asarray(mask, bool), sampler.max_new_tokens
    batch, prompt = tokens.shape
    slots = prompt + new
    # The last token generated is never run, but its slot keeps the arithmetic plain.
    filled = jnp.pad(mask, ((0, 0), (0, new)))
    slot, query = jnp.arange(slots), jnp.arange(prompt)[:, None]
    # Padding queries see their own slot, so that their softmax is over something.
    visible = (filled[:, None, :] & (slot <= query)) | (slot == query)
    hidden, cache = model.extend(
        tokens, token_positions(tokens, mask), visible, model.empty_cache(batch, slots), 0
    )
    state = _State(
        step=jnp.int32(0),
        done=jnp.zeros(batch, bool),
        filled=filled,
        length=jnp.sum(mask, axis=1, dtype=jnp.int32),
        cache=cache,
        samples=Samples(
            jnp.full((batch, new), sampler.pad_id, jnp.int32),
            jnp.zeros((batch, new), bool),
            jnp.zeros((batch, new), jnp.float32),
        ),
    )
    return _choose(sampler, model.logits(hidden[:, -1]), keys, state)


@partial(jax.jit, static_argnums=0, donate_argnums=3)
def _advance(sampler: Sampler, params: Params, keys: jax.Array | None, state: _State) -> _State:
    """Runs the token chosen last and chooses the next."""
    model = merge_model(sampler.graphdef, params)
    slots = state.filled.shape[1]
    prompt = slots - sampler.max_new_tokens
    now, slot = prompt + state.step - 1, jnp.arange(slots)
    seen = state.filled | ((slot >= prompt) & (slot <= now))
    last = jax.lax.dynamic_slice_in_dim(state.samples.tokens, state.step - 1, 1, axis=1)
    position = (state.length + state.step - 1)[:, None]
    hidden, cache = model.extend(last, position, seen[:, None], state.cache, now)
    return _choose(sampler, model.logits(hidden[:, -1]), keys, state._replace(cache=cache))


def _choose(sampler: Sampler, logits: jax.Array, keys: jax.Array | None, state: _State) -> _State:
    """Draws a token for each row from float32 logits ``[batch, vocab]`` and writes it."""
    filters, done, step = sampler.filters, state.done, state.step
    if filters.temperature == 0:
        token, scaled = jnp.argmax(logits, axis=-1), logits
    else:
        assert keys is not None
        scaled = logits / filters.temperature
        step_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step)
        token = jax.vmap(jax.random.categorical)(step_keys, filter_logits(logits, filters))
    logp = jnp.take_along_axis(jax.nn.log_softmax(scaled), token[:, None], axis=1)[:, 0]
    token = jnp.where(done, sampler.pad_id, token).astype(jnp.int32)
    columns = Samples(token, ~done, jnp.where(done, 0.0, logp))
    samples = jax.tree.map(
        lambda array, column: jax.lax.dynamic_update_slice(array, column[:, None], (0, step)),
        state.samples,
        columns,
    )
    ends = jnp.asarray(sampler.eos_id, jnp.int32)
    return state._replace(step=step + 1, done=done | jnp.isin(token, ends), samples=samples)

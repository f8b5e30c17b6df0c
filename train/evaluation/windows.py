"""Log-probabilities of the last tokens of token sequences, batched by length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.progress import Progress

from train.data.dataset import pad_right
from train.models import merge_model
from train.objectives.logps import token_statistics

_WIDTH = 32
"""Widths are rounded up to a multiple of this, so that few shapes are compiled."""

Score = Callable[..., tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class Window:
    """Token ids, of which those from the number ``first`` (at least 1) on are scored."""

    tokens: list[int]
    first: int


def window_scorer(graphdef: nnx.GraphDef) -> Score:
    """Compiles ``f(params, tokens [B, L], mask [B, L], first [B])``.

    It gives the sum of the scored tokens' log-probabilities, float32 ``[B]``, and whether each of
    them was the most likely one, bool ``[B]``.
    """

    @jax.jit
    def score(
        params: Any, tokens: jax.Array, mask: jax.Array, first: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        model = merge_model(graphdef, params)
        hidden = model.hidden(tokens, mask)[:, :-1]
        unembedding = model.unembedding()
        found = token_statistics(hidden, unembedding, tokens[:, 1:], vocab_chunk="auto")
        logps, top1, _ = found
        scored = mask[:, 1:] & (jnp.arange(1, tokens.shape[1]) >= first[:, None])
        return jnp.sum(jnp.where(scored, logps, 0.0), axis=1), jnp.all(top1 | ~scored, axis=1)

    return score


def score_windows(
    score: Score,
    params: Any,
    windows: Sequence[Window],
    *,
    batch_size: int,
    pad_id: int,
    shown_as: str | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Scores windows, those of similar length together.

    Returns:
        Float64 sums of log-probabilities and whether all scored tokens were the most likely, in the
        order of `windows`.
    """
    logps, greedy = np.zeros(len(windows)), np.zeros(len(windows), bool)
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i].tokens))
    with Progress(disable=shown_as is None) as progress:
        task = progress.add_task(shown_as or "", total=len(windows))
        for start in range(0, len(order), batch_size):
            numbers = order[start : start + batch_size]
            rows = [windows[i] for i in numbers]
            width = -(-len(rows[0].tokens) // _WIDTH) * _WIDTH
            rows += [rows[0]] * (batch_size - len(rows))
            tokens, mask = pad_right([row.tokens for row in rows], width, pad_id)
            first = np.asarray([row.first for row in rows], np.int32)
            sums, most_likely = jax.device_get(score(params, tokens, mask, first))
            logps[numbers] = sums[: len(numbers)]
            greedy[numbers] = most_likely[: len(numbers)]
            progress.advance(task, len(numbers))
    return logps, greedy


def sliding_windows(tokens: Sequence[int], max_length: int, stride: int) -> list[Window]:
    """Windows that score every token but the first once, each with as much context as fits.

    Windows begin every ``stride`` tokens and hold ``max_length``; each scores what the one before
    it did not reach, as in https://huggingface.co/docs/transformers/perplexity. With ``stride``
    equal to ``max_length`` the first token of every window is not scored.

    Example:
        >>> [(w.tokens, w.first) for w in sliding_windows([1, 2, 3, 4, 5], 4, 2)]
        [([1, 2, 3, 4], 1), ([3, 4, 5], 2)]
    """
    windows, reached = [], 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + max_length, len(tokens))
        first = max(reached - begin, 1)
        if end - begin > first:
            windows.append(Window(list(tokens[begin:end]), first))
        reached = end
        if end == len(tokens):
            break
    return windows

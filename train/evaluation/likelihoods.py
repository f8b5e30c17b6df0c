"""Log-likelihoods of answers to prompts: what multiple choice, perplexity and lm_eval are scored by.

All answers to a prompt share one pass over it: they follow it in one row without a gap, each blind
to the others, as the answers of a pair do in training (`train.data.layout`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from train.data.padding import BATCH_WIDTH, batches_by_length, pad_rows, padded_width
from train.models import Decoder, merge_model
from train.objectives.logps import token_statistics
from train.objectives.pair_logps import attention_of_parts


@dataclass(frozen=True)
class Query:
    """Token ids of a prompt, one at least, and those of the answers to score after it."""

    prompt: list[int]
    answers: list[list[int]]

    @property
    def scored(self) -> int:
        """Tokens of all answers."""
        return sum(map(len, self.answers))


class Rows(NamedTuple):
    """A batch of queries, one a row.

    ``tokens`` int32 ``[B, L]`` has prompt, first answer, second answer …, padding; ``parts``, of the
    same shape, 0 in the prompt, 1, 2 … in the answers, -1 at padding. ``sources`` int32 ``[B, S]``
    has the places whose hidden state predicts each token of the answers, in their order; -1 at
    padding.
    """

    tokens: np.ndarray
    parts: np.ndarray
    sources: np.ndarray


Likelihoods = tuple[np.ndarray, np.ndarray]
"""For every answer, `[queries, answers]`: its log-probability, float64, and whether each of its tokens
was the most likely one, bool. Where a query has fewer answers than others they are 0 and True."""

LikelihoodScorer = Callable[..., Likelihoods]


def likelihood_scorer(
    graphdef: nnx.GraphDef,
    *,
    batch_size: int,
    pad_id: int,
    out_shardings: NamedSharding | None = None,
) -> LikelihoodScorer:
    """Compiles the scoring of answers; each shape of a batch is compiled once.

    Parameters on a mesh need an ``out_shardings`` that gives every process all results.

    Returns:
        ``f(params, queries, shown_as="")`` giving their `Likelihoods`, in order. Queries of similar
        length are scored together. A progress bar has the label ``shown_as``; without one there is
        none.
    """

    def sums(params: Any, rows: Rows, answers: int) -> tuple[jax.Array, jax.Array]:
        logps, top1, numbers = scored_statistics(merge_model(graphdef, params), rows, answers)
        of_answer = numbers[..., None] == jnp.arange(1, answers + 1)
        greedy = jnp.all(top1[..., None] | ~of_answer, axis=1)
        return jnp.sum(jnp.where(of_answer, logps[..., None], 0.0), axis=1), greedy

    compiled = jax.jit(sums, static_argnames="answers", out_shardings=out_shardings)

    def score(params: Any, queries: Sequence[Query], shown_as: str = "") -> Likelihoods:
        lengths = [len(query.prompt) + query.scored for query in queries]
        answers = max((len(query.answers) for query in queries), default=1)
        scored = padded_width(max((query.scored for query in queries), default=1))
        found = np.zeros((len(queries), answers)), np.ones((len(queries), answers), bool)
        for numbers, filled in batches_by_length(lengths, batch_size, shown_as):
            rows = joined_rows([queries[number] for number in filled], scored, pad_id)
            parts = jax.device_get(compiled(params, rows, answers))
            for whole, part in zip(found, parts, strict=True):
                whole[numbers] = part[: len(numbers)]
        return found

    return score


def joined_rows(queries: Sequence[Query], scored: int, pad_id: int) -> Rows:
    """A batch of queries, one a row, as wide as the longest needs.

    ``scored`` is the number of columns for the tokens of all answers to a prompt, which the width of
    the batch limits.
    """
    tokens, parts, sources = [], [], []
    for query in queries:
        row, numbers, before = list(query.prompt), [0] * len(query.prompt), []
        for number, answer in enumerate(query.answers, 1):
            # An answer's first token is predicted where the prompt ends, the others one place earlier.
            before += [len(query.prompt) - 1, *range(len(row), len(row) + len(answer) - 1)]
            row, numbers = [*row, *answer], [*numbers, *[number] * len(answer)]
        tokens.append(row)
        parts.append(numbers)
        sources.append(before)
    width = padded_width(max(map(len, tokens)), BATCH_WIDTH)
    return Rows(
        pad_rows(tokens, width, pad_id)[0],
        pad_rows(parts, width, -1)[0],
        pad_rows(sources, min(scored, width), -1)[0],
    )


def scored_statistics(
    model: Decoder, rows: Rows, answers: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Scores the tokens of all answers, at most ``answers`` in a row, in one forward pass.

    Returns:
        ``(logps, top1, numbers)``, float32, bool and int32 ``[B, S]``: the log-probability of every
        answer token given the prompt and what precedes it in its own answer, whether it was the most
        likely one, and the number of its answer from 1 on, 0 at padding.
    """
    tokens, parts, sources = map(jnp.asarray, rows)
    if answers == 1:  # plain causal attention, for which there are faster programs
        hidden = model.hidden(tokens, parts >= 0)
    else:
        positions, visible = attention_of_parts(parts, answers)
        hidden = model.hidden(tokens, positions=positions, visible=visible)
    prompts = jnp.sum(parts == 0, axis=1, keepdims=True)
    real, number = sources >= 0, jnp.arange(sources.shape[1])
    places = jnp.where(real, prompts + number, 0)
    hidden = jnp.take_along_axis(hidden, jnp.where(real, sources, 0)[..., None], axis=1)
    targets = jnp.take_along_axis(tokens, places, axis=1)
    logps, top1, _ = token_statistics(hidden, model.unembedding(), targets, vocab_chunk="auto")
    return logps, top1, jnp.take_along_axis(parts, places, axis=1)

"""Log-likelihoods of token sequences after others, in batches of few shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.progress import Progress

from train.data.dataset import pad_left, pad_right
from train.evaluation.held_out import padded_width
from train.models import merge_model
from train.objectives.logps import completion_statistics


@dataclass(frozen=True)
class Continuation:
    """Token ids to score, and those before them: at least one of each."""

    context: Sequence[int]
    tokens: Sequence[int]


@dataclass(frozen=True)
class Likelihood:
    """What a model says of a continuation.

    Attributes:
        logp: Sum of the log-probabilities of its tokens.
        greedy: Whether each of them was the most likely one.
    """

    logp: float
    greedy: bool


Scorer = Callable[..., list[Likelihood]]

_COLUMNS = ("prompt_tokens", "prompt_mask", "completion_tokens", "completion_mask")


def continuation_scorer(graphdef: nnx.GraphDef, *, batch_size: int, pad_id: int) -> Scorer:
    """Compiles the scoring of continuations.

    Args:
        graphdef: Of the model.
        batch_size: Continuations scored at once.
        pad_id: Token at padding.

    Returns:
        ``f(params, continuations, shown_as="")`` giving one `Likelihood` for each, in order. Those of
        similar length are scored together, padded to one of two widths an octave, so that few shapes
        are compiled. A progress bar has the label ``shown_as``; without one there is none.

    Example:
        >>> score = continuation_scorer(graphdef, batch_size=8, pad_id=0)  # doctest: +SKIP
        >>> score(params, [Continuation(prompt_ids, answer_ids)])[0].logp  # doctest: +SKIP
        -3.25
    """

    @jax.jit
    def statistics(params: Any, *batch: jax.Array) -> tuple[jax.Array, jax.Array]:
        model = merge_model(graphdef, params)
        columns: dict[str, jax.Array] = dict(zip(_COLUMNS, batch, strict=True))
        logps, top1, _ = completion_statistics(model, columns, vocab_chunk="auto")
        return logps.sum(axis=1), (top1 | ~batch[3]).all(axis=1)

    def score(
        params: Any, continuations: Sequence[Continuation], shown_as: str = ""
    ) -> list[Likelihood]:
        found: dict[int, Likelihood] = {}
        order = sorted(
            range(len(continuations)),
            key=lambda i: (len(continuations[i].tokens), len(continuations[i].context)),
        )
        with Progress(disable=not shown_as) as progress:
            task = progress.add_task(shown_as, total=len(order))
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                batch = _padded([continuations[row] for row in rows], batch_size, pad_id)
                logps, greedy = jax.device_get(statistics(params, *batch))
                for row, logp, most_likely in zip(rows, logps, greedy, strict=False):
                    found[row] = Likelihood(float(logp), bool(most_likely))
                progress.advance(task, len(rows))
        return [found[number] for number in range(len(continuations))]

    return score


def _padded(
    rows: Sequence[Continuation], batch_size: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A batch of one of few shapes, filled up with copies of its first row."""
    filled = [*rows, *[rows[0]] * (batch_size - len(rows))]
    contexts = [list(row.context) for row in filled]
    tokens = [list(row.tokens) for row in filled]
    return (
        *pad_left(contexts, padded_width(max(map(len, contexts))), pad_id),
        *pad_right(tokens, padded_width(max(map(len, tokens))), pad_id),
    )

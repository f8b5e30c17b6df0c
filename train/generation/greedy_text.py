"""Texts written greedily, in batches of few shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from flax import nnx
from rich.progress import Progress

from train.data.dataset import pad_left
from train.evaluation.held_out import padded_width
from train.generation.sampler import Greedy, make_greedy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Write = Callable[..., list[str]]


def greedy_writer(
    graphdef: nnx.GraphDef,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_new_tokens: int,
    ends: Sequence[int],
    batch_size: int,
    compiled: Callable[[Greedy], Greedy] = lambda generate: generate,
) -> Write:
    """Compiles greedy continuation of prompts to text.

    Args:
        graphdef: Of the model.
        tokenizer: The model's.
        max_new_tokens: Tokens to generate for a prompt.
        ends: Tokens that end a text; they are no part of it.
        batch_size: Prompts continued at once.
        compiled: Compiles the function that generates, where its results have to be whole.

    Returns:
        ``f(params, prompts, stop=(), shown_as="")`` for token ids of prompts, giving a text for each,
        in order, cut off where the first of the texts in ``stop`` begins, without special tokens. A
        progress bar has the label ``shown_as``; without one there is none.
    """
    pad_id = ends[0]
    generate = compiled(
        make_greedy(graphdef, max_new_tokens=max_new_tokens, eos_id=ends, pad_id=pad_id)
    )

    def write(
        params: Any, prompts: Sequence[list[int]], stop: Sequence[str] = (), shown_as: str = ""
    ) -> list[str]:
        texts: dict[int, str] = {}
        order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
        with Progress(disable=not shown_as) as progress:
            task = progress.add_task(shown_as, total=len(order))
            for start in range(0, len(order), batch_size):
                rows = order[start : start + batch_size]
                filled = [prompts[row] for row in rows]
                filled += [filled[0]] * (batch_size - len(rows))
                width = padded_width(max(map(len, filled)))
                out = np.asarray(generate(params, *pad_left(filled, width, pad_id)))
                for row, tokens in zip(rows, out.tolist(), strict=False):
                    texts[row] = cut_at(_decoded(tokenizer, tokens, ends), stop)
                progress.advance(task, len(rows))
        return [texts[number] for number in range(len(prompts))]

    return write


def cut_at(text: str, stop: Sequence[str]) -> str:
    """The text up to where the first of the others begins.

    Example:
        >>> cut_at("4. Question: 2+3?", ["Q:", "Question:"])
        '4. '
    """
    places = [text.find(one) for one in stop if one and one in text]
    return text[: min(places)] if places else text


def _decoded(tokenizer: Any, tokens: list[int], ends: Sequence[int]) -> str:
    length = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokenizer.decode(tokens[:length], skip_special_tokens=True)

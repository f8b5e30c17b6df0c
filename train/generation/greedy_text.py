"""Texts written greedily, in batches of few shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import takewhile
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from train.data.padding import batches_by_length, pad_prompts
from train.generation.sampler import Greedy, make_greedy

Write = Callable[..., list[str]]


def greedy_writer(
    graphdef: nnx.GraphDef,
    tokenizer: Any,
    *,
    ends: Sequence[int],
    batch_size: int,
    out_shardings: NamedSharding | None = None,
) -> Write:
    """Compiles greedy continuation of prompts to text, ``batch_size`` prompts at once.

    The tokens in ``ends`` end a text and are no part of it. Parameters on a mesh need
    ``out_shardings`` that give every process all of the result.

    Returns:
        ``f(params, prompts, max_new_tokens, stop=(), shown_as="")`` for token ids of prompts. It gives
        a text for each, in order, cut off where the first of the texts in ``stop`` begins, without
        special tokens. ``shown_as`` labels a progress bar; without it there is none.
    """

    @cache
    def generator(max_new_tokens: int) -> Greedy:
        generate = make_greedy(graphdef, max_new_tokens=max_new_tokens, eos_id=ends, pad_id=ends[0])
        return generate if out_shardings is None else jax.jit(generate, out_shardings=out_shardings)

    def write(
        params: Any,
        prompts: Sequence[list[int]],
        max_new_tokens: int,
        stop: Sequence[str] = (),
        shown_as: str = "",
    ) -> list[str]:
        generate, texts = generator(max_new_tokens), [""] * len(prompts)
        for rows, filled in batches_by_length(list(map(len, prompts)), batch_size, shown_as):
            batch = pad_prompts([prompts[row] for row in filled], ends[0])
            tokens = np.asarray(generate(params, *batch)).tolist()
            for row, ids in zip(rows, tokens, strict=False):
                ids = list(takewhile(lambda token: token not in ends, ids))
                texts[row] = cut_at(tokenizer.decode(ids, skip_special_tokens=True), stop)
        return texts

    return write


def cut_at(text: str, stop: Sequence[str]) -> str:
    """The text up to where the first of the texts in ``stop`` begins.

    Example:
        >>> cut_at("4. Question: 2+3?", ["Q:", "Question:"])
        '4. '
    """
    places = [text.find(one) for one in stop if one and one in text]
    return text[: min(places)] if places else text

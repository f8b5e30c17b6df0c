"""Perplexity of texts, by windows that overlap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from train.config import PerplexityOptions, UserError, require
from train.continuations import Scorer, windows
from train.data import read_records
from train.data.formats import where_of
from train.prepare import blamed_on

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def read_texts(
    field: str, options: PerplexityOptions, tokenizer: PreTrainedTokenizerBase, positions: int
) -> tuple[list[list[int]], int, int]:
    """Token ids of the texts, and the windows to cut them into.

    Args:
        field: The setting that gave the options, for messages.
        options: The texts.
        tokenizer: The model's; a BOS token at the start is what it adds itself.
        positions: Of the model.

    Returns:
        ``(texts, max_length, stride)``; every text has two tokens or more.

    Raises:
        UserError: a file or field is missing, a range is wrong, or there is nothing to score.
    """
    length = positions if options.max_length is None else options.max_length
    require(2 <= length <= positions, f"{field}.max_length", length, f"in [2, {positions}]")
    stride = max(length // 2, 1) if options.stride is None else options.stride
    require(1 <= stride < length, f"{field}.stride", stride, f"in [1, {length - 1}]")
    require(options.limit is None or options.limit > 0, f"{field}.limit", options.limit, "positive")
    raw = _texts(field, options)
    if options.separator is not None:
        raw = [options.separator.join(raw)]
    ids: Any = tokenizer(raw, verbose=False)["input_ids"]
    texts = [text for text in ids if len(text) > 1]
    if not texts:
        raise UserError(f"{field}: none of {len(raw)} texts has two tokens or more.")
    return texts, length, stride


def _texts(field: str, options: PerplexityOptions) -> list[str]:
    if options.path.endswith(".txt"):
        with blamed_on(f"{field}.path"), open(options.path, encoding="utf-8") as file:
            return [file.read()]
    with blamed_on(f"{field}.path"):
        records = read_records(options.path, options.split)[: options.limit]
    for record in records:
        if not isinstance(record.get(options.field), str):
            raise UserError(
                f"{field}.field: {where_of(record)} has no text {options.field!r}; it has the "
                f"fields {', '.join(record)}."
            )
    return [record[options.field] for record in records]


def measure_perplexity(
    score: Scorer,
    params: Any,
    texts: Sequence[Sequence[int]],
    max_length: int,
    stride: int,
    *,
    shown_as: str,
) -> dict[str, float]:
    """Perplexity of a model on texts: exp of the mean loss over all tokens that have context.

    Args:
        score: From `train.continuations.continuation_scorer`.
        params: Of the model.
        texts: Token ids.
        max_length: Tokens in a window.
        stride: Tokens by which it moves.
        shown_as: Label of the progress bar.

    Returns:
        ``perplexity``; ``loss``: mean −log p in nats; ``tokens``: scored ones, all but the first of
        each text; ``texts``.
    """
    cut = [window for text in texts for window in windows(text, max_length, stride)]
    total = math.fsum(found.logp for found in score(params, cut, shown_as))
    tokens = sum(len(window.tokens) for window in cut)
    loss = -total / tokens
    return {
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "loss": loss,
        "tokens": tokens,
        "texts": len(texts),
    }

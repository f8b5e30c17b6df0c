"""Perplexity of a model on text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from train.config import TextOptions, UserError, require
from train.data.formats import read_records, where_of
from train.evaluation.likelihoods import LikelihoodScorer, Query
from train.inputs.model import blamed_on


class Texts(NamedTuple):
    """Windows over the tokens of texts, and the number of the texts' bytes in UTF-8.

    The answer of a window is the tokens that it scores, its prompt the tokens before them.
    """

    asked: list[Query]
    size: int

    def __str__(self) -> str:
        return f"{len(self.asked)} windows of text"


def read_texts(field: str, options: TextOptions, tokenizer: Any, longest: int) -> Texts:
    """Tokenised windows of a file's texts, each by itself or all as one; a .txt file is one text.

    ``field`` is the setting that holds the file, for messages, such as "texts.wiki", and ``longest``
    the number of positions that the model was made for. The tokenizer adds its special tokens, such
    as BOS.

    Raises:
        UserError: a file or field is missing, a setting does not fit, or there is nothing to score.
    """
    length = min(1024, longest) if options.max_length is None else options.max_length
    require(2 <= length <= longest, f"{field}.max_length", length, f"from 2 to {longest}")
    stride = max(1, length // 2) if options.stride is None else options.stride
    require(1 <= stride <= length, f"{field}.stride", stride, f"from 1 to max_length {length}")
    with blamed_on(f"{field}.path"):
        if options.path.endswith(".txt"):
            texts = [Path(options.path).read_text(encoding="utf-8")]
        else:
            records = read_records(options.path, options.split)
            texts = [_text(one, options.field, field) for one in records]
    texts = texts[: options.limit]
    if options.separator is not None:
        texts = [options.separator.join(texts)]
    windows = []
    for text in texts:
        windows += sliding_windows(tokenizer(text, verbose=False)["input_ids"], length, stride)
    if not windows:
        raise UserError(f"{field}.path: {options.path!r} holds no text of two tokens or more.")
    return Texts(windows, sum(len(text.encode()) for text in texts))


def _text(record: Any, name: str, field: str) -> str:
    """The text in a record's field `name`; `field` is the task, for messages."""
    text = record.get(name)
    if not isinstance(text, str):
        raise UserError(
            f"{field}.field: {where_of(record)} has no text in {name!r}; it has {', '.join(record)}."
        )
    return text


def sliding_windows(tokens: Sequence[int], max_length: int, stride: int) -> list[Query]:
    """Windows that score every token but the first once, each with as much context as fits.

    Windows begin every ``stride`` tokens and hold ``max_length``; each scores what the one before
    it did not reach, as in https://huggingface.co/docs/transformers/perplexity. With ``stride``
    equal to ``max_length`` the first token of every window is not scored.

    Example:
        >>> [(w.prompt, w.answers) for w in sliding_windows([1, 2, 3, 4, 5], 4, 2)]
        [([1], [[2, 3, 4]]), ([3, 4], [[5]])]
    """
    windows, reached = [], 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + max_length, len(tokens))
        first = max(reached, begin + 1)
        if end > first:
            windows.append(Query(list(tokens[begin:first]), [list(tokens[first:end])]))
        reached = end
        if end == len(tokens):
            break
    return windows


def perplexity(
    score: LikelihoodScorer, params: Any, texts: Texts, shown_as: str = ""
) -> dict[str, float]:
    """``perplexity`` per token, ``bits_per_byte``, mean ``nll`` in nats, and number of ``tokens``.

    A perplexity beyond the largest float, from about 709 nats a token on, is infinite.
    """
    logps, _ = score(params, texts.asked, shown_as)
    tokens = sum(len(window.answers[0]) for window in texts.asked)
    nll = -float(logps.sum()) / tokens
    bits = -float(logps.sum()) / math.log(2) / texts.size
    try:
        per_token = math.exp(nll)
    except OverflowError:
        per_token = math.inf
    return {"perplexity": per_token, "bits_per_byte": bits, "nll": nll, "tokens": tokens}

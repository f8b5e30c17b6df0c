"""Perplexity of a model on text."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.config import TextOptions, UserError, require
from train.data.formats import read_records, where_of
from train.evaluation.windows import Score, Window, score_windows, sliding_windows
from train.inputs.model import blamed_on


@dataclass(frozen=True)
class Texts:
    """Windows over the tokens of texts, and the bytes of the texts in UTF-8."""

    windows: list[Window]
    size: int


def read_texts(
    name: str, options: TextOptions, tokenizer: Any, longest: int, within: str = ""
) -> Texts:
    """Tokenised windows of a file's texts, each for itself or all as one.

    Args:
        name: Of the task, for messages.
        options: The file. A .txt file is one text.
        tokenizer: The model's; its own special tokens (such as BOS) are added.
        longest: Positions that the model was made for.
        within: Group of the settings that the task is in, for messages.

    Raises:
        UserError: a file or field is missing, a setting does not fit, or there is nothing to score.
    """
    field = f"{within}texts.{name}"
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
    text = record.get(name)
    if not isinstance(text, str):
        raise UserError(
            f"{field}.field: {where_of(record)} has no text in {name!r}; it has {', '.join(record)}."
        )
    return text


def perplexity(
    score: Score,
    params: Any,
    texts: Texts,
    *,
    batch_size: int,
    pad_id: int,
    shown_as: str | None,
) -> dict[str, float]:
    """``perplexity`` per token, ``bits_per_byte``, mean ``nll`` in nats, and number of ``tokens``.

    A perplexity beyond the largest float, from about 709 nats a token on, is infinite.
    """
    logps, _ = score_windows(
        score, params, texts.windows, batch_size=batch_size, pad_id=pad_id, shown_as=shown_as
    )
    tokens = sum(len(window.tokens) - window.first for window in texts.windows)
    nll = -float(logps.sum()) / tokens
    bits = -float(logps.sum()) / math.log(2) / texts.size
    try:
        per_token = math.exp(nll)
    except OverflowError:
        per_token = math.inf
    return {"perplexity": per_token, "bits_per_byte": bits, "nll": nll, "tokens": tokens}

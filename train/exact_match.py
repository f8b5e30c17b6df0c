"""Tasks whose answers are generated and compared as text, as in GSM8K."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from train.config import ExactMatchOptions, UserError, require
from train.data import read_records
from train.data.formats import where_of
from train.data.records import UnusableRecord
from train.data.templates import Encoder, Row
from train.greedy_text import Write
from train.multiple_choice import filled
from train.prepare import blamed_on

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Problem:
    """Ids of a prompt, and the right answer, normalised."""

    prompt: list[int]
    answer: str


def read_problems(
    field: str, options: ExactMatchOptions, tokenizer: PreTrainedTokenizerBase, positions: int
) -> tuple[list[Problem], int]:
    """Problems of a task.

    Args:
        field: The setting that gave the options, for messages.
        options: The task.
        tokenizer: The model's.
        positions: Of the model.

    Returns:
        The problems, and the number of records left out: those that cannot be tokenised, or leave no
        room for an answer.

    Raises:
        UserError: a file or field is missing, a pattern is not valid, or a right answer does not
            match its own.
    """
    require(options.limit is None or options.limit > 0, f"{field}.limit", options.limit, "positive")
    new = options.max_new_tokens
    require(1 <= new < positions, f"{field}.max_new_tokens", new, f"in [1, {positions - 1}]")
    _check_patterns(field, options)
    with blamed_on(f"{field}.path"):
        records = read_records(options.path, options.split)[: options.limit]
    rows, answers = [], []
    for record in records:
        prompt = filled(options.prompt, record, f"{field}.prompt")
        text = filled(options.answer, record, f"{field}.answer")
        answer = _extracted(text, options.answer_pattern, options)
        if not answer:
            raise UserError(
                f"{field}.answer_pattern: {options.answer_pattern!r} finds no answer in {text!r} of "
                f"{where_of(record)}."
            )
        answers.append(answer)
        rows.append(Row(prompt, [], where_of(record)))
    with blamed_on(field):
        encoded = Encoder(tokenizer, "chat" if options.chat_template else "auto").encode(rows)
    problems = [
        Problem(one.prompt, answer)
        for one, answer in zip(encoded, answers, strict=True)
        if not isinstance(one, UnusableRecord) and len(one.prompt) + new <= positions
    ]
    if not problems:
        raise UserError(
            f"{field}: none of {len(rows)} records can be used: no prompt is short enough for "
            f"{new} new tokens within {positions} positions."
        )
    return problems, len(rows) - len(problems)


def measure_exact_match(
    write: Write,
    params: Any,
    problems: Sequence[Problem],
    options: ExactMatchOptions,
    *,
    shown_as: str,
) -> dict[str, float]:
    """Share of problems that a model solves.

    Args:
        write: From `train.greedy_text.greedy_writer`.
        params: Of the model.
        problems: From `read_problems`.
        options: The task.
        shown_as: Label of the progress bar.

    Returns:
        ``exact_match``; ``answered``: share of texts in which `pattern` found an answer, the others
        being wrong; ``problems``: their number.
    """
    texts = write(params, [one.prompt for one in problems], options.stop, shown_as)
    found = [_extracted(text, options.pattern, options) for text in texts]
    right = [answer == one.answer for answer, one in zip(found, problems, strict=True)]
    return {
        "exact_match": sum(right) / len(problems),
        "answered": sum(answer is not None for answer in found) / len(problems),
        "problems": len(problems),
    }


def _extracted(text: str, pattern: str | None, options: ExactMatchOptions) -> str | None:
    """The last match, normalised; None without one."""
    if pattern is not None:
        matches = list(re.finditer(pattern, text))
        if not matches:
            return None
        last = matches[-1]
        text = (last[1] if last.re.groups else last[0]) or ""
    for ignored in options.ignore:
        text = re.sub(ignored, "", text.strip())
    text = text.strip()
    return text.casefold() if options.ignore_case else text


def _check_patterns(field: str, options: ExactMatchOptions) -> None:
    given = {"pattern": [options.pattern], "ignore": options.ignore}
    given["answer_pattern"] = [options.answer_pattern] if options.answer_pattern else []
    for name, patterns in given.items():
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(
                    f"{field}.{name}: {pattern!r} is no regular expression ({error})."
                ) from error

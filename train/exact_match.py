"""Exact match of greedily generated answers, as GSM8K is scored."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.progress import Progress

from train.config import GenerationTaskOptions, UserError, require
from train.data.dataset import pad_left
from train.data.formats import read_records
from train.multiple_choice import filled
from train.prepare import blamed_on
from train.sampling import Greedy

_WIDTH = 32
# What lm-evaluation-harness takes out of GSM8K's answers: separators, currency, a final full stop.
_IGNORED = re.compile(r",|\$|\.$")


@dataclass(frozen=True)
class Problem:
    """Token ids of a prompt, and the right answer as it is compared."""

    prompt: list[int]
    answer: str


def read_problems(
    name: str, options: GenerationTaskOptions, tokenizer: Any, within: str = ""
) -> list[Problem]:
    """Problems of a task; `within` is the group of the settings that it is in, for messages.

    Raises:
        UserError: a file, field or pattern cannot be used, or a record's own answer is not found.
    """
    field = f"{within}generation.{name}"
    for setting in ("limit", "max_new_tokens"):
        value = getattr(options, setting)
        require(value is None or value > 0, f"{field}.{setting}", value, "positive")
    for pattern in ("extract", "answer_extract"):
        try:
            re.compile(getattr(options, pattern) or "")
        except re.error as error:
            raise UserError(f"{field}.{pattern} is no regular expression: {error}.") from error
    with blamed_on(f"{field}.path"):
        records = read_records(options.path)[: options.limit]
    problems = []
    for record in records:
        prompt = filled(options.prompt, record, f"{field}.prompt")
        text = filled(options.answer, record, f"{field}.answer")
        answer = text if options.answer_extract is None else extract(options.answer_extract, text)
        if answer is None:
            raise UserError(f"{field}.answer_extract finds nothing in the answer {text!r}.")
        problems.append(Problem(_prompt_ids(prompt, options, tokenizer), normalised(answer)))
    return problems


def _prompt_ids(prompt: str, options: GenerationTaskOptions, tokenizer: Any) -> list[int]:
    if not options.chat_template:
        return tokenizer(prompt)["input_ids"]
    messages = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def extract(pattern: str, text: str) -> str | None:
    """The last match of a pattern: its first group that matched, or the whole; None without any."""
    found = list(re.finditer(pattern, text))
    if not found:
        return None
    return next((group for group in found[-1].groups() if group is not None), found[-1].group())


def normalised(answer: str) -> str:
    """An answer as it is compared: trimmed, without separators, currency and a final full stop."""
    return _IGNORED.sub("", answer.strip()).strip().lower()


def exact_match(
    generate: Greedy,
    params: Any,
    problems: list[Problem],
    pattern: str,
    tokenizer: Any,
    *,
    batch_size: int,
    shown_as: str | None,
) -> dict[str, float]:
    """Share of problems whose extracted answer is right, share with any, and their number.

    Args:
        generate: From `train.sampling.make_greedy`.
        params: Of the model.
        problems: From `read_problems`.
        pattern: Finds an answer in what was generated, see `extract`.
        tokenizer: The model's.
        batch_size: Problems answered at once.
        shown_as: Label of a progress bar; None for none.
    """
    pad_id = tokenizer.pad_token_id or 0
    right = found = 0
    ordered = sorted(problems, key=lambda problem: len(problem.prompt))
    with Progress(disable=shown_as is None) as progress:
        task = progress.add_task(shown_as or "", total=len(problems))
        for start in range(0, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            width = -(-len(batch[-1].prompt) // _WIDTH) * _WIDTH
            rows = batch + [batch[0]] * (batch_size - len(batch))
            tokens, mask = pad_left([row.prompt for row in rows], width, pad_id)
            out = np.asarray(generate(params, tokens, mask))[: len(batch)]
            texts = tokenizer.batch_decode(out, skip_special_tokens=True)
            for problem, text in zip(batch, texts, strict=True):
                answer = extract(pattern, text)
                found += answer is not None
                right += answer is not None and normalised(answer) == problem.answer
            progress.advance(task, len(batch))
    count = len(problems)
    return {"exact_match": right / count, "extracted": found / count, "problems": count}

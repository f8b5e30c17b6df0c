"""Answers written greedily and compared with the right ones, as GSM8K and SQuAD are scored."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from train.config import GenerationTaskOptions, UserError, check_settings
from train.data.formats import Record, read_records, where_of
from train.data.tokenizing import encode_prompts
from train.evaluation.task_files import check_lengths, check_template, filled
from train.evaluation.text_scores import LAST_NUMBER, extract, normalised, squad_f1
from train.generation.greedy_text import Write
from train.inputs.model import blamed_on


@dataclass(frozen=True)
class Problem:
    """Token ids of a prompt, and the right answers as texts."""

    prompt: list[int]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Problems:
    """The problems of a task, and the settings that they were read by."""

    asked: list[Problem]
    options: GenerationTaskOptions = dataclasses.field(repr=False)

    def __str__(self) -> str:
        return f"{len(self.asked)} problems"


def read_problems(
    field: str, options: GenerationTaskOptions, tokenizer: Any, longest: int
) -> Problems:
    """Problems of a task.

    ``field`` is the setting that holds the task, for messages, such as "generation.gsm8k", and
    ``longest`` the number of positions that the model was made for.

    Raises:
        UserError: a file, field or pattern cannot be used, a record's own answer is not found, or a
            prompt with `max_new_tokens` needs more positions.
    """
    _check(options, field)
    check_template(options, tokenizer, field)
    with blamed_on(f"{field}.path"):
        records = read_records(options.path, options.split)[: options.limit]
    prompts = [
        Record({"prompt": filled(options.prompt, one, f"{field}.prompt")}, where_of(one))
        for one in records
    ]
    right = [_right_answers(one, options, field) for one in records]
    with blamed_on(field):
        encoded = encode_prompts(prompts, tokenizer, chat_template=options.chat_template)
    new = options.max_new_tokens
    lengths = {where_of(p): len(ids) + new for p, ids in zip(prompts, encoded, strict=True)}
    check_lengths(lengths, longest, f"{field}.max_new_tokens {new}")
    return Problems([Problem(*both) for both in zip(encoded, right, strict=True)], options)


def _check(options: GenerationTaskOptions, field: str) -> None:
    check_settings(options, field)
    for pattern in ("extract", "answer_extract"):
        try:
            re.compile(getattr(options, pattern) or "")
        except re.error as error:
            raise UserError(f"{field}.{pattern} is no regular expression: {error}.") from error
    if (options.answer is None) == (options.answers_field is None):
        raise UserError(
            f"{field} has answer {options.answer!r} and answers_field {options.answers_field!r}: give "
            "one of them, a format string or the field that lists the right answers."
        )


def _right_answers(
    record: Mapping[str, Any], options: GenerationTaskOptions, field: str
) -> tuple[str, ...]:
    """The right answers of a record, each as `answer_extract` finds it."""
    if options.answer is not None:
        texts: Any = [filled(options.answer, record, f"{field}.answer")]
    else:
        found = record.get(options.answers_field or "")
        texts = found.get("text") if isinstance(found, Mapping) else found
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
            raise UserError(
                f"{field}.answers_field: {options.answers_field!r} of {where_of(record)} is "
                f"{found!r}, not a list of texts, nor an object with such a list as 'text'."
            )
    if options.answer_extract is None:
        return tuple(texts)
    answers = []
    for text in texts:
        answers.append(extract(options.answer_extract, text))
        if answers[-1] is None:
            raise UserError(f"{field}.answer_extract finds nothing in the answer {text!r}.")
    return tuple(answers)


def score_answers(
    write: Write, params: Any, problems: Problems, shown_as: str = ""
) -> dict[str, float]:
    """Lets a model answer all problems and compares; ``shown_as`` labels a progress bar, if any.

    Returns:
        ``exact_match``, with "squad" also ``f1``, means over the problems; ``extracted``, the share in
        which an answer was found; and the number of ``problems``.
    """
    asked, options = problems.asked, problems.options
    squad = options.scoring == "squad"
    pattern = options.extract or (None if squad else LAST_NUMBER)
    prompts = [problem.prompt for problem in asked]
    texts = write(params, prompts, options.max_new_tokens, shown_as=shown_as)
    figures = []
    for problem, text in zip(asked, texts, strict=True):
        answer = text if pattern is None else extract(pattern, text)
        if squad:
            right, f1 = squad_f1(answer or "", problem.answers)
        else:
            right, f1 = normalised(answer or "") in map(normalised, problem.answers), 0.0
        figures.append((right and answer is not None, answer is not None, f1))
    exact, extracted, f1 = np.mean(np.array(figures, np.float64), axis=0).tolist()
    mean_f1 = {"f1": f1} if squad else {}
    return {"exact_match": exact, **mean_f1, "extracted": extracted, "problems": len(asked)}

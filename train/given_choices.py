"""Multiple choice where each record holds its candidates, as in MMLU, ARC or CommonsenseQA."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from train.config import ChoiceTaskOptions, UserError, require
from train.continuations import Continuation, Scorer
from train.data import Record, read_records
from train.data.formats import where_of
from train.data.templates import Encoded, Encoder, Row
from train.multiple_choice import filled
from train.prepare import blamed_on

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question as tokens.

    Attributes:
        prompt: Ids of the prompt.
        answers: Ids of each candidate, without end tokens.
        lengths: Characters of each candidate, by which `acc_norm` divides.
        right: Number of the right one.
    """

    prompt: list[int]
    answers: list[list[int]]
    lengths: list[int]
    right: int


def read_choice_questions(
    field: str, options: ChoiceTaskOptions, tokenizer: PreTrainedTokenizerBase, positions: int
) -> tuple[list[ChoiceQuestion], int]:
    """Questions of a task.

    Args:
        field: The setting that gave the options, for messages.
        options: The task.
        tokenizer: The model's.
        positions: Of the model.

    Returns:
        The questions, and the number of records left out: those that cannot be tokenised, or are
        longer than the model has positions.

    Raises:
        UserError: a file or field is missing, or a record's answer is none of its candidates.
    """
    require(options.limit is None or options.limit > 0, f"{field}.limit", options.limit, "positive")
    with blamed_on(f"{field}.path"):
        records = read_records(options.path, options.split)[: options.limit]
    rows, rights = [], []
    for record in records:
        texts, labels = _candidates(record, options.choices, field)
        letters = labels or list(string.ascii_uppercase[: len(texts)])
        rights.append(_right(record, texts, letters, options.answer, field))
        listed = "\n".join(
            f"{letter}. {text}" for letter, text in zip(letters, texts, strict=False)
        )
        prompt = filled(
            options.prompt,
            Record({"options": listed, **record}, where_of(record)),
            f"{field}.prompt",
        )
        answers = texts if options.score == "text" else letters
        space = "" if options.chat_template else " "
        rows.append(Row(prompt, [space + answer for answer in answers], where_of(record)))
    with blamed_on(field):
        encoder = Encoder(tokenizer, "chat" if options.chat_template else "auto")
        encoded = encoder.encode(rows)
    questions = [
        # What closes an answer is cut off: it is right whether or not the model would go on.
        ChoiceQuestion(
            one.prompt, [a[:-1] for a in one.answers], [len(a.strip()) for a in row.answers], right
        )
        for one, row, right in zip(encoded, rows, rights, strict=True)
        if isinstance(one, Encoded) and len(one.prompt) + max(map(len, one.answers)) <= positions
    ]
    if not questions:
        first = "too long" if isinstance(encoded[0], Encoded) else encoded[0]
        raise UserError(f"{field}: none of {len(rows)} records can be used: {first}.")
    return questions, len(rows) - len(questions)


def measure_choices(
    score: Scorer, params: Any, questions: Sequence[ChoiceQuestion], *, shown_as: str
) -> dict[str, float]:
    """Accuracy of a model on questions.

    Args:
        score: From `train.continuations.continuation_scorer`.
        params: Of the model.
        questions: From `read_choice_questions`.
        shown_as: Label of the progress bar.

    Returns:
        lm-evaluation-harness's ``acc``, the share of questions whose right answer has the highest
        log-probability, and ``acc_norm``, the same after division by the answers' lengths in
        characters (of equals the first counts, as there); ``logp``: mean log-probability of the right
        answer; ``acc_stderr``: standard error of ``acc`` over the questions; ``questions``.
    """
    asked = [
        Continuation(question.prompt, answer)
        for question in questions
        for answer in question.answers
    ]
    logps = iter([found.logp for found in score(params, asked, shown_as)])
    hits, normed, right = [], [], []
    for question in questions:
        values = np.asarray([next(logps) for _ in question.answers])
        hits.append(values.argmax() == question.right)
        normed.append((values / question.lengths).argmax() == question.right)
        right.append(values[question.right])
    count = len(questions)
    return {
        "acc": float(np.mean(hits)),
        "acc_norm": float(np.mean(normed)),
        "acc_stderr": float(np.std(hits, ddof=1) / count**0.5) if count > 1 else 0.0,
        "logp": float(np.mean(right)),
        "questions": count,
    }


def _candidates(
    record: Mapping[str, Any], name: str, field: str
) -> tuple[list[str], list[str] | None]:
    """Texts, and labels where the record has its own."""
    found = record.get(name)
    labels = found.get("label") if isinstance(found, Mapping) else None
    texts = found.get("text") if isinstance(found, Mapping) else found
    if not isinstance(texts, list) or len(texts) < 2 or not all(map(_is_text, texts)):
        raise UserError(
            f"{field}.choices: {where_of(record)} needs two texts or more in {name!r}, found "
            f"{found!r}; it has the fields {', '.join(record)}."
        )
    if labels is None and len(texts) > len(string.ascii_uppercase):
        raise UserError(f"{field}.choices: {where_of(record)} has {len(texts)} choices.")
    if labels is not None and (len(labels) != len(texts) or not all(map(_is_text, labels))):
        raise UserError(
            f"{field}.choices: {where_of(record)} has {len(texts)} texts and the labels {labels!r}."
        )
    return texts, labels


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _right(
    record: Mapping[str, Any], texts: list[str], letters: list[str], name: str, field: str
) -> int:
    answer = record.get(name)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(texts):
        return answer
    if isinstance(answer, str):
        for candidates in (letters, texts):
            if answer.strip() in candidates:
                return candidates.index(answer.strip())
    raise UserError(
        f"{field}.answer: {where_of(record)} has {name} = {answer!r}, which is no number from 0 to "
        f"{len(texts) - 1}, none of {', '.join(letters)} and no text of its choices."
    )

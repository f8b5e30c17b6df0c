"""Multiple choice by log-likelihood, on the records of any file.

A question's candidates are its own answer and others drawn from the answers of the same file. The
model does not generate: it gives each candidate a log-probability.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from train.config import TaskOptions, UserError, check_settings, require
from train.data.formats import Record, read_records, where_of
from train.data.templates import Encoded, Encoder, Row
from train.evaluation.likelihoods import LikelihoodScorer, Query
from train.evaluation.task_files import check_lengths, check_template, filled
from train.inputs.model import blamed_on

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Question(Query):
    """A prompt and its candidates without end tokens, the right one first.

    ``sizes`` has the characters of each candidate where the record itself gave them, else nothing.
    """

    sizes: tuple[int, ...] = ()


class Questions(NamedTuple):
    """The questions of a task, and the number of records that could not be tokenised."""

    asked: list[Question]
    left_out: int

    def __str__(self) -> str:
        left_out = f", {self.left_out} records left out" if self.left_out else ""
        return f"{len(self.asked)} questions{left_out}"


def read_questions(
    field: str, options: TaskOptions, tokenizer: PreTrainedTokenizerBase, longest: int
) -> Questions:
    """Questions of a task, the same on every call.

    ``field`` is the setting that holds the task, for messages, such as "tasks.sums", and ``longest``
    the number of positions that the model was made for.

    Raises:
        UserError: a file or field is missing, there are too few different answers, or a question
            needs more positions.
    """
    check_settings(options, field)
    given = options.choices_field is not None
    require(given or not options.letters, f"{field}.letters", True, "false without choices_field")
    check_template(options, tokenizer, field)
    with blamed_on(f"{field}.path"):
        records = read_records(options.path, options.split)
    candidates = _candidates(records, options, field)
    space = "" if options.chat_template else " "
    rows = [
        Row(
            filled(options.prompt, record, f"{field}.prompt"),
            [space + text for text in texts],
            where_of(record),
        )
        for record, texts in zip(records[: options.limit], candidates, strict=True)
    ]
    with blamed_on(field):
        encoded = Encoder(tokenizer, "chat" if options.chat_template else "auto").encode(rows)
    questions, lengths = [], {}
    for row, one, texts in zip(rows, encoded, candidates, strict=True):
        if isinstance(one, Encoded):
            # What closes an answer is cut off: it is right whether or not the model would go on.
            answers = [answer[:-1] for answer in one.answers]
            sizes = tuple(map(len, texts)) if given else ()
            questions.append(Question(one.prompt, answers, sizes))
            lengths[row.where] = len(one.prompt) + max(map(len, answers))
    if not questions:
        raise UserError(f"{field}: none of {len(rows)} records can be used: {encoded[0]}.")
    check_lengths(lengths, longest, field)
    return Questions(questions, len(rows) - len(questions))


def _candidates(records: Sequence[Record], options: TaskOptions, field: str) -> list[list[str]]:
    """The candidates of every record that is asked about, the right one first."""
    answers = [filled(options.answer, record, f"{field}.answer") for record in records]
    asked = records[: options.limit]
    if options.choices_field is not None:
        return [_listed(answers[i], record, options, field) for i, record in enumerate(asked)]
    pool = sorted(set(answers))
    return [_drawn(answers[i], pool, options, i, field) for i in range(len(asked))]


def _listed(answer: str, record: Mapping[str, Any], options: TaskOptions, field: str) -> list[str]:
    """The candidates that a record lists, the right one first."""
    found = record.get(options.choices_field or "")
    texts = found.get("text") if isinstance(found, Mapping) else found
    if not isinstance(texts, list) or len(texts) < 2 or not all(map(str, texts)):
        raise UserError(
            f"{field}.choices_field: {options.choices_field!r} of {where_of(record)} is {found!r}, "
            "not a list of two texts or more, nor an object with such a list as 'text'."
        )
    letters = [chr(ord("A") + number) for number in range(len(texts))]
    labels = [str(label) for label in found.get("label", [])] if isinstance(found, Mapping) else []
    numbers = [str(number) for number in range(len(texts))]
    for names in (labels, letters, numbers):
        if answer.strip() in names:
            right = names.index(answer.strip())
            texts = letters if options.letters else [str(text) for text in texts]
            return [texts[right], *texts[:right], *texts[right + 1 :]]
    raise UserError(
        f"{field}.answer: {answer!r} of {where_of(record)} names none of its {len(texts)} choices."
    )


def _drawn(right: str, pool: list[str], options: TaskOptions, index: int, field: str) -> list[str]:
    """The right answer, then wrong ones drawn from `pool` by the seed and the record's number.

    "14" is never offered against "145": the beginning of a text is more likely than the text.
    """
    draw = np.random.default_rng([options.seed, index])
    candidates = [right]
    for number in draw.permutation(len(pool)).tolist():
        other = pool[number]
        if not (other.startswith(right) or right.startswith(other)):
            candidates.append(other)
        if len(candidates) == options.choices:
            return candidates
    raise UserError(
        f"{field}.choices is {options.choices}, but the file has only {len(candidates)} answers "
        f"to choose from for record {index + 1}."
    )


def accuracies(
    score: LikelihoodScorer, params: Any, questions: Questions, shown_as: str = ""
) -> dict[str, float]:
    """Accuracy of a model on questions; ``shown_as`` is the label of a progress bar, if any.

    Returns:
        ``accuracy``: share of questions whose right answer has the highest log-probability (a tie
        counts as wrong); ``accuracy_per_token``: the same with log-probabilities divided by the
        number of tokens; ``exact``: share whose right answer is the most likely token at every
        position; ``logp``: mean log-probability of the right answer; ``questions``: their number.
        Where the records list their candidates also ``acc``, which is ``accuracy``, and ``acc_norm``,
        with log-probabilities divided by the candidates' characters (lm-evaluation-harness's names).
    """
    asked = questions.asked
    logps, greedy = score(params, asked, shown_as)
    lengths = _by_candidate([list(map(len, question.answers)) for question in asked])
    # Where a question has fewer candidates than others, the missing ones cannot win.
    logps = np.where(lengths > 0, logps, -np.inf)
    found = {
        "accuracy": _first_wins(logps),
        "accuracy_per_token": _first_wins(logps / np.maximum(lengths, 1)),
        "exact": float(greedy[:, 0].mean()),
        "logp": float(logps[:, 0].mean()),
    }
    if asked[0].sizes:
        sizes = _by_candidate([question.sizes for question in asked])
        found["acc"] = found["accuracy"]
        found["acc_norm"] = _first_wins(logps / np.maximum(sizes, 1))
    return {**found, "questions": len(asked)}


def _by_candidate(rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Numbers `[questions, candidates]`, 0 where a question has fewer candidates than others."""
    most = max(map(len, rows))
    return np.array([[*row, *[0] * (most - len(row))] for row in rows])


def _first_wins(scores: np.ndarray) -> float:
    """The share of rows whose first score is larger than all others."""
    return float((scores[:, 0] > scores[:, 1:].max(axis=1)).mean())

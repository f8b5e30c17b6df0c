"""Multiple choice by log-likelihood, on the records of any file.

A question's candidates are its own answer and others drawn from the answers of the same file. The
model does not generate: it gives each candidate a log-probability. All candidates of a question
share one pass over its prompt: they stand behind it side by side, each blind to the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.progress import Progress

from train.config import (
    GenerationTaskOptions,
    TaskOptions,
    UserError,
    check_settings,
    require,
)
from train.data.dataset import pad_left, pad_right
from train.data.formats import read_records, where_of
from train.data.templates import Encoded, Encoder, Row
from train.inputs.model import blamed_on
from train.models import merge_model
from train.objectives.logps import token_statistics
from train.objectives.preference import resolve_vocab_chunk

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_WIDTH = 16
"""Prompt widths are rounded up to a multiple of this, so that few shapes are compiled."""

Score = Callable[..., tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class Question:
    """Token ids of a prompt and its candidates, the right one first; no end tokens.

    ``sizes`` has the characters of each candidate where the record itself gave them, else nothing.
    """

    prompt: list[int]
    answers: list[list[int]]
    sizes: tuple[int, ...] = ()


def read_questions(
    name: str,
    options: TaskOptions,
    tokenizer: PreTrainedTokenizerBase,
    longest: int,
    within: str = "",
) -> tuple[list[Question], int]:
    """Questions of a task, the same on every call.

    Args:
        name: Of the task, for messages.
        options: The task.
        tokenizer: The model's.
        longest: Positions that the model was made for.
        within: Group of the settings that the task is in, for messages.

    Returns:
        The questions, and the number of records that could not be tokenised.

    Raises:
        UserError: a file or field is missing, there are too few different answers, or a question is
            longer than the model's positions reach.
    """
    field = f"{within}tasks.{name}"
    check_settings(options, field)
    check_template(options, tokenizer, field)
    with blamed_on(f"{field}.path"):
        records = read_records(options.path, options.split)
    given = options.choices_field is not None
    require(given or not options.letters, f"{field}.letters", True, "false without choices_field")
    answers = [filled(options.answer, record, f"{field}.answer") for record in records]
    pool = [] if given else sorted(set(answers))
    rows, sizes = [], {}
    for index, record in enumerate(records[: options.limit]):
        prompt = filled(options.prompt, record, f"{field}.prompt")
        if given:
            candidates = _own_candidates(answers[index], record, options, field)
            sizes[where_of(record)] = tuple(map(len, candidates))
        else:
            candidates = _candidates(answers[index], pool, options, index, field)
        if not options.chat_template:
            candidates = [f" {candidate}" for candidate in candidates]
        rows.append(Row(prompt, candidates, where_of(record)))
    with blamed_on(f"{field}"):
        encoder = Encoder(tokenizer, "chat" if options.chat_template else "auto")
        encoded = encoder.encode(rows)
    # What closes an answer is cut off: an answer is right whether or not the model would go on.
    questions, lengths = [], {}
    for row, one in zip(rows, encoded, strict=True):
        if isinstance(one, Encoded):
            answers = [answer[:-1] for answer in one.answers]
            questions.append(Question(one.prompt, answers, sizes.get(row.where, ())))
            lengths[row.where] = len(one.prompt) + max(map(len, answers))
    if not questions:
        raise UserError(f"{field}: none of {len(rows)} records can be used: {encoded[0]}.")
    check_lengths(lengths, longest, field)
    return questions, len(rows) - len(questions)


def check_template(
    options: TaskOptions | GenerationTaskOptions, tokenizer: PreTrainedTokenizerBase, field: str
) -> None:
    """Raises `UserError` where a task wants a chat template and the tokenizer has none."""
    if options.chat_template and not tokenizer.chat_template:
        raise UserError(
            f"{field}.chat_template is true, but the model's tokenizer has none, as those of base "
            "models; set it to false, and the prompts are plain text."
        )


def check_lengths(lengths: Mapping[str, int], longest: int, field: str) -> None:
    """Raises `UserError` where records, by place, take more positions than a model was made for."""
    beyond = sum(length > longest for length in lengths.values())
    if beyond:
        where = max(lengths, key=lengths.__getitem__)
        raise UserError(
            f"{field}: {beyond} of {len(lengths)} records need more than the model's {longest} "
            f"positions, most of all {where}, {lengths[where]} tokens with its answer; shorten the "
            "prompt or the answers, or leave these records out of the file."
        )


def filled(template: str, record: Mapping[str, Any], field: str) -> str:
    """A format string over a record's fields; raises `UserError` where it does not fit or is empty."""
    try:
        text = template.format_map(record)
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        raise UserError(
            f"{field}: {template!r} cannot be filled from {where_of(record)}, which has the "
            f"fields {', '.join(record)} ({type(error).__name__}: {error})."
        ) from error
    if not text.strip():
        raise UserError(f"{field}: {template!r} is empty for {where_of(record)}.")
    return text


def _own_candidates(
    answer: str, record: Mapping[str, Any], options: TaskOptions, field: str
) -> list[str]:
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


def _candidates(
    right: str, pool: list[str], options: TaskOptions, index: int, field: str
) -> list[str]:
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


def choice_scorer(graphdef: nnx.GraphDef) -> Score:
    """Compiles the scoring of all candidates of a batch of questions in one pass.

    Args:
        graphdef: Of the model.

    Returns:
        ``f(params, prompt_tokens [B, P], prompt_mask, answer_tokens [B, K, C], answer_mask)`` giving
        ``(logps, top1)``, float32 and bool ``[B, K, C]``: the log-probability of every answer token
        given the prompt and what precedes it in its own answer, 0 where masked, and whether it was
        the most likely one, False where masked.
    """

    @jax.jit
    def score(
        params: Any,
        prompt_tokens: jax.Array,
        prompt_mask: jax.Array,
        answer_tokens: jax.Array,
        answer_mask: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        model = merge_model(graphdef, params)
        batch, width = prompt_tokens.shape
        choices, length = answer_tokens.shape[1:]
        flat = answer_tokens.reshape(batch, choices * length)
        tokens = jnp.concatenate([prompt_tokens, flat], axis=1)
        positions, visible = _layout(prompt_mask, answer_mask)
        cache = model.empty_cache(batch, tokens.shape[1])
        hidden, _ = model.extend(tokens, positions, visible, cache, 0)
        # An answer's first token is predicted where the prompt ends, the others one token earlier.
        inside = hidden[:, width:].reshape(batch, choices, length, -1)[:, :, :-1]
        first = jnp.broadcast_to(
            hidden[:, None, width - 1 : width], (batch, choices, 1, hidden.shape[-1])
        )
        before = jnp.concatenate([first, inside], axis=2).reshape(batch, choices * length, -1)
        unembedding = model.unembedding()
        chunk = resolve_vocab_chunk("auto", unembedding.shape[1])
        logps, top1 = token_statistics(before, unembedding, flat, vocab_chunk=chunk)
        shape = (batch, choices, length)
        return jnp.where(answer_mask, logps.reshape(shape), 0.0), answer_mask & top1.reshape(shape)

    return score


def _layout(prompt_mask: jax.Array, answer_mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Positions ``[B, L]``, and who sees whom ``[B, L, L]``, for answers side by side."""
    batch, width = prompt_mask.shape
    choices, length = answer_mask.shape[1:]
    behind = jnp.tile(jnp.arange(length), choices)
    positions = jnp.concatenate(
        [
            jnp.maximum(jnp.cumsum(prompt_mask, axis=1) - 1, 0),
            jnp.sum(prompt_mask, axis=1, keepdims=True) + behind,
        ],
        axis=1,
    )
    slot = jnp.arange(width + choices * length)
    answer = jnp.where(slot < width, -1, (slot - width) // length)
    related = (answer == -1)[None, :] | (answer[None, :] == answer[:, None])
    earlier = slot[None, :] <= slot[:, None]
    real = jnp.concatenate([prompt_mask, answer_mask.reshape(batch, -1)], axis=1)
    # A padding token sees itself, so that its softmax is over something.
    visible = (real[:, None, :] & (related & earlier)[None]) | (slot[None, :] == slot[:, None])
    return positions.astype(jnp.int32), visible


def measure(
    score: Score,
    params: Any,
    questions: Sequence[Question],
    *,
    batch_size: int,
    pad_id: int,
    shown_as: str | None,
) -> dict[str, float]:
    """Accuracy of a model on questions.

    Args:
        score: From `choice_scorer`.
        params: Of the model.
        questions: From `read_questions`.
        batch_size: Questions scored at once.
        pad_id: Token at padding.
        shown_as: Label of a progress bar; None for none.

    Returns:
        ``accuracy``: share of questions whose right answer has the highest log-probability (a tie
        counts as wrong); ``accuracy_per_token``: the same with log-probabilities divided by the
        number of tokens; ``exact``: share whose right answer is the most likely token at every
        position; ``logp``: mean log-probability of the right answer; ``questions``: their number.
        Where the records list their candidates also ``acc``, which is ``accuracy``, and ``acc_norm``,
        with log-probabilities divided by the candidates' characters (lm-evaluation-harness's names).
    """
    rows: list[tuple[float, ...]] = []
    names = ["accuracy", "accuracy_per_token", "exact", "logp"]
    names += ["acc", "acc_norm"] if questions[0].sizes else []
    with Progress(disable=shown_as is None) as progress:
        task = progress.add_task(shown_as or "", total=len(questions))
        for batch, asked in _batches(questions, batch_size, pad_id):
            logps, top1 = jax.device_get(score(params, *batch))
            mask = batch[3]
            right = (top1[:, 0] | ~mask[:, 0]).all(axis=1)
            lengths = mask.sum(axis=2)
            # Where a question has fewer candidates than others, the missing ones cannot win.
            sums = np.where(lengths > 0, logps.sum(axis=2), -np.inf)
            columns = [
                _first_wins(sums),
                _first_wins(sums / np.maximum(lengths, 1)),
                right,
                sums[:, 0],
            ]
            if asked[0].sizes:
                sizes = np.ones(sums.shape)
                for row, question in enumerate(asked):
                    sizes[row, : len(question.sizes)] = question.sizes
                columns += [columns[0], _first_wins(sums / sizes)]
            rows += list(zip(*columns, strict=True))[: len(asked)]
            progress.advance(task, len(asked))
    means = np.asarray(rows, np.float64).mean(axis=0)
    return {**dict(zip(names, means.tolist(), strict=True)), "questions": len(questions)}


def _first_wins(scores: np.ndarray) -> np.ndarray:
    return scores[:, 0] > scores[:, 1:].max(axis=1)


def _batches(
    questions: Sequence[Question], batch_size: int, pad_id: int
) -> Iterator[tuple[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray], list[Question]]]:
    """Batches of similar prompt lengths and few shapes, each with the questions it holds."""
    most = max(len(question.answers) for question in questions)
    length = max(len(answer) for question in questions for answer in question.answers)
    by_length = sorted(questions, key=lambda question: len(question.prompt))
    for start in range(0, len(by_length), batch_size):
        asked = by_length[start : start + batch_size]
        width = -(-len(asked[-1].prompt) // _WIDTH) * _WIDTH
        rows = asked + [asked[0]] * (batch_size - len(asked))
        prompts = pad_left([row.prompt for row in rows], width, pad_id)
        padded = [[*row.answers, *[[]] * (most - len(row.answers))] for row in rows]
        answers = pad_right([answer for row in padded for answer in row], length, pad_id)
        shape = (len(rows), -1, length)
        yield (*prompts, answers[0].reshape(shape), answers[1].reshape(shape)), asked

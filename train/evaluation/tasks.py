"""The tasks of the `eval` command, read once and scored as often as a model changes."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from train.config import TaskSetOptions
from train.evaluation.multiple_choice import Question, choice_scorer, measure, read_questions
from train.evaluation.perplexity import Texts, perplexity, read_texts
from train.evaluation.windows import window_scorer
from train.evaluation.written_answers import Problem, read_problems, score_answers
from train.generation.greedy_text import greedy_writer

Scores = dict[str, dict[str, dict[str, float]]]
"""Metrics by kind (``tasks``, ``texts``, ``generation``), name of a task and name of the metric."""


@dataclasses.dataclass(frozen=True)
class Tasks:
    """Everything that tasks ask, tokenised.

    Attributes:
        options: The settings that they were read by.
        questions: Multiple choice by name.
        texts: Windows of texts by name.
        problems: Problems to be answered by name.
    """

    options: TaskSetOptions
    questions: dict[str, list[Question]]
    texts: dict[str, Texts]
    problems: dict[str, list[Problem]]

    def __len__(self) -> int:
        return len(self.questions) + len(self.texts) + len(self.problems)

    def fingerprint(self) -> str:
        """SHA-256 of what is asked, which changes with files, settings and tokenizer."""
        asked = (self.questions, self.texts, self.problems)
        return hashlib.sha256(repr(asked).encode()).hexdigest()


def read_tasks(
    options: TaskSetOptions, tokenizer: Any, longest: int, console: Console, within: str = ""
) -> Tasks:
    """Reads and tokenises all tasks, and says how many records cannot be used.

    Args:
        options: The tasks.
        tokenizer: The model's.
        longest: Positions that the model was made for.
        console: Where the counts are shown.
        within: Group of the settings that the tasks are in, such as ``"evaluation."``, for messages.

    Raises:
        UserError: a file or a field is missing, or a setting does not fit.
    """
    questions = {}
    for name, task in options.tasks.items():
        questions[name], unusable = read_questions(name, task, tokenizer, longest, within)
        skipped = f", {unusable} records left out" if unusable else ""
        console.print(f"{name}: {len(questions[name])} questions{skipped}", highlight=False)
    texts = {}
    for name, task in options.texts.items():
        texts[name] = read_texts(name, task, tokenizer, longest, within)
        console.print(f"{name}: {len(texts[name].windows)} windows of text", highlight=False)
    problems = {}
    for name, task in options.generation.items():
        problems[name] = read_problems(name, task, tokenizer, longest, within)
        console.print(f"{name}: {len(problems[name])} problems", highlight=False)
    return Tasks(options, questions, texts, problems)


def task_scorer(
    graphdef: nnx.GraphDef,
    tasks: Tasks,
    tokenizer: Any,
    ends: list[int],
    *,
    batch_size: int,
    mesh: Mesh | None = None,
    show: bool = False,
) -> Callable[[Any], Scores]:
    """Makes ``f(params)`` that scores all tasks; each shape of a batch is compiled once.

    Args:
        graphdef: Of the model.
        tasks: From `read_tasks`.
        tokenizer: The model's.
        ends: Tokens that end an answer, from `train.models.model_dir.end_tokens`.
        batch_size: Questions, windows or problems at once; a multiple of the devices that rows are
            split over.
        mesh: Where the parameters lie. Every process scores every task.
        show: Show progress bars.
    """
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())

    def whole(function: Callable[..., Any]) -> Callable[..., Any]:
        """Compiled so that every process has the results whole."""
        return function if everywhere is None else jax.jit(function, out_shardings=everywhere)

    pad_id = tokenizer.pad_token_id or 0
    choose, score = whole(choice_scorer(graphdef)), whole(window_scorer(graphdef))
    generation = tasks.options.generation
    write = {
        name: greedy_writer(
            graphdef,
            tokenizer,
            max_new_tokens=one.max_new_tokens,
            ends=ends,
            batch_size=batch_size,
            compiled=whole,
        )
        for name, one in generation.items()
    }

    def shared(name: str) -> dict[str, Any]:
        return {"batch_size": batch_size, "shown_as": name if show else None}

    def scores(params: Any) -> Scores:
        return {
            "tasks": {
                name: measure(choose, params, asked, pad_id=pad_id, **shared(name))
                for name, asked in tasks.questions.items()
            },
            "texts": {
                name: perplexity(score, params, texts, pad_id=pad_id, **shared(name))
                for name, texts in tasks.texts.items()
            },
            "generation": {
                name: score_answers(
                    write[name], params, asked, generation[name], shown_as=name if show else ""
                )
                for name, asked in tasks.problems.items()
            },
        }

    return scores


def as_metrics(scores: Scores) -> dict[str, float]:
    """Scores as held-out metrics of a run, without what cannot change.

    Example:
        >>> as_metrics({"tasks": {"sums": {"accuracy": 0.5, "questions": 8}}})
        {'eval_tasks/sums/accuracy': 0.5}
    """
    return {
        f"eval_{kind}/{name}/{metric}": value
        for kind, named in scores.items()
        for name, metrics in named.items()
        for metric, value in metrics.items()
        if not isinstance(value, int)  # the number of questions, tokens or problems
    }

"""The tasks of the `eval` command, read once and scored as often as a model changes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from rich.console import Console

from train.config import TaskSetOptions
from train.evaluation.likelihoods import likelihood_scorer
from train.evaluation.multiple_choice import Questions, accuracies, read_questions
from train.evaluation.perplexity import Texts, perplexity, read_texts
from train.evaluation.written_answers import Problems, read_problems, score_answers
from train.generation.greedy_text import greedy_writer

TaskScores = dict[str, dict[str, dict[str, float]]]
"""Metrics by kind of task (``tasks``, ``texts``, ``generation``), name of a task and of the metric."""


@dataclass(frozen=True)
class Tasks:
    """Everything that tasks ask, tokenised, by kind and name of the task."""

    asked: Mapping[str, Mapping[str, Questions | Texts | Problems]]

    def __len__(self) -> int:
        return sum(map(len, self.asked.values()))

    def fingerprint(self) -> str:
        """SHA-256 of what is asked, which changes with files, settings and tokenizer."""
        return hashlib.sha256(repr(self.asked).encode()).hexdigest()


def read_tasks(
    options: TaskSetOptions, tokenizer: Any, longest: int, console: Console, within: str = ""
) -> Tasks:
    """Reads and tokenises all tasks, and says how many records cannot be used.

    ``longest`` is the number of positions that the model was made for. ``within`` is the group of the
    settings that the tasks are in, such as ``"evaluation."``, for messages. Raises `UserError` where
    a file or a field is missing, or a setting does not fit.
    """
    readers: dict[str, Callable[..., Any]] = {
        "tasks": read_questions,
        "texts": read_texts,
        "generation": read_problems,
    }
    asked = {}
    for kind, read in readers.items():
        asked[kind] = {}
        for name, task in getattr(options, kind).items():
            asked[kind][name] = read(f"{within}{kind}.{name}", task, tokenizer, longest)
            console.print(f"{name}: {asked[kind][name]}", highlight=False)
    return Tasks(asked)


def task_scorer(
    graphdef: nnx.GraphDef,
    tasks: Tasks,
    tokenizer: Any,
    ends: list[int],
    *,
    batch_size: int,
    mesh: Mesh | None = None,
    show: bool = False,
) -> Callable[[Any], TaskScores]:
    """Makes ``f(params)`` that scores all tasks; each shape of a batch is compiled once.

    ``ends`` are the tokens that end an answer, from `train.models.model_dir.end_tokens`.
    ``batch_size`` counts questions, windows or problems; it is a multiple of the devices that rows
    are split over. On a ``mesh`` every process scores every task and has all results. ``show`` shows
    progress bars.
    """
    everywhere = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    settings: dict[str, Any] = {"batch_size": batch_size, "out_shardings": everywhere}
    likelihoods = likelihood_scorer(graphdef, pad_id=tokenizer.pad_token_id or 0, **settings)
    write = greedy_writer(graphdef, tokenizer, ends=ends, **settings)
    measures: dict[str, Callable[..., dict[str, float]]] = {
        "tasks": partial(accuracies, likelihoods),
        "texts": partial(perplexity, likelihoods),
        "generation": partial(score_answers, write),
    }

    def scores(params: Any) -> TaskScores:
        return {
            kind: {
                name: measures[kind](params, asked, name if show else "")
                for name, asked in named.items()
            }
            for kind, named in tasks.asked.items()
        }

    return scores


def as_metrics(scores: TaskScores) -> dict[str, float]:
    """Scores as held-out metrics of a run, without numbers of questions and the like.

    Example:
        >>> as_metrics({"tasks": {"sums": {"accuracy": 0.5, "questions": 8}}})
        {'eval_tasks/sums/accuracy': 0.5}
    """
    return {
        f"eval_{kind}/{name}/{metric}": value
        for kind, named in scores.items()
        for name, metrics in named.items()
        for metric, value in metrics.items()
        if not isinstance(value, int)  # the number of questions, tokens or problems cannot change
    }

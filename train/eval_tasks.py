"""The tasks of ``python -m train eval``: all read and checked before a weight is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from flax import nnx
from rich.console import Console

from train.config import EvalConfig, UserError
from train.continuations import continuation_scorer
from train.exact_match import measure_exact_match, read_problems
from train.generate import end_tokens
from train.given_choices import measure_choices, read_choice_questions
from train.greedy_text import greedy_writer
from train.models import ModelConfig
from train.multiple_choice import choice_scorer, measure, read_questions
from train.perplexity import measure_perplexity, read_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Measure = Callable[[Any], Mapping[str, float]]
"""Metrics of a model's parameters."""


def prepare_tasks(
    config: EvalConfig,
    graphdef: nnx.GraphDef,
    model: ModelConfig,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
) -> dict[str, Measure]:
    """Reads what the tasks need, and says how much it is.

    Args:
        config: The evaluation.
        graphdef: Of the model.
        model: Its configuration.
        tokenizer: The model's.
        console: Where the sizes are shown.

    Returns:
        What measures each task, by its name.

    Raises:
        UserError: something given cannot be used.
    """
    groups = ("tasks", "choices", "exact_match", "perplexity")
    names = [name for group in groups for name in getattr(config, group)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UserError(f"{twice[0]!r} names a task in more than one of {', '.join(groups)}.")
    pad_id: Any = tokenizer.pad_token_id
    prepare = _Preparation(config, graphdef, model, tokenizer, pad_id or 0)
    tasks = {}
    for group in groups:
        for name, size, unusable, run in getattr(prepare, group)():
            skipped = f", {unusable} records left out" if unusable else ""
            console.print(f"{name}: {size}{skipped}", highlight=False)
            tasks[name] = run
    return tasks


Prepared = Iterator[tuple[str, str, int, Measure]]
"""Name, size in words, records left out, and what measures it."""


class _Preparation:
    """One method a group of tasks, each compiled function shared by the tasks that use it."""

    def __init__(
        self,
        config: EvalConfig,
        graphdef: nnx.GraphDef,
        model: ModelConfig,
        tokenizer: PreTrainedTokenizerBase,
        pad_id: int,
    ) -> None:
        self._config, self._graphdef, self._tokenizer = config, graphdef, tokenizer
        self._positions, self._pad_id = model.max_position_embeddings, pad_id
        self._score = continuation_scorer(graphdef, batch_size=config.batch_size, pad_id=pad_id)

    def tasks(self) -> Prepared:
        score, batch_size = choice_scorer(self._graphdef), self._config.batch_size
        for name, options in self._config.tasks.items():
            asked, unusable = read_questions(name, options, self._tokenizer)
            settings = {"batch_size": batch_size, "pad_id": self._pad_id, "shown_as": name}
            run = partial(measure, score, questions=asked, **settings)
            yield name, f"{len(asked)} questions", unusable, run

    def choices(self) -> Prepared:
        for name, options in self._config.choices.items():
            field = f"choices.{name}"
            asked, unusable = read_choice_questions(
                field, options, self._tokenizer, self._positions
            )
            run = partial(measure_choices, self._score, questions=asked, shown_as=name)
            yield name, f"{len(asked)} questions", unusable, run

    def exact_match(self) -> Prepared:
        for name, options in self._config.exact_match.items():
            field = f"exact_match.{name}"
            problems, unusable = read_problems(field, options, self._tokenizer, self._positions)
            write = greedy_writer(
                self._graphdef,
                self._tokenizer,
                max_new_tokens=options.max_new_tokens,
                ends=end_tokens(self._config.model, self._tokenizer),
                batch_size=self._config.batch_size,
            )
            run = partial(
                measure_exact_match, write, problems=problems, options=options, shown_as=name
            )
            yield name, f"{len(problems)} problems", unusable, run

    def perplexity(self) -> Prepared:
        for name, options in self._config.perplexity.items():
            field = f"perplexity.{name}"
            texts, length, stride = read_texts(field, options, self._tokenizer, self._positions)
            run = partial(
                measure_perplexity,
                self._score,
                texts=texts,
                max_length=length,
                stride=stride,
                shown_as=name,
            )
            size = f"{len(texts)} texts, {sum(map(len, texts))} tokens, windows of {length}"
            yield name, size, 0, run

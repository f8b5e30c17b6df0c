"""Settings of ``python -m train eval``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from train.config import ranges
from train.config.base import DType
from train.config.data import RecordOptions


@dataclass(frozen=True, kw_only=True)
class PreferenceEvalOptions(RecordOptions):
    """Preference accuracy and margins against a reference, on the held-out part of the records.

    Without `eval_fraction` all records count.

    Attributes:
        reference: Directory or hub name of the reference, which is the SFT model.
        beta: Factor of the rewards, as in training.
    """

    reference: str
    beta: ranges.PositiveFloat = 0.1


@dataclass(frozen=True, kw_only=True)
class _ScoredFile:
    """What a model is scored on.

    Attributes:
        path: A .json, .jsonl, .jsonl.gz or .parquet file, or the name of a data set on the hub, with
            its configuration as in openai/gsm8k:main if it has several.
        split: Split of a data set on the hub; where it has no test split, another, such as validation.
        limit: Use only the first so many records or texts.
    """

    path: str
    split: str = "test"
    limit: ranges.PositiveInt | None = None


@dataclass(frozen=True, kw_only=True)
class TaskOptions(_ScoredFile):
    """Multiple choice by log-likelihood on the records of a file.

    Attributes:
        prompt: Python format string over a record's fields, for example "{Body} {Question}".
        answer: Format string of the right answer, for example "{Answer:g}". With `choices_field`:
            of its label, its letter, or its number from 0, for example "{answerKey}".
        choices: Candidate answers to a question: the right one, and others drawn from the rest of
            the file. Not used with `choices_field`.
        choices_field: Field of a record that holds its candidates: a list of texts, or an object
            with the lists "text" and "label". Unset: they are drawn.
        letters: With `choices_field`: score the letters A, B, … in place of the texts, which the
            prompt then shows, for example by "A. {choices[0]}".
        chat_template: Put the prompt into the tokenizer's chat template; otherwise the answer
            follows it as plain text, after one space.
        seed: Seed of the draw of wrong answers.
    """

    prompt: str
    answer: str
    choices: ranges.TwoOrMore = 4
    choices_field: str | None = None
    letters: bool = False
    chat_template: bool = True
    seed: ranges.Seed = 0


@dataclass(frozen=True, kw_only=True)
class TextOptions(_ScoredFile):
    """Perplexity on the texts of a file, with a sliding window.

    Attributes:
        path: A .txt file, which is one text, or a file or data set of records as for the other tasks.
        field: Field of a record that holds the text.
        separator: Makes one text of all records with this between them, as transformers' guide to
            perplexity does with a blank line. Unset: each record is a text of its own.
        max_length: Tokens in a window. Unset: 1024, or what the model was made for if that is less.
        stride: Tokens from one window's start to the next. Unset: half of a window.
    """

    field: str = "text"
    separator: str | None = None
    max_length: ranges.TwoOrMore | None = None
    stride: ranges.PositiveInt | None = None


@dataclass(frozen=True, kw_only=True)
class GenerationTaskOptions(_ScoredFile):
    """Greedily generated answers, compared with the right ones.

    Attributes:
        prompt: Python format string over a record's fields.
        answer: Format string of the right answer. Not used with `answers_field`.
        answers_field: Field of a record that holds its right answers, any of which will do: a list
            of texts, or an object with such a list as "text", as in SQuAD. Unset: `answer` is it.
        scoring: "exact_match" compares what `extract` finds, as GSM8K is scored; "squad" compares
            words, and gives the share of equal answers and the mean F1 of SQuAD.
        extract: Regular expression whose last match in what the model wrote is its answer: the
            first group that matched, or the whole. Unset: the last number with "exact_match",
            everything with "squad".
        answer_extract: Such an expression for the right answers, for example "#### (.+)" of GSM8K.
            Unset: all of the text counts.
        max_new_tokens: Tokens to generate at most.
        chat_template: Put the prompt into the tokenizer's chat template.
    """

    prompt: str
    answer: str | None = None
    answers_field: str | None = None
    scoring: Literal["exact_match", "squad"] = "exact_match"
    extract: str | None = None
    answer_extract: str | None = None
    max_new_tokens: ranges.PositiveInt = 256
    chat_template: bool = True


@dataclass(frozen=True, kw_only=True)
class TaskSetOptions:
    """Tasks that measure what a model can do.

    Attributes:
        tasks: Multiple choice by name; flags end in ``tasks.NAME.path FILE`` and so on.
        texts: Texts for perplexity by name.
        generation: Tasks with generated answers by name.
    """

    tasks: dict[str, TaskOptions] = field(default_factory=dict)
    texts: dict[str, TextOptions] = field(default_factory=dict)
    generation: dict[str, GenerationTaskOptions] = field(default_factory=dict)

    @property
    def metric_prefixes(self) -> list[str]:
        """What the names of their metrics begin with when they are scored during training."""
        kinds = {"tasks": self.tasks, "texts": self.texts, "generation": self.generation}
        return [f"eval_{kind}/{name}/" for kind, named in kinds.items() for name in named]


@dataclass(frozen=True, kw_only=True)
class EvalConfig(TaskSetOptions):
    """Preference accuracy, multiple choice, perplexity and exact match for one model.

    Attributes:
        model: Directory in Hugging Face format, or a hub name.
        output: JSON file to write; it must not exist yet.
        preferences: Preference data to evaluate on.
        batch_size: Pairs or questions scored at once.
        dtype: Type of the computations; parameters stay float32.
    """

    model: str
    output: str
    preferences: PreferenceEvalOptions | None = None
    batch_size: ranges.PositiveInt = 32
    dtype: DType = "float32"

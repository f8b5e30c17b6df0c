"""Settings of ``python -m train eval``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

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
    beta: float = 0.1


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """Multiple choice by log-likelihood on the records of a file.

    Attributes:
        path: A .json, .jsonl, .jsonl.gz or .parquet file, or the name of a data set on the hub.
        prompt: Python format string over a record's fields, for example "{Body} {Question}".
        answer: Format string of the right answer, for example "{Answer:g}".
        choices: Candidate answers to a question: the right one, and others drawn from the rest of
            the file.
        limit: Use only the first so many records.
        chat_template: Put the prompt into the tokenizer's chat template; otherwise the answer
            follows it as plain text, after one space.
        seed: Seed of the draw of wrong answers.
    """

    path: str
    prompt: str
    answer: str
    choices: int = 4
    limit: int | None = None
    chat_template: bool = True
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class ChoiceTaskOptions:
    """Multiple choice by log-likelihood where each record holds its own candidates.

    Attributes:
        path: A .json, .jsonl, .jsonl.gz or .parquet file, or the name of a data set on the hub.
        split: Split of a hub data set; files have none.
        prompt: Python format string over a record's fields, for example "{question}". {options}
            stands for the candidates with their letters, one a line.
        choices: Field with the candidates: a list of texts, or {"text": [...], "label": [...]}.
        answer: Field with the right one: its number from 0, its letter or label, or its text.
        score: What the model is asked for: the text of a candidate, or its letter (then the prompt
            should hold {options}).
        limit: Use only the first so many records.
        chat_template: Put the prompt into the tokenizer's chat template; otherwise the answer
            follows it as plain text, after one space.
    """

    path: str
    prompt: str
    split: str = "test"
    choices: str = "choices"
    answer: str = "answer"
    score: Literal["text", "letter"] = "text"
    limit: int | None = None
    chat_template: bool = False


@dataclass(frozen=True, kw_only=True)
class ExactMatchOptions:
    r"""Answers generated greedily, and compared with the right ones as text.

    Attributes:
        path: A .json, .jsonl, .jsonl.gz or .parquet file, or the name of a data set on the hub.
        prompt: Python format string over a record's fields, for example "{question}".
        answer: Format string of the right answer, for example "{answer}".
        split: Split of a hub data set; files have none.
        pattern: Regular expression whose last match in what the model writes is its answer, or the
            match's first group where there is one. By default the last number.
        answer_pattern: The same for the right answer, for example "#### (.+)". Unset: its text.
        ignore: Regular expressions that are removed from both answers before they are compared.
        ignore_case: Whether "Yes" is "yes".
        stop: What the model writes is cut off where the first of these texts begins.
        max_new_tokens: Tokens to generate for a record.
        limit: Use only the first so many records.
        chat_template: Put the prompt into the tokenizer's chat template; otherwise it is continued as
            plain text.
    """

    path: str
    prompt: str
    answer: str
    split: str = "test"
    pattern: str = r"-?\d[\d,]*(?:\.\d+)?"
    answer_pattern: str | None = None
    ignore: list[str] = field(default_factory=lambda: [",", r"\$", r"\.$"])
    ignore_case: bool = True
    stop: list[str] = field(default_factory=list)
    max_new_tokens: int = 256
    limit: int | None = None
    chat_template: bool = True


@dataclass(frozen=True, kw_only=True)
class PerplexityOptions:
    """Perplexity of texts by windows that overlap, as in the guide of transformers.

    Attributes:
        path: A .txt file, which is one text; a .json, .jsonl, .jsonl.gz or .parquet file with a text
            a record; or the name of a data set on the hub.
        field: Field of the records that holds the text.
        split: Split of a hub data set; files have none.
        separator: Makes one text of all records with this between them, as transformers' guide does
            with a blank line. Unset: each record is a text of its own.
        max_length: Tokens in a window. Unset: as many as the model has positions.
        stride: Tokens by which the window moves: smaller gives each token more context, and takes
            longer. Unset: half of `max_length`.
        limit: Use only the first so many records.
    """

    path: str
    field: str = "text"
    split: str = "test"
    separator: str | None = None
    max_length: int | None = None
    stride: int | None = None
    limit: int | None = None


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out preference accuracy, tasks and perplexity of one model.

    Attributes:
        model: Directory in Hugging Face format, or a hub name.
        output: JSON file to write; it must not exist yet.
        preferences: Preference data to evaluate on.
        tasks: Multiple choice among the answers of a file, by name. In flags:
            ``--tasks.NAME.path FILE``.
        choices: Multiple choice with candidates in the records, by name.
        exact_match: Tasks with generated answers, by name.
        perplexity: Texts, by name.
        batch_size: Pairs, questions or windows computed at once.
        dtype: Type of the computations; parameters stay float32.
    """

    model: str
    output: str
    preferences: PreferenceEvalOptions | None = None
    tasks: dict[str, TaskOptions] = field(default_factory=dict)
    choices: dict[str, ChoiceTaskOptions] = field(default_factory=dict)
    exact_match: dict[str, ExactMatchOptions] = field(default_factory=dict)
    perplexity: dict[str, PerplexityOptions] = field(default_factory=dict)
    batch_size: int = 32
    dtype: DType = "float32"

"""Settings of ``python -m train eval``."""

from __future__ import annotations

from dataclasses import dataclass, field

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
class EvalConfig:
    """Held-out preference accuracy and multiple-choice tasks for one model.

    Attributes:
        model: Directory in Hugging Face format, or a hub name.
        output: JSON file to write; it must not exist yet.
        preferences: Preference data to evaluate on.
        tasks: Tasks by name. In flags: ``--tasks.NAME.path FILE``.
        batch_size: Pairs or questions scored at once.
        dtype: Type of the computations; parameters stay float32.
    """

    model: str
    output: str
    preferences: PreferenceEvalOptions | None = None
    tasks: dict[str, TaskOptions] = field(default_factory=dict)
    batch_size: int = 32
    dtype: DType = "float32"

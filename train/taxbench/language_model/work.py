"""Counts the tokens that every stage of the second scale computes."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from train.config import DataOptions, ModelOptions
from train.data import read_records, tokenize_preference, tokenize_sft
from train.evaluation.tasks import Tasks, read_tasks
from train.evaluation.written_answers import Problems
from train.inputs.model import check_model
from train.inputs.records import tokenized
from train.taxbench.language_model.data import SFT_FILES, task_set
from train.taxbench.language_model.stages import METHODS, Study

_STEP = 3
"""Passes of a training step: forward, and twice as much backward."""


def task_tokens(tasks: Tasks) -> dict[str, int]:
    """Counts the tokens of every task without padding; a written answer counts with its limit."""
    found = {}
    for name, task in [item for named in tasks.asked.values() for item in named.items()]:
        if isinstance(task, Problems):
            most = task.options.max_new_tokens
            found[f"{name}, written"] = sum(len(one.prompt) + most for one in task.asked)
        else:
            found[name] = sum(len(one.prompt) + sum(map(len, one.answers)) for one in task.asked)
    return found


def work(study: Study, tokenizer: Any) -> dict[str, int]:
    """Counts tokens through the model by stage, of all seeds; a training step counts three times."""
    size, quiet = study.size, Console(quiet=True)
    longest = check_model(ModelOptions(path=study.model), "model").max_position_embeddings
    tasks = read_tasks(task_set(study.data, size), tokenizer, longest, quiet)
    point = sum(task_tokens(tasks).values())
    example = _tokens(study, [*SFT_FILES], size.sft_lengths, tokenizer)
    pair = _tokens(study, ["pairs"], size.pair_lengths, tokenizer)
    held_out = _tokens(study, ["held_out"], size.pair_lengths, tokenizer)
    pairs = held_out[0] * held_out[1]
    runs = len(study.methods) * study.seeds
    merged = (len(size.weights) + len(size.lambdas) * len(size.lambda_weights)) * study.seeds
    return {
        "SFT": round(_STEP * size.sft_steps * size.batch_size * example[1]) * study.seeds,
        "before SFT and SFT, tasks": point * (1 + study.seeds),
        "reference": round(pair[0] * pair[1] + pairs) * study.seeds,
        "DPO": round(_STEP * size.dpo_steps * size.batch_size * pair[1]) * runs,
        "points along DPO": round((point + pairs) * size.points) * runs,
        "merges": round((point + 2 * pairs) * merged),
    }


def _tokens(
    study: Study, names: list[str], lengths: tuple[int, int], tokenizer: Any
) -> tuple[int, float]:
    """Counts rows of some files, and the mean tokens of a row; a pair has its prompt once."""
    rows, total = 0, 0.0
    for name in names:
        path = str(study.data / f"{name}.jsonl")
        options = DataOptions(
            path=path, max_prompt_length=lengths[0], max_completion_length=lengths[1]
        )
        tokenize = tokenize_sft if name in SFT_FILES else tokenize_preference
        data = tokenized(read_records(path), options, "data_dir", tokenize, tokenizer)
        masks = (column for key, column in data.arrays.items() if key.endswith("_mask"))
        rows, total = rows + len(data), total + sum(int(mask.sum()) for mask in masks)
    return rows, total / rows


def show_work(study: Study, tokenizer: Any) -> None:
    """Prints the tokens of every stage, and the settings of all methods."""
    table = Table(title="Thousands of tokens, forward passes (a training step counts 3)")
    table.add_column("stage")
    table.add_column("thousands", justify="right")
    found = work(study, tokenizer)
    for stage, tokens in {**found, "all": sum(found.values())}.items():
        table.add_row(stage, f"{tokens / 1000:,.0f}")
    study.console.print(table)
    labels = ", ".join(METHODS[name].label for name in study.methods)
    study.console.print(f"Methods: {labels}", highlight=False)

"""``--dry_run true``: what a run would read and compute, shown before any weight is read.

A hub name costs its tokenizer and ``config.json``, not its weights. Where the hub cannot be reached
the dry run goes as far as it can and ends with what is missing.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from train.config import DPOConfig, GRPOConfig, KTOConfig, OnlineDPOConfig, SFTConfig, UserError
from train.data import (
    Record,
    TokenDataset,
    UnusableRecord,
    answer_names,
    make_buckets,
    normalise_preference,
    normalise_prompt,
    normalise_sft,
    normalise_unpaired,
    read_records,
)
from train.evaluation.tasks import read_tasks
from train.inputs.model import Tokenize, blamed_on, check_related, load_data, packed
from train.models import ModelConfig, read_hf_config
from train.optimizers.build import make_optimizer
from train.optimizers.schedules import make_schedule
from train.runs.counts import count_steps

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Config = SFTConfig | DPOConfig | KTOConfig | OnlineDPOConfig | GRPOConfig

_READERS: dict[type, Callable[..., Any]] = {
    SFTConfig: normalise_sft,
    DPOConfig: normalise_preference,
    KTOConfig: normalise_unpaired,
    OnlineDPOConfig: normalise_prompt,
    GRPOConfig: normalise_prompt,
}

EXAMPLES = 2
"""Rows that are shown whole."""

_PERCENTILES = (50, 90, 99)
_HUB_FILES = "its tokenizer and config.json"


def dry_run(config: Config, tokenize: Tokenize, console: Console) -> None:
    """Shows token statistics, batches and the first rows with their loss masks.

    Args:
        config: The settings, their ranges checked.
        tokenize: Makes rows of records.
        console: Where everything is shown.

    Raises:
        UserError: something given cannot be used, or the hub is needed and cannot be reached.
    """
    tokenizer, model = _described(config, "model.path", config.model.path, console)
    check_length(config, model)
    _check_base(config, console)
    data, held_out = load_data(config.records, tokenize, tokenizer, console)
    read_tasks(config.evaluation, tokenizer, model.max_position_embeddings, console, "evaluation.")
    show_data(data, console)
    batched = packed(config.data, data, console) if isinstance(config, SFTConfig) else data
    rows, batch = batched.rows_per_epoch, config.trainer.batch_size
    steps = count_steps(config.trainer, rows, config.steps_per_batch)
    batches = steps // config.steps_per_batch
    schedule = make_schedule(config.schedule, config.optimizer.learning_rate, steps)
    make_optimizer(config.optimizer, schedule, steps=steps)  # refuses what does not fit the run
    chosen = make_buckets(batched, batch, config.data.buckets, steps=batches)
    console.print(f"Batches: {chosen.describe(batched.arrays)}", highlight=False)
    show_examples(data, tokenizer, console)
    console.print(
        f"{steps} steps of {batch} rows, {batches * batch / rows:.2g} epochs; "
        f"{0 if held_out is None else len(held_out)} rows held out. Dry run: no weight was read, "
        "nothing was written.",
        highlight=False,
    )


def check_length(config: Config, model: ModelConfig) -> None:
    """Raises `UserError` when rows may be longer than the model's positions reach."""
    records, sampled = config.records, isinstance(config, OnlineDPOConfig | GRPOConfig)
    length = records.max_prompt_length + records.max_completion_length
    if length > model.max_position_embeddings:
        answers = "sampling.max_new_tokens" if sampled else "data.max_completion_length"
        raise UserError(
            f"data.max_prompt_length + {answers} is {length}, but the model has "
            f"{model.max_position_embeddings} positions."
        )


def _described(
    config: Config, name: str, path: str, console: Console
) -> tuple[PreTrainedTokenizerBase, ModelConfig]:
    """Tokenizer and configuration of a model; where the hub is missing, what can be said without."""
    try:
        return _tokenizer_and_config(name, path)
    except OSError as error:
        if Path(path).exists() or path.startswith((".", "/")):
            raise UserError(f"{name}: {error}") from error
        _show_records(config, console)
        raise _hub_is_needed(name, path, _HUB_FILES, error) from error


def _check_base(config: Config, console: Console) -> None:
    base = getattr(config.model, "base", None)
    if base is None:
        return
    if Path(base).is_dir() and Path(config.model.path).is_dir():
        check_related(base, config.model.path, "model.base")
    else:
        _described(config, "model.base", base, console)


def _tokenizer_and_config(name: str, path: str) -> tuple[PreTrainedTokenizerBase, ModelConfig]:
    """Of a directory or a hub name. Raises `OSError` where there are none."""
    from transformers import AutoTokenizer

    directory = Path(path)
    if not directory.is_dir():
        from huggingface_hub import hf_hub_download

        try:
            directory = Path(hf_hub_download(path, "config.json")).parent
        except Exception as error:  # hub, HTTP and socket errors have no common ancestor
            raise OSError(f"{type(error).__name__}: {error}") from error
    with blamed_on(name):
        model = ModelConfig.from_hf(read_hf_config(directory))
    return AutoTokenizer.from_pretrained(path), model


def _hub_is_needed(name: str, value: str, what: str, error: Exception) -> UserError:
    reason = str(error).strip().splitlines()[0]
    return UserError(
        f"{name}: the dry run ends here, because {value!r} is no directory here and the hub, which "
        f"has {what}, cannot be reached ({reason}). What is above was checked without it."
    )


def _show_records(config: Config, console: Console) -> None:
    """What can be said about the records without a tokenizer."""
    normalise = next(read for kind, read in _READERS.items() if isinstance(config, kind))
    for path in (config.data.path, *config.data.mix):
        with blamed_on("data.path" if path == config.data.path else f"data.mix: {path}"):
            records = read_records(path, config.data.split)
            unusable = sum(not _is_usable(record, normalise) for record in records)
        console.print(
            f"{path}: {len(records)} records, {unusable} of which cannot be used", highlight=False
        )


def _is_usable(record: Record, normalise: Any) -> bool:
    try:
        normalise(record)
    except UnusableRecord:
        return False
    return True


def show_data(data: TokenDataset, console: Console) -> None:
    """Prints tables of lengths and of what was left out.

    Args:
        data: Training rows.
        console: Where they are shown.
    """
    answers, arrays = answer_names(data.arrays), data.arrays
    counts = {name: arrays[f"{name}_mask"].sum(axis=1) for name in ("prompt", *answers)}
    counts["prompt and answers"] = np.sum(list(counts.values()), axis=0)
    table = Table(title=f"Tokens of {len(data)} training rows")
    for column in ("", "mean", *(f"{p} %" for p in _PERCENTILES), "largest", "all"):
        table.add_column(column, justify="right" if column else "left")
    for name, lengths in counts.items():
        figures = np.percentile(lengths, _PERCENTILES, method="higher")
        cells = [f"{lengths.mean():.1f}", *map(str, figures), str(lengths.max())]
        table.add_row(name, *cells, f"{lengths.sum():,}")
    console.print(table)
    report = data.report
    for title, rows in (
        ("Left out, by reason", report.dropped),
        (
            "Changed",
            {
                "prompts truncated": report.prompts_truncated,
                "answers truncated, without end token": report.completions_truncated,
                "prompts whose last token merges with the answer": report.boundaries_moved,
            },
        ),
    ):
        table = Table(title=title)
        table.add_column("")
        table.add_column("rows", justify="right")
        for name, count in rows.items():
            table.add_row(name, str(count))
        if rows:
            console.print(table)


def show_examples(data: TokenDataset, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    """Prints the first rows as the model sees them; what the loss counts is green."""
    answers, arrays = answer_names(data.arrays), data.arrays
    for row in range(min(EXAMPLES, len(data))):
        texts = []
        for name in ("prompt", *answers):
            tokens = arrays[f"{name}_tokens"][row][arrays[f"{name}_mask"][row]]
            learned = name != "prompt"
            style = "green" if learned else "dim"
            label = f"{name}, {len(tokens)} tokens{'' if learned else ', no loss'}\n"
            texts.append(Text.assemble((label, "bold"), (str(tokenizer.decode(tokens)), style)))
        console.print(Panel(Group(*texts), title=f"row {row}", title_align="left"))

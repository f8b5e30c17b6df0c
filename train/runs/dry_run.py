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
    TokenDataset,
    UnusableRecord,
    answer_names,
    normalise_preference,
    normalise_prompt,
    normalise_sft,
    normalise_unpaired,
    read_records,
)
from train.inputs.model import blamed_on, check_related, with_settings
from train.models import ModelConfig, read_hf_config
from train.runs.run import Config, Run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_READERS: dict[type, Callable[..., Any]] = {
    SFTConfig: normalise_sft,
    DPOConfig: normalise_preference,
    KTOConfig: normalise_unpaired,
    OnlineDPOConfig: normalise_prompt,
    GRPOConfig: normalise_prompt,
}

_EXAMPLES = 2  # rows that are shown whole
_PERCENTILES = (50, 90, 99)


def describe_models(config: Config, console: Console) -> tuple[ModelConfig, Any]:
    """Reads the model's configuration and its tokenizer, without a look at its weights.

    Raises `UserError` where a model cannot be used, or where the hub is needed and cannot be reached;
    what can be said about the records without it is shown before that.
    """
    model, tokenizer = _described(config, "model.path", config.model.path, console)
    base = getattr(config.model, "base", None)
    if base is not None and Path(base).is_dir() and Path(config.model.path).is_dir():
        check_related(base, config.model.path, "model.base")
    elif base is not None:
        _described(config, "model.base", base, console)
    return with_settings(model, config.model), tokenizer


def _described(
    config: Config, name: str, path: str, console: Console
) -> tuple[ModelConfig, PreTrainedTokenizerBase]:
    """Reads configuration and tokenizer; nothing else is fetched of a hub name."""
    from transformers import AutoTokenizer

    try:
        directory = Path(path) if Path(path).is_dir() else _fetched_config(path)
        with blamed_on(name):
            model = ModelConfig.from_hf(read_hf_config(directory))
        return model, AutoTokenizer.from_pretrained(path)
    except OSError as error:
        if Path(path).exists() or path.startswith((".", "/")):
            raise UserError(f"{name}: {error}") from error
        _show_records(config, console)
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name}: the dry run ends here, because {path!r} is no directory here and the hub, which "
            f"has its tokenizer and config.json, cannot be reached ({reason}). What is above was "
            "checked without it."
        ) from error


def _fetched_config(hub_name: str) -> Path:
    """Fetches ``config.json`` from the hub and returns its directory. Raises `OSError`."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(hub_name, "config.json")).parent
    except Exception as error:  # hub, HTTP and socket errors have no common ancestor
        raise OSError(f"{type(error).__name__}: {error}") from error


def _show_records(config: Config, console: Console) -> None:
    """Shows what can be said about the records without a tokenizer."""
    normalise = _READERS[type(config)]
    for path in (config.data.path, *config.data.mix):
        unusable = 0
        with blamed_on("data.path" if path == config.data.path else f"data.mix: {path}"):
            records = read_records(path, config.data.split)
            for record in records:
                try:
                    normalise(record)
                except UnusableRecord:
                    unusable += 1
        console.print(
            f"{path}: {len(records)} records, {unusable} of which cannot be used", highlight=False
        )


def show_run(run: Run, examples: TokenDataset) -> None:
    """Prints the batches of a run, its first examples with their loss masks, and its length."""
    size, rows = run.config.trainer.batch_size, run.data.rows_per_epoch
    run.show_buckets()
    show_examples(examples, run.tokenizer, run.console)
    run.console.print(
        f"{run.steps} steps of {size} rows, {run.batches * size / rows:.2g} epochs; "
        f"{0 if run.held_out is None else len(run.held_out)} rows held out. Dry run: no weight "
        "was read, nothing was written.",
        highlight=False,
    )


def show_data(data: TokenDataset, console: Console) -> None:
    """Prints tables of the lengths of training rows, and of what was left out."""
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
    changed = {
        "prompts truncated": report.prompts_truncated,
        "answers truncated, without end token": report.completions_truncated,
        "prompts whose last token merges with the answer": report.boundaries_moved,
    }
    for title, rows in (("Left out, by reason", report.dropped), ("Changed", changed)):
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
    for row in range(min(_EXAMPLES, len(data))):
        texts = []
        for name in ("prompt", *answers):
            tokens = arrays[f"{name}_tokens"][row][arrays[f"{name}_mask"][row]]
            learned = name != "prompt"
            style = "green" if learned else "dim"
            label = f"{name}, {len(tokens)} tokens{'' if learned else ', no loss'}\n"
            texts.append(Text.assemble((label, "bold"), (str(tokenizer.decode(tokens)), style)))
        console.print(Panel(Group(*texts), title=f"row {row}", title_align="left"))

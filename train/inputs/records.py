"""Reads, splits, tokenises and packs the records of a run."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from train.config import DataOptions, RecordOptions, SFTDataOptions, UserError
from train.data import (
    Record,
    TokenDataset,
    answer_names,
    mix,
    pack,
    padding_share,
    read_records,
    saves_by_sharing,
    split_by_prompt,
)
from train.data.formats import SUFFIXES
from train.inputs.model import blamed_on

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokenize = Callable[..., TokenDataset]


def load_data(
    options: DataOptions,
    tokenize: Tokenize,
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
) -> tuple[TokenDataset, TokenDataset | None]:
    """The training rows of a run, and the held-out ones if any; the console says what was dropped.

    Raises `UserError` where a file is missing, a line is broken, a record cannot be used as it is, or
    the records to evaluate on are those to train on.
    """
    eval_split = options.eval_split or "test"
    _check_apart(options, eval_split)
    parts: list[TokenDataset] = []
    evaluations: list[TokenDataset] = []
    for path in (options.path, *options.mix):
        name = "data.path" if path == options.path else f"data.mix: {path}"
        source = dataclasses.replace(options, path=path)
        records, held_out = split_records(source, name)
        parts.append(tokenized(records, source, name, tokenize, tokenizer))
        if options.mix:
            console.print(f"{path}: {parts[-1].report}", highlight=False)
        if held_out is not None:
            evaluations.append(tokenized(held_out, source, name, tokenize, tokenizer))
    if options.eval_path is not None:
        with blamed_on("data.eval_path"):
            held_out = read_records(options.eval_path, eval_split)
        evaluations.append(tokenized(held_out, options, "data.eval_path", tokenize, tokenizer))
    with blamed_on("data.mix"):
        train = _together(parts, [1.0, *options.mix.values()], options)
    console.print(f"Training records: {train.report}", highlight=False)
    if not evaluations:
        return train, None
    evaluation = _together(evaluations, [1.0] * len(evaluations), options)
    console.print(f"Held-out records: {evaluation.report}", highlight=False)
    return train, evaluation


def _check_apart(options: DataOptions, eval_split: str) -> None:
    """Raises `UserError` where what is evaluated on is trained on: one file, or one split."""
    held_out = options.eval_path
    if held_out is None:
        return
    is_file = held_out.endswith(SUFFIXES)
    for path in (options.path, *options.mix):
        if is_file and Path(path).resolve() == Path(held_out).resolve():
            raise UserError(
                f"data.eval_path: {path!r} is trained on; give another file, or data.eval_fraction "
                "to hold out a share of it."
            )
        if not is_file and path == held_out and _share_rows(options.split, eval_split):
            raise UserError(
                f"data.eval_path: the split {options.split!r} of {path!r} is trained on, and "
                f"data.eval_split is {eval_split!r}; give another split."
            )


def _share_rows(split: str, other: str) -> bool:
    """Whether two splits surely share rows, as "train" does with "train[:5%]" and "train+test"."""
    pairs = itertools.product(split.split("+"), other.split("+"))
    return any(a == b or a == b.split("[")[0] or b == a.split("[")[0] for a, b in pairs)


def packed(options: SFTDataOptions, data: TokenDataset, console: Console) -> TokenDataset:
    """The examples, several to a row where `options` ask for it. Raises `UserError` for long ones."""
    if not options.packing:
        return data
    length = options.packed_length
    if length is None:
        length = options.max_prompt_length + options.max_completion_length
    with blamed_on("data.packed_length"):
        rows = pack(data, length)
    console.print(
        f"Packed: {len(data)} examples in {len(rows)} rows of {length} tokens, padding "
        f"{padding_share(rows.arrays):.1%}",
        highlight=False,
    )
    return rows


def _together(
    parts: Sequence[TokenDataset], weights: Sequence[float], options: RecordOptions
) -> TokenDataset:
    dataset = parts[0] if len(parts) == 1 else mix(parts, weights)
    return sharing_prompts(dataset, options)


def sharing_prompts(dataset: TokenDataset, options: RecordOptions) -> TokenDataset:
    """The data set with prompts computed once for both answers where `options` ask for it."""
    wanted = options.prefix_sharing
    if wanted is True and answer_names(dataset.arrays) != ["chosen", "rejected"]:
        raise UserError(
            "data.prefix_sharing is true, but these records have one answer each; unset it."
        )
    shares = saves_by_sharing(dataset.arrays) if wanted == "auto" else wanted
    return dataclasses.replace(dataset, share_prompts=shares)


def split_records(
    options: RecordOptions, name: str
) -> tuple[Sequence[Record], Sequence[Record] | None]:
    """The records of a file, and those held out of it, if any.

    Raises `UserError` with the field `name` where the file is missing or broken, or a side is empty.
    """
    with blamed_on(name):
        records = read_records(options.path, options.split)
        if options.eval_fraction is None:
            return records, None
        return split_by_prompt(records, options.eval_fraction, options.split_seed)


def tokenized(
    records: Sequence[Record],
    options: RecordOptions,
    name: str,
    tokenize: Tokenize,
    tokenizer: PreTrainedTokenizerBase,
) -> TokenDataset:
    """Rows of tokens. Raises `UserError`, naming the field `name` that the records are from."""
    with blamed_on(name):
        return tokenize(
            records,
            tokenizer,
            max_prompt_length=options.max_prompt_length,
            max_completion_length=options.max_completion_length,
            template=options.template,
            truncation=options.truncation,
        )

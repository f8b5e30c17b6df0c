"""What the readers of task files share: filling in format strings, and what is checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from train.config import GenerationTaskOptions, TaskOptions, UserError
from train.data.formats import where_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_template(
    options: TaskOptions | GenerationTaskOptions, tokenizer: PreTrainedTokenizerBase, field: str
) -> None:
    """Raises `UserError` where a task wants a chat template and the tokenizer has none."""
    if options.chat_template and not tokenizer.chat_template:
        raise UserError(
            f"{field}.chat_template is true, but the model's tokenizer has none, as those of base "
            "models; set it to false, and the prompts are plain text."
        )


def check_lengths(lengths: Mapping[str, int], longest: int, field: str) -> None:
    """Raises `UserError` where records, by place, take more positions than a model was made for."""
    beyond = sum(length > longest for length in lengths.values())
    if beyond:
        where = max(lengths, key=lengths.__getitem__)
        raise UserError(
            f"{field}: {beyond} of {len(lengths)} records need more than the model's {longest} "
            f"positions, most of all {where}, {lengths[where]} tokens with its answer; shorten the "
            "prompt or the answers, or leave these records out of the file."
        )


def filled(template: str, record: Mapping[str, Any], field: str) -> str:
    """A format string over a record's fields; raises `UserError` where it does not fit or is empty."""
    try:
        text = template.format_map(record)
    except (KeyError, ValueError, IndexError, AttributeError, TypeError) as error:
        raise UserError(
            f"{field}: {template!r} cannot be filled from {where_of(record)}, which has the "
            f"fields {', '.join(record)} ({type(error).__name__}: {error})."
        ) from error
    if not text.strip():
        raise UserError(f"{field}: {template!r} is empty for {where_of(record)}.")
    return text

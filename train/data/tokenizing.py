"""Tokenise whole data sets into padded arrays of one width."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from train.data.dataset import Lengths, TokenDataset, TokenReport
from train.data.formats import DataError, where_of
from train.data.padding import pad_rows, round_up
from train.data.records import (
    UnusableRecord,
    normalise_preference,
    normalise_prompt,
    normalise_sft,
    normalise_unpaired,
    prompt_of,
)
from train.data.templates import Encoded, Encoder, Row, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Truncation = Literal["keep_end", "keep_start"]


ERRORS_SHOWN = 5  # malformed records that an error lists before it only counts


@dataclass(frozen=True)
class Limits:
    """Keyword arguments of all tokenisers; raises `DataError` where a value is out of range.

    The lengths are the largest numbers of tokens, the end token included. `template` is `"auto"` or
    `"chat"`, see `train.data.templates.Encoder`. `truncation` says what stays of a long prompt:
    `"keep_end"`, the last turns, or `"keep_start"`.
    """

    max_prompt_length: int
    max_completion_length: int
    template: Template = "auto"
    truncation: Truncation = "keep_end"

    def __post_init__(self) -> None:
        for name in ("max_prompt_length", "max_completion_length"):
            limit = getattr(self, name)
            if limit < 1:
                raise DataError(f"{name} must be at least 1, got {limit}.")
        if self.truncation not in get_args(Truncation):
            raise DataError(f"truncation must be keep_end or keep_start, got {self.truncation!r}.")


def tokenize_preference(
    records: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, **limits: Any
) -> TokenDataset:
    """Tokenise preferences in the formats of `train.data.records`, within `Limits`.

    Prompts longer than their limit lose tokens on the left (BOS stays) or on the right, completions
    on the right, and with those their end token: a model must not learn to stop in the middle of a
    sentence. No answer loses tokens to a long prompt, as TRL's `max_length` takes them.

    Returns:
      Columns `prompt_…`, `chosen_…`, `rejected_…` and `index`. Widths are those of the longest row,
      so a step compiles once for the whole data set. Records that cannot be used are counted in
      the report by reason.

    Raises:
      DataError: When records are malformed (the first few are listed), none is usable, or a limit
        is not positive.
    """

    def rows(record: Mapping[str, Any]) -> list[Row]:
        pair = normalise_preference(record)
        return [Row(pair.prompt, (pair.chosen, pair.rejected), where_of(record))]

    return _tokenize(records, rows, ("chosen", "rejected"), tokenizer, Limits(**limits))


def tokenize_sft(
    records: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, **limits: Any
) -> TokenDataset:
    """Tokenise SFT examples as `tokenize_preference` does; columns `prompt_…` and `completion_…`."""

    def rows(record: Mapping[str, Any]) -> list[Row]:
        example = normalise_sft(record)
        return [Row(example.prompt, (example.completion,), where_of(record))]

    return _tokenize(records, rows, ("completion",), tokenizer, Limits(**limits))


def tokenize_unpaired(
    records: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, **limits: Any
) -> TokenDataset:
    """Tokenise labelled answers as `tokenize_sft` does, with a column `label`, bool `[rows]`.

    A preference pair gives two rows, the chosen answer's first.
    """

    def rows(record: Mapping[str, Any]) -> list[Row]:
        where = where_of(record)
        found = normalise_unpaired(record)
        return [Row(one.prompt, (one.completion,), where, one.label) for one in found]

    return _tokenize(records, rows, ("completion",), tokenizer, Limits(**limits))


def tokenize_prompts(
    records: Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, **limits: Any
) -> TokenDataset:
    """Tokenise prompts to sample answers to, with the records in a column `record`, dtype object.

    Answers in the records are ignored, and `max_completion_length` is the room for those to come.
    """

    def rows(record: Mapping[str, Any]) -> list[Row]:
        return [Row(normalise_prompt(record), (), where_of(record), record=record)]

    return _tokenize(records, rows, (), tokenizer, Limits(**limits))


def encode_prompts(
    records: Sequence[Mapping[str, Any]], tokenizer: Any, *, chat_template: bool
) -> list[list[int]]:
    """Token ids of every record's field `prompt`, ready to be continued.

    With `chat_template` a prompt that is text becomes a user turn. Raises `DataError` where a record
    has no prompt, or one that cannot be used.
    """
    rows = [Row(prompt_of(record), (), where_of(record)) for record in records]
    encoded = Encoder(tokenizer, "chat" if chat_template else "auto").encode(rows)
    prompts = []
    for row, found in zip(rows, encoded, strict=True):
        if isinstance(found, UnusableRecord):
            raise DataError(f"{row.where}: {found}.")
        prompts.append(found.prompt)
    return prompts


def _tokenize(
    records: Sequence[Mapping[str, Any]],
    rows_of: Callable[[Mapping[str, Any]], list[Row]],
    names: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
) -> TokenDataset:
    """The rows of all records, with a column of answers for every name."""
    encoder = Encoder(tokenizer, limits.template)
    dropped: Counter[str] = Counter()
    rows = _normalised(records, rows_of, dropped)
    fitted, sources = [], []
    for source, encoded in zip(rows, encoder.encode(rows), strict=True):
        one = encoded if isinstance(encoded, UnusableRecord) else _fit(encoded, limits, encoder)
        if isinstance(one, UnusableRecord):
            dropped[str(one)] += 1
        else:
            fitted.append(one)
            sources.append(source)
    if not fitted:
        reasons = "; ".join(f"{count}: {reason}" for reason, count in dropped.items())
        raise DataError(f"None of {len(records)} records can be used ({reasons}).")
    arrays = _columns(fitted, names, limits, encoder)
    if sources[0].label is not None:
        arrays["label"] = np.array([source.label for source in sources], bool)
    if sources[0].record is not None:
        arrays["record"] = np.empty(len(sources), object)
        arrays["record"][:] = [source.record for source in sources]
    answer_masks = [arrays[f"{name}_mask"] for name in names]
    report = TokenReport(
        records=len(records),
        rows=len(fitted),
        dropped=dict(dropped),
        prompts_truncated=sum(row.prompt_cut for row in fitted),
        completions_truncated=sum(row.answers_cut for row in fitted),
        boundaries_moved=sum(row.moved for row in fitted),
        prompts=Lengths.of(arrays["prompt_mask"]),
        completions=Lengths.of(np.concatenate(answer_masks)) if names else Lengths(0.0, 0),
    )
    return TokenDataset(arrays, report)


def _normalised(
    records: Sequence[Mapping[str, Any]],
    rows_of: Callable[[Mapping[str, Any]], list[Row]],
    dropped: Counter[str],
) -> list[Row]:
    """All rows that can be used; malformed records are collected and raised together."""
    rows, errors = [], []
    for record in records:
        try:
            rows += rows_of(record)
        except UnusableRecord as reason:
            dropped[str(reason)] += 1
        except DataError as error:
            errors.append(str(error))
    if errors:
        more = len(errors) - ERRORS_SHOWN
        shown = errors[:ERRORS_SHOWN] + ([f"... and {more} more."] if more > 0 else [])
        raise DataError("\n".join(shown))
    return rows


@dataclass(frozen=True)
class _Fitted:
    """An encoded row cut to the limits, and which of its parts lost tokens."""

    prompt: list[int]
    answers: list[list[int]]
    prompt_cut: bool
    answers_cut: int
    moved: bool


def _fit(encoded: Encoded, limits: Limits, encoder: Encoder) -> _Fitted | UnusableRecord:
    """The row cut to the limits, or why it cannot be trained on then."""
    prompt, longest_prompt = encoded.prompt, limits.max_prompt_length
    longest_answer = limits.max_completion_length
    prompt_cut = len(prompt) > longest_prompt
    if prompt_cut and limits.truncation == "keep_start":
        prompt = prompt[:longest_prompt]
    elif prompt_cut:
        start = prompt[:1] if prompt[0] == encoder.bos_id and longest_prompt > 1 else []
        prompt = start + prompt[len(prompt) - longest_prompt + len(start) :]
    answers = [answer[:longest_answer] for answer in encoded.answers]
    if len(answers) == 2 and answers[0] == answers[1]:
        return UnusableRecord("chosen and rejected are the same tokens within the limit")
    answers_cut = sum(len(answer) > longest_answer for answer in encoded.answers)
    return _Fitted(prompt, answers, prompt_cut, answers_cut, encoded.moved)


def _columns(
    rows: list[_Fitted], names: tuple[str, ...], limits: Limits, encoder: Encoder
) -> dict[str, np.ndarray]:
    """Every column, padded to the width of the longest row, or to the limit if that is less."""
    arrays: dict[str, np.ndarray] = {}
    prompts = [row.prompt for row in rows]
    width = min(limits.max_prompt_length, round_up(max(map(len, prompts))))
    arrays["prompt_tokens"], arrays["prompt_mask"] = pad_rows(
        prompts, width, encoder.pad_id, left=True
    )
    longest = max((len(answer) for row in rows for answer in row.answers), default=0)
    width = min(limits.max_completion_length, round_up(longest))
    for number, name in enumerate(names):
        arrays[f"{name}_tokens"], arrays[f"{name}_mask"] = pad_rows(
            [row.answers[number] for row in rows], width, encoder.pad_id
        )
    arrays["index"] = np.arange(len(rows), dtype=np.int32)
    return arrays

"""The shape of a batch: columns cut to what its rows need, prompts shared by the answers of a pair.

A pair's prompt need not be computed once for each answer (Wang and Hegde, 2024, "Accelerating Direct
Preference Optimization with Prefix Sharing", arXiv:2410.20305). Here prompt, chosen and rejected
answer follow each other without a gap in one row, `[prompt | chosen | rejected | padding]`, and an
attention mask keeps the rejected answer from seeing the chosen one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

Columns = Mapping[str, np.ndarray]


class RowLengths(NamedTuple):
    """Real tokens of every row: the prompt, the longest answer, all answers; each int `[rows]`."""

    prompt: np.ndarray
    answer: np.ndarray
    scored: np.ndarray

    def widths(self, rows: np.ndarray, rounded: Callable[[int], int]) -> Widths:
        """The columns that a batch of these rows (numbers or a mask) needs, each rounded up."""
        counts = (self.prompt, self.answer, self.prompt + self.scored, self.scored)
        return Widths(*(rounded(int(count[rows].max())) for count in counts))


class Widths(NamedTuple):
    """Columns of a batch.

    Where answers share their prompt, `joined` is the width of a prompt with all its answers, and
    `scored` that of all answers together.
    """

    prompt: int
    answer: int
    joined: int
    scored: int


def answer_names(columns: Columns) -> list[str]:
    """The answers in a set of columns, such as `["chosen", "rejected"]`."""
    masks = [name for name in columns if name.endswith("_mask") and name != "prompt_mask"]
    return [name.removesuffix("_mask") for name in masks]


def is_packed(columns: Mapping[str, object]) -> bool:
    """Whether rows hold several examples, see `train.data.packing.pack`."""
    return "packed_parts" in columns


def row_lengths(columns: Columns) -> RowLengths:
    """Counts the real tokens of every row; prompts alone have answers of no token."""
    prompt = columns["prompt_mask"].sum(axis=1)
    names = answer_names(columns)
    answers = [columns[f"{name}_mask"].sum(axis=1) for name in names] or [np.zeros_like(prompt)]
    return RowLengths(prompt, np.max(answers, axis=0), np.sum(answers, axis=0))


def trim(batch: Columns, widths: Widths) -> dict[str, np.ndarray]:
    """Cuts padding off, of prompts on the left, of answers on the right.

    `widths` must fit every row; columns that are narrower stay whole.
    """
    cut = dict(batch)
    for name, column in batch.items():
        if name in ("prompt_tokens", "prompt_mask"):
            cut[name] = column[:, -widths.prompt :]
        elif name.endswith(("_tokens", "_mask")):
            cut[name] = column[:, : widths.answer]
    return cut


def share_prompt(batch: Columns, widths: Widths) -> dict[str, np.ndarray]:
    """Adds to a preference batch the rows in which both answers follow one copy of their prompt.

    The new columns are `joined_ids` int32 `[B, joined]`; `joined_parts` int32 `[B, joined]`, 0 in
    the prompt, 1 and 2 in the answers, -1 at padding; `scored_ids` int32 `[B, scored]`, the tokens
    of both answers; and `scored_from` int32 `[B, scored]`, the place in `joined_ids` whose hidden
    state predicts each of them. `widths` must fit every row.
    """
    names = ("prompt", "chosen", "rejected")
    tokens = np.concatenate([batch[f"{name}_tokens"] for name in names], axis=1)
    mask = np.concatenate([batch[f"{name}_mask"] for name in names], axis=1)
    parts = np.repeat(np.arange(3), [batch[f"{name}_mask"].shape[1] for name in names])
    rows, columns = np.nonzero(mask)
    places = (np.cumsum(mask, axis=1) - 1)[rows, columns]
    joined = np.zeros((len(mask), widths.joined), np.int32)
    joined_parts = np.full_like(joined, -1)
    joined[rows, places] = tokens[rows, columns]
    joined_parts[rows, places] = parts[columns]

    prompt, chosen, rejected = (batch[f"{name}_mask"].sum(axis=1)[:, None] for name in names)
    number = np.arange(widths.scored)
    real = number < chosen + rejected
    targets = np.where(real, prompt + number, 0)
    # The first token of either answer is predicted at the end of the prompt.
    sources = np.where(number == chosen, prompt - 1, prompt - 1 + number)
    return {
        **batch,
        "joined_ids": joined,
        "joined_parts": joined_parts,
        "scored_ids": np.take_along_axis(joined, targets, axis=1),
        "scored_from": np.where(real, sources, 0).astype(np.int32),
    }


def padding_share(batch: Columns) -> float:
    """Share of padding among the positions that the model computes for a batch; may be traced."""
    for name in ("joined_parts", "packed_parts"):
        if name in batch:
            return (batch[name] < 0).mean()
    names = answer_names(batch)
    real = len(names) * batch["prompt_mask"].sum()
    positions = len(names) * batch["prompt_mask"].size
    for name in names:
        real += batch[f"{name}_mask"].sum()
        positions += batch[f"{name}_mask"].size
    return 1 - real / positions

"""Several examples in one row, so that little padding is left.

An example stays whole and sees nothing of the others in its row (`train.objectives.packed_logps`).
Which examples share a row is decided once, by best-fit decreasing as TRL's
`packing_strategy="bfd"`: the longest first, each into the row with the least room that still has
enough.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence

import numpy as np

from train.data.dataset import TokenDataset
from train.data.layout import row_lengths
from train.data.padding import round_up


def best_fit_decreasing(lengths: Sequence[int] | np.ndarray, size: int) -> list[list[int]]:
    """Divides examples among as few rows as this rule finds.

    Args:
      lengths: Tokens of every example.
      size: Tokens that a row holds at most.

    Returns:
      Numbers of the examples in every row.

    Raises:
      ValueError: An example is longer than a row.

    Example:
      >>> best_fit_decreasing([3, 5, 2, 6], size=8)
      [[3, 2], [1, 0]]
    """
    lengths = np.asarray(lengths)
    if len(lengths) and lengths.max() > size:
        raise ValueError(f"an example has {lengths.max()} tokens, and a row holds {size}")
    rows: list[list[int]] = []
    spaces: list[int] = []  # those of rows that are not full, growing, each once
    rows_with: dict[int, deque[int]] = {}
    for example in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[example])
        place = bisect_left(spaces, length)
        if place == len(spaces):
            row, space = len(rows), size
            rows.append([])
        else:
            space = spaces[place]
            row = rows_with[space].popleft()
            if not rows_with[space]:
                del rows_with[space], spaces[place]
        rows[row].append(example)
        space -= length
        if space not in rows_with:
            rows_with[space] = deque()
            insort(spaces, space)
        rows_with[space].append(row)
    return rows


def pack(dataset: TokenDataset, length: int) -> TokenDataset:
    """Rows that hold several examples each; the parts of a mixture are packed apart.

    Args:
      dataset: SFT examples: `prompt_…` and `completion_…` tokens and masks.
      length: Tokens that a row holds at most.

    Returns:
      Columns `packed_ids` int32 `[rows, L]`, the examples of a row one after the other, padding at
      the end; `packed_parts` int32 `[rows, L]`, the number of the example in its row, -1 at padding;
      `packed_from` int32 `[rows, S]`, the places whose hidden state predicts a token of an answer,
      -1 at padding; and `index`. The report stays that of the examples.

    Raises:
      ValueError: An example is longer than a row.
    """
    lengths = row_lengths(dataset.arrays)
    total = lengths.prompt + lengths.answer
    rows: list[list[int]] = []
    parts, start = [], 0
    for count, drawn in dataset.parts or ((len(dataset), len(dataset)),):
        found = best_fit_decreasing(total[start : start + count], length)
        rows += [[start + number for number in row] for row in found]
        parts.append((len(found), max(1, round(drawn * len(found) / count))))
        start += count
    return dataclasses.replace(
        dataset,
        arrays={**_columns(dataset, rows), "index": np.arange(len(rows), dtype=np.int32)},
        parts=tuple(parts) if dataset.parts else (),
    )


def _columns(dataset: TokenDataset, rows: list[list[int]]) -> dict[str, np.ndarray]:
    arrays = dataset.arrays
    order = np.concatenate(rows)
    prompts = arrays["prompt_mask"][order].sum(axis=1)
    lengths = prompts + arrays["completion_mask"][order].sum(axis=1)
    mask = np.concatenate([arrays["prompt_mask"], arrays["completion_mask"]], axis=1)[order]
    tokens = np.concatenate([arrays["prompt_tokens"], arrays["completion_tokens"]], axis=1)[order]
    # Of every example: its row, its number there and where it starts.
    row = np.repeat(np.arange(len(rows)), list(map(len, rows)))
    part, start = np.arange(len(order)) - _first(row), np.cumsum(lengths) - lengths
    start -= start[_first(row)]
    # Of every token: its example and its place in it.
    example = np.repeat(np.arange(len(order)), lengths)
    inside = np.arange(len(example)) - _first(example)
    place = start[example] + inside
    ids = np.zeros((len(rows), round_up(int(place.max()) + 1)), np.int32)
    parts = np.full_like(ids, -1)
    ids[row[example], place] = tokens[mask]
    parts[row[example], place] = part[example]
    scored = inside >= prompts[example]
    scored_row = row[example][scored]
    number = np.arange(len(scored_row)) - _first(scored_row)
    places = np.full((len(rows), round_up(int(number.max()) + 1)), -1, np.int32)
    places[scored_row, number] = place[scored] - 1
    return {"packed_ids": ids, "packed_parts": parts, "packed_from": places}


def _first(groups: np.ndarray) -> np.ndarray:
    """For every entry, where the run of equal ones that it is in begins."""
    return np.searchsorted(groups, groups, side="left")

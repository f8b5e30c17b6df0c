"""Several examples in one row, so that little padding is left.

An example stays whole and sees nothing of the others in its row (`train.objectives.sft`).
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
from train.data.padding import pad_rows, round_up


def best_fit_decreasing(lengths: Sequence[int] | np.ndarray, size: int) -> list[list[int]]:
    """The numbers of the examples in every row of at most `size` tokens.

    Raises `ValueError` where an example is longer than a row.

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
    """Packs SFT examples into rows of at most `length` tokens, each part of a mixture by itself.

    The columns are `packed_ids` int32 `[rows, L]`, the examples of a row one after the other, padding
    at the end; `packed_parts` int32 `[rows, L]`, the number of the example in its row, -1 at padding;
    `packed_from` int32 `[rows, S]`, the places whose hidden state predicts a token of an answer, -1
    at padding; and `index`. The report stays that of the examples. Raises `ValueError` where an
    example is longer than a row.
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
    """The examples of every row one after the other, and which place predicts which token."""
    arrays = dataset.arrays
    mask = np.concatenate([arrays["prompt_mask"], arrays["completion_mask"]], axis=1)
    tokens = np.concatenate([arrays["prompt_tokens"], arrays["completion_tokens"]], axis=1)
    prompts, lengths = arrays["prompt_mask"].sum(axis=1), mask.sum(axis=1)
    ids, parts, sources = [], [], []
    for row in rows:
        ends = np.cumsum(lengths[row])
        # The first token of an answer is predicted where its prompt ends.
        first = ends - lengths[row] + prompts[row] - 1
        ids.append(np.concatenate([tokens[example][mask[example]] for example in row]))
        parts.append(np.repeat(np.arange(len(row)), lengths[row]))
        sources.append(np.concatenate(list(map(np.arange, first, ends - 1))))
    width, scored = (round_up(max(map(len, column))) for column in (ids, sources))
    return {
        "packed_ids": pad_rows(ids, width, 0)[0],
        "packed_parts": pad_rows(parts, width, -1)[0],
        "packed_from": pad_rows(sources, scored, -1)[0],
    }

"""How wide arrays of tokens are, and how rows of tokens are padded to that width.

Every width is a separate compilation, so widths are rounded up. Buckets bound the number of widths in
training, so a multiple of 8 is enough (`round_up`). Elsewhere at most two widths per power of two are
used (`padded_width`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from rich.progress import track

WIDTH_MULTIPLE = 8  # of the widths of data sets, packed rows and buckets
BATCH_WIDTH = 32
"""Minimum width when scoring or generating; narrower shapes are not worth a compilation."""


def round_up(length: int, multiple: int = WIDTH_MULTIPLE) -> int:
    """The next multiple that is not below `length`."""
    return -(-length // multiple) * multiple


def padded_width(length: int, least: int = 8) -> int:
    """The next of 8, 12, 16, 24, 32, 48, 64, 96 … that is below neither `length` nor `least`.

    Example:
      >>> [padded_width(length) for length in (1, 9, 13, 17, 33, 97)]
      [8, 12, 16, 24, 48, 128]
    """
    length = max(length, least)
    # From one power of two to the next there are two steps of half the smaller one.
    return round_up(length, 2 ** ((length - 1).bit_length() - 2))


def pad_rows(
    rows: Sequence[Sequence[int] | np.ndarray], width: int, pad_id: int, *, left: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens int32 and mask bool `[rows, width]`, the padding on the right, or on the `left`.

    Example:
      >>> pad_rows([[5, 6], [7]], 3, 0, left=True)[0].tolist()
      [[0, 5, 6], [0, 0, 7]]
    """
    tokens = np.full((len(rows), width), pad_id, np.int32)
    mask = np.zeros((len(rows), width), bool)
    for number, row in enumerate(rows):
        start = width - len(row) if left else 0
        tokens[number, start : start + len(row)] = row
        mask[number, start : start + len(row)] = True
    return tokens, mask


def pad_prompts(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompts padded on the left; the width is rounded up to one of a few, to limit compilations."""
    width = padded_width(max(map(len, prompts)), BATCH_WIDTH)
    return pad_rows(prompts, width, pad_id, left=True)


def batches_by_length(
    lengths: Sequence[int] | np.ndarray, batch_size: int, shown_as: str = ""
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Goes through all rows once, those of similar length together.

    Yields (row indices, the same indices padded to `batch_size` by repeating the first). The row
    indices are int `[n]` with `n <= batch_size`. `shown_as` is the label of a progress bar; there is no
    progress bar without a label.

    Example:
      >>> [filled.tolist() for _, filled in batches_by_length([3, 1, 2], 2)]
      [[1, 2], [0, 0]]
    """
    order = np.argsort(lengths, kind="stable")
    starts = range(0, len(order), batch_size)
    for start in track(starts, description=shown_as, disable=not shown_as):
        rows = order[start : start + batch_size]
        yield rows, np.pad(rows, (0, batch_size - len(rows)), constant_values=rows[0])

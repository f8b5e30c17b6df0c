"""Rows of similar length together: a few shapes of batches, chosen so that little padding is left.

Every row belongs to one bucket. Buckets are ranges of the row's total length, each divided once more
by the length of what is scored, because the products with the vocabulary, often the largest part of
a step, are computed for scored positions alone. The bounds are those that minimise padding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from train.data.dataset import TokenDataset
from train.data.layout import (
    Columns,
    Widths,
    answer_names,
    is_packed,
    padding_share,
    row_lengths,
    share_prompt,
    trim,
)
from train.data.padding import round_up

SCORED_PARTS = 2  # buckets that a range of total lengths is divided into
MAX_BUCKETS = 16  # where the settings give no number and there are enough batches
BATCHES_PER_BUCKET = 16  # of a run or an epoch: every shape costs a compilation
LEAST_SHARED = 0.1  # share of the tokens of all pairs that computing prompts once must save


@dataclass(frozen=True)
class Buckets:
    """Which rows are batched together, and the shapes of their batches.

    `of_row` is the bucket of every row, int `[rows]`. `widths` are those of each bucket, by growing
    length; the last ones fit every row. `batch_size` counts the rows of all processes.
    """

    of_row: np.ndarray
    widths: tuple[Widths, ...]
    share_prompts: bool
    batch_size: int

    def group(self, rows: np.ndarray) -> np.ndarray:
        """Groups numbers of rows into batches of one bucket: int `[batches, batch_size]`.

        Within a bucket their order is kept; a batch at the border of two buckets has rows of both.
        The last rows that fill no batch are left out.
        """
        rows = rows[: len(rows) // self.batch_size * self.batch_size]
        return rows[np.argsort(self.of_row[rows], kind="stable")].reshape(-1, self.batch_size)

    def widths_of(self, rows: np.ndarray) -> Widths:
        """The shape of a batch: its bucket's, or the first that fits rows of several buckets."""
        needed = np.max([self.widths[bucket] for bucket in np.unique(self.of_row[rows])], axis=0)
        return next(one for one in self.widths if (np.array(one) >= needed).all())

    def padding_share(self, columns: Columns) -> float:
        """Share of padding among the positions computed in an epoch of a data set's columns."""
        if is_packed(columns):
            return padding_share(columns)
        lengths, answers = row_lengths(columns), max(1, len(answer_names(columns)))
        copies = 1 if self.share_prompts else answers
        batches = self.group(np.arange(len(self.of_row)))
        real = (copies * lengths.prompt + lengths.scored)[batches].sum()
        widths = [self.widths_of(rows) for rows in batches]
        positions = [
            one.joined if self.share_prompts else answers * (one.prompt + one.answer)
            for one in widths
        ]
        return float(1 - real / (self.batch_size * sum(positions)))

    def describe(self, columns: Columns) -> str:
        """The number of shapes, the padding, and how prompts are computed, as a line for the log."""
        count = int(self.of_row.max()) + 1
        shapes = "one shape" if count == 1 else f"{count} shapes by length"
        text = f"{shapes}, padding {self.padding_share(columns):.0%}"
        if len(answer_names(columns)) > 1:
            once = "once for both answers" if self.share_prompts else "for each answer"
            text += f", prompts computed {once}"
        return text

    def shape(self, batch: Columns, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Cuts a batch, or a process's share of it, to the shape that all its `rows` need."""
        widths = self.widths_of(rows)
        cut = trim(batch, widths)
        return share_prompt(cut, widths) if self.share_prompts else cut


def default_buckets(batches: int) -> int:
    """How many shapes are worth their compilation: up to `MAX_BUCKETS`, one for few batches."""
    return max(1, min(MAX_BUCKETS, batches // BATCHES_PER_BUCKET))


def make_buckets(
    dataset: TokenDataset, batch_size: int, count: int | None = None, *, steps: int | None = None
) -> Buckets:
    """Chooses the shapes of the batches of a data set; packed rows have one shape.

    At most `count` buckets are made; `None` takes `default_buckets` of the number of batches, which
    is `steps`, that of the whole run, or less where an epoch has fewer.
    """
    if is_packed(dataset.arrays):  # as wide as the row that holds most
        one = np.zeros(len(dataset), int)
        return Buckets(one, (Widths(0, 0, 0, 0),), share_prompts=False, batch_size=batch_size)
    if count is None:
        per_epoch = dataset.rows_per_epoch // batch_size
        count = default_buckets(per_epoch if steps is None else min(per_epoch, steps))
    share_prompts = dataset.share_prompts
    lengths = row_lengths(dataset.arrays)
    scored = lengths.scored if share_prompts else lengths.answer
    total = lengths.prompt + scored
    of_row = np.zeros(len(total), int)
    if count > 1:
        of_row = SCORED_PARTS * _divide(total, max(1, count // SCORED_PARTS))
        for bucket in np.unique(of_row):
            rows = of_row == bucket
            of_row[rows] += _divide(scored[rows], SCORED_PARTS)
        of_row = np.unique(of_row, return_inverse=True)[1]
    widths = [lengths.widths(of_row == bucket, round_up) for bucket in range(of_row.max() + 1)]
    widths.append(lengths.widths(np.ones(len(total), bool), round_up))
    return Buckets(of_row, tuple(dict.fromkeys(widths)), share_prompts, batch_size)


def saves_by_sharing(columns: Columns) -> bool:
    """Whether computing prompts once saves at least `LEAST_SHARED` of the tokens of all pairs.

    Below that the longer rows cost more in attention, which grows with the square of their length,
    than they save elsewhere.
    """
    if answer_names(columns) != ["chosen", "rejected"]:
        return False
    lengths = row_lengths(columns)
    prompts = int(lengths.prompt.sum())
    return prompts >= LEAST_SHARED * (2 * prompts + int(lengths.scored.sum()))


def _divide(values: np.ndarray, parts: int) -> np.ndarray:
    """Divides values among at most `parts` ranges: the number of each one's range, int `[rows]`.

    The ranges are those with the smallest sum of padded values, by dynamic programming over the
    distinct values (rounded up to a width).
    """
    widths, counts = np.unique([round_up(int(value)) for value in values], return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])
    size = len(widths)
    best = np.full(size + 1, np.inf)
    best[0] = 0
    starts = []
    for _ in range(min(parts, size)):
        # The last range of the first `stop` widths starts at `start` and is padded to its largest.
        costs = np.full((size + 1, size), np.inf)
        for stop in range(1, size + 1):
            costs[stop, :stop] = best[:stop] + widths[stop - 1] * (before[stop] - before[:stop])
        starts.append(costs.argmin(axis=1))
        best = costs.min(axis=1)
    bounds, stop = [], size
    for start in reversed(starts):
        bounds.append(widths[stop - 1])
        stop = start[stop]
    return np.searchsorted(np.array(bounds[::-1]), values)

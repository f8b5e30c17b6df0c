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
    RowLengths,
    Widths,
    answer_names,
    is_packed,
    padding_share,
    row_lengths,
    share_prompt,
    trim,
)
from train.data.padding import round_up

SCORED_PARTS = 2
"""Buckets that a range of total lengths is divided into."""

MAX_BUCKETS = 16
"""Buckets when nobody gives a number and there are batches enough."""

LEAST_SHARED = 0.1
"""Share of the tokens of all pairs that prompts computed once have to spare."""

BATCHES_PER_BUCKET = 16
"""Batches that a run, or an epoch, has for each of those: every shape costs a compilation."""


@dataclass(frozen=True)
class Buckets:
    """Which rows are batched together, and the shapes of their batches.

    Attributes:
      of_row: Bucket of every row, int `[rows]`.
      widths: The widths of each bucket, by growing length; the last ones fit every row.
      share_prompts: Whether batches hold a prompt once for both answers.
      batch_size: Rows in a batch, over all processes together.
    """

    of_row: np.ndarray
    widths: tuple[Widths, ...]
    share_prompts: bool
    batch_size: int

    def group(self, rows: np.ndarray) -> np.ndarray:
        """Batches of rows of one bucket, as far as they go: int `[batches, batch_size]`.

        Args:
          rows: Numbers of rows; within a bucket their order is kept. The last ones that fill no
            batch are left out.
        """
        rows = rows[: len(rows) // self.batch_size * self.batch_size]
        return rows[np.argsort(self.of_row[rows], kind="stable")].reshape(-1, self.batch_size)

    def widths_of(self, rows: np.ndarray) -> Widths:
        """The shape of a batch: its bucket's, or the first that fits where rows of several meet."""
        needed = np.max([self.widths[bucket] for bucket in np.unique(self.of_row[rows])], axis=0)
        return next(one for one in self.widths if (np.array(one) >= needed).all())

    def padding_share(self, columns: Columns) -> float:
        """Share of padding among the positions computed in an epoch.

        Args:
          columns: Those of the data set.
        """
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
        """A line for the log: number of shapes, padding, and how prompts are computed."""
        count = int(self.of_row.max()) + 1
        shapes = "one shape" if count == 1 else f"{count} shapes by length"
        text = f"{shapes}, padding {self.padding_share(columns):.0%}"
        if len(answer_names(columns)) > 1:
            once = "once for both answers" if self.share_prompts else "for each answer"
            text += f", prompts computed {once}"
        return text

    def shape(self, batch: Columns, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Cuts a batch to the shape that its rows need.

        Args:
          batch: Columns of the data set at `rows`, or at a process's share of them.
          rows: Numbers of all rows of the batch.
        """
        widths = self.widths_of(rows)
        cut = trim(batch, widths)
        return share_prompt(cut, widths) if self.share_prompts else cut


def default_buckets(batches: int) -> int:
    """How many shapes are worth their compilation: up to `MAX_BUCKETS`, 1 for few batches."""
    return max(1, min(MAX_BUCKETS, batches // BATCHES_PER_BUCKET))


def make_buckets(
    dataset: TokenDataset, batch_size: int, count: int | None = None, *, steps: int | None = None
) -> Buckets:
    """Chooses the shapes of the batches of a data set.

    Args:
      dataset: The rows; `dataset.share_prompts` says whether pairs share their prompt. Packed rows
        have one shape.
      batch_size: Rows in a batch, over all processes together.
      count: Buckets, at most; with 1 all batches have one shape. `None` takes as many as the number
        of batches can pay for, see `default_buckets`.
      steps: Batches of the whole run; `None` for one epoch. With a `count` they do not matter.
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
    everything = np.ones(len(total), bool)
    parts = [of_row == bucket for bucket in range(of_row.max() + 1)]
    widths = [_widths(lengths, rows) for rows in [*parts, everything]]
    return Buckets(of_row, tuple(dict.fromkeys(widths)), share_prompts, batch_size)


def saves_by_sharing(columns: Columns, least: float = LEAST_SHARED) -> bool:
    """Whether a prompt computed once spares at least a share `least` of the tokens of all pairs.

    Below that the longer rows cost more in attention, which grows with the square of their length,
    than they save elsewhere.
    """
    if answer_names(columns) != ["chosen", "rejected"]:
        return False
    lengths = row_lengths(columns)
    prompts = int(lengths.prompt.sum())
    return prompts >= least * (2 * prompts + int(lengths.scored.sum()))


def _widths(lengths: RowLengths, rows: np.ndarray) -> Widths:
    def width(counts: np.ndarray) -> int:
        return round_up(int(counts[rows].max()))

    joined = lengths.prompt + lengths.scored
    return Widths(*map(width, (lengths.prompt, lengths.answer, joined, lengths.scored)))


def _divide(values: np.ndarray, parts: int) -> np.ndarray:
    """Number of the range, of `parts` at most, that each value is in; int, like `values`.

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

"""A tokenised data set: padded arrays, and an account of what became of every record."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Lengths:
    """Token counts of one kind of sequence, after truncation, without padding."""

    mean: float
    largest: int

    @classmethod
    def of(cls, mask: np.ndarray) -> Lengths:
        """Count the true entries in each row of a bool `[rows, width]` mask."""
        counts = mask.sum(axis=1)
        return cls(float(counts.mean()), int(counts.max()))


@dataclass(frozen=True)
class TokenReport:
    """What tokenising did, so that no record disappears unnoticed.

    `dropped` counts records by the reason they were left out. A truncated completion lost its end
    token too. Where a prompt is tokenised differently alone than before its answer, the boundary
    moves to the place where the two differ. `completions` are 0 for prompts alone.
    """

    records: int
    rows: int
    dropped: Mapping[str, int]
    prompts_truncated: int
    completions_truncated: int
    boundaries_moved: int
    prompts: Lengths
    completions: Lengths

    def __str__(self) -> str:
        kinds = {"prompt": self.prompts, "completion": self.completions}
        tokens = ", ".join(
            f"per {name} {one.mean:.1f} (largest {one.largest})"
            for name, one in kinds.items()
            if one.largest
        )
        lines = [f"{self.rows} of {self.records} records; tokens {tokens}"]
        lines += [f"dropped {count}: {reason}" for reason, count in self.dropped.items()]
        for count, what in (
            (self.prompts_truncated, "prompts truncated"),
            (self.completions_truncated, "completions truncated on the right, without end token"),
            (self.boundaries_moved, "prompts whose last token merges with the answer"),
        ):
            if count:
                lines.append(f"{count} {what}")
        return "\n".join(lines)


@dataclass(frozen=True)
class TokenDataset:
    """Rows of equal width, ready to be batched.

    Attributes:
      arrays: Columns by name: `prompt_tokens` int32 `[rows, P]` and `prompt_mask` bool, padded on
        the left; `completion_tokens` (or `chosen_tokens` and `rejected_tokens`) int32 `[rows, C]`
        with their masks, padded on the right; or in place of all these the columns of
        `train.data.packing.pack`; `index` int32 `[rows]`, the row's own number. Prompts alone have
        no answers, but their records in `record`, object `[rows]`.
      report: What became of the records.
      share_prompts: Whether batches hold a prompt once for both answers of a pair, see
        `train.data.layout.share_prompt`.
      parts: For every part of a mixture `(rows, rows an epoch draws of them)`; empty when an epoch
        is every row once.
    """

    arrays: Mapping[str, np.ndarray]
    report: TokenReport
    share_prompts: bool = False
    parts: tuple[tuple[int, int], ...] = ()

    def __len__(self) -> int:
        return len(self.arrays["index"])

    @property
    def rows_per_epoch(self) -> int:
        """Rows that an epoch draws; those that a mixture repeats count as often as they come."""
        return sum(drawn for _, drawn in self.parts) if self.parts else len(self)

    def draw_epoch(self, random: np.random.Generator) -> np.ndarray:
        """Numbers of the rows of one epoch in random order, int `[rows_per_epoch]`."""
        drawn, start = [], 0
        for rows, count in self.parts or ((len(self), len(self)),):
            # np.resize goes through the order again where more are drawn than there are.
            drawn.append(start + np.resize(random.permutation(rows), count))
            start += rows
        return random.permutation(np.concatenate(drawn))

    def with_columns(self, **columns: np.ndarray) -> TokenDataset:
        """Adds columns, such as `reference_chosen_logps`; another number of rows: `ValueError`."""
        for name, column in columns.items():
            if len(column) != len(self):
                raise ValueError(
                    f"Column {name!r} has {len(column)} rows, the data set has {len(self)}."
                )
        return dataclasses.replace(self, arrays={**self.arrays, **columns})

    def fingerprint(self) -> str:
        """SHA-256 of tokens, masks and labels: it changes with data, template, tokeniser and limits.

        Columns that were added, such as reference log-probabilities, do not count.
        """
        digest = hashlib.sha256()
        for name in sorted(self.arrays):
            if name.endswith(("_tokens", "_mask")) or name.startswith(("label", "packed_")):
                column = np.ascontiguousarray(self.arrays[name])
                digest.update(f"{name} {column.dtype} {column.shape}".encode())
                digest.update(column.tobytes())
        return digest.hexdigest()

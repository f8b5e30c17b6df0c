"""Batches in a random order that can be saved and resumed, on one process or many."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import grain
import numpy as np

from train.data.buckets import Buckets
from train.data.dataset import TokenDataset


def make_loader(
    dataset: TokenDataset,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    shard: tuple[Sequence[int], int] = ((0,), 1),
    buckets: Buckets | None = None,
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Iterate without end over batches of a tokenised data set.

    The order of rows is a function of `seed` and the epoch alone. Each process takes its share of
    every global batch, so the batches are the same for any number of processes. Rows at the end of
    an epoch that fill no batch are left out.

    Args:
      dataset: The rows.
      batch_size: Rows in a batch, over all processes together.
      seed: Seed of the order, not negative.
      shuffle: Draw a new order in every epoch; `False` keeps that of the data set.
      shard: `(parts, count)`: a batch is cut into `count` equal parts, of which this process takes
        those numbered in `parts`, see `train.distributed.batches.row_parts`.
      buckets: From `make_buckets`, for the same batch size: rows of similar length are batched
        together and cut to their bucket's shape; which rows meet, and in which order batches come,
        is drawn anew in every epoch. `None` makes batches of any rows, as wide as the data set.

    Returns:
      An iterator of dicts of arrays `[batch_size / count * len(parts), …]`. `get_state()` gives a
      small dict that JSON can hold, naming the next batch; `set_state(state)` continues there.

    Raises:
      ValueError: When no batch can be made, or the processes cannot share one evenly.
    """
    _check(dataset.rows_per_epoch, batch_size, seed, shard)
    if buckets is not None and not shuffle:
        raise ValueError("buckets need shuffle=True.")
    if dataset.parts and buckets is None:
        raise ValueError("A mixture of data sets needs buckets.")
    parts, count = shard

    def gather(numbers: Any) -> dict[str, np.ndarray]:
        rows = np.asarray(numbers)
        shares = np.split(rows, count)
        mine = np.concatenate([shares[part] for part in parts])
        batch = {name: column[mine] for name, column in dataset.arrays.items()}
        return batch if buckets is None else buckets.shape(batch, rows)

    # grain adds the epoch to the seed; spread out, seeds do not share each other's epochs.
    spread = seed * 0x9E3779B1 % 2**32
    if buckets is None:
        rows = grain.MapDataset.range(len(dataset))
        if shuffle:
            rows = rows.shuffle(seed=spread)
        batches = rows.batch(batch_size, drop_remainder=True).repeat()
    else:
        batches = _planned_batches(dataset, buckets, spread)
    # Rows are gathered in this thread: that takes microseconds, and there is nothing to shut down.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(batches.map(gather).to_iter_dataset(options))


def _planned_batches(dataset: TokenDataset, buckets: Buckets, seed: int) -> grain.MapDataset[Any]:
    """The numbers of the rows of every batch, planned epoch by epoch."""
    per_epoch = dataset.rows_per_epoch // buckets.batch_size

    @lru_cache(2)
    def plan(epoch: int) -> np.ndarray:
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
        # What is left over is drawn before rows are grouped, so it does not depend on their length.
        return random.permutation(buckets.group(dataset.draw_epoch(random)))

    return (
        grain.MapDataset.range(per_epoch)
        .repeat()
        .map_with_index(lambda position, number: plan(position // per_epoch)[number])
    )


def _check(rows: int, batch_size: int, seed: int, shard: tuple[Sequence[int], int]) -> None:
    """Raises `ValueError` where no batch can be made, or cut into equal parts."""
    parts, count = shard
    if not parts or not all(0 <= part < count for part in parts):
        raise ValueError(f"shard must be (parts, count) with 0 <= part < count, got {shard}.")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}.")
    if batch_size < 1 or batch_size % count:
        raise ValueError(
            f"batch_size must be a positive multiple of its number of parts {count}, "
            f"got {batch_size}."
        )
    if batch_size > rows:
        raise ValueError(
            f"batch_size {batch_size} is larger than the data set, which has {rows} rows. "
            "Use a smaller batch or more data."
        )

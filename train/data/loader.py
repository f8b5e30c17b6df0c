"""Batches in a random order that can be saved and resumed, on one process or many."""

from __future__ import annotations

from typing import Any

import grain
import numpy as np

from train.data.dataset import TokenDataset


def make_loader(
    dataset: TokenDataset,
    batch_size: int,
    *,
    seed: int = 0,
    shuffle: bool = True,
    num_epochs: int | None = None,
    drop_remainder: bool = True,
    shard: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator[dict[str, np.ndarray]]:
    """Iterate over batches of a tokenised data set.

    The order of rows is a function of `seed` and the epoch alone. Each process takes its share of
    every global batch, so the batches are the same for any number of processes. Rows are gathered
    in the calling thread: that takes microseconds, and there is nothing to shut down.

    Args:
      dataset: The rows.
      batch_size: Rows in a batch, over all processes together.
      seed: Of the order, not negative.
      shuffle: Draw a new order in every epoch; `False` keeps that of the data set.
      num_epochs: How often to go through the data; `None` does not end.
      drop_remainder: Leave out the rows at the end of an epoch that do not fill a batch (with
        `shuffle`, other rows each time). `False` gives a last batch of fewer rows.
      shard: `(index, count)` of this process, such as `(jax.process_index(), jax.process_count())`.

    Returns:
      An iterator of dicts of arrays `[batch_size / count, …]`. `get_state()` gives a small dict
      that JSON can hold, naming the next batch; `set_state(state)` continues there.

    Raises:
      ValueError: When no batch can be made, or the processes cannot share one evenly.
    """
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"shard must be (index, count) with 0 <= index < count, got {shard}.")
    if seed < 0:
        raise ValueError(f"seed must not be negative, got {seed}.")
    if batch_size < 1 or batch_size % count:
        raise ValueError(
            f"batch_size must be a positive multiple of the number of processes {count}, "
            f"got {batch_size}."
        )
    if drop_remainder and batch_size > len(dataset):
        raise ValueError(
            f"batch_size {batch_size} is larger than the data set, which has {len(dataset)} rows. "
            "Use a smaller batch or more data."
        )
    if not drop_remainder and len(dataset) % batch_size % count:
        raise ValueError(
            f"The last batch of {len(dataset) % batch_size} rows cannot be shared evenly among "
            f"{count} processes. Use drop_remainder=True."
        )
    rows = grain.MapDataset.range(len(dataset))
    if shuffle:
        # grain adds the epoch to the seed; spread out, seeds do not share each other's epochs.
        rows = rows.shuffle(seed=seed * 0x9E3779B1 % 2**32)
    batches = rows.batch(batch_size, drop_remainder=drop_remainder).repeat(num_epochs)

    def gather(numbers: Any) -> dict[str, np.ndarray]:
        share = len(numbers) // count
        mine = np.asarray(numbers)[index * share : (index + 1) * share]
        return {name: column[mine] for name, column in dataset.arrays.items()}

    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return iter(batches.map(gather).to_iter_dataset(options))

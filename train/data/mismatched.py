"""Mismatched completions, on which KTO estimates how far the policy is from the reference.

Every prompt gets the completion of the row before it in the same batch, so the mismatched
completions of a batch are its own completions on other prompts (as in TRL, and as the KTO paper
advises). The pairing is decided once, before training: the reference's log-probabilities of those
pairs can then be computed once and kept on disk like any others, and the batches of a run have
the same rows in every epoch. TRL does the same per device; here a batch is the global one.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from train.data.dataset import TokenDataset


def rotation(rows: int, batch_size: int) -> np.ndarray:
    """Whose completion each row borrows, int `[rows]`.

    Within each run of `batch_size` rows the completions move on by one place, and the last one comes
    first. A single row left over joins the batch before it, because alone it would borrow its own
    completion, which is no mismatch. Fewer than two rows, in all or in a batch: `ValueError`.

    Example:
      >>> rotation(5, 2).tolist()
      [1, 0, 4, 2, 3]
    """
    if rows < 2 or batch_size < 2:
        raise ValueError(
            "KTO estimates the divergence on mismatched completions, which takes at least 2 rows in "
            f"a batch, got {rows} in all and batches of {batch_size}."
        )
    starts = list(range(0, rows, batch_size))
    if rows - starts[-1] == 1:
        starts.pop()
    source = np.arange(rows) - 1
    source[starts] = np.array([*starts[1:], rows]) - 1
    return source


def with_kl_completions(dataset: TokenDataset, batch_size: int) -> TokenDataset:
    """Adds `kl_tokens` and `kl_mask`: the completions, rotated within batches (`rotation`)."""
    source = rotation(len(dataset), batch_size)
    arrays = dataset.arrays
    return dataset.with_columns(
        kl_tokens=arrays["completion_tokens"][source], kl_mask=arrays["completion_mask"][source]
    )


def in_random_order(dataset: TokenDataset, seed: int) -> TokenDataset:
    """The rows in an order drawn once; `index` still holds each row's former place."""
    order = np.random.default_rng(seed).permutation(len(dataset))
    return dataclasses.replace(
        dataset, arrays={name: column[order] for name, column in dataset.arrays.items()}
    )

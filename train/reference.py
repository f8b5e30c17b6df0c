"""Log-probabilities of the reference: computed once, kept on disk, keyed by content.

With them on disk the reference model is not in memory during training. The key covers the stored
weights, every token and mask (so the data, the template, the tokenizer and the length limits), the
types of the computation and whether prompts are shared; a change in any of them makes another file.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from train.config import UserError
from train.data import TokenDataset

Scores = tuple[np.ndarray, np.ndarray]


def cache_file(directory: Path, model_hash: str, dataset: TokenDataset, dtypes: list[str]) -> Path:
    """Where the log-probabilities of one model on one data set are kept.

    Args:
        directory: Of the cache.
        model_hash: From `train.prepare.hash_model`.
        dataset: Preferences.
        dtypes: Types of the computation and of the parameters.
    """
    # Shared prompts round differently, and rewards are to start at 0 in low precision too.
    key = json.dumps([model_hash, dataset.fingerprint(), dtypes, dataset.share_prompts])
    return directory / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"


def read_cache(file: Path, rows: int) -> Scores | None:
    """The log-probabilities in a file, each float32 ``[rows]``, or None when it does not exist.

    Raises:
        UserError: the file is damaged.
    """
    if not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as stored:
            scores = stored["chosen"], stored["rejected"]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"cached log-probabilities {file} are damaged ({error}); delete it to compute them again."
        ) from error
    if any(part.shape != (rows,) for part in scores):
        raise UserError(f"cached log-probabilities {file} are not of {rows} rows; delete it.")
    return scores


def write_cache(file: Path, scores: Scores) -> None:
    """Writes log-probabilities so that a kill leaves a whole file or none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    with partial.open("wb") as out:
        np.savez(out, chosen=scores[0], rejected=scores[1])
    partial.replace(file)


def with_reference(
    dataset: TokenDataset, file: Path, compute: Callable[[TokenDataset], Scores]
) -> TokenDataset:
    """The data set with its reference columns, from the cache or computed and cached.

    Args:
        dataset: Preferences.
        file: From `cache_file`.
        compute: Makes the log-probabilities when the file does not exist.

    Returns:
        `dataset` with `reference_chosen_logps` and `reference_rejected_logps`, float32 ``[rows]``.
    """
    scores = read_cache(file, len(dataset))
    if scores is None:
        scores = compute(dataset)
        write_cache(file, scores)
    return dataset.with_columns(
        reference_chosen_logps=scores[0], reference_rejected_logps=scores[1]
    )

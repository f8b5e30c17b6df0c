"""Log-probabilities of the reference: computed once, kept on disk, keyed by content.

With them on disk the reference model is not in memory during training. The key covers the stored
weights, every token and mask (so the data, the template, the tokenizer and the length limits), the
types of the computation and whether prompts are shared; a change in any of them makes another file.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from train.config import UserError
from train.data import TokenDataset
from train.distributed.processes import from_first, is_first
from train.files.whole import whole_file

Scores = Mapping[str, np.ndarray]
"""Log-probabilities by the kind of answer, each float32 `[rows]`."""


def cache_file(
    directory: Path, model_hash: str, dataset: TokenDataset, computation: list[str | float]
) -> Path:
    """Says where the log-probabilities of one model on one data set are kept.

    `computation` holds the types of the computation and of the parameters, and what else it depends on.
    Of labelled answers the mismatched ones count too.
    """
    # Shared prompts round differently, and rewards are to start at 0 in low precision too.
    key = json.dumps([model_hash, dataset.fingerprint(), computation, dataset.share_prompts])
    return directory / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"


def read_cache(file: Path, rows: int, names: tuple[str, ...]) -> Scores | None:
    """Reads the log-probabilities in a file by the names of answers, or None when it does not exist.

    Raises `UserError` where the file is damaged, or not of so many rows.
    """
    if not file.exists():
        return None
    try:
        with np.load(file, allow_pickle=False) as stored:
            scores = {name: stored[name] for name in names}
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"cached log-probabilities {file} are damaged ({error}); delete it to compute them again."
        ) from error
    if any(part.shape != (rows,) for part in scores.values()):
        raise UserError(f"cached log-probabilities {file} are not of {rows} rows; delete it.")
    return scores


def write_cache(file: Path, scores: Scores) -> None:
    """Writes log-probabilities so that a kill leaves a whole file or none."""
    with whole_file(file) as out:
        np.savez(out, allow_pickle=False, **scores)


def with_reference(
    dataset: TokenDataset,
    file: Path,
    names: tuple[str, ...],
    compute: Callable[[TokenDataset], Scores],
) -> TokenDataset:
    """Adds columns `reference_NAME_logps`, float32 ``[rows]``, for every kind of answer.

    They come from the cache, or are computed and cached where `file` does not exist.
    """
    if from_first(file.exists()):
        scores = read_cache(file, len(dataset), names)
        if scores is None:
            raise UserError(
                f"cached log-probabilities {file} are there for the first process but not for this "
                "one; reference_cache and output_dir must be on a file system that all hosts share."
            )
    else:
        scores = compute(dataset)
        if is_first():
            write_cache(file, scores)
    return dataset.with_columns(**{f"reference_{name}_logps": scores[name] for name in names})

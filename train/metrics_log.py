"""Metrics on disk: one JSON line per logged step, and the same in TensorBoard."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import jax
from tensorboardX import SummaryWriter

from train.config import UserError


class MetricsLog:
    """Appends metrics to ``metrics.jsonl`` and ``tensorboard/``.

    A run that was killed may have logged steps past its last checkpoint. They are computed again
    after the resume, so the lines after `resume_step` are dropped first. Only process 0 writes.

    Args:
        directory: Directory of the run.
        resume_step: Last step that counts; 0 for a new run.

    Example:
        >>> with MetricsLog(directory, resume_step=0) as log:  # doctest: +SKIP
        ...     log.write(1, {"loss": 0.69})
    """

    def __init__(self, directory: Path, resume_step: int = 0) -> None:
        self._file = None
        if jax.process_index() != 0:
            return
        path = directory / "metrics.jsonl"
        keep_until(path, resume_step)
        self._file = path.open("a", encoding="utf-8", buffering=1)
        # For a new run too: one killed before its first checkpoint starts again at step 1.
        self._board = SummaryWriter(str(directory / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line, ``{"step": step, **metrics}``.

        Raises:
            UserError: the disk is full, or cannot be written to for another reason.
        """
        if self._file is None:
            return
        row = {name: float(value) for name, value in metrics.items()}
        try:
            self._file.write(json.dumps({"step": step, **row}) + "\n")
        except OSError as error:
            raise UserError(
                f"{self._file.name} cannot be written ({error.strerror}), so training stopped. Make "
                "room; the same command goes on from the last checkpoint."
            ) from error
        for name, value in row.items():
            self._board.add_scalar(name, value, step)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._file is None:
            return
        # Where a line could not be written, the error is on its way already.
        with contextlib.suppress(OSError):
            self._file.close()
        with contextlib.suppress(OSError):
            self._board.close()


def keep_until(path: Path, step: int) -> None:
    """Drops the lines of `path` that are of a later step, or that a kill cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:  # cut off by the kill, so the last line
            break
        if row["step"] <= step and step:  # a run without a checkpoint starts again
            kept.append(line + "\n")
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.replace(path)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All rows of a ``metrics.jsonl``."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

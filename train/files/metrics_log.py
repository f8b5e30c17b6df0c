"""Metrics on disk: one JSON line per logged step, and the same in TensorBoard."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.summary import scalar

from train.config import UserError
from train.files.whole import whole_file


class MetricsLog:
    """Appends metrics to ``metrics.jsonl`` and ``tensorboard/``.

    A run that was killed may have logged steps past its last checkpoint. They are computed again
    after the resume, so the lines after `resume_step`, 0 for a new run, are dropped first. Only
    process 0 writes. It is a context manager.
    """

    def __init__(self, directory: Path, resume_step: int = 0) -> None:
        self._file: BinaryIO | None = None
        self._directory = directory
        if jax.process_index() != 0:
            return
        path, board = directory / "metrics.jsonl", directory / "tensorboard"
        with _stops_where_unwritable(directory):
            keep_until(path, resume_step)
            board.mkdir(exist_ok=True)
            # Not tensorboardX's SummaryWriter: its thread dies when the disk is full, and it hangs.
            self._board = EventsWriter(str(board / "events"))
            # What follows takes the place of later steps in earlier files; for a new run too, because
            # one killed before its first checkpoint starts again at step 1.
            start = SessionLog(status=SessionLog.START)
            self._board.write_event(Event(step=resume_step + 1, file_version="brain.Event:2"))
            self._board.write_event(Event(step=resume_step + 1, session_log=start))
            self._file = path.open("ab")

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends one line, ``{"step": step, **metrics}``.

        Raises `UserError` where the disk is full or cannot be written to for another reason.
        """
        if self._file is None:
            return
        row = {name: float(value) for name, value in metrics.items()}
        with _stops_where_unwritable(self._directory):
            self._file.write(_line({"step": step, **row}))
            self._file.flush()
            for name, value in row.items():
                event = Event(step=step, wall_time=time.time(), summary=scalar(name, value))
                self._board.write_event(event)
            self._board.flush()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is None:
            return
        # Where a line could not be written, that error is being raised already.
        with contextlib.suppress(OSError), contextlib.closing(self._board):
            self._file.close()


@contextlib.contextmanager
def _stops_where_unwritable(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the log in {directory} cannot be written ({error.strerror}), so training stopped. Make "
            "room; the same command goes on from the last checkpoint."
        ) from error


def keep_until(path: Path, step: int) -> None:
    """Drops the lines of later steps than `step`, and one that a kill cut off, where there is a file.

    Step 0 drops all lines: a run without a checkpoint starts again.
    """
    if not path.exists():
        return
    rows = read_metrics(path) if step else []
    with whole_file(path) as file:
        file.writelines(_line(row) for row in rows if row["step"] <= step)


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Reads all rows of a ``metrics.jsonl``.

    A last line that a kill cut off, or that is being written, is passed over. Raises `UserError` where
    another line is damaged, and `OSError` where the file cannot be read.
    """
    rows: list[dict[str, float]] = []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row["step"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number} is damaged; mend or delete it.") from error
        rows.append(row)
    return rows


def _line(row: Mapping[str, float]) -> bytes:
    return (json.dumps(row) + "\n").encode()

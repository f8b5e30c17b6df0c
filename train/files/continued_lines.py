"""A file of lines that takes hours to write: absent or whole, and gone on with after an interrupt."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from train.config import UserError


@contextlib.contextmanager
def continued_lines(output: Path, key: str) -> Iterator[tuple[BinaryIO, int]]:
    r"""A file beside ``output`` that takes its name when the block ends without an error.

    Otherwise it stays, as ``NAME.KEY.partial``, and the next call with the same key adds to it.

    Args:
        output: Does not exist; its directory does.
        key: Of everything that the lines depend on, so that lines of other settings are never
            mixed; a part of a file name.

    Yields:
        The file, opened to append bytes, and the number of whole lines in it. A line that was cut
        off is gone.

    Raises:
        UserError: another process writes the same lines, or ``output`` exists when they are done.

    Example:
        >>> with continued_lines(Path("out.jsonl"), "1f3a") as (file, done):  # doctest: +SKIP
        ...     for line in lines[done:]:
        ...         file.write(line.encode() + b"\n")
    """
    partial = output.with_name(f"{output.name}.{key}.partial")
    with partial.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"output: another process is writing {str(partial)!r}.") from error
        file.seek(0)
        found = file.read()
        file.truncate(found.rfind(b"\n") + 1)
        yield file, found.count(b"\n")
        file.flush()
        os.fsync(file.fileno())
        if output.exists():
            raise UserError(
                f"output: {str(output)!r} has appeared meanwhile and is not overwritten; what was "
                f"written is in {str(partial)!r}."
            )
        partial.rename(output)

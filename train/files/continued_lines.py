"""A file of lines that takes hours to write: absent or whole, and continued after an interrupt."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from train.config import UserError
from train.files.lock import lock_file
from train.files.whole import put_in_place


@contextlib.contextmanager
def continued_lines(output: Path, key: str) -> Iterator[tuple[BinaryIO, int]]:
    """Opens a file beside ``output`` that takes its name when the block ends without an error.

    After an error it stays, as ``NAME.KEY.partial``, and the next call with the same key adds to it.

    `key` is a hash of everything that the lines depend on, so that lines of other settings are never
    mixed. The directory of ``output`` must exist. Yields the file, opened to append bytes, and the
    number of whole lines in it; a line that was cut off is removed. Raises `UserError` where another
    process writes the same lines, or ``output`` exists when they are done.
    """
    partial = output.with_name(f"{output.name}.{key}.partial")
    with partial.open("a+b") as file:
        if not lock_file(file):
            raise UserError(f"output: another process is writing {str(partial)!r}.")
        file.seek(0)
        found = file.read()
        file.truncate(found.rfind(b"\n") + 1)
        yield file, found.count(b"\n")
        file.flush()
        if output.exists():
            raise UserError(
                f"output: {str(output)!r} has appeared meanwhile and is not overwritten; what was "
                f"written is in {str(partial)!r}."
            )
        put_in_place(partial, output)

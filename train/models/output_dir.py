"""Directories that are either absent or complete."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def check_writable(out: Path) -> None:
    """Raises `FileExistsError` unless ``out`` is absent or an empty directory."""
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; choose another directory or remove it first")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; choose another name")


@contextlib.contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A new directory beside ``out`` that takes its name when the block ends without an error.

    A process that is killed leaves the hidden partial directory, never a partial ``out``.

    Args:
        out: a path for which `check_writable` passes.

    Yields:
        The directory to fill.

    Example:
        >>> with written_whole(Path("out")) as partial:                  # doctest: +SKIP
        ...     (partial / "config.json").write_text("{}")
    """
    check_writable(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.parent / f".{out.name}.partial-{os.getpid()}"
    partial.mkdir()
    try:
        yield partial
        partial.rename(out)  # replaces an empty directory; fails on one that was filled meanwhile
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise

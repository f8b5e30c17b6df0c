"""Directories that are either absent or complete."""

from __future__ import annotations

import contextlib
import glob
import os
import re
import secrets
import shutil
import socket
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

    A process that is killed leaves the hidden partial directory, never a partial ``out``; the next
    call for the same ``out`` on this host removes it.

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
    remove_remains(out)
    # Containers repeat ids of processes, so the name is random too. Not tempfile.mkdtemp, which
    # keeps everyone else out of the directory, also when it has its final name.
    partial = out.parent / f"{_prefix(out)}{os.getpid()}-{secrets.token_hex(4)}"
    _in_use.add(partial)
    try:
        partial.mkdir()
        yield partial
        partial.rename(out)  # replaces an empty directory; fails on one that was filled meanwhile
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        _in_use.discard(partial)


def remove_remains(out: Path) -> None:
    """Removes partial directories of ``out`` whose processes on this host are gone."""
    prefix = _prefix(out)
    for partial in out.parent.glob(f"{glob.escape(prefix)}*"):
        found = re.fullmatch(r"(\d+)-[0-9a-f]{8}", partial.name.removeprefix(prefix))
        if found and partial not in _in_use and not _is_other_process(int(found[1])):
            shutil.rmtree(partial, ignore_errors=True)


_in_use: set[Path] = set()


def _prefix(out: Path) -> str:
    # Of other hosts that share the disk, nobody here knows which processes live.
    return f".{out.name}.partial-{socket.gethostname()}-"


def _is_other_process(pid: int) -> bool:
    """Whether another process than this one has the id."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # somebody else's, or no id at all
        return True
    return True

"""One process, or one group of processes, to an output directory.

The operating system holds the lock (`flock`) for as long as the process lives, so that one that was
killed leaves none behind. On several hosts the first process holds it for all.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO

from train.config import UserError
from train.processes import first_says, is_first

LOCK_FILE = ".lock"

_held: dict[Path, IO[str]] = {}


def hold(directory: Path) -> None:
    """Takes the lock of a directory for this process, until `release` or the end of the process.

    A process may take a lock again that it holds.

    Args:
        directory: It exists.

    Raises:
        UserError: another process holds it; names that process and its host.
        OSError: the lock cannot be written.
    """
    holder = _take(directory) if is_first() else None
    if not first_says(holder is None):
        raise _in_use(directory, holder)


def release(directory: Path) -> None:
    """Gives the lock back; nothing happens where this process does not hold it."""
    file = _held.pop(directory, None)
    if file is not None:
        file.close()


def refuse_if_held(directory: Path) -> None:
    """Raises `UserError` when another process holds the lock. Changes nothing."""
    path = directory / LOCK_FILE
    if not is_first() or directory in _held or not os.path.exists(path):
        return
    with path.open(encoding="utf-8") as file:
        if not _lock(file, fcntl.LOCK_SH):
            raise _in_use(directory, file.read())


def _take(directory: Path) -> str | None:
    """Locks, or returns what the holder wrote about itself."""
    path = directory / LOCK_FILE
    held = _held.get(directory)
    if held is not None:
        if path.exists() and os.path.samestat(os.fstat(held.fileno()), path.stat()):
            return None
        release(directory)  # of a directory that has been removed since
    file = path.open("a+", encoding="utf-8")
    if not _lock(file, fcntl.LOCK_EX):
        file.seek(0)
        holder = file.read()
        file.close()
        return holder
    me = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
    file.truncate(0)
    file.write(json.dumps(me))
    file.flush()
    _held[directory] = file
    return None


def _lock(file: IO[str], kind: int) -> bool:
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _in_use(directory: Path, holder: str | None) -> UserError:
    try:
        found = json.loads(holder or "")
        who = f"process {found['pid']} on host {found['host']}, since {found['since']}"
    except (json.JSONDecodeError, KeyError, TypeError):  # it has just started
        who = "another process"
    return UserError(
        f"output_dir {str(directory)!r} is in use by {who}. Wait for it or stop it, or choose "
        "another output_dir."
    )

"""One process, or one group of processes, to an output directory.

The operating system holds the lock (`flock`) for as long as the process lives, so that one that was
killed leaves none behind. On several hosts the first process holds it for all. When a host vanishes,
a file server keeps its locks for a while, so a job that is started again waits for them.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import jax

from train.config import UserError
from train.distributed.processes import is_first, largest_of_all
from train.distributed.stop import TryAgain

LOCK_FILE = ".lock"

_WAIT_S = 180.0
"""For a lock of another machine. NFS servers keep those of a client that has gone for 90 s or so."""

_POLL_S = 2.0
_FREE, _IN_USE, _IN_USE_ELSEWHERE = range(3)

_held: dict[Path, IO[str]] = {}


def hold(directory: Path) -> None:
    """Takes the lock of a directory for this process, until `release` or the end of the process.

    A process may take a lock again that it holds.

    Args:
        directory: It exists.

    Raises:
        UserError: another process on this machine holds it; names that process and its host.
        TryAgain: one on another machine does, for minutes, where that may be a host that has gone:
            in one of several processes, or a job that has been started again.
        OSError: the lock cannot be written.
    """
    holder = _patiently(lambda: _take(directory), directory) if is_first() else None
    answer = largest_of_all(_answer(holder))
    if answer != _FREE:
        raise _in_use(directory, holder, answer)


def release(directory: Path) -> None:
    """Gives the lock back; nothing happens where this process does not hold it."""
    file = _held.pop(directory, None)
    if file is not None:
        file.close()


def refuse_if_held(directory: Path) -> None:
    """Raises as `hold` does when another process holds the lock. Changes nothing."""
    path = directory / LOCK_FILE
    if not is_first() or directory in _held or not os.path.exists(path):
        return
    holder = _patiently(lambda: _holder(path), directory)
    if holder is not None:
        raise _in_use(directory, holder, _answer(holder))


def _holder(path: Path) -> str | None:
    """What the holder wrote about itself, or None where there is none."""
    with path.open(encoding="utf-8") as file:
        return None if _lock(file, fcntl.LOCK_SH) else file.read()


def _patiently(ask: Callable[[], str | None], directory: Path) -> str | None:
    """The holder, asked for again and again while it may be a host that has gone."""
    deadline, told = time.monotonic() + _WAIT_S, False
    while True:
        holder = ask()
        if _answer(holder) != _IN_USE_ELSEWHERE or time.monotonic() > deadline:
            return holder
        if not told:
            found = f"output_dir {str(directory)!r} is in use by {_who(holder)}"
            wait = f"waiting {_WAIT_S:.0f} s for it, which may be gone ..."
            print(f"{found}; {wait}", file=sys.stderr, flush=True)
            told = True
        time.sleep(_POLL_S)


def _answer(holder: str | None) -> int:
    if holder is None:
        return _FREE
    again = jax.process_count() > 1 or os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    found = _record(holder)
    elsewhere = found.get("machine", _machine()) != _machine()
    return _IN_USE_ELSEWHERE if again and elsewhere else _IN_USE


def _machine() -> str:
    """Tells machines apart; pods that follow each other on different ones have one host name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return socket.gethostname()


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
    me = {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "machine": _machine(),
        "since": time.strftime("%F %T"),
    }
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


def _record(holder: str | None) -> dict[str, Any]:
    """What the holder wrote about itself; nothing where it has just started."""
    try:
        found = json.loads(holder or "")
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _who(holder: str | None) -> str:
    found = _record(holder)
    if not {"pid", "host", "since"} <= found.keys():
        return "another process"
    return f"process {found['pid']} on host {found['host']}, since {found['since']}"


def _in_use(directory: Path, holder: str | None, answer: int) -> UserError | TryAgain:
    found = f"output_dir {str(directory)!r} is in use by {_who(holder)}."
    if answer == _IN_USE_ELSEWHERE:
        return TryAgain(f"{found} The same command goes on when it has gone.")
    return UserError(f"{found} Wait for it or stop it, or choose another output_dir.")

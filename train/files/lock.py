"""The lock of an output directory: one process, or one group of processes, writes to it at a time.

The operating system holds the lock (`flock`) for as long as the process lives, so a process that was
killed leaves no lock behind. On several hosts the first process holds it for all. When a host
vanishes, a file server keeps its locks for a while, so a job that is started again waits for them.
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
"""Seconds to wait for a lock held by a host that may be dead; NFS keeps its locks for about 90 s."""
_POLL_S = 2.0
"""Seconds from one try to the next."""
_FREE, _IN_USE, _IN_USE_ELSEWHERE = range(3)

Holder = dict[str, Any]
"""What the process that holds a lock wrote about itself; empty where it has just started."""

_held: dict[Path, IO[str]] = {}


def hold(directory: Path) -> None:
    """Takes the lock of an existing directory, until `release` or the end of this process.

    A process may take a lock again that it holds.

    Raises:
        UserError: another process holds the lock; the message names it and its host.
        TryAgain: a process on another host, which may be dead, still holds the lock after `_WAIT_S`.
            Only a run of several processes, or a job that was started again, waits and raises this.
        OSError: the lock cannot be written.
    """
    holder = _patiently(lambda: _take(directory), directory) if is_first() else None
    answer = largest_of_all(_state(holder))
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
    holder = _patiently(lambda: _look(path), directory)
    if holder is not None:
        raise _in_use(directory, holder, _state(holder))


def lock_file(file: IO[Any], kind: int = fcntl.LOCK_EX) -> bool:
    """Locks an open file until it is closed; returns False at once where another process holds it.

    `kind` is `fcntl.LOCK_EX`, or `fcntl.LOCK_SH` for a lock that several processes may hold.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _look(path: Path) -> Holder | None:
    """Returns who holds the lock, or None where nobody does."""
    with path.open(encoding="utf-8") as file:
        return None if lock_file(file, fcntl.LOCK_SH) else _read(file)


def _take(directory: Path) -> Holder | None:
    """Takes the lock, or returns who holds it."""
    path = directory / LOCK_FILE
    held = _held.get(directory)
    if held is not None:
        if path.exists() and os.path.samestat(os.fstat(held.fileno()), path.stat()):
            return None
        release(directory)  # the lock of a directory that has been removed since
    file = path.open("a+", encoding="utf-8")
    if not lock_file(file):
        with file:
            return _read(file)
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


def _read(file: IO[str]) -> Holder:
    file.seek(0)
    try:
        found = json.loads(file.read())
    except json.JSONDecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _patiently(ask: Callable[[], Holder | None], directory: Path) -> Holder | None:
    """Asks for the holder again and again while it may be on a host that is dead."""
    deadline, told = time.monotonic() + _WAIT_S, False
    while True:
        holder = ask()
        if _state(holder) != _IN_USE_ELSEWHERE or time.monotonic() > deadline:
            return holder
        if not told:
            found = f"output_dir {str(directory)!r} is in use by {_who(holder)}"
            wait = f"waiting {_WAIT_S:.0f} s for it, which may be gone ..."
            print(f"{found}; {wait}", file=sys.stderr, flush=True)
            told = True
        time.sleep(_POLL_S)


def _state(holder: Holder | None) -> int:
    if holder is None:
        return _FREE
    again = jax.process_count() > 1 or os.environ.get("SLURM_RESTART_COUNT", "0") != "0"
    elsewhere = holder.get("machine", _machine()) != _machine()
    return _IN_USE_ELSEWHERE if again and elsewhere else _IN_USE


def _machine() -> str:
    """Returns an id of this machine; pods that follow each other elsewhere have one host name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return socket.gethostname()


def _who(holder: Holder | None) -> str:
    if holder is None or not {"pid", "host", "since"} <= holder.keys():
        return "another process"
    return f"process {holder['pid']} on host {holder['host']}, since {holder['since']}"


def _in_use(directory: Path, holder: Holder | None, answer: int) -> UserError | TryAgain:
    found = f"output_dir {str(directory)!r} is in use by {_who(holder)}."
    if answer == _IN_USE_ELSEWHERE:
        return TryAgain(f"{found} The same command goes on when it has gone.")
    return UserError(f"{found} Wait for it or stop it, or choose another output_dir.")

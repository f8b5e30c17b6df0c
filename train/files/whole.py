"""Files and directories that are written whole: after a kill or a crash each is complete or absent.

The content goes to a hidden name beside the final one, reaches the disk, and is then renamed.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from train.config import UserError


def write_whole(path: Path, text: str) -> None:
    """Writes text and a line end; an older file of that name is replaced."""
    with whole_file(path) as file:
        file.write(f"{text}\n".encode())


def write_json(path: Path, content: Any) -> None:
    """Writes indented JSON; an older file of that name is replaced."""
    write_whole(path, json.dumps(content, indent=2))


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Opens a file for bytes, which takes the name ``path`` when the block ends without an error.

    An older file of that name is replaced, and missing directories are made. Raises `OSError` where
    it cannot be written; an older file then stays as it was.
    """
    with _hidden_name(path) as partial, partial.open("xb") as file:
        yield file


@contextlib.contextmanager
def whole_directory(out: Path) -> Iterator[Path]:
    """Yields a directory to fill, which takes the name ``out`` when the block ends without an error.

    Missing parents are made. Raises `FileExistsError` where ``out`` is a file or a directory that holds
    something.
    """
    check_absent_or_empty(out)
    with _hidden_name(out) as partial:
        partial.mkdir()
        yield partial


def put_in_place(partial: Path, out: Path) -> None:
    """Waits until all bytes of a complete file or directory are on the disk, and renames it.

    ``out`` is in the same directory. A file or an empty directory of that name is replaced.
    """
    for path in [*partial.rglob("*"), partial]:
        _sync(path)
    partial.rename(out)
    _sync(out.parent)


def check_absent_or_empty(out: Path) -> None:
    """Raises `FileExistsError` unless ``out`` is absent or an empty directory."""
    if out.is_dir() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty; choose another directory or remove it first")
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"{out} is a file; choose another name")


def check_new_file(path: Path, name: str) -> None:
    """Raises `UserError` unless the file that the field `name` gives is absent and can be made."""
    if path.exists():
        raise UserError(f"{name}: {str(path)!r} exists; nothing is overwritten.")
    check_place(path, name)


def check_place(path: Path, name: str) -> None:
    """Checks that a file or directory can be made, with a nameless file that vanishes again.

    Raises `UserError`, which names the field `name` that gave the path, where its nearest existing
    directory cannot be written to.
    """
    place = path
    try:
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise unwritable(name, path, error) from error


def unwritable(name: str, path: Path, error: OSError) -> UserError:
    """Makes the error for a place, given by the field `name`, that cannot be written."""
    return UserError(
        f"{name} {str(path)!r} cannot be written ({error.strerror}); choose a place that can be."
    )


def is_partial(name: str) -> bool:
    """Whether a killed process has left a file or directory of this name."""
    return re.fullmatch(r"\..+\.partial-.+-\d+-[0-9a-f]{8}", name) is not None


def remove_remains(out: Path) -> None:
    """Removes what killed processes of this host have left beside ``out``."""
    prefix = _prefix(out)
    for partial in out.parent.glob(f"{glob.escape(prefix)}*"):
        found = re.fullmatch(r"(\d+)-[0-9a-f]{8}", partial.name.removeprefix(prefix))
        if found and partial not in _in_use and not _is_other_process(int(found[1])):
            _remove(partial)


_in_use: set[Path] = set()


@contextlib.contextmanager
def _hidden_name(out: Path) -> Iterator[Path]:
    """Yields a free name beside ``out``; what the block puts there takes the name ``out``."""
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_remains(out)
    # Containers repeat ids of processes, so the name is random too. Not tempfile.mkdtemp, which
    # keeps everyone else out of the directory, also when it has its final name.
    partial = out.parent / f"{_prefix(out)}{os.getpid()}-{secrets.token_hex(4)}"
    _in_use.add(partial)
    try:
        yield partial
        put_in_place(partial, out)
    except BaseException:
        _remove(partial)
        raise
    finally:
        _in_use.discard(partial)


def _prefix(out: Path) -> str:
    # The host is in the name because nobody here knows which processes of other hosts live.
    return f".{out.name}.partial-{socket.gethostname()}-"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Waits until a file, or the names in a directory, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_other_process(pid: int) -> bool:
    """Whether another process than this one has the id."""
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)  # sends nothing
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's process, or no id at all
        return True
    return True

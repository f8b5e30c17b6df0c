"""Sizes and checksums of the files of a directory, kept in it, to tell damage later."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MANIFEST = "manifest.json"
_THREADS = 4


def write_manifest(directory: Path, *, ignore: str | None = None) -> None:
    """Writes ``manifest.json``: ``{"files": {path: {"size": bytes, "sha256": hex}}}``.

    Args:
        directory: Whose files, at any depth.
        ignore: Name of files that may change later.

    Raises:
        OSError: a file cannot be read, or there is no space left.
    """
    files = sorted(
        path
        for path in directory.rglob("*")
        if path.is_file() and path.name not in (MANIFEST, ignore)
    )
    with ThreadPoolExecutor(_THREADS) as pool:  # hashing releases the interpreter lock
        checksums = list(pool.map(_sha256, files))
    listed = {
        file.relative_to(directory).as_posix(): {"size": file.stat().st_size, "sha256": checksum}
        for file, checksum in zip(files, checksums, strict=True)
    }
    with (directory / MANIFEST).open("w", encoding="utf-8") as out:
        json.dump({"files": listed}, out, indent=1)
        out.flush()
        os.fsync(out.fileno())


def find_damage(directory: Path) -> str | None:
    """What is wrong with the files of a directory, in words, or None.

    Files that the manifest does not list are no damage.
    """
    try:
        listed = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {name: (entry["size"], entry["sha256"]) for name, entry in listed.items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, (size, _) in expected.items():  # cheap, so for all files before the first is read
        try:
            found = (directory / name).stat().st_size
        except OSError as error:
            return f"{name}: {error.strerror}"
        if found != size:
            return f"{name} has {found} bytes instead of {size}"
    with ThreadPoolExecutor(_THREADS) as pool:
        checksums = pool.map(lambda name: _checksum_or_error(directory / name), expected)
        for (name, (_, checksum)), found in zip(expected.items(), checksums, strict=True):
            if found != checksum:
                return f"the content of {name} has changed since it was written"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum_or_error(path: Path) -> str:
    try:
        return _sha256(path)
    except OSError as error:
        return str(error)

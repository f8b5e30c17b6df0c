"""A directory keeps the sizes and checksums of its files, so that later damage is found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from train.files.whole import write_whole

MANIFEST = "manifest.json"
_THREADS = 4

Checksums = dict[str, dict[str, int | str]]
"""``{path in the directory: {"size": bytes, "sha256": hex}}``."""


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_names(directory: Path) -> list[str]:
    """Returns the paths of all files in a directory, at any depth, but for its manifest."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != MANIFEST)
    return sorted(path.relative_to(directory).as_posix() for path in files)


def hash_files(directory: Path, names: Iterable[str]) -> Checksums:
    """Computes sizes and checksums of some files of a directory; `names` are paths in it.

    Raises `OSError` where a file cannot be read.
    """
    files = {name: directory / name for name in names}
    with ThreadPoolExecutor(_THREADS) as pool:  # hashing releases the interpreter lock
        hashes = dict(zip(files, pool.map(hash_file, files.values()), strict=True))
    return {
        name: {"size": file.stat().st_size, "sha256": hashes[name]} for name, file in files.items()
    }


def write_manifest(
    directory: Path, known: Checksums | None = None, *, ignore: str | None = None
) -> None:
    """Writes ``manifest.json``: ``{"files": Checksums}`` of all files of a directory, at any depth.

    Files with checksums in `known` are not read again. Files named `ignore`, which may change later,
    are not listed. Raises `OSError` where a file cannot be read or there is no space left.
    """
    names = [name for name in file_names(directory) if Path(name).name != ignore]
    listed = {name: known[name] for name in names if name in known} if known else {}
    listed |= hash_files(directory, (name for name in names if name not in listed))
    write_whole(directory / MANIFEST, json.dumps({"files": listed}, indent=1, sort_keys=True))


def find_damage(directory: Path, checked: Callable[[str], bool] = lambda name: True) -> str | None:
    """Says in words what is wrong with the files that a directory's manifest lists, or returns None.

    Only files whose name passes `checked` are looked at; other processes read the others.
    """
    try:
        listed = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["files"]
        expected = {
            name: (entry["size"], entry["sha256"])
            for name, entry in listed.items()
            if checked(name)
        }
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
    try:
        checksums = hash_files(directory, expected)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    for name, (_, checksum) in expected.items():
        if checksums[name]["sha256"] != checksum:
            return f"the content of {name} has changed since it was written"
    return None

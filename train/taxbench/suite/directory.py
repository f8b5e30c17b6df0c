"""The directory of a benchmark, which belongs to one group of settings and one process at a time."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from train.config import UserError
from train.files.lock import hold, release
from train.files.whole import check_place, write_json


@contextlib.contextmanager
def own_directory(
    output_dir: str, file: str, settings: Mapping[str, Any], what: str
) -> Iterator[Path]:
    """Makes the output directory, or finds the one of the same settings, and locks it.

    Yields its absolute path.

    Args:
        output_dir: field of the command.
        file: name of the file in it that keeps the settings.
        settings: settings that have to be the same whenever the directory is used.
        what: contents of a directory with other settings, for messages; their names follow it.

    Raises:
        UserError: the directory holds something else, cannot be written, or is in use.
    """
    directory = Path(output_dir).expanduser().absolute()
    check_place(directory, "output_dir")
    record, now = directory / file, json.loads(json.dumps(settings))
    if record.exists():
        before = json.loads(record.read_text())
        if other := [name for name in now if before.get(name) != now[name]]:
            raise UserError(
                f"output_dir {str(directory)!r} holds {what} {', '.join(other)}; choose another "
                "directory, or those settings."
            )
    elif directory.exists() and any(directory.iterdir()):
        raise UserError(f"output_dir {str(directory)!r} holds other files; choose another.")
    else:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(record, now)
    hold(directory)
    try:
        yield directory
    finally:
        release(directory)

"""Read records from files and from the hub, each with the place it came from.

Files are `.json` (one list of objects), `.jsonl` (one object per line), either of them gzipped, and
`.parquet`. Anything that is not a file is a data set name for `datasets.load_dataset`, with one of its
configurations behind a colon where it has several: `openai/gsm8k:main`.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet")


class DataError(ValueError):
    """A data set cannot be used; the message names the place, what was found and what to do."""


class Record(dict[str, Any]):
    """One row of a data set: a dict that remembers file and line (or row), for error messages."""

    def __init__(self, fields: dict[str, Any], where: str):
        super().__init__(fields)
        self.where = where


def where_of(record: Mapping[str, Any]) -> str:
    """The place a record was read from, or `"record"` for a dict made by hand."""
    return getattr(record, "where", "record")


def read_records(source: str | Path, split: str = "train") -> list[Record]:
    """Read every record of a file or of a data set on the hub, in order; at least one.

    A `source` that ends in one of `SUFFIXES` is a file. `split` is that of a hub data set, as
    `datasets.load_dataset` takes it; files have none.

    Raises:
      DataError: When nothing is there, the file is damaged, or it holds no records. A broken line
        is named by its number.
      FileNotFoundError: When `source` is a path to a file that does not exist.

    Example:
      >>> import json, pathlib, tempfile
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "pairs.jsonl"
      >>> _ = path.write_text(json.dumps({"prompt": "1+1=", "chosen": "2", "rejected": "3"}))
      >>> read_records(path)
      [{'prompt': '1+1=', 'chosen': '2', 'rejected': '3'}]
    """
    path, name = Path(source), str(source)
    if name.endswith(SUFFIXES):
        if not path.is_file():
            raise FileNotFoundError(f"Data file {name} does not exist.")
        records = list(_read_file(path))
    elif path.exists():
        raise DataError(
            f"{name}: cannot tell the format from the name. Supported endings: "
            f"{', '.join(SUFFIXES)}."
        )
    else:
        records = _read_hub(name, split)
    if not records:
        raise DataError(f"{name} holds no records.")
    return records


def _read_file(path: Path) -> Iterator[Record]:
    if path.name.endswith(".parquet"):
        return _read_parquet(path)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _read_json_lines(path)
    return _read_json_list(path)


def _read_bytes(path: Path) -> bytes:
    """The content of a file, unpacked."""
    data = path.read_bytes()
    if not path.name.endswith(".gz"):
        return data
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not an intact gzip file: {error}.") from error


def _parse(data: bytes, where: str) -> Any:
    """A JSON value; errors name the place `where`."""
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not valid UTF-8 ({error.reason} at byte {error.start})."
        ) from None
    # Not only its own errors: numbers of thousands of digits, and nesting without end.
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}).") from None


def _as_record(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected a JSON object, found {type(value).__name__}.")
    return Record(value, where)


def _read_json_lines(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_read_bytes(path).split(b"\n"), start=1):
        if line.strip():
            where = f"{path.name} line {number}"
            yield _as_record(_parse(line, where), where)


def _read_json_list(path: Path) -> Iterator[Record]:
    try:
        values = _parse(_read_bytes(path), path.name)
    except DataError as error:
        if "Extra data" in str(error):
            raise DataError(
                f"{path.name}: holds more than one JSON value. If it has one object per line, "
                "name it .jsonl."
            ) from None
        raise
    if not isinstance(values, list):
        raise DataError(
            f"{path.name}: expected one JSON list of objects, found {type(values).__name__}."
        )
    for number, value in enumerate(values, start=1):
        where = f"{path.name} record {number}"
        yield _as_record(value, where)


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not an intact parquet file: {error}") from error
    for number, row in enumerate(rows, start=1):
        yield Record(row, f"{path.name} row {number}")


def _read_hub(name: str, split: str) -> list[Record]:
    import datasets

    repository, _, configuration = name.partition(":")
    try:
        dataset = datasets.load_dataset(repository, configuration or None, split=split)
    except Exception as error:  # the hub client raises errors of many libraries
        raise DataError(
            f"Cannot load data set {name!r}, split {split!r}: {type(error).__name__}: {error}. "
            "A configuration follows the name as in 'openai/gsm8k:main'. "
            f"For a local file give a path ending in {', '.join(SUFFIXES)}."
        ) from error
    return [
        Record(dict(row), f"{name} [{split}] row {number}")
        for number, row in enumerate(dataset, start=1)
    ]

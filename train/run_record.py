"""What a run's directory says of it: settings, inputs and logged metrics."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from train.config import UserError

Row = dict[str, float]


@dataclass(frozen=True)
class RunRecord:
    """One run as its directory records it.

    Attributes:
        name: What tells it from the other runs of a report: the end of its path.
        path: Its directory.
        command: "sft" or "dpo".
        settings: ``{"trainer.steps": 10, …}``.
        inputs: Content hash by name of what it reads.
        rows: Logged metrics with their ``"step"``, in order; none when nothing was logged yet.
        finished: Whether its summary was written.
    """

    name: str
    path: Path
    command: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    rows: Sequence[Row]
    finished: bool

    def series(self, metric: str) -> tuple[list[float], list[float]]:
        """Steps and values of a metric, where it was logged."""
        points = [(row["step"], row[metric]) for row in self.rows if metric in row]
        return [step for step, _ in points], [value for _, value in points]


def read_runs(paths: Sequence[str | Path]) -> list[RunRecord]:
    """Reads the records of runs.

    Args:
        paths: Output directories, each once.

    Raises:
        UserError: names the directory and what is missing or damaged in it.
    """
    directories = [Path(path).expanduser().absolute() for path in paths]
    for path in directories:
        if directories.count(path) > 1:
            raise UserError(f"run {str(path)!r} is given twice.")
    names = _short_names(directories)
    return [read_run(path, name) for path, name in zip(directories, names, strict=True)]


def read_run(path: Path, name: str | None = None) -> RunRecord:
    """Reads the record of one run.

    Args:
        path: Its output directory.
        name: What to call it; by default the last part of its path.

    Raises:
        UserError: see `read_runs`.
    """
    identity, config = path / "run.json", path / "config.yaml"
    if not identity.is_file():
        raise UserError(
            f"run {str(path)!r} holds no run (there is no run.json); give the output_dir of one."
        )
    try:
        record = json.loads(identity.read_text(encoding="utf-8"))
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
        command, inputs = record["command"], record["inputs"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"run {str(path)!r} cannot be read: {error}") from error
    return RunRecord(
        name=name or path.name,
        path=path,
        command=command,
        settings=dict(_flat(settings)),
        inputs=inputs,
        rows=_rows(path / "metrics.jsonl"),
        finished=(path / "summary.json").is_file(),
    )


def _rows(path: Path) -> list[Row]:
    """All whole lines; the last one may be in the middle of being written."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows.append({key: float(value) for key, value in row.items()})
        except (ValueError, TypeError, AttributeError) as error:
            if number < len(lines):
                raise UserError(f"{path} line {number} is damaged: {error}") from error
    return [row for row in rows if "step" in row]


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    flat = []
    for key, value in settings.items():
        name = f"{prefix}{key}"
        flat += _flat(value, f"{name}.") if isinstance(value, Mapping) else [(name, value)]
    return flat


def _short_names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart, all of one length."""
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]

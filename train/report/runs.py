"""The runs of a report, read from their directories."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.config import UserError
from train.files.metrics_log import read_metrics

Curve = tuple[list[float], list[float]]
"""Steps, and the value of a metric at each."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A run as the report shows it: a label of its own, and flat settings, the command among them."""

    name: str
    settings: dict[str, Any]
    curves: dict[str, Curve]
    finished: bool

    def last(self, metric: str) -> float | None:
        """Returns the last value of a metric, or None."""
        return self.curves[metric][1][-1] if metric in self.curves else None


def read_runs(paths: Sequence[str]) -> list[Run]:
    """Reads the runs, in the order given.

    Raises `UserError` where a directory is no run, is given twice, or has logged nothing.
    """
    directories = [Path(path).absolute() for path in paths]
    if len(set(directories)) < len(directories):
        raise UserError("The same run is given twice; give each once.")
    names = _labels(directories)
    return [_read(path, name) for path, name in zip(directories, names, strict=True)]


def differing_settings(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Returns the settings that differ, one value a run; ``output_dir`` does not count."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = {name: [run.settings.get(name) for run in runs] for name in names}
    return {
        name: values
        for name, values in rows.items()
        if name != "output_dir" and any(value != values[0] for value in values)
    }


def _labels(directories: Sequence[Path]) -> list[str]:
    """Labels the runs by as many trailing parts of their paths as it takes to tell them apart."""
    for length in range(1, max(len(path.parts) for path in directories) + 1):
        labels = ["/".join(path.parts[-length:]) for path in directories]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in directories]


def _read(path: Path, name: str) -> Run:
    try:
        record = json.loads((path / "run.json").read_text(encoding="utf-8"))
        settings = {"command": record["command"], **record["settings"]}
        rows = read_metrics(path / "metrics.jsonl")
    except FileNotFoundError as error:
        raise UserError(f"{str(path)!r} holds no run with metrics: {error.filename}.") from error
    except UserError:  # of a damaged line, which it names
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{str(path)!r} cannot be read as a run ({error!r}).") from error
    curves: dict[str, Curve] = {}
    for row in rows:
        step = row.pop("step")
        for metric, value in row.items():
            steps, values = curves.setdefault(metric, ([], []))
            steps.append(step)
            values.append(value)
    if not curves:
        raise UserError(f"{str(path)!r} has logged nothing yet.")
    return Run(name, settings, curves, (path / "summary.json").exists())

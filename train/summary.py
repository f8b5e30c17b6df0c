"""The end of a run: its figures in a table, and summary.json."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table

from train.metrics_log import read_metrics
from train.output_dir import OutputDir

_HIDDEN = ("step", "tokens_per_second", "learning_rate")


def summarise(output: OutputDir) -> dict[str, Any]:
    """First and last value of every logged metric, and the number of steps.

    Returns:
        ``{"steps": …, "metrics": {name: {"first": …, "last": …}}, "export": path}``.
    """
    metrics: dict[str, dict[str, float]] = {}
    rows = read_metrics(output.path / "metrics.jsonl")
    for row in rows:
        for name, value in row.items():
            if name not in _HIDDEN:
                metrics.setdefault(name, {"first": value})["last"] = value
    return {"steps": rows[-1]["step"], "metrics": metrics, "export": str(output.export)}


def show_summary(summary: dict[str, Any], console: Console) -> None:
    """Prints the figures of a finished run."""
    table = Table(title=f"{summary['steps']} steps")
    table.add_column("metric")
    table.add_column("first", justify="right")
    table.add_column("last", justify="right")
    for name, value in summary["metrics"].items():
        table.add_row(name, f"{value['first']:.5g}", f"{value['last']:.5g}")
    console.print(table)
    console.print(f"Model: {summary['export']}", highlight=False, soft_wrap=True)

"""The end of a run: its figures in a table, and summary.json."""

from __future__ import annotations

import statistics
from typing import Any

from rich.console import Console
from rich.table import Table

from train.files.metrics_log import read_metrics
from train.files.run_directory import OutputDir
from train.training.step_log import HEADLINES

_HIDDEN = ("step", "tokens_per_second", "learning_rate")


def summarise(output: OutputDir, *, exported: int) -> dict[str, Any]:
    """Returns what summary.json holds, above all the first and the last value of every metric."""
    metrics: dict[str, dict[str, float]] = {}
    rows = read_metrics(output.path / "metrics.jsonl")
    for row in rows:
        for name, value in row.items():
            if name not in _HIDDEN:
                metrics.setdefault(name, {"first": value})["last"] = value
    rates = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
    return {
        "steps": rows[-1]["step"],
        "metrics": metrics,
        # The first one holds the compilation.
        "tokens_per_second": statistics.median(rates[1:] or rates),
        "export": str(output.export),
        "exported_step": exported,
    }


def show_summary(summary: dict[str, Any], console: Console) -> None:
    """Prints the figures of a finished run: held-out ones, those of training, those of merging."""
    rate = f"{summary['tokens_per_second']:,.0f} tokens/s"
    table = Table(title=f"{summary['steps']} steps, {rate}")
    table.add_column("metric")
    table.add_column("first", justify="right")
    table.add_column("last", justify="right")
    for kind in ("eval_", "", "merge/"):
        for name, value in summary["metrics"].items():
            if _kind(name) == kind:
                first, last = f"{value['first']:.5g}", f"{value['last']:.5g}"
                table.add_row(name, first, last, style=_style(name, value))
        table.add_section()
    console.print(table)
    console.print(
        f"Model of step {summary['exported_step']}: {summary['export']}",
        highlight=False,
        soft_wrap=True,
    )


def _kind(name: str) -> str:
    return next((prefix for prefix in ("eval_", "merge/") if name.startswith(prefix)), "")


def _style(name: str, value: dict[str, float]) -> str | None:
    """Returns the style of a row: headlines are bold, and skipped steps are yellow."""
    if name == "skipped_steps" and value["last"]:
        return "yellow"
    return "bold" if name in HEADLINES else None

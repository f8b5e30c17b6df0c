"""The results as Markdown tables."""

from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tests.bench.budgets import Budget


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _mib(value: float) -> str:
    return _number(value / 2**20)


def _spread(row: dict[str, Any]) -> str:
    return f"{row['ratio_low']:.2f}–{row['ratio_high']:.2f}"


Column = tuple[str, Callable[[dict[str, Any]], str]]


def _column(name: str, key: str, show: Callable[[Any], str] = _number) -> Column:
    return name, lambda row: show(row[key])


def _print(
    console: Console, title: str, columns: Sequence[Column], rows: list[dict[str, Any]]
) -> None:
    """Prints a table whose columns of numbers stand to the right."""
    table = Table(box=box.MARKDOWN)
    for index, (name, show) in enumerate(columns):
        numbers = all(show(row)[:1] in "0123456789–" for row in rows)
        table.add_column(name, justify="right" if index and numbers else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(show(row) for _, show in columns))
    console.print(f"\n{title}")
    console.print(table)


def print_times(console: Console, title: str, rows: list[dict[str, Any]]) -> None:
    """Prints times next to a baseline, which is the first row."""
    columns = [
        _column("optimizer step", "optimizer", str),
        _column("ms", "milliseconds"),
        (f"time ÷ {rows[0]['optimizer']}", lambda row: f"{row['ratio']:.2f}"),
        ("middle half of the ratios", _spread),
    ]
    _print(console, title, columns, rows)


def print_compiled(
    console: Console, topology: str, rows: list[dict[str, Any]], passes: dict[str, int]
) -> None:
    """Prints figures of the TPU compiler."""

    def ratio(name: str, key: str) -> Column:
        return name, lambda row: f"{row[key]:.3f}"

    columns = [
        _column("optimizer step", "optimizer", str),
        ratio("bytes ÷ optax.adamw", "bytes_ratio"),
        _column("temp MiB", "temp_bytes", _mib),
        ratio("flops ÷ optax.adamw", "flops_ratio"),
    ]
    title = (
        f"TPU compiler, {topology}, per chip; the search for an exact threshold counted with "
        f"{passes['exact']} passes, for a sampled one with {passes['sampled']} (measured)"
    )
    _print(console, title, columns, rows)


def print_train_step(console: Console, topology: str, rows: list[dict[str, Any]]) -> None:
    """Prints figures of whole training steps."""
    columns = [
        _column("gradients and optimizer step", "optimizer", str),
        _column("temp MiB", "temp_bytes", _mib),
    ]
    _print(console, f"TPU compiler, {topology}, a whole training step, per chip", columns, rows)


def print_storage(console: Console, rows: list[dict[str, Any]]) -> None:
    """Prints what holding the delta takes."""
    columns = [
        _column("merge", "optimizer", str),
        _column("density", "density"),
        _column("storage", "storage", str),
        _column("device bytes/parameter", "device_bytes"),
        _column("host bytes/parameter", "host_bytes"),
        _column("largest difference ÷ largest reference term", "difference"),
        _column("rms ÷ rms", "rms_difference"),
    ]
    _print(console, "Storage of the delta", columns, rows)


def print_budgets(console: Console, rows: list[Budget]) -> None:
    """Prints the budgets."""
    columns = [
        _column("budget", "name", str),
        ("limit", lambda row: ("< " if row["below"] else "≤ ") + _number(row["limit"])),
        _column("measured", "measured"),
        _column("", "verdict", str),
    ]
    _print(console, "Budgets", columns, [vars(row) | {"verdict": row.verdict} for row in rows])

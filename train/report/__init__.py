"""``python -m train report RUN… --output report.html``: runs compared on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from train.config import UserError
from train.output_dir import check_place, write_atomically
from train.prepare import blamed_on
from train.report.page import render
from train.run_record import read_runs

__all__ = ["write_report"]


def write_report(runs: Sequence[str | Path], output: str | Path) -> Path:
    """Writes curves, settings and final figures of runs as one HTML file that needs nothing else.

    Runs that are still going on are shown as far as they have come.

    Args:
        runs: Output directories of training runs, at least one.
        output: HTML file to write.

    Returns:
        ``output``.

    Raises:
        UserError: a run cannot be read, or ``output`` exists or cannot be written.

    Example:
        >>> write_report(["runs/adamw", "runs/on_ties"], "report.html")  # doctest: +SKIP
    """
    output, console = Path(output), Console()
    _check_new(output)
    check_place(output, "output")
    records = read_runs(runs)
    for record in records:
        if not record.rows:
            raise UserError(f"run {str(record.path)!r} has not logged a step yet.")
    page = render(records, console)
    with blamed_on("output"):
        _check_new(output)
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, page)
    console.print(f"Written to {output}", highlight=False, soft_wrap=True)
    return output


def _check_new(output: Path) -> None:
    if output.exists():
        raise UserError(f"output: {str(output)!r} exists; nothing is overwritten.")

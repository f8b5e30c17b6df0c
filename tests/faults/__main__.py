"""``python -m tests.faults``: the campaign, its table, and docs/faults.md."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.faults import kills, numbers, rows, storage
from tests.faults.rig import ROOT, Outcome, Rig

REPORT = ROOT / "docs" / "faults.md"
Fault = Callable[[], Outcome | list[Outcome]]


def faults(rig: Rig, arguments: argparse.Namespace) -> Iterator[tuple[str, Fault]]:
    """The campaign in order, each fault with a name to show."""
    yield "kills", lambda: kills.kill(rig, arguments.kills, arguments.seed)
    yield "SIGTERM", lambda: kills.terminate(rig, arguments.terms, arguments.seed)
    for left in (0.0, 0.5):
        yield "full disk", lambda left=left: storage.disk_full(rig, left)
    yield "damaged checkpoints", lambda: storage.damaged_runs(rig)
    yield "every file damaged", lambda: storage.every_file(rig.directory / "files")
    yield "NaN batches", lambda: numbers.one_bad_batch(rig)
    yield "only NaN batches", lambda: numbers.only_bad_batches(rig)
    yield "malformed rows", lambda: rows.malformed_rows(rig, arguments.rows, arguments.seed)


def main() -> int:
    """Runs the campaign; 1 when something was lost or said unclearly."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="SIGKILLs")
    parser.add_argument("--terms", type=int, default=5, help="SIGTERMs")
    parser.add_argument("--rows", type=int, default=1000, help="malformed data rows")
    parser.add_argument("--seed", type=int, default=0, help="of all random choices")
    parser.add_argument("--no-report", action="store_true", help=f"leave {REPORT.name} as it is")
    arguments = parser.parse_args()
    console, started = Console(), time.monotonic()
    outcomes: list[Outcome] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), MofNCompleteColumn())
    with (
        tempfile.TemporaryDirectory(prefix="faults-") as directory,
        Progress(*columns, TimeElapsedColumn(), console=console) as progress,
    ):
        task = progress.add_task("undisturbed run", total=None)
        rig = Rig(Path(directory) / "rig")
        campaign = list(faults(rig, arguments))
        progress.update(task, total=len(campaign))
        for name, fault in campaign:
            progress.update(task, description=name)
            found = fault()
            outcomes += found if isinstance(found, list) else [found]
            progress.advance(task)
    show(outcomes, console)
    if not arguments.no_report:
        REPORT.write_text(report(outcomes, time.monotonic() - started), encoding="utf-8")
        console.print(f"Written to {REPORT}", highlight=False)
    return int(any(outcome.failures for outcome in outcomes))


def show(outcomes: list[Outcome], console: Console) -> None:
    """Prints the table, and every failure below it."""
    table = Table(title="Faults", show_lines=True)
    for name in ("fault", "how", "expected", "tries", "failures", "seen"):
        table.add_column(name, justify="right" if name in ("tries", "failures") else "left")
    for one in outcomes:
        color = "red" if one.failures else "green" if one.tries else "yellow"
        cells = (
            one.fault,
            one.how,
            one.expected,
            str(one.tries),
            str(len(one.failures)),
            one.detail,
        )
        table.add_row(*cells, style=color)
    console.print(table)
    for outcome in outcomes:
        for failure in outcome.failures[:5]:
            console.print(f"{outcome.fault}: {failure}", style="red", markup=False, highlight=False)


def report(outcomes: list[Outcome], seconds: float) -> str:
    """The table as Markdown."""
    lines = [
        "# Faults",
        "",
        "What happens to a training run when something goes wrong. `make faults` puts each fault into",
        "real runs of a tiny model (40 steps, a checkpoint every 4, OnDARE with new masks at every",
        "step), starts the same command again, and compares the exported weights and every logged",
        "figure with those of a run that nothing happened to. It writes this page.",
        "",
        "| fault | how | expected | tries | failures | seen |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.fault} | {one.how} | {one.expected} | {one.tries} | {len(one.failures)} | "
        f"{one.detail.replace('|', '/')} |"
        for one in outcomes
    ]
    failures = [f"- {one.fault}: {failure}" for one in outcomes for failure in one.failures[:5]]
    if failures:
        lines += ["", "## Failures", "", *failures]
    return "\n".join([*lines, "", f"The campaign took {seconds / 60:.0f} minutes.", ""])


if __name__ == "__main__":
    sys.exit(main())

"""Runs recipes on seeds in processes of one core each, and keeps what they find."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from train.taxbench.miniature.sizes import Sizes, models_file
from train.taxbench.suite.recipes import Recipe
from train.taxbench.suite.statistics import Results


@dataclasses.dataclass(frozen=True)
class Job:
    """A recipe on a seed."""

    seed: int
    recipe: Recipe


class Runner:
    """Runs jobs that have no results yet; `directory` keeps models and results."""

    def __init__(self, directory: Path, sizes: Sizes, workers: int, console: Console):
        self._directory, self._sizes, self._console = directory, sizes, console
        self._file = directory / "results.jsonl"
        self._workers = workers

    def results(self) -> Results:
        """Reads everything that is known by now."""
        records = []
        if self._file.exists():
            for line in self._file.read_text(encoding="utf-8").splitlines():
                with contextlib.suppress(json.JSONDecodeError):  # a kill may have cut a line off
                    records.append(json.loads(line))
        return Results(records)

    def complete(self, title: str, jobs: Sequence[Job]) -> Results:
        """Runs what is missing of `jobs`; returns all results."""
        known = self.results()
        # Recipes that differ in their names alone are run once.
        missing = {
            (job.seed, *job.recipe.trajectories()): job
            for job in jobs
            if not all(known.has(key, job.seed) for key in job.recipe.trajectories())
        }
        if not missing:
            return known
        ordered = sorted(missing.values(), key=lambda job: job.seed)
        seeds = sorted({job.seed for job in ordered})
        # The models of all seeds are trained first, so that no two processes train the same ones.
        new = [s for s in seeds if not models_file(self._directory, s, self._sizes).exists()]
        train = functools.partial(_train_seed, self._directory, self._sizes)
        run = functools.partial(_run_job, self._directory, self._sizes)
        self._end_last_line()
        with (
            self._pool() as pool,
            self._file.open("a", encoding="utf-8") as file,
            self._progress() as progress,
        ):
            if new:
                for _ in _run_all(pool, progress, "base and SFT models", train, new):
                    pass
            for records in _run_all(pool, progress, title, run, ordered):
                file.writelines(json.dumps(record) + "\n" for record in records)
                file.flush()
        return self.results()

    def _end_last_line(self) -> None:
        """Keeps a line that was cut off apart from the next one."""
        if self._file.exists() and not self._file.read_bytes().endswith(b"\n"):
            with self._file.open("a", encoding="utf-8") as file:
                file.write("\n")

    def _pool(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            self._workers, mp_context=multiprocessing.get_context("spawn"), initializer=_one_core
        )

    def _progress(self) -> Progress:
        return Progress(
            TextColumn("{task.description:<24}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )


def _run_all(
    pool: ProcessPoolExecutor,
    progress: Progress,
    title: str,
    call: Callable[[Any], Any],
    arguments: Sequence[Any],
) -> Iterator[Any]:
    """Yields results of all calls as they come; the first error stops what has not begun."""
    bar = progress.add_task(title, total=len(arguments))
    futures = [pool.submit(call, argument) for argument in arguments]
    try:
        for future in as_completed(futures):
            yield future.result()
            progress.advance(bar)
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def _one_core() -> None:
    flags = os.environ.get("XLA_FLAGS", "")
    single = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["XLA_FLAGS"] = f"{flags} {single}".strip()


def _train_seed(directory: Path, sizes: Sizes, seed: int) -> None:
    # The main process needs no code of models.
    from train.taxbench.suite.worker import bench

    bench(directory, seed, sizes)


def _run_job(directory: Path, sizes: Sizes, job: Job) -> list[dict[str, Any]]:
    from train.taxbench.suite.worker import bench

    return bench(directory, job.seed, sizes).run(job.recipe)

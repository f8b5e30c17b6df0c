"""Runs recipes on seeds in processes of one core each, and keeps what they find."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from train.taxbench.miniature.sizes import Sizes, models_file
from train.taxbench.suite.recipes import Recipe
from train.taxbench.suite.statistics import Key, Results


@dataclasses.dataclass(frozen=True)
class Job:
    """A recipe on a seed."""

    seed: int
    recipe: Recipe

    def trajectories(self) -> list[Key]:
        """The trajectories it makes."""
        run = self.recipe.fingerprint()
        return [(run, None), *((run, merge.name) for merge in self.recipe.merges)]


class Runner:
    """Runs jobs that have no results yet, in processes of one core each.

    Args:
        directory: of models and results.
        sizes: of everything.
        workers: processes.
    """

    def __init__(self, directory: Path, sizes: Sizes, workers: int, console: Console):
        self._directory, self._sizes, self._console = directory, sizes, console
        self._file = directory / "results.jsonl"
        self._workers = workers

    def results(self) -> Results:
        """Everything known by now."""
        if not self._file.exists():
            return Results([])
        records = []
        for line in self._file.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(json.JSONDecodeError):  # a kill may have cut a line off
                records.append(json.loads(line))
        return Results(records)

    def run(self, title: str, jobs: Sequence[Job]) -> Results:
        """Runs what is missing of `jobs`; returns all results."""
        known = self.results()
        missing = {
            (job.seed, job.recipe.fingerprint(), job.recipe.merges): job
            for job in jobs
            if not all(known.has(key, job.seed) for key in job.trajectories())
        }
        ordered = sorted(missing.values(), key=lambda job: job.seed)
        if not ordered:
            return known
        self._end_last_line()
        with self._pool() as pool, self._file.open("a", encoding="utf-8") as file:
            progress = self._progress()
            with progress:
                self._train_models(pool, progress, sorted({job.seed for job in ordered}))
                bar = progress.add_task(title, total=len(ordered))
                futures = [pool.submit(_run_job, self._directory, self._sizes, j) for j in ordered]
                for records in _finished(futures):
                    file.writelines(json.dumps(record) + "\n" for record in records)
                    file.flush()
                    progress.advance(bar)
        return self.results()

    def _end_last_line(self) -> None:
        """Keeps a line that was cut off apart from the next one."""
        if self._file.exists() and not self._file.read_bytes().endswith(b"\n"):
            with self._file.open("a", encoding="utf-8") as file:
                file.write("\n")

    def _train_models(
        self, pool: ProcessPoolExecutor, progress: Progress, seeds: list[int]
    ) -> None:
        """Trains the models of all seeds first, so that no two processes train the same ones."""
        todo = [s for s in seeds if not models_file(self._directory, s, self._sizes).exists()]
        if not todo:
            return
        bar = progress.add_task("base and SFT models", total=len(todo))
        futures = [pool.submit(_train_seed, self._directory, self._sizes, seed) for seed in todo]
        for _ in _finished(futures):
            progress.advance(bar)

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


def _finished(futures: Sequence[Future[Any]]) -> Iterator[Any]:
    """Results as they come; the first error stops everything that has not begun."""
    try:
        for future in as_completed(futures):
            yield future.result()
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def _one_core() -> None:
    flags = os.environ.get("XLA_FLAGS", "")
    single = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["XLA_FLAGS"] = f"{flags} {single}".strip()


def _train_seed(directory: Path, sizes: Sizes, seed: int) -> None:
    from train.taxbench.suite.worker import bench

    bench(directory, seed, sizes)


def _run_job(directory: Path, sizes: Sizes, job: Job) -> list[dict[str, Any]]:
    from train.taxbench.suite.worker import bench

    return bench(directory, job.seed, sizes).run(job.recipe)

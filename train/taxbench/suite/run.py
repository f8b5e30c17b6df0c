"""`python -m train taxbench`: the benchmark over seeds with independent bases, tuned on others."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console

from train.config import UserError, require
from train.files.lock import hold, release
from train.files.whole import write_json
from train.taxbench.miniature.sizes import Sizes, check_sizes
from train.taxbench.suite.candidates import candidates, controls
from train.taxbench.suite.runner import Job, Runner
from train.taxbench.suite.selection import Entry, choose, entries, narrowed
from train.taxbench.suite.statistics import Results
from train.taxbench.suite.studies import Study, studies

FIRST_DEV_SEED, FIRST_SEED = 101, 1


@dataclasses.dataclass(frozen=True)
class Suite:
    """How much is run.

    Attributes:
        dev_seeds: seeds on which settings are chosen.
        seeds: other seeds, on which they are reported.
        study_seeds: the first of `seeds`, on which tables and figures after the first are made.
        groups: methods of the first table; None for all.
    """

    dev_seeds: int
    seeds: int
    study_seeds: int
    groups: tuple[str, ...] | None = None


SUITES = {
    "demo": Suite(1, 2, 0, groups=("adamw", "kl", "on_dare", "on_ties")),
    "paper": Suite(2, 8, 5),
    "full": Suite(4, 12, 12),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaxbenchConfig:
    """The alignment-tax benchmark over many seeds, with tuning on others and every control.

    Attributes:
        output_dir: Directory of models, results and report. A second run with the same settings
            goes on where the first one stopped.
        suite: demo (four methods, minutes), paper (all methods, tables and figures of the paper) or
            full (the same on twice the seeds).
        workers: Processes, each on one core. Unset: as many as there are cores.
        reward: Reward at which capabilities are compared, between 0 and 1.
        steps: Steps of alignment, the same for every method.
        eval_every: Steps from one evaluation to the next; a divisor of `steps`.
        base_steps: Steps of training every base model.
        sft_steps: Steps of fine-tuning it on instructions.
        pairs: Preference pairs.
        questions: Held-out questions in each of the eight families.
    """

    output_dir: str
    suite: Literal["demo", "paper", "full"] = "demo"
    workers: int | None = None
    reward: float = 0.8
    steps: int = 160
    eval_every: int = 10
    base_steps: int = 1000
    sft_steps: int = 500
    pairs: int = 4000
    questions: int = 64

    def sizes(self) -> Sizes:
        """What results rest on besides seed and recipe."""
        names = {f.name for f in dataclasses.fields(Sizes)} - {"batch_size", "version"}
        return Sizes(**{name: getattr(self, name) for name in names})


def check(config: TaxbenchConfig) -> None:
    """Checks the settings.

    Raises:
        UserError: names the first field that cannot be used.
    """
    check_sizes(config)
    if config.workers is not None:
        require(config.workers >= 1, "workers", config.workers, "1 or larger")


def open_directory(config: TaxbenchConfig) -> Path:
    """Makes the output directory, or finds the one of a run with the same sizes.

    Raises:
        UserError: it holds results of other sizes, or something else, or cannot be written.
    """
    directory = Path(config.output_dir).expanduser().absolute()
    file, sizes = directory / "sizes.json", dataclasses.asdict(config.sizes())
    if file.exists():
        found = json.loads(file.read_text())
        if found != sizes:
            other = [name for name in sizes if found.get(name) != sizes[name]]
            raise UserError(
                f"output_dir {str(directory)!r} holds results with other settings of "
                f"{', '.join(other)}; choose another directory, or those settings."
            )
        return directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise UserError(f"output_dir {str(directory)!r} holds other files; choose another.")
        write_json(file, sizes)
    except OSError as error:
        raise UserError(
            f"output_dir {str(directory)!r} cannot be used ({error.strerror}); choose a directory "
            "that can be written to."
        ) from error
    return directory


@dataclasses.dataclass(frozen=True)
class Outcome:
    """All that the report is made from."""

    results: Results
    first: Sequence[Entry]
    controls: Sequence[Entry]
    studies: Sequence[tuple[Study, Sequence[Entry]]]
    dev_seeds: Sequence[int]
    seeds: Sequence[int]
    study_seeds: Sequence[int]


def run(config: TaxbenchConfig) -> Path:
    """Tunes on the dev seeds, runs the chosen settings on the others, and reports.

    Args:
        config: the settings.

    Returns:
        The directory with results.jsonl, report.md, report.html and the figures.

    Raises:
        UserError: a setting cannot be used, and nothing was written then; or another process runs
            the benchmark there.
    """
    check(config)
    directory, suite, console = open_directory(config), SUITES[config.suite], Console()
    workers = config.workers or os.cpu_count() or 1
    runner = Runner(directory, config.sizes(), workers, console)
    from train.taxbench.suite.report import write_report

    hold(directory)
    try:
        path = write_report(run_suite(config, suite, runner), config, directory)
    finally:
        release(directory)
    console.print(f"Report: {path}", soft_wrap=True)
    return directory


def run_suite(config: TaxbenchConfig, suite: Suite, runner: Runner) -> Outcome:
    """Every stage of a suite, each going on where an earlier run stopped."""
    dev = range(FIRST_DEV_SEED, FIRST_DEV_SEED + suite.dev_seeds)
    seeds = range(FIRST_SEED, FIRST_SEED + suite.seeds)
    recipes = [r for r in candidates() if suite.groups is None or r.group in suite.groups]
    results = runner.run("tuning on dev seeds", [Job(s, r) for s in dev for r in recipes])
    chosen = choose(entries(recipes, config.steps), results, dev, config.reward)
    first = narrowed(recipes, chosen)
    online = [r for r in first if r.group in ("on_dare", "on_ties")]
    checks = [control for recipe in online for control in controls(recipe)]
    results = runner.run("first table", [Job(s, r) for s in seeds for r in (*first, *checks)])
    few, asked = seeds[: suite.study_seeds], studies() if suite.study_seeds else []
    for seed in few:  # seed by seed, so that a run that is cut off has whole seeds
        results = runner.run(
            f"studies, seed {seed}", [Job(seed, r) for study in asked for r in study.recipes]
        )
    return Outcome(
        results=results,
        first=chosen,
        controls=entries(checks, config.steps),
        studies=[(study, entries(study.recipes, config.steps)) for study in asked],
        dev_seeds=dev,
        seeds=seeds,
        study_seeds=few,
    )

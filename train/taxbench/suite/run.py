"""`python -m train taxbench`: the benchmark over seeds with independent bases, tuned on others."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from rich.console import Console

from train.config import check_settings
from train.taxbench.miniature.sizes import Sizes
from train.taxbench.suite.candidates import candidates, controls
from train.taxbench.suite.directory import own_directory
from train.taxbench.suite.outcome import Outcome, TaxbenchConfig
from train.taxbench.suite.report import write_report
from train.taxbench.suite.runner import Job, Runner
from train.taxbench.suite.selection import choose, entries, narrowed
from train.taxbench.suite.studies import studies

FIRST_DEV_SEED, FIRST_SEED = 101, 1


@dataclasses.dataclass(frozen=True)
class Suite:
    """Numbers of seeds, and the methods that are run on them."""

    dev_seeds: int  # settings are chosen on these
    seeds: int  # others, on which the chosen settings are reported
    study_seeds: int  # the first of `seeds`, for tables and figures after the first
    groups: tuple[str, ...] | None = None  # methods of the first table; None for all


SUITES = {
    "demo": Suite(1, 2, 0, groups=("adamw", "kl", "on_dare", "on_ties")),
    "paper": Suite(2, 8, 5),
    "full": Suite(4, 12, 12),
}


def run_taxbench(config: TaxbenchConfig) -> Path:
    """Tunes on the dev seeds, runs the chosen settings on the others, and reports.

    Returns:
        The directory with results.jsonl, report.md, report.html and the figures.

    Raises:
        UserError: a setting cannot be used, and nothing was written then; or another process runs
            the benchmark there.
    """
    check_settings(config)
    sizes, console = Sizes.of(config), Console()
    given, what = dataclasses.asdict(sizes), "results with other settings of"
    with own_directory(config.output_dir, "sizes.json", given, what) as directory:
        runner = Runner(directory, sizes, config.workers or os.cpu_count() or 1, console)
        path = write_report(run_suite(config, runner), directory)
    console.print(f"Report: {path}", soft_wrap=True)
    return directory


def run_suite(config: TaxbenchConfig, runner: Runner) -> Outcome:
    """Runs every stage of a suite; each goes on where an earlier run stopped."""
    suite = SUITES[config.suite]
    dev = range(FIRST_DEV_SEED, FIRST_DEV_SEED + suite.dev_seeds)
    seeds = range(FIRST_SEED, FIRST_SEED + suite.seeds)
    recipes = [r for r in candidates() if suite.groups is None or r.group in suite.groups]
    results = runner.complete("tuning on dev seeds", [Job(s, r) for s in dev for r in recipes])
    chosen = choose(entries(recipes, config.steps), results, dev, config.reward)
    first = narrowed(recipes, chosen)
    online = [r for r in first if r.group in ("on_dare", "on_ties")]
    checks = [control for recipe in online for control in controls(recipe)]
    results = runner.complete("first table", [Job(s, r) for s in seeds for r in (*first, *checks)])
    few, asked = seeds[: suite.study_seeds], studies() if suite.study_seeds else []
    for seed in few:  # seed by seed, so that a run that is cut off has whole seeds
        jobs = [Job(seed, recipe) for study in asked for recipe in study.recipes]
        results = runner.complete(f"studies, seed {seed}", jobs)
    return Outcome(
        config=config,
        results=results,
        first=chosen,
        controls=entries(checks, config.steps),
        studies=[(study, entries(study.recipes, config.steps)) for study in asked],
        dev_seeds=dev,
        seeds=seeds,
        study_seeds=few,
    )

"""`python -m train demo`: the whole comparison from scratch, on a CPU, in minutes."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from train.config import check_settings
from train.files.whole import unwritable, write_json, write_whole
from train.taxbench.miniature import plot, report, tasks
from train.taxbench.miniature.examples import Questions
from train.taxbench.miniature.methods import (
    METHODS,
    OFFLINE_WEIGHTS,
    add_delta,
    align,
    offline_linear,
)
from train.taxbench.miniature.scoring import is_right
from train.taxbench.miniature.sizes import DemoConfig, Sizes
from train.taxbench.miniature.subjects import Subject, make_subject, train_models
from train.taxbench.miniature.training import Lab, Params, Tick
from train.taxbench.miniature.trajectories import Trajectory, compare, records


def new_run_dir(output_dir: str) -> Path:
    """Makes the next free run-NNN directory.

    Raises:
        UserError: `output_dir` is a file or cannot be written.
    """
    parent, number = Path(output_dir).expanduser().absolute(), 0
    try:
        parent.mkdir(parents=True, exist_ok=True)
        while True:
            number += 1
            path = parent / f"run-{number:03d}"
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return path
    except OSError as error:
        raise unwritable("output_dir", parent, error) from error


@contextlib.contextmanager
def stage(progress: Progress, name: str, total: int) -> Iterator[Tick]:
    """Shows a bar for a stage, or a line at its end where the output is not a terminal.

    Yields a function to call with the number of units that have been done since its last call.
    """
    bar = progress.add_task(name, total=total)
    start = time.perf_counter()
    yield lambda units: progress.advance(bar, units)
    if not progress.console.is_terminal:
        progress.console.print(f"{name}: {time.perf_counter() - start:.0f} s")


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<22}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def expected_seconds(config: DemoConfig) -> float:
    """Estimates the wall time on two free CPU cores, compilation included."""
    supervised = 0.027 * config.base_steps + 0.033 * config.sft_steps
    evaluations = len(METHODS) * config.steps // config.eval_every + len(OFFLINE_WEIGHTS)
    aligned = len(METHODS) * config.steps * 0.035
    return 35 + supervised + aligned + evaluations * config.questions * 2e-3


def prepare_subject(lab: Lab, config: DemoConfig, progress: Progress) -> Subject:
    """Trains the base model, fine-tunes it and makes the preference data."""
    sizes = Sizes.of(config)
    with (
        stage(progress, "base model", config.base_steps) as base_tick,
        stage(progress, "SFT", config.sft_steps) as sft_tick,
    ):
        models = train_models(lab, config.seed, sizes, (base_tick, sft_tick))
    subject = make_subject(lab, models, config.seed, sizes)
    progress.console.print(
        f"SFT model: reward {subject.start.reward:.2f}, {100 * subject.start.capability:.1f} % of "
        "the held-out questions right"
    )
    return subject


def align_all(
    lab: Lab, subject: Subject, config: DemoConfig, progress: Progress
) -> tuple[list[Trajectory], dict[str, Params]]:
    """Runs every method; returns all trajectories, and each method's last model by its label."""
    trajectories, last, adamw = [], {}, {}
    for method in METHODS:
        with stage(progress, method.label, config.steps) as tick:
            trajectory, models = align(lab, subject, method, Sizes.of(config), tick)
        trajectories.append(trajectory)
        last[method.label] = models[config.steps]
        if method.name == "adamw":
            adamw = models
    with stage(progress, "Offline linear", len(OFFLINE_WEIGHTS)) as tick:
        trajectories.append(offline_linear(lab, subject, adamw, tick))
    with stage(progress, "Control: AdamW + λτ", len(adamw)) as tick:
        trajectories.append(add_delta(lab, subject, adamw, config.control_weight, tick))
    return trajectories, last


def sample_answers(
    lab: Lab, questions: Questions, models: Mapping[str, Params]
) -> tuple[list[str], list[list[str]]]:
    """Makes a table of the first held-out question of each family with every model's answer."""
    first = np.unique(questions.families, return_index=True)[1]
    columns = [[tasks.decode(row[row != tasks.BOS]) for row in questions.prompt_tokens[first]]]
    for params in models.values():
        answers = lab.answers(params, questions)[first]
        right = is_right(answers, questions.answers[first])
        marked = zip(answers, right, strict=True)
        columns.append([tasks.decode(answer) + ("" if ok else " ✗") for answer, ok in marked])
    return ["question", *models], [list(row) for row in zip(*columns, strict=True)]


def run_demo(config: DemoConfig) -> Path:
    """Trains, aligns, compares and reports.

    Returns:
        The directory with results.jsonl (every evaluated point), settings.json, trajectories.png
        and report.html.

    Raises:
        UserError: a setting cannot be used; nothing was written then.
    """
    check_settings(config)
    console = Console()
    directory = new_run_dir(config.output_dir)
    minutes = expected_seconds(config) / 60
    console.print(
        f"The alignment tax in miniature: about [bold]{minutes:.1f} minutes[/bold] on two free CPU "
        f"cores. Results go to {directory}",
        soft_wrap=True,
    )
    began, cpu = time.perf_counter(), time.process_time()
    write_json(directory / "settings.json", dataclasses.asdict(config))
    with _progress(console) as progress:
        lab = Lab()
        subject = prepare_subject(lab, config, progress)
        trajectories, last = align_all(lab, subject, config, progress)
    questions = subject.questions
    points = [point for trajectory in trajectories for point in records(trajectory, questions)]
    lines = [json.dumps(point, ensure_ascii=False) for point in points]
    write_whole(directory / "results.jsonl", "\n".join(lines))

    rows = compare(trajectories, config.reward, families=questions.families)
    figure, page = directory / "trajectories.png", directory / "report.html"
    plot.draw(rows, config.reward, figure)
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    cost = f"{wall:.0f} s of wall time, {cpu:.0f} s of CPU time"
    answers = sample_answers(lab, questions, {"SFT model": subject.sft, **last})
    write_whole(page, report.page(rows, config, cost, answers, figure))
    console.print(report.table(rows, config.reward, config.steps))
    console.print(report.headline(rows, config.reward), highlight=False)
    console.print(f"{cost}. Report: {page}", soft_wrap=True)
    return directory

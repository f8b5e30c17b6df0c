"""`python -m train demo`: the whole comparison from scratch, on a CPU, in minutes."""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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

from train.config import UserError, require
from train.files.whole import write_json, write_whole
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
from train.taxbench.miniature.sizes import Sizes, check_sizes
from train.taxbench.miniature.subjects import Subject, make_subject, train_models
from train.taxbench.miniature.training import Lab, Params, Tick
from train.taxbench.miniature.trajectories import Trajectory, compare, records


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """The alignment tax in miniature, trained from scratch.

    Attributes:
        output_dir: Directory for the results. Every run gets a new run-NNN directory inside it;
            earlier ones stay as they are.
        seed: Seed of the model, the data and their order.
        base_steps: Steps of training the base model.
        sft_steps: Steps of fine-tuning it on instructions.
        steps: Steps of alignment, the same for every method.
        eval_every: Alignment steps from one evaluation to the next; a divisor of `steps`.
        pairs: Preference pairs.
        questions: Held-out questions in each of the eight families.
        reward: Reward at which capabilities are compared, between 0 and 1.
        control_weight: λ of the control that adds λ·τ to AdamW's models after training.
    """

    output_dir: str = "demo-output"
    seed: int = 0
    base_steps: int = 1000
    sft_steps: int = 500
    steps: int = 160
    eval_every: int = 10
    pairs: int = 4000
    questions: int = 100
    reward: float = 0.8
    control_weight: float = 0.1


def check(config: DemoConfig) -> None:
    """Checks the settings.

    Raises:
        UserError: names the first field that cannot be used.
    """
    check_sizes(config)
    require(config.seed >= 0, "seed", config.seed, "0 or larger")
    require(config.control_weight > 0, "control_weight", config.control_weight, "positive")


def new_run_dir(output_dir: str) -> Path:
    """Makes the next free run-NNN directory.

    Raises:
        UserError: `output_dir` is a file or cannot be written.
    """
    parent = Path(output_dir).expanduser().absolute()
    try:
        parent.mkdir(parents=True, exist_ok=True)
        number = 1
        while True:
            path = parent / f"run-{number:03d}"
            try:
                path.mkdir()
            except FileExistsError:
                number += 1
            else:
                return path
    except OSError as error:
        raise UserError(
            f"output_dir {str(parent)!r} cannot be used ({error.strerror}); choose a directory "
            "that can be written to."
        ) from error


class Stages:
    """Progress bars of all stages; lines of text where the output is not a terminal."""

    def __init__(self, console: Console, progress: Progress):
        self._console, self._progress = console, progress

    @contextlib.contextmanager
    def stage(self, name: str, total: int) -> Iterator[Tick]:
        """Shows one stage of `total` units; yields what is to be told about units done."""
        bar = self._progress.add_task(name, total=total)
        start = time.perf_counter()
        yield lambda units: self._progress.advance(bar, units)
        if not self._console.is_terminal:
            self.say(f"{name}: {time.perf_counter() - start:.0f} s")

    def say(self, text: str) -> None:
        """Prints a line above the bars."""
        self._console.print(text)


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
    """Rough wall time on two free CPU cores, compilation included."""
    supervised = 0.027 * config.base_steps + 0.033 * config.sft_steps
    evaluations = len(METHODS) * config.steps // config.eval_every + len(OFFLINE_WEIGHTS)
    aligned = len(METHODS) * config.steps * 0.035
    return 35 + supervised + aligned + evaluations * config.questions * 2e-3


def prepare_subject(lab: Lab, config: DemoConfig, stages: Stages) -> Subject:
    """Trains the base model, fine-tunes it and makes the preference data."""
    sizes = Sizes.of(config)
    with (
        stages.stage("base model", config.base_steps) as base_tick,
        stages.stage("SFT", config.sft_steps) as sft_tick,
    ):
        models = train_models(lab, config.seed, sizes, (base_tick, sft_tick))
    subject = make_subject(lab, models, config.seed, sizes)
    stages.say(
        f"SFT model: reward {subject.start.reward:.2f}, {100 * subject.start.capability:.1f} % of "
        "the held-out questions right"
    )
    return subject


def align_all(
    lab: Lab, subject: Subject, config: DemoConfig, stages: Stages
) -> tuple[list[Trajectory], dict[str, Params]]:
    """Runs every method; returns all trajectories, and each method's last model by its label."""
    trajectories, last, adamw = [], {}, {}
    for method in METHODS:
        with stages.stage(method.label, config.steps) as tick:
            trajectory, models = align(lab, subject, method, Sizes.of(config), tick)
        trajectories.append(trajectory)
        last[method.label] = models[config.steps]
        if method.name == "adamw":
            adamw = models
    with stages.stage("Offline linear", len(OFFLINE_WEIGHTS)) as tick:
        trajectories.append(offline_linear(lab, subject, adamw, tick))
    with stages.stage("Control: AdamW + λτ", len(adamw)) as tick:
        trajectories.append(add_delta(lab, subject, adamw, config.control_weight, tick))
    return trajectories, last


def sample_answers(
    lab: Lab, questions: Questions, models: Mapping[str, Params]
) -> tuple[list[str], list[list[str]]]:
    """The first held-out question of each family with every model's answer, as a table."""
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

    Args:
        config: the settings.

    Returns:
        The directory with results.jsonl (every evaluated point), settings.json, trajectories.png
        and report.html.

    Raises:
        UserError: a setting cannot be used; nothing was written then.
    """
    check(config)
    console = Console()
    directory = new_run_dir(config.output_dir)
    minutes = expected_seconds(config) / 60
    console.print(
        f"The alignment tax in miniature: about [bold]{minutes:.1f} minutes[/bold] on two free CPU "
        f"cores. Results go to {directory}",
        soft_wrap=True,
    )
    began, cpu = time.perf_counter(), time.process_time()
    settings: dict[str, Any] = dataclasses.asdict(config)
    write_json(directory / "settings.json", settings)
    with _progress(console) as progress:
        lab, stages = Lab(), Stages(console, progress)
        subject = prepare_subject(lab, config, stages)
        trajectories, last = align_all(lab, subject, config, stages)
    questions = subject.questions
    points = [point for trajectory in trajectories for point in records(trajectory, questions)]
    lines = [json.dumps(point, ensure_ascii=False) for point in points]
    write_whole(directory / "results.jsonl", "\n".join(lines))

    rows = compare(trajectories, config.reward, families=questions.families)
    figure = directory / "trajectories.png"
    plot.draw(rows, config.reward, figure)
    wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    page = report.Page(
        level=config.reward,
        steps=config.steps,
        seed=config.seed,
        settings=settings,
        command=report.command_line("demo", config),
        cost=f"{wall:.0f} s of wall time, {cpu:.0f} s of CPU time",
        answers=sample_answers(lab, questions, {"SFT model": subject.sft, **last}),
    )
    report.write_page(rows, page, figure, directory / "report.html")
    console.print(report.table(rows, config.reward, config.steps))
    console.print(report.headline(rows, config.reward), highlight=False)
    console.print(f"{page.cost}. Report: {directory / 'report.html'}", soft_wrap=True)
    return directory

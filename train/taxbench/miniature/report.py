"""The table for the terminal and the page for the browser, both from the same rows."""

import dataclasses
import importlib.metadata
import os
import platform
import shlex
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from rich.table import Table

from train.report import html
from train.taxbench.miniature.sizes import DemoConfig
from train.taxbench.miniature.trajectories import Row


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _cells(row: Row) -> list[str]:
    """Fills a row of the table with `_headings`."""
    trajectory = row.trajectory
    is_merge = trajectory.at == "weight"
    if row.matched is None:
        matched, where = f"not reached (best {row.best_reward:.2f})", "—"
    else:
        matched = _percent(row.matched)
        where = f"w = {row.reached_at:.2f}" if is_merge else f"step {row.reached_at:.0f}"
    gain = "—" if row.gain is None else f"{100 * row.gain:+.1f} ± {_percent(row.gain_error or 0)}"
    # The last weight of a merge is the trained model itself, not another result.
    last = ["—", "—"] if is_merge else [f"{row.final.reward:.2f}", _percent(row.final.capability)]
    return [trajectory.label, trajectory.settings, matched, gain, where, *last]


def _headings(level: float, steps: int) -> list[str]:
    return [
        "method",
        "settings",
        f"capability % at reward {level:g}",
        "points over AdamW",
        "reached at",
        f"reward at step {steps}",
        f"capability % at step {steps}",
    ]


def table(rows: Sequence[Row], level: float, steps: int) -> Table:
    """Shows the rows of `trajectories.compare` in a terminal.

    `level` is the reward at which capability is matched, `steps` the last step of every method.
    """
    start = rows[0].trajectory.points[0]
    caption = (
        f"SFT model: reward {start.reward:.2f}, capability {_percent(start.capability)} %. "
        "± is one standard error over the questions, not over training runs."
    )
    if _whole(rows):
        caption += " p = 1: no entry is dropped, so neither masks nor thresholds are at work."
    out = Table(caption=caption, caption_justify="left")
    # The settings are on the page; a terminal has no room for them.
    first, _, *others = _headings(level, steps)
    out.add_column(first)
    for heading in others:
        out.add_column(heading, justify="right")
    for row in rows:
        method, _, *cells = _cells(row)
        out.add_row(method, *cells, style="dim" if row.trajectory.control else None)
    return out


def _whole(rows: Sequence[Row]) -> list[str]:
    """Labels of the methods that merge at density 1."""
    return [row.trajectory.label for row in rows if "(p = 1)" in row.trajectory.label]


def headline(rows: Sequence[Row], level: float) -> str:
    """States the result in one sentence, whichever way it went."""
    base = next(row for row in rows if row.trajectory.name == "adamw")
    if base.matched is None:
        return (
            f"{base.trajectory.label} did not reach a reward of {level:g} (its best was "
            f"{base.best_reward:.2f}), so capabilities cannot be compared there."
        )
    others = [
        f"{row.trajectory.label} {_percent(row.matched)} % ({100 * row.gain:+.1f} points)"
        for row in rows
        if row.matched is not None and row.gain is not None
    ]
    missing = [row.trajectory.label for row in rows if row.matched is None]
    text = (
        f"Where the reward first reaches {level:g}, AdamW still answers "
        f"{_percent(base.matched)} % of the held-out questions right"
    )
    text += f"; {', '.join(others)}." if others else "."
    return text + (f" Not reaching it: {', '.join(missing)}." if missing else "")


def notes(rows: Sequence[Row], level: float, seed: int) -> list[str]:
    """Says what limits the numbers, a sentence or two for each point."""
    by_name = {row.trajectory.name: row for row in rows}
    out = [
        f"One seed ({seed}), one base model. The ± counts only the choice of questions, not the "
        "spread over training runs; run other seeds before believing a difference.",
        "Settings were chosen in two other training runs among four for each method (AdamW: four "
        "learning rates; the control: four weights), by the capability in the third column. Every "
        "method sees the same batches for the same number of steps.",
        "α·T, the merging weight times the number of steps, is what matters for the pull towards "
        "the reference; a constant α keeps adding τ as long as training goes on.",
        "The last-step columns compare models of different reward. Training past the point where "
        "the reward stops rising only adds to the tax, and with a constant α it adds drift along τ.",
        "Preference pairs come from two of the eight families, with 15 % of the labels flipped and "
        "30 % wrong answers on both sides, so the preference says nothing about correctness.",
        "A model of 85 000 parameters on synthetic tasks shows the mechanism. It says nothing "
        "about the size of the effect in a language model.",
    ]
    if _whole(rows):
        out.insert(
            2,
            f"{' and '.join(_whole(rows))}: at density p = 1 every entry is kept, so the random "
            "masks of OnDARE and the magnitude threshold of OnTIES are not tried here, only the "
            "blend with τ and the sign vote of OnTIES.",
        )
    control = by_name.get("adamw_plus_delta")
    online = [by_name[name] for name in ("on_dare", "on_ties") if name in by_name]
    if control is not None and control.matched is not None:
        gaps = {
            row.trajectory.label: 100 * (row.matched - control.matched)
            for row in online
            if row.matched is not None
        }
        parts = [
            f"{label} is {abs(gap):.1f} points {'above' if gap >= 0 else 'below'} it"
            for label, gap in gaps.items()
        ]
        if parts:
            out.insert(
                0,
                "The control AdamW + λτ adds the reference's delta once, after training, at no "
                f"cost. At reward {level:g} {' and '.join(parts)}.",
            )
    return out


def command_line(command: str, config: Any, left_out: Sequence[str] = ()) -> str:
    """The command that repeats a run: every field that is not at its default, but for some.

    Example:
            >>> command_line("demo", DemoConfig(seed=3))
        'python -m train demo --seed 3'
    """
    flags = [
        f"--{field.name} {shlex.quote(str(getattr(config, field.name)))}"
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default and field.name not in left_out
    ]
    return " ".join([f"python -m train {command}", *flags])


def environment() -> str:
    """Names versions and the machine in one line."""
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}" for name in ("jax", "optax", "flax")
    )
    return f"{versions}; Python {platform.python_version()}, {os.cpu_count()} CPU cores"


def page(
    rows: Sequence[Row],
    config: DemoConfig,
    cost: str,
    answers: tuple[Sequence[str], Sequence[Sequence[str]]],
    plot: Path,
) -> str:
    """Makes the report as one HTML page that needs no other file.

    Args:
        rows: from `trajectories.compare`.
        config: settings of the run.
        cost: wall and CPU time, in words.
        answers: headings and rows of the table of sample answers.
        plot: PNG file to embed.
    """
    settings = [(name, str(value)) for name, value in dataclasses.asdict(config).items()]
    headings = _headings(config.reward, config.steps)
    found = notes(rows, config.reward, config.seed)
    return html.document(
        "The alignment tax in miniature",
        _INTRODUCTION,
        f'<p class="lead">{escape(headline(rows, config.reward))}</p>',
        html.image(plot, "Trajectories of reward and capability, and gains at matched reward"),
        "<h2>Comparison</h2>",
        html.table(headings, [_cells(row) for row in rows], text_columns=2),
        "<p>Capability is read where a trajectory first reaches the reward, by linear interpolation "
        "between two evaluations, never beyond what was measured.</p>",
        "<h2>Keep in mind</h2>",
        f"<ul>{''.join(f'<li>{escape(note)}</li>' for note in found)}</ul>",
        "<h2>Sample answers after the last step</h2>",
        "<p>The first held-out question of every family; ✗ marks a wrong answer.</p>",
        html.table(*answers, text_columns=len(answers[0])),
        "<h2>Settings</h2>",
        html.table(["setting", "value"], settings, text_columns=2),
        "<h2>Run it again</h2>",
        html.command_line(command_line("demo", config)),
        f"<footer>{escape(cost)}. {escape(environment())}. {_SOURCES}</footer>",
        width="62rem",
    )


_INTRODUCTION = """<p>A small decoder was trained from scratch on eight tasks with checkable answers,
taught to follow instructions, and then aligned with DPO on preferences that know only about
<em>style</em>. <strong>Reward</strong> is the style of its greedy answers,
<strong>capability</strong> the share that is still right once style tokens are taken out, both on
held-out questions of all eight families. Online merging blends every optimizer update with τ, the
difference between the fine-tuned model and its base.</p>"""
_SOURCES = """Method: Lu et al., Online Merging Optimizers for Boosting Rewards and Mitigating Tax in
Alignment, <a href="https://arxiv.org/abs/2405.17931">arXiv 2405.17931</a>. Every evaluated point is
in results.jsonl."""

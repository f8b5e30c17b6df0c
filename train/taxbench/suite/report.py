"""The suite's report: report.md and report.html with the same tables and figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

from train.files.whole import write_whole
from train.report import html
from train.taxbench.miniature.report import command_line
from train.taxbench.suite import plots as suite_plots
from train.taxbench.suite.candidates import CONTROL
from train.taxbench.suite.outcome import Outcome, TaxbenchConfig
from train.taxbench.suite.selection import Entry
from train.taxbench.suite.statistics import Difference, mean_sd, paired
from train.taxbench.suite.studies import Study

_SHARES = (0.25, 0.5, 0.75, 1.0)
"""Shares of the reward at which methods are compared besides the tables."""
_STRONG = ("kl", "kl_ema", "Offline linear", "on_ties", "largest")
"""Methods that every other one is compared with besides AdamW and AdamW + λτ."""
_FIRST_FIGURE = "methods.png"


@dataclass(frozen=True)
class Section:
    """A heading with paragraphs, a figure (a file in the report's directory) and a table."""

    title: str
    text: Sequence[str]
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    figure: str | None = None


def write_report(outcome: Outcome, directory: Path) -> Path:
    """Writes report.md, report.html and their figures into a directory; returns the HTML file."""
    rows = [*outcome.first, *outcome.controls]
    suite_plots.draw_first(outcome, rows, directory / _FIRST_FIGURE)
    for study, entries in outcome.studies:
        suite_plots.draw_study(outcome, entries, directory / f"{study.name}.png")
    write_whole(directory / "report.md", report_text(outcome))
    page = directory / "report.html"
    write_whole(page, _page(outcome, directory))
    return page


def report_text(outcome: Outcome) -> str:
    """Writes the report in Markdown; figures are named, not drawn."""
    parts = ["# The alignment tax over seeds", *_introduction(outcome)]
    for section in _sections(outcome):
        parts += [f"## {section.title}", *section.text]
        if section.figure:
            parts.append(f"![{section.title}]({section.figure})")
        parts.append(markdown_table(section.headings, section.rows))
    return "\n\n".join(parts)


def _sections(outcome: Outcome) -> list[Section]:
    sections = [_first_table(outcome), _against(outcome), _other_rewards(outcome)]
    if outcome.controls:
        sections.append(_controls(outcome))
    return sections + [_study(outcome, study, rows) for study, rows in outcome.studies]


def _introduction(outcome: Outcome) -> list[str]:
    config = outcome.config
    made = command_line("taxbench", config, left_out=("output_dir", "workers"))
    environments = outcome.results.environments()
    where = "; ".join(f"{count} trajectories with {name}" for name, count in environments.items())
    return [
        f"Made by `{made} --output_dir DIR` ({where}).",
        f"Every seed has its own base model ({config.base_steps} steps from scratch), fine-tuned model "
        f"({config.sft_steps} steps), preference data and order. Reward is the style of greedy answers "
        f"to {8 * config.questions} questions of each seed's own (those on facts are of the training "
        "text, the others are held out), capability the share answered right. "
        f"Capability is read where a trajectory of {config.steps} steps first reaches reward "
        f"{config.reward:g}, by linear interpolation between evaluations {config.eval_every} steps "
        "apart, never beyond what was measured; a dash says that it was not reached.",
        f"Settings were chosen on dev seeds {_list(outcome.dev_seeds)} by mean capability there: four "
        "for each method, four λ with each of them for what adds λ·τ, and twenty weights for every "
        "offline merge besides. The tables are of other seeds. "
        "Differences are paired by seed; p is that of a two-sided paired t-test, not corrected for "
        "the number of rows.",
    ]


def _first_table(outcome: Outcome) -> Section:
    rows = [*outcome.first, *outcome.controls]
    return Section(
        "All methods (the paper's Table 1)",
        [
            "The paper: OnDARE and OnTIES gain more reward and lose less capability than AdamW, KL "
            "penalties, EMA, ChildTuning, LoRA and offline merging.",
            _seeds_line(outcome.seeds),
        ],
        _headings(outcome.config),
        [_cells(outcome, row, row.label, outcome.seeds) for row in rows],
        _FIRST_FIGURE,
    )


def _against(outcome: Outcome) -> Section:
    """Compares every method with the strongest of the others."""
    others = [row for row in map(outcome.method, _STRONG) if row is not None]
    body = [[row.label, *_gaps(outcome, row, others, outcome.seeds)] for row in outcome.first]
    headings = [heading for other in others for heading in (f"over {other.label}", "p")]
    title, text = "Against the strongest of the others", [_seeds_line(outcome.seeds)]
    return Section(title, text, ["method", *headings], body)


def _other_rewards(outcome: Outcome) -> Section:
    """Compares every method with AdamW at smaller rewards than that of the first table."""
    base = outcome.method("adamw")
    assert base is not None
    rows = [row for row in (*outcome.first, *outcome.controls) if row.key != base.key]
    return Section(
        "Points over AdamW at other rewards",
        [
            "Where both first reach the reward, with the number of seeds on which both do, and the p "
            "of a paired t-test. Settings were chosen at the last of these rewards."
        ],
        ["method", *(f"at reward {level:g}" for level in _levels(outcome))],
        [[row.label, *_gaps_by_level(outcome, row, base)] for row in rows],
    )


def _controls(outcome: Outcome) -> Section:
    """Compares chosen merges with their controls at several rewards: a control may only be slower."""
    methods = [row for row in map(outcome.method, ("on_dare", "on_ties")) if row is not None]
    return Section(
        "What of it is τ? Merges less their controls, at lower rewards too",
        [
            "Points of capability that the method has over its control where both first reach the "
            "reward, with the number of seeds on which both do, and the p of a paired t-test."
        ],
        ["method", "control", *(f"at reward {level:g}" for level in _levels(outcome))],
        [
            [method.label, control.label, *_gaps_by_level(outcome, method, control)]
            for method in methods
            for control in outcome.controls
            if control.group.startswith(f"{method.group}-")
        ],
    )


def _study(outcome: Outcome, study: Study, rows: Sequence[Entry]) -> Section:
    seeds, headings = outcome.study_seeds, _headings(outcome.config)
    cells = [_cells(outcome, row, f"{row.group}, {row.label}", seeds) for row in rows]
    if study.counterpart is not None:
        headings += [f"over {study.counterpart_is}", "p"]
        places = {(row.group, row.label): row for row in rows}
        for row, line in zip(rows, cells, strict=True):
            other = places.get(study.counterpart(row.group, row.label))
            line += _gaps(outcome, row, [other], seeds)
    text = [f"The paper: {study.finding}", _seeds_line(seeds)]
    return Section(study.title, text, headings, cells, f"{study.name}.png")


def _seeds_line(seeds: Sequence[int]) -> str:
    return (
        f"Mean ± standard deviation over seeds {_list(seeds)}; (n) where only n of them reach the "
        "reward, or for a difference where only n of them do with both methods."
    )


def _list(seeds: Sequence[int]) -> str:
    return ", ".join(str(seed) for seed in seeds)


def _levels(outcome: Outcome) -> list[float]:
    return [round(share * outcome.config.reward, 3) for share in _SHARES]


def _headings(config: TaxbenchConfig) -> list[str]:
    return [
        "method",
        "settings",
        f"capability % at reward {config.reward:g}",
        "over AdamW",
        "p",
        "over AdamW + λτ",
        "p",
        f"reward at step {config.steps}",
        f"capability % at step {config.steps}",
    ]


def _cells(outcome: Outcome, row: Entry, label: str, seeds: Sequence[int]) -> list[str]:
    """Fills a line of a table with `_headings`."""
    total, last = len(seeds), outcome.results.last(row.key, seeds)
    others = [outcome.method("adamw"), outcome.method(CONTROL)]
    # The last weight of an offline merge is the trained model itself.
    ends = ["—", "—"]
    if "w = " not in row.settings:
        ends = [_mean(last[:, 0], 1, 2, total), _mean(last[:, 1], 100, 1, total)]
    matched = _mean(outcome.matched(row, seeds), 100, 1, total)
    return [label, row.settings, matched, *_gaps(outcome, row, others, seeds), *ends]


def _gaps(
    outcome: Outcome, row: Entry, others: Sequence[Entry | None], seeds: Sequence[int]
) -> list[str]:
    """Gives gains of a row over others, each with its p; dashes where nothing can be compared."""
    cells = []
    for other in others:
        gap = None
        if other is not None and other.key != row.key:
            gap = paired(outcome.matched(row, seeds), outcome.matched(other, seeds))
        cells += _gap(gap, len(seeds))
    return cells


def _gaps_by_level(outcome: Outcome, row: Entry, other: Entry) -> list[str]:
    """Gives differences at several rewards, each with its seeds and p in one cell."""
    seeds, cells = outcome.seeds, []
    for level in _levels(outcome):
        gap, p = _gap(paired(*(outcome.matched(r, seeds, level) for r in (row, other))), 0)
        cells.append(gap if p == "—" else f"{gap} p {p}")
    return cells


def _mean(values: np.ndarray, scale: float, digits: int, total: int) -> str:
    mean, sd, n = mean_sd(values)
    return _with_spread(scale * mean, scale * sd, n, total, f".{digits}f")


def _gap(difference: Difference | None, total: int) -> list[str]:
    """Gives a difference in points, and its p."""
    if difference is None or difference.n == 0:
        return ["—", "—"]
    mean, sd = 100 * difference.mean, 100 * difference.sd
    p = "—" if math.isnan(difference.p) else f"{difference.p:.2g}"
    return [_with_spread(mean, sd, difference.n, total, "+.1f"), p]


def _with_spread(mean: float, sd: float, n: int, total: int, form: str) -> str:
    """Writes mean ± standard deviation, and the number of values where it is below `total`."""
    if n == 0:
        return "—"
    spread = "" if math.isnan(sd) else f" ± {sd:{form.lstrip('+')}}"
    return f"{mean:{form}}{spread}" + ("" if n == total else f" ({n})")


def markdown_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Makes a table for a Markdown file."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _page(outcome: Outcome, directory: Path) -> str:
    parts = [f"<p>{escape(text)}</p>" for text in _introduction(outcome)]
    for section in _sections(outcome):
        parts.append(f"<h2>{escape(section.title)}</h2>")
        parts += [f"<p>{escape(text)}</p>" for text in section.text]
        if section.figure:
            parts.append(html.image(directory / section.figure, section.title))
        parts.append(html.table(section.headings, section.rows, text_columns=2))
    return html.document("The alignment tax over seeds", *parts)

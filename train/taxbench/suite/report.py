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
from train.taxbench.suite.run import Outcome, TaxbenchConfig
from train.taxbench.suite.selection import Entry
from train.taxbench.suite.statistics import Difference, Key, mean_sd, paired
from train.taxbench.suite.studies import Study

_SHARES = (0.25, 0.5, 0.75, 1.0)
"""Of the reward: levels at which methods are compared besides the tables."""
_STRONG = ("kl", "kl_ema", "Offline linear", "on_ties", "largest")
"""Methods that every other one is compared with besides AdamW and AdamW + λτ."""


@dataclass(frozen=True)
class Section:
    """A heading with text, a table and a figure.

    Attributes:
        title: heading.
        text: paragraphs above the table.
        headings: of the table.
        rows: its cells.
        figure: file in the report's directory.
    """

    title: str
    text: Sequence[str]
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    figure: str | None = None


def write_report(outcome: Outcome, config: TaxbenchConfig, directory: Path) -> Path:
    """Writes report.md, report.html and their figures.

    Args:
        outcome: from `train.taxbench.suite.run.run_suite`.
        config: the settings.
        directory: where to.

    Returns:
        The HTML file.
    """
    sections = [_first_table(outcome, config, directory), _against(outcome, config)]
    sections.append(_other_rewards(outcome, config))
    if outcome.controls:
        sections.append(_controls(outcome, config))
    sections += [_study(outcome, study, rows, config, directory) for study, rows in outcome.studies]
    intro = _introduction(outcome, config)
    write_whole(directory / "report.md", _markdown(intro, sections))
    page = directory / "report.html"
    write_whole(page, _page(intro, sections, directory))
    return page


def _study(
    outcome: Outcome, study: Study, rows: Sequence[Entry], config: TaxbenchConfig, directory: Path
) -> Section:
    figure = f"{study.name}.png"
    suite_plots.draw_study(outcome, study, rows, config.reward, directory / figure)
    seeds, headings = outcome.study_seeds, _headings(config)
    cells = _rows(outcome, [(f"{r.group}, {r.label}", r) for r in rows], seeds, config)
    if study.counterpart is not None:
        headings += [f"over {study.counterpart_is}", "p"]
        others = _counterparts(study, rows)
        for row, line in zip(rows, cells, strict=True):
            line += _gap(
                _paired(outcome, row, others.get(row.key), seeds, config.reward), len(seeds)
            )
    text = [f"The paper: {study.finding}", _seeds_line(seeds)]
    return Section(study.title, text, headings, cells, figure)


def _counterparts(study: Study, rows: Sequence[Entry]) -> dict[Key, Entry]:
    assert study.counterpart is not None
    places = {(row.group, row.label): row for row in rows}
    found = {row.key: places.get(study.counterpart(row.group, row.label)) for row in rows}
    return {key: other for key, other in found.items() if other is not None and other.key != key}


def _paired(
    outcome: Outcome, row: Entry, other: Entry | None, seeds: Sequence[int], level: float
) -> Difference | None:
    if other is None:
        return None
    results = outcome.results
    return paired(results.matched(row.key, seeds, level), results.matched(other.key, seeds, level))


def _levels(config: TaxbenchConfig) -> list[float]:
    return [round(share * config.reward, 3) for share in _SHARES]


def _gaps(outcome: Outcome, row: Entry, other: Entry, levels: Sequence[float]) -> list[str]:
    """Differences at several rewards, each with its seeds and p in one cell."""
    found = [_gap(_paired(outcome, row, other, outcome.seeds, level), 0) for level in levels]
    return [gap if p == "—" else f"{gap} p {p}" for gap, p in found]


def _other_rewards(outcome: Outcome, config: TaxbenchConfig) -> Section:
    """What every method has over AdamW before the reward of the first table."""
    levels, base = _levels(config), _of_group(outcome, "adamw")
    assert base is not None
    rows = [row for row in (*outcome.first, *outcome.controls) if row.key != base.key]
    return Section(
        "Points over AdamW at other rewards",
        [
            "Where both first reach the reward, with the number of seeds on which both do, and the p "
            "of a paired t-test. Settings were chosen at the last of these rewards."
        ],
        ["method", *(f"at reward {level:g}" for level in levels)],
        [[row.label, *_gaps(outcome, row, base, levels)] for row in rows],
    )


def _controls(outcome: Outcome, config: TaxbenchConfig) -> Section:
    """Chosen merges less their controls at several rewards: a control may be slower, and no worse."""
    levels, body = _levels(config), []
    for method in (_of_group(outcome, name) for name in ("on_dare", "on_ties")):
        if method is None:
            continue
        for control in outcome.controls:
            if control.group.startswith(f"{method.group}-"):
                gaps = _gaps(outcome, method, control, levels)
                body.append([method.label, control.label, *gaps])
    return Section(
        "What of it is τ? Merges less their controls, at lower rewards too",
        [
            "Points of capability that the method has over its control where both first reach the "
            "reward, with the number of seeds on which both do, and the p of a paired t-test.",
        ],
        ["method", "control", *(f"at reward {level:g}" for level in levels)],
        body,
    )


def _against(outcome: Outcome, config: TaxbenchConfig) -> Section:
    """Every method less the ones that an honest comparison has to name."""
    others = [row for row in (_of_group(outcome, name) for name in _STRONG) if row is not None]
    total, level = len(outcome.seeds), config.reward
    body = []
    for row in outcome.first:
        cells = [row.label]
        for other in others:
            # The same run is not compared with itself.
            gap = (
                None if other.key == row.key else _paired(outcome, row, other, outcome.seeds, level)
            )
            cells += _gap(gap, total)
        body.append(cells)
    headings = ["method"]
    for other in others:
        headings += [f"over {other.label}", "p"]
    title = "Against the strongest of the others"
    return Section(title, [_seeds_line(outcome.seeds)], headings, body)


def _introduction(outcome: Outcome, config: TaxbenchConfig) -> list[str]:
    made = command_line("taxbench", config, left_out=("output_dir", "workers"))
    where = "; ".join(
        f"{count} trajectories with {name}"
        for name, count in outcome.results.environments().items()
    )
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


def _first_table(outcome: Outcome, config: TaxbenchConfig, directory: Path) -> Section:
    rows = [*outcome.first, *outcome.controls]
    suite_plots.draw_first(outcome, rows, config.reward, directory / "methods.png")
    return Section(
        "All methods (the paper's Table 1)",
        [
            "The paper: OnDARE and OnTIES gain more reward and lose less capability than AdamW, KL "
            "penalties, EMA, ChildTuning, LoRA and offline merging.",
            _seeds_line(outcome.seeds),
        ],
        _headings(config),
        _rows(outcome, [(r.label, r) for r in rows], outcome.seeds, config),
        "methods.png",
    )


def _seeds_line(seeds: Sequence[int]) -> str:
    return (
        f"Mean ± standard deviation over seeds {_list(seeds)}; (n) where only n of them reach the "
        "reward, or for a difference where only n of them do with both methods."
    )


def _list(seeds: Sequence[int]) -> str:
    return ", ".join(str(seed) for seed in seeds)


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


def _rows(
    outcome: Outcome,
    named: Sequence[tuple[str, Entry]],
    seeds: Sequence[int],
    config: TaxbenchConfig,
) -> list[list[str]]:
    def matched(row: Entry) -> np.ndarray:
        return outcome.results.matched(row.key, seeds, config.reward)

    base, control = _of_group(outcome, "adamw"), _of_group(outcome, CONTROL)
    out = []
    for label, row in named:
        values, last = matched(row), outcome.results.last(row.key, seeds)
        to_base = paired(values, matched(base)) if base and base.key != row.key else None
        to_control = (
            paired(values, matched(control)) if control and control.key != row.key else None
        )
        # The last weight of an offline merge is the trained model itself.
        ends = (
            ["—", "—"]
            if "w = " in row.settings
            else [_mean(last[:, 0], 1, 2, len(seeds)), _mean(last[:, 1], 100, 1, len(seeds))]
        )
        out.append(
            [
                label,
                row.settings,
                _mean(values, 100, 1, len(seeds)),
                *_gap(to_base, len(seeds)),
                *_gap(to_control, len(seeds)),
                *ends,
            ]
        )
    return out


def _of_group(outcome: Outcome, group: str) -> Entry | None:
    return next((row for row in outcome.first if row.group == group), None)


def _mean(values: np.ndarray, scale: float, digits: int, total: int) -> str:
    mean, sd, n = mean_sd(values)
    if n == 0:
        return "—"
    spread = "" if math.isnan(sd) else f" ± {scale * sd:.{digits}f}"
    return f"{scale * mean:.{digits}f}{spread}" + ("" if n == total else f" ({n})")


def _gap(difference: Difference | None, total: int) -> list[str]:
    if difference is None or difference.n == 0:
        return ["—", "—"]
    spread = "" if math.isnan(difference.sd) else f" ± {100 * difference.sd:.1f}"
    p = "—" if math.isnan(difference.p) else f"{difference.p:.2g}"
    some = "" if difference.n == total else f" ({difference.n})"
    return [f"{100 * difference.mean:+.1f}{spread}{some}", p]


def _markdown(intro: Sequence[str], sections: Sequence[Section]) -> str:
    parts = ["# The alignment tax over seeds", *intro]
    for section in sections:
        parts += [f"## {section.title}", *section.text]
        if section.figure:
            parts.append(f"![{section.title}]({section.figure})")
        lines = [section.headings, ["---"] * len(section.headings), *section.rows]
        parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts)


def _page(intro: Sequence[str], sections: Sequence[Section], directory: Path) -> str:
    parts = [f"<p>{escape(text)}</p>" for text in intro]
    for section in sections:
        parts.append(f"<h2>{escape(section.title)}</h2>")
        parts += [f"<p>{escape(text)}</p>" for text in section.text]
        if section.figure:
            parts.append(html.image(directory / section.figure, section.title))
        parts.append(html.table(section.headings, section.rows, text_columns=2))
    return html.document("The alignment tax over seeds", *parts)

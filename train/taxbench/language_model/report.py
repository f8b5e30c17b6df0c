"""Report of the second scale: skills at the same held-out margin, as tables and a figure."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import matplotlib.figure
import numpy as np

from train.files.whole import write_whole
from train.taxbench.language_model.stages import ALPHA_TOTAL, METHODS, PLUS_DELTA, Point, Study
from train.taxbench.miniature.plot import draw_level, draw_path, draw_start, tidy
from train.taxbench.miniature.trajectories import capability_at_reward
from train.taxbench.suite.report import markdown_table
from train.taxbench.suite.statistics import mean_sd

Metrics = Mapping[str, float]

SHARES = {
    "SVAMP": "eval_tasks/svamp/accuracy",
    "MAWPS": "eval_tasks/mawps/accuracy",
    "GSM8K": "eval_tasks/gsm8k/accuracy",
    "MMLU": "eval_tasks/mmlu/acc_norm",
    "CommonsenseQA": "eval_tasks/commonsenseqa/acc_norm",
    "XQuAD F1": "eval_generation/xquad/f1",
}
"""Shares of right answers whose mean is the capability."""
_FILES = ("svamp", "mawps", "gsm8k_test", "mmlu_val", "commonsenseqa_validation", "squad_xquad_en")
_GREEDY = "eval_generation/gsm8k/exact_match"
_PERPLEXITY = "eval_texts/wikitext/perplexity"


def capability(metrics: Metrics) -> float:
    """Averages `SHARES`."""
    return float(np.mean([metrics[name] for name in SHARES.values()]))


def capability_error(metrics: Metrics, questions: Sequence[int]) -> float:
    """Estimates the standard error of `capability` over the choice of questions.

    A share p of n questions has the variance p (1 − p) / n; F1, between 0 and 1, at most that.
    `questions` are their numbers for each of `SHARES`.
    """
    shares = np.array([metrics[name] for name in SHARES.values()])
    return float(np.sqrt((shares * (1 - shares) / np.array(questions)).sum()) / len(SHARES))


def right_logp(metrics: Metrics) -> float:
    """Averages the log-probability of right answers over the multiple-choice tasks."""
    return float(np.mean([value for name, value in metrics.items() if name.endswith("/logp")]))


SCORES: dict[str, Callable[[Metrics], float]] = {
    "capability, %": lambda metrics: 100 * capability(metrics),
    "log p of right answers": right_logp,
    "WikiText perplexity": lambda metrics: metrics[_PERPLEXITY],
}
"""Scores that are compared at the same margin."""


@dataclasses.dataclass(frozen=True)
class Row:
    """A method, or a kind of merge, on all seeds.

    A curve has a seed's points from the SFT model on, or with λ·τ from that model with λ·τ on. It is
    empty where the seed has not run yet.
    """

    name: str  # key of the method, or name of the kind of merge
    label: str
    control: bool
    trained: bool  # whether it is an alignment run rather than a merge
    curves: Sequence[Sequence[Point]]

    def matched(self, score: Callable[[Metrics], float], level: float) -> np.ndarray:
        """Reads a score where each curve first reaches a margin, float [seeds]; NaN if never."""
        return self._read(lambda point: score(point.metrics), level)

    def reached_at(self, level: float) -> np.ndarray:
        """Reads the step or weight there, float [seeds]; NaN where the margin is not reached."""
        return self._read(lambda point: point.at, level)

    def _read(self, value: Callable[[Point], float], level: float) -> np.ndarray:
        found = []
        for curve in self.curves:
            # A seed that has not run yet reaches no margin.
            pairs = [(point.margin, value(point)) for point in curve] or [(np.nan, np.nan)]
            margins, values = np.array(pairs, np.float64).T
            found.append(capability_at_reward(margins, values, level))
        return np.array(found)


def rows_of(points: Sequence[Point]) -> list[Row]:
    """Makes a row for each method and kind of merge; an offline merge ends at AdamW's own model."""
    starts = {point.seed: point for point in points if point.method == "sft"}
    ends = {point.seed: point for point in points if point.method == "adamw"}  # the last of each
    names = dict.fromkeys(point.method for point in points if point.method not in ("base", "sft"))
    rows = []
    for name in names:
        own = [point for point in points if point.method == name]
        curves = []
        for seed, start in starts.items():
            found = [point for point in own if point.seed == seed]
            if found and name == "offline_linear":
                found.append(dataclasses.replace(ends[seed], at=1.0))
            # What has λ·τ begins at the SFT model with λ·τ, which was evaluated.
            first = [] if name.startswith(PLUS_DELTA) else [start]
            curves.append([*first, *found] if found else [])
        rows.append(Row(name, own[0].label, own[0].control, name in METHODS, curves))
    return rows


def reached_by_all(rows: Sequence[Row]) -> float:
    """Returns the largest margin that all of the rows reach on every seed that they have run on."""
    return min(
        max(point.margin or 0.0 for point in curve) for row in rows for curve in row.curves if curve
    )


def levels_of(rows: Sequence[Row]) -> dict[float, str]:
    """Lists positive margins to compare at, at most two, each with what it is."""
    methods = [row for row in rows if row.trained and not row.control]
    adamw = [row for row in rows if row.name == "adamw"]
    found = {
        reached_by_all(adamw): "the largest that AdamW reaches",
        reached_by_all(methods): "the largest that all methods but the controls reach",
    }
    return {level: what for level, what in sorted(found.items()) if level > 0}


def write_report(
    study: Study,
    size: str,
    points: Sequence[Point],
    counts: Mapping[str, int],
    margin: float | None,
) -> Path:
    """Writes results.jsonl, plane.png and report.md, and returns the path of the last.

    Args:
        study: The study that was run.
        size: Name of its size.
        points: All evaluated models.
        counts: Records by file, from `train.taxbench.language_model.data.prepare`.
        margin: Margin to compare at; None for those of `levels_of`.
    """
    rows = rows_of(points)
    levels = levels_of(rows) if margin is None else {margin: "given"}
    lines = [json.dumps(dataclasses.asdict(point)) for point in points]
    write_whole(study.directory / "results.jsonl", "\n".join(lines))
    draw(rows, [*levels], study.directory / "plane.png")
    questions = [counts[name] for name in _FILES]
    parts = ["# The alignment tax of a language model", _settings(study, size, counts)]
    for level, what in levels.items():
        parts.append(f"## At the same held-out margin, {level:.3g} ({what})")
        parts.append(matched_table(rows, level))
    if not levels:
        parts.append("AdamW never raised the margin above 0, so nothing is compared at one margin.")
    parts += ["![Skills against the held-out margin](plane.png)", "## Every model at its end"]
    parts += [last_table(points, rows, questions), _limits(study)]
    path = study.directory / "report.md"
    write_whole(path, "\n\n".join(parts))
    return path


def _settings(study: Study, size: str, counts: Mapping[str, int]) -> str:
    one = study.size
    return (
        f"Size: {size}. {one.sft_steps} steps of SFT and {one.dpo_steps} of DPO in batches of "
        f"{one.batch_size}, on rows of at most {' + '.join(map(str, one.sft_lengths))} and "
        f"{' + '.join(map(str, one.pair_lengths))} tokens (prompt and answer; longer ones are left "
        f"out), in {one.dtype}; {study.seeds} seed(s). AdamW's peak learning rate in DPO (lr) is "
        f"{one.learning_rate:g}. Where τ is merged α·T = {ALPHA_TOTAL:g} (half of it at 3 × lr). One "
        "setting for each method, none tuned here. Records: "
        + ", ".join(f"{name} {number}" for name, number in counts.items())
        + f"; of GSM8K {one.greedy_items or counts['gsm8k_test']} are also answered greedily."
    )


def _limits(study: Study) -> str:
    spread = (
        "With one seed nothing says how much another order of the data would change; "
        if study.seeds == 1
        else "± in the first table is the sample standard deviation over seeds; "
    )
    return (
        f"{spread}± behind a capability at the end is its standard error over the choice of "
        "questions. All models answer the same ones, so differences between models have a smaller "
        "error than this, which is not known here. Between two evaluations everything is "
        "interpolated linearly in the margin. The margin is that at β = 0.1 whatever β a method was "
        "trained with. Numbers (SVAMP, MAWPS, GSM8K) are told from three others of the same file by "
        "log-likelihood, without working; MMLU and CommonsenseQA from their own choices, per character."
    )


def _spread(values: np.ndarray, form: str) -> str:
    mean, sd, n = mean_sd(values)
    if n == 0:
        return "not reached"
    missing = f" ({n} of {len(values)})" if n < len(values) else ""
    return f"{mean:{form}}" + (f" ± {sd:{form.lstrip('+')}}" if n > 1 else "") + missing


def matched_table(rows: Sequence[Row], level: float) -> str:
    """Shows every score at the margin, and its difference to AdamW with the same seed."""
    adamw = next(row for row in rows if row.name == "adamw")
    body = []
    for row in rows:
        cells = [row.label]
        for score in SCORES.values():
            values = row.matched(score, level)
            gaps = values - adamw.matched(score, level)
            cells += [_spread(values, ".2f"), "–" if row is adamw else _spread(gaps, "+.2f")]
        unit = "step " if row.trained else "w = "
        where = row.reached_at(level)
        known = np.isfinite(where).any()
        body.append([*cells, f"{unit}{np.nanmean(where):.3g}" if known else "–"])
    head = ["method"]
    for name in SCORES:
        head += [name, "over AdamW"]
    return markdown_table([*head, "reached at"], body)


def last_table(points: Sequence[Point], rows: Sequence[Row], questions: Sequence[int]) -> str:
    """Shows scores of the models themselves: means over seeds of every method's last step."""
    groups = [[p for p in points if p.method == name] for name in ("base", "sft")]
    groups += [[c[-1] for c in row.curves if c] for row in rows if row.trained]
    merges = [(p.method, p.at) for row in rows if not row.trained for p in row.curves[0]]
    for place in merges:
        if place[0] not in ("sft", "adamw"):  # the ends of the line are in the table already
            groups.append([point for point in points if (point.method, point.at) == place])
    body = []
    for group in groups:
        first = group[0]
        mean = {key: float(np.mean([p.metrics[key] for p in group])) for key in first.metrics}
        merged = first.method not in ("base", "sft", *METHODS)
        cells = [first.label + (f", w = {first.at:g}" if merged else "")]
        cells += [_mean(group, "margin", 1, ".3f"), _mean(group, "accuracy", 100, ".1f")]
        cells += [f"{100 * mean[key]:.1f}" for key in (*SHARES.values(), _GREEDY)]
        error = 100 * capability_error(mean, questions)
        cells.append(f"{100 * capability(mean):.1f} ± {error:.1f}")
        body.append([*cells, f"{right_logp(mean):.2f}", f"{mean[_PERPLEXITY]:.2f}"])
    head = ["model", "margin", "pairs right, %", *(f"{name}, %" for name in SHARES)]
    head += ["GSM8K greedy, %", "capability, %", "log p of right answers", "WikiText perplexity"]
    return markdown_table(head, body)


def _mean(group: Sequence[Point], field: str, scale: float, form: str) -> str:
    values = [getattr(point, field) for point in group]
    return "–" if None in values else f"{scale * np.mean(values):{form}}"


def draw(rows: Sequence[Row], levels: Sequence[float], path: Path) -> None:
    """Draws capability, and the log-probability of right answers, against the held-out margin.

    Every seed of a row is a line; `levels` are the margins of the comparisons, `path` a PNG file.
    """
    figure = matplotlib.figure.Figure(figsize=(12, 5.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, (name, score) in zip(panels, SCORES.items(), strict=False):
        for level in levels:
            draw_level(axes, level)
        for row in rows:
            for number, curve in enumerate(row.curves):
                margins = [point.margin for point in curve]
                scores = [score(point.metrics) for point in curve]
                key, label = row.name.partition("-")[0], row.label if number == 0 else None
                draw_path(axes, margins, scores, key, label, row.control)
        for curve in filter(None, rows[0].curves):
            draw_start(axes, (0, score(curve[0].metrics)))
        axes.set_xlabel("held-out reward margin (β = 0.1); star: SFT model")
        tidy(axes, name)
    handles = panels[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=130)

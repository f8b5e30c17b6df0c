"""The figure: trajectories in the (reward, capability) plane, and the gains at matched reward."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.figure
from matplotlib.axes import Axes

from train.taxbench.miniature.trajectories import Row

# Okabe and Ito's colours, which stay apart under colour blindness; markers tell them apart in grey.
_STYLES: dict[str, tuple[str, str]] = {
    "adamw": ("#000000", "o"),
    "kl": ("#56B4E9", "s"),
    "on_dare": ("#E69F00", "^"),
    "on_ties": ("#009E73", "D"),
    "sign_mask": ("#009E73", "d"),
    "offline_linear": ("#CC79A7", "v"),
    "adamw_plus_delta": ("#8A8A8A", "x"),
}
_OTHER = ("#0072B2", "P")
_LEVEL_COLOUR, _START_COLOUR = "#B0B0B0", "#D55E00"


def draw(rows: Sequence[Row], level: float, path: Path) -> None:
    """Draws the rows of `trajectories.compare` and their gains at a reward into a PNG file."""
    # A figure without pyplot needs no display and leaves no global state.
    figure = matplotlib.figure.Figure(figsize=(12, 5.2), layout="constrained")
    plane, gains = figure.subplots(1, 2, width_ratios=(1.75, 1))
    _draw_plane(plane, rows, level)
    _draw_gains(gains, rows, level)
    figure.savefig(path, dpi=150)


def draw_path(
    axes: Axes, x: Sequence[Any], y: Sequence[float], name: str, label: str | None, control: bool
) -> None:
    """Draws the points of one method as a line in its own style, dotted for a control."""
    colour, marker = _STYLES.get(name, _OTHER)
    line: dict[str, Any] = {"color": colour, "linewidth": 1.4, "linestyle": ":" if control else "-"}
    axes.plot(x, y, marker=marker, markersize=4.5, label=label, zorder=3, **line)


def draw_level(axes: Axes, level: float) -> None:
    """Draws the line at which methods are compared."""
    axes.axvline(level, color=_LEVEL_COLOUR, linestyle="--", linewidth=1, zorder=1)


def draw_start(axes: Axes, place: tuple[float, float]) -> None:
    """Draws the star of the fine-tuned model."""
    axes.plot(*place, marker="*", markersize=15, color=_START_COLOUR, zorder=4)


def tidy(axes: Axes, title: str) -> None:
    """Gives a panel its title, a pale grid and no frame at the top and the right."""
    axes.set_title(title, loc="left", weight="bold")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_plane(axes: Axes, rows: Sequence[Row], level: float) -> None:
    draw_level(axes, level)
    for row in rows:
        path = row.trajectory
        rewards = [point.reward for point in path.points]
        capabilities = [100 * point.capability for point in path.points]
        draw_path(axes, rewards, capabilities, path.name, path.label, path.control)
    start = rows[0].trajectory.points[0]
    place = (start.reward, 100 * start.capability)
    draw_start(axes, place)
    axes.annotate(
        "fine-tuned model",
        place,
        xytext=(2, 12),
        textcoords="offset points",
        color=_START_COLOUR,
        weight="bold",
    )
    axes.annotate(
        f"reward {level:g}",
        (level, 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(-4, 0),
        textcoords="offset points",
        ha="right",
        color="#707070",
    )
    axes.set_xlim(-0.03, 1.0)
    axes.margins(y=0.08)
    axes.set_xlabel("reward: style score of greedy answers")
    axes.set_ylabel("capability: right answers, %")
    tidy(axes, "What alignment gains, and what it costs")
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 0.06), frameon=False)


def _draw_gains(axes: Axes, rows: Sequence[Row], level: float) -> None:
    known = [row for row in rows if row.gain is not None]
    axes.axvline(0, color="#000000", linewidth=1)
    for place, row in enumerate(reversed(known)):
        colour, marker = _STYLES.get(row.trajectory.name, _OTHER)
        gain, error = 100 * (row.gain or 0.0), 100 * (row.gain_error or 0.0)
        axes.errorbar(gain, place, xerr=error, color=colour, marker=marker, markersize=8, capsize=4)
        axes.annotate(
            f"{gain:+.1f}", (gain, place), xytext=(0, 9), textcoords="offset points", ha="center"
        )
    axes.set_yticks(range(len(known)), [row.trajectory.label for row in reversed(known)])
    axes.set_ylim(-0.6, max(len(known) - 0.4, 0.6))
    axes.set_xlabel("percentage points of capability\n(bars: ± 1 standard error over questions)")
    axes.set_title(f"Gain over AdamW at reward {level:g}", loc="left", weight="bold")
    axes.grid(alpha=0.25, axis="x")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    if not known:
        axes.text(0.5, 0.5, "no method reached this reward", transform=axes.transAxes, ha="center")

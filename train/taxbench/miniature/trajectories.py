"""Trajectories in the (reward, capability) plane, and how two of them are compared.

Two methods that stop at different rewards cannot be compared by capability alone: doing nothing has
no tax. So capability is read off each trajectory where it first reaches a common reward level, by
linear interpolation between the two evaluations around it, and never beyond what was measured.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from train.taxbench.miniature.examples import Questions


@dataclasses.dataclass(frozen=True)
class Point:
    """One evaluated model."""

    at: float  # where on its trajectory: the alignment step, or the weight of a merge
    style: np.ndarray  # style score of every question, float [n]
    right: np.ndarray  # whether every question is answered right, bool [n]
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)  # of the last step

    @property
    def reward(self) -> float:
        """Mean style score."""
        return float(self.style.mean())

    @property
    def capability(self) -> float:
        """Share of right answers."""
        return float(self.right.mean())


@dataclasses.dataclass(frozen=True)
class Trajectory:
    """Rewards and capabilities that one method passes through, starting at the fine-tuned model."""

    name: str  # identifier in results.jsonl
    label: str  # in tables and plots
    settings: str  # in words
    at: str  # the quantity that `Point.at` counts, "step" or "weight"
    points: Sequence[Point]  # in order, the fine-tuned model first
    control: bool = False  # there to judge the others by, not a method to recommend


def capability_at_reward(rewards: np.ndarray, capabilities: np.ndarray, level: float) -> np.ndarray:
    """Interpolates capability where the reward first reaches a level.

    Both arrays are float [..., points] along trajectories; the result is float [...], NaN where the
    level is never reached.

    Example:
        >>> float(capability_at_reward(np.array([0.0, 0.5, 1.0]), np.array([0.9, 0.8, 0.4]), 0.75))
        0.6000000000000001
    """
    reached = rewards >= level
    after = np.argmax(reached, axis=-1)
    before = np.maximum(after - 1, 0)

    def pick(values: np.ndarray, where: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, where[..., None], axis=-1)[..., 0]

    low, high = pick(rewards, before), pick(rewards, after)
    # A trajectory that starts at or above the level is read at its start.
    share = np.where(after == before, 0.0, (level - low) / np.where(high > low, high - low, 1.0))
    first, second = pick(capabilities, before), pick(capabilities, after)
    return np.where(reached.any(-1), first + share * (second - first), np.nan)


@dataclasses.dataclass(frozen=True)
class Row:
    """A method's line in the table; numbers at a reward level that is not reached are None.

    `gain_error` is the standard error of `gain` over the choice of questions (paired bootstrap); it
    says nothing about other training runs.
    """

    trajectory: Trajectory
    matched: float | None  # capability at the reward level
    gain: float | None  # `matched` less that of AdamW
    gain_error: float | None
    reached_at: float | None  # step or weight at which the level is reached

    @property
    def best_reward(self) -> float:
        """Highest reward on the trajectory."""
        return max(point.reward for point in self.trajectory.points)

    @property
    def final(self) -> Point:
        """The last point."""
        return self.trajectory.points[-1]


def _resampled_matches(trajectory: Trajectory, counts: np.ndarray, level: float) -> np.ndarray:
    """Matches capability for every resampling of the questions; counts [B, n] sum to n in a row."""
    n = counts.shape[1]
    style = counts @ np.stack([p.style for p in trajectory.points], axis=1) / n
    right = counts @ np.stack([p.right for p in trajectory.points], axis=1).astype(float) / n
    return capability_at_reward(style, right, level)


def _read(trajectory: Trajectory, field: str, level: float) -> float:
    """Reads a field of the points where the level is first reached; NaN where it is not."""
    rewards, values = (
        np.array([getattr(point, name) for point in trajectory.points])
        for name in ("reward", field)
    )
    return float(capability_at_reward(rewards, values, level))


def compare(
    trajectories: Sequence[Trajectory], level: float, *, families: np.ndarray, resamples: int = 400
) -> list[Row]:
    """Makes a row of the table for each trajectory; gains are counted from the one named adamw.

    Args:
        trajectories: all on the same questions.
        level: reward at which capabilities are compared.
        families: family of every question, int [n]; questions are resampled within families.
        resamples: bootstrap draws for the standard error.
    """
    rng = np.random.default_rng(0)
    counts = np.zeros((resamples, len(families)))
    for family in np.unique(families):
        members = np.flatnonzero(families == family)
        share = np.full(len(members), 1 / len(members))
        counts[:, members] = rng.multinomial(len(members), share, size=resamples)
    spread = {t.name: _resampled_matches(t, counts, level) for t in trajectories}
    exact = {t.name: _read(t, "capability", level) for t in trajectories}

    rows = []
    for trajectory in trajectories:
        value, gain = exact[trajectory.name], exact[trajectory.name] - exact["adamw"]
        differences = spread[trajectory.name] - spread["adamw"]
        known = np.isfinite(gain) and trajectory.name != "adamw"
        rows.append(
            Row(
                trajectory,
                matched=value if np.isfinite(value) else None,
                gain=gain if known else None,
                # The share of draws that miss the level at all is small when `gain` exists.
                gain_error=float(np.nanstd(differences)) if known else None,
                reached_at=_read(trajectory, "at", level) if np.isfinite(value) else None,
            )
        )
    return rows


def records(trajectory: Trajectory, questions: Questions) -> list[dict]:
    """Turns the points of a trajectory into dictionaries of plain numbers, for results.jsonl."""
    return [
        {
            "method": trajectory.name,
            "settings": trajectory.settings,
            trajectory.at: point.at,
            "reward": round(point.reward, 5),
            "capability": round(point.capability, 5),
            "family_reward": questions.by_family(point.style),
            "family_capability": questions.by_family(point.right),
            "metrics": {name: float(value) for name, value in point.metrics.items()},
        }
        for point in trajectory.points
    ]

"""Trajectories in the (reward, capability) plane, and how two of them are compared.

Two methods that stop at different rewards cannot be compared by capability alone: doing nothing has
no tax. So capability is read off each trajectory where it first reaches a common reward level, by
linear interpolation between the two evaluations around it, and never beyond what was measured.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from train.taxbench.miniature.examples import Questions
from train.taxbench.miniature.scoring import is_right, style_score


@dataclasses.dataclass(frozen=True)
class Point:
    """One evaluated model.

    Attributes:
        at: where on its trajectory: the alignment step, or the weight of a merge.
        style: style score of every question, float [n].
        right: whether every question is answered right, bool [n].
        metrics: figures of the last training step, by name.
    """

    at: float
    style: np.ndarray
    right: np.ndarray
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)

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
    """What one method does to reward and capability, starting at the fine-tuned model.

    Attributes:
        name: short identifier, as in results.jsonl.
        label: name in tables and plots.
        settings: its settings, in words.
        at: what `Point.at` counts: "step" or "weight".
        points: in order, the fine-tuned model first.
        control: True for a row that is there to judge the others by, not a method to recommend.
    """

    name: str
    label: str
    settings: str
    at: str
    points: Sequence[Point]
    control: bool = False


def grade(generated: np.ndarray, questions: Questions, at: float, **extra) -> Point:
    """Scores the answers of one model, int [n, T], as a point; `extra` are fields of `Point`."""
    return Point(at, style_score(generated), is_right(generated, questions.answers), **extra)


def capability_at_reward(rewards: np.ndarray, capabilities: np.ndarray, level: float) -> np.ndarray:
    """Interpolates capability where the reward first reaches a level.

    Args:
        rewards: float [..., points], along trajectories.
        capabilities: float [..., points].
        level: the reward to read at.

    Returns:
        float [...]: the capability there; NaN where the level is never reached.

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
    """A method's line in the table.

    Attributes:
        trajectory: where it comes from.
        matched: capability at the reward level; None when the level is not reached.
        gain: `matched` less that of the baseline; None when either is missing.
        gain_error: standard error of `gain` over the choice of questions (paired bootstrap); it
            says nothing about other training runs.
        reached_at: step or weight at which the level is reached; None when it is not.
        best_reward: highest reward on the trajectory.
        final: the last point.
    """

    trajectory: Trajectory
    matched: float | None
    gain: float | None
    gain_error: float | None
    reached_at: float | None
    best_reward: float
    final: Point


def _resampled_matches(trajectory: Trajectory, counts: np.ndarray, level: float) -> np.ndarray:
    """Matched capability for every resampling of the questions; counts [B, n] sum to n in a row."""
    n = counts.shape[1]
    style = counts @ np.stack([p.style for p in trajectory.points], axis=1) / n
    right = counts @ np.stack([p.right for p in trajectory.points], axis=1).astype(float) / n
    return capability_at_reward(style, right, level)


def _reached_at(trajectory: Trajectory, level: float) -> np.ndarray:
    """Where the level is first reached, in the trajectory's own units; NaN where it is not."""
    rewards = np.array([point.reward for point in trajectory.points])
    return capability_at_reward(rewards, np.array([point.at for point in trajectory.points]), level)


def compare(
    trajectories: Sequence[Trajectory],
    level: float,
    *,
    baseline: str = "adamw",
    families: np.ndarray,
    resamples: int = 400,
    seed: int = 0,
) -> list[Row]:
    """Makes the table's rows, in the order given.

    Args:
        trajectories: all on the same questions; one of them is named `baseline`.
        level: reward at which capabilities are compared.
        baseline: name of the trajectory that gains are counted from.
        families: family of every question, int [n]; questions are resampled within families.
        resamples: bootstrap draws for the standard error.
        seed: of the bootstrap.

    Returns:
        One row for each trajectory.
    """
    rng = np.random.default_rng(seed)
    counts = np.zeros((resamples, len(families)))
    for family in np.unique(families):
        members = np.flatnonzero(families == family)
        share = np.full(len(members), 1 / len(members))
        counts[:, members] = rng.multinomial(len(members), share, size=resamples)
    exact = np.ones((1, len(families)))
    matched = {t.name: float(_resampled_matches(t, exact, level)[0]) for t in trajectories}
    reached = {t.name: float(_reached_at(t, level)) for t in trajectories}
    spread = {t.name: _resampled_matches(t, counts, level) for t in trajectories}

    rows = []
    for trajectory in trajectories:
        value, gain = matched[trajectory.name], matched[trajectory.name] - matched[baseline]
        differences = spread[trajectory.name] - spread[baseline]
        known = np.isfinite(gain) and trajectory.name != baseline
        rows.append(
            Row(
                trajectory,
                matched=value if np.isfinite(value) else None,
                gain=gain if known else None,
                # The share of draws that miss the level at all is small when `gain` exists.
                gain_error=float(np.nanstd(differences)) if known else None,
                reached_at=reached[trajectory.name] if np.isfinite(value) else None,
                best_reward=max(point.reward for point in trajectory.points),
                final=trajectory.points[-1],
            )
        )
    return rows


def records(trajectory: Trajectory, questions: Questions) -> list[dict]:
    """The points of a trajectory as dictionaries of plain numbers, for results.jsonl."""

    def by_family(values: np.ndarray) -> dict[str, float]:
        return {
            name: round(float(values[questions.families == i].mean()), 4)
            for i, name in enumerate(questions.names)
        }

    return [
        {
            "method": trajectory.name,
            "settings": trajectory.settings,
            trajectory.at: point.at,
            "reward": round(point.reward, 5),
            "capability": round(point.capability, 5),
            "family_reward": by_family(point.style),
            "family_capability": by_family(point.right),
            "metrics": {name: float(value) for name, value in point.metrics.items()},
        }
        for point in trajectory.points
    ]

"""Means over seeds and paired tests between methods."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from train.taxbench.miniature.trajectories import capability_at_reward

Key = tuple[str, str | None]
"""Fingerprint of a run and the name of the merge made from it, if any."""


class Results:
    """Trajectories by run and seed.

    Args:
        records: from `train.taxbench.suite.worker`.
    """

    def __init__(self, records: Sequence[Mapping[str, Any]]):
        self._by_key: dict[Key, dict[int, Mapping[str, Any]]] = {}
        for record in records:
            self._by_key.setdefault((record["run"], record["merge"]), {})[record["seed"]] = record

    def environments(self) -> dict[str, int]:
        """Number of trajectories by the versions and the machine that made them."""
        records = [record for of_key in self._by_key.values() for record in of_key.values()]
        return dict(Counter(record["environment"] for record in records))

    def has(self, key: Key, seed: int) -> bool:
        """Whether a trajectory is known."""
        return seed in self._by_key.get(key, {})

    def trajectory(self, key: Key, seed: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Rewards and capabilities along it; None when it is not known."""
        record = self._by_key.get(key, {}).get(seed)
        if record is None:
            return None
        return np.array(record["reward"]), np.array(record["capability"])

    def matched(self, key: Key, seeds: Sequence[int], level: float) -> np.ndarray:
        """Capability where the reward first reaches `level`, float [seeds]; NaN where it does not."""
        found = [self.trajectory(key, seed) for seed in seeds]
        return np.array(
            [np.nan if f is None else float(capability_at_reward(*f, level)) for f in found]
        )

    def last(self, key: Key, seeds: Sequence[int]) -> np.ndarray:
        """Reward and capability of the last points, float [seeds, 2]; NaN where not known."""
        found = [self.trajectory(key, seed) for seed in seeds]
        return np.array([(np.nan, np.nan) if f is None else (f[0][-1], f[1][-1]) for f in found])


@dataclasses.dataclass(frozen=True)
class Difference:
    """A paired comparison.

    Attributes:
        mean: mean difference over the seeds that both have.
        sd: sample standard deviation of the differences; NaN for fewer than two.
        p: two-sided p-value of the paired t-test; NaN for fewer than two.
        n: seeds that both have.
    """

    mean: float
    sd: float
    p: float
    n: int


def paired(first: np.ndarray, second: np.ndarray) -> Difference:
    """Compares two methods seed by seed.

    Example:
        >>> d = paired(np.array([1.0, 2.0, 4.0]), np.array([0.0, 1.0, np.nan]))
        >>> d.mean, d.n
        (1.0, 2)
    """
    both = np.isfinite(first) & np.isfinite(second)
    gap = (first - second)[both]
    if len(gap) < 2:
        return Difference(float(gap.mean()) if len(gap) else np.nan, np.nan, np.nan, len(gap))
    sd = float(gap.std(ddof=1))
    # Without any spread the statistic is 0/0 or infinite, and means nothing.
    p = float(stats.ttest_rel(first[both], second[both]).pvalue) if sd > 0 else np.nan
    return Difference(float(gap.mean()), sd, p, len(gap))


def mean_sd(values: np.ndarray) -> tuple[float, float, int]:
    """Mean, sample standard deviation and number of the finite values."""
    known = values[np.isfinite(values)]
    if not len(known):
        return np.nan, np.nan, 0
    return float(known.mean()), float(known.std(ddof=1)) if len(known) > 1 else np.nan, len(known)

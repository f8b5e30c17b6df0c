"""Means over seeds and paired tests between methods."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from train.taxbench.miniature.trajectories import capability_at_reward
from train.taxbench.suite.recipes import Key


class Results:
    """Trajectories by run and seed, of the records from `train.taxbench.suite.worker`."""

    def __init__(self, records: Sequence[Mapping[str, Any]]):
        self._by_key: dict[Key, dict[int, Mapping[str, Any]]] = {}
        for record in records:
            self._by_key.setdefault((record["run"], record["merge"]), {})[record["seed"]] = record

    def environments(self) -> dict[str, int]:
        """Counts trajectories by the versions and the machine that made them."""
        records = [record for of_key in self._by_key.values() for record in of_key.values()]
        return dict(Counter(record["environment"] for record in records))

    def has(self, key: Key, seed: int) -> bool:
        """Says whether a trajectory is known."""
        return seed in self._by_key.get(key, {})

    def _trajectory(self, key: Key, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns rewards and capabilities of a trajectory; NaN, which reaches no level, if unknown."""
        nothing = {"reward": [np.nan], "capability": [np.nan]}
        record = self._by_key.get(key, {}).get(seed, nothing)
        return np.array(record["reward"]), np.array(record["capability"])

    def matched(self, key: Key, seeds: Sequence[int], level: float) -> np.ndarray:
        """Reads capability where the reward first reaches `level`, float [seeds]; NaN if never."""
        found = [self._trajectory(key, seed) for seed in seeds]
        return np.array([capability_at_reward(*pair, level) for pair in found])

    def last(self, key: Key, seeds: Sequence[int]) -> np.ndarray:
        """Returns reward and capability of the last points, float [seeds, 2]; NaN if unknown."""
        found = [self._trajectory(key, seed) for seed in seeds]
        return np.array([[values[-1] for values in pair] for pair in found])


@dataclasses.dataclass(frozen=True)
class Difference:
    """A paired comparison over the `n` seeds that both have; sd and p are NaN if n is below two."""

    mean: float
    sd: float  # sample standard deviation of the differences
    p: float  # two-sided p-value of the paired t-test
    n: int


def paired(first: np.ndarray, second: np.ndarray) -> Difference:
    """Compares two methods seed by seed.

    Example:
        >>> d = paired(np.array([1.0, 2.0, 4.0]), np.array([0.0, 1.0, np.nan]))
        >>> d.mean, d.n
        (1.0, 2)
    """
    gaps = first - second
    mean, sd, n = mean_sd(gaps)
    # Without any spread the statistic is 0/0 or infinite, and means nothing.
    test: Any = stats.ttest_1samp(gaps[np.isfinite(gaps)], 0.0) if sd > 0 else None
    return Difference(mean, sd, np.nan if test is None else float(test.pvalue), n)


def mean_sd(values: np.ndarray) -> tuple[float, float, int]:
    """Returns mean, sample standard deviation and number of the finite values; NaN if undefined."""
    known = values[np.isfinite(values)]
    mean = float(known.mean()) if len(known) else np.nan
    return mean, float(known.std(ddof=1)) if len(known) > 1 else np.nan, len(known)

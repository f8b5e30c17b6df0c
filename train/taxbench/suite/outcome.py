"""The settings of the suite, and all that its report is made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from train.config import ranges
from train.taxbench.miniature.sizes import BenchmarkConfig
from train.taxbench.suite.selection import Entry
from train.taxbench.suite.statistics import Results
from train.taxbench.suite.studies import Study


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaxbenchConfig(BenchmarkConfig):
    """The alignment-tax benchmark over many seeds, with tuning on others and every control.

    Attributes:
        output_dir: Directory of models, results and report. A second run with the same settings
            goes on where the first one stopped.
        suite: demo (four methods, minutes), paper (all methods, tables and figures of the paper) or
            full (the same on more seeds).
        workers: Processes, each on one core. Unset: as many as there are cores.
    """

    output_dir: str
    suite: Literal["demo", "paper", "full"] = "demo"
    workers: ranges.PositiveInt | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """All that the report shows. The first table is of `seeds`, the studies of `study_seeds`."""

    config: TaxbenchConfig
    results: Results
    first: Sequence[Entry]  # the chosen settings of every method
    controls: Sequence[Entry]  # those of the chosen online merges
    studies: Sequence[tuple[Study, Sequence[Entry]]]
    dev_seeds: Sequence[int]  # settings were chosen on these
    seeds: Sequence[int]
    study_seeds: Sequence[int]

    def method(self, group: str) -> Entry | None:
        """Returns the chosen settings of a method; None where it was not run."""
        return next((row for row in self.first if row.group == group), None)

    def matched(self, row: Entry, seeds: Sequence[int], level: float | None = None) -> np.ndarray:
        """Reads capability where a row first reaches a reward, by default that of the settings.

        Returns float [seeds], NaN where the reward is not reached.
        """
        return self.results.matched(row.key, seeds, self.config.reward if level is None else level)

"""The settings of the suite, and all that its report is made from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np

from train.taxbench.suite.selection import Entry
from train.taxbench.suite.statistics import Results
from train.taxbench.suite.studies import Study


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaxbenchConfig:
    """The alignment-tax benchmark over many seeds, with tuning on others and every control.

    Attributes:
        output_dir: Directory of models, results and report. A second run with the same settings
            goes on where the first one stopped.
        suite: demo (four methods, minutes), paper (all methods, tables and figures of the paper) or
            full (the same on twice the seeds).
        workers: Processes, each on one core. Unset: as many as there are cores.
        reward: Reward at which capabilities are compared, between 0 and 1.
        steps: Steps of alignment, the same for every method.
        eval_every: Steps from one evaluation to the next; a divisor of `steps`.
        base_steps: Steps of training every base model.
        sft_steps: Steps of fine-tuning it on instructions.
        pairs: Preference pairs.
        questions: Held-out questions in each of the eight families.
    """

    output_dir: str
    suite: Literal["demo", "paper", "full"] = "demo"
    workers: int | None = None
    reward: float = 0.8
    steps: int = 160
    eval_every: int = 10
    base_steps: int = 1000
    sft_steps: int = 500
    pairs: int = 4000
    questions: int = 64


@dataclasses.dataclass(frozen=True)
class Outcome:
    """All that the report is made from.

    Attributes:
        config: the settings of the suite.
        results: every trajectory.
        first: the chosen settings of every method.
        controls: the controls of the chosen online merges.
        studies: the studies, each with its entries.
        dev_seeds: seeds on which settings were chosen.
        seeds: seeds of the first table.
        study_seeds: seeds of the studies.
    """

    config: TaxbenchConfig
    results: Results
    first: Sequence[Entry]
    controls: Sequence[Entry]
    studies: Sequence[tuple[Study, Sequence[Entry]]]
    dev_seeds: Sequence[int]
    seeds: Sequence[int]
    study_seeds: Sequence[int]

    def method(self, group: str) -> Entry | None:
        """The chosen settings of a method; None where it was not run."""
        return next((row for row in self.first if row.group == group), None)

    def matched(self, row: Entry, seeds: Sequence[int], level: float | None = None) -> np.ndarray:
        """Capability where a row first reaches a reward, that of the settings if None is given.

        Returns:
            float [seeds]; NaN where the reward is not reached.
        """
        return self.results.matched(row.key, seeds, self.config.reward if level is None else level)

"""Several data sets as one, in which each has its weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from train.data.dataset import Lengths, TokenDataset, TokenReport


def mix(datasets: Sequence[TokenDataset], weights: Sequence[float]) -> TokenDataset:
    """Puts data sets together.

    A weight says how often the rows of its data set come in an epoch: all of them once at 1, all
    twice and half of them a third time at 2.5, a half at 0.5; which half is drawn anew in every
    epoch. So ratios of rows are exact in every epoch, and a row is stored and scored by the
    reference once, however often it comes. The data sets have the same columns; widths may differ.

    Returns:
      All rows, in the order given, with `parts` that say how they are drawn.

    Raises:
      ValueError: When a data set gets no row.
    """
    parts = []
    for dataset, weight in zip(datasets, weights, strict=True):
        parts.append((len(dataset), round(weight * len(dataset))))
        if parts[-1][1] < 1:
            raise ValueError(f"weight {weight:g} leaves none of {len(dataset)} rows; raise it.")
    arrays = {name: _stack(name, datasets) for name in datasets[0].arrays}
    arrays["index"] = np.arange(sum(map(len, datasets)), dtype=np.int32)
    report = _merge([dataset.report for dataset in datasets])
    return TokenDataset(arrays, report, parts=tuple(parts))


def _stack(name: str, datasets: Sequence[TokenDataset]) -> np.ndarray:
    """One column of all data sets, padded to the widest."""
    columns = [dataset.arrays[name] for dataset in datasets]
    if columns[0].ndim > 1:
        width = max(column.shape[1] for column in columns)
        left = name.startswith("prompt_")
        columns = [
            np.pad(column, [(0, 0), (missing, 0) if left else (0, missing)])
            for column in columns
            for missing in [width - column.shape[1]]
        ]
    return np.concatenate(columns)


def _merge(reports: Sequence[TokenReport]) -> TokenReport:
    """One report of all records."""
    weights = [report.rows for report in reports]

    def lengths(each: list[Lengths]) -> Lengths:
        mean = np.average([one.mean for one in each], weights=weights)
        return Lengths(float(mean), max(one.largest for one in each))

    dropped: Counter[str] = Counter()
    for report in reports:
        dropped.update(report.dropped)
    return TokenReport(
        records=sum(report.records for report in reports),
        rows=sum(weights),
        dropped=dict(dropped),
        prompts_truncated=sum(report.prompts_truncated for report in reports),
        completions_truncated=sum(report.completions_truncated for report in reports),
        boundaries_moved=sum(report.boundaries_moved for report in reports),
        prompts=lengths([report.prompts for report in reports]),
        completions=lengths([report.completions for report in reports]),
    )

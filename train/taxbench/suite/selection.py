"""Selection of every method's reported settings: those that did best on the dev seeds."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from train.taxbench.suite.recipes import Key, Recipe
from train.taxbench.suite.statistics import Results


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of a table: a trajectory with its names."""

    group: str
    label: str
    settings: str
    key: Key
    control: bool = False


def entries(recipes: Sequence[Recipe], steps: int) -> list[Entry]:
    """Makes an entry for every trajectory of the recipes, in their order."""
    rows = []
    for recipe in recipes:
        words, (own, *of_merges) = recipe.settings(steps), recipe.trajectories()
        rows.append(Entry(recipe.group, recipe.label, words, own, recipe.control))
        for merge, key in zip(recipe.merges, of_merges, strict=True):
            control = merge.method == "add_delta"
            settings = f"{merge.settings()}, of AdamW with {words}"
            rows.append(Entry(merge.label, merge.label, settings, key, control))
    return rows


def choose(
    rows: Sequence[Entry], results: Results, seeds: Sequence[int], level: float
) -> list[Entry]:
    """Picks the settings of every group with most capability at the level, averaged over seeds.

    Settings that miss the level on a dev seed come after all that reach it on every one.
    """
    best: dict[str, tuple[float, Entry]] = {}
    for row in rows:
        values = results.matched(row.key, seeds, level)
        score = float(np.where(np.isfinite(values), values, -1.0).mean())
        if row.group not in best or score > best[row.group][0]:
            best[row.group] = (score, row)
    return [row for _, row in best.values()]


def narrowed(recipes: Sequence[Recipe], chosen: Sequence[Entry]) -> list[Recipe]:
    """Keeps only the recipes and merges behind the chosen entries."""
    keys, out = {row.key for row in chosen}, []
    for recipe in recipes:
        own, *of_merges = recipe.trajectories()
        pairs = zip(recipe.merges, of_merges, strict=True)
        merges = tuple(merge for merge, key in pairs if key in keys)
        if merges or own in keys:
            out.append(dataclasses.replace(recipe, merges=merges))
    return out

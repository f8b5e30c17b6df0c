"""The paper's tables and figures after the first, and open questions: each a list of recipes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from train.config import AlphaOptions, OptimizerOptions, ScheduleOptions
from train.taxbench.suite.candidates import on_dare, on_ties, online_merge
from train.taxbench.suite.recipes import DeltaKind, Recipe, optimizer


@dataclasses.dataclass(frozen=True)
class Study:
    """A question with the recipes that answer it.

    The group of a recipe is its line in the figure, the label its place on the axis. `counterpart`
    gives, for a line and a place, those of the recipe that is compared with it besides AdamW.
    """

    name: str  # of the figure's file
    title: str  # heading in the report
    finding: str  # of the paper
    recipes: Sequence[Recipe]
    counterpart: Callable[[str, str], tuple[str, str]] | None = None
    counterpart_is: str = ""  # in tables


def studies() -> list[Study]:
    """Lists the paper's figures and tables after the first, and the questions it leaves open."""
    return [
        _densities(),
        _alphas(),
        _losses(),
        _merging_intervals(),
        _betas(),
        _schedules(),
        _parts_of_delta(),
    ]


def _line(label: str, points: Mapping[Any, OptimizerOptions]) -> list[Recipe]:
    """Makes a line of a figure: an optimizer for every place on its axis."""
    return [Recipe(label, str(at), options) for at, options in points.items()]


def _both_merges(points: Mapping[Any, Mapping[str, Any]]) -> list[Recipe]:
    """Makes lines of OnDARE and OnTIES, with the settings for every place on the axis."""
    return [
        *_line("OnDARE", {at: on_dare(**settings) for at, settings in points.items()}),
        *_line("OnTIES", {at: on_ties(**settings) for at, settings in points.items()}),
    ]


def _with_adamw(at: Any, **fields: Any) -> list[Recipe]:
    """Puts AdamW, OnDARE and OnTIES at one place on the axis, with the same fields of a recipe."""
    lines = {"AdamW": optimizer(), "OnDARE": on_dare(), "OnTIES": on_ties()}
    return [Recipe(line, str(at), options, **fields) for line, options in lines.items()]


def _densities() -> Study:
    rates = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)
    fixed = {p: on_dare(density=p, delta_mask="fixed") for p in rates[1:]}
    return Study(
        "reserve-rate",
        "Reserve rate p from 1 to 1e-5 (the paper's Figure 2)",
        "Online merging works down to p = 1e-5, where offline DARE and TIES collapse.",
        [
            *_line("OnDARE, fresh masks", {p: on_dare(density=p) for p in rates}),
            *_line("OnDARE, fixed mask", fixed),
            *_line("OnTIES", {p: on_ties(density=p) for p in rates}),
        ],
        lambda line, rate: (line.replace("fixed mask", "fresh masks"), rate),
        "fresh masks at the same p",
    )


def _alphas() -> Study:
    return Study(
        "alpha",
        "The weight α over decades (the paper's Table 2)",
        "α = 5e-7 over 1000s of steps is best; a larger one costs reward, a smaller one does nothing.",
        _both_merges({alpha: {"alpha": alpha} for alpha in (1e-5, 1e-4, 1e-3, 1e-2)}),
    )


def _losses() -> Study:
    # SimPO's rewards are means over tokens, with a β of its own.
    betas = {"sigmoid": 0.1, "ipo": 0.1, "kto": 0.1, "simpo": 2.0}
    return Study(
        "losses",
        "Other losses: IPO, KTO, SimPO (the paper's Table 3)",
        "Online merging helps with IPO and KTO as it does with DPO.",
        [r for loss, beta in betas.items() for r in _with_adamw(loss, loss=loss, beta=beta)],
        lambda line, loss: ("AdamW", loss),
        "AdamW with the same loss",
    )


def _merging_intervals() -> Study:
    return Study(
        "step-k",
        "Merging every K-th step (the paper's Figure 3)",
        "Small K is best; K = the number of steps is offline merging.",
        _both_merges({k: {"every_k": k} for k in (1, 4, 32, 160)}),
        lambda line, k: (line, "1"),
        "K = 1",
    )


def _betas() -> Study:
    return Study(
        "beta",
        "β of DPO down to 1e-3 (the paper's Figure 4)",
        "With a small β AdamW breaks down; online merging keeps training stable.",
        [recipe for beta in (1e-3, 0.01, 0.1, 0.3) for recipe in _with_adamw(beta, beta=beta)],
        lambda line, beta: ("AdamW", beta),
        "AdamW with the same β",
    )


def _schedules() -> Study:
    def scheduled(kind: Any, peak: float, warmup: int = 0) -> AlphaOptions:
        return AlphaOptions(value=peak, schedule=ScheduleOptions(type=kind, warmup_steps=warmup))

    # The sum of α over the run is that of the constant 1e-3: schedules differ in when, not how much.
    shapes: dict[str, Any] = {
        "constant": 1e-3,
        "linear to 0": scheduled("linear", 2e-3),
        "cosine to 0": scheduled("cosine", 2e-3),
        "warm-up over half": scheduled("constant", 1.33e-3, 80),
        "relative 0.2": AlphaOptions(relative=0.2),
        "from reward accuracy 0.7": AlphaOptions(value=1e-3, gate=0.7),
    }
    return Study(
        "schedules",
        "When α acts: schedules with the same sum, and a gate that opens with the reward",
        "Not in the paper, whose α is constant.",
        _both_merges({name: {"alpha": alpha} for name, alpha in shapes.items()}),
        lambda line, shape: (line, "constant"),
        "a constant α",
    )


def _parts_of_delta() -> Study:
    lines = {
        "OnDARE, p 0.1": on_dare(density=0.1),
        "OnTIES, p 0.1": on_ties(density=0.1),
        "OnDARE, p 1": on_dare(),
        "Online DELLA, p 0.6": online_merge("magnitude_ranked", "linear", density=0.6),
        "Online Breadcrumbs, p 0.3": online_merge("band", "linear", density=0.3),
    }
    kinds: tuple[DeltaKind, ...] = ("tau", "earlier", "low_rank", "attention", "mlp")
    return Study(
        "sources",
        "What is merged: all of τ or parts of it, by every sparsifier",
        "Not in the paper, which merges the whole of τ.",
        [Recipe(line, kind, o, delta=kind) for line, o in lines.items() for kind in kinds],
        lambda line, kind: (line, "tau"),
        "the whole of τ",
    )

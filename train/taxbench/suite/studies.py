"""The paper's tables and figures after the first, and open questions: each a list of recipes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from train.config import AlphaOptions, ScheduleOptions
from train.taxbench.suite.candidates import general, on_dare, on_ties
from train.taxbench.suite.recipes import DeltaKind, Recipe, optimizer


@dataclasses.dataclass(frozen=True)
class Study:
    """A question.

    Attributes:
        name: section of the report.
        title: its heading.
        finding: what the paper found.
        recipes: what is run.
        counterpart: group and label of the recipe that one is compared with besides AdamW.
        counterpart_is: the same in words.
    """

    name: str
    title: str
    finding: str
    recipes: Sequence[Recipe]
    counterpart: Callable[[str, str], tuple[str, str]] | None = None
    counterpart_is: str = ""


def _line(label: str, points: dict[Any, Any], **fields: Any) -> list[Recipe]:
    """One line of a figure: an optimizer for every place on its axis."""
    return [Recipe(label, str(at), options, **fields) for at, options in points.items()]


def _schedule(kind: Any, peak: float, warmup: int = 0) -> AlphaOptions:
    return AlphaOptions(value=peak, schedule=ScheduleOptions(type=kind, warmup_steps=warmup))


def studies() -> list[Study]:
    """The paper's figures and tables after the first, and the questions it leaves open."""
    return [
        _reserve_rates(),
        _alphas(),
        _losses(),
        _steps_k(),
        _betas(),
        _schedules(),
        _sources(),
    ]


def _reserve_rates() -> Study:
    rates = (1.0, 0.1, 0.01, 1e-3, 1e-4, 1e-5)
    return Study(
        "reserve-rate",
        "Reserve rate p from 1 to 1e-5 (the paper's Figure 2)",
        "Online merging works down to p = 1e-5, where offline DARE and TIES collapse.",
        [
            *_line("OnDARE, fresh masks", {p: on_dare(density=p) for p in rates}),
            *_line(
                "OnDARE, fixed mask", {p: on_dare(density=p, delta_mask="fixed") for p in rates[1:]}
            ),
            *_line("OnTIES", {p: on_ties(density=p) for p in rates}),
        ],
        lambda line, rate: (line.replace("fixed mask", "fresh masks"), rate),
        "fresh masks at the same p",
    )


def _alphas() -> Study:
    alphas = (1e-5, 1e-4, 1e-3, 1e-2)
    return Study(
        "alpha",
        "The weight α over decades (the paper's Table 2)",
        "α = 5e-7 over 1000s of steps is best; a larger one costs reward, a smaller one does nothing.",
        [
            *_line("OnDARE", {a: on_dare(alpha=a) for a in alphas}),
            *_line("OnTIES", {a: on_ties(alpha=a) for a in alphas}),
        ],
    )


def _losses() -> Study:
    recipes = []
    # SimPO's rewards are means over tokens, with a β of its own.
    for loss, beta in (("sigmoid", 0.1), ("ipo", 0.1), ("kto", 0.1), ("simpo", 2.0)):
        of_loss: dict[str, Any] = {"loss": loss, "beta": beta}
        recipes += _line("AdamW", {loss: optimizer()}, **of_loss)
        recipes += _line("OnDARE", {loss: on_dare()}, **of_loss)
        recipes += _line("OnTIES", {loss: on_ties()}, **of_loss)
    return Study(
        "losses",
        "Other losses: IPO, KTO, SimPO (the paper's Table 3)",
        "Online merging helps with IPO and KTO as it does with DPO.",
        recipes,
        lambda line, loss: ("AdamW", loss),
        "AdamW with the same loss",
    )


def _steps_k() -> Study:
    spans = (1, 4, 32, 160)
    return Study(
        "step-k",
        "Merging every K-th step (the paper's Figure 3)",
        "Small K is best; K = the number of steps is offline merging.",
        [
            *_line("OnDARE", {k: on_dare(every_k=k) for k in spans}),
            *_line("OnTIES", {k: on_ties(every_k=k) for k in spans}),
        ],
        lambda line, span: (line, "1"),
        "K = 1",
    )


def _betas() -> Study:
    betas = (1e-3, 0.01, 0.1, 0.3)
    recipes = []
    for beta in betas:
        recipes += _line("AdamW", {beta: optimizer()}, beta=beta)
        recipes += _line("OnDARE", {beta: on_dare()}, beta=beta)
        recipes += _line("OnTIES", {beta: on_ties()}, beta=beta)
    return Study(
        "beta",
        "β of DPO down to 1e-3 (the paper's Figure 4)",
        "With a small β AdamW breaks down; online merging keeps training stable.",
        recipes,
        lambda line, beta: ("AdamW", beta),
        "AdamW with the same β",
    )


def _schedules() -> Study:
    # The sum of α over the run is that of the constant 1e-3: schedules differ in when, not how much.
    shapes: dict[str, Any] = {
        "constant": 1e-3,
        "linear to 0": _schedule("linear", 2e-3),
        "cosine to 0": _schedule("cosine", 2e-3),
        "warm-up over half": _schedule("constant", 1.33e-3, 80),
        "relative 0.2": AlphaOptions(relative=0.2),
        "from reward accuracy 0.7": AlphaOptions(value=1e-3, gate=0.7),
    }
    return Study(
        "schedules",
        "When α acts: schedules with the same sum, and a gate that opens with the reward",
        "Not in the paper, whose α is constant.",
        [
            *_line("OnDARE", {name: on_dare(alpha=a) for name, a in shapes.items()}),
            *_line("OnTIES", {name: on_ties(alpha=a) for name, a in shapes.items()}),
        ],
        lambda line, shape: (line, "constant"),
        "a constant α",
    )


def _sources() -> Study:
    kinds: tuple[DeltaKind, ...] = ("tau", "earlier", "low_rank", "attention", "mlp")
    lines = {
        "OnDARE, p 0.1": on_dare(density=0.1),
        "OnTIES, p 0.1": on_ties(density=0.1),
        "OnDARE, p 1": on_dare(),
        "Online DELLA, p 0.6": general("magnitude_ranked", "linear", density=0.6),
        "Online Breadcrumbs, p 0.3": general("band", "linear", density=0.3),
    }
    return Study(
        "sources",
        "What is merged: all of τ or parts of it, by every sparsifier",
        "Not in the paper, which merges the whole of τ.",
        [
            recipe
            for line, options in lines.items()
            for kind in kinds
            for recipe in _line(line, {kind: options}, delta=kind)
        ],
        lambda line, kind: (line, "tau"),
        "the whole of τ",
    )

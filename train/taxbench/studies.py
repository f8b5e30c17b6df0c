"""What the suite asks, each a list of recipes: the paper's tables and figures, and open questions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from train.config import AlphaOptions, ScheduleOptions
from train.taxbench.recipes import DeltaKind, Merge, Recipe, optimizer

DENSITIES = (0.1, 0.3, 0.6, 1.0)
# Every offline method: its settings times twenty weights of the merge.
OFFLINE = (
    Merge("linear", "Offline linear", "linear"),
    *(Merge(f"ties-{p:g}", "Offline TIES", "ties", p) for p in DENSITIES),
    *(Merge(f"dare-{p:g}", "Offline DARE", "dare_linear", p) for p in (0.1, 0.3, 0.6, 0.9)),
    *(Merge(f"della-{p:g}", "Offline DELLA", "della", p) for p in (0.2, 0.4, 0.6, 0.8)),
    Merge("slerp", "Offline slerp", "slerp"),
)
CONTROL = "Control: AdamW + λτ"


def add_delta(label: str = CONTROL) -> tuple[Merge, ...]:
    """The control that adds λ·τ after training, for four λ."""
    return tuple(
        Merge(f"add-{weight:g}", label, "add_delta", weight=weight)
        for weight in (0.05, 0.1, 0.2, 0.3)
    )


@dataclasses.dataclass(frozen=True)
class Study:
    """A question.

    Attributes:
        name: section of the report.
        title: its heading.
        finding: what the paper found.
        recipes: what is run.
    """

    name: str
    title: str
    finding: str
    recipes: Sequence[Recipe]


def on_dare(**fields: Any) -> Any:
    """OnDARE with the benchmark's usual settings."""
    return optimizer("on_dare", **({"alpha": 1e-3, "density": 1.0} | fields))


def on_ties(**fields: Any) -> Any:
    """OnTIES with the benchmark's usual settings."""
    return optimizer("on_ties", **({"alpha": 1e-3, "density": 1.0} | fields))


def general(sparsifier: str, consensus: str, **fields: Any) -> Any:
    """Any other online merge."""
    return optimizer(
        "online_merge", sparsifier=sparsifier, consensus=consensus, **({"alpha": 1e-3} | fields)
    )


def candidates() -> list[Recipe]:
    """Every method with its four settings; the paper's Table 1 and the attempts to beat it."""
    return [*_baselines(), *_online(), *_attempts()]


def _baselines() -> list[Recipe]:
    def fast(rate: float) -> tuple[Merge, ...]:
        # Offline merges gain most from the model that went furthest.
        return OFFLINE if rate == 1e-4 else ()

    def with_rates(group: str, label: str, values: Sequence[Any], field: str, *rates: float) -> Any:
        for rate in rates:
            for value in values:
                extra: dict[str, Any] = {field: value}
                yield Recipe(group, label, optimizer(learning_rate=rate), **extra)

    return [
        *(
            Recipe("adamw", "AdamW", optimizer(learning_rate=r), merges=(*fast(r), *add_delta()))
            for r in (2e-5, 3e-5, 5e-5, 1e-4)
        ),
        *with_rates("kl", "AdamW, larger β", (0.2, 0.3, 0.5, 1.0), "beta", 3e-5),
        *with_rates("ema", "EMA", (0.9, 0.97), "ema", 5e-5, 1e-4),
        *(
            Recipe("child", "ChildTuning", optimizer("child_tuning", density=p, learning_rate=r))
            for p in (0.1, 0.5)
            for r in (3e-5, 1e-4)
        ),
        *with_rates("lora", "LoRA", (4, 16), "lora_rank", 3e-4, 1e-3),
        *with_rates(
            "anchored", "Pull to SFT", ((0.003, "all"), (0.01, "all")), "anchor", 3e-5, 1e-4
        ),
    ]


def _online() -> list[Recipe]:
    def grid(group: str, label: str, make: Callable[..., Any], densities: Sequence[float]) -> Any:
        for alpha in (3e-4, 1e-3):
            for density in densities:
                yield Recipe(group, label, make(alpha=alpha, density=density))

    def della(**fields: Any) -> Any:
        return general("magnitude_ranked", "linear", **fields)

    def breadcrumbs(**fields: Any) -> Any:
        return general("band", "linear", **fields)

    def dare_ties(**fields: Any) -> Any:
        return general("random", "sign", **fields)

    return [
        *grid("on_dare", "OnDARE", on_dare, (0.1, 1.0)),
        *grid("on_ties", "OnTIES", on_ties, (0.1, 1.0)),
        *grid("on_della", "Online DELLA", della, (0.3, 0.6)),
        *grid("on_breadcrumbs", "Online Breadcrumbs", breadcrumbs, (0.3, 0.9)),
        *grid("on_dare_ties", "Online DARE-TIES", dare_ties, (0.1, 0.5)),
    ]


def _attempts() -> list[Recipe]:
    """Attempts at something better than the paper, and what each is made of without τ."""
    fast, label = 1e-4, "Control: AdamW, larger β, EMA"
    return [
        *(
            Recipe(
                "kl_ema",
                label,
                optimizer(learning_rate=fast),
                beta=beta,
                ema=decay,
                merges=add_delta(f"{label} + λτ"),
                control=True,
            )
            for beta in (0.3, 0.5)
            for decay in (0.9, 0.97)
        ),
        *(
            Recipe(
                "ties_kl_ema",
                "Attempt 1: OnTIES, larger β, EMA",
                on_ties(learning_rate=fast, alpha=alpha),
                beta=beta,
                ema=0.97,
            )
            for alpha in (3e-4, 1e-3)
            for beta in (0.3, 0.5)
        ),
        *(
            Recipe(
                "opposing",
                "Attempt 2: gated pull",
                optimizer(learning_rate=rate),
                anchor=(share, "opposing"),
            )
            for rate in (3e-5, 5e-5)
            for share in (0.03, 0.1)
        ),
        *(
            Recipe(
                "opposing_kl",
                "Attempt 3: gated pull, larger β",
                optimizer(learning_rate=rate),
                beta=0.3,
                anchor=(share, "opposing"),
            )
            for rate in (5e-5, 1e-4)
            for share in (0.03, 0.1)
        ),
        *(
            Recipe(
                "ties_fast",
                "Attempt 4: OnTIES of few, large steps",
                on_ties(learning_rate=fast, alpha=alpha, density=0.1),
                beta=beta,
            )
            for alpha in (3e-4, 1e-3)
            for beta in (0.1, 0.3)
        ),
        *(
            Recipe(
                "ties_fast_ema",
                "Attempt 5: as 4, larger β, EMA",
                on_ties(learning_rate=rate, alpha=alpha, density=0.1),
                beta=0.5,
                ema=0.97,
            )
            for alpha in (3e-4, 1e-3)
            for rate in (fast, 2 * fast)
        ),
        *(
            Recipe(
                "ties_fast_ema-zero",
                "Control: attempt 5, α = 0",
                on_ties(learning_rate=rate, alpha=1e-9, density=density),
                beta=0.5,
                ema=0.97,
                control=True,
            )
            for density in (0.1, 0.3)
            for rate in (fast, 2 * fast)
        ),
    ]


def controls(chosen: Recipe) -> list[Recipe]:
    """The chosen online merge with everything but its settings taken from it, one thing at a time."""
    name = chosen.group
    label = chosen.label
    # A delta of weight 1e-9 moves nothing and still has its vote and its masks.
    powerless = dataclasses.replace(chosen.optimizer, alpha=1e-9)
    kinds: dict[DeltaKind, str] = {
        "permuted": "τ permuted",
        "negative": "−τ",
        "random": "random direction",
    }
    return [
        Recipe(f"{name}-zero", f"Control: {label}, α = 0", powerless, control=True),
        *(
            dataclasses.replace(
                chosen,
                group=f"{name}-{kind}",
                label=f"Control: {label}, {words}",
                delta=kind,
                control=True,
            )
            for kind, words in kinds.items()
        ),
    ]


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
    rates = (1.0, 0.1, 0.01, 1e-3, 1e-5)
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
    )

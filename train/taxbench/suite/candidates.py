"""Every method with its settings, the attempts at something better, and the controls of both."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from train.taxbench.suite.recipes import DeltaKind, Merge, Recipe, optimizer

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
    return [*_baselines(), *_online(), *_attempts(), *_largest()]


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
    """Attempts at something better than the paper, and what they are made of without τ."""
    fast, label = 1e-4, "Control: AdamW, larger β, EMA"
    return [
        *_without_tau(fast),
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
    ]


def _without_tau(fast: float) -> list[Recipe]:
    """Attempts 4 and 5 with one thing taken from them: the merge, α, or τ's place in the tensors."""
    label = "Control: AdamW of few, large steps, larger β"
    rates = (fast, 2 * fast)
    parts: tuple[tuple[str, str, float, DeltaKind], ...] = (
        ("zero", "sign votes alone (α = 0)", 1e-9, "tau"),
        ("permuted", "τ permuted", 1e-3, "permuted"),
    )
    return [
        *(
            Recipe(
                "kl_fast",
                label,
                optimizer(learning_rate=rate),
                beta=beta,
                merges=add_delta(f"{label} + λτ"),
                control=True,
            )
            for rate in rates
            for beta in (0.3, 0.5)
        ),
        *(
            Recipe(
                f"ties_fast-{name}",
                f"Control: attempt 4, {words}",
                on_ties(learning_rate=rate, alpha=alpha, density=0.1),
                beta=beta,
                delta=delta,
                control=True,
            )
            for name, words, alpha, delta in parts
            for rate in rates
            for beta in (0.1, 0.3)
        ),
        *(
            Recipe(
                "ties_fast-largest",
                "Control: attempt 4, largest entries alone",
                optimizer("keep_largest", learning_rate=rate, density=0.1),
                beta=beta,
                control=True,
            )
            for rate in rates
            for beta in (0.1, 0.3)
        ),
        *(
            Recipe(
                "ties_fast_ema-zero",
                "Control: attempt 5, sign votes alone (α = 0)",
                on_ties(learning_rate=rate, alpha=1e-9, density=density),
                beta=0.5,
                ema=0.97,
                control=True,
            )
            for density in (0.1, 0.3)
            for rate in rates
        ),
    ]


def _largest() -> list[Recipe]:
    """Attempt 6, which came from the controls of 4 and 5: nothing of τ at all; and its ablation."""
    label = "Attempt 6: largest entries alone"
    fast = 1e-4
    # Learning rate, β and decay of the moving average.
    settings = ((fast, 0.3, None), (2 * fast, 0.3, None), (fast, 0.3, 0.97), (2 * fast, 0.5, 0.97))

    def of(
        name: str, words: str, kept: Callable[..., Any], grid: Sequence[Any], control: bool
    ) -> Any:
        for rate, beta, decay in grid:
            options = kept(learning_rate=rate, density=0.1)
            yield Recipe(name, words, options, beta=beta, ema=decay, control=control)

    def largest(**fields: Any) -> Any:
        return optimizer("keep_largest", **fields)

    def random(**fields: Any) -> Any:
        return optimizer("child_tuning", **fields)

    # What random masks keep is divided by p, so that their steps need no larger learning rate.
    slow = [(0.3 * rate, beta, decay) for rate, beta, decay in settings]
    usual = [(rate, 0.1, decay) for rate in (fast, 2 * fast) for decay in (None, 0.97)]
    return [
        *of("largest", label, largest, settings, False),
        *of("largest-beta", "Control: attempt 6 with β = 0.1", largest, usual, True),
        *of("largest-random", "Control: attempt 6, random entries", random, slow, True),
    ]


def controls(chosen: Recipe) -> list[Recipe]:
    """The chosen online merge with everything but its settings taken from it, one thing at a time."""
    name = chosen.group
    label = chosen.label
    # A delta of weight 1e-9 moves nothing and still has its vote or its masks.
    powerless = dataclasses.replace(chosen.optimizer, alpha=1e-9)
    kinds: dict[DeltaKind, str] = {
        "permuted": "τ permuted",
        "negative": "−τ",
        "random": "random direction",
    }
    left = "sign votes" if name == "on_ties" else "masks"
    return [
        Recipe(f"{name}-zero", f"Control: {label}, {left} alone (α = 0)", powerless, control=True),
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

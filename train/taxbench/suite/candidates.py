"""Every method with its settings, the attempts at something better, and the controls of both."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

from train.config import OptimizerOptions
from train.taxbench.suite.recipes import DeltaKind, Merge, Recipe, optimizer

# Every offline method: its settings times twenty weights of the merge.
OFFLINE = (
    Merge("linear", "Offline linear", "linear"),
    *(Merge(f"ties-{p:g}", "Offline TIES", "ties", p) for p in (0.1, 0.3, 0.6, 1.0)),
    *(Merge(f"dare-{p:g}", "Offline DARE", "dare_linear", p) for p in (0.1, 0.3, 0.6, 0.9)),
    *(Merge(f"della-{p:g}", "Offline DELLA", "della", p) for p in (0.2, 0.4, 0.6, 0.8)),
    Merge("slerp", "Offline slerp", "slerp"),
)
CONTROL = "Control: AdamW + λτ"
_FAST = 1e-4
"""The learning rate of larger steps."""
_FAST_RATES = [_FAST, 2 * _FAST]
_POWERLESS = 1e-9
"""An α with which a delta moves nothing, and still has its vote or its masks."""


def add_delta(label: str = CONTROL) -> tuple[Merge, ...]:
    """Makes the control that adds λ·τ after training, for four λ."""
    return tuple(
        Merge(f"add-{weight:g}", label, "add_delta", weight=weight)
        for weight in (0.05, 0.1, 0.2, 0.3)
    )


def on_dare(**fields: Any) -> OptimizerOptions:
    """Makes OnDARE with the benchmark's usual settings."""
    return optimizer("on_dare", **({"alpha": 1e-3, "density": 1.0} | fields))


def on_ties(**fields: Any) -> OptimizerOptions:
    """Makes OnTIES with the benchmark's usual settings."""
    return optimizer("on_ties", **({"alpha": 1e-3, "density": 1.0} | fields))


def online_merge(sparsifier: str, consensus: str, **fields: Any) -> OptimizerOptions:
    """Makes any other online merge."""
    options = {"alpha": 1e-3, "sparsifier": sparsifier, "consensus": consensus}
    return optimizer("online_merge", **(options | fields))


def grid(
    group: str, label: str, make: Callable[..., OptimizerOptions] = optimizer, **choices: Any
) -> list[Recipe]:
    """Makes the recipes of a method, one for every combination of its choices.

    Choices are fields of `Recipe` or, where they are not, arguments of `make`. A list has the values
    to try, the first list varying slowest; anything else is the same for all.

    Example:
        >>> [recipe.beta for recipe in grid("kl", "AdamW, larger β", beta=[0.2, 0.3])]
        [0.2, 0.3]
    """
    values = [value if isinstance(value, list) else [value] for value in choices.values()]
    fields, recipes = {field.name for field in dataclasses.fields(Recipe)}, []
    for combination in itertools.product(*values):
        settings = dict(zip(choices, combination, strict=True))
        own = {name: settings.pop(name) for name in choices if name in fields}
        recipes.append(Recipe(group, label, make(**settings), **own))
    return recipes


def candidates() -> list[Recipe]:
    """Lists the paper's Table 1 and the attempts to beat it, each method with four settings."""
    return [*_baselines(), *_online(), *_parts_of_attempts(), *_attempts(), *_largest()]


def _baselines() -> list[Recipe]:
    slower = [2e-5, 3e-5, 5e-5]
    # Offline merges gain most from the model that went furthest.
    merges = (*OFFLINE, *add_delta())
    weak = [(0.003, "all"), (0.01, "all")]
    kept: dict[str, Any] = {"name": "child_tuning", "density": [0.1, 0.5]}
    return [
        *grid("adamw", "AdamW", learning_rate=slower, merges=add_delta()),
        *grid("adamw", "AdamW", learning_rate=_FAST, merges=merges),
        *grid("kl", "AdamW, larger β", beta=[0.2, 0.3, 0.5, 1.0]),
        *grid("ema", "EMA", learning_rate=[5e-5, _FAST], ema=[0.9, 0.97]),
        *grid("child", "ChildTuning", **kept, learning_rate=[3e-5, _FAST]),
        *grid("lora", "LoRA", learning_rate=[3e-4, 1e-3], lora_rank=[4, 16]),
        *grid("anchored", "Pull to SFT", learning_rate=[3e-5, _FAST], anchor=weak),
    ]


def _online() -> list[Recipe]:
    alphas = [3e-4, 1e-3]

    def online(
        group: str, label: str, sparsifier: str, consensus: str, density: list[float]
    ) -> list[Recipe]:
        kind = {"sparsifier": sparsifier, "consensus": consensus}
        return grid(group, label, online_merge, alpha=alphas, density=density, **kind)

    return [
        *grid("on_dare", "OnDARE", on_dare, alpha=alphas, density=[0.1, 1.0]),
        *grid("on_ties", "OnTIES", on_ties, alpha=alphas, density=[0.1, 1.0]),
        *online("on_della", "Online DELLA", "magnitude_ranked", "linear", [0.3, 0.6]),
        *online("on_breadcrumbs", "Online Breadcrumbs", "band", "linear", [0.3, 0.9]),
        *online("on_dare_ties", "Online DARE-TIES", "random", "sign", [0.1, 0.5]),
    ]


def _attempts() -> list[Recipe]:
    """Lists attempts at something better than the paper."""
    label, strong = "Control: AdamW, larger β, EMA", [0.3, 0.5]
    pulls = [(0.03, "opposing"), (0.1, "opposing")]
    fast: dict[str, Any] = {"learning_rate": _FAST}
    merging: dict[str, Any] = {"make": on_ties, "alpha": [3e-4, 1e-3]}
    sparse: dict[str, Any] = {**merging, "density": 0.1}
    kept: dict[str, Any] = {"merges": add_delta(f"{label} + λτ"), "control": True}
    return [
        *grid("kl_ema", label, **fast, beta=strong, ema=[0.9, 0.97], **kept),
        *grid(
            "ties_kl_ema",
            "Attempt 1: OnTIES, larger β, EMA",
            **fast,
            **merging,
            beta=strong,
            ema=0.97,
        ),
        *grid("opposing", "Attempt 2: gated pull", learning_rate=[3e-5, 5e-5], anchor=pulls),
        *grid(
            "opposing_kl",
            "Attempt 3: gated pull, larger β",
            learning_rate=[5e-5, _FAST],
            beta=0.3,
            anchor=pulls,
        ),
        *grid(
            "ties_fast", "Attempt 4: OnTIES of few, large steps", **fast, **sparse, beta=[0.1, 0.3]
        ),
        *grid(
            "ties_fast_ema",
            "Attempt 5: as 4, larger β, EMA",
            **sparse,
            learning_rate=_FAST_RATES,
            beta=0.5,
            ema=0.97,
        ),
    ]


def _parts_of_attempts() -> list[Recipe]:
    """Takes one thing from attempts 4 and 5: the merge, α, or τ's place in the tensors."""
    label = "Control: AdamW of few, large steps, larger β"
    fast: dict[str, Any] = {"learning_rate": _FAST_RATES, "control": True}
    sparse = fast | {"density": 0.1, "beta": [0.1, 0.3]}
    attempt, votes = "Control: attempt 4", "sign votes alone (α = 0)"
    zero = {"alpha": _POWERLESS}
    averaged = {"beta": 0.5, "ema": 0.97, "density": [0.1, 0.3]}
    return [
        *grid("kl_fast", label, **fast, beta=[0.3, 0.5], merges=add_delta(f"{label} + λτ")),
        *grid("ties_fast-zero", f"{attempt}, {votes}", on_ties, **sparse, **zero),
        *grid("ties_fast-permuted", f"{attempt}, τ permuted", on_ties, **sparse, delta="permuted"),
        *grid(
            "ties_fast-largest", f"{attempt}, largest entries alone", **sparse, name="keep_largest"
        ),
        *grid(
            "ties_fast_ema-zero",
            f"Control: attempt 5, {votes}",
            on_ties,
            **averaged,
            **fast,
            **zero,
        ),
    ]


def _largest() -> list[Recipe]:
    """Lists attempt 6, which came from the controls of 4 and 5 and has no τ, and its ablation."""

    def four(group: str, label: str, scale: float = 1.0, **fields: Any) -> list[Recipe]:
        # Learning rate, β and decay of the moving average.
        settings = [(_FAST, 0.3, None), (2 * _FAST, 0.3, None)]
        settings += [(_FAST, 0.3, 0.97), (2 * _FAST, 0.5, 0.97)]
        recipes = []
        for rate, beta, ema in settings:
            own = {"learning_rate": scale * rate, "beta": beta, "ema": ema, "density": 0.1}
            recipes += grid(group, label, **own, **fields)
        return recipes

    control: dict[str, Any] = {"control": True}
    usual = control | {"beta": 0.1, "density": 0.1, "name": "keep_largest"}
    rates = {"learning_rate": _FAST_RATES, "ema": [None, 0.97]}
    # Random masks divide what they keep by p, so that their steps need no larger learning rate.
    random = control | {"scale": 0.3, "name": "child_tuning"}
    return [
        *four("largest", "Attempt 6: largest entries alone", name="keep_largest"),
        *grid("largest-beta", "Control: attempt 6 with β = 0.1", **usual, **rates),
        *four("largest-random", "Control: attempt 6, random entries", **random),
    ]


def controls(chosen: Recipe) -> list[Recipe]:
    """Makes controls of the chosen online merge, each without one of the things that make it up."""
    name, label = chosen.group, f"Control: {chosen.label}"
    powerless = dataclasses.replace(chosen.optimizer, alpha=_POWERLESS)
    left = "sign votes" if name == "on_ties" else "masks"
    found = [Recipe(f"{name}-zero", f"{label}, {left} alone (α = 0)", powerless, control=True)]
    kinds: dict[DeltaKind, str] = {
        "permuted": "τ permuted",
        "negative": "−τ",
        "random": "random direction",
    }
    for kind, words in kinds.items():
        names: dict[str, Any] = {"group": f"{name}-{kind}", "label": f"{label}, {words}"}
        found.append(dataclasses.replace(chosen, **names, delta=kind, control=True))
    return found

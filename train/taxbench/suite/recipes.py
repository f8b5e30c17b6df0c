"""A run of the benchmark: an optimizer, a loss, a delta, and the merges made of its models."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any, Literal

from train.config import AlphaOptions, OptimizerOptions

DeltaKind = Literal[
    "tau", "negative", "permuted", "random", "earlier", "low_rank", "attention", "mlp"
]

Key = tuple[str, str | None]
"""Identifies a trajectory: the fingerprint of a run, and the name of the merge made from it, if any."""


@dataclasses.dataclass(frozen=True)
class Merge:
    """Models made from those of a run after training.

    The method is one of `omerge_jax.offline_merge`, between the fine-tuned model and the run's last
    one over a grid of weights; or ``add_delta``: τ times a fixed weight, added to each of its models.
    """

    name: str  # identifier of the trajectory that it makes
    label: str  # in tables
    method: str
    density: float | None = None  # where the method drops entries
    weight: float | None = None  # λ of ``add_delta``

    def settings(self) -> str:
        """Puts its settings in words."""
        if self.method == "add_delta":
            return f"λ {self.weight:g}"
        return "w = 0.05 … 1" + ("" if self.density is None else f", p {self.density:g}")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One way to align the fine-tuned model; a control is there to judge the others by."""

    group: str  # the method; recipes of a group are its settings, among which one is chosen
    label: str  # of the group in tables
    optimizer: OptimizerOptions  # as in `python -m train dpo`
    loss: str = "sigmoid"  # or ipo, simpo, kto
    beta: float = 0.1  # strength of the loss's pull towards the reference
    delta: DeltaKind = "tau"  # what is merged, see `make_delta`
    ema: float | None = (
        None  # decay of the moving average that is scored in place of the parameters
    )
    anchor: tuple[float, str] | None = None  # rate and gate of `omerge_jax.anchored`
    lora_rank: int | None = None  # of low-rank adapters, where they alone are trained
    merges: tuple[Merge, ...] = ()  # to make of its models
    control: bool = False

    def fingerprint(self) -> str:
        """Hashes everything that its results rest on; labels are not part of it."""
        settings = dataclasses.asdict(self)
        for name in ("group", "label", "control", "merges"):
            settings.pop(name)
        text = json.dumps(settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def trajectories(self) -> list[Key]:
        """Lists the keys of the trajectories that it makes: its own, and one for each merge."""
        run = self.fingerprint()
        return [(run, None), *((run, merge.name) for merge in self.merges)]

    def settings(self, steps: int) -> str:
        """Puts its settings in words, with the total weight of the reference delta over `steps`."""
        options = self.optimizer
        words = [f"lr {options.learning_rate:g}", f"β {self.beta:g}"]
        words += _alpha_words(options.alpha, steps)
        for name in ("density", "every_k", "delta_mask", "sparsifier", "consensus", "election"):
            if (value := getattr(options, name)) is not None:
                words.append(f"{_SHORT.get(name, name)} {value}")
        if self.ema is not None:
            words.append(f"decay {self.ema:g}")
        if self.anchor is not None:
            words.append(f"anchor {self.anchor[0]:g} ({self.anchor[1]})")
        if self.lora_rank is not None:
            words.append(f"rank {self.lora_rank}")
        if self.delta != "tau":
            words.append(f"delta: {self.delta}")
        return ", ".join(words)


_SHORT = {"density": "p", "every_k": "K", "delta_mask": "masks"}


def _alpha_words(alpha: Any, steps: int) -> list[str]:
    if isinstance(alpha, AlphaOptions):
        shape = alpha.schedule.type + (" with warm-up" if alpha.schedule.warmup_steps else "")
        if alpha.gate is not None:
            shape += f", from reward accuracy {alpha.gate:g}"
        if alpha.relative is not None:
            return [f"relative α {alpha.relative:g}, {shape}"]
        return [f"α {alpha.value:g}, {shape}"]
    return [f"α {alpha:g} (α·T {alpha * steps:.2g})"] if alpha else []


def optimizer(name: str = "adamw", **fields: Any) -> OptimizerOptions:
    """Makes optimizer settings with the benchmark's usual learning rate."""
    return OptimizerOptions(**({"name": name, "learning_rate": 3e-5} | fields))

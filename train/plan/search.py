"""Looks for the settings with which a step is fastest among those that fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from train.config import DPOConfig, UserError
from train.distributed.axes import MESH_AXES
from train.models import ModelConfig
from train.plan.figures import Plan
from train.plan.measure import make_plan
from train.plan.target import Target

SHOWN = 8
"""Rows of the table."""


@dataclasses.dataclass(frozen=True)
class Tried:
    """Fields that the search chose, with their values, and the plan that they give."""

    settings: dict[str, Any]
    plan: Plan

    @property
    def order(self) -> tuple[bool, float, float]:
        """Smaller is better: what fits, by time, then by memory."""
        times = self.plan.roofline
        step = float("inf") if times is None else times.step
        return self.plan.fits is False, step, self.plan.memory.total

    def as_json(self) -> dict[str, Any]:
        """The entries of this choice in the JSON file."""
        return {"settings": self.settings, **self.plan.as_json()}


def search(config: DPOConfig, model: ModelConfig, target: Target, console: Console) -> list[Tried]:
    """Tries meshes with every remat policy, then parts of a batch and storages on the best of them.

    The second round starts from what was fastest in the first, or smallest where nothing fitted:
    trying all combinations would compile for hours. Returns what could be planned, the best first;
    raises the first `UserError` where nothing could be.
    """
    found: list[Tried] = []
    refused: list[UserError] = []
    with Progress(console=console) as progress:
        task = progress.add_task("Compiling", total=None)
        for choices in (_first_round(target), _second_round(config, found)):
            candidates = list(choices)
            progress.update(task, completed=0, total=len(candidates))
            for settings in candidates:
                progress.update(task, description=_named(settings))
                try:
                    plan = make_plan(with_settings(config, settings), model, target)
                    found.append(Tried(settings, plan))
                except UserError as error:
                    refused.append(error)
                progress.advance(task)
    if not found:
        raise refused[0]
    return sorted(found, key=lambda tried: tried.order)


def _first_round(target: Target) -> Iterator[dict[str, Any]]:
    for data, tensor in ((1, 1), (1, 2), (1, 4), (2, 1)):
        data *= target.slices
        if target.chips % (data * tensor) or data * tensor > target.chips:
            continue
        mesh = {"mesh.data": data, "mesh.fsdp": target.chips // data // tensor}
        for remat in ("none", "weight_dots", "full"):
            yield {**mesh, "mesh.tensor": tensor, "model.remat": remat}


def _second_round(config: DPOConfig, found: list[Tried]) -> Iterator[dict[str, Any]]:
    if not found:
        return
    best = min(found, key=lambda tried: tried.order).settings
    parts = config.trainer.gradient_accumulation_steps
    for more in (2, 4):
        yield {**best, "trainer.gradient_accumulation_steps": more * parts}
    optimizer = config.optimizer
    if optimizer.delta_mask == "fixed" and (optimizer.storage or "dense") == "dense":
        yield {**best, "optimizer.storage": "sparse"}
    if optimizer.alpha and optimizer.delta_dtype is None and config.model.param_dtype == "float32":
        yield {**best, "optimizer.delta_dtype": "bfloat16"}


def with_settings(config: DPOConfig, settings: dict[str, Any]) -> DPOConfig:
    """A configuration with some fields replaced, such as ``{"model.remat": "full"}``."""
    for name, value in settings.items():
        group, field = name.split(".")
        config = dataclasses.replace(
            config, **{group: dataclasses.replace(getattr(config, group), **{field: value})}
        )
    return config


def show_found(found: Iterable[Tried], console: Console) -> None:
    """Prints the best, with the flags that choose them."""
    table = Table("settings", "fits", "GB of a chip", "step at least, s", "MFU at most")
    for tried in list(found)[:SHOWN]:
        plan, times = tried.plan, tried.plan.roofline
        table.add_row(
            _named(tried.settings),
            {True: "yes", False: "no", None: "?"}[plan.fits],
            f"{plan.memory.total / 1e9:.1f}",
            "?" if times is None else f"{times.step:.3f}",
            "?" if times is None else f"{100 * times.mfu:.0f}%",
        )
    console.print(table)


def _named(settings: dict[str, Any]) -> str:
    mesh = "x".join(str(settings[f"mesh.{axis}"]) for axis in MESH_AXES)
    others = [f"{name} {value}" for name, value in settings.items() if not name.startswith("mesh.")]
    return ", ".join([f"mesh {mesh}", *others])

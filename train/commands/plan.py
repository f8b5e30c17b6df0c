"""``python -m train plan``: what a `dpo` run needs on a machine, before anyone rents it."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from train.config import PlanConfig, UserError, check_settings, flatten
from train.files.whole import check_place, write_whole
from train.losses.options import check_preference_loss
from train.models import ModelConfig
from train.optimizers.check import check_optimizer
from train.plan.advice import advice
from train.plan.figures import Plan
from train.plan.measure import make_plan, without_merge
from train.plan.program import read_shape
from train.plan.report import show
from train.plan.search import search, show_found
from train.plan.target import Target, read_target

FORMAT = "omerge_jax plan"


def plan(config: PlanConfig) -> None:
    """Plans the step of a run, prints its figures and writes them to a file.

    Raises `UserError` before anything is compiled where a field cannot be used.
    """
    # Tables are not to be folded where they go to a file.
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    check_settings(config)
    check_optimizer(config.optimizer)
    check_preference_loss(config.loss, config.trainer.gradient_accumulation_steps)
    output = None if config.output_file is None else Path(config.output_file)
    if output is not None:
        check_output(output)
    model, target = read_shape(config.model.path), read_target(config.topology)
    if config.search:
        found = search(config, model, target, console)
        show_found(found, console)
        written: dict[str, Any] = {"search": [one.as_json() for one in found]}
    else:
        written = _plan_step(config, model, target, console)
    if output is not None:
        settings = {name: value for name, value in flatten(config).items() if name != "output_file"}
        content = {"format": FORMAT, "settings": settings, **written}
        write_whole(output, json.dumps(content, indent=2, default=dataclasses.asdict))
        console.print(f"wrote {output}", soft_wrap=True)


def _plan_step(
    config: PlanConfig, model: ModelConfig, target: Target, console: Console
) -> dict[str, Any]:
    if "v6e" in target.topology:
        console.print(
            "The compiler takes about three times as long for a v6e as for a v5e: minutes for 8B."
        )
    with console.status(f"Compiling a step for {target.topology} ..."):
        merging, plain = make_plan(config, model, target), None
    inner = without_merge(config.optimizer)
    if inner is not None and merging.source != "state":
        with console.status("Compiling it without the merge, to compare ..."):
            plain = make_plan(dataclasses.replace(config, optimizer=inner), model, target)
    advised = advice(config, merging)
    show(merging, plain, advised, console)
    written = {"plan": merging.as_json(), "advice": advised}
    if plain is not None:
        written |= {"without_merge": plain.as_json(), "merge_share": merge_share(merging, plain)}
    return written


def merge_share(merging: Plan, plain: Plan) -> dict[str, float]:
    """Computes what the merge adds to the plain step, as shares of the merging one."""
    shares = {"hbm": 1 - plain.memory.total / merging.memory.total}
    if merging.work and plain.work and merging.work.hbm_bytes and plain.work.hbm_bytes:
        shares["hbm_bytes_of_a_step"] = 1 - plain.work.hbm_bytes / merging.work.hbm_bytes
    return shares


def check_output(path: Path) -> None:
    """Raises `UserError` where `path` holds something else than a plan, or cannot be written."""
    if not path.parent.is_dir():
        raise UserError(f"output_file: there is no directory {str(path.parent)!r}; make it.")
    check_place(path.parent, "output_file")
    if not path.exists():
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(
            f"output_file {str(path)!r} exists and holds no plan, so it is kept. Choose another name."
        )

"""Trained parameters as model directories in Hugging Face format."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import yaml
from flax import nnx
from rich.console import Console

from train.checkpoint import Checkpoints, restore_params
from train.config import ExportConfig, ModelOptions, UserError
from train.model_card import run_card
from train.models import merge_model, to_hf
from train.models.output_dir import check_writable
from train.output_dir import OutputDir
from train.prepare import blamed_on, check_model
from train.sharding import abstract_model


def export_run(
    output: OutputDir, options: ModelOptions, graphdef: nnx.GraphDef, params: Any, *, step: int
) -> None:
    """Writes the trained model to ``output.export`` unless it is there already.

    Args:
        output: The run's directory.
        options: The model the run started from, whose tokenizer and configuration are copied.
        graphdef: Of the model.
        params: Its final parameters.
        step: The step they are of, for the model card.
    """
    if output.export.exists():
        return  # it appears whole or not at all
    for partial in output.path.glob(f".{output.export.name}.partial-*"):
        shutil.rmtree(partial)  # left by a kill in the middle of an earlier export
    model = merge_model(graphdef, params)
    with blamed_on("export (the checkpoint is complete; the same command tries again)"):
        card = run_card(output.path, step)
        to_hf(model, output.export, like=options.path, dtype=options.export_dtype, card=card)


def run(config: ExportConfig) -> None:
    """``python -m train export``: any checkpoint of a run.

    Raises:
        UserError: no such run or checkpoint, or the output is not empty.
    """
    record = Path(config.run) / "run.json"
    if not record.is_file():
        raise UserError(f"run: {config.run!r} holds no run (there is no run.json).")
    settings = json.loads(record.read_text())["settings"]
    fields = {item.name for item in dataclasses.fields(ModelOptions)}
    model = {name: settings.get(f"model.{name}") for name in fields}
    options = ModelOptions(**model)
    dtype = _run_dtype(Path(config.run)) if config.dtype is None else config.dtype
    with blamed_on("output"):
        check_writable(Path(config.output))
    graphdef, like = abstract_model(check_model(options), None)
    checkpoints = Path(config.run) / "checkpoints"
    if not checkpoints.is_dir():
        raise UserError(f"run: {config.run!r} has no checkpoint yet.")
    with Checkpoints(checkpoints, read_only=True) as saved:
        step = saved.latest() if config.step is None else config.step
        if step is None or step not in saved.steps():
            found = ", ".join(map(str, saved.steps())) or "none"
            raise UserError(f"step: no checkpoint {step} in {config.run!r}; there are {found}.")
        damage = saved.damage(step)
        if damage is not None:
            raise UserError(
                f"step: checkpoint {step} in {config.run!r} is damaged ({damage}). Give another one: "
                f"there are {', '.join(map(str, saved.steps()))}."
            )
    params = restore_params(checkpoints, step, like)
    card = run_card(config.run, step)
    with blamed_on("output"):
        model = merge_model(graphdef, params)
        to_hf(model, config.output, like=options.path, dtype=dtype, card=card)
    Console().print(f"Step {step} written to {config.output}", highlight=False)


def _run_dtype(directory: Path) -> str | None:
    """The run's own `model.export_dtype`; run.json leaves out what a resumed run may change."""
    file = directory / "config.yaml"
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))["model"]["export_dtype"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(
            f"run: model.export_dtype cannot be read from {str(file)!r} ({error}); give dtype."
        ) from error

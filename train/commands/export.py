"""``python -m train export``: any checkpoint of a run as a model directory."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import yaml
from rich.console import Console

from train.config import ExportConfig, LoraOptions, ModelOptions, UserError, check_settings
from train.files.model_card import run_card
from train.files.whole import check_absent_or_empty
from train.inputs.model import blamed_on, check_model, hash_model
from train.models import from_hf, split_model
from train.models.abstract import abstract_model
from train.models.trainable import choose, join, leaf_paths, split
from train.runs.export import write_model
from train.training.checkpoint import Checkpoints, restore_params


def export_checkpoint(config: ExportConfig) -> None:
    """Writes the model of any checkpoint of a run.

    Raises `UserError` where there is no such run or checkpoint, or the output is not empty.
    """
    check_settings(config)
    record = Path(config.run) / "run.json"
    if not record.is_file():
        raise UserError(f"run: {config.run!r} holds no run (there is no run.json).")
    settings = json.loads(record.read_text())["settings"]
    options = _model_options(settings)
    dtype = _run_dtype(Path(config.run)) if config.dtype is None else config.dtype
    with blamed_on("output"):
        check_absent_or_empty(Path(config.output))
    model = check_model(options)
    shapes = abstract_model(model, None)[1]
    like, rest = split(shapes, choose(options, leaf_paths(shapes)))
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
    params = restore_params(checkpoints, step, *_restored(settings, like))
    if rest:
        params = join(params, _frozen(options, rest, record))
    with blamed_on("output"):
        card = run_card(Path(config.run), Path(config.output).name, step)
        write_model(params, model, Path(config.output), options, dtype, card)
    Console().print(f"Step {step} written to {config.output}", highlight=False)


def _model_options(settings: dict[str, Any]) -> ModelOptions:
    """Returns the model's settings, which a run records under dotted names.

    Its attention may need another machine, and an export does not compute it, so it is xla here.
    """

    def given(prefix: str, kind: type[ModelOptions | LoraOptions]) -> dict[str, Any]:
        names = {f"{prefix}.{item.name}": item.name for item in dataclasses.fields(kind)}
        return {name: settings[key] for key, name in names.items() if key in settings}

    lora = given("model.lora", LoraOptions)
    parts = {"attention": "xla", "lora": LoraOptions(**lora) if lora else None}
    return ModelOptions(**given("model", ModelOptions) | parts)


def _restored(settings: dict[str, Any], params: Any) -> tuple[Any, str]:
    """Returns shapes and name of what a checkpoint holds of the weights to export."""
    if not settings.get("trainer.ema.export"):
        return params, "params"
    return jax.tree.map(lambda leaf: leaf.update(dtype=jnp.float32), params), "ema"


def _frozen(options: ModelOptions, rest: Any, record: Path) -> Any:
    """Reads the parameters that were not trained from the model that the run started from."""
    expected = json.loads(record.read_text())["inputs"]["model"]
    if hash_model(options.path) != expected:
        raise UserError(
            f"model.path {options.path!r} of the run has other content than when it was trained; the "
            "parameters that were frozen cannot be exported without it."
        )
    loaded = split_model(
        from_hf(options.path, dtype=options.dtype, param_dtype=options.param_dtype)
    )[1]
    paths = set(leaf_paths(rest))
    return split(loaded, lambda path: path in paths)[0]


def _run_dtype(directory: Path) -> str | None:
    """Reads the run's own `model.export_dtype`; run.json leaves out what a resumed run may change."""
    file = directory / "config.yaml"
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))["model"]["export_dtype"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(
            f"run: model.export_dtype cannot be read from {str(file)!r} ({error}); give dtype."
        ) from error

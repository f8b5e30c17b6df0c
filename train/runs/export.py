"""Trained parameters as model directories in Hugging Face format."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import yaml
from rich.console import Console

from train.config import (
    ExportConfig,
    LoraOptions,
    ModelOptions,
    TrainerOptions,
    UserError,
    check_settings,
)
from train.distributed.mesh import abstract_model
from train.distributed.processes import first_says, is_first
from train.files.model_card import run_card
from train.files.run_directory import OutputDir
from train.files.whole import check_writable
from train.inputs.model import blamed_on, check_model, hash_model
from train.models import ModelConfig, from_hf, merge_model, split_model, to_hf
from train.models.lora import merge_adapters, without_adapters, write_adapters
from train.models.trainable import choose, join, leaf_paths, split
from train.training.checkpoint import Checkpoints, restore_params


def exported_weights(trainer: TrainerOptions) -> str:
    """Name in the training state of the weights that are exported."""
    return "ema" if trainer.ema is not None and trainer.ema.export else "params"


def export_run(
    output: OutputDir, options: ModelOptions, model: ModelConfig, params: Any, step: int
) -> None:
    """Writes the trained model to ``output.export`` unless it is there already.

    The adapters of a model that has some are written beside it first, in PEFT's format. On several
    processes all must call this, and the first one writes.

    Args:
        output: The run's directory.
        options: The model the run started from, whose tokenizer and configuration are copied.
        model: Its configuration, with adapters if it has some.
        params: All its parameters, trained or not.
        step: Step that they are of, for the metrics of the model card.
    """
    adapter = output.path / "adapter"
    for path in (output.export, adapter) if is_first() else ():
        for partial in output.path.glob(f".{path.name}.partial-*"):
            shutil.rmtree(partial)  # left by a kill in the middle of an earlier export
    with blamed_on("export (the checkpoint is complete; the same command tries again)"):
        if model.lora_targets and first_says(not adapter.exists()):
            write_adapters(params, model, adapter, options.path)
        if first_says(not output.export.exists()):  # it appears whole or not at all
            card = run_card(output.path, output.path.name, step) if is_first() else None
            _write(params, model, output.export, options, options.export_dtype, card)


def _write(
    params: Any, model: ModelConfig, out: Path, options: ModelOptions, dtype: Any, card: str | None
) -> None:
    """Writes a model directory, adapters merged in."""
    if model.lora_targets:
        params = merge_adapters(params, model.lora_scale)
    graphdef, shapes = abstract_model(without_adapters(model), None)
    params = jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), params, shapes)
    to_hf(merge_model(graphdef, params), out, like=options.path, dtype=dtype, card=card)


def run(config: ExportConfig) -> None:
    """``python -m train export``: any checkpoint of a run.

    Raises:
        UserError: no such run or checkpoint, or the output is not empty.
    """
    check_settings(config)
    record = Path(config.run) / "run.json"
    if not record.is_file():
        raise UserError(f"run: {config.run!r} holds no run (there is no run.json).")
    settings = json.loads(record.read_text())["settings"]
    options = _model_options(settings)
    dtype = _run_dtype(Path(config.run)) if config.dtype is None else config.dtype
    with blamed_on("output"):
        check_writable(Path(config.output))
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
        _write(params, model, Path(config.output), options, dtype, card)
    Console().print(f"Step {step} written to {config.output}", highlight=False)


def _model_options(settings: dict[str, Any]) -> ModelOptions:
    """The model's settings as a run recorded them, dotted names and all.

    All but its attention, which an export does not compute, and which may need another machine.
    """
    fields = {item.name for item in dataclasses.fields(ModelOptions)} - {"lora"}
    given = {name: settings[f"model.{name}"] for name in fields if f"model.{name}" in settings}
    lora = {
        item.name: settings[f"model.lora.{item.name}"]
        for item in dataclasses.fields(LoraOptions)
        if f"model.lora.{item.name}" in settings
    }
    given["attention"] = "xla"
    return ModelOptions(**given, lora=LoraOptions(**lora) if lora else None)


def _restored(settings: dict[str, Any], params: Any) -> tuple[Any, str]:
    """Shapes and name of what a checkpoint holds of the weights to export."""
    if not settings.get("trainer.ema.export"):
        return params, "params"

    def wide(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, jnp.float32, sharding=leaf.sharding)

    return jax.tree.map(wide, params), "ema"


def _frozen(options: ModelOptions, rest: Any, record: Path) -> Any:
    """What was not trained, from the model that the run started from."""
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
    """The run's own `model.export_dtype`; run.json leaves out what a resumed run may change."""
    file = directory / "config.yaml"
    try:
        return yaml.safe_load(file.read_text(encoding="utf-8"))["model"]["export_dtype"]
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(
            f"run: model.export_dtype cannot be read from {str(file)!r} ({error}); give dtype."
        ) from error

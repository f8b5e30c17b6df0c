"""Writes the trained model of a run as a directory in Hugging Face format."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax

from train.config import ModelOptions
from train.distributed.processes import from_first, is_first
from train.files.model_card import run_card
from train.files.run_directory import OutputDir
from train.inputs.model import blamed_on
from train.models import ModelConfig, merge_model, to_hf
from train.models.abstract import abstract_model
from train.models.lora import merge_adapters, without_adapters, write_adapters


def export_run(
    output: OutputDir, options: ModelOptions, model: ModelConfig, params: Any, step: int
) -> None:
    """Writes the trained model to ``output.export`` unless it is there already.

    The adapters of a model that has some are written beside it first, in PEFT's format. On several
    processes all must call this, and the first one writes. The tokenizer and the configuration are
    copied from the model of `options`, which the run started from. `params` are all parameters, trained
    or not, and `step` is theirs, for the metrics of the model card.
    """
    adapter = output.path / "adapter"
    for path in (output.export, adapter) if is_first() else ():
        for partial in output.path.glob(f".{path.name}.partial-*"):
            shutil.rmtree(partial)  # left by a kill in the middle of an earlier export
    with blamed_on("export (the checkpoint is complete; the same command tries again)"):
        if model.lora_targets and from_first(not adapter.exists()):
            write_adapters(params, model, adapter, options.path)
        if from_first(not output.export.exists()):  # it appears whole or not at all
            card = run_card(output.path, output.path.name, step) if is_first() else None
            write_model(params, model, output.export, options, options.export_dtype, card)


def write_model(
    params: Any, model: ModelConfig, out: Path, options: ModelOptions, dtype: Any, card: str | None
) -> None:
    """Writes a model directory with its adapters merged in, and `card` as its README."""
    if model.lora_targets:
        params = merge_adapters(params, model.lora_scale)
    graphdef, shapes = abstract_model(without_adapters(model), None)
    params = jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), params, shapes)
    to_hf(merge_model(graphdef, params), out, like=options.path, dtype=dtype, card=card)

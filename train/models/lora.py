"""Low-rank adapters: fresh ones, PEFT's files, and their merge into the matrices they adapt."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from train.distributed.processes import fetch, is_first
from train.files.whole import whole_directory
from train.models.config import ModelConfig
from train.models.decoder import Decoder, split_model
from train.models.hf_names import decoder_leaves
from train.types import Params

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
# Settings of PEFT that change what an adapter computes, with the values under which ours is the same.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
}


def is_adapter(path: tuple[str, ...]) -> bool:
    """Whether a parameter belongs to an adapter."""
    return path[-1] in ("lora_a", "lora_b")


def without_adapters(config: ModelConfig) -> ModelConfig:
    """The configuration of the model into which adapters are merged."""
    return dataclasses.replace(config, lora_targets=(), lora_rank=0, lora_scale=1.0)


def fresh_adapters(config: ModelConfig, seed: int) -> Params:
    """New adapters: A uniform within 1/√inputs as in PEFT, B zero, so that they add nothing yet.

    The nested dict has ``lora_a`` ``[layers, inputs, rank]`` and ``lora_b`` ``[layers, rank,
    outputs]`` at every adapted layer.
    """

    @jax.jit
    def draw() -> Params:
        # What is not returned is not computed.
        flat = flatten_dict(split_model(Decoder(config, nnx.Rngs(seed)))[1])
        return unflatten_dict({path: leaf for path, leaf in flat.items() if is_adapter(path)})

    return draw()


def merge_adapters(params: Params, scale: float) -> Params:
    """The tree without adapters, with ``scale · A B`` of each added to its kernel in float32.

    Dtypes are kept.
    """
    flat: Any = flatten_dict(params)
    merged = {path: leaf for path, leaf in flat.items() if not is_adapter(path)}
    for (*layer, name), a in flat.items():
        if name == "lora_a":
            b, kernel = flat[(*layer, "lora_b")], flat[(*layer, "kernel")]
            a, b, wide = (leaf.astype(jnp.float32) for leaf in (a, b, kernel))
            # W' = W + scale · A B (Hu et al. 2021, section 4.1)
            product = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
            merged[(*layer, "kernel")] = (wide + scale * product).astype(kernel.dtype)
    return unflatten_dict(merged)


def read_adapter_config(directory: str | Path) -> tuple[int, float, tuple[str, ...]]:
    """Rank, scale and target modules of an adapter in PEFT's format.

    Raises:
        FileNotFoundError: there is no adapter_config.json.
        ValueError: it is damaged or asks for something other than plain LoRA on linear layers.
    """
    file = Path(directory) / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{str(directory)!r} has no {CONFIG_FILE}.")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        rank, alpha = int(found["r"]), float(found["lora_alpha"])
        targets = found["target_modules"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} cannot be read as PEFT's settings ({error!r}).") from error
    for name, plain in _PLAIN.items():
        if name in found and found[name] not in plain:
            raise ValueError(f"{file}: {name} is {found[name]!r}; supported is {plain[0]!r}.")
    if not isinstance(targets, list) or not set(targets) <= set(TARGETS):
        raise ValueError(
            f"{file}: target_modules is {targets!r}; supported are lists of {', '.join(TARGETS)}."
        )
    scale = alpha / rank**0.5 if found.get("use_rslora") else alpha / rank
    return rank, scale, tuple(name for name in TARGETS if name in targets)


def read_adapters(directory: str | Path, config: ModelConfig) -> Params:
    """A directory's adapters, like `fresh_adapters`, on the host, in ``config.param_dtype``.

    Raises `FileNotFoundError` without PEFT's file, and one `ValueError` that lists the tensors that
    are missing, unexpected or of another shape.
    """
    file = Path(directory) / WEIGHTS_FILE
    if not file.is_file():
        raise FileNotFoundError(f"{str(directory)!r} has no {WEIGHTS_FILE}.")
    try:
        stored = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}).") from error
    adapters, wrong, expected = {}, [], set()
    for path, names, shape in _tensors(config):
        expected |= set(names)
        hf_shape = shape[:0:-1]
        wrong += [
            f"{name} is {'missing' if name not in stored else stored[name].shape}, not {hf_shape}"
            for name in names
            if name not in stored or stored[name].shape != hf_shape
        ]
        if not wrong:
            stacked = np.stack([stored[name].T for name in names])
            adapters[path] = stacked.astype(config.param_dtype)
    wrong += [f"{name} is unexpected" for name in sorted(stored.keys() - expected)]
    if wrong:
        raise ValueError(f"{file}: {'; '.join(wrong[:8])} ({len(wrong)} in all).")
    return unflatten_dict(adapters)


def write_adapters(params: Params, config: ModelConfig, directory: Path, base: str) -> None:
    """Writes adapters so that ``peft.PeftModel.from_pretrained`` loads them; all or nothing.

    On several processes all must call this, and the first one writes.
    """
    tensors, flat = {}, flatten_dict(params)
    for path, names, _ in _tensors(config):
        for name, values in zip(names, fetch(flat[path]), strict=True):
            tensors[name] = np.ascontiguousarray(values.T)
    if not is_first():
        return
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": config.lora_rank,
        "lora_alpha": config.lora_scale * config.lora_rank,
        "lora_dropout": 0.0,
        "target_modules": list(config.lora_targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    with whole_directory(directory) as partial:
        save_file(tensors, partial / WEIGHTS_FILE, metadata={"format": "pt"})
        (partial / WEIGHTS_FILE).chmod(partial.stat().st_mode & 0o666)
        text = json.dumps(settings, indent=2) + "\n"
        (partial / CONFIG_FILE).write_text(text, encoding="utf-8")


def _tensors(
    config: ModelConfig,
) -> Iterator[tuple[tuple[str, ...], list[str], tuple[int, ...]]]:
    """Path, PEFT's tensor names by layer and stacked shape of every adapter matrix."""
    for path, leaf in decoder_leaves(config).items():
        if is_adapter(path):
            inner, kind = ".".join(path[1:-1]), path[-1].upper().replace("LORA", "lora")
            stem = "base_model.model.model.layers"
            names = [f"{stem}.{i}.{inner}.{kind}.weight" for i in range(config.num_layers)]
            yield path, names, leaf.shape

"""Checks models, and reads their tokenizers and content hashes, before any weight is loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from train.config import LoraOptions, ModelOptions, UserError
from train.files.checksums import hash_file
from train.models import ModelConfig, check_hf_compatible, resolve_model_dir
from train.models.attention import check_attention
from train.models.lora import CONFIG_FILE, TARGETS, WEIGHTS_FILE, read_adapter_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@contextlib.contextmanager
def blamed_on(name: str) -> Iterator[None]:
    """Turns errors about what a field points to into a `UserError` that names the field."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, OSError, ImportError) as error:
        raise UserError(f"{name}: {error}") from error


def check_model(options: ModelOptions, name: str = "model.path") -> ModelConfig:
    """The configuration of a model, after a look at config.json and the headers of its weights.

    Raises `UserError` with the field `name` where something is missing, damaged or not supported.
    """
    with blamed_on(name):
        config = check_hf_compatible(options.path)
    return with_settings(config, options)


def with_settings(config: ModelConfig, options: ModelOptions) -> ModelConfig:
    """The configuration of a model as a run uses it: types, programs and adapters.

    Raises `UserError` where its attention cannot run on this machine, or the adapters do not fit.
    """
    config = with_types(config, options)
    with blamed_on("model"):
        check_attention(config)
    return config if options.lora is None else with_adapters(config, options.lora)


def with_types(config: ModelConfig, options: ModelOptions) -> ModelConfig:
    """The configuration of a model with the types and programs that the settings choose."""
    return dataclasses.replace(
        config,
        dtype=options.dtype,
        param_dtype=options.param_dtype,
        remat=options.remat,
        attention=options.attention,
    )


def with_adapters(config: ModelConfig, options: LoraOptions) -> ModelConfig:
    """The configuration of the model with adapters.

    Raises `UserError` where a module is unknown, or `lora.adapter` is of another shape or damaged.
    """
    name = "model.lora.target_modules"
    unknown = [module for module in options.target_modules if module not in TARGETS]
    if unknown or not options.target_modules:
        found = repr(unknown[0]) if unknown else "nothing"
        raise UserError(f"{name}: got {found}; choose from {', '.join(TARGETS)}.")
    targets = tuple(module for module in TARGETS if module in options.target_modules)
    scale = options.alpha / options.rank
    if options.adapter is not None:
        with blamed_on("model.lora.adapter"):
            found = read_adapter_config(options.adapter)
        if found != (options.rank, scale, targets):
            raise UserError(
                f"model.lora.adapter has rank {found[0]}, alpha / rank {found[1]:g} and the modules "
                f"{', '.join(found[2])}; give model.lora.rank {found[0]}, alpha "
                f"{found[1] * found[0]:g} and these target_modules."
            )
    return dataclasses.replace(
        config, lora_targets=targets, lora_rank=options.rank, lora_scale=scale
    )


def check_related(path: str, model: str, name: str) -> None:
    """Checks that another model, such as the base, has the parameters and tokens of `model`.

    Raises `UserError` with the field `name` and what differs, or what is missing or damaged.
    """
    with blamed_on(name):
        check_hf_compatible(path, same_shapes_as=model)
    theirs, ours = (load_tokenizer(one, name).get_vocab() for one in (path, model))
    differing = sorted(t for t in {*ours, *theirs} if ours.get(t) != theirs.get(t))
    if differing:
        token = differing[0]
        raise UserError(
            f"{name}: its tokenizer differs from that of {model} in {len(differing)} tokens, for "
            f"example {token!r}: id {theirs.get(token)} and {ours.get(token)}."
        )


def load_tokenizer(path: str, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory or hub name. Raises `UserError`, naming the field `name`."""
    from transformers import AutoTokenizer

    with blamed_on(name):
        return AutoTokenizer.from_pretrained(resolve_model_dir(path))


def hash_model(path: str) -> str:
    """SHA-256 of a model's configuration and weights, as stored."""
    directory = resolve_model_dir(path)
    digest = hashlib.sha256()
    for file in [directory / "config.json", *sorted(directory.glob("*.safetensors"))]:
        digest.update(file.name.encode() + hash_file(file).encode())
    return digest.hexdigest()


def hash_adapter(directory: str) -> str:
    """SHA-256 of an adapter's settings and weights, as stored."""
    digest = hashlib.sha256()
    with blamed_on("model.lora.adapter"):
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            digest.update(hash_file(Path(directory) / name).encode())
    return digest.hexdigest()

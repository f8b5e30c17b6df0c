"""Finds a model directory, locally or on the hub, and reads its small JSON files."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from train.config import UserError

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "tokenizer.model", "merges.txt", "vocab.txt"]


def resolve_model_dir(path_or_hub_name: str | Path) -> Path:
    """A local directory for a path, or for a hub name after downloading what is needed of it.

    Raises `FileNotFoundError` for neither an existing directory nor a repository that could be
    fetched, and `NotADirectoryError` for a file.
    """
    path = Path(path_or_hub_name)
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{path} is a file; give the directory that holds config.json")
    name = str(path_or_hub_name)
    if not _HUB_NAME.fullmatch(name):
        raise FileNotFoundError(f"{name} is not an existing directory (nor a hub name 'org/name')")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES, ignore_patterns="*/*"))
    except Exception as error:  # hub, HTTP and socket errors have no common ancestor
        raise FileNotFoundError(
            f"{name} is not an existing directory, and downloading a hub repository of that name "
            f"failed: {type(error).__name__}: {error}"
        ) from error


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a model directory.

    Raises `FileNotFoundError` without one and `ValueError` if it is not a JSON object.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} does not exist; a Hugging Face model directory holds config.json beside its "
            "safetensors files"
        )
    try:
        parsed = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{file} holds a {type(parsed).__name__}, not an object")
    return parsed


def end_tokens(model: str, tokenizer: Any) -> list[int]:
    """The tokenizer's EOS and those of the model's generation_config.json, sorted; [-1] without any.

    Raises `UserError` if the file is no JSON object, or its ``eos_token_id`` no token ids.
    """
    ends = {tokenizer.eos_token_id} - {None}
    file = resolve_model_dir(model) / "generation_config.json"
    if not file.is_file():
        return sorted(ends) or [-1]  # only the length ends a row
    try:
        more = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
        more = [] if more is None else more if isinstance(more, list) else [more]
        return sorted(ends | {int(one) for one in more}) or [-1]
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"model: {file} has no usable eos_token_id ({error}).") from error

"""Checks before models are merged: networks, tied embeddings, room on the disk."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from train.config import UserError
from train.models import ModelConfig
from train.models.config import FREE_FIELDS
from train.models.hf_names import EMBEDDING, LM_HEAD
from train.models.safetensors_dir import SafetensorsDir

_COMPARED = ("architectures", "tie_word_embeddings")


def network_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Says where the networks of two ``config.json`` differ, such as in rotary frequencies.

    Weights of equal shapes may belong to networks that read them differently; a merge of those is
    noise. Returns one text a field, such as ``"rope_theta is 10000.0 and 500000.0"``, theirs first.
    Where the decoder does not know the architecture, only the fields in `_COMPARED` are compared.
    """
    left, right, fields = dict(ours), dict(theirs), list(_COMPARED)
    with contextlib.suppress(ValueError):
        known = [vars(ModelConfig.from_hf(config)) for config in (left, right)]
        left, right = left | known[0], right | known[1]
        fields = ["architectures", *(name for name in known[0] if name not in FREE_FIELDS)]
    return [
        f"{name} is {right.get(name)!r} and {left.get(name)!r}"
        for name in fields
        if left.get(name) != right.get(name)
    ]


def check_tied(weights: SafetensorsDir, field: str) -> None:
    """Raises `UserError` where a tied output matrix, which a merge replaces, is not the embedding."""
    stored = {EMBEDDING, LM_HEAD} <= weights.entries.keys()
    if stored and not np.array_equal(weights.read(LM_HEAD), weights.read(EMBEDDING)):
        raise UserError(
            f"{field}: config.json has tie_word_embeddings true, but {LM_HEAD} differs from "
            f"{EMBEDDING}; set tie_word_embeddings to false to merge both."
        )


def check_room(base: SafetensorsDir, output: Path, dtype: str | None) -> None:
    """Raises `UserError` where the merged tensors do not fit on the disk."""
    needed = 0
    for entry in base.entries.values():
        # A tensor of integers is copied; each number has 8 bytes at most.
        width = 8 if entry.dtype is None else np.dtype(dtype or entry.dtype).itemsize
        needed += width * math.prod(entry.shape)
    place = output.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"output: the result has {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free in "
            f"{str(place)!r}. Make room, choose another place, or a narrower dtype."
        )

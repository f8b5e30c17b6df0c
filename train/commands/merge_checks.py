"""What must hold before models are merged, beyond the names and shapes of their tensors."""

from __future__ import annotations

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

_COMPARED = ("architectures", "tie_word_embeddings")  # of architectures that the decoder lacks


def network_differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """What the networks of two ``config.json`` differ in, such as rotary frequencies.

    Weights of equal shapes may belong to networks that read them differently; a merge of those is
    noise.

    Returns:
        One text a field, ``"rope_theta is 10000.0 and 500000.0"``, theirs first. Of architectures that
        the decoder does not know only the architecture and the tied embedding are compared.
    """
    fields = list(_COMPARED)
    values = [dict(ours), dict(theirs)]
    try:
        known = [vars(ModelConfig.from_hf(config)) for config in values]
    except ValueError:
        pass
    else:
        values = [{**read, **config} for read, config in zip(values, known, strict=True)]
        fields = ["architectures", *(name for name in known[0] if name not in FREE_FIELDS)]
    left, right = values
    return [
        f"{name} is {right.get(name)!r} and {left.get(name)!r}"
        for name in fields
        if left.get(name) != right.get(name)
    ]


def check_tied(weights: SafetensorsDir, field: str) -> None:
    """Checks a stored copy of a tied output matrix, which a merge replaces by the embedding.

    Raises:
        UserError: it is not a copy.
    """
    stored = {EMBEDDING, LM_HEAD} <= weights.entries.keys()
    if stored and not np.array_equal(weights.read(LM_HEAD), weights.read(EMBEDDING)):
        raise UserError(
            f"{field}: config.json has tie_word_embeddings true, but {LM_HEAD} differs from "
            f"{EMBEDDING}; set tie_word_embeddings to false to merge both."
        )


def check_room(base: SafetensorsDir, output: Path, dtype: str | None) -> None:
    """Checks that the merged tensors fit on the disk.

    Raises:
        UserError: they do not; says how large they are and how much is free.
    """
    needed = 0
    for entry in base.entries.values():
        count = int(np.prod(entry.shape, dtype=np.int64))
        # Tensors that are no floating-point numbers are copied; 8 bytes is the most they take.
        width = 8 if entry.dtype is None else np.dtype(dtype or entry.dtype).itemsize
        needed += count * width
    place = output.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"output: the result has {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free in "
            f"{str(place)!r}. Make room, choose another place, or a narrower dtype."
        )

"""``python -m train merge``: offline merges of Hugging Face directories, tensor by tensor."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from rich.console import Console
from rich.progress import Progress

import omerge_jax as om
from train.config import MergeConfig, UserError, require
from train.mergeable import Mergeable, check_mergeable, open_mergeable
from train.model_card import merge_card
from train.models.hf_export import cast_checked, copy_companions, save_tensors
from train.models.hf_names import EMBEDDING, LM_HEAD
from train.models.output_dir import check_writable, written_whole
from train.output_dir import check_place
from train.prepare import blamed_on

MERGE_FILE = "merge.yaml"
_PASSED_ON = ("normalize", "rescale", "election", "epsilon", "gamma", "scale", "t", "seed")


def run(config: MergeConfig) -> Path:
    """Merges models into a directory that transformers, vLLM and ``python -m train`` load.

    What `omerge_jax.offline_merge` gives for the tree ``{tensor name: tensor}`` is written, one
    tensor at a time: weights as PyTorch has them, ``[out, in]``, so that the rows of della are
    mergekit's. A tied output layer that is stored as a copy is merged once, with the embedding.
    Integer and boolean tensors, and rotary frequencies of old versions, are the base's. Models of any
    architecture are merged whose tensors have the same names and shapes.

    Memory: one shard (``max_shard_size``), and for the tensor that is being merged each model's copy
    as stored, plus up to about ``2·n + 5`` times its size in float32 for n models. For two models,
    the peaks beyond the copies were 2 times the tensor (linear), 3 (slerp), 5 (dare_ties), 6
    (breadcrumbs), 7.5 (ties) and 9 (della). The largest tensor is the embedding, as a rule.

    Returns:
        The output directory, which also holds the settings as ``merge.yaml``, ready for
        ``--config``, and a model card.

    Raises:
        UserError: something given cannot be used, before weights are read; or a value of the result
            is beyond the range of ``dtype``.
    """
    console, out = Console(), Path(config.output)
    settings = merge_settings(config)
    require(config.max_shard_size > 0, "max_shard_size", config.max_shard_size, "positive")
    with blamed_on("output"):
        check_writable(out)
    check_place(out, "output")
    models = [open_mergeable(m.path, f"models[{i}].path") for i, m in enumerate(config.models)]
    origin = models[0] if config.base is None else open_mergeable(config.base, "base")
    like = models[0] if config.like is None else open_mergeable(config.like, "like")
    for other in (*models, like):
        if other.directory != origin.directory:
            check_mergeable(origin, other)
    _check_room(origin, out, config.dtype)
    with blamed_on("output"), written_whole(out) as partial, Progress(console=console) as bar:
        merged = _merged(origin, models, settings, config.dtype)
        total = len(origin.weights.entries)
        save_tensors(
            iter(bar.track(merged, total=total, description=config.method)),
            partial,
            config.max_shard_size,
        )
        copy_companions(like.directory, partial, config.dtype or origin.widest)
        text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
        (partial / MERGE_FILE).write_text(text, encoding="utf-8")
        (partial / "README.md").write_text(merge_card(config, out.name), encoding="utf-8")
    console.print(f"Merged into {out}", highlight=False, soft_wrap=True)
    return out


def merge_settings(config: MergeConfig) -> dict[str, Any]:
    """The keyword arguments of `omerge_jax.offline_merge` that the settings stand for.

    Raises:
        UserError: they do not fit the method, or each other; names the field.
    """
    count = len(config.models)
    require(count > 0, "models", config.models, "at least one model")
    if (config.base is None) != (config.method == "linear"):
        wanted = "needs base" if config.base is None else "does not use base; leave it out"
        raise UserError(f"base: method {config.method} {wanted}.")
    settings: dict[str, Any] = {"method": config.method}
    weights = [model.weight for model in config.models]
    if any(weight is not None for weight in weights):
        missing = [i for i, weight in enumerate(weights) if weight is None]
        if missing:
            raise UserError(f"models[{missing[0]}].weight is not set, but others are.")
        settings["weights"] = weights
    elif config.method != "slerp":
        raise UserError(f"models[0].weight is not set; method {config.method} needs weights.")
    densities = [model.density for model in config.models]
    if any(density is not None for density in densities):
        settings["density"] = [1.0 if density is None else density for density in densities]
    for name in _PASSED_ON:
        if (value := getattr(config, name)) is not None:
            settings[name] = value
    # The library checks them itself, before it looks at what is to be merged.
    nothing = {"x": jnp.zeros((2, 2))}
    with blamed_on("merge"):
        om.offline_merge(nothing, [nothing] * count, **settings)
    return settings


def _merged(
    origin: Mergeable, models: Sequence[Mergeable], settings: dict[str, Any], dtype: str | None
) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the result, in the order of the origin's."""
    for name in origin.weights.entries:
        if name not in origin.merged:
            if name != LM_HEAD or not origin.ties:
                yield name, origin.weights.read(name)
            continue
        own = origin.weights.read(name)
        wanted = own.dtype if dtype is None else np.dtype(dtype)
        # In float32 the result is rounded once, to what is written.
        base = {name: jnp.asarray(own, jnp.float32)}
        theirs = [{name: jnp.asarray(model.weights.read(name))} for model in models]
        result = jax.device_get(om.offline_merge(base, theirs, **settings)[name])
        values = cast_checked(name, result, wanted)
        yield name, values
        if name == EMBEDDING and origin.ties and LM_HEAD in origin.weights.entries:
            yield LM_HEAD, values


def _check_room(origin: Mergeable, out: Path, dtype: str | None) -> None:
    """Raises `UserError` where the result does not fit on the disk."""
    needed = sum(
        int(np.prod(entry.shape, dtype=np.int64))
        * (
            np.dtype(dtype) if dtype and name in origin.merged else entry.dtype or np.dtype("int64")
        ).itemsize
        for name, entry in origin.weights.entries.items()
    )
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"output: the result has {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free in "
            f"{str(place)!r}. Make room, choose another place, or a narrower dtype."
        )

"""``python -m train merge``: offline merges of model directories, one tensor at a time.

The memory holds the merged tensors of one output file (`max_shard_size`) and, of the tensor that is
being merged, a float32 copy for the base and for each model, the method's temporaries and the result.
On a CPU these took, for two models, 2 times the tensor in float32 (linear), 5 (dare_ties), 6
(breadcrumbs), 7.5 (ties) and 9 (della), for four models 12 (ties), and for the base and one model 3
(slerp). The files that are read are memory-mapped. A model is never held as a whole.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

import omerge_jax as om
from train.commands.merge_checks import check_room, check_tied, network_differences
from train.config import MergeConfig, UserError, check_settings
from train.files.model_card import merge_card
from train.files.whole import check_absent_or_empty, check_place, remove_remains
from train.inputs.model import blamed_on, load_tokenizer
from train.models.hf_export import cast_checked, write_model_dir
from train.models.hf_names import EMBEDDING, LM_HEAD, is_derived
from train.models.model_dir import read_hf_config, resolve_model_dir
from train.models.safetensors_dir import SafetensorsDir

_PER_MODEL = {"density": 1.0, "epsilon": 0.15, "gamma": 0.01}
"""Settings that each model may have of its own, with the value where only others have one."""
_NUMBERS = ("scale", "normalize", "rescale", "election", "t", "seed")
_INTEGERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL")


def merge_models(config: MergeConfig) -> Path:
    """Merges the models and writes the result as a Hugging Face directory.

    Tensors that are the same in all models, those that are no floating-point numbers, and rotary
    frequencies saved by old versions are copied bit for bit. Where the configuration ties the output
    matrix to the embedding, both are merged once. Returns the directory. Raises `UserError` before a
    weight is read where the method does not take or lacks settings, or models do not belong together.
    """
    output = Path(config.output)
    with blamed_on("output"):
        check_absent_or_empty(output)
    check_place(output, "output")
    settings = merge_settings(config)
    sources = _open_sources(config)
    base, *models = [weights for _, weights, _ in sources]
    tied = bool(sources[0][2].get("tie_word_embeddings", False))
    names = _checked_names(sources, tied)
    remove_remains(output)
    check_room(base, output, config.dtype)
    tensors = _tied(_merged(config, settings, base, models, names), base, tied)
    dtype, card = config.dtype or _dtype_name(base), merge_card(output.name, config)
    with blamed_on("output"), Progress() as progress:
        shown = progress.track(tensors, total=len(base.entries), description="merge")
        write_model_dir(output, shown, models[0].directory, dtype, config.max_shard_size, card)
    Console().print(f"Merged model written to {output}", highlight=False, soft_wrap=True)
    return output


def merge_settings(config: MergeConfig) -> dict[str, Any]:
    """Returns the keyword arguments of `omerge_jax.offline_merge` for a configuration.

    Raises `UserError` where the method refuses them, a weight is missing, or there is no base.
    """
    check_settings(config)
    if not config.models:
        raise UserError("models is empty; give the models to merge.")
    if config.base is None and config.method != "linear":
        raise UserError(f"base: method {config.method} takes deltas from it; give its directory.")
    settings: dict[str, Any] = {"method": config.method}
    weights = [one.weight for one in config.models]
    if any(weight is not None for weight in weights):
        missing = [one.path for one in config.models if one.weight is None]
        if missing:
            raise UserError(f"models: {missing[0]!r} has no weight, but others do; give it one.")
        settings["weights"] = weights
    for name, default in _PER_MODEL.items():
        values = [getattr(one, name) for one in config.models]
        if any(value is not None for value in values):
            settings[name] = [default if value is None else value for value in values]
    settings |= {n: getattr(config, n) for n in _NUMBERS if getattr(config, n) is not None}
    try:  # the method itself checks all settings, here on a matrix of four numbers
        tree = {"w": np.zeros((2, 2), np.float32)}
        om.offline_merge(tree, [tree] * len(config.models), **settings)
    except ValueError as error:
        raise UserError(f"merge settings: {error}.") from error
    return settings


Source = tuple[str, SafetensorsDir, dict[str, Any]]


def _open_sources(config: MergeConfig) -> list[Source]:
    """Opens the base, or where there is none the first model again, and then all models."""
    fields = [("base", config.base)] if config.base is not None else []
    fields += [(f"models[{i}].path", one.path) for i, one in enumerate(config.models)]
    opened = []
    for field, path in fields:
        with blamed_on(field):
            directory = resolve_model_dir(path)
            opened.append((field, SafetensorsDir(directory), read_hf_config(directory)))
    vocabularies = [load_tokenizer(path, field).get_vocab() for field, path in fields]
    for (field, path), vocabulary in zip(fields[1:], vocabularies[1:], strict=True):
        differing = {token for token, _ in vocabulary.items() ^ vocabularies[0].items()}
        if differing:
            token = min(differing)
            raise UserError(
                f"{field}: the tokenizer of {path} differs from that of {fields[0][1]} in "
                f"{len(differing)} tokens, for example {token!r}: id {vocabulary.get(token)} and "
                f"{vocabularies[0].get(token)}."
            )
    return opened if config.base is not None else [opened[0], *opened]


def _checked_names(sources: Sequence[Source], tied: bool) -> list[str]:
    """Returns the names of the tensors to merge: all models have them, in the same shapes."""
    first, base, hf_config = sources[0]
    skipped = {LM_HEAD} if tied else set()
    wanted = [name for name in base.entries if name not in skipped]
    problems = []
    for field, weights, theirs in sources:
        different = network_differences(hf_config, theirs)
        problems += [f"{field}: {text} in {first}" for text in different]
        if tied:
            check_tied(weights, field)
        for name in dict.fromkeys([*wanted, *weights.entries]):
            ours, other = base.entries.get(name), weights.entries.get(name)
            if name in skipped or (is_derived(name) and not (ours and other)):
                continue  # frequencies that old versions saved follow from the config
            if ours is None or other is None:
                problem = f"is {'missing' if other is None else 'additional'}"
            elif ours.shape != other.shape:
                problem = f"has shape {other.shape}, in {first} {ours.shape}"
            elif (ours.dtype is None) != (other.dtype is None):
                problem = f"is {other.dtype_name}, in {first} {ours.dtype_name}"
            elif other.dtype is None and other.dtype_name not in _INTEGERS:
                problem = f"is {other.dtype_name}, which cannot be merged"
            else:
                continue
            problems.append(f"{field}: {name} {problem}")
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"{'; '.join(problems[:5])}{more}. Only models of one shape can be merged.")
    return wanted


def _merged(
    config: MergeConfig,
    settings: dict[str, Any],
    base: SafetensorsDir,
    models: Sequence[SafetensorsDir],
    names: Sequence[str],
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the merged tensors; one that is the same in all models is copied."""
    # Weights that are not normalised scale even a tensor that all models share.
    fixed = config.method != "linear" or config.normalize is not False
    for name in names:
        origin = base.read(name)
        if base.entries[name].dtype is None or is_derived(name):
            yield name, origin
            continue
        others = [model.read(name) for model in models]
        dtype = config.dtype or origin.dtype
        if fixed and all(
            other.dtype == origin.dtype and other.tobytes() == origin.tobytes() for other in others
        ):
            merged = origin
        else:
            wide = [{name: array.astype(np.float32)} for array in (origin, *others)]
            merged = np.asarray(om.offline_merge(wide[0], wide[1:], **settings)[name])
        yield name, cast_checked(name, merged, dtype)


def _tied(
    tensors: Iterator[tuple[str, np.ndarray]], base: SafetensorsDir, tied: bool
) -> Iterator[tuple[str, np.ndarray]]:
    """Adds the output matrix where it equals the embedding and the base stores both."""
    for name, tensor in tensors:
        yield name, tensor
        if tied and name == EMBEDDING and LM_HEAD in base.entries:
            yield LM_HEAD, tensor


def _dtype_name(base: SafetensorsDir) -> str:
    """Returns the dtype of most of the stored numbers."""
    sizes = Counter[str]()
    for entry in base.entries.values():
        if entry.dtype is not None:
            sizes[entry.dtype.name] += math.prod(entry.shape)
    return sizes.most_common(1)[0][0]

"""Writes the decoder as a Hugging Face model directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from train.distributed.processes import fetch, is_first
from train.files.whole import check_absent_or_empty, whole_directory
from train.models.config import FREE_FIELDS, ModelConfig
from train.models.decoder import Decoder, split_model
from train.models.hf import check_tensors
from train.models.hf_names import EMBEDDING, LM_HEAD, decoder_leaves
from train.models.model_dir import read_hf_config, resolve_model_dir
from train.models.safetensors_dir import INDEX_FILE, SINGLE_FILE, SafetensorsDir

# Files that belong to a model besides weights and config.json; each is copied where it exists.
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
)


def to_hf(
    model: Decoder,
    out_path: str | Path,
    *,
    like: str | Path,
    dtype: Any = None,
    max_shard_size: int = 5_000_000_000,
    card: str | None = None,
) -> Path:
    """Writes a model so that transformers, vLLM and others load it.

    The directory has exactly the tensors of ``like``, its ``config.json``, generation settings,
    tokenizer and chat templates. It is written beside ``out_path`` and renamed when complete, so
    ``out_path`` is either absent or whole. On several processes all must call this, and the first
    one writes.

    Args:
        model: the decoder to write.
        out_path: a directory that does not exist or is empty.
        like: directory or hub name of the checkpoint the model was loaded from.
        dtype: dtype of all tensors. None keeps each tensor's dtype in ``like``: an untouched checkpoint
            comes back bit for bit, and float32 training results of a bfloat16 one are rounded.
        max_shard_size: bytes per safetensors file; above it the tensors are spread over several
            with an index.
        card: model card, written as ``README.md``; none when None.

    Returns:
        ``out_path``.

    Raises:
        FileExistsError: ``out_path`` is a file or a directory that holds something.
        ValueError: ``like`` describes another network, or a value is finite in the model and
            infinite in the dtype to write.

    Example:
        >>> to_hf(model, "out/aligned", like="models/smollm2")           # doctest: +SKIP
    """
    out, source = Path(out_path), resolve_model_dir(like)
    if is_first():
        check_absent_or_empty(out)
    _check_same_network(model.config, ModelConfig.from_hf(read_hf_config(source)), source)
    weights = SafetensorsDir(source)
    check_tensors(weights, model.config)
    tensors = _tensors(model, weights, dtype)
    if not is_first():
        for _ in tensors:  # the first process asks for this one's parts of them
            pass
        return out
    name = None if dtype is None else np.dtype(dtype).name
    write_model_dir(out, tensors, source, name, max_shard_size, card)
    return out


def write_model_dir(
    out: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    source: Path,
    dtype: str | None,
    max_shard_size: int,
    card: str | None,
) -> None:
    """Writes a whole model directory, of which all but the weights and the card comes from ``source``.

    ``out`` does not exist or is empty. ``tensors`` are taken one at a time, and ``max_shard_size``
    is in bytes. ``config.json`` names ``dtype``, or that of ``source`` where it is None. ``card``
    becomes ``README.md``; None writes none.
    """
    with whole_directory(out) as partial:
        save_tensors(tensors, partial, max_shard_size)
        if dtype is None:
            shutil.copyfile(source / "config.json", partial / "config.json")
        else:
            hf_config = read_hf_config(source)
            # transformers 5 calls it "dtype", 4 "torch_dtype"; keep the spelling that is there.
            key = "torch_dtype" if "torch_dtype" in hf_config else "dtype"
            text = json.dumps({**hf_config, key: dtype}, indent=2)
            (partial / "config.json").write_text(text + "\n", encoding="utf-8")
        for name in _COPIED:
            if (source / name).is_dir():
                shutil.copytree(source / name, partial / name)
            elif (source / name).exists():
                shutil.copyfile(source / name, partial / name)
        if card is not None:
            (partial / "README.md").write_text(card, encoding="utf-8")


def save_tensors(
    tensors: Iterable[tuple[str, np.ndarray]], directory: Path, max_shard_size: int
) -> None:
    """Writes tensors to one safetensors file, or to several with an index.

    Holds at most one shard in memory, besides what the iterator holds.
    """
    shards: list[tuple[Path, list[str]]] = []
    pending: dict[str, np.ndarray] = {}
    total = 0

    def flush() -> None:
        file = directory / f"shard-{len(shards)}"
        save_file(pending, file, metadata={"format": "pt"})
        file.chmod(directory.stat().st_mode & 0o666)  # save_file leaves it private to its owner
        shards.append((file, list(pending)))
        pending.clear()

    for name, tensor in tensors:
        held = sum(other.nbytes for other in pending.values())
        if pending and held + tensor.nbytes > max_shard_size:
            flush()
        pending[name] = np.ascontiguousarray(tensor)
        total += tensor.nbytes
    flush()
    if len(shards) == 1:
        shards[0][0].rename(directory / SINGLE_FILE)
        return
    weight_map = {}
    for number, (file, names) in enumerate(shards, start=1):
        final = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        file.rename(directory / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _tensors(
    model: Decoder, weights: SafetensorsDir, dtype: Any
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the tensors of ``weights`` with the model's values, one at a time on the host."""
    _, params = split_model(model)
    flat = dict(nnx.to_flat_state(nnx.State(params)))
    written = set()
    for path, leaf in decoder_leaves(model.config).items():
        for name, values in zip(leaf.names, _layers(flat[path], leaf.stacked), strict=True):
            values = values.T if leaf.transposed else values
            copies = [name, LM_HEAD] if name == EMBEDDING and model.lm_head is None else [name]
            for target in copies:
                if target in weights.entries:
                    written.add(target)
                    wanted = dtype or weights.entries[target].dtype
                    yield target, cast_checked(target, values, wanted)
    for name in weights.entries:
        if name not in written:
            yield name, weights.read(name)  # derived tensors of old versions


def _layers(array: jax.Array, stacked: bool) -> Iterator[np.ndarray]:
    """Yields the layers on the host, one at a time where several processes share the array."""
    if not stacked:
        yield fetch(array)
    elif array.is_fully_addressable:
        yield from np.asarray(array)
    else:
        for number in range(len(array)):
            yield fetch(_layer(array, number))


@jax.jit
def _layer(array: jax.Array, number: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(array, number, keepdims=False)


def cast_checked(name: str, values: np.ndarray, dtype: Any) -> np.ndarray:
    """The tensor in another dtype; `ValueError` with its name if a finite value becomes infinite."""
    with np.errstate(over="ignore"):
        cast = values.astype(dtype)
    lost = np.isfinite(values.astype(np.float32)) & ~np.isfinite(cast.astype(np.float32))
    if lost.any():
        raise ValueError(
            f"{name} holds {int(lost.sum())} values beyond the range of {np.dtype(dtype)}; write "
            "with dtype float32 or bfloat16"
        )
    return cast


def _check_same_network(model: ModelConfig, like: ModelConfig, source: Path) -> None:
    different = [
        f"{name} is {value!r} in the model and {getattr(like, name)!r} there"
        for name, value in vars(model).items()
        if name not in FREE_FIELDS and value != getattr(like, name)
    ]
    if different:
        raise ValueError(f"{source} describes another network: {'; '.join(different)}")

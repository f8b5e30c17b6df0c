"""Reads Hugging Face model directories into the decoder."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding

from train.models.abstract import param_shardings
from train.models.attention import check_attention
from train.models.config import ModelConfig
from train.models.decoder import Decoder
from train.models.hf_names import (
    EMBEDDING,
    LM_HEAD,
    Leaf,
    abstract_decoder,
    decoder_leaves,
    is_derived,
)
from train.models.model_dir import read_hf_config, resolve_model_dir
from train.models.safetensors_dir import SafetensorsDir
from train.types import Params

_LISTED = 20  # tensors spelled out in an error before it only counts
# Fields that fix the shapes of the parameters, so two models with the same ones can be subtracted.
_SHAPE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_layers",
    "num_heads",
    "num_kv_heads",
    "head_dim",
    "tie_word_embeddings",
    "qkv_bias",
    "o_bias",
    "mlp_bias",
    "qk_norm",
)


def from_hf(
    path_or_hub_name: str | Path,
    *,
    dtype: Any = jnp.float32,
    param_dtype: Any = None,
    mesh: Mesh | None = None,
    remat: str = "none",
    attention: str = "xla",
) -> Decoder:
    """Loads a Llama, Qwen2 or Qwen3 checkpoint from safetensors files.

    Everything that can be wrong with the directory is checked from ``config.json`` and the headers
    of the files before weights are read. Tensors are read one at a time into the stacked parameter
    they belong to, so host memory beyond the model itself is one parameter; on a mesh it is one
    shard, for a process reads only what its own devices hold. No remote code is run and no pickle
    is opened.

    Args:
        path_or_hub_name: a directory, or a name like ``"Qwen/Qwen2.5-0.5B"`` to download.
        dtype: dtype of activations and, unless ``param_dtype`` says otherwise, of the parameters. None
            keeps the stored dtypes: each parameter takes the narrowest dtype that holds all of its
            layers' tensors, and activations the widest of all.
        param_dtype: dtype of the parameters.
        mesh: where to put the parameters, by the axes ``"fsdp"`` and ``"tensor"`` that they carry
            (see `param_shardings`). On the default device when None.
        remat: what blocks compute again in the backward pass, see `ModelConfig`.
        attention: which program computes it, see `ModelConfig`.

    Returns:
        The model, with ``model.config``.

    Raises:
        FileNotFoundError: no such directory or hub name, or files of the checkpoint are absent.
        ValueError: the architecture is not supported, a file is corrupt, or tensors are missing,
            unexpected, of another shape or of a dtype that is no float; one error lists them all.

    Example:
        >>> model = from_hf("models/smollm2", dtype=jnp.bfloat16)       # doctest: +SKIP
        >>> logits = model(tokens, mask)                                 # doctest: +SKIP
    """
    directory = resolve_model_dir(path_or_hub_name)
    shapes = ModelConfig.from_hf(read_hf_config(directory))
    weights = SafetensorsDir(directory)
    check_tensors(weights, shapes)
    stored = {
        path: _promote(weights.entries[name].dtype for name in leaf.names)
        for path, leaf in decoder_leaves(shapes).items()
    }
    compute = _promote(stored.values()) if dtype is None else np.dtype(dtype)
    held = param_dtype if param_dtype is not None else dtype
    config = dataclasses.replace(
        shapes,
        dtype=compute,
        param_dtype=compute if held is None else held,
        remat=remat,
        attention=attention,
    )
    check_attention(config)
    params = read_params(weights, config, mesh, stored if held is None else {})
    return nnx.merge(abstract_decoder(config)[0], params)


def read_params(
    weights: SafetensorsDir,
    config: ModelConfig,
    mesh: Mesh | None,
    dtypes: Mapping[tuple[str, ...], np.dtype] | None = None,
) -> Params:
    """Reads the decoder's parameters, a tree like `split_model`'s, once `check_tensors` has found them.

    `dtypes` holds, by path, those of parameters that have another one than ``config.param_dtype``.
    """
    places: Any = {} if mesh is None else flatten_dict(param_shardings(config, mesh))
    others = {} if dtypes is None else dtypes
    param_dtype = np.dtype(config.param_dtype)
    return unflatten_dict(
        {
            path: _load(weights, leaf, others.get(path, param_dtype), places.get(path))
            for path, leaf in decoder_leaves(config).items()
        }
    )


def check_hf_compatible(
    path_or_hub_name: str | Path, *, same_shapes_as: str | Path | None = None
) -> ModelConfig:
    """The configuration of a model directory, checked without reading weights.

    With ``same_shapes_as``, such as the base of a task vector, the parameters must match that
    model's.

    Raises:
        FileNotFoundError: see `from_hf`.
        ValueError: see `from_hf`; or the two differ in a field that fixes parameter shapes, each of
            which is named with both values.
    """
    checked = []
    for source in [path_or_hub_name] + ([] if same_shapes_as is None else [same_shapes_as]):
        directory = resolve_model_dir(source)
        config = ModelConfig.from_hf(read_hf_config(directory))
        check_tensors(SafetensorsDir(directory), config)
        checked.append(config)
    config, other = checked[0], checked[-1]
    different = [
        f"{name} is {getattr(config, name)} and {getattr(other, name)}"
        for name in _SHAPE_FIELDS
        if getattr(config, name) != getattr(other, name)
    ]
    if different:
        raise ValueError(
            f"{path_or_hub_name} and {same_shapes_as} do not have the same parameters: "
            f"{'; '.join(different)}"
        )
    return config


def check_tensors(weights: SafetensorsDir, config: ModelConfig, others: Sequence[str] = ()) -> None:
    """Raises one `ValueError` that names every tensor in the files that does not fit.

    Tensors named in `others` may be there too and are not checked.
    """
    leaves = decoder_leaves(config).values()
    expected = {name: leaf.hf_shape for leaf in leaves for name in leaf.names}
    found = weights.entries
    tied_copy = LM_HEAD if config.tie_word_embeddings else None
    allowed = {*expected, tied_copy, *others}
    problems = {
        "missing": [f"  {name} {list(expected[name])}" for name in expected if name not in found],
        "unexpected": [
            f"  {name} {list(entry.shape)} in {entry.file.name}"
            for name, entry in found.items()
            if name not in allowed and not is_derived(name)
        ],
        "of another shape": [
            f"  {name} in {found[name].file.name} is {list(found[name].shape)}, expected {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name].shape != shape
        ],
        "of another dtype": [
            f"  {name} in {found[name].file.name} is {found[name].dtype_name}; F32, F16, BF16 are read"
            for name in expected
            if name in found and found[name].dtype is None
        ],
    }
    lines: list[str] = []
    for kind, items in problems.items():
        rest = len(items) - _LISTED
        lines += [f"{len(items)} {kind}:", *items[:_LISTED]] if items else []
        lines += [f"  and {rest} more"] if rest > 0 else []
    if lines:
        raise ValueError(
            f"the tensors in {weights.directory} do not fit its config.json "
            f"(model_type {config.model_type}):\n" + "\n".join(lines)
        )
    if (
        tied_copy in found
        and tied_copy not in others
        and not np.array_equal(weights.read(LM_HEAD), weights.read(EMBEDDING))
    ):
        raise ValueError(
            f"{weights.directory}: config.json has tie_word_embeddings true, but {LM_HEAD} differs "
            f"from {EMBEDDING}; set tie_word_embeddings to false to use both"
        )


def _promote(dtypes: Any) -> np.dtype:
    # bfloat16 and float16 promote to float32, which holds both exactly.
    return np.dtype(jnp.result_type(*set(dtypes)))


def _load(
    weights: SafetensorsDir, leaf: Leaf, dtype: np.dtype, sharding: NamedSharding | None
) -> jax.Array:
    read: Any = functools.partial(_read_shard, weights, leaf, dtype)
    if sharding is None:
        return jnp.asarray(read((slice(None),) * len(leaf.shape)))
    # Each process reads the shards of its own devices only.
    return jax.make_array_from_callback(leaf.shape, sharding, read)


def _read_shard(
    weights: SafetensorsDir, leaf: Leaf, dtype: np.dtype, index: tuple[slice, ...]
) -> np.ndarray:
    """The part of a parameter that `index` says, read from the files alone."""
    spans = [range(size)[part] for size, part in zip(leaf.shape, index, strict=True)]
    host = np.empty([len(span) for span in spans], dtype)
    inner = index[1:] if leaf.stacked else index
    chosen = [leaf.names[i] for i in spans[0]] if leaf.stacked else leaf.names
    slots = host if leaf.stacked else [host]
    for slot, name in zip(slots, chosen, strict=True):
        tensor = weights.read(name, inner[::-1] if leaf.transposed else inner)
        slot[...] = tensor.T if leaf.transposed else tensor
    return host

"""Reads a Hugging Face model for sequence classification with one label: a reward model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from train.models.config import ModelConfig
from train.models.decoder import merge_model
from train.models.hf import check_tensors, read_params
from train.models.hf_names import LM_HEAD, abstract_decoder
from train.models.model_dir import read_hf_config, resolve_model_dir
from train.models.safetensors_dir import SafetensorsDir
from train.types import Params

SCORE = "score.weight"
_SUFFIX = "ForSequenceClassification"


class RewardModel(NamedTuple):
    """A decoder whose last hidden state is multiplied with one vector, ``score`` ``[hidden_size]``."""

    graphdef: nnx.GraphDef
    params: Params
    score: jax.Array


def check_reward_model(path_or_hub_name: str | Path) -> ModelConfig:
    """The configuration of a reward model's decoder, from ``config.json`` and the files' headers.

    The decoder has no output matrix of its own.

    Raises:
        FileNotFoundError: no such directory or hub name, or files are absent.
        ValueError: it is no model for sequence classification, has more labels than one, another
            architecture than the decoder's, or tensors that do not fit; the message says which.
    """
    directory = resolve_model_dir(path_or_hub_name)
    hf = read_hf_config(directory)
    names = hf.get("architectures") or []
    if not any(str(name).endswith(_SUFFIX) for name in names):
        raise ValueError(
            f"{directory}: config.json has architectures {names!r}; a reward model is a "
            f"…{_SUFFIX} with one label, such as TRL's RewardTrainer writes"
        )
    # Its head is the score, so the embedding may count as the output matrix that nobody asks for.
    config = ModelConfig.from_hf({**hf, "tie_word_embeddings": True})
    weights = SafetensorsDir(directory)
    check_tensors(weights, config, others=(SCORE, LM_HEAD))
    shape = weights.entries[SCORE].shape if SCORE in weights.entries else None
    if shape != (1, config.hidden_size):
        found = "missing" if shape is None else list(shape)
        raise ValueError(
            f"{directory}: {SCORE} is {found}, expected [1, {config.hidden_size}]: a reward model has "
            "one label and no bias"
        )
    return config


def load_reward_model(
    path_or_hub_name: str | Path, *, dtype: Any = jnp.float32, mesh: Mesh | None = None
) -> RewardModel:
    """Loads a reward model; see `check_reward_model` for what is refused."""
    config = dataclasses.replace(
        check_reward_model(path_or_hub_name), dtype=np.dtype(dtype), param_dtype=np.dtype(dtype)
    )
    weights = SafetensorsDir(resolve_model_dir(path_or_hub_name))
    params = read_params(weights, config, mesh)
    score = weights.read(SCORE)[0].astype(config.param_dtype)
    place = None if mesh is None else NamedSharding(mesh, PartitionSpec())
    return RewardModel(abstract_decoder(config)[0], params, jax.device_put(score, place))


def last_token_scores(model: RewardModel, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Scores of whole texts, float32 ``[batch]``, as transformers computes its one logit.

    ``tokens`` are int32 ``[batch, length]``, padded on either side; ``mask`` is True at real
    tokens, at one at least in a row. The score is that of the last one. transformers looks for the
    last token that is not the padding token, which passes over a closing end token where that pads
    too.
    """
    hidden = merge_model(model.graphdef, model.params).hidden(tokens, mask)
    places = jnp.arange(mask.shape[1])
    last = jnp.max(jnp.where(mask, places, 0), axis=1)
    pooled = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
    return jnp.matmul(pooled, model.score, preferred_element_type=jnp.float32)

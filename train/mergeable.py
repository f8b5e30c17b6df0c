"""Whether model directories can be merged: their tensors, network and vocabulary, without weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from train.config import UserError
from train.models import ModelConfig, read_hf_config, resolve_model_dir
from train.models.hf_names import EMBEDDING, LM_HEAD, is_derived
from train.models.safetensors_dir import Entry, SafetensorsDir
from train.prepare import blamed_on, load_tokenizer

_SHOWN = 10
# Fields that change no output of the network for given weights.
_FREE = ("dtype", "param_dtype", "remat", "initializer_range", "max_position_embeddings")
# What models of one architecture must agree in where the decoder does not know the architecture.
_COMPARED = ("model_type", "architectures", "tie_word_embeddings", "rms_norm_eps", "hidden_act")


@dataclasses.dataclass(frozen=True)
class Mergeable:
    """A model directory seen from its config and the headers of its files.

    Attributes:
        directory: Where it is.
        field: The setting that gave it, for messages.
        hf_config: Its ``config.json``.
        weights: Its tensors.
        merged: Names of the tensors to merge: parameters, a tied copy left out.
        ties: Whether the output layer is the embedding.
    """

    directory: Path
    field: str
    hf_config: dict[str, Any]
    weights: SafetensorsDir
    merged: frozenset[str]
    ties: bool

    @property
    def widest(self) -> np.dtype:
        """The narrowest dtype that holds the values of all parameters."""
        return np.dtype(jnp.result_type(*{self.weights.entries[n].dtype for n in self.merged}))


def open_mergeable(path: str, field: str) -> Mergeable:
    """Opens a model directory, or fetches one from the hub.

    Args:
        path: Directory or hub name.
        field: The setting that gave it, for messages.

    Raises:
        UserError: something is missing or damaged, or numbers cannot be merged in their dtype.
    """
    with blamed_on(field):
        directory = resolve_model_dir(path)
        hf_config = read_hf_config(directory)
        weights = SafetensorsDir(directory)
    ties = bool(hf_config.get("tie_word_embeddings")) and EMBEDDING in weights.entries
    copy = LM_HEAD if ties else None
    odd = [
        f"{name} ({entry.dtype_name})"
        for name, entry in weights.entries.items()
        if entry.dtype is None and not _is_discrete(entry)
    ]
    if odd:
        raise UserError(f"{field}: F32, F16 and BF16 are merged; {_listed(odd)} cannot be.")
    merged = frozenset(
        name
        for name, entry in weights.entries.items()
        if name != copy and not is_derived(name) and not _is_discrete(entry)
    )
    if (
        ties
        and LM_HEAD in weights.entries
        and not np.array_equal(weights.read(LM_HEAD), weights.read(EMBEDDING))
    ):
        raise UserError(
            f"{field}: config.json has tie_word_embeddings true, but {LM_HEAD} differs from "
            f"{EMBEDDING}."
        )
    return Mergeable(directory, field, hf_config, weights, merged, ties)


def check_mergeable(origin: Mergeable, other: Mergeable) -> None:
    """Checks that two models are of one architecture and one vocabulary.

    Raises:
        UserError: names the setting that gave the other one, and all that differs.
    """
    problems = _tensor_differences(origin, other) or _network_differences(origin, other)
    if problems:
        raise UserError(
            f"{other.field}: not of one architecture with {origin.field}: {_listed(problems)}."
        )
    theirs, ours = (load_tokenizer(str(m.directory), m.field).get_vocab() for m in (other, origin))
    differing = sorted(t for t in {*ours, *theirs} if ours.get(t) != theirs.get(t))
    if differing:
        token = differing[0]
        raise UserError(
            f"{other.field}: its tokenizer differs from that of {origin.field} in {len(differing)} "
            f"tokens, for example {token!r}: id {theirs.get(token)} and {ours.get(token)}."
        )


def _tensor_differences(origin: Mergeable, other: Mergeable) -> list[str]:
    problems = []
    for name in sorted(origin.merged | other.merged):
        if name not in other.merged:
            problems.append(f"{name} is missing")
        elif name not in origin.merged:
            problems.append(f"{name} is only there")
        else:
            ours, theirs = origin.weights.entries[name].shape, other.weights.entries[name].shape
            if ours != theirs:
                problems.append(f"{name} has shape {list(theirs)} and {list(ours)}")
    return problems


def _network_differences(origin: Mergeable, other: Mergeable) -> list[str]:
    try:
        ours, theirs = (vars(ModelConfig.from_hf(model.hf_config)) for model in (origin, other))
        names = [name for name in ours if name not in _FREE]
    except ValueError:  # an architecture that the decoder does not have
        ours, theirs, names = origin.hf_config, other.hf_config, list(_COMPARED)
    return [
        f"{name} is {theirs.get(name)!r} and {ours.get(name)!r}"
        for name in names
        if theirs.get(name) != ours.get(name)
    ]


def _is_discrete(entry: Entry) -> bool:
    return entry.dtype_name.startswith(("I", "U", "BOOL"))


def _listed(problems: list[str]) -> str:
    rest = len(problems) - _SHOWN
    return "; ".join(problems[:_SHOWN]) + (f"; and {rest} more" if rest > 0 else "")

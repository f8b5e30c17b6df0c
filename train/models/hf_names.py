"""Which Hugging Face tensors each parameter of the decoder is made of."""

from __future__ import annotations

import dataclasses
import functools

import jax
from flax import nnx

from train.models.config import ModelConfig
from train.models.decoder import Decoder

Path = tuple[str, ...]

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
_TOP_NAMES: dict[Path, str] = {("embed_tokens",): EMBEDDING, ("lm_head",): LM_HEAD}


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One parameter of the decoder and where it comes from.

    Attributes:
        names: Hugging Face tensors: one per layer, along axis 0, when ``stacked``, else one.
        transposed: Hugging Face stores the last two axes the other way round.
        shape: shape of the parameter, the stacking axis included.
        axes: logical axis of each axis, see `train.distributed.axes`.
    """

    names: tuple[str, ...]
    stacked: bool
    transposed: bool
    shape: tuple[int, ...]
    axes: tuple[str | None, ...]

    @property
    def hf_shape(self) -> tuple[int, ...]:
        """Shape of each Hugging Face tensor."""
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape


def abstract_decoder(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.State]:
    """Structure of the decoder and shapes of its parameters, without allocating them."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, nnx.Rngs(0))))


@functools.cache
def decoder_leaves(config: ModelConfig) -> dict[Path, Leaf]:
    """Every parameter of the decoder by its path in the tree of `split_model`, in its order."""
    leaves = {}
    for parts, variable in nnx.to_flat_state(abstract_decoder(config)[1]):
        path = tuple(str(part) for part in parts)
        shape, axes = jax.tree.leaves(variable)[0].shape, variable.get_metadata("logical_axes")
        stacked = path[0] == "layers"
        if path in _TOP_NAMES:
            names = (_TOP_NAMES[path],)
        else:
            last = "weight" if path[-1] == "kernel" else path[-1]
            inner = ".".join((*path[1:-1], last))
            layers = [f"layers.{i}" for i in range(config.num_layers)] if stacked else [path[0]]
            names = tuple(f"model.{layer}.{inner}" for layer in layers)
        leaves[path] = Leaf(
            names,
            stacked,
            transposed=path[-1] in ("kernel", "lm_head"),
            shape=tuple(shape),
            axes=(None, *axes) if stacked else tuple(axes),
        )
    return leaves


def is_derived(name: str) -> bool:
    """Whether a tensor is no parameter: old versions saved the rotary frequencies of config.json."""
    return name.endswith(".rotary_emb.inv_freq")
